"""Files of a checkpoint that are saved whole or not at all, and whose damage is noticed when they are loaded.

What is saved is written aside first and then renamed into place; `saved_files.json` keeps a checksum of each file. The same
file stands in both folders of shipped code, which cannot import from each other.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

RECORD_FILE = "saved_files.json"
# People edit these by hand, so another content is only warned of; what is in them is checked where they are read.
EDITED_BY_HAND = ("config.json", "generation_config.json", "processor_config.json")
_SUFFIXES = (".safetensors", ".json", ".jinja", ".py")
_TEXTS = (".json", ".jinja", ".py")
# Of a large file a part is read: loading maps weights, it does not read them. Another checkpoint's differ everywhere.
_NUM_BLOCKS, _BLOCK_BYTES = 32, 64 * 1024


@contextmanager
def saving_aside(folder: str | os.PathLike, kind: str) -> Iterator[Path]:
    """A folder to save into; its files go to `folder` when the block ends well, and the record with them.

    Args:
        folder: made if it is not there.
        kind: of what is saved, a word: two kinds may be saved in a folder at the same time.

    Raises:
        OSError: a file cannot be written (full disk). What was in the folder is still there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".saving_{kind}"
    _delete(aside)  # of a save that was killed
    try:
        aside.mkdir()
        yield aside
        files = (path for path in aside.rglob("*") if path.is_file() and path.name != RECORD_FILE)
        written = sorted(path.relative_to(aside) for path in files)
        at_top = [path for path in written if len(path.parts) == 1]
        record = _record_before(folder) | {path.name: _digest(aside / path) for path in at_top if _is_recorded(path)}
        weights = {path.name for path in written if path.suffix == ".safetensors"}
        stale = _other_weights(folder, weights) if weights else []
        record = {name: record[name] for name in sorted(record) if name not in {path.name for path in stale}}
        (aside / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in [*written, Path(RECORD_FILE)]:
            (folder / path).parent.mkdir(exist_ok=True)
            os.replace(aside / path, folder / path)
        for path in stale:
            path.unlink()
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error  # a full disk does not say where
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # how the weights' writer says that a disk is full
            raise
        raise OSError(f"The weights cannot be saved in {folder}: {error}") from error
    finally:
        _delete(aside)


def record_saved_files(folder: Path) -> None:
    """Write `saved_files.json` for all that a folder holds, which was just written.

    Raises:
        OSError: a file cannot be read, or the record not be written.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_recorded(path)]
    record = {path.name: _digest(path) for path in files if not path.name.startswith("alignment_head")}
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def check_saved_files(folder: Path, module: str, kind: str) -> None:
    """Compare a checkpoint's files with what was saved; nothing where there is no record.

    Args:
        folder: the checkpoint's.
        module: of the class that loads: the code in the folder matters only to one that was loaded from there.
        kind: "config", "model" or "processor", of what is loaded.

    Raises:
        OSError: a file is missing, is not what was saved, or holds no JSON object; it is named.
    """
    is_remote = module.split(".")[0] == "transformers_modules"
    record = _record_of(folder)
    own = {
        name: digest for name, digest in record.items() if (is_remote if name.endswith(".py") else _is_of(name, kind))
    }
    remedy = f"if that was done on purpose, take its line out of {folder / RECORD_FILE}"
    for name, digest in own.items():
        path = folder / name
        if name == "chat_template.jinja" and (folder / "chat_template.json").is_file():
            continue  # the form of older versions, which transformers prefers
        if not path.is_file():
            raise OSError(f"{path} is missing: it was saved with this checkpoint; {remedy}")
        if name in EDITED_BY_HAND:
            _check_json(path)
        if _digest(path) == digest:
            continue
        if name not in EDITED_BY_HAND:
            raise OSError(
                f"{path} ({path.stat().st_size} bytes) is not what was saved with this checkpoint: damaged, cut off, or of "
                f"another one; {remedy}"
            )
        logger.warning(f"{path} has been changed since this checkpoint was saved.")
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"):
        if name not in own and _is_of(name, kind) and (folder / name).is_file():
            _check_json(folder / name)


def _is_of(name: str, kind: str) -> bool:
    if name == "config.json":
        return kind == "config"
    if kind == "config":
        return False
    is_models = name == "generation_config.json" or ".safetensors" in name
    return is_models == (kind == "model")


def _is_recorded(path: Path) -> bool:
    return path.suffix in _SUFFIXES and path.name != RECORD_FILE


def _record_of(folder: Path) -> dict[str, str]:
    path = folder / RECORD_FILE
    return _check_json(path) if path.is_file() else {}


def _record_before(folder: Path) -> dict[str, str]:
    try:
        return _record_of(folder)
    except OSError:  # damaged; what is saved now gets a new one
        return {}


def _check_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} ({path.stat().st_size} bytes) is not JSON: damaged or cut off ({error})") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} holds no JSON object, but a {type(content).__name__}")
    return content


def _digest(path: Path) -> str:
    """SHA-256 of a file's size and content; of a large one, of blocks at equal distances, the last one included."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _NUM_BLOCKS * _BLOCK_BYTES:
            content = file.read()
            if path.suffix in _TEXTS:
                content = content.replace(b"\r\n", b"\n")  # as git may check it out
            return hashlib.sha256(content).hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(_NUM_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * number // (_NUM_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _other_weights(folder: Path, written: set[str]) -> list[Path]:
    """Weights of an earlier save: transformers would load a single file before an index, whichever is newer."""
    if not any(name.startswith(("model.safetensors", "model-")) for name in written):
        return []  # of a variant, which has names of its own
    found = [*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors"]
    if "model.safetensors" in written:
        found.append(folder / "model.safetensors.index.json")
    return [path for path in found if path.name not in written and path.exists()]


def _delete(folder: Path) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            _delete(path) if path.is_dir() else path.unlink()
        folder.rmdir()
