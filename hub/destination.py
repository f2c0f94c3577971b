"""A folder that appears complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Says that a `.partial` folder is ours, so that it may be removed.
_MARKER = ".video_panda_conversion"


@contextmanager
def folder_in_the_making(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which takes the place of `destination` when the block ends well and is removed if not.

    It stands in `<destination>.partial`. What a run that was killed left there is removed by the next one; if it was killed
    in the moment between moving the old folder aside and the new one in, the old one is put back first.

    Raises:
        FileExistsError: there is something at `destination` and `overwrite` is not set, or it is not a folder, or the
            `.partial` folder was not made by an earlier run.
        OSError: it cannot be written (full disk); what was at `destination` still is.
    """
    work = _work_folder(destination)
    check_destination(destination, overwrite)
    work.mkdir(parents=True)
    (work / _MARKER).touch()
    new, old = work / "new", work / "old"
    new.mkdir()
    try:
        yield new
        _bring_to_disk(new)
        if destination.exists():
            os.replace(destination, old)
        os.replace(new, destination)
        _sync(destination.parent)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(destination)) from error  # a full disk does not say where
    finally:
        if old.exists() and not destination.exists():
            os.replace(old, destination)
        shutil.rmtree(work)


def check_destination(destination: Path, overwrite: bool) -> None:
    """Clear away what an interrupted run left, and refuse a destination that is taken. Raises: FileExistsError."""
    _clear_leftovers(destination)
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} exists and is not a folder")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise FileExistsError(f"{destination} exists and is not empty: choose another folder, or overwrite it")


def _work_folder(destination: Path) -> Path:
    return destination.with_name(destination.name + ".partial")


def _clear_leftovers(destination: Path) -> None:
    work = _work_folder(destination)
    if not work.exists():
        return
    if not (work / _MARKER).is_file() and not (work.is_dir() and not any(work.iterdir())):
        raise FileExistsError(f"{work} is in the way, and no conversion has left it there: move it away")
    if (work / "old").exists() and not destination.exists():
        os.replace(work / "old", destination)
    shutil.rmtree(work)


def _bring_to_disk(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
