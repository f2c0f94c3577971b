"""Decoding in a process of its own: whatever a clip does to the decoder, the caller gets frames or an error.

FFmpeg and decord are large, written in C, and some files make them abort, hang or take all memory; nothing in their own
process can prevent that. Here a worker decodes: another Python that has loaded the decoders and little else, used again
from clip to clip, killed and replaced when it dies or exceeds a limit. Several threads use as many workers.

A worker is started anew and never forked from this process, is not used across a fork (a forked process starts workers of
its own), and ends with the process that started it. Its answers are JSON and pixels; nothing of it is ever unpickled or run.

Legend of the shape comments: T frames asked for, H and W px.
"""

import atexit
import contextlib
import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .decode_limits_video_panda import VideoPandaDecodeError, VideoPandaDecodeLimits
from .frame_reading_video_panda import VideoPandaDescription, VideoPandaSource
from .isolated_memory_video_panda import VideoPandaFrameMemory, open_memory
from .isolated_worker_video_panda import receive_message, send_message, write_all

_START_SECONDS = 120.0  # on a machine that is busy with other things
_MAX_IDLE_WORKERS = 8
_TOO_FEW = "the worker gave fewer pixels than it said"
# The worker imports this folder as a package of its own, without what `__init__` files would load: so it works for the
# installed package as well as for the copies of these files that come with a checkpoint.
_START = (
    "import importlib, json, sys, types; folder, descriptor, path = sys.argv[1:]; sys.path[:] = json.loads(path); "
    "package = types.ModuleType('video_panda_worker'); package.__path__ = [folder]; sys.modules[package.__name__] = package; "
    "importlib.import_module('video_panda_worker.isolated_worker_video_panda').serve(int(descriptor))"
)
# What glibc's allocator keeps for the next frame. By itself it gives back what a frame took, and new pages cost a tenth of the time.
_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(2**27), "MALLOC_TRIM_THRESHOLD_": str(2**27)}
# All else that a worker sees of the environment: no tokens, no proxies.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")


def read_isolated(
    opened: VideoPandaSource,
    choose_frames: Callable[[VideoPandaDescription], list[int]],
    limits: VideoPandaDecodeLimits,
) -> tuple[np.ndarray, list[int], str]:
    """As `read_frames`, in a worker process.

    Args:
        opened: the source.
        choose_frames: called once, in this process; returns the frame indices wanted.
        limits: what the video may take.

    Returns:
        (frames, indices, backend): uint8 (T, H, W, 3), the indices as chosen, and what decoded them.

    Raises:
        VideoPandaDecodeError: the video cannot be read, exceeds a limit, or ended the worker.
        ImportError: no decoder is installed.
        RuntimeError: a worker does not start; and what `choose_frames` raises.
    """
    workers = _pool()
    worker = workers.borrow()
    try:
        return worker.read(opened, choose_frames, limits)
    finally:
        # After Ctrl-C in the middle of an answer it is not.
        if worker.is_idle:
            workers.give_back(worker)
        else:
            workers.end(worker)


class _VideoPandaWorker:
    """One worker process.

    Args:
        memory: where it may write frames.

    Attributes:
        is_idle: whether it is alive and waits for a request.
    """

    def __init__(self, memory: VideoPandaFrameMemory):
        self.is_idle = False
        self._memory = memory
        self._channel, other_end = socket.socketpair()
        folder = str(Path(__file__).resolve().parent)
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        with other_end:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, folder, str(other_end.fileno()), path],
                pass_fds=(other_end.fileno(),),
                env=_ALLOCATION | {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            self._listen(time.monotonic() + _START_SECONDS)
        except (EOFError, OSError, ValueError) as error:
            self.end()
            raise RuntimeError(f"the worker that decodes videos does not start: {self._death()}") from error
        self.is_idle = True

    def is_alive(self) -> bool:
        """Whether the process still runs; one that waits for work may have been killed by the system."""
        return self._process.poll() is None

    def read(
        self, opened: VideoPandaSource, choose_frames: Callable, limits: VideoPandaDecodeLimits
    ) -> tuple[np.ndarray, list[int], str]:
        """As `read_isolated`."""
        self.is_idle = False
        self._opened, self._limits = opened, limits
        self._deadline = time.monotonic() + limits.seconds
        with _as_open_file(opened.content) as (path, files):
            answer = self._ask({"path": path, "name": opened.name, "limits": asdict(limits)}, files)
            description = self._checked_description(answer)
            before = time.monotonic()
            try:
                indices = choose_frames(description)
            except BaseException:
                with contextlib.suppress(OSError):
                    send_message(self._channel, {"indices": None})
                    self.is_idle = True
                raise
            self._deadline += time.monotonic() - before  # the caller's own time
            shape = (len(indices), description.height, description.width, 3)  # (T, H, W, 3)
            frames = self._receive_frames(shape, indices)
        self.is_idle = True
        return frames, indices, self._backend

    def _receive_frames(self, shape: tuple[int, int, int, int], indices: list[int]) -> np.ndarray:
        """Let the worker write the frames into memory of ours."""
        num_bytes = math.prod(shape)
        output = self._memory.take_file(num_bytes)
        try:
            answer = self._ask({"indices": indices, "num_bytes": num_bytes}, [output])
            if answer.get("num_bytes") != num_bytes:
                raise self._error(f"the worker gave a wrong answer: {answer}")
            if answer.get("written") != list(range(len(indices))):
                raise self._error(_TOO_FEW)  # what lies in the other places is of an earlier video, or nothing
        except BaseException:
            output.close()
            raise
        frames = self._memory.frames_in(output, shape)
        if frames is None:
            raise self._error(_TOO_FEW)
        self._backend = str(answer.get("backend"))
        return frames

    def end(self) -> None:
        """Kill it, whatever it is doing."""
        self.is_idle = False
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self.forget()

    def forget(self) -> None:
        """Close what this process has of it. In a forked process the worker goes on, for the process that started it."""
        self.is_idle = False
        self._channel.close()

    def forget_process(self) -> None:
        """After a fork: it is no child of this process, which must not wait for it, nor warn that it runs."""
        self._process.returncode = 0

    def _ask(self, message: dict, files: list) -> dict:
        """Send a message and wait for the answer to it.

        Raises:
            VideoPandaDecodeError: the answer is that the video cannot be read, or there is none.
            ImportError: no decoder is installed.
        """
        try:
            self._channel.settimeout(max(0.001, self._deadline - time.monotonic()))
            send_message(self._channel, message, tuple(file.fileno() for file in files))
            answer = self._listen(self._deadline)
        except TimeoutError:
            raise self._error(f"decoding did not end within {self._limits.seconds:g} s") from None
        except (EOFError, OSError) as error:
            self.end()
            raise self._error(f"decoding it ended the worker process: {self._death()}") from error
        except ValueError as error:
            raise self._error(f"the worker gave a wrong answer: {error}") from error
        if "error" in answer:
            self.is_idle = True
            raise VideoPandaDecodeError(str(answer["error"]))
        if "import_error" in answer:
            self.is_idle = True
            raise ImportError(str(answer["import_error"]))
        return answer

    def _listen(self, deadline: float) -> dict:
        self._channel.settimeout(max(0.001, deadline - time.monotonic()))
        message, files = receive_message(self._channel)
        for file in files:
            os.close(file)
        return message

    def _checked_description(self, answer: dict) -> VideoPandaDescription:
        """What the worker says about the video, of the kinds that it must be of."""
        try:
            told = answer["metadata"]
            numbers = {key: int(told[key]) for key in ("total_num_frames", "width", "height")}
            rates = {key: None if told[key] is None else float(told[key]) for key in ("fps", "duration")}
            times = told["source_frame_times"]
            times = None if times is None else [float(time_s) for time_s in times]
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(f"the worker gave a wrong answer: {error!r}") from error
        if min(numbers.values()) < 1 or (times is not None and len(times) != numbers["total_num_frames"]):
            raise self._error(f"the worker gave a wrong answer: {numbers}")
        try:
            self._limits.check_num_frames(numbers["total_num_frames"])
            self._limits.check_frame_size(numbers["width"], numbers["height"])
        except ValueError as error:
            raise self._error(str(error)) from None
        return VideoPandaDescription(**numbers, **rates, source_frame_times=times)

    def _error(self, reason: str) -> VideoPandaDecodeError:
        return self._opened.error(reason)

    def _death(self) -> str:
        """How the process ended."""
        code = self._process.returncode
        if code is None:
            return "it is still there"
        if code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"


class _VideoPandaWorkers:
    """The workers of this process: lent to one thread at a time, kept for the next one."""

    def __init__(self):
        self._lock = threading.Lock()
        self._idle: list[_VideoPandaWorker] = []
        self._all: set[_VideoPandaWorker] = set()
        self.memory = VideoPandaFrameMemory()

    def borrow(self) -> _VideoPandaWorker:
        """A worker for this thread alone: an idle one, or a new one."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive():
                    return worker
                self._all.discard(worker)
                worker.end()
        worker = _VideoPandaWorker(self.memory)
        with self._lock:
            self._all.add(worker)
        return worker

    def give_back(self, worker: _VideoPandaWorker) -> None:
        """Take back a worker that is idle."""
        with self._lock:
            if len(self._idle) < _MAX_IDLE_WORKERS and worker in self._all:
                self._idle.append(worker)
                return
        self.end(worker)

    def end(self, worker: _VideoPandaWorker) -> None:
        """End a worker that is not to be used again."""
        with self._lock:
            self._all.discard(worker)
        worker.end()

    def end_all(self) -> None:
        """End those that are idle, and see to it that the others end when they are given back."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._all.clear()
        for worker in idle:
            worker.end()
        self.memory.forget()

    def forget_all(self) -> None:
        """After a fork, in the new process: these are the workers of another one."""
        for worker in self._all:
            worker.forget_process()
            worker.forget()
        self.memory.forget()


_workers: _VideoPandaWorkers | None = None
_making_pool = threading.Lock()


def _pool() -> _VideoPandaWorkers:
    """The workers of this process."""
    global _workers
    with _making_pool:
        if _workers is None:
            _workers = _VideoPandaWorkers()
            _watch_forks_and_exit()
        return _workers


@functools.cache
def _watch_forks_and_exit() -> None:
    """Once, and not at import: most programs never use a worker."""
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_forked_process)
    atexit.register(end_workers)


def _before_fork() -> None:
    if _workers is not None:
        _workers.memory.begin_fork()


def _after_fork() -> None:
    if _workers is not None:
        _workers.memory.end_fork()


def _in_forked_process() -> None:
    """In a process that was forked from this one: locks may be held by threads that do not exist here."""
    global _workers, _making_pool
    if _workers is not None:
        _workers.forget_all()
    _workers, _making_pool = None, threading.Lock()


def end_workers() -> None:
    """End the idle worker processes of this process; the next video that is read in isolation starts new ones."""
    if _workers is not None:
        _workers.end_all()


@contextlib.contextmanager
def _as_open_file(content: str | bytes) -> Iterator[tuple[str | None, list]]:
    """(path, open files to send along) under which a worker finds a source: a path, or bytes."""
    if isinstance(content, str):
        yield content, []
    elif hasattr(os, "memfd_create"):
        with open_memory() as file:
            write_all(file.fileno(), memoryview(content))
            yield None, [file]
    else:
        with tempfile.NamedTemporaryFile() as file:
            write_all(file.fileno(), memoryview(content))
            yield file.name, []
