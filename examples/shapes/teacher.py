"""The tiny teacher. It stands where LanguageBind stands in the paper: it was trained before, on something else than questions.

It learns the renderer's own labels of each cell of 8 x 8 px (shape, colour, texture, size, light and direction of the object in
it, where it is and where it was two frames before, whether its light changes, whether it has just jumped, comes in or goes
out, how much of each quarter it covers, kind and drift of the background).
What it gives to distillation is what it believes of each cell, and where and when the cell is.

Shape suffixes: V videos, T frames, S px a side, P cells a side, C channels, W attributes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from video_panda import Teacher, VideoPandaVideoProcessor, cell_labels, draw_scene

from .optimizer import optimizer_factory
from .phases import is_complete, mark_complete
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
NUM_BINS = 8  # of each axis, for the place of the only object
# What happens to the object in a cell, with how often more the event counts that is there than one that is not: its light
# changes; it has jumped since the frame before; it comes in; it goes out.
EVENTS = {"flickers": 10.0, "has_jumped": 10.0, "comes": 4.0, "goes": 4.0}
NUM_QUARTERS = 4  # of a cell, how much an object covers of each: its outline
LAG = 2  # frames: the place of the only object is told as it is and as it was then
NUM_ATTRIBUTES = sum(ATTRIBUTES.values()) + 4 * NUM_BINS + len(EVENTS) + NUM_QUARTERS
# What is given for each cell of a token by itself, not as a mean over them: comes, goes, the quarters. Where in a token the
# edges lie, and how they move, is what shape and direction are made of.
NUM_FINE = 2 + NUM_QUARTERS
CELLS_PER_TOKEN = 2  # along a side
# In the cosine each attribute weighs the square of this: what is hard to see counts more than what is seen at once.
WEIGHTS = {"shape": 6.0, "direction": 5.0, "texture": 2.0, "background": 0.7}
EVENT_WEIGHTS = {"flickers": 3.0, "has_jumped": 3.0, "comes": 8.0, "goes": 8.0}
PAST_WEIGHT, QUARTER_WEIGHT = 3.0, 1.0
FEATURE_WIDTH = 112  # attributes, row, column and frame; a multiple of the alignment head's eight heads
WINDOW = 4  # frames of a clip that the network is trained on at once: more clips a second than with all eight


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
    place = np.zeros((*labels.cover.shape, 4 * NUM_BINS), np.float32)
    if scene.family == "single":
        bins_TB = np.stack([_near_bins(centre) for centre in scene.objects[0].centres])
        place[..., : 2 * NUM_BINS] = bins_TB[:, None, None]
        place[LAG:, ..., 2 * NUM_BINS :] = bins_TB[:-LAG, None, None]
    parts.append(place * (cover_TPP1 > 0))
    parts.append(_events(scene, labels.object, labels.cover))
    quarters_TQQ = cell_labels(scene, PATCH_SIZE // 2).cover
    parts.append(np.stack([quarters_TQQ[:, row::2, column::2] for row in (0, 1) for column in (0, 1)], axis=-1))
    return np.concatenate(parts, axis=-1).astype(np.float32)


def _events(scene, object_TPP: np.ndarray, cover_TPP: np.ndarray) -> np.ndarray:
    """(T, P, P, number of events)."""
    flickers = np.array([False] + [len(set(item.is_bright)) > 1 for item in scene.objects])
    events = np.zeros((*object_TPP.shape, len(EVENTS)), np.float32)
    events[..., 0] = flickers[object_TPP]
    if scene.family == "order":
        for number, item in enumerate(scene.objects, start=1):
            for frame in range(1, len(object_TPP)):
                has_jumped = item.centres[frame] != item.centres[frame - 1]
                events[frame, ..., 1] += has_jumped & (object_TPP[frame] == number)
    change_TPP = np.gradient(cover_TPP, axis=0)
    events[..., 2], events[..., 3] = np.clip(4 * change_TPP, 0, 1), np.clip(-4 * change_TPP, 0, 1)
    return events


def _near_bins(centre_px: tuple[int, int]) -> np.ndarray:
    """How near a place is to the middle of each bin of both axes: 1 there, 0 from the next bin's middle on."""
    width = IMAGE_SIZE / NUM_BINS
    return np.concatenate([np.clip(1 - np.abs(place / width - 0.5 - np.arange(NUM_BINS)), 0, 1) for place in centre_px])


class ShapesTeacherConfig(PreTrainedConfig):
    """Sizes of the network."""

    model_type = "shapes_teacher"

    hidden_size: int = FEATURE_WIDTH
    width: int = 64
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
        width = config.width
        self.stem = nn.Conv2d(3, width // 4, 4, stride=2, padding=1)
        self.down = nn.Sequential(
            TemporalBlock(width // 4, width // 2, stride=2), TemporalBlock(width // 2, width, stride=2)
        )
        self.layers = nn.ModuleList(TemporalBlock(width, width) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(width, NUM_ATTRIBUTES)
        weights = [WEIGHTS.get(name, 1.0) for name, num_values in ATTRIBUTES.items() for _ in range(num_values)]
        weights += (
            [1.0] * 2 * NUM_BINS
            + [PAST_WEIGHT] * 2 * NUM_BINS
            + [EVENT_WEIGHTS[name] for name in EVENTS]
            + [QUARTER_WEIGHT] * NUM_QUARTERS
        )
        self.register_buffer("weights", torch.tensor(weights))
        num_common = sum(ATTRIBUTES.values()) + 4 * NUM_BINS
        rarity = [1.0] * num_common + [*EVENTS.values()] + [1.0] * NUM_QUARTERS
        self.register_buffer("rarity", torch.tensor(rarity))
        self.post_init()

    def _init_weights(self, module):
        # PyTorch's own initialisation is the right one for convolutions before ReLU.
        pass

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        """`features`, and with labels (V, T, P, P, NUM_ATTRIBUTES) the `loss`."""
        frames = pixel_values.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        states = F.relu(self.stem(frames)).unflatten(0, pixel_values.shape[:2])
        states = self.down(states)
        for layer in self.layers:
            states = states + layer(states)
        logits = self.head(states.permute(0, 1, 3, 4, 2))
        features = _with_places(_cell_by_cell(logits.sigmoid() * self.weights))
        if labels is None:
            return {"features": features}
        return {"loss": self._loss(logits, labels.float()), "features": features}

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Every belief by itself, and for each attribute which of its values; shape, the hardest, counts thrice."""
        loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=self.rarity) * NUM_ATTRIBUTES
        start = 0
        for name, num_values in ATTRIBUTES.items():
            values = slice(start, start + num_values)
            of_cells = F.cross_entropy(
                logits[..., values].flatten(0, -2), labels[..., values].flatten(0, -2), reduction="sum"
            )
            loss = loss + (3 if name == "shape" else 1) * of_cells / labels[..., values].sum().clamp_min(1)
            start += num_values
        return loss


def _cell_by_cell(beliefs_VTPPW: torch.Tensor) -> torch.Tensor:
    """The fine ones last, one for each place that the cell may have in its token; zero at the places of others.

    A student with fewer tokens than cells sees means over a token's cells (`match_grids`): these stay apart in them.
    """
    coarse, fine = beliefs_VTPPW[..., :-NUM_FINE], beliefs_VTPPW[..., -NUM_FINE:]
    spread = fine.new_zeros(*fine.shape[:-1], CELLS_PER_TOKEN, CELLS_PER_TOKEN, NUM_FINE)
    for row in range(CELLS_PER_TOKEN):
        for column in range(CELLS_PER_TOKEN):
            cells = (slice(None), slice(None), slice(row, None, CELLS_PER_TOKEN), slice(column, None, CELLS_PER_TOKEN))
            spread[(*cells, row, column)] = fine[cells]
    return torch.cat((coarse, spread.flatten(-3)), dim=-1)


def _with_places(beliefs_VTPPW: torch.Tensor) -> torch.Tensor:
    """With the row, column and frame of each cell, as the features of a vision transformer hold position embeddings.

    The language model has relative positions only: without these it is long in finding out where a token lies.
    """
    own = []
    for axis in (2, 3, 1):
        size = beliefs_VTPPW.shape[axis]
        shape = [1] * 4
        shape[axis] = size
        places = torch.eye(size, device=beliefs_VTPPW.device).view(*shape, size)
        own.append(places.expand(*beliefs_VTPPW.shape[:4], size))
    features = torch.cat((beliefs_VTPPW, *own), dim=-1)
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
    """Clips with the renderer's labels, a window of `WINDOW` frames of each, another one every time.

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
        start = int(torch.randint(pixels.shape[0] - WINDOW + 1, ()))
        window = slice(start, start + WINDOW)
        return {"pixel_values": pixels[window], "labels": self.labels[index][window]}


def train_teacher(folder: Path, clips: LabelledClips, num_steps: int, seed: int, save_steps: int) -> ShapesTeacher:
    """Train it, or go on; then load it from its folder."""
    if not is_complete(folder):
        torch.manual_seed(seed)
        arguments = TrainingArguments(
            str(folder / "run"),
            max_steps=num_steps,
            per_device_train_batch_size=32,
            learning_rate=1.5e-2,
            warmup_steps=20,
            lr_scheduler_type="linear",
            logging_steps=50,
            save_steps=save_steps,
            save_total_limit=1,
            report_to="none",
            seed=seed,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            ShapesTeacherModel(ShapesTeacherConfig()),
            arguments,
            train_dataset=clips,
            optimizer_cls_and_kwargs=(optimizer_factory, {"lr": arguments.learning_rate}),
        )
        has_checkpoint = any(Path(arguments.output_dir).glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=has_checkpoint or None)
        trainer.model.save_pretrained(folder)
        mark_complete(folder)
    return ShapesTeacher(ShapesTeacherModel.from_pretrained(folder).eval())
