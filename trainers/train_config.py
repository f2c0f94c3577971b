"""The configuration of a training run: a YAML file with overrides from the command line, read into dataclasses.

Both are read by one parser (transformers' `HfArgumentParser`), so that a value means the same in either place.
"""

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .arguments import VideoPandaTrainingArguments, argument
from .stages import arguments_of

DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO, NONE = "auto", "none"
_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass
class ModelArguments:
    """What is trained.

    Args:
        model: a checkpoint (folder or Hub id), or the output folder of an earlier stage.
        model_revision: branch, tag or commit of a Hub repository.
        dtype: of a language model that does not train (stage 1, LoRA): "auto" (as stored), "float32", "bfloat16" or
            "float16". Whatever trains is float32: in half precision small steps are lost.
        attn_implementation: of the language model, as in transformers; default: its own choice.
        alignment_head: "auto" (that of `model`, if it has one), "none" (a fresh one), a file, or the folder of a
            checkpoint or run.
        use_lora: train an adapter of the language model in its place; STAB and projector train whole.
        lora_r, lora_alpha, lora_dropout: of the adapter; the defaults follow LLaVA.
        load_in_4bit: quantize the language model under the adapter (QLoRA).
    """

    model: str | None = argument(None, "Checkpoint: folder, Hub id, or output folder of an earlier stage.")
    model_revision: str | None = argument(None, "Branch, tag or commit of a Hub repository.")
    dtype: str = argument(AUTO, f"Of a frozen language model: {', '.join(DTYPES)}.")
    attn_implementation: str | None = argument(None, "Attention of the language model; default: its own choice.")
    alignment_head: str = argument(AUTO, "auto (that of the model), none (a fresh one), a file or a folder.")
    use_lora: bool = argument(False, "Train an adapter in place of the language model.")
    lora_r: int = argument(64, "Rank of the adapter.")
    lora_alpha: int = argument(128, "Scale of the adapter, times its rank.")
    lora_dropout: float = argument(0.05, "Dropout in front of the adapter.")
    load_in_4bit: bool = argument(False, "Quantize the language model under the adapter.")


@dataclass
class DataArguments:
    """What it is trained on: a file, or a dataset of the `datasets` library.

    Args:
        train_file: JSON or JSONL file of samples.
        eval_file: the same, for evaluation.
        dataset: folder or Hub id of a dataset, in place of `train_file`.
        dataset_config, dataset_split: which part of it.
        streaming: read it as it comes; needs `max_steps`.
    """

    train_file: str | None = argument(None, "JSON or JSONL file of samples.")
    eval_file: str | None = argument(None, "The same, for evaluation.")
    dataset: str | None = argument(None, "Folder or Hub id of a dataset, in place of train_file.")
    dataset_config: str | None = argument(None, "Configuration of the dataset.")
    dataset_split: str = argument("train", "Split of the dataset.")
    streaming: bool = argument(False, "Read the dataset as it comes; needs max_steps.")


@dataclass(frozen=True)
class TrainConfig:
    """A run: `training` is of the stage's own class, for example `InitialAlignmentArguments`."""

    model: ModelArguments
    data: DataArguments
    training: VideoPandaTrainingArguments

    @property
    def resume_from_checkpoint(self) -> str | bool | None:
        """As `VideoPandaTrainer.train` takes it."""
        asked = self.training.resume_from_checkpoint
        return {"true": True, "false": None}.get(str(asked).lower(), asked)

    @property
    def language_model_trains(self) -> bool:
        """Whether the language model's own weights train, not an adapter."""
        return self.training.train_language_model and not self.model.use_lora


class _Parser(HfArgumentParser):
    """Raises a ValueError where argparse would end the program."""

    def error(self, message: str):
        raise ValueError(re.sub(r"^argument --(\w+)\S*:", r"`\1`:", message))


class _TextLoader(yaml.BaseLoader):
    """Leaves each value the text that it is: YAML 1.1 turns `no` into False, 4e-4 into a string and 12e3 into a number."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {name for name in names if isinstance(name, str) and names.count(name) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(twice)[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_config(config: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's configuration.

    Args:
        config: YAML file: `stage`, and any field of `ModelArguments`, `DataArguments` and the stage's arguments.
        overrides: options as on a command line, such as `["--learning_rate", "1e-4"]`; they win.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML mapping; a field is unknown, missing or of another type; an unknown stage; values that
            do not go together. The file or the command line, and the field, are named.
    """
    content = _read_yaml(Path(config))
    stage, overrides = _split_off_stage(overrides)
    stage = stage or content.pop("stage", None)
    content.pop("stage", None)
    if not isinstance(stage, str) or stage in _NULLS:
        raise ValueError(f"{config}: `stage` is missing")
    try:
        classes = (ModelArguments, DataArguments, arguments_of(stage))
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from None
    parser = _Parser(classes, prog=f"video-panda train {config}", allow_abbrev=False)
    try:
        values = _parse_file(parser, content)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from None
    try:
        values, unknown = parser.parse_known_args(list(overrides), values)
        if unknown:
            raise ValueError(_describe_unknown(unknown[0], values))
    except ValueError as error:
        raise ValueError(f"command line: {error}") from None
    try:
        for name in ("model", "output_dir"):
            if not getattr(values, name):
                raise ValueError(f"`{name}` is missing")
        read = TrainConfig(*parser.parse_dict(vars(values)))
        _check_model(read)
        _check_data(read)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from None
    return read


def _read_yaml(path: Path) -> dict[str, Any]:
    """Field -> text, list of texts, or (nested) mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a mapping (field: value), got a {type(content).__name__}")
    return dict(content)


def _split_off_stage(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage")
    try:
        found, others = parser.parse_known_args(list(overrides))
    except ValueError as error:
        raise ValueError(f"command line: {error}") from None
    return found.stage, others


def _parse_file(parser: _Parser, content: dict[str, Any]) -> Namespace:
    """The parser's values for what a YAML file says; single values go through it as if typed on the command line."""
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    known = Namespace(**{action.dest: None for action in parser._actions if action.dest != "help"})
    typed, given = [], {}
    for name, value in content.items():
        if not isinstance(name, str) or not hasattr(known, name):
            raise ValueError(_describe_unknown_field(str(name), known))
        kinds = {get_origin(kind) or kind for kind in get_args(hints[name]) or (hints[name],)} | {
            get_origin(hints[name])
        }
        if isinstance(value, str) and value not in _NULLS:
            typed.append(f"--{name}={value}")
            continue
        value = None if isinstance(value, str) else _typed(value) if isinstance(value, dict) else value
        expected = {NoneType: "empty", list: "a list", dict: "a mapping"}
        if type(value) not in kinds:
            raise ValueError(f"`{name}`: it is {expected[type(value)]}, expected {_describe_kinds(kinds)}")
        given[name] = value
    values, _ = parser.parse_known_args(typed)
    for name, value in given.items():
        setattr(values, name, value)
    return values


def _typed(value):
    """A nested value, whose types nobody knows: numbers, true, false and null as JSON has them, text otherwise."""
    if isinstance(value, dict):
        return {name: _typed(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_typed(inner) for inner in value]
    try:
        return json.loads(value)
    except ValueError:
        return value


def _describe_kinds(kinds: set) -> str:
    names = {list: "a list", dict: "a mapping", str: "text", bool: "true or false", int: "a number", float: "a number"}
    known = dict.fromkeys(name for kind, name in names.items() if kind in kinds)
    return " or ".join(known) or "a single value"


def _describe_unknown(argument: str, known: Namespace) -> str:
    """What is wrong with what the parser left over of a command line."""
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}"
    return _describe_unknown_field(argument.removeprefix("--").split("=")[0].replace("-", "_"), known, prefix="--")


def _describe_unknown_field(name: str, known: Namespace, prefix: str = "") -> str:
    close = get_close_matches(name, vars(known), n=1)
    return f"unknown field `{prefix}{name}`" + (f"; did you mean `{prefix}{close[0]}`?" if close else "")


def _check_model(config: TrainConfig) -> None:
    """What can be said before a model is loaded."""
    model = config.model
    if model.dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {model.dtype!r}")
    if model.dtype not in (AUTO, "float32") and config.language_model_trains:
        raise ValueError(
            f"`dtype` is {model.dtype}, but the language model trains, whose weights are float32: bf16=true computes in "
            "bfloat16"
        )
    if model.use_lora and not config.training.train_language_model:
        raise ValueError("`use_lora` adapts the language model, but train_language_model is false")
    if model.load_in_4bit and not model.use_lora:
        raise ValueError("`load_in_4bit` needs use_lora=true: quantized weights cannot train")
    if model.lora_r < 1 or not 0 <= model.lora_dropout < 1:
        raise ValueError(
            f"`lora_r` must be at least 1 and `lora_dropout` in [0, 1), got {model.lora_r} and {model.lora_dropout}"
        )
    for is_asked, package in ((model.use_lora, "peft"), (model.load_in_4bit, "bitsandbytes")):
        _check_installed(is_asked, package, "use_lora" if package == "peft" else "load_in_4bit")


def _check_data(config: TrainConfig) -> None:
    data = config.data
    if bool(data.train_file) == bool(data.dataset):
        given = f"{data.train_file!r} and {data.dataset!r}" if data.train_file else "neither"
        raise ValueError(f"expected one of `train_file` and `dataset`, got {given}")
    for name in ("dataset_config", "streaming"):
        if getattr(data, name) and not data.dataset:
            raise ValueError(f"`{name}` is of a `dataset`, and there is none")
    if data.streaming and config.training.max_steps <= 0:
        raise ValueError("`streaming` needs max_steps: nobody knows the length of a stream")
    if config.training.eval_strategy != "no" and not data.eval_file:
        raise ValueError(f"`eval_strategy` is {config.training.eval_strategy.value}, but there is no `eval_file`")
    _check_installed(bool(data.dataset), "datasets", "dataset")


def _check_installed(is_asked: bool, package: str, name: str) -> None:
    if is_asked and find_spec(package) is None:
        raise ValueError(f"`{name}` needs the package {package}, which is not installed: pip install {package}")
