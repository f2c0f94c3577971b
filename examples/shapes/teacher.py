"""The tiny teacher. It stands where LanguageBind stands in the paper: it was trained before, on something else than questions.

It learns the renderer's own labels of each cell of 8 x 8 px (shape, colour, texture, size, light, direction and place of the
object in it, kind and drift of the background). What it gives to distillation is what it believes of each cell, and where the
cell lies.

Shape suffixes: V videos, T frames, S px a side, P cells a side, C channels, W attributes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from video_panda import Teacher, VideoPandaVideoProcessor, cell_labels, draw_scene

from .words import IMAGE_SIZE, PATCH_SIZE

SIDE = IMAGE_SIZE // PATCH_SIZE
# Number of values of each label; a cell without an object has none of the first six.
ATTRIBUTES = {
    "shape": 4,
    "colour": 6,
    "texture": 3,
    "size": 2,
    "is_bright": 2,
    "direction": 4,
    "background": 3,
    "drift": 4,
}
NUM_BINS = 4  # of each axis, for the place of the only object
NUM_ATTRIBUTES = sum(ATTRIBUTES.values()) + 2 * NUM_BINS
# In the cosine each attribute weighs the square of this: what is hard to see counts more than what is seen at once.
WEIGHTS = {"shape": 3.0, "direction": 3.0, "texture": 2.0, "background": 0.7, "drift": 1.0}
FEATURE_WIDTH = 56  # attributes, row and column; a multiple of the alignment head's eight heads


def attributes_of(seed: int) -> np.ndarray:
    """What the teacher is to believe of the clip of a seed: float32 (T, P, P, NUM_ATTRIBUTES), in [0, 1]."""
    scene = draw_scene(seed)
    labels = cell_labels(scene, PATCH_SIZE)
    cover_TPP1 = labels.cover[..., None]
    parts = []
    for name, num_values in ATTRIBUTES.items():
        first = 0 if name == "background" else 1
        is_value = getattr(labels, name)[..., None] == np.arange(first, first + num_values)
        parts.append(is_value if name in ("background", "drift") else is_value * cover_TPP1)
    place = np.zeros((*labels.cover.shape, 2 * NUM_BINS), np.float32)
    if scene.family == "single":
        for frame, centre in enumerate(scene.objects[0].centres):
            for axis, position in enumerate(centre):
                place[frame, ..., axis * NUM_BINS : (axis + 1) * NUM_BINS] = _near_bins(position)
    parts.append(place * (cover_TPP1 > 0))
    return np.concatenate(parts, axis=-1).astype(np.float32)


def _near_bins(position_px: int) -> np.ndarray:
    """How near a position is to the middle of each bin: 1 there, 0 from the next bin's middle on."""
    width = IMAGE_SIZE / NUM_BINS
    return np.clip(1 - np.abs(position_px / width - 0.5 - np.arange(NUM_BINS)), 0, 1)


class ShapesTeacherConfig(PreTrainedConfig):
    """Sizes of the network."""

    model_type = "shapes_teacher"

    hidden_size: int = FEATURE_WIDTH
    width: int = 48
    num_hidden_layers: int = 3
    image_size: int = IMAGE_SIZE
    patch_size: int = PATCH_SIZE


class TemporalBlock(nn.Module):
    """A convolution over pictures of which a quarter of the channels comes from the frame before, a quarter from the next."""

    def __init__(self, num_in: int, num_out: int, stride: int = 1):
        super().__init__()
        self.convolution = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(num_out)

    def forward(self, states_VTCPP: torch.Tensor) -> torch.Tensor:
        """(V, T, C, P, P) -> (V, T, C', P', P')."""
        before, after, own = states_VTCPP.split(
            [states_VTCPP.shape[2] // 4] * 2 + [states_VTCPP.shape[2] - states_VTCPP.shape[2] // 4 * 2], dim=2
        )
        before = F.pad(before[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        after = F.pad(after[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
        mixed = torch.cat((before, after, own), dim=2).flatten(0, 1)
        return F.relu(self.norm(self.convolution(mixed))).unflatten(0, states_VTCPP.shape[:2])


class ShapesTeacherModel(PreTrainedModel):
    """The network: frames (V, T, 3, S, S) to beliefs about each cell (V, T, P, P, FEATURE_WIDTH)."""

    config_class = ShapesTeacherConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ShapesTeacherConfig):
        super().__init__(config)
        self.stem = nn.Conv2d(3, config.width, 6, stride=4, padding=1)
        self.down = TemporalBlock(config.width, config.width, stride=2)
        self.layers = nn.ModuleList(TemporalBlock(config.width, config.width) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.width, NUM_ATTRIBUTES)
        weights = [WEIGHTS.get(name, 1.0) for name, num_values in ATTRIBUTES.items() for _ in range(num_values)]
        self.register_buffer("weights", torch.tensor(weights + [1.0] * 2 * NUM_BINS))
        self.post_init()

    def _init_weights(self, module):
        # PyTorch's own initialisation is the right one for convolutions before ReLU.
        pass

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        """`features`, and with labels (V, T, P, P, NUM_ATTRIBUTES) the `loss`."""
        states = F.relu(self.stem(pixel_values.flatten(0, 1))).unflatten(0, pixel_values.shape[:2])
        states = self.down(states)
        for layer in self.layers:
            states = states + layer(states)
        logits = self.head(states.permute(0, 1, 3, 4, 2))
        features = self._with_places(logits.sigmoid() * self.weights)
        if labels is None:
            return {"features": features}
        return {
            "loss": F.binary_cross_entropy_with_logits(logits, labels.float()) * NUM_ATTRIBUTES,
            "features": features,
        }

    def _with_places(self, beliefs_VTPPW: torch.Tensor) -> torch.Tensor:
        """With the row and column of each cell, as the features of a vision transformer hold its position embeddings.

        The language model has relative positions only: without these it is long in finding out where a token lies.
        """
        side = beliefs_VTPPW.shape[2]
        places = torch.eye(side, device=beliefs_VTPPW.device)
        rows_PPP, columns_PPP = places[:, None].expand(-1, side, -1), places[None].expand(side, -1, -1)
        own = torch.cat((rows_PPP, columns_PPP), dim=-1).expand(*beliefs_VTPPW.shape[:2], -1, -1, -1)
        features = torch.cat((beliefs_VTPPW, own), dim=-1)
        return F.pad(features, (0, FEATURE_WIDTH - features.shape[-1]))


class ShapesTeacher(Teacher):
    """The network as distillation asks a teacher."""

    kind = "shapes"
    num_extra_tokens = 0
    # It is trained on what the student sees.
    image_mean, image_std = VideoPandaVideoProcessor().image_mean, VideoPandaVideoProcessor().image_std

    def __init__(self, model: ShapesTeacherModel):
        super().__init__(model, model.config.num_hidden_layers, model.config.image_size)

    def _keep_layers(self, layer: int) -> None:
        """All of them: its features are what comes out at the end."""

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values)["features"].flatten(2, 3)


class LabelledClips(torch.utils.data.Dataset):
    """Clips with the renderer's labels.

    Args:
        memory: has the clips' pixels.
        samples: raw samples.
        seeds: of the samples' clips, in the same order.
    """

    def __init__(self, memory, samples: list[dict], seeds):
        self.memory, self.samples, self.seeds = memory, samples, seeds
        self.labels: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        pixels = self.memory([(index, self.samples[index])])["pixel_values_videos"][0]
        if index not in self.labels:
            self.labels[index] = torch.from_numpy(attributes_of(self.seeds[index])).half()
        return {"pixel_values": pixels, "labels": self.labels[index]}


def train_teacher(folder: Path, clips: LabelledClips, num_steps: int, seed: int, save_steps: int) -> ShapesTeacher:
    """Train it, or go on; then load it from its folder."""
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        arguments = TrainingArguments(
            str(folder / "run"),
            max_steps=num_steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            adam_beta2=0.98,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            logging_steps=50,
            save_steps=save_steps,
            save_total_limit=1,
            report_to="none",
            seed=seed,
            remove_unused_columns=False,
        )
        trainer = Trainer(ShapesTeacherModel(ShapesTeacherConfig()), arguments, train_dataset=clips)
        has_checkpoint = any(Path(arguments.output_dir).glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=has_checkpoint or None)
        trainer.model.save_pretrained(folder)
    return ShapesTeacher(ShapesTeacherModel.from_pretrained(folder).eval())
