"""How a checkpoint was trained, from the `training.json` beside its weights; `trainers/training_facts.py` writes it."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .card_results import cell, public_name
from .shards import read_json

TRAINING_FILE = "training.json"
_FORMAT = 1
_STAGE_TITLES = {
    "initial_alignment": "Stage 1: initial alignment",
    "visual_language_integration": "Stage 2: visual-language integration",
    "instruction_tuning": "Stage 3: instruction tuning",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_training(folder: str | os.PathLike) -> dict:
    """The record of a checkpoint's training; {} where there is none.

    Raises:
        ValueError: it is damaged, or newer than this package.
    """
    path = Path(folder, TRAINING_FILE)
    if not path.is_file():
        return {}
    training = read_json(path)
    if training.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected format {_FORMAT}, got {training.get('format')!r}")
    stages = training.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{path}: stages must be a list of objects, got {stages!r:.80}")
    return training


def dataset_ids_of(training: Mapping) -> list[str]:
    """The data sets of all stages that are on the Hub: the others' names are those of files."""
    names = [name for stage in training.get("stages", ()) for name in (stage.get("data") or {}).get("names", ())]
    return hub_ids(name for name in dict.fromkeys(names) if "/" in name)


def hub_ids(names: Iterable[str]) -> list[str]:
    """Of some names those that can be ids on the Hub: a folder's is left out, wherever it is."""
    return [name for name in names if _HUB_ID.fullmatch(name) and not os.path.exists(name)]


def describe_stage(stage: Mapping) -> dict:
    """What the template needs of a stage: `title`, and `rows` of label and text; what is unknown is left out."""
    rows = {
        "data": _data(stage.get("data") or {}),
        "steps": _steps(stage),
        "trained": _join(stage.get("trained_parts")),
        "adapter": _settings(stage.get("adapter")),
        "distillation": _distillation(stage.get("distillation")),
        **{_words(name): _value(value) for name, value in (stage.get("hyper_parameters") or {}).items()},
        "losses at the end": _settings({name: _number(value) for name, value in (stage.get("losses") or {}).items()}),
        "hardware": _hardware(stage.get("hardware") or {}),
        "code": ", ".join(f"{name} {version}" for name, version in (stage.get("versions") or {}).items()),
    }
    name = str(stage.get("stage") or "training")
    return {
        "title": cell(_STAGE_TITLES.get(name, name)),
        "rows": [(cell(label), cell(text)) for label, text in rows.items() if text],
    }


def _data(data: Mapping) -> str | None:
    names = _join(public_name(str(name)) for name in data.get("names") or ())
    total, used = data.get("num_samples"), data.get("num_used")
    counts = None if used is None else f"{used:,} samples" + (f" of {total:,}" if total not in (None, used) else "")
    skipped = _join(f"{count:,} {_words(kind)}" for kind, count in (data.get("num_skipped") or {}).items())
    return ", ".join(own for own in (names, counts, skipped and f"left out while training: {skipped}") if own) or None


def _steps(stage: Mapping) -> str | None:
    if stage.get("steps") is None:
        return None
    epochs = stage.get("epochs")
    return f"{stage['steps']:,}" + ("" if epochs is None else f" ({_number(epochs)} epochs)")


def _distillation(distillation: Mapping | None) -> str | None:
    if not distillation:
        return None
    teacher = public_name(str(distillation.get("teacher", "a teacher")))
    rest = {name: value for name, value in distillation.items() if name not in ("teacher",)}
    return f"{teacher}; {_settings(rest)}"


def _hardware(hardware: Mapping) -> str | None:
    if not hardware.get("device"):
        return None
    num_processes = hardware.get("num_processes") or 1
    return f"{num_processes} x {hardware['device']}" if num_processes > 1 else str(hardware["device"])


def _settings(settings: Mapping | None) -> str | None:
    return _join(f"{_words(name)} {_value(value)}" for name, value in (settings or {}).items() if value is not None)


def _join(parts) -> str | None:
    return ", ".join(str(part) for part in parts or ()) or None


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _value(value) -> str | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return _settings(value)
    if isinstance(value, (list, tuple)):
        return _join(map(_number, value))
    return _number(value)


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
