"""The teachers of the distillation (paper, Table 10): frozen vision encoders, from frames to grids of features.

All have one interface, `Teacher`; `load_teacher` finds the right one. None is ever trained, and none is saved with a model.

Shape suffixes: V videos, T frames, S px a side of the teacher's canvas, P patches a side, (h, w) the valid cells, W width.
"""

import errno
import hashlib
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    VideoMAEConfig,
    VideoMAEModel,
)
from transformers.utils import logging as transformers_logging

from ..modeling_video_panda.checkpoint_video_panda import check_weight_files
from ..processing.canvas_video_panda import CLIP_MEAN, CLIP_STD
from ..processing.geometry_video_panda import canvas_offset
from ..processing.video_processing_video_panda import VideoPandaVideoProcessor
from .languagebind import MODEL_TYPE as LANGUAGEBIND_MODEL_TYPE
from .languagebind import LanguageBindVideoConfig, LanguageBindVideoModel

# The names a training configuration may use, and what is loaded unless it says otherwise. The classes are at the end.
DEFAULT_SOURCES = {
    "languagebind": "LanguageBind/LanguageBind_Video_merge",
    "clip": "openai/clip-vit-large-patch14",
    "dinov2": "facebook/dinov2-large",
    "internvideo": "MCG-NJU/videomae-large",
}
DEFAULT_LAYER = -2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# More frames go through the encoder in several passes: its memory must not grow with the batch.
FRAMES_PER_PASS = 256
_HASHED_BYTES = 64 * 1024**2


class Teacher(nn.Module):
    """A frozen encoder: frames in, one grid of features a frame out.

    The subclasses say which checkpoints they take and how their encoder is called.

    Attributes:
        image_size: S, px a side of the canvas on which frames are drawn.
        patch_size: px a side of one patch.
        side: P = image_size / patch_size, features a side of the canvas.
        width: W, numbers of one feature.
        image_mean, image_std: of each channel, for pixels in [0, 1].
        max_num_frames: the most frames a video may have; None for any number.
        fingerprint: names everything that decides the features, the values of the weights included; a cache of them is
            valid for this text only. It does not depend on where the weights were loaded from.
    """

    kind: str
    model_types: tuple[str, ...]
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD
    default_image_size: int | None = None  # None: the checkpoint's own
    num_extra_tokens = 1  # the class token, in front of the patches
    max_num_frames: int | None = None

    def __init__(self, encoder: PreTrainedModel, layer: int, image_size: int):
        super().__init__()
        self.encoder = encoder
        self.layer = layer
        self.width = encoder.config.hidden_size
        self.patch_size = _one_side("patch_size", encoder.config.patch_size)
        self.image_size = image_size
        if image_size < self.patch_size or image_size % self.patch_size:
            raise ValueError(f"`image_size` must be a multiple of the patch of {self.patch_size} px, got {image_size}")
        self.side = image_size // self.patch_size
        self._keep_layers(layer)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def make_config(cls, fields: dict, temporal_attention: bool) -> PreTrainedConfig:
        """The encoder's configuration, from the content of `config.json`."""
        raise NotImplementedError

    @classmethod
    def model_class(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """The class of transformers that reads the weights."""
        raise NotImplementedError

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Hidden states of videos of equally many frames.

        Args:
            pixel_values: (V, T, 3, S, S), on the encoder's device and in its dtype.

        Returns:
            (V, T, num_extra_tokens + P * P, W).
        """
        states = self.encoder(pixel_values.flatten(0, 1)).last_hidden_state
        return states.unflatten(0, pixel_values.shape[:2])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode, whatever the model around it is told."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, num_frames: list[int] | None = None) -> torch.Tensor:
        """The features of every cell of the canvas, background included.

        Args:
            pixel_values: (V, T, 3, S, S), drawn by `video_processor()`; shorter videos are padded at the end.
            num_frames: the true number of frames of each video; all T unless given. What pads a video is never seen by
                its other frames.

        Returns:
            (V, T, P, P, W) in the teacher's own dtype; zeros where a video is padded.

        Raises:
            ValueError: another shape, or more frames than the teacher takes.
        """
        num_frames = self._check_input(pixel_values, num_frames)
        num_videos, num_places = pixel_values.shape[:2]
        features = torch.zeros(
            (num_videos, num_places, self.side, self.side, self.width), dtype=self.dtype, device=self.device
        )
        # Autocast would compute in its dtype instead of the teacher's.
        with torch.autocast(self.device.type, enabled=False):
            for length in sorted(set(num_frames)):
                places = [place for place, count in enumerate(num_frames) if count == length]
                at_once = max(1, FRAMES_PER_PASS // length)
                for start in range(0, len(places), at_once):
                    chosen = places[start : start + at_once]
                    pixels_VTCSS = pixel_values[chosen, :length].to(self.device, self.dtype)
                    patches_VTNW = self.encode(pixels_VTCSS)[:, :, self.num_extra_tokens :]
                    features[chosen, :length] = patches_VTNW.unflatten(2, (self.side, self.side))
        return features

    def video_processor(self, **options) -> VideoPandaVideoProcessor:
        """The student's geometry, drawn on the teacher's canvas: a token of its grid is a patch of the teacher.

        Args:
            **options: further options of the processor, as `num_frames`.
        """
        return VideoPandaVideoProcessor(
            image_size=self.image_size,
            patch_size=self.patch_size,
            downsample_window=1,
            image_mean=self.image_mean,
            image_std=self.image_std,
            **options,
        )

    @cached_property
    def fingerprint(self) -> str:
        """What the features depend on, as JSON text. Reads all weights at its first use.

        It holds a digest of the loaded, frozen weights: the same for a folder that was moved, not for one that was changed.
        """
        content = {
            "kind": self.kind,
            "weights": _digest_of(self.encoder),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layer": self.layer,
            "image_size": self.image_size,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "config": self._config_of_fingerprint(),
        }
        return json.dumps(content, sort_keys=True)

    def _config_of_fingerprint(self) -> dict:
        """What of the configuration decides the features beside the weights."""
        config = self.encoder.config
        names = ("num_attention_heads", "hidden_act", "layer_norm_eps", "add_time_attn", "num_frames")
        return {name: value for name, value in config.to_dict().items() if name in names}

    def _layers(self) -> nn.ModuleList:
        """The encoder's layers; transformers calls the list by one of two names."""
        encoder = self.encoder.encoder
        return encoder.layers if "layers" in encoder._modules else encoder.layer

    def _keep_layers(self, layer: int) -> None:
        """Drop what comes after hidden state `layer` (0: the embeddings): it is neither computed nor held in memory."""
        del self._layers()[layer:]

    def _check_input(self, pixel_values: torch.Tensor, num_frames: list[int] | None) -> list[int]:
        expected = (3, self.image_size, self.image_size)
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[2:]) != expected or not pixel_values.shape[1]:
            raise ValueError(
                f"The {self.kind} teacher expects frames (V, T, {', '.join(map(str, expected))}), drawn by its own "
                f"video_processor(), got {tuple(pixel_values.shape)}"
            )
        num_videos, num_places = pixel_values.shape[:2]
        counts = [num_places] * num_videos if num_frames is None else [int(count) for count in num_frames]
        if len(counts) != num_videos or not all(1 <= count <= num_places for count in counts):
            raise ValueError(
                f"`num_frames` must hold a number from 1 to {num_places} for each of {num_videos} videos, got {counts}"
            )
        if self.max_num_frames is not None and max(counts, default=0) > self.max_num_frames:
            raise ValueError(
                f"The {self.kind} teacher takes at most {self.max_num_frames} frames (`num_frames` of its config.json), "
                f"got a video of {max(counts)}; take fewer frames, or another teacher"
            )
        return counts


class LanguageBindTeacher(Teacher):
    """LanguageBind's video encoder, the paper's own choice; `temporal_attention=False` is the ablation without."""

    kind = "languagebind"
    model_types = (LANGUAGEBIND_MODEL_TYPE,)
    image_mean, image_std = CLIP_MEAN, CLIP_STD

    def __init__(self, encoder: PreTrainedModel, layer: int, image_size: int):
        super().__init__(encoder, layer, image_size)
        if encoder.config.add_time_attn:
            self.max_num_frames = encoder.config.num_frames

    @classmethod
    def make_config(cls, fields: dict, temporal_attention: bool) -> PreTrainedConfig:
        config = LanguageBindVideoConfig.from_checkpoint(fields)
        if temporal_attention and not config.add_time_attn:
            raise ValueError(
                "the checkpoint has no temporal attention (`vision_config.add_time_attn` is not true in its config.json); "
                "expected one that has, or temporal_attention=False"
            )
        config.add_time_attn = temporal_attention
        return config

    @classmethod
    def model_class(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        return LanguageBindVideoModel

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values, interpolate_pos_encoding=True).last_hidden_state


class CLIPTeacher(Teacher):
    """CLIP's vision tower, frame by frame."""

    kind = "clip"
    model_types = ("clip", "clip_vision_model")
    image_mean, image_std = CLIP_MEAN, CLIP_STD

    @classmethod
    def make_config(cls, fields: dict, temporal_attention: bool) -> PreTrainedConfig:
        return CLIPVisionConfig.from_dict(fields.get("vision_config", {}) if fields["model_type"] == "clip" else fields)

    @classmethod
    def model_class(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        return CLIPVisionModel

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.encoder(pixel_values.flatten(0, 1), interpolate_pos_encoding=True).last_hidden_state
        return states.unflatten(0, pixel_values.shape[:2])


class Dinov2Teacher(Teacher):
    """DINOv2, with or without registers, frame by frame.

    Its checkpoints are of 518 px; on the canvas of 224 px the position embeddings are interpolated, as in its own use.
    """

    kind = "dinov2"
    model_types = ("dinov2", "dinov2_with_registers")
    default_image_size = 224

    def __init__(self, encoder: PreTrainedModel, layer: int, image_size: int):
        super().__init__(encoder, layer, image_size)
        if encoder.config.model_type == "dinov2_with_registers":
            self.num_extra_tokens = 1 + encoder.config.num_register_tokens
        # A hidden state is taken before the final norm.
        encoder.layernorm = nn.Identity()

    @classmethod
    def make_config(cls, fields: dict, temporal_attention: bool) -> PreTrainedConfig:
        return (Dinov2Config if fields["model_type"] == "dinov2" else Dinov2WithRegistersConfig).from_dict(fields)

    @classmethod
    def model_class(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        return Dinov2Model if config.model_type == "dinov2" else Dinov2WithRegistersModel


class InternVideoTeacher(Teacher):
    """InternVideo's masked video encoder, as transformers has it: VideoMAE.

    InternVideo (arXiv 2212.03191) joins two encoders, a VideoMAE and a contrastive UniFormerV2; neither its weights nor
    UniFormerV2 are in transformers, and the later InternVideo2 comes as remote code that needs compiled kernels. So this
    is its VideoMAE branch, which any VideoMAE checkpoint of the Hub fits. A feature spans a tubelet of two frames and is
    given for both; a last frame without a partner is shown twice. Fewer frames than the checkpoint's use the first
    entries of its position table, which is a fixed function of time and place. Patches are of 16 px, so that its grid is
    of 14 × 14 at 224 px, not the student's 16 × 16.
    """

    kind = "internvideo"
    model_types = ("videomae",)
    num_extra_tokens = 0

    def __init__(self, encoder: PreTrainedModel, layer: int, image_size: int):
        super().__init__(encoder, layer, image_size)
        own_size = _one_side("image_size", encoder.config.image_size)
        if image_size != own_size:
            raise ValueError(f"The internvideo teacher's canvas is of {own_size} px, got `image_size` {image_size}")
        self.tubelet_size = encoder.config.tubelet_size
        self.max_num_frames = encoder.config.num_frames // self.tubelet_size * self.tubelet_size
        encoder.layernorm = None

    @classmethod
    def make_config(cls, fields: dict, temporal_attention: bool) -> PreTrainedConfig:
        return VideoMAEConfig.from_dict(fields)

    @classmethod
    def model_class(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        return VideoMAEModel

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        num_frames = pixel_values.shape[1]
        missing = -num_frames % self.tubelet_size
        if missing:
            pixel_values = torch.cat([pixel_values, pixel_values[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        # The embedding module itself would add the position table of all its frames.
        embeddings = self.encoder.embeddings
        patches_VNW = embeddings.patch_embeddings(pixel_values)
        positions_1NW = embeddings.position_embeddings[:, : patches_VNW.shape[1]].to(patches_VNW)
        states_VNW = self.encoder.encoder(patches_VNW + positions_1NW).last_hidden_state
        tubelets = states_VNW.unflatten(1, (-1, self.side * self.side))
        return tubelets.repeat_interleave(self.tubelet_size, dim=1)[:, :num_frames]


TEACHERS = (LanguageBindTeacher, CLIPTeacher, Dinov2Teacher, InternVideoTeacher)


def load_teacher(
    kind: str,
    source: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    layer: int | None = None,
    temporal_attention: bool = True,
    revision: str | None = None,
    image_size: int | None = None,
) -> Teacher:
    """Load a frozen teacher.

    Args:
        kind: "languagebind", "clip", "dinov2" or "internvideo".
        source: a folder or a Hub id; `DEFAULT_SOURCES[kind]` unless given.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: where it computes; the CPU unless given.
        layer: the hidden state that is the feature, in transformers' numbering: 0 the embeddings, -1 the last layer's
            output (before any final norm), -2, the default and the paper's choice, the one before.
        temporal_attention: LanguageBind's attention over time; the others take no notice of it.
        revision: branch, tag or commit of a Hub id.
        image_size: px a side of the canvas; the checkpoint's own unless given (DINOv2: 224). InternVideo has no other.

    Raises:
        ValueError: an unknown kind, layer or dtype, a checkpoint of another architecture, weights that are missing, left
            over or of another shape.
        OSError: there is no such source, it has no config.json or no weights, or a file was cut off.
    """
    by_kind = {teacher.kind: teacher for teacher in TEACHERS}
    if kind not in by_kind:
        raise ValueError(f"Unknown teacher {kind!r}; expected one of {', '.join(by_kind)}")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"Unknown teacher dtype {dtype!r}; expected one of auto, {', '.join(DTYPES)}")
    teacher_class = by_kind[kind]
    source = str(DEFAULT_SOURCES[kind] if source is None else source)
    try:
        config = teacher_class.make_config(_read_config(teacher_class, source, revision), temporal_attention)
        layer = _layer_index(DEFAULT_LAYER if layer is None else layer, config.num_hidden_layers)
        size = image_size or teacher_class.default_image_size or _one_side("image_size", config.image_size)
        encoder = _load_strictly(teacher_class.model_class(config), source, config, DTYPES.get(dtype, dtype), revision)
        teacher = teacher_class(encoder, layer, size)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"The {kind} teacher {source}: {error}") from error
    return teacher if device is None else teacher.to(device)


def valid_cells(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cut the picture out of the canvas, where the processor pasted it.

    Args:
        features: (T, P, P, W), one row of `Teacher.forward`.
        grid: (h, w), rows and columns of the picture on the teacher's canvas.

    Returns:
        (T, h, w, W), a view.

    Raises:
        ValueError: the picture is larger than the canvas, or the canvas is not a square.
    """
    if features.ndim != 4 or features.shape[1] != features.shape[2]:
        raise ValueError(f"expected features (T, P, P, W) of a square canvas, got shape {tuple(features.shape)}")
    h, w = (int(size) for size in grid)
    top, left = canvas_offset(h, w, features.shape[1])
    return features[:, top : top + h, left : left + w]


def _read_config(teacher_class: type[Teacher], source: str, revision: str | None) -> dict:
    """The content of `config.json`, if it describes what the teacher takes."""
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise FileNotFoundError(f"The {teacher_class.kind} teacher {source}: the folder holds no config.json")
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except OSError as error:
        raise OSError(f"The {teacher_class.kind} teacher {source}: {error}") from error
    if fields.get("model_type") not in teacher_class.model_types:
        expected = " or ".join(map(repr, teacher_class.model_types))
        raise ValueError(f"config.json says model_type {fields.get('model_type')!r}, expected {expected}")
    return fields


def _load_strictly(
    model_class: type[PreTrainedModel], source: str, config: PreTrainedConfig, dtype, revision: str | None
) -> PreTrainedModel:
    """`from_pretrained` that never fills up with random numbers what a checkpoint lacks."""
    if Path(source).is_dir():
        check_weight_files(Path(source))
    try:
        with _quiet_transformers():
            model, info = model_class.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                revision=revision,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                weights_only=True,
            )
    except (RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError, OSError) as error:
        # torch says EINVAL of an archive that was cut off; any other OSError says itself what is wrong.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"the weights cannot be read: {str(error).splitlines()[0]}") from error
    missing, unexpected = sorted(info["missing_keys"]), _left_over(model, info["unexpected_keys"])
    for verb, names in (("lacks", missing), ("holds, beyond its configuration,", unexpected)):
        if names:
            named = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"it {verb} {len(names)} weights of the encoder: {named}")
    if info["mismatched_keys"]:
        name, got, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{len(info['mismatched_keys'])} weights have another shape than config.json says: {name} is {tuple(got)}, "
            f"expected {tuple(expected)}"
        )
    return model


def _left_over(model: PreTrainedModel, names) -> list[str]:
    """Of the weights nothing was done with, those of the encoder itself: not of a text tower, a decoder or a head."""
    own = tuple(f"{name}." for name, _ in model.named_children())
    left_over = []
    for name in sorted(names):
        inner = name.removeprefix("vision_model.").removeprefix(f"{model.base_model_prefix}.")
        # Temporal weights are left out on purpose where temporal attention is off; position_ids are mere counters.
        is_known = inner.endswith("position_ids") or (isinstance(model, LanguageBindVideoModel) and "temporal" in inner)
        if inner.startswith(own) and not is_known:
            left_over.append(name)
    return left_over


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its report lists each weight of the text tower or decoder; what matters in it is raised as an error here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _layer_index(layer: int, num_layers: int) -> int:
    """The hidden state's number from 0, the embeddings, to `num_layers`."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not -num_layers - 1 <= layer <= num_layers:
        raise ValueError(
            f"`layer` must be a whole number from {-num_layers - 1} to {num_layers} (there are {num_layers} layers, and "
            f"hidden state 0 is the embeddings), got {layer!r}"
        )
    return layer if layer >= 0 else num_layers + 1 + layer


def _one_side(name: str, size) -> int:
    """A side in px of a configuration, which may also give height and width."""
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1 or not isinstance(next(iter(sides)), int):
        raise ValueError(f"config.json: `{name}` must be a square's side in px, got {size!r}")
    return sides.pop()


def _digest_of(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in tensor.detach().reshape(-1).view(torch.uint8).split(_HASHED_BYTES):
            digest.update(part.cpu().numpy().data)
    return digest.hexdigest()
