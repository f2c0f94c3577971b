"""A teacher's features on disk, so that later epochs and stages need not run the teacher.

Each writer collects features and writes them as a safetensors file of its own, under a temporary name first: what has a
final name is complete. Readers (other ranks, workers of a DataLoader) look for new files when they miss something. Every
tensor has a checksum: a damaged file is reported once and counts as not there.

Shape suffixes: T frames, (h, w) valid cells, W width.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 256 * 1024**2
DESCRIPTION_NAME = "fingerprint.json"
_FORMAT = "video-panda-teacher-features-1"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 100 * 1024**2  # safetensors' own limit
# A folder whose time of change is that recent may change again within the same tick of the file system's clock.
_SETTLED_AFTER_S = 2.0
# A folder of more files is not looked through at every miss, but for at most a twentieth of the time. By number and not by
# the time alone: on a busy machine any folder may take long, and entries just written would not be found.
_MANY_FILES = 1000
_ABANDONED_AFTER_S = 24 * 3600


class DamagedShardError(ValueError):
    """A file of the cache that cannot be used; the message says why."""


class TeacherCache:
    """Features of one teacher, by clip, frames and grid.

    Nothing is written before the first `put`; call `flush` at the end of training, and where progress must not be lost.
    May be pickled, and used in a forked process: a copy finds what is on the disk, and writes files of its own.

    Args:
        folder: holds the caches of all teachers, each in a sub-folder of its own.
        fingerprint: `Teacher.fingerprint`; features of any other are never returned.
        shard_bytes: write a file as soon as so much has been collected; the memory a writer takes.

    Raises:
        ValueError: `shard_bytes` is not a positive whole number, or `folder` is not a folder.
    """

    def __init__(self, folder: str | Path, fingerprint: str, shard_bytes: int = DEFAULT_SHARD_BYTES):
        if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
            raise ValueError(f"`shard_bytes` must be a whole number of at least 1, got {shard_bytes!r}")
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"The teacher cache {folder} is not a folder")
        self.fingerprint = fingerprint
        self.shard_bytes = shard_bytes
        self._fingerprint_digest = hashlib.sha256(fingerprint.encode()).hexdigest()
        self.folder = Path(folder) / self._fingerprint_digest[:16]
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: dict[str, str] = {}  # key -> name of a file; all entries of a file share one string
        self._known_files: set[str] = set()
        self._damaged: set[str] = set()
        self._scan = _ScanRecord()

    def __getstate__(self) -> dict:
        names = ("fingerprint", "shard_bytes", "folder", "_fingerprint_digest")
        return {name: value for name, value in vars(self).items() if name in names}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._forget()

    @staticmethod
    def key(content_digest: str, frame_indices: Sequence[int], grid: Sequence[int]) -> str:
        """The name of a clip's features.

        Args:
            content_digest: of the file, from `clip_digest`.
            frame_indices: the frames that were taken, in order.
            grid: (h, w) on the teacher's canvas.

        Returns:
            32 hexadecimal digits.
        """
        content = [content_digest, [int(index) for index in frame_indices], [int(size) for size in grid]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def get(self, key: str) -> torch.Tensor | None:
        """The features (T, h, w, W) exactly as they were put, or None. The tensor may be changed freely.

        A file that turns out to be damaged is named in one warning, and everything in it counts as not there.
        """
        while (shard := self._find(key)) is not None:
            if key in self._pending:
                return self._pending[key].clone()
            try:
                return self._read(shard, key)
            except (DamagedShardError, OSError) as error:
                self._report(shard, error)
        return None

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Keep features; nothing happens if the key is there already.

        Args:
            key: from `key`.
            tensor: (T, h, w, W) on any device, float64, float32, float16 or bfloat16.

        Raises:
            ValueError: another dtype, or a key that cannot be a name in a file.
            OSError: a file was due and could not be written; what it would hold stays in memory.
        """
        if tensor.dtype not in _DTYPES.values():
            expected = ", ".join(map(str, _DTYPES.values()))
            raise ValueError(f"Cannot cache features of {tensor.dtype}; expected one of {expected}")
        if not re.fullmatch(r"[0-9A-Za-z.-]{1,200}", key):
            raise ValueError(f"Not a key of the teacher cache: {key!r}; use TeacherCache.key")
        if self._find(key) is not None:
            return
        # A copy: the caller's tensor may be a view of a whole batch, which would stay in memory with it.
        self._pending[key] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected; it survives a crash of the machine from then on.

        Raises:
            OSError: it cannot be written; it stays in memory.
        """
        self._own()
        if not self._pending:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._describe()
        self._remove_abandoned()
        name = f"{secrets.token_hex(12)}.safetensors"
        checksums = {key: zlib.crc32(_bytes_of(tensor)) for key, tensor in self._pending.items()}
        metadata = {"format": _FORMAT, "fingerprint": self._fingerprint_digest, "crc32": json.dumps(checksums)}
        _write_atomically(self.folder / name, lambda path: save_file(self._pending, path, metadata))
        self._known_files.add(name)
        self._shards.update(dict.fromkeys(self._pending, name))
        self._pending, self._pending_bytes = {}, 0

    def __len__(self) -> int:
        """Number of entries, those collected and not yet written included."""
        self._own()
        self._scan_folder()
        return len(self._shards.keys() | self._pending.keys())

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def _own(self) -> None:
        """In a forked process: what the parent has collected is the parent's to write."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._pending, self._pending_bytes = {}, 0

    def _find(self, key: str) -> str | None:
        """The file of an entry, "" for one not yet written, None if there is none."""
        self._own()
        if key in self._pending:
            return ""
        if key not in self._shards:
            self._scan_folder()
        return self._shards.get(key)

    def _scan_folder(self) -> None:
        """Read the headers of files that were not there before, if the folder has changed."""
        try:
            changed_ns = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if not self._scan.is_due(changed_ns):
            return
        start = time.monotonic()
        with os.scandir(self.folder) as found:
            names = [entry.name for entry in found if entry.name.endswith(".safetensors")]
        self._scan = _ScanRecord(changed_ns, time.time(), time.monotonic(), time.monotonic() - start, len(names))
        for name in sorted(set(names) - self._known_files - self._damaged):
            self._known_files.add(name)
            try:
                header, _ = _read_header(self.folder / name)
                self._check_origin(header)
            except (DamagedShardError, OSError) as error:
                self._report(name, error)
                continue
            self._shards.update(dict.fromkeys((key for key in header if key != "__metadata__"), name))

    def _check_origin(self, header: dict) -> None:
        metadata = header["__metadata__"]
        if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != self._fingerprint_digest:
            raise DamagedShardError("it was written for another teacher, or by another program")

    def _read(self, name: str, key: str) -> torch.Tensor:
        """One tensor, its checksum compared. Read, not mapped: a mapped file that is cut off ends the process."""
        path = self.folder / name
        header, start = _read_header(path)
        self._check_origin(header)
        try:
            entry = header[key]
            dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            checksum = json.loads(header["__metadata__"]["crc32"])[key]
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedShardError(f"no usable entry {key}") from error
        content = bytearray(last - first)
        with path.open("rb") as file:
            file.seek(start + first)
            num_read = file.readinto(content)
        if num_read != len(content) or zlib.crc32(content) != checksum:
            raise DamagedShardError(f"the values of {key} are not those that were written")
        # torch.frombuffer refuses an empty buffer.
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.reshape(shape)

    def _report(self, name: str, error: Exception) -> None:
        """Once: the file is not read again. What it held may also be in another file, so the folder is read anew."""
        logger.warning(
            "Teacher cache: %s cannot be used and counts as not there, its features are computed again: %s",
            self.folder / name,
            error,
        )
        self._damaged.add(name)
        if name in self._shards.values():
            self._shards, self._known_files, self._scan = {}, set(), _ScanRecord()

    def _describe(self) -> None:
        """For people: which teacher this sub-folder belongs to."""
        path = self.folder / DESCRIPTION_NAME
        if path.is_file():
            return
        text = json.dumps({"format": _FORMAT, "fingerprint": self.fingerprint}, indent=2)
        _write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))

    def _remove_abandoned(self) -> None:
        """Unfinished files of writers that were killed."""
        for path in self.folder.glob(".*.writing"):
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    path.unlink()
            except FileNotFoundError:  # another writer was faster
                continue


@dataclass(frozen=True)
class _ScanRecord:
    """When a folder was last looked through, and whether it is worth doing again.

    Attributes:
        changed_ns: when the folder had last been changed then, nanoseconds since the epoch.
        wall_s: when it was looked through, seconds since the epoch.
        monotonic_s: the same on the clock that is never set.
        took_s: how long that took, seconds.
        num_files: how many there were.
    """

    changed_ns: int = -1
    wall_s: float = 0.0
    monotonic_s: float = 0.0
    took_s: float = 0.0
    num_files: int = 0

    def is_due(self, changed_ns: int) -> bool:
        """Whether a folder that was last changed at `changed_ns` may hold new files."""
        if self.num_files > _MANY_FILES and time.monotonic() - self.monotonic_s < 20 * self.took_s:
            return False
        return changed_ns != self.changed_ns or self.wall_s - changed_ns / 1e9 < _SETTLED_AFTER_S


def clip_digest(path: str | Path) -> str:
    """A digest of a file's content; computed again only if the file's size or time of change differs.

    Args:
        path: a regular file.

    Returns:
        64 hexadecimal digits (SHA-256).

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not a regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    return _file_digest(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file and where its values begin.

    Raises:
        DamagedShardError: it is cut off, or is no such file.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        start = 8 + header_bytes
        if size < 8 or header_bytes > _MAX_HEADER_BYTES or start > size:
            raise DamagedShardError(f"{size} bytes without a safetensors header: cut off, or another format")
        encoded = file.read(header_bytes)
    try:
        header = json.loads(encoded)
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        is_complete = start + max(ends, default=0) == size and isinstance(header["__metadata__"], dict)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DamagedShardError("its header is not one of safetensors") from error
    if not is_complete:
        raise DamagedShardError(f"{size} bytes are not what its header announces: cut off")
    return header, start


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name, bring it to the disk, rename: a reader sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except SafetensorError as error:  # how its writer says that a disk is full
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
