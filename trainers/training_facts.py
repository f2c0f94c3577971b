"""What a model's card, and the next stage, want to know about how it was trained: `training.json` beside the weights.

No paths are in it: of files their names, of models and teachers their ids on the Hub.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from ..version import __version__
from .checkpoints import write_atomically
from .collator import TOO_LONG, UNREADABLE
from .distillation import HEAD_NAME, find_core

if TYPE_CHECKING:
    from .trainer import VideoPandaTrainer

logger = logging.getLogger(__name__)

TRAINING_FILE = "training.json"
_FORMAT = 1
_FILE_BUILDERS = ("json", "csv", "parquet", "text", "generator")  # how a data set was read, and no name of one
_LOSSES = ("loss", "lm_loss", "distillation_loss", "eval_loss")


def read_origin(model: torch.nn.Module) -> dict[str, Any]:
    """What a model was before this training, from where it was loaded.

    Returns:
        `base_model`: the id on the Hub from which the first stage started, None where that is not known; `stages`: those
        that came before.
    """
    name = str(find_core(model).config.name_or_path or "")
    path = Path(name, TRAINING_FILE)
    if name and path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if earlier["format"] == _FORMAT:
                return {"base_model": earlier.get("base_model"), "stages": list(earlier["stages"])}
            reason = f"format {earlier['format']}, expected {_FORMAT}"
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        logger.warning("%s cannot be read (%s): what it says is not handed on", path, reason)
        return {"base_model": None, "stages": []}
    return {"base_model": name if _came_from_the_hub(name) else None, "stages": []}


def _came_from_the_hub(name: str) -> bool:
    """Whether it is the id of a repository that was downloaded; a folder's name can look like one."""
    if name.count("/") != 1 or Path(name).exists():
        return False
    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).is_dir()


def name_data(dataset) -> list[str]:
    """What training data is called: a file's name without its folder, an id on the Hub, or the name that a data set brings."""
    if isinstance(dataset, (str, Path)):
        is_id = str(dataset).count("/") == 1 and not Path(dataset).is_absolute() and not Path(dataset).exists()
        return [str(dataset) if is_id else Path(dataset).name]
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return [name] if name and name not in _FILE_BUILDERS else []


def training_facts(trainer: "VideoPandaTrainer") -> dict[str, Any]:
    """The record of a training as it stands now, the stages before it included; JSON values."""
    stage = {
        "stage": trainer.args.stage,
        "data": _data(trainer),
        "steps": trainer.state.global_step,
        "epochs": None if trainer.state.epoch is None else round(trainer.state.epoch, 4),
        "trained_parts": [part for part, trains in trainer.args.trains().items() if trains and part != HEAD_NAME],
        "adapter": _adapter(trainer.model),
        "hyper_parameters": _hyper_parameters(trainer),
        "distillation": _distillation(trainer),
        "losses": _last_losses(trainer),
        "hardware": {"device": _device(trainer), "num_processes": trainer.args.world_size},
        "versions": {
            "video-panda": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }
    origin = trainer.origin
    return {"format": _FORMAT, "base_model": origin["base_model"], "stages": [*origin["stages"], stage]}


def write_training_facts(folder: str | Path, trainer: "VideoPandaTrainer") -> Path:
    """Write `training.json` into a folder, atomically. Returns its path."""
    path = Path(folder, TRAINING_FILE)
    write_atomically(path, json.dumps(training_facts(trainer), indent=2))
    return path


def _data(trainer) -> dict[str, Any]:
    dataset = trainer.train_dataset
    num_used = len(dataset) if hasattr(dataset, "__len__") else None
    num_samples = len(dataset.dataset) if hasattr(dataset, "dataset") else num_used
    return {
        "names": list(trainer.data_names),
        "num_samples": num_samples,
        "num_used": num_used,
        "num_skipped": _last_skipped(trainer),
    }


def _last_skipped(trainer) -> dict[str, int]:
    """What all processes left out, as last logged: asking them now would have all of them be asked."""
    counts: dict[str, int] = {}
    for entry in trainer.state.log_history:
        counts |= {kind: entry[f"num_{kind}"] for kind in (UNREADABLE, TOO_LONG) if f"num_{kind}" in entry}
    return counts


def _adapter(model) -> dict[str, Any] | None:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    config = next(iter(configs.values()))
    return {"kind": "LoRA", "rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}


def _hyper_parameters(trainer) -> dict[str, Any]:
    args = trainer.args
    trains = args.trains()
    rates = {part: rate for part, rate in args.learning_rates().items() if trains[part]}
    if trainer.alignment_head is None:
        rates.pop(HEAD_NAME, None)
    return {
        "global_batch_size": args.global_batch_size,
        "micro_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "learning_rates": rates,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup": args.warmup_steps,  # steps, or below 1 their share
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "adam_betas": [args.adam_beta1, args.adam_beta2],
        "weight_decay": args.weight_decay,
        "max_gradient_norm": args.max_grad_norm,
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "num_frames": args.num_frames or trainer.core_config.vision_config.num_frames,
        "max_length": args.max_length,
        "seed": args.seed,
    }


def _distillation(trainer) -> dict[str, Any] | None:
    if trainer.teacher is None:
        return None
    args = trainer.args
    name = str(args.teacher_source or "")
    kind = getattr(trainer.teacher, "kind", type(trainer.teacher).__name__)
    return {
        "teacher": name if _came_from_the_hub(name) else kind,
        "loss": args.distillation_loss,
        "weight": args.distillation_weight,
        "layer_step": args.distillation_layer_step,
    }


def _last_losses(trainer) -> dict[str, float]:
    """As last logged, which is a mean over the steps since the log before."""
    losses: dict[str, float] = {}
    for entry in trainer.state.log_history:
        losses |= {name: entry[name] for name in _LOSSES if name in entry}
    return losses


def _device(trainer) -> str:
    device = trainer.args.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
