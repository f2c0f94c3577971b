"""How a tiny Video-Panda is made from nothing: what the real recipe takes pretrained, in miniature, and the three stages.

1. language: a tiny Llama learns the words of ShapesQA, and to answer questions about a caption that it has just read. It
   stands where Vicuna stands: it never sees a picture.
2. teacher: a tiny network learns the renderer's labels. It stands where LanguageBind stands.
3. stages 1 to 3: the project's own trainers, with distillation from the teacher.

Each phase has a folder. A phase whose folder is complete is left alone; one that was interrupted goes on from its last
checkpoint.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig

from video_panda import (
    InitialAlignmentArguments,
    InitialAlignmentTrainer,
    InstructionTuningArguments,
    InstructionTuningTrainer,
    ShapesQA,
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaProcessor,
    VideoPandaTrainer,
    VideoPandaTrainingArguments,
    VisualLanguageIntegrationArguments,
    VisualLanguageIntegrationTrainer,
    render_clips,
    training_samples,
)

from .clips import ClipMemory
from .optimizer import optimizer_factory
from .patches import whitening_filters
from .phases import claim, is_complete, mark_complete
from .pointing import with_pointing
from .teacher import LabelledClips, ShapesTeacher, train_teacher
from .words import IMAGE_SIZE, PATCH_SIZE, make_processor

# Where in the train split the further clips and texts begin: far from the others.
FIRST_RELATION, FIRST_TEXT = 100_000_000, 200_000_000
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
        families: of scenes in them; "relation", the hardest, takes longer than a quickstart.
        num_relation_clips: further ones of two objects, one left of, right of, above or below the other.
        num_relation_texts: as many more descriptions of such scenes for the language model to read.
        text_width, num_text_layers, num_text_heads, text_ratio: the Llama; the last is its inner width over its width.
        visual_width: D of STAB.
        vision: further fields of `VideoPandaVisionConfig`, for ablations.
        language_steps, teacher_steps: optimizer steps of the two pretrainings.
        stage_steps: of stages 1, 2 and 3.
        learning_rate: of language model and stages.
        decay_share: of the steps of the language model's pretraining and of stage 3: in the last ones the rate falls to zero.
        batch_size: clips of a step.
        distillation_loss: "cosine", "mse" or "none".
        distillation_weights: of stages 1, 2 and 3. Much in the first: the language model can read, and its wish for words is
            so loud that STAB would not hear the teacher.
        distillation_layer_step: see `VideoPandaTrainingArguments`.
        data_fraction: of stage 1.
        save_steps: steps between two checkpoints.
    """

    seed: int = 0
    num_clips: int = 2600
    families: tuple[str, ...] = ("single", "count", "order")
    num_relation_clips: int = 0
    num_relation_texts: int = 0
    text_width: int = 128
    num_text_layers: int = 2
    num_text_heads: int = 4
    text_ratio: int = 2
    visual_width: int = 96
    vision: dict = field(default_factory=dict)
    language_steps: int = 100
    teacher_steps: int = 190
    stage_steps: tuple[int, int, int] = (50, 30, 580)
    learning_rate: float = 5e-3
    decay_share: float = 0.4
    batch_size: int = 16
    distillation_loss: str = "cosine"
    distillation_weights: tuple[float, float, float] = (20.0, 10.0, 10.0)
    distillation_layer_step: int = 4
    data_fraction: float = 0.5
    save_steps: int = 200


@dataclass
class Prepared:
    """What the stages start from; models of several recipes may share it.

    Attributes:
        folder: of the clips, the language model (`language`) and the teacher.
        samples: for training, of all clips.
        memory: the clips as the teacher sees them.
        teacher: trained.
    """

    folder: Path
    samples: list[dict]
    memory: ClipMemory
    teacher: ShapesTeacher

    @property
    def language(self) -> Path:
        """Folder of the tiny Llama."""
        return self.folder / "language"


def make_model(folder: Path, recipe: Recipe) -> Path:
    """All phases; returns the folder of the last stage's model.

    Args:
        folder: of this model; kept between calls.
        recipe: must be the same on every call.
    """
    claim(folder, recipe)
    return train_stages(folder, recipe, prepare(folder, recipe))


def prepare(folder: Path, recipe: Recipe) -> Prepared:
    """Clips, language model, teacher."""
    processor = make_processor()
    seeds = clip_seeds(folder, recipe)
    render_clips(folder, seeds, num_workers=2)
    texts = ShapesQA(folder, "train", recipe.num_relation_texts, first=FIRST_TEXT, families="relation")
    pretrain_language(folder / "language", recipe, processor, seeds + texts.seeds)
    samples = [with_pointing(sample, seed) for sample, seed in zip(training_samples(seeds), seeds, strict=True)]
    memory = ClipMemory(processor, folder)
    memory.fill(samples)
    clips = LabelledClips(memory, samples, seeds)
    teacher = train_teacher(folder / "teacher", clips, recipe.teacher_steps, recipe.seed, recipe.save_steps)
    return Prepared(folder, samples, memory, teacher)


def clip_seeds(folder: Path, recipe: Recipe) -> list[int]:
    """The seeds of the training clips."""
    sources = (
        ShapesQA(folder, "train", recipe.num_clips, families=recipe.families),
        ShapesQA(folder, "train", recipe.num_relation_clips, FIRST_RELATION, "relation"),
    )
    return [seed for source in sources for seed in source.seeds]


def train_stages(folder: Path, recipe: Recipe, prepared: Prepared) -> Path:
    """The three stages; returns the folder of the last."""
    config = make_config(recipe)
    processor = processor_of(config)
    memory = prepared.memory
    if processor.to_dict() != memory.processor.to_dict():
        memory = ClipMemory(processor, prepared.folder, seen_by_teacher=prepared.memory)
        memory.fill(prepared.samples)
    teacher = None if recipe.distillation_loss == "none" else prepared.teacher
    memory.teacher = teacher
    source = start_model(folder / "start", config, recipe.seed, prepared.language, memory)
    for number, name in enumerate(STAGES):
        source = train_stage(folder / name, number, source, recipe, memory, prepared.samples, teacher)
    return source


def make_config(recipe: Recipe) -> VideoPandaConfig:
    """The sizes of the model."""
    processor = make_processor()
    text = LlamaConfig(
        vocab_size=processor.video_token_id,
        hidden_size=recipe.text_width,
        intermediate_size=recipe.text_ratio * recipe.text_width,
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


def processor_of(config: VideoPandaConfig) -> VideoPandaProcessor:
    """The processor that a model of this configuration needs."""
    vision = config.vision_config
    return make_processor(
        vision.use_row_token, image_size=vision.canvas_size, downsample_window=vision.effective_window
    )


def pretrain_language(folder: Path, recipe: Recipe, processor, seeds: list[int]) -> None:
    """The tiny Llama reads captions and answers questions about them; no pictures."""
    if is_complete(folder):
        return
    torch.manual_seed(recipe.seed)
    model = VideoPandaForConditionalGeneration(make_config(recipe))
    nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    arguments = _arguments(
        VideoPandaTrainingArguments,
        folder / "run",
        recipe,
        max_steps=recipe.language_steps,
        learning_rate=recipe.learning_rate,
        global_batch_size=48,
        **_falling(recipe, recipe.language_steps),
        train_stab=False,
        train_projector=False,
        train_alignment_head=False,
        distillation_loss="none",
    )
    trainer = VideoPandaTrainer(
        model,
        arguments,
        ClipMemory(processor, None),
        train_dataset=reading_samples(seeds),
        processing_class=processor,
        optimizer_cls_and_kwargs=(optimizer_factory, {"lr": arguments.learning_rate}),
    )
    trainer.train("auto")
    trainer.save_model(str(folder))
    mark_complete(folder)


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


def start_model(folder: Path, config: VideoPandaConfig, seed: int, language: Path, memory: ClipMemory) -> Path:
    """The pretrained language model behind a STAB and projector that are fresh but for the patch embedding."""
    if not is_complete(folder):
        torch.manual_seed(seed)
        model = VideoPandaForConditionalGeneration(config)
        trained = VideoPandaForConditionalGeneration.from_pretrained(language)
        model.model.language_model.load_state_dict(trained.model.language_model.state_dict())
        embedding = model.model.stab.patch_embedding
        with torch.no_grad():
            embedding.weight.copy_(whitening_filters(memory.frames(), embedding.patch_size, len(embedding.weight)))
        model.generation_config.max_new_tokens = 32
        model.save_pretrained(folder)
        mark_complete(folder)
    return folder


def train_stage(
    folder: Path,
    number: int,
    source: Path,
    recipe: Recipe,
    memory: ClipMemory,
    samples: list[dict],
    teacher: ShapesTeacher | None,
) -> Path:
    """Stage `number` + 1, from the model of `source`; returns its folder."""
    if is_complete(folder):
        return folder
    trainer_class, arguments_class = list(STAGES.values())[number]
    arguments = _arguments(
        arguments_class,
        folder / "run",
        recipe,
        max_steps=recipe.stage_steps[number],
        learning_rate=recipe.learning_rate,
        global_batch_size=recipe.batch_size,
        distillation_loss=recipe.distillation_loss,
        distillation_weight=recipe.distillation_weights[number],
        distillation_layer_step=recipe.distillation_layer_step,
        data_fraction=recipe.data_fraction if number == 0 else 1.0,
        # What the first two end with is not looked at: they need no rest at the end.
        **(
            _falling(recipe, recipe.stage_steps[number])
            if number == 2
            else {"lr_scheduler_type": "constant_with_warmup"}
        ),
    )
    before = source / "run"
    trainer = trainer_class(
        VideoPandaForConditionalGeneration.from_pretrained(source),
        arguments,
        memory,
        train_dataset=samples,
        processing_class=memory.processor,
        optimizer_cls_and_kwargs=(optimizer_factory, {"lr": arguments.learning_rate}),
        teacher=teacher,
        alignment_head=None if teacher is None or number == 0 else before,
    )
    trainer.train("auto")
    trainer.save_model(str(folder))
    mark_complete(folder)
    return folder


def _falling(recipe: Recipe, num_steps: int) -> dict:
    """A schedule that stays high as long as it can: the plateaus of so small a model are left at high learning rates."""
    num_decay_steps = max(1, round(recipe.decay_share * num_steps))
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": num_decay_steps, "decay_type": "linear"},
    }


def _arguments(arguments_class, output_dir: Path, recipe: Recipe, **options) -> VideoPandaTrainingArguments:
    return arguments_class(
        output_dir=str(output_dir),
        per_device_train_batch_size=options["global_batch_size"],
        max_grad_norm=1.0,
        warmup_steps=20,
        train_sampling_strategy="random",
        logging_steps=50,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=recipe.seed,
        **options,
    )


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
