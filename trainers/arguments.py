"""Arguments of the three stages. Defaults are the paper's Table 6; data and distillation as in its sections 4.1 and 3.4."""

import os
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from .alignment_head import DISTILLATION_LOSSES, LAYER_STEP
from .parameters import PARTS


def argument(default, text: str):
    """A dataclass field with the text that `--help` shows."""
    return field(default=default, metadata={"help": text})


def split_global_batch(
    global_batch_size: int, per_device_batch_size: int, num_processes: int, accumulation_steps: int | None = None
) -> int:
    """Gradient accumulation steps that make up a global batch.

    Args:
        global_batch_size: samples of one optimizer step.
        per_device_batch_size: samples of one micro-batch.
        num_processes: that train side by side.
        accumulation_steps: what the user asked for, to be checked; None: to be found.

    Returns:
        global_batch_size / (per_device_batch_size x num_processes).

    Raises:
        ValueError: it does not divide, or is not what was asked for; names values that fit.
    """
    micro = per_device_batch_size * num_processes
    steps, rest = divmod(global_batch_size, micro)
    if rest or steps < 1:
        fitting = [
            size for size in range(1, per_device_batch_size + 1) if global_batch_size % (size * num_processes) == 0
        ]
        lower, upper = global_batch_size // micro * micro, -(-global_batch_size // micro) * micro
        proposals = [f"per_device_train_batch_size={fitting[-1]}"] if fitting else []
        proposals += [f"global_batch_size={size}" for size in dict.fromkeys((lower, upper)) if size]
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of per_device_train_batch_size "
            f"{per_device_batch_size} x {num_processes} processes; try {' or '.join(proposals)}"
        )
    if accumulation_steps not in (None, steps):
        raise ValueError(
            f"global_batch_size={global_batch_size} with per_device_train_batch_size={per_device_batch_size} on "
            f"{num_processes} processes needs gradient_accumulation_steps={steps}, got {accumulation_steps}; give one of "
            f"the two, or global_batch_size={micro * accumulation_steps}"
        )
    return steps


@dataclass
class VideoPandaTrainingArguments(TrainingArguments):
    """Arguments that all stages share, beside those of transformers, which all keep working.

    Args:
        global_batch_size: samples of one optimizer step, split into `per_device_train_batch_size` x processes x
            `gradient_accumulation_steps`, of which the last follows from the others. Default: the stage's, unless
            `gradient_accumulation_steps` is given.
        train_stab, train_projector, train_alignment_head, train_language_model: which parts train; the last includes the
            embeddings and `lm_head`.
        stab_learning_rate, projector_learning_rate, alignment_head_learning_rate, language_model_learning_rate: of the
            parts; default: `learning_rate`.
        distillation_loss: "cosine" (1 - cosine), "mse" or "none" (paper, Table 5).
        distillation_weight: of it in the sum with the LM loss (release: 1).
        distillation_layer_step: layers between two that are distilled (release: 4).
        teacher: "languagebind", "clip", "dinov2" or "internvideo" (paper, Table 10).
        teacher_source: folder or Hub id; default: the teacher's own.
        teacher_dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        teacher_temporal_attention: LanguageBind's attention over time (paper, Table 10).
        teacher_cache_dir: folder in which the teacher's features are kept, so that later epochs and stages skip it.
        data_root: folder that the paths of the samples start from.
        data_fraction, data_fraction_seed: train on a random part of a map-style data set.
        num_frames: frames of one video; default: the processor's.
        max_length: longest sample, in tokens; default: no limit. A sample is never cut.
        too_long: "drop" (and count) a sample that is longer, or "error".
        unreadable: "skip" (count, and note in `skipped_samples.jsonl`) a sample whose clip cannot be read, or "error".
        max_skipped_share: of unreadable samples; more than that stops the run.
    """

    stage: ClassVar[str] = ""
    default_global_batch_size: ClassVar[int | None] = None

    global_batch_size: int | None = argument(None, "Samples of one optimizer step.")
    gradient_accumulation_steps: int | None = argument(
        None, "Micro-batches of one step; follows from global_batch_size."
    )
    num_train_epochs: float = argument(1.0, "Epochs (paper, Table 6).")
    weight_decay: float = argument(0.0, "Weight decay (paper, Table 6).")
    lr_scheduler_type: str = argument("cosine", "Schedule (paper, Table 6).")
    train_sampling_strategy: str = argument(
        "group_by_length", "random, sequential, batch_rebalance, or group_by_length: one modality, similar lengths."
    )
    ddp_find_unused_parameters: bool | None = argument(False, "Every batch touches all that trains: nothing to find.")
    ddp_broadcast_buffers: bool | None = argument(
        False, "Each process keeps statistics of its own; they are averaged for checkpoints, evaluation and at the end."
    )
    remove_unused_columns: bool = argument(False, "The collator reads the samples' own columns.")

    train_stab: bool = argument(True, "Train STAB.")
    train_projector: bool = argument(True, "Train the projector.")
    train_alignment_head: bool = argument(True, "Train the alignment head.")
    train_language_model: bool = argument(True, "Train the language model with its embeddings and head.")
    stab_learning_rate: float | None = argument(None, "Default: learning_rate.")
    projector_learning_rate: float | None = argument(None, "Default: learning_rate.")
    alignment_head_learning_rate: float | None = argument(None, "Default: learning_rate.")
    language_model_learning_rate: float | None = argument(None, "Default: learning_rate.")

    distillation_loss: str = argument("cosine", f"One of {', '.join(DISTILLATION_LOSSES)} (paper, Table 5).")
    distillation_weight: float = argument(1.0, "Weight of the distillation loss (release).")
    distillation_layer_step: int = argument(LAYER_STEP, "Layers between two that are distilled (release).")
    teacher: str = argument("languagebind", "languagebind, clip, dinov2 or internvideo (paper, Table 10).")
    teacher_source: str | None = argument(None, "Folder or Hub id of the teacher; default: the usual one.")
    teacher_dtype: str = argument("auto", "auto, float32, bfloat16 or float16.")
    teacher_temporal_attention: bool = argument(True, "LanguageBind's attention over time (paper, Table 10).")
    teacher_cache_dir: str | None = argument(None, "Folder that keeps the teacher's features.")

    data_root: str | None = argument(None, "Folder that the samples' paths start from.")
    data_fraction: float = argument(1.0, "Random part of the data that is trained on.")
    data_fraction_seed: int = argument(0, "Which part that is.")
    num_frames: int | None = argument(None, "Frames of one video; default: the processor's.")
    max_length: int | None = argument(None, "Longest sample, in tokens; default: no limit.")
    too_long: str = argument("drop", "drop or error: what happens to a longer sample.")
    unreadable: str = argument("skip", "skip or error: what happens to a sample whose clip cannot be read.")
    max_skipped_share: float = argument(0.01, "Unreadable samples beyond this share stop the run.")

    def __post_init__(self):
        self._check_values()
        self._split_global_batch()
        super().__post_init__()

    def _check_values(self) -> None:
        choices = {
            "distillation_loss": DISTILLATION_LOSSES,
            "too_long": ("drop", "error"),
            "unreadable": ("skip", "error"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (
            ("global_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("num_frames", 1),
            ("max_length", 1),
            ("distillation_layer_step", 1),
            ("per_device_train_batch_size", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.data_fraction <= 1:
            raise ValueError(f"data_fraction must lie in (0, 1], got {self.data_fraction}")
        if not 0 <= self.max_skipped_share <= 1:
            raise ValueError(f"max_skipped_share must lie in [0, 1], got {self.max_skipped_share}")
        if self.label_smoothing_factor:
            # The logits of the placeholders are the dtype's minimum: smoothing over them gives an infinite loss.
            raise ValueError(f"label_smoothing_factor must be 0 for Video-Panda, got {self.label_smoothing_factor}")

    def __getstate__(self):
        # Pickled beside every checkpoint, and pushed with it: the token must not be.
        return {**self.__dict__, "hub_token": None}

    def _split_global_batch(self) -> None:
        # Before transformers' own checks, which hand the number of steps to DeepSpeed; it knows the processes only after.
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
        if self.global_batch_size is None:
            if self.gradient_accumulation_steps is None and self.default_global_batch_size is not None:
                self.global_batch_size = self.default_global_batch_size
            else:
                self.gradient_accumulation_steps = self.gradient_accumulation_steps or 1
                micro = self.per_device_train_batch_size * num_processes
                self.global_batch_size = micro * self.gradient_accumulation_steps
        self.gradient_accumulation_steps = split_global_batch(
            self.global_batch_size, self.per_device_train_batch_size, num_processes, self.gradient_accumulation_steps
        )

    def trains(self) -> dict[str, bool]:
        """Part -> whether it trains."""
        return {part: getattr(self, f"train_{part}") for part in PARTS}

    def learning_rates(self) -> dict[str, float]:
        """Part -> its peak learning rate."""
        own = {part: getattr(self, f"{part}_learning_rate") for part in PARTS}
        return {part: self.learning_rate if rate is None else rate for part, rate in own.items()}


@dataclass
class InitialAlignmentArguments(VideoPandaTrainingArguments):
    """Stage 1: STAB, projector and alignment head learn to speak to a frozen language model (paper, Table 6)."""

    stage: ClassVar[str] = "initial_alignment"
    default_global_batch_size: ClassVar[int] = 2048

    learning_rate: float = argument(4e-4, "Peak learning rate (paper, Table 6).")
    warmup_steps: float = argument(0.03, "Steps, or below 1 their share (paper, Table 6).")
    train_language_model: bool = argument(False, "Train the language model too.")
    data_fraction: float = argument(0.5, "Random part of the data that is trained on (paper: 351K of 702K).")


@dataclass
class VisualLanguageIntegrationArguments(VideoPandaTrainingArguments):
    """Stage 2: everything trains on all of the video-text data (paper, Table 6)."""

    stage: ClassVar[str] = "visual_language_integration"
    default_global_batch_size: ClassVar[int] = 2048

    learning_rate: float = argument(4e-5, "Peak learning rate (paper, Table 6).")
    warmup_steps: float = argument(0.01, "Steps, or below 1 their share (paper, Table 6).")


@dataclass
class InstructionTuningArguments(VideoPandaTrainingArguments):
    """Stage 3: everything trains on instructions (paper, Table 6)."""

    stage: ClassVar[str] = "instruction_tuning"
    default_global_batch_size: ClassVar[int] = 1024

    learning_rate: float = argument(2e-5, "Peak learning rate (paper, Table 6).")
    warmup_steps: float = argument(0.01, "Steps, or below 1 their share (paper, Table 6).")
