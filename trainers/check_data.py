"""Find the samples that training would refuse or skip, before it starts: every clip is read as training would read it.

The clips are read in processes of their own. One that crashes its process or never ends is a bad clip like any other:
the process is replaced and the others go on.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

import torch
from tqdm import tqdm

from ..processing.decode_limits_video_panda import VideoPandaDecodeLimits
from ..processing.image_processing_video_panda import VideoPandaImageProcessor
from ..processing.video_processing_video_panda import VideoPandaVideoProcessor
from .samples import SampleError, load_samples, parse_sample, split_indexed, visual_path

INVALID, UNREADABLE, TIMEOUT, CRASH = "invalid", "unreadable", "timeout", "crash"
_REPORT_HEADER = {"kind": "check-data report", "version": 1}
# These may have had another cause than the clip (a busy machine, too little memory): tried again by the next run.
_TRIED_AGAIN = (TIMEOUT, CRASH)
_START_TIMEOUT_S = 300.0
# The time is the pool's to limit: a clip that took too long on a busy machine is tried again, an unreadable one is not.
_LIMITS = VideoPandaDecodeLimits(seconds=24 * 3600.0)


@dataclass(frozen=True)
class CheckReport:
    """What `check_data` found.

    Attributes:
        num_samples: samples in the data.
        num_clips: different videos and pictures that they name.
        num_bad: samples with something wrong.
        bad: one dictionary for each thing that is wrong, in the order of the samples: `index`, `id`, `reason_kind`
            ("invalid": not a sample; "unreadable", "timeout", "crash": its file), `path` and `reason`.
        num_read: clips that were read now, the rest being known from an earlier run.
        report: where the report was written, or None.
    """

    num_samples: int
    num_clips: int
    num_bad: int
    bad: list[dict] = field(repr=False)
    num_read: int = 0
    report: Path | None = None


def check_data(
    file,
    root: str | os.PathLike | None = None,
    *,
    num_workers: int | None = None,
    report: str | os.PathLike | None = None,
    num_frames: int | None = None,
    timeout_s: float = 60.0,
    show_progress: bool = True,
) -> CheckReport:
    """Read every video and picture of training data once, in parallel, and say what is wrong with which sample.

    Interrupted (Ctrl-C) or killed, it goes on where it was when it is called again with the same report: a clip of the
    same size and time of change is not read again. In a program, call it under `if __name__ == "__main__":`.

    Args:
        file: what `load_samples` takes: a JSON or JSONL file, a list or a dataset.
        root: the folder that the samples' paths are relative to; default: the current folder.
        num_workers: processes; default: one for each processor core this one may use.
        report: the report, JSON lines; default: beside the file, `FILE.check.jsonl`; none for lists and datasets.
        num_frames: frames of a video; default 8, as in training.
        timeout_s: a clip that takes longer counts as bad, seconds.
        show_progress: whether to draw the progress bar (on stderr).

    Returns:
        What was found.

    Raises:
        OSError: the file is missing, or the report cannot be written.
        ValueError: the file is no list of samples, there are none, an option does not fit, or the report is a file of
            another kind.
        RuntimeError: the processes do not start.
        KeyboardInterrupt: after the processes were stopped; what was checked stands in the report.
    """
    num_workers = _num_cores() if num_workers is None else num_workers
    num_frames = VideoPandaVideoProcessor.num_frames if num_frames is None else num_frames
    for name, value in (("num_workers", num_workers), ("num_frames", num_frames)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    if not timeout_s > 0:
        raise ValueError(f"`timeout_s` must be a positive number of seconds, got {timeout_s!r}")
    if root is not None and not os.path.isdir(root):
        raise ValueError(f"`root` must be the folder of the videos and pictures, got {os.fspath(root)!r}")
    if report is None and isinstance(file, (str, os.PathLike)):
        report = f"{os.fspath(file)}.check.jsonl"
    plan = _Plan.of(load_samples(file), root)
    if not plan.num_samples:
        raise ValueError(f"{file if isinstance(file, (str, os.PathLike)) else 'the dataset'} holds no samples")

    journal = _Journal(report, num_frames)
    results: dict[tuple[str, str], tuple[str, str] | None] = {}
    num_read = num_bad_clips = 0
    pool = ClipPool(check_clip, num_frames, min(num_workers, max(1, len(plan.clips))), timeout_s)
    with journal, tqdm(total=len(plan.clips), desc="clips", unit="clip", disable=not show_progress) as bar:
        with contextlib.closing(pool.run(journal.not_yet_known(plan.clips, results, bar))) as read:
            for clip, problem in read:
                results[clip] = problem
                journal.add(clip, problem)
                num_read += 1
                num_bad_clips += problem is not None
                bar.set_postfix(bad=num_bad_clips, refresh=False)
                bar.update()
        bad = plan.judge(results)
        journal.add_bad_samples(bad)
    num_bad = len({entry["index"] for entry in bad})
    return CheckReport(plan.num_samples, len(plan.clips), num_bad, bad, num_read, journal.path)


def check_clip(kind: str, path: str, num_frames: int) -> str | None:
    """Read one file as training would.

    Args:
        kind: "video" or "image".
        path: where it lies.
        num_frames: frames of a video.

    Returns:
        Why it cannot be read, or None.
    """
    try:
        if kind == "image":
            _image_processor().fetch_images(Path(path))
        else:
            _video_processor(num_frames).fetch_videos(Path(path), isolate=True, limits=_LIMITS)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


_image_processor = functools.cache(VideoPandaImageProcessor)


@functools.cache
def _video_processor(num_frames: int) -> VideoPandaVideoProcessor:
    return VideoPandaVideoProcessor(num_frames=num_frames)


def _num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------- the samples


@dataclass
class _Plan:
    """What is to be read, and for which samples.

    Attributes:
        num_samples: how many there are.
        clips: (kind, path) of each file, once; a dictionary for its order.
        uses: (index, id, clip) of every use of a file.
        bad: the samples that are none, and those whose file has no name; as in `CheckReport.bad`.
    """

    num_samples: int = 0
    clips: dict[tuple[str, str], None] = field(default_factory=dict)
    uses: list[tuple[int, object, tuple[str, str]]] = field(default_factory=list)
    bad: list[dict] = field(default_factory=list)

    @classmethod
    def of(cls, samples: Iterable, root) -> "_Plan":
        """Which clips the samples name, and what is wrong with the samples themselves."""
        plan = cls()
        for place, item in enumerate(tqdm(samples, desc="samples", unit="sample", disable=None, leave=False)):
            index, raw = split_indexed(item)
            index = place if index is None else index
            plan.num_samples += 1
            try:
                sample = parse_sample(raw, index)
            except SampleError as error:
                plan.bad.append(_entry(index, error.id, INVALID, None, str(error)))
                continue
            for visual in sample.visuals:
                try:
                    clip = visual["type"], os.fspath(visual_path(visual, root))
                except OSError as error:
                    plan.bad.append(_entry(index, sample.id, UNREADABLE, visual["path"], str(error)))
                    continue
                plan.clips[clip] = None
                plan.uses.append((index, sample.id, clip))
        return plan

    def judge(self, results: dict) -> list[dict]:
        """All that is wrong, given (reason_kind, reason) or None of every clip."""
        bad = list(self.bad)
        for index, sample_id, clip in self.uses:
            if results[clip] is not None:
                bad.append(_entry(index, sample_id, results[clip][0], clip[1], results[clip][1]))
        return sorted(bad, key=lambda entry: entry["index"])


def _entry(index: int, sample_id: object, reason_kind: str, path: str | None, reason: str) -> dict:
    return {"index": index, "id": sample_id, "reason_kind": reason_kind, "path": path, "reason": reason}


# ------------------------------------------------------------------------------------------------------ the report


class _Journal:
    """The report: a header, a line for each clip as soon as it was read, and the bad samples at the end.

    Args:
        path: where it is, or is to be; None: nowhere.
        num_frames: frames of a video; a clip that was read for another number is read again.
    """

    def __init__(self, path: str | os.PathLike | None, num_frames: int):
        self.path = None if path is None else Path(path)
        self.num_frames = num_frames
        self._known: dict[tuple[str, str], dict] = {}
        self._file = None
        if self.path is not None and self.path.exists():
            self._known = self._read()

    def __enter__(self) -> "_Journal":
        if self.path is not None:
            # Written anew: the clips known so far without the samples, which are judged again. Beside it first, so that
            # a crash leaves the old one.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            with open(beside, "w", encoding="utf-8") as file:
                file.writelines(_json_line(record) for record in (_REPORT_HEADER, *self._known.values()))
            os.replace(beside, self.path)
            self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self) -> dict[tuple[str, str], dict]:
        records = []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):  # cut off when an earlier run was killed
                    records.append(json.loads(line))
        if not records or records[0] != _REPORT_HEADER:
            raise ValueError(
                f"{self.path} is not a report of check-data; give another `report`, it would be overwritten"
            )
        clips = [record for record in records if isinstance(record, dict) and record.get("kind") == "clip"]
        return {(clip["type"], clip["path"]): clip for clip in clips}

    def not_yet_known(self, clips: Iterable[tuple[str, str]], results: dict, bar) -> Iterator[tuple[str, str]]:
        """The clips that must be read; the others are put into `results`. Looks at each file's size and time only."""
        for clip in clips:
            known = self._known.get(clip)
            if known is None or known["state"] != self._state(clip) or known["reason_kind"] in _TRIED_AGAIN:
                yield clip
                continue
            results[clip] = None if known["reason"] is None else (known["reason_kind"], known["reason"])
            bar.update()

    def add(self, clip: tuple[str, str], problem: tuple[str, str] | None) -> None:
        """Write down (reason_kind, reason) or None of a clip."""
        reason_kind, reason = problem or (None, None)
        state = self._state(clip)
        if state is not None:  # a missing file may be there the next time
            record = {"kind": "clip", "type": clip[0], "path": clip[1], "state": state}
            self._write({**record, "reason_kind": reason_kind, "reason": reason})

    def add_bad_samples(self, bad: list[dict]) -> None:
        """Write down the bad samples; the last that is written."""
        for entry in bad:
            self._write({"kind": "sample", **entry})

    def _state(self, clip: tuple[str, str]) -> list[int] | None:
        """What must be the same for a clip to be the same: bytes, time of change (ns), frames read."""
        try:
            status = os.stat(clip[1])
        except (OSError, ValueError):
            return None
        return [status.st_size, status.st_mtime_ns, self.num_frames if clip[0] == "video" else 1]

    def _write(self, record: dict) -> None:
        if self._file is not None:
            self._file.write(_json_line(record))
            self._file.flush()


def _json_line(record: dict) -> str:
    return json.dumps(record, default=str) + "\n"


# --------------------------------------------------------------------------------------------------- the processes


class ClipPool:
    """Processes that read clips, one at a time each, and are replaced if a clip kills or blocks them.

    `concurrent.futures` is not used because it ends altogether when one of its processes dies, and cannot stop one.

    Args:
        check: `check_clip`, or another function of a module that gives a reason or None.
        num_frames: its last argument.
        num_workers: how many processes.
        timeout_s: for one clip, seconds.
    """

    def __init__(
        self, check: Callable[[str, str, int], str | None], num_frames: int, num_workers: int, timeout_s: float
    ):
        self.check, self.num_frames, self.num_workers, self.timeout_s = check, num_frames, num_workers, timeout_s
        self._workers: list[_Worker] = []

    def run(self, clips: Iterable[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], tuple[str, str] | None]]:
        """Read the clips, in whatever order they are done.

        Args:
            clips: (kind, path) of each; taken one by one, as processes are free.

        Yields:
            The clip, and (reason_kind, reason) or None.

        Raises:
            RuntimeError: a process ends before its first clip.
        """
        waiting = iter(clips)
        following = next(waiting, None)
        try:
            while following is not None or any(worker.clip for worker in self._workers):
                if following is not None and len(self._workers) < self.num_workers:
                    self._workers.append(_Worker(self.check, self.num_frames))
                for worker in self._workers:
                    if following is not None and worker.is_ready and worker.clip is None:
                        worker.give(following, self.timeout_s)
                        following = next(waiting, None)
                if len(self._workers) < self.num_workers and following is not None:
                    continue  # start them all before waiting for the first
                yield from self._wait()
        finally:
            for worker in self._workers:
                worker.stop()
            self._workers = []

    def _wait(self) -> Iterator[tuple[tuple[str, str], tuple[str, str] | None]]:
        """Wait for the next answer, death or deadline."""
        busy = [worker for worker in self._workers if worker.clip is not None or not worker.is_ready]
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        speaking = connection.wait([worker.pipe for worker in busy], timeout=patience)
        for worker in busy:
            clip = worker.clip
            if worker.pipe in speaking:
                answer = worker.listen()
            elif time.monotonic() >= worker.deadline:
                worker.stop()
                answer = (TIMEOUT, f"reading it did not end within {self.timeout_s:g} s") if clip else None
            else:
                continue
            if not worker.is_alive:
                self._workers.remove(worker)
                if clip is None:
                    raise RuntimeError(
                        f"a process of check_data does not start ({worker.death()}); in a program of your own, call it "
                        'under `if __name__ == "__main__":`'
                    )
            if clip is not None:
                yield clip, answer


class _Worker:
    """One process and what it is doing.

    Attributes:
        pipe: to the process; readable when it has answered or died.
        clip: what it reads now.
        deadline: when it is given up, in seconds of `time.monotonic`.
        is_ready: whether it has started.
        is_alive: whether it can be used.
    """

    def __init__(self, check: Callable, num_frames: int):
        context = _process_context()
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(other_end, check, num_frames), daemon=True)
        with _without_interrupts():
            self.process.start()
        other_end.close()
        self.clip: tuple[str, str] | None = None
        self.deadline = time.monotonic() + _START_TIMEOUT_S
        self.is_ready, self.is_alive = False, True

    def give(self, clip: tuple[str, str], timeout_s: float) -> None:
        """Let it read a clip."""
        self.clip = clip
        self.deadline = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):  # dead already; `listen` will tell
            self.pipe.send(clip)

    def listen(self) -> tuple[str, str] | None:
        """Its answer about the clip, or how it died."""
        try:
            reason = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(timeout=5)
            death = self.death()
            self.stop()
            return CRASH, f"reading it ended the process: {death}"
        self.is_ready, self.clip = True, None
        return None if reason is None else (UNREADABLE, reason)

    def death(self) -> str:
        """How the process ended."""
        code = self.process.exitcode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self.is_alive, self.clip = False, None
        self.process.kill()
        self.process.join(timeout=5)
        self.pipe.close()


@functools.cache
def _process_context():
    """How processes are started: never by a fork of this one, with the threads and locks of whatever it has loaded."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once, by the server: a process that a clip has ended is replaced within milliseconds.
    context.set_forkserver_preload([__name__])
    return context


def _serve(pipe, check: Callable, num_frames: int) -> None:
    """What a process does: answer until its pipe is closed, which also happens when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
    torch.set_num_threads(1)  # the clips are what is parallel
    try:
        pipe.send(None)
        while True:
            kind, path = pipe.recv()
            pipe.send(check(kind, path, num_frames))
    except (EOFError, BrokenPipeError):
        return


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started meanwhile is deaf to Ctrl-C, which goes to the whole group, also while it imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
