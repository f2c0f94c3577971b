"""Checkpoints that survive being killed: written aside, sealed with a manifest, renamed into place, verified at resume.

A save goes through `clear_staging`, the trainer's own writing, `seal` and `publish`; whatever moment it is killed at,
`checkpoint-N` is complete or not there. These are plain functions on folders: one process of a run calls them (those that
change something), the others wait.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from tqdm import tqdm

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_MANIFEST_FORMAT = 1
# Unlike `^checkpoint-(\d+)$` and `checkpoint-*`, so that transformers never takes one for a checkpoint; with an
# underscore, so that it never pushes one to the Hub.
_STAGING, _REPLACED, _DELETED = "_staging-", "_replaced-", "_deleted-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"_(staging|replaced|deleted)-(checkpoint-\d+)(-[0-9a-f]{8})?")
_NUM_THREADS = 8  # hashing releases the interpreter lock, and a fast disk outruns one thread
_SECONDS_BEFORE_PROGRESS = 5


class CheckpointError(ValueError):
    """A checkpoint that is not what was saved: something is missing, damaged or unreadable."""


def checkpoint_step(path: str | Path) -> int | None:
    """N of a path that ends in `checkpoint-N`; None for other names."""
    match = _CHECKPOINT.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """What is called `checkpoint-N` in a run's folder, in the order of N, complete or not; [] without the folder."""
    folder = Path(run_folder)
    found = [path for path in folder.iterdir() if checkpoint_step(path) is not None] if folder.is_dir() else []
    return sorted(found, key=lambda path: (checkpoint_step(path), path.name))


def staging_folder(run_folder: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is published. Only the path; see `clear_staging`."""
    return Path(run_folder, f"{_STAGING}checkpoint-{step}")


def clear_staging(run_folder: str | Path, step: int) -> Path:
    """An empty staging folder: files that a killed save left there would otherwise be sealed into the new checkpoint."""
    staging = staging_folder(run_folder, step)
    _remove(staging)
    staging.mkdir(parents=True)
    return staging


def seal(folder: str | Path) -> Path:
    """Bring a folder's files to disk and write its manifest: size (bytes) and SHA-256 of each file.

    Args:
        folder: everything in it is finished; subfolders are included. A manifest that is there already is replaced.

    Returns:
        The path of `manifest.json`.

    Raises:
        CheckpointError: the folder is missing or holds no file, or holds a symbolic link or something else that is
            neither file nor folder.
        OSError: a file cannot be read or brought to disk (full disk).
    """
    folder = Path(folder)
    manifest = folder / MANIFEST_FILE
    # Should sealing be killed, no manifest must vouch for other files; and what an earlier one left half written is none.
    manifest.unlink(missing_ok=True)
    _partial(manifest).unlink(missing_ok=True)
    files, folders = _walk(folder)
    if not files:
        raise CheckpointError(f"{folder} is missing or holds no file: there is nothing to seal")
    digests = _hash_files(files, _read_and_sync)
    for path in folders:
        sync(path)
    entries = {
        path.relative_to(folder).as_posix(): {"size": size, "sha256": digest}
        for path, (size, digest) in zip(files, digests)
    }
    content = {"format": _MANIFEST_FORMAT, "sha256": _digest_of_entries(entries), "files": entries}
    write_atomically(manifest, json.dumps(content, indent=1))
    return manifest


def publish(staging: str | Path, destination: str | Path) -> None:
    """Give a sealed folder its final name, atomically.

    What is already called so (an older save of the same step, or one that was found damaged) is moved aside first and
    deleted afterwards; killed in between, `remove_leftovers` puts it back.

    Args:
        staging: a folder that `seal` has been through.
        destination: `checkpoint-N` of the run, on the same file system.

    Raises:
        CheckpointError: `staging` was not sealed.
        OSError: the disk refuses.
    """
    staging, destination = Path(staging), Path(destination)
    if not (staging / MANIFEST_FILE).is_file():
        raise CheckpointError(f"{staging} has no {MANIFEST_FILE}: seal it before it is published")
    replaced = destination.with_name(_REPLACED + destination.name)
    if os.path.lexists(destination):
        _discard(replaced)
        os.rename(destination, replaced)
    os.rename(staging, destination)
    sync(destination.parent)
    _discard(replaced)


def verify(folder: str | Path, deep: bool = True) -> None:
    """Check that a checkpoint holds everything that was saved, unchanged. Files added since are no fault.

    Args:
        folder: a published checkpoint.
        deep: compare contents (SHA-256) too; otherwise only that each file is there and has its size.

    Raises:
        CheckpointError: naming the file, what was found and what was expected.
    """
    folder = Path(folder)
    try:
        _verify(folder, deep)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error


def _verify(folder: Path, deep: bool) -> None:
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, or a symbolic link to one: expected a folder of its own")
    entries = _read_manifest(folder)
    paths = []
    for name, entry in entries.items():
        path = folder / name
        for part in (path, *(folder / parent for parent in PurePosixPath(name).parents)):
            if part.is_symlink():
                raise CheckpointError(f"{part} is a symbolic link, expected what was saved there")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{path} holds {size} bytes, expected {entry['size']}")
        paths.append(path)
    if deep:
        for path, entry, (_, digest) in zip(paths, entries.values(), _hash_files(paths, _read)):
            if digest != entry["sha256"]:
                raise CheckpointError(
                    f"{path} has another content than was saved: SHA-256 {digest[:12]}..., expected "
                    f"{entry['sha256'][:12]}..."
                )


def _read_manifest(folder: Path) -> dict[str, dict]:
    """{relative path: {"size", "sha256"}}."""
    path = folder / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST_FILE}: it was saved by another program (transformers' own trainer), or copied "
            "in part"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, entries = content["format"], content["files"]
        intact = version == _MANIFEST_FORMAT and bool(entries) and content["sha256"] == _digest_of_entries(entries)
        inside = all(_is_inside(name) and {"size", "sha256"} <= entry.keys() for name, entry in entries.items())
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path} is damaged: it is not the JSON that was written") from None
    if not intact or not inside:
        raise CheckpointError(
            f"{path} is damaged, or of another version: format {version!r}, expected {_MANIFEST_FORMAT} with its own checksum"
        )
    return entries


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name not in ("", MANIFEST_FILE)


def find_checkpoint(run_folder: str | Path, deep: bool = True) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies. Nothing is changed: call `remove_leftovers` before.

    Args:
        run_folder: the run's output folder.
        deep: as in `verify`.

    Returns:
        Its path (None if there is none), and those with a higher step that were passed over, the newest first, each with
        the reason.
    """
    passed_over = []
    for path in reversed(list_checkpoints(run_folder)):
        try:
            verify(path, deep)
        except CheckpointError as error:
            passed_over.append((path, str(error)))
        else:
            return path, passed_over
    return None, passed_over


def delete_checkpoint(folder: str | Path) -> None:
    """Delete a checkpoint, which first gets a name of its own: killed in between, no half of it is left to be found.

    What cannot be deleted is left under that name for `remove_leftovers`, with a warning.

    Raises:
        OSError: it cannot be renamed, or is not there.
    """
    folder = Path(folder)
    if not os.path.lexists(folder):
        raise FileNotFoundError(errno.ENOENT, "There is no checkpoint to delete", str(folder))
    _discard(folder)


def rotate_checkpoints(
    run_folder: str | Path,
    save_total_limit: int | None,
    best: str | Path | None = None,
    newest: str | Path | None = None,
) -> list[Path]:
    """Delete the oldest checkpoints of a run until `save_total_limit` are left, as transformers does, by step.

    Args:
        run_folder: the run's output folder.
        save_total_limit: how many to keep; None or below 1: all.
        best: the best checkpoint so far, never deleted (`TrainerState.best_model_checkpoint`).
        newest: the one just saved, never deleted; by default the highest step that is complete. Those of higher steps
            come from before the run went back to an earlier checkpoint, damaged or given up, and are deleted first:
            transformers would keep them and delete the one just saved.

    Returns:
        What was deleted, in that order.
    """
    checkpoints = list_checkpoints(run_folder)
    if save_total_limit is None or save_total_limit < 1 or len(checkpoints) <= save_total_limit:
        return []
    if newest is None:
        newest = find_checkpoint(run_folder, deep=False)[0] or checkpoints[-1]
    kept = {Path(path).absolute() for path in (newest, best) if path is not None}
    removable = [path for path in checkpoints if path.absolute() not in kept]
    if checkpoint_step(newest) is None:
        raise ValueError(f"rotate_checkpoints: newest must be a path checkpoint-N, got {newest}")
    given_up = [path for path in removable if checkpoint_step(path) > checkpoint_step(newest)]
    removable = given_up + [path for path in removable if path not in given_up]
    deleted = removable[: len(checkpoints) - save_total_limit]
    for path in deleted:
        delete_checkpoint(path)
    return deleted


def remove_leftovers(run_folder: str | Path) -> list[Path]:
    """Clear away what killed saves and deletions left, and put back a checkpoint that was being replaced.

    Args:
        run_folder: the run's output folder, which no other process may be writing to; it may be missing.

    Returns:
        What was removed (staging folders and checkpoints on their way out).
    """
    folder, removed = Path(run_folder), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        destination = folder / match[2]
        if match[1] == "replaced" and not os.path.lexists(destination):
            os.rename(path, destination)
            sync(folder)
        else:
            _discard(path)
            removed.append(path)
    return removed


def write_atomically(path: Path, text: str) -> None:
    """Write a small file that holds all of the text or what it held before, whatever happens."""
    partial = _partial(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of a folder; what matters more, that of the files, must succeed.
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files and folders of a folder, itself included, in a fixed order. Raises: CheckpointError, for anything else."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link: expected a folder of its own")
    files, folders = [], [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(
                f"{path} is a symbolic link, or neither file nor folder: its content cannot be sealed"
            )
        (folders if path.is_dir() else files).append(path)
    return files, folders


def _hash_files(paths: list[Path], read: Callable[[Path], tuple[int, str]]) -> list[tuple[int, str]]:
    """(size, SHA-256) of each, in several threads; with a progress bar in bytes where it takes long."""
    results = []
    total = sum(path.stat().st_size for path in paths)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="checksums", delay=_SECONDS_BEFORE_PROGRESS, leave=False)
    with bar, ThreadPoolExecutor(_NUM_THREADS) as pool:
        try:
            for result in pool.map(read, paths):
                results.append(result)
                bar.update(result[0])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # after an error or Ctrl-C: do not read the rest
    return results


def _read(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _read_and_sync(path: Path) -> tuple[int, str]:
    sync(path)
    return _read(path)


def _digest_of_entries(entries: dict) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _discard(path: Path) -> None:
    """Rename to a name of its own that is known for rubbish, then delete; nothing if it is not there."""
    if not os.path.lexists(path):
        return
    match = _LEFTOVER.fullmatch(path.name)
    rubbish = path.with_name(f"{_DELETED}{match[2] if match else path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, rubbish)
    sync(path.parent)
    try:
        _remove(rubbish)
    except OSError as error:
        logger.warning("%s cannot be deleted and takes up space until it is: %s", rubbish, error)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
