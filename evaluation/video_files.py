"""Finds the clips that a data set names: mostly without a suffix, and not always where they belong."""

import os
from collections import defaultdict
from pathlib import Path, PurePosixPath

# In the order in which they are preferred, where a clip is there in several formats.
VIDEO_SUFFIXES = tuple(
    f".{name}" for name in ["mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "ts", "3gp", "gif"]
)
# ActivityNet's files have it, its questions do not.
_PREFIX = "v_"


class VideoFiles:
    """The clips in a folder and the folders in it, found by name. The disk is read once, when it is made.

    Args:
        folder: where they lie.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: there is no such folder, expected one of clips")
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        # Sorted, so that every machine finds the same file.
        for parent, folders, names in os.walk(self.folder):
            folders.sort()
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in VIDEO_SUFFIXES:
                    self._by_stem[stem].append(Path(parent, name).relative_to(self.folder).as_posix())

    def find(self, name: str) -> str | None:
        """The path of a clip, relative to the folder; None: it is not there.

        Args:
            name: with or without a suffix, and with or without ActivityNet's "v_".

        Raises:
            ValueError: clips of that name lie in several folders.
        """
        stem, suffix = os.path.splitext(name)
        is_suffix = suffix.lower() in VIDEO_SUFFIXES
        for own in dict.fromkeys([name, *([stem] if is_suffix else []), _PREFIX + name]):
            if found := self._by_stem.get(own):
                return self._choose(name, found)
        return None

    def _choose(self, name: str, found: list[str]) -> str:
        if len({PurePosixPath(path).parent for path in found}) > 1:
            raise ValueError(f"{self.folder}: clips named {name!r} lie in several folders: {', '.join(found)}")
        # The file of exactly that name, then the usual format.
        return min(found, key=lambda path: (PurePosixPath(path).name != name, _rank(path)))


def _rank(path: str) -> int:
    return VIDEO_SUFFIXES.index(PurePosixPath(path).suffix.lower())


def check_name(name: object, place: str) -> str:
    """A name that a data set gives to a clip or a question.

    Args:
        name: what stands in the file.
        place: what to call it in an error: file, entry and field.

    Raises:
        ValueError: it is no text or number, is empty, or would lead out of the folder.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{place} is {name!r}, expected a name")
    if "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"{place} is {name!r}, expected a name without path separators")
    return name
