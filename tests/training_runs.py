"""What training tests need: tiny clips with words about them, a tiny teacher, arguments, and a run of a stage."""

import json
from pathlib import Path

import av
import numpy as np
import torch
from tiny import tiny_config, tiny_model, tiny_processor
from transformers import CLIPVisionConfig, CLIPVisionModel

from video_panda.trainers.stages import find_stage
from video_panda.trainers.teachers import load_teacher

STAGE_NAMES = ("initial_alignment", "visual_language_integration", "instruction_tuning")
ANSWERS = (
    "A red ball rolls.",
    "It is red.",
    "The child did.",
    "over the green table",
    "A ball.",
    "red",
    "a table",
    "It rolls.",
)


def write_colour_clip(path: Path, colour: np.ndarray, size_px: tuple[int, int], num_frames: int = 8) -> None:
    """A clip (1 frame a second) of one colour, uint8 (3,), on which a white bar moves to the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = *size_px, "yuv420p"
        for index in range(num_frames):
            picture = np.broadcast_to(colour, (size_px[1], size_px[0], 3)).copy()
            left = index * size_px[0] // num_frames
            picture[:, left : left + 4] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_samples(folder: Path, num_clips: int = 8, size_px: tuple[int, int] = (64, 48)) -> Path:
    """`clips/*.mp4`, each of one colour, and `samples.json` in the Valley format; returns the JSON file."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(num_clips):
        colour = np.array([(37 * number) % 256, (91 * number + 60) % 256, 255 - (53 * number) % 256], dtype=np.uint8)
        write_colour_clip(folder / "clips" / f"{number}.mp4", colour, size_px)
        conversation = [
            {"from": "human", "value": "<video>\nWhat happens in this video?"},
            {"from": "gpt", "value": ANSWERS[number % len(ANSWERS)]},
        ]
        samples.append({"id": f"clip-{number}", "video": f"clips/{number}.mp4", "conversations": conversation})
    path = folder / "samples.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


def tiny_teacher(folder: Path):
    """A CLIP of width 32 on a 42 px canvas: 3 x 3 tokens, as the tiny student has."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=42,
        patch_size=14,
        projection_dim=16,
    )
    if not (folder / "config.json").exists():
        torch.manual_seed(5)
        CLIPVisionModel(config).save_pretrained(folder)
    return load_teacher("clip", str(folder))


def stage_arguments(stage: str, output_dir: Path, **options):
    """Arguments of a stage for tiny data: two micro-batches of two samples a step, every step logged."""
    defaults = {
        "per_device_train_batch_size": 2,
        "global_batch_size": 4,
        "data_fraction": 1.0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return find_stage(stage).arguments_class(output_dir=str(output_dir), **{**defaults, **options})


def make_trainer(stage: str, samples: Path, output_dir: Path, teacher=None, model=None, processor=None, **options):
    """The trainer of a stage over the samples of a file; without a teacher, there is no distillation."""
    processor = processor or tiny_processor()
    trainer_options = {
        key: options.pop(key)
        for key in ("alignment_head", "callbacks", "train_dataset", "eval_dataset")
        if key in options
    }
    if teacher is None:
        options.setdefault("distillation_loss", "none")
    args = stage_arguments(stage, output_dir, data_root=str(samples.parent), **options)
    return find_stage(stage)(
        model=model or tiny_model(tiny_config(processor.video_token_id)),
        args=args,
        processing_class=processor,
        teacher=teacher,
        **{"train_dataset": str(samples), **trainer_options},
    )


def losses_of(trainer, name: str = "loss") -> list[float]:
    """What a trainer logged, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class RememberedBatches:
    """A collator that makes each batch once: epochs over tiny data need not decode the clips again."""

    def __init__(self, collator):
        self.collator = collator
        self.batches: dict[tuple[int, ...], dict] = {}

    def __call__(self, indexed_samples: list) -> dict:
        key = tuple(index for index, _ in indexed_samples)
        if key not in self.batches:
            self.batches[key] = self.collator(indexed_samples)
        return dict(self.batches[key])


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_names(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are not bitwise what they were."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
