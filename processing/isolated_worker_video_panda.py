"""The worker process of the isolated mode: reads one video after the other, and may die of any of them.

`isolated_video_panda.py` starts it and says what to read. The two talk over a socket in JSON, which cannot make the
caller run anything, whatever a clip has made of this process; pixels go through memory that the caller provides.

Imports neither torch nor transformers: a worker that died is replaced in a fraction of a second.
"""

import json
import math
import os
import select
import signal
import socket
import struct
import threading

import numpy as np

from .decode_limits_video_panda import VideoPandaDecodeError, VideoPandaDecodeLimits
from .frame_reading_video_panda import VideoPandaDescription, VideoPandaSource, read_frames

try:
    import resource
except ImportError:  # not a Unix system; there is no isolated mode there either
    resource = None

_MAX_MESSAGE_BYTES = 2**28  # the times of ten million frames
_LENGTH = struct.Struct(">I")
# A caller that is still there ends the worker earlier; this is for one that was killed itself.
_EXTRA_SECONDS = 5


class VideoPandaAbandonedError(Exception):
    """The caller wants no frames of this video after all."""


def send_message(channel: socket.socket, message: dict, descriptors: tuple[int, ...] = ()) -> None:
    """Send a dictionary of plain values, and open files along with it."""
    content = json.dumps(message).encode()
    header = _LENGTH.pack(len(content))
    if descriptors:
        socket.send_fds(channel, [header], descriptors)
        channel.sendall(content)
    else:
        channel.sendall(header + content)


def receive_message(channel: socket.socket) -> tuple[dict, list[int]]:
    """The next message and the files that came with it.

    Raises:
        EOFError: the other side is gone.
        ValueError: that is no message.
        OSError: the connection broke, or a time limit of the socket ran out (TimeoutError).
    """
    header, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, 2)
    header += _receive_exactly(channel, _LENGTH.size - len(header)) if header else b""
    if not header:
        raise EOFError("the other side has closed the connection")
    (num_bytes,) = _LENGTH.unpack(header)
    if num_bytes > _MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {num_bytes} bytes, expected at most {_MAX_MESSAGE_BYTES}")
    message = json.loads(_receive_exactly(channel, num_bytes))
    if not isinstance(message, dict):
        raise ValueError(f"a message is a {type(message).__name__}, expected a dictionary")
    return message, list(descriptors)


def _receive_exactly(channel: socket.socket, num_bytes: int) -> bytes:
    content = bytearray()
    while len(content) < num_bytes:
        part = channel.recv(min(2**20, num_bytes - len(content)))
        if not part:
            raise EOFError("the other side has closed the connection")
        content += part
    return bytes(content)


def serve(descriptor: int) -> None:
    """Answer requests until the caller closes the connection or dies.

    Args:
        descriptor: our end of the socket.
    """
    channel = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, which then ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's to deliver: it also ends a decoder that never returns
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_caller, args=(channel,), daemon=True).start()
    send_message(channel, {"ready": True})
    try:
        while True:
            request, descriptors = receive_message(channel)
            answer = _answer(channel, request, descriptors)
            for opened in descriptors:
                os.close(opened)
            if answer is not None:
                send_message(channel, answer)
    except (EOFError, OSError):
        return


def _end_with_caller(channel: socket.socket) -> None:
    """Waits, in a thread of its own, for the caller to hang up: nothing that is being decoded is wanted then."""
    waiting = select.poll()
    waiting.register(channel, 0)  # hanging up is reported unasked
    waiting.poll()
    os._exit(0)


def _answer(channel: socket.socket, request: dict, descriptors: list[int]) -> dict | None:
    """Read one video: what is to be told in the end, None where the caller wants nothing any more."""
    limits = VideoPandaDecodeLimits(**request["limits"])
    # A source in memory comes as an open file; opened anew by its number, each reader has a position of its own.
    content = request["path"] if request["path"] is not None else f"/proc/self/fd/{descriptors[0]}"
    output = []

    def choose(description: VideoPandaDescription) -> list[int]:
        signal.alarm(0)
        send_message(channel, {"metadata": vars(description)})  # unlike asdict, copies no list of times
        reply, files = receive_message(channel)
        output.extend(files)
        if reply["indices"] is None:
            raise VideoPandaAbandonedError
        _limit(limits, reply["num_bytes"])
        return reply["indices"]

    try:
        _limit(limits, 0)
        source = VideoPandaSource(content, request["name"])
        frames, _, backend = read_frames(source, choose, limits, lambda shape: _VideoPandaOutput(output[0], shape))
        if isinstance(frames, np.ndarray):
            written = _VideoPandaOutput(output[0], frames.shape)
            for place, frame in enumerate(frames):
                written[place] = frame
            frames = written
        return {"backend": backend, "num_bytes": frames.nbytes, "written": sorted(frames.written)}
    except VideoPandaAbandonedError:
        return None
    except VideoPandaDecodeError as error:
        return {"error": str(error)}
    except ImportError as error:
        return {"import_error": str(error)}
    except MemoryError:
        return {"error": f"{request['name']}: decoding it takes more than {limits.memory_bytes} bytes of memory"}
    finally:
        signal.alarm(0)
        for file in output:
            os.close(file)


def _limit(limits: VideoPandaDecodeLimits, num_output_bytes: int) -> None:
    """Set what the kernel enforces from here on: time, and memory beyond what this process has already."""
    signal.alarm(math.ceil(limits.seconds) + _EXTRA_SECONDS)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            num_pages = int(file.read().split()[0])
    except FileNotFoundError:
        return  # not Linux: there the kernel does not enforce a limit of memory anyway
    own = num_pages * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = own + limits.memory_bytes + num_output_bytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


class _VideoPandaOutput:
    """Frames (T, H, W, 3) in a file: written one by one, they need no memory of this process, whose pages would be new ones.

    Attributes:
        nbytes: of all frames.
        written: the places of those that were.
    """

    def __init__(self, descriptor: int, shape: tuple[int, ...]):
        self._descriptor, self.nbytes = descriptor, math.prod(shape)
        self._frame_bytes = self.nbytes // shape[0]
        self.written: set[int] = set()

    def __setitem__(self, place: int, frame: np.ndarray) -> None:
        content = memoryview(np.ascontiguousarray(frame)).cast("B")
        assert len(content) == self._frame_bytes
        write_all(self._descriptor, content, place * self._frame_bytes)
        self.written.add(int(place))


def write_all(descriptor: int, content: memoryview, position: int = 0) -> None:
    """Write bytes to a place in a file, however many; Linux moves no more than 2 GiB in one call."""
    end = position + len(content)
    while position < end:
        position += os.pwrite(descriptor, content[position - end :][: 2**30], position)
