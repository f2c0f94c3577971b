"""LoRA and quantized bases: what PEFT adapts, what it trains whole, and what bitsandbytes leaves alone."""

import re
from typing import TYPE_CHECKING

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft import LoraConfig

# Trained whole beside an adapter, and kept out of quantization: they are small (45 M parameters of the 7B model) and start
# far from where they end.
VISUAL_PARTS = ("stab", "projector")


def lora_config(
    model: PreTrainedModel, r: int = 64, lora_alpha: int = 128, lora_dropout: float = 0.05, **kwargs
) -> "LoraConfig":
    """The PEFT configuration of an adapter for the language model's linear layers; STAB and the projector train whole.

    An adapter saved so holds LoRA's matrices and complete copies of STAB and the projector, running statistics included.

    Args:
        model: a Video-Panda, quantized or not, before PEFT has wrapped it.
        r, lora_alpha, lora_dropout: of LoRA; the defaults follow the instruction tuning of LLaVA.
        kwargs: further fields of `peft.LoraConfig`.

    Raises:
        ValueError: it is another model, is wrapped already, or its language model has no linear layers.
        ImportError: peft is not installed.
    """
    from peft import LoraConfig

    if model.config.model_type != "video_panda":
        raise ValueError(f"lora_config expects a Video-Panda model, got model_type {model.config.model_type!r}")
    names = dict(model.named_modules())
    if any(name.endswith(".base_layer") or name.endswith(".original_module") for name in names):
        raise ValueError("lora_config expects the model before PEFT has wrapped it: it holds an adapter already")
    prefix = next(name for name in names if name.split(".")[-1] == "language_model").removesuffix("language_model")
    linear = [
        name for name, module in names.items() if name.startswith(f"{prefix}language_model.") and _is_linear(module)
    ]
    if not linear:
        raise ValueError(f"The language model ({model.config.text_config.model_type}) has no linear layers to adapt")
    settings = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": _pattern(linear, names),
        "modules_to_save": [prefix + part for part in VISUAL_PARTS],
        # GPT-2 keeps its weights transposed.
        "fan_in_fan_out": all(isinstance(names[name], Conv1D) for name in linear),
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **kwargs})


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, GPT-2's Conv1D, and the linear layers of quantizers, which need not be an nn.Linear but look like one."""
    return isinstance(module, (nn.Linear, Conv1D)) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def _pattern(chosen: list[str], names: dict[str, nn.Module]) -> str:
    """A regular expression for exactly the chosen full names.

    PEFT takes a list as suffixes, and `q_proj` alone is in STAB too; a string it compares with the full name.
    """
    # One alternative for all layers, provided that the layers are alike.
    shapes = dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in chosen)
    pattern = _alternatives(shapes)
    if {name for name in names if re.fullmatch(pattern, name)} != set(chosen):
        pattern = _alternatives(re.escape(name) for name in chosen)
    return pattern


def _alternatives(patterns) -> str:
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def quantization_config(bits: int = 4, **kwargs) -> BitsAndBytesConfig:
    """The `quantization_config` of `from_pretrained` for a language model in 4 or 8 bits under a STAB in full.

    bitsandbytes need not be installed to build it, only to load a model with it.

    Args:
        bits: 4 (NF4 with double quantization, computing in bfloat16: QLoRA) or 8.
        kwargs: further fields of `BitsAndBytesConfig`, or other values of those that are set here.

    Raises:
        ValueError: another number of bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantization_config: bits must be 4 or 8, got {bits!r}")
    settings = {
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        # From the top of the model with a head, and of the one without. Naming any replaces transformers' default,
        # which is lm_head.
        "llm_int8_skip_modules": [*(f"model.{part}" for part in VISUAL_PARTS), *VISUAL_PARTS, "lm_head"],
    }
    if bits == 4:
        settings |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
    return BitsAndBytesConfig(**{**settings, **kwargs})
