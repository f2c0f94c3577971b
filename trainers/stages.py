"""The three stages of the paper (its section 4.1 and Table 6). They differ in their arguments only."""

from .arguments import (
    InitialAlignmentArguments,
    InstructionTuningArguments,
    VideoPandaTrainingArguments,
    VisualLanguageIntegrationArguments,
)
from .trainer import VideoPandaTrainer


class InitialAlignmentTrainer(VideoPandaTrainer):
    """Stage 1: STAB, projector and alignment head learn, on half of the video-text data; the language model is frozen."""

    arguments_class = InitialAlignmentArguments


class VisualLanguageIntegrationTrainer(VideoPandaTrainer):
    """Stage 2: everything learns, on all of the video-text data."""

    arguments_class = VisualLanguageIntegrationArguments


class InstructionTuningTrainer(VideoPandaTrainer):
    """Stage 3: everything learns, on instructions."""

    arguments_class = InstructionTuningArguments


STAGES: tuple[type[VideoPandaTrainer], ...] = (
    InitialAlignmentTrainer,
    VisualLanguageIntegrationTrainer,
    InstructionTuningTrainer,
)


def find_stage(name: str) -> type[VideoPandaTrainer]:
    """The trainer of a stage.

    Args:
        name: "initial_alignment", "visual_language_integration" or "instruction_tuning".

    Raises:
        ValueError: there is no such stage.
    """
    known: dict[str, type[VideoPandaTrainer]] = {trainer.arguments_class.stage: trainer for trainer in STAGES}
    if name not in known:
        raise ValueError(f"stage is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def arguments_of(name: str) -> type[VideoPandaTrainingArguments]:
    """The arguments class of a stage. Raises: as `find_stage`."""
    return find_stage(name).arguments_class
