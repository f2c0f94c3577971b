"""The `train` command: a stage from one YAML file, on one process or under `accelerate launch`.

video-panda train CONFIG.yaml --learning_rate 1e-4
accelerate launch --config_file accelerate_fsdp2.yaml -m video_panda.trainers.train CONFIG.yaml
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, set_seed
from transformers.utils import cached_file

from ..modeling_video_panda.modeling_video_panda import VideoPandaForConditionalGeneration
from ..processing.processing_video_panda import VideoPandaProcessor
from .alignment_head import ALIGNMENT_HEAD_FILE
from .checkpoints import find_checkpoint
from .lora import lora_config, quantization_config
from .parameters import part_of
from .samples import load_samples
from .skipped import TooManySkippedError
from .stages import find_stage
from .train_config import AUTO, NONE, DataArguments, TrainConfig, read_config
from .trainer import VideoPandaTrainer, find_alignment_head
from .training_facts import name_data

USAGE = """usage: python -m video_panda.trainers.train CONFIG.yaml [--field value ...]

CONFIG.yaml names the stage, the model, the data and any field of the stage's arguments; `CONFIG.yaml --help` lists them.
Options of the command line win over the file."""


def train(config: str | Path, overrides: Sequence[str] = ()) -> VideoPandaTrainer:
    """Train one stage, and save the model into `output_dir`.

    Args:
        config: YAML file, as `read_config` describes it.
        overrides: options as on the command line, such as `["--learning_rate", "1e-4"]`; they win over the file.

    Returns:
        The trainer after training; `state.log_history` holds what was logged.

    Raises:
        OSError: a file, folder or repository that cannot be read.
        ValueError: as `read_config`, for a model of another kind, and as the trainer says.
    """
    run = read_config(config, overrides)
    args = run.training
    set_seed(args.seed)  # an adapter is drawn before the trainer seeds
    # The data first: a mistake in its name should not cost the loading of a large model.
    train_dataset = _load_data(run.data)
    eval_dataset = load_samples(run.data.eval_file) if run.data.eval_file else None
    source = _on_main_process(lambda: find_model(run.model.model))
    stored_dtype = check_checkpoint(source, run)
    head = _on_main_process(lambda: _find_head(run, source))
    if PartialState().is_main_process:
        print(f"stage: {args.stage}\nmodel: {source}\nalignment head: {_describe_head(run, head)}", flush=True)
    trainer = find_stage(args.stage)(
        model=load_model(run, source, stored_dtype),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=VideoPandaProcessor.from_pretrained(source, **_pinned(run)),
        alignment_head=head,
    )
    trainer.data_names = name_data(run.data.train_file or run.data.dataset)
    try:
        result = trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
    except TooManySkippedError:
        raise
    except (ValueError, OSError):
        # Hours into a run it takes more than the one line that the commands print.
        if trainer.state.global_step:
            traceback.print_exc()
        raise
    _finish(trainer, result.metrics)
    return trainer


def _finish(trainer: VideoPandaTrainer, metrics: dict[str, float]) -> None:
    """Save (and push) the model, the state and the numbers; evaluate."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()  # saves first
    else:
        trainer.save_model()
    trainer.save_state()
    if metrics["train_loss"]:  # 0: the run had ended before, and this is no result
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def _load_data(data: DataArguments):
    if data.train_file:
        return load_samples(data.train_file)
    from datasets import load_dataset

    return load_dataset(data.dataset, data.dataset_config, split=data.dataset_split, streaming=data.streaming)


def _on_main_process(decide: Callable[[], Path | str | None]) -> str | None:
    """What the first process finds, on all of them: whole checkpoints are hashed once, and all see the same."""
    answer = [None, None]
    if PartialState().is_main_process:
        try:
            found = decide()
            answer[0] = None if found is None else str(found)
        except (ValueError, OSError) as error:
            if PartialState().num_processes == 1:
                raise
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def find_model(source: str) -> str:
    """The checkpoint to start from: `source` itself, or the newest whole checkpoint of a run that did not end.

    Raises:
        FileNotFoundError: a folder without any checkpoint; those passed over are named with the reason.
        ValueError: it holds an adapter.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        found, passed_over = find_checkpoint(folder)
        if found is None:
            reasons = "".join(f"; {path.name}: {reason}" for path, reason in passed_over)
            raise FileNotFoundError(f"{source} has no config.json, nor a whole checkpoint of a run{reasons}")
        folder, source = found, str(found)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{source} holds a LoRA adapter, expected a whole model: merge it into one first (merge_and_unload)"
        )
    return source


def _find_head(run: TrainConfig, source: str) -> Path | str | None:
    """The alignment head to go on from; None for a fresh one."""
    asked = run.model.alignment_head
    if asked == NONE or run.training.distillation_loss == "none":
        return None
    if asked != AUTO:
        return find_alignment_head(asked)
    if not Path(source).is_dir():
        return cached_file(source, ALIGNMENT_HEAD_FILE, _raise_exceptions_for_missing_entries=False, **_pinned(run))
    try:
        return find_alignment_head(source)
    except FileNotFoundError:
        return None


def _describe_head(run: TrainConfig, head: str | None) -> str:
    if run.training.distillation_loss == "none":
        return "none (distillation_loss is none)"
    return head or "fresh"


def _pinned(run: TrainConfig) -> dict[str, str]:
    revision = run.model.model_revision
    return {} if revision is None or Path(run.model.model).is_dir() else {"revision": revision}


def load_model(run: TrainConfig, source: str, stored_dtype: str) -> torch.nn.Module:
    """The model, in the dtypes in which its parts train, perhaps quantized and with an adapter.

    Args:
        run: its `model` arguments and which parts train.
        source: checkpoint (folder or Hub id).
        stored_dtype: of its weights, such as "bfloat16".

    Raises:
        OSError: a file of the checkpoint is missing or cut off.
        ValueError: its weights do not fit its configuration.
    """
    arguments = run.model
    # Through float32, so that a dtype in config.json cannot round the weights of parts that train.
    options = {"dtype": torch.float32, **_pinned(run)}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.load_in_4bit:
        options |= {"quantization_config": quantization_config(4), "device_map": {"": run.training.device}}
    model = VideoPandaForConditionalGeneration.from_pretrained(source, **options)
    if arguments.load_in_4bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the trainer sees to that
    elif not run.language_model_trains:
        dtype = getattr(torch, stored_dtype if arguments.dtype == AUTO else arguments.dtype)
        for name, parameter in model.named_parameters():
            if part_of(name) == "language_model":
                parameter.data = parameter.data.to(dtype)
    if arguments.use_lora:
        from peft import get_peft_model

        settings = {name: getattr(arguments, name) for name in ("lora_alpha", "lora_dropout")}
        model = get_peft_model(model, lora_config(model, r=arguments.lora_r, **settings))
    return model


def check_checkpoint(source: str, run: TrainConfig) -> str:
    """The dtype that a checkpoint says it has.

    Raises:
        OSError: no such folder or repository.
        ValueError: a checkpoint of another model.
    """
    try:
        found, _ = PreTrainedConfig.get_config_dict(source, **_pinned(run))
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"{source}: no such folder, and it cannot be had from the Hub: {reason}") from error
    if found.get("model_type") != "video_panda":
        raise ValueError(
            f"{source} holds a model of type {found.get('model_type')!r}, expected 'video_panda'; `video-panda convert` "
            "turns the authors' format into it"
        )
    return found.get("dtype") or found.get("torch_dtype") or "float32"


def main() -> None:
    """The program: what the user can mend is one line on stderr, not a traceback."""
    config, *overrides = sys.argv[1:] or ["--help"]
    if config in ("-h", "--help"):
        print(USAGE)
        return
    try:
        if config.startswith("-"):
            raise ValueError(f"expected CONFIG.yaml in front of the options, got {config!r}")
        train(config, overrides)
    except (ValueError, OSError) as error:
        print(f"video-panda: error: {error}", file=sys.stderr)
        sys.exit(1)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
