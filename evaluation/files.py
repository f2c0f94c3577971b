"""Files that appear whole or not at all, and files that grow line by line."""

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout


def write_whole(path: str | os.PathLike, content: bytes | str, is_synced: bool = True) -> None:
    """Write a file, or replace it; text is written as UTF-8.

    Args:
        path: where to; the folder must exist.
        content: all of the file.
        is_synced: whether to wait until the disk has it, so that it outlives a loss of power.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    path = Path(path)
    # A name of its own, so that two programs may fill the same folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            if is_synced:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say where
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Keep a folder to oneself; the lock of a process that was killed is gone with it.

    Raises:
        ValueError: another has it.
    """
    held = FileLock(Path(folder, ".lock"))
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another process; wait for it or choose another folder") from error
    try:
        yield
    finally:
        held.release()


def append_synced(path: str | os.PathLike, text: str) -> None:
    """Add text to the end of a file, and wait until the disk has it; killed in between, a first part may be there.

    Raises:
        OSError: it cannot be written (full disk); the file is as long as before.
    """
    _sync(*_append(path, text))


class GrowingFile:
    """A file to which text is added, while the disk is still busy with what was added before.

    A program that is killed loses nothing of it, a machine without power at most what was added last.

    Args:
        path: made with the first text, if it is not there.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._disk = ThreadPoolExecutor(1, "disk")
        self._syncing: Future | None = None

    def append(self, text: str) -> None:
        """Add text; the disk has all that was added before.

        Raises:
            OSError: this or that cannot be written (full disk); the file is without it.
        """
        self.wait()
        self._syncing = self._disk.submit(_sync, *_append(self.path, text))

    def wait(self) -> None:
        """Until the disk has all.

        Raises:
            OSError: it cannot be written; the file is without what was added last.
        """
        if self._syncing is not None:
            syncing, self._syncing = self._syncing, None
            syncing.result()

    def close(self) -> None:
        """As `wait`, but without its errors: for the way out of another one."""
        self._disk.shutdown(wait=True)


def _append(path: str | os.PathLike, text: str) -> tuple[FileIO, int]:
    """The file, with the text added, and how long it was before."""
    content = memoryview(text.encode("utf-8"))
    file = open(path, "ab", buffering=0)  # noqa: SIM115 -- `_sync` closes it
    size = file.tell()
    try:
        while content:
            content = content[file.write(content) :]
    except OSError as error:
        _take_back(file, size, error)
    return file, size


def _sync(file: FileIO, size: int) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        _take_back(file, size, error)
    file.close()


def _take_back(file: FileIO, size: int, error: OSError) -> NoReturn:
    """Raise the error, with the file's name, after what could not be written was taken away again."""
    with file:
        file.truncate(size)
    raise OSError(error.errno, error.strerror, str(file.name)) from error


def read_object(path: str | os.PathLike) -> dict:
    """The JSON object in a file.

    Raises:
        ValueError: it holds none; the file is named.
        OSError: it cannot be read.
    """
    return parse_object(Path(path).read_bytes(), path)


def read_objects(path: str | os.PathLike, is_mended: bool = True) -> Iterator[tuple[int, dict]]:
    """The JSON objects of a file that is appended to, with the number of their line; none if there is no file.

    Args:
        path: the file, one object a line.
        is_mended: whether to take away a last line that was cut off, so that appending goes on with a new one.

    Raises:
        ValueError: another line holds none; file and line are named.
    """
    path = Path(path)
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if is_mended and whole != content:
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        yield number, parse_object(line, f"{path}, line {number}")


def parse_object(content: bytes, place: str | os.PathLike) -> dict:
    """The JSON object that was written before.

    Raises:
        ValueError: it is none; the place is named.
    """
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}); correct or delete it, or choose another folder") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(parsed).__name__}")
    return parsed
