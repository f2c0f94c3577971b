"""How a tiny Video-Panda is made from nothing: what the real recipe takes pretrained, in miniature, and the three stages.

1. language: a tiny Llama learns the words of ShapesQA, and to answer questions about a caption that it has just read. It
   stands where Vicuna stands: it never sees a picture.
2. teacher: a tiny network learns the renderer's labels. It stands where LanguageBind stands.
3. stages 1 to 3: the project's own trainers, with distillation from the teacher.

Each phase has a folder. A phase whose folder is complete is left alone; one that was interrupted goes on from its last
checkpoint.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig

from video_panda import (
    InitialAlignmentArguments,
    InitialAlignmentTrainer,
    InstructionTuningArguments,
    InstructionTuningTrainer,
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaTrainer,
    VideoPandaTrainingArguments,
    VisualLanguageIntegrationArguments,
    VisualLanguageIntegrationTrainer,
    training_samples,
    write_split,
)

from .clips import ClipMemory
from .optimizer import optimizer_factory
from .teacher import LabelledClips, ShapesTeacher, train_teacher
from .words import IMAGE_SIZE, PATCH_SIZE, make_processor

STAGES = {
    "stage1": (InitialAlignmentTrainer, InitialAlignmentArguments),
    "stage2": (VisualLanguageIntegrationTrainer, VisualLanguageIntegrationArguments),
    "stage3": (InstructionTuningTrainer, InstructionTuningArguments),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        seed: of weights, order and of what the stages draw.
        num_clips: training clips that are rendered.
        text_width, num_text_layers, num_text_heads: the Llama.
        visual_width: D of STAB.
        vision: further fields of `VideoPandaVisionConfig`: the ablations.
        language_steps, teacher_steps: optimizer steps of the two pretrainings.
        stage_steps: of stages 1, 2 and 3.
        learning_rates: of the same.
        batch_size: clips of a step.
        distillation_loss: "cosine", "mse" or "none".
        distillation_weights: of stages 1, 2 and 3. Much in the first: the language model can read, and its wish for words is
            so loud that STAB would not hear the teacher.
        distillation_layer_step: see `VideoPandaTrainingArguments`.
        data_fraction: of stage 1.
        save_steps: steps between two checkpoints.
    """

    seed: int = 0
    num_clips: int = 6000
    text_width: int = 64
    num_text_layers: int = 3
    num_text_heads: int = 2
    visual_width: int = 96
    vision: dict = field(default_factory=dict)
    language_steps: int = 220
    teacher_steps: int = 300
    stage_steps: tuple[int, int, int] = (80, 100, 800)
    learning_rates: tuple[float, float, float] = (5e-3, 5e-3, 5e-3)
    batch_size: int = 16
    distillation_loss: str = "cosine"
    distillation_weights: tuple[float, float, float] = (20.0, 10.0, 10.0)
    distillation_layer_step: int = 4
    data_fraction: float = 0.5
    save_steps: int = 200


def make_model(folder: Path, recipe: Recipe, shared: Path | None = None) -> Path:
    """All phases; returns the folder of the last stage's model.

    Args:
        folder: of this model; kept between calls.
        recipe: must be the same on every call.
        shared: folder of clips, language model and teacher, which several models of other recipes may share.
    """
    shared = folder if shared is None else shared
    claim(folder, recipe)
    processor = make_processor()
    write_split(shared, "train", recipe.num_clips, num_workers=2)
    samples = json.loads((shared / "train.json").read_text())
    pretrain_language(shared / "language", recipe, processor)
    memory = ClipMemory(processor, shared)
    seeds = [int(sample["id"]) for sample in samples]
    teacher = train_teacher(
        shared / "teacher",
        LabelledClips(memory, samples, seeds),
        recipe.teacher_steps,
        recipe.seed,
        recipe.save_steps,
    )
    source = start_model(folder / "start", recipe, processor, shared / "language")
    memory.teacher = None if recipe.distillation_loss == "none" else teacher
    for number, name in enumerate(STAGES):
        source = train_stage(folder / name, name, number, source, recipe, processor, memory, samples, teacher)
    return source


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into its folder, or compare it with what is there.

    Raises:
        ValueError: the folder holds the work of another recipe.
    """
    path = folder / "recipe.json"
    own = json.loads(json.dumps(asdict(recipe)))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own, indent=2))
    found = json.loads(path.read_text())
    if found != own:
        names = [name for name in own if own[name] != found.get(name)]
        raise ValueError(f"{path} is of another recipe (it differs in {', '.join(names)}); choose another folder")


def make_config(recipe: Recipe, processor) -> VideoPandaConfig:
    """The sizes of the model."""
    text = LlamaConfig(
        vocab_size=processor.video_token_id,
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.num_text_layers,
        num_attention_heads=recipe.num_text_heads,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_size": recipe.visual_width,
        "num_attention_heads": 4,
        "gstra_dropout": 0.0,
        "fusion_dropout": 0.0,
        # With the usual 0.02 so narrow a block would give tokens near zero, and learn slowly.
        "initializer_range": 1.5 * recipe.visual_width**-0.5,
        **recipe.vision,
    }
    return VideoPandaConfig.from_text_config(text, vision_config=vision)


def pretrain_language(folder: Path, recipe: Recipe, processor) -> None:
    """The tiny Llama reads captions and answers questions about them; no pictures."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(recipe.seed)
    model = VideoPandaForConditionalGeneration(make_config(recipe, processor))
    nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    arguments = _arguments(
        VideoPandaTrainingArguments,
        folder / "run",
        recipe,
        max_steps=recipe.language_steps,
        learning_rate=5e-3,
        global_batch_size=48,
        train_stab=False,
        train_projector=False,
        train_alignment_head=False,
        distillation_loss="none",
    )
    trainer = VideoPandaTrainer(
        model,
        arguments,
        ClipMemory(processor, None),
        train_dataset=reading_samples(range(recipe.num_clips)),
        processing_class=processor,
        optimizer_cls_and_kwargs=(optimizer_factory, {"lr": arguments.learning_rate}),
    )
    trainer.train("auto")
    _keep(trainer, folder)


def reading_samples(seeds) -> list[dict]:
    """Conversations without a video: a description, then questions about it."""
    samples = []
    for described, asked in zip(training_samples(seeds, "captions"), training_samples(seeds, "questions"), strict=True):
        turns = [
            {**turn, "value": turn["value"].removeprefix("<video>\n")}
            for turn in described["conversations"] + asked["conversations"]
        ]
        samples.append({"id": described["id"], "conversations": turns})
    return samples


def start_model(folder: Path, recipe: Recipe, processor, language: Path) -> Path:
    """The pretrained language model behind a fresh STAB and projector."""
    if not (folder / "config.json").exists():
        torch.manual_seed(recipe.seed)
        model = VideoPandaForConditionalGeneration(make_config(recipe, processor))
        trained = VideoPandaForConditionalGeneration.from_pretrained(language)
        model.model.language_model.load_state_dict(trained.model.language_model.state_dict())
        model.generation_config.max_new_tokens = 32
        model.save_pretrained(folder)
    return folder


def train_stage(
    folder: Path,
    name: str,
    number: int,
    source: Path,
    recipe: Recipe,
    processor,
    memory: ClipMemory,
    samples: list[dict],
    teacher: ShapesTeacher,
) -> Path:
    """One stage, from the model of `source`; returns its folder."""
    if (folder / "config.json").exists():
        return folder
    trainer_class, arguments_class = STAGES[name]
    arguments = _arguments(
        arguments_class,
        folder / "run",
        recipe,
        max_steps=recipe.stage_steps[number],
        learning_rate=recipe.learning_rates[number],
        global_batch_size=recipe.batch_size,
        distillation_loss=recipe.distillation_loss,
        distillation_weight=recipe.distillation_weights[number],
        distillation_layer_step=recipe.distillation_layer_step,
        data_fraction=recipe.data_fraction if number == 0 else 1.0,
    )
    before = source / "run"
    trainer = trainer_class(
        VideoPandaForConditionalGeneration.from_pretrained(source),
        arguments,
        memory,
        train_dataset=samples,
        processing_class=processor,
        optimizer_cls_and_kwargs=(optimizer_factory, {"lr": arguments.learning_rate}),
        teacher=teacher,
        alignment_head=before if before.is_dir() and recipe.distillation_loss != "none" else None,
    )
    trainer.train("auto")
    _keep(trainer, folder)
    return folder


def _arguments(arguments_class, output_dir: Path, recipe: Recipe, **options) -> VideoPandaTrainingArguments:
    return arguments_class(
        output_dir=str(output_dir),
        per_device_train_batch_size=options["global_batch_size"],
        max_grad_norm=1.0,
        warmup_steps=20,
        lr_scheduler_type="linear",
        train_sampling_strategy="random",
        logging_steps=50,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=recipe.seed,
        **options,
    )


def _keep(trainer: VideoPandaTrainer, folder: Path) -> None:
    """The model and its processor; the configuration comes last, by which a complete folder is known."""
    trainer.save_model(str(folder))


def scaled(recipe: Recipe, factor: float, **changes) -> Recipe:
    """The same recipe with all numbers of steps times a factor."""
    steps = tuple(max(1, round(number * factor)) for number in recipe.stage_steps)
    return replace(
        recipe,
        stage_steps=steps,
        language_steps=max(1, round(recipe.language_steps * factor)),
        teacher_steps=max(1, round(recipe.teacher_steps * factor)),
        **changes,
    )
