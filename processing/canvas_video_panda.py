"""From decoded pictures to the model's square canvas: shared by the video and the image processor.

Legend of the shape suffixes: T frames, C = 3 channels, H and W px of the source, S px a side of the canvas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError

from .geometry_video_panda import canvas_offset, token_grid
from .options_video_panda import check_names, plain_options

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# What transformers writes into the saved configuration beside the options, and hands to the constructor.
_KEYS_OF_CONFIGS = frozenset(
    {"auto_map", "processor_class", "image_processor_type", "video_processor_type", "feature_extractor_type"}
    | {"model_input_names", "transformers_version"}
)

_OPTIONS_OF_THE_MACHINE = frozenset({"allow_urls", "allowed_dirs", "isolate"})


@dataclass(frozen=True)
class VideoPandaCanvas:
    """The square on which a picture is pasted, and how its pixels are normalised.

    Attributes:
        image_size: S, px a side.
        patch_size: px a side of one patch of the patch embedding.
        downsample_window: patches a side that become one token.
        image_mean, image_std: per channel, for pixels in [0, 1].
        rescale_factor: what a uint8 pixel is multiplied by before the mean is taken off.
        do_resize, do_rescale, do_normalize: which steps to do; without resizing, pictures must already have the size
            they would get.
    """

    image_size: int
    patch_size: int
    downsample_window: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float = 1 / 255
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    def __post_init__(self):
        for name in ("image_size", "patch_size", "downsample_window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
        if self.image_size % self.token_px:
            raise ValueError(
                f"`image_size` must be a multiple of patch_size * downsample_window = {self.token_px} px, "
                f"got {self.image_size}"
            )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3:
                raise ValueError(f"`{name}` must be three numbers, one a channel, got {value!r}")
        if not all(0 <= mean <= 1 for mean in self.image_mean) or not all(std > 0 for std in self.image_std):
            raise ValueError(
                f"`image_mean` must lie in [0, 1] and `image_std` above 0, got {self.image_mean} and {self.image_std}"
            )
        if self.do_normalize and not self.do_rescale:
            raise ValueError("`do_normalize` needs `do_rescale`: mean and std are those of pixels in [0, 1]")

    @property
    def token_px(self) -> int:
        """Px a side of one token."""
        return self.patch_size * self.downsample_window

    @property
    def tokens_per_side(self) -> int:
        """G, tokens a side of the canvas."""
        return self.image_size // self.token_px

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour around the picture: floor(255 * mean), as the release."""
        return tuple(int(255 * mean) for mean in self.image_mean)

    def paste(self, pictures: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[int, int]]:
        """Resize the frames of one video and paste them on the canvas.

        Args:
            pictures: uint8 tensors (T_i, 3, H_i, W_i) in order; the first frame's size decides the geometry of all.

        Returns:
            (canvases, (h, w)): uint8 (sum of T_i, 3, S, S), and the token rows and columns of the picture.

        Raises:
            ValueError: `do_resize` is off and a picture does not have the size it would get.
        """
        h, w = token_grid(pictures[0].shape[-1], pictures[0].shape[-2], self.tokens_per_side)
        size_px = (h * self.token_px, w * self.token_px)
        top, left = (self.token_px * offset for offset in canvas_offset(h, w, self.tokens_per_side))
        num_frames = sum(len(picture) for picture in pictures)
        canvases_TCSS = torch.empty(num_frames, 3, self.image_size, self.image_size, dtype=torch.uint8)
        canvases_TCSS[:] = torch.tensor(self.background, dtype=torch.uint8)[:, None, None]
        start = 0
        for frames_TCHW in pictures:
            place = canvases_TCSS[start : start + len(frames_TCHW), :, top : top + size_px[0], left : left + size_px[1]]
            place.copy_(self._resize(frames_TCHW, size_px))
            start += len(frames_TCHW)
        return canvases_TCSS, (h, w)

    def _resize(self, frames_TCHW: torch.Tensor, size_px: tuple[int, int]) -> torch.Tensor:
        if tuple(frames_TCHW.shape[-2:]) == size_px:
            return frames_TCHW
        if not self.do_resize:
            raise ValueError(
                f"do_resize is off and a picture is {tuple(frames_TCHW.shape[-2:])} px (height, width); "
                f"expected {size_px}"
            )
        # Decoded frames are channels-last in memory, where torch's uint8 kernel is several times faster.
        frames_TCHW = frames_TCHW.contiguous(memory_format=torch.channels_last)
        return F.interpolate(frames_TCHW, size=size_px, mode="bicubic", antialias=True, align_corners=False)

    @property
    def dtype(self) -> torch.dtype:
        """What `fill` writes: float32, or uint8 if nothing is to be rescaled."""
        return torch.float32 if self.do_rescale else torch.uint8

    def fill(self, output_TCSS: torch.Tensor, canvases_TCSS: torch.Tensor) -> None:
        """Write normalised canvases into a slice of the batch, in place: the only float copy there is.

        Args:
            output_TCSS: where to write, of `dtype`.
            canvases_TCSS: uint8 (T, 3, S, S).
        """
        output_TCSS.copy_(canvases_TCSS)
        if not self.do_rescale:
            return
        output_TCSS.mul_(self.rescale_factor)
        if self.do_normalize:
            output_TCSS.sub_(output_TCSS.new_tensor(self.image_mean)[:, None, None])
            output_TCSS.div_(output_TCSS.new_tensor(self.image_std)[:, None, None])


class VideoPandaCanvasMixin:
    """What the video and the image processor share: the canvas' options, their defaults and their validation.

    Stands before a processor base class of transformers, whose `valid_kwargs` name the options there are.
    """

    image_size = 448
    patch_size = 14
    downsample_window = 2
    image_mean = CLIP_MEAN
    image_std = CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    allow_urls = False
    allowed_dirs = None

    per_call_kwargs = ("return_tensors",)

    def __init__(self, **kwargs):
        options = {key: value for key, value in kwargs.items() if key not in _KEYS_OF_CONFIGS and key[0] != "_"}
        check_names(options, self.valid_kwargs.__annotations__, type(self).__name__)
        for key in self.per_call_kwargs:
            if options.get(key) is not None:
                raise ValueError(
                    f"`{key}` belongs in a call and not in the {type(self).__name__}, got {options[key]!r:.80}"
                )
        options = plain_options(options)
        self._check_kwargs(options)
        kwargs.update(options)
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self._canvas({})

    @classmethod
    def from_dict(cls, processor_dict: dict, **kwargs):
        """As in transformers; a checkpoint has no say in what may be opened on the machine that loads it."""
        own = {key: value for key, value in processor_dict.items() if key not in _OPTIONS_OF_THE_MACHINE}
        return super().from_dict(own, **kwargs)

    def to_dict(self) -> dict:
        """As in transformers, without what is of this machine alone."""
        return {key: value for key, value in super().to_dict().items() if key not in _OPTIONS_OF_THE_MACHINE}

    @property
    def tokens_per_side(self) -> int:
        """G, tokens a side of the canvas."""
        return self._canvas({}).tokens_per_side

    def token_grid(self, height_px: int, width_px: int, **kwargs) -> tuple[int, int]:
        """(h, w) in tokens of a picture of that size; `kwargs`: options as of a call, such as `image_size`."""
        given = {key: value for key, value in kwargs.items() if value is not None}
        return token_grid(width_px, height_px, self._canvas(given).tokens_per_side)

    def _check_kwargs(self, kwargs: dict) -> None:
        """Refuse options that are unknown, of the wrong type, or without a meaning here."""
        name = type(self).__name__
        # `video_metadata` is checked where it is paired with the videos; there None may stand for "unknown".
        checked = {key: value for key, value in kwargs.items() if value is not None and key != "video_metadata"}
        try:
            validate_typed_dict(self.valid_kwargs, checked)
        except (StrictDataclassError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
        for key in ("size", "crop_size", "do_center_crop", "do_pad"):
            if checked.get(key):
                raise ValueError(
                    f"`{key}` is not an option of {name}, got {checked[key]!r}; the canvas is a square of `image_size` "
                    "px, and pictures are neither cropped nor padded otherwise"
                )

    def _canvas(self, given: dict) -> VideoPandaCanvas:
        """The canvas of one call: its options over the processor's own."""
        names = ("image_size", "patch_size", "downsample_window", "rescale_factor")
        steps = ("do_resize", "do_rescale", "do_normalize")
        chosen = {name: given.get(name, getattr(self, name)) for name in names + steps}
        for name in ("image_mean", "image_std"):
            chosen[name] = as_channel_triplet(name, given.get(name, getattr(self, name)))
        return VideoPandaCanvas(**chosen)


def as_channel_triplet(name: str, value) -> tuple[float, float, float]:
    """A mean or standard deviation as three floats; a single number goes for all channels."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (float(value),) * 3
    try:
        triplet = tuple(float(number) for number in value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be three numbers, one a channel, got {value!r}") from None
    if len(triplet) != 3:
        raise ValueError(f"`{name}` must be three numbers, one a channel, got {value!r}")
    return triplet


def as_uint8_frames(array, name: str, input_data_format: str | None = None, convert_rgb: bool = True) -> torch.Tensor:
    """An array of pictures in the one form the canvas takes.

    Args:
        array: numpy array or tensor (T, H, W, C) or (T, C, H, W); whole numbers in 0 ... 255, or floats in [0, 1].
        name: how an error message calls it.
        input_data_format: "channels_first" or "channels_last" where the shape does not tell.
        convert_rgb: make three channels of one (gray) or four (the last, transparency, is dropped).

    Returns:
        uint8 tensor (T, 3, H, W); a view of the input where nothing had to change.

    Raises:
        ValueError: not four dimensions, no frames, unclear or wrong channels, or values out of range.
    """
    if isinstance(array, np.ndarray):
        # torch warns about memory it must not write to, so such an array is copied.
        frames = torch.from_numpy(np.ascontiguousarray(array) if array.flags.writeable else array.copy())
    else:
        frames = array.detach().cpu()
    if frames.ndim != 4:
        raise ValueError(f"{name}: expected 4 dimensions (T, H, W, C) or (T, C, H, W), got shape {tuple(frames.shape)}")
    if 0 in frames.shape:
        raise ValueError(f"{name}: there are no frames or no pixels in it, got shape {tuple(frames.shape)}")
    if not _channels_first(frames, name, input_data_format):
        frames = frames.permute(0, 3, 1, 2)
    frames = _as_uint8(frames, name)
    num_channels = frames.shape[1]
    if num_channels == 3:
        return frames
    if not convert_rgb or num_channels not in (1, 4):
        raise ValueError(f"{name}: expected 3 channels (or 1 or 4 with do_convert_rgb), got {num_channels}")
    return frames.expand(-1, 3, -1, -1) if num_channels == 1 else frames[:, :3]


def _channels_first(frames: torch.Tensor, name: str, input_data_format: str | None) -> bool:
    if input_data_format is not None:
        wanted = getattr(input_data_format, "value", input_data_format)
        if wanted not in ("channels_first", "channels_last"):
            raise ValueError(
                f"`input_data_format` must be 'channels_first' or 'channels_last', got {input_data_format!r}"
            )
        return wanted == "channels_first"
    first, last = frames.shape[1] in (1, 3, 4), frames.shape[3] in (1, 3, 4)
    if first == last:
        raise ValueError(
            f"{name}: cannot tell the channels in shape {tuple(frames.shape)}; expected 1, 3 or 4 of them as the "
            "second or the last dimension, or `input_data_format`"
        )
    return first


def _as_uint8(frames: torch.Tensor, name: str) -> torch.Tensor:
    if frames.dtype == torch.uint8:
        return frames
    if frames.dtype in (torch.bool, torch.uint16, torch.uint32, torch.uint64) or frames.is_complex():
        raise ValueError(f"{name}: expected whole numbers in 0 ... 255 or floats in [0, 1], got {frames.dtype}")
    lowest, highest = (float(value) for value in torch.aminmax(frames))
    limit = 1 if frames.is_floating_point() else 255
    if not (lowest >= 0 and highest <= limit):  # also catches NaN
        raise ValueError(
            f"{name}: {frames.dtype} values must lie in [0, {limit}], got {lowest:g} ... {highest:g}; "
            "pixels of 0 ... 255 belong in uint8"
        )
    if frames.is_floating_point():
        frames = frames.float().mul(255).round_()
    return frames.to(torch.uint8)
