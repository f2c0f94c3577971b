"""Memory that frames of the isolated mode come in: a worker writes them there, and there they are used.

New pages for each clip cost a tenth of the time that decoding takes, and so does a copy. So memory is kept, and used again
once nobody has the frames in it any more. Who has frames sees the memory through a private mapping: what is written to them
stays with their owner, and the next ones are mapped anew.
"""

import contextlib
import math
import os
import tempfile
import weakref

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # not a Unix system; there is no isolated mode there either
    fcntl = None

# Without a name, and in /proc for torch to map; what macOS has is copied.
CAN_MAP = hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")
# Less is copied: a mapping costs as much, and a process may have 65,530 of them.
_MIN_LENT_BYTES = 2**20
# What a process keeps for the next frames, lent at the moment or not. More comes in memory that is used once.
_MAX_KEPT_BYTES = 2**26
_MAX_KEPT_FILES = 4
_MAX_BYTES_AT_ONCE = 2**30  # Linux moves no more than 2 GiB in one call


class VideoPandaFrameMemory:
    """The memory of a process for frames; any thread may use it.

    Frames that are lent while this process forks are in the new process as well, and nobody could tell when they are gone
    there. So from then on their memory is theirs. For this, `begin_fork` is to be called before a fork, then `end_fork` in this
    process and `forget` in the new one.

    It takes no locks, since memory comes back while Python collects garbage, in the middle of anything: each step on `_free`,
    `_lent` and `_forks` is one that threads see as a whole.
    """

    def __init__(self):
        self._free: list = []
        self._lent: set = set()
        self._forks: list = []  # one entry for each that is in progress

    def take_file(self, num_bytes: int):
        """An open file in memory, of so many bytes or more, for a worker to write to.

        Whoever takes it passes it to `frames_in`. After an error it is to be closed, as a worker may still write to it.
        """
        try:
            file = self._free.pop()
        except IndexError:
            file = open_memory()
        if os.fstat(file.fileno()).st_size < num_bytes:
            os.ftruncate(file.fileno(), num_bytes)
        return file

    def frames_in(self, file, shape: tuple[int, int, int, int]) -> np.ndarray | None:
        """The frames that were written into a file.

        Args:
            file: from `take_file`; not the caller's any more.
            shape: (T, H, W, 3).

        Returns:
            uint8 (T, H, W, 3), to be written to like any other; None if the file was cut off meanwhile.
        """
        num_bytes = math.prod(shape)
        if not CAN_MAP or num_bytes < _MIN_LENT_BYTES:
            frames = np.empty(shape, dtype=np.uint8)
            is_whole = _read_all(file, frames)
            if is_whole and self._has_room_for(file):
                self._free.append(file)
            else:
                file.close()
            return frames if is_whole else None
        # torch's mapping, which keeps no file open, unlike mmap's.
        path = f"/proc/self/fd/{file.fileno()}"
        mapped = torch.from_file(path, shared=False, size=num_bytes, dtype=torch.uint8).numpy()
        loan = _VideoPandaLoan(mapped)
        if self._has_room_for(file):
            weakref.finalize(loan, self._take_back, file).atexit = False
            self._lent.add(file)
            if self._forks:  # only now: one that begins in between finds it among what is lent
                self._give_away(file)
        else:
            file.close()  # its memory lasts as long as the frames
        return np.asarray(loan).reshape(shape)

    def _has_room_for(self, file) -> bool:
        is_small = os.fstat(file.fileno()).st_size <= _MAX_KEPT_BYTES
        return is_small and len(self._free) + len(self._lent) < _MAX_KEPT_FILES

    def _take_back(self, file) -> None:
        with contextlib.suppress(KeyError):  # it was given away
            self._lent.remove(file)
            self._free.append(file)

    def _give_away(self, file) -> None:
        with contextlib.suppress(KeyError):  # another thread did
            self._lent.remove(file)
            file.close()

    def begin_fork(self) -> None:
        """What is lent is used by two processes from now on, and no longer kept; nor is what is lent until `end_fork`."""
        self._forks.append(None)
        for file in list(self._lent):
            self._give_away(file)

    def end_fork(self) -> None:
        """In the process that forked: what is lent from now on is kept again."""
        with contextlib.suppress(IndexError):
            self._forks.pop()

    def forget(self) -> None:
        """Close what is kept and not lent."""
        with contextlib.suppress(IndexError):
            while True:
                self._free.pop().close()


class _VideoPandaLoan:
    """What an array stands on, and with it all its views and the tensors that share its memory: it is gone with the last."""

    def __init__(self, mapped: np.ndarray):
        self._mapped = mapped
        self.__array_interface__ = mapped.__array_interface__


def open_memory():
    """A file without a name, in memory where the system can; not in /dev/shm, which is small in containers."""
    if not hasattr(os, "memfd_create"):
        return tempfile.TemporaryFile(buffering=0)
    file = os.fdopen(os.memfd_create("video-panda", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)
    if CAN_MAP:
        # Were it cut off by a worker, using what is mapped would end this process.
        fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return file


def _read_all(file, frames: np.ndarray) -> bool:
    """Fill an array from a file; whether there was enough. A file that was cut off cannot do more harm."""
    view, position = memoryview(frames).cast("B"), 0
    while position < len(view):
        num_bytes = os.preadv(file.fileno(), [view[position : position + _MAX_BYTES_AT_ONCE]], position)
        if not num_bytes:
            return False
        position += num_bytes
    return True
