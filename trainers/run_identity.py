"""Which run a folder belongs to: `run.json` in the output folder and in each checkpoint."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .checkpoints import list_checkpoints, write_atomically

RUN_FILE = "run.json"

# What a config says besides the shapes and computations of its model; the Trainer itself changes some of them.
_BOOKKEEPING = frozenset(
    (
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
        "use_cache",
    )
)


@dataclass(frozen=True)
class RunIdentity:
    """What must agree for a run to go on from a checkpoint.

    Args:
        run_id: hexadecimal, drawn when the run was started; a resumed run keeps it.
        stage: the stage's name.
        architecture: as of `architecture_of`.
        distillation: what the alignment head and its loss depend on (teacher's width, loss, ...), JSON values.
    """

    run_id: str
    stage: str
    architecture: dict[str, Any]
    distillation: dict[str, Any]


def new_identity(stage: str, config: PreTrainedConfig, distillation: Mapping[str, Any] | None = None) -> RunIdentity:
    """The identity of a run that starts now.

    Args:
        stage: the stage's name.
        config: `model.config`.
        distillation: see `RunIdentity`; JSON values.
    """
    # Through JSON, so that it equals what is read back (tuples become lists).
    distillation = json.loads(json.dumps(dict(distillation or {})))
    return RunIdentity(uuid.uuid4().hex, stage, architecture_of(config), distillation)


def architecture_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that decide shapes and computations, nested, as JSON values.

    Args:
        config: of a Video-Panda model.

    Raises:
        ValueError: of another model.
    """
    if config.model_type != "video_panda":
        raise ValueError(f"Expected the configuration of a Video-Panda model, got model_type {config.model_type!r}")
    # Names that are no strings and dtypes become strings, tuples lists: as read back from a file.
    return _without_bookkeeping(json.loads(json.dumps(config.to_dict(), default=str)))


def _without_bookkeeping(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_bookkeeping(inner) for name, inner in value.items() if name not in _BOOKKEEPING}


def describe_difference(found: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two nested dicts differ, as "text_config.hidden_size: got 64, expected 48".

    Args:
        found, own: what was got and what was expected. A field that is absent counts as None or False: what it was
            before it existed, when another version of transformers wrote one of them.
        prefix: stands before each name.
    """
    lines = []
    for name in sorted(found.keys() | own.keys()):
        got, expected = found.get(name), own.get(name)
        if isinstance(got, Mapping) and isinstance(expected, Mapping):
            lines += describe_difference(got, expected, f"{prefix}{name}.")
        elif not _agree(got, expected):
            lines.append(f"{prefix}{name}: got {got!r}, expected {expected!r}")
    return lines


def _agree(got: Any, expected: Any) -> bool:
    if _is_off(got) and _is_off(expected):
        return True
    return got == expected and isinstance(got, bool) == isinstance(expected, bool)  # True is no 1


def _is_off(value: Any) -> bool:
    return value is None or value is False


def write_identity(folder: str | Path, identity: RunIdentity) -> Path:
    """Write `run.json` into a folder, atomically; the folder is made if missing. Returns the file's path."""
    path = Path(folder, RUN_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(identity), indent=2))
    return path


def read_identity(folder: str | Path) -> RunIdentity:
    """Read `run.json` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the file and the field are named.
    """
    path = Path(folder, RUN_FILE)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for field in fields(RunIdentity):
        expected = str if field.type is str else dict
        got = content.get(field.name) if isinstance(content, dict) else content
        if not isinstance(got, expected):
            raise ValueError(f"{path} is damaged: {field.name} must be a {expected.__name__}, got {got!r}")
    return RunIdentity(**{field.name: content[field.name] for field in fields(RunIdentity)})


def check_same_run(found: RunIdentity, own: RunIdentity, folder: str | Path) -> None:
    """Refuse to go on from a checkpoint of another stage, architecture or distillation. The run ids may differ.

    Args:
        found: what `folder` holds.
        own: of the run that is about to start.
        folder: named in the error.

    Raises:
        ValueError: naming the stages, or the fields that differ.
    """
    if found.stage != own.stage:
        raise ValueError(
            f"{folder} belongs to the stage {found.stage}, expected {own.stage}: to start a stage from the weights of "
            "another one, give its checkpoint as the model, not as the one to resume from"
        )
    differences = describe_difference(found.architecture, own.architecture)
    differences += describe_difference(found.distillation, own.distillation, "distillation.")
    if differences:
        named = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise ValueError(f"{folder} was trained with another model: {named}")


def check_output_folder(output_dir: str | Path, own: RunIdentity, resuming: bool) -> RunIdentity:
    """Refuse an output folder that belongs to another run.

    Args:
        output_dir: where the run will write; it may be missing.
        own: of the run that is about to start.
        resuming: it is to go on from a checkpoint in that folder.

    Returns:
        The identity to go on with: `own`, or when resuming the one found there, with its run id.

    Raises:
        ValueError: saying what was found and what to do.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file, expected a folder")
    checkpoints = list_checkpoints(folder)
    found = _find_identity(folder, checkpoints)
    if found is None and not checkpoints:
        return own
    if found is None:
        raise ValueError(
            f"{folder} holds {checkpoints[-1].name} without {RUN_FILE}: another program saved it, and this run can "
            "neither resume it nor write beside it. Choose another output_dir"
        )
    if resuming or found.run_id == own.run_id:
        check_same_run(found, own, folder)
        return found
    try:
        check_same_run(found, own, folder)
    except ValueError as error:
        raise ValueError(f"{error}. Choose another output_dir") from None
    holds = f"{len(checkpoints)} checkpoints, the last {checkpoints[-1].name}" if checkpoints else "no checkpoint yet"
    raise ValueError(
        f"{folder} belongs to another run of the same stage ({found.run_id}; {holds}). Choose another output_dir, or "
        "go on with that run by resume_from_checkpoint=" + ("True" if checkpoints else "'auto'")
    )


def _find_identity(folder: Path, checkpoints: list[Path]) -> RunIdentity | None:
    """That of the folder or, if its file was lost, of its newest checkpoint that has one."""
    for holder in (folder, *reversed(checkpoints)):
        if (holder / RUN_FILE).is_file():
            return read_identity(holder)
    return None
