"""The image processor: still pictures to `pixel_values` and `image_grid_thw`, with the geometry of the videos.

Legend: S px a side of the canvas.
"""

import os

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from .canvas_video_panda import VideoPandaCanvasMixin, as_uint8_frames
from .sources_video_panda import describe_source, load_rgb_image


class VideoPandaImageProcessorKwargs(ImagesKwargs, total=False):
    """What the image processor takes beyond transformers' own options.

    Attributes:
        image_size: side of the canvas, px.
        patch_size: side of one patch, px.
        downsample_window: patches a side that become one token.
        allow_urls: whether http(s) addresses may be fetched; off unless asked for.
        allowed_dirs: a folder, or several, out of which no path may lead; anywhere unless given.
    """

    image_size: int | None
    patch_size: int | None
    downsample_window: int | None
    allow_urls: bool | None
    allowed_dirs: str | os.PathLike | list[str | os.PathLike] | None


class VideoPandaImageProcessor(VideoPandaCanvasMixin, BaseImageProcessor):
    """Reads pictures, pastes them on a square canvas and normalises them.

    Args:
        image_size: side of the canvas, px. Default 448.
        patch_size: side of one patch, px. Default 14.
        downsample_window: patches a side that become one token. Default 2.
        image_mean, image_std: of each channel, for pixels in [0, 1]. Default CLIP's.
        do_resize, do_rescale, do_normalize, do_convert_rgb: the steps; all on.

    Raises:
        ValueError: a value of the wrong kind, or sizes that do not fit each other.
    """

    _auto_class = "AutoImageProcessor"
    valid_kwargs = VideoPandaImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012 (transformers' contract)

    def preprocess(self, images, **kwargs) -> BatchFeature:
        """Turn pictures into the model's inputs.

        Args:
            images: a PIL image, path, `Path`, bytes, base64 text or (with `allow_urls`) URL; an array or tensor
                (H, W), (H, W, C) or (C, H, W), or a batch of these, uint8 or float in [0, 1]; or a (nested) list.
            **kwargs: see `VideoPandaImageProcessorKwargs` and transformers' `ImagesKwargs`; `return_tensors` is "pt" unless
                given.

        Returns:
            `pixel_values`: float32 (num_images, 3, S, S), or uint8 if neither rescaled nor normalised;
            `image_grid_thw`: int64 (num_images, 3), T = 1 and h, w in tokens.

        Raises:
            ValueError: an option or a picture that does not fit, or damaged data; says which and why.
            OSError: a file that is missing or not a regular file, or a URL that cannot be fetched.
        """
        self._check_kwargs(kwargs)
        given = {key: value for key, value in kwargs.items() if value is not None}
        canvas = self._canvas(given)
        pictures = self.fetch_images(
            images,
            allow_urls=given.get("allow_urls"),
            allowed_dirs=given.get("allowed_dirs"),
            input_data_format=given.get("input_data_format", self.input_data_format),
            do_convert_rgb=given.get("do_convert_rgb", self.do_convert_rgb),
        )
        pictures = [pictures] if isinstance(pictures, torch.Tensor) else _flatten(pictures)
        pixels = torch.empty(len(pictures), 3, canvas.image_size, canvas.image_size, dtype=canvas.dtype)
        grids = []
        for place, picture in enumerate(pictures):
            pasted, (h, w) = canvas.paste([picture[None]])
            canvas.fill(pixels[place : place + 1], pasted)
            grids.append((1, h, w))
        tensors = {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids, dtype=torch.int64)}
        if "device" in given:
            tensors = {key: tensor.to(given["device"]) for key, tensor in tensors.items()}
        return BatchFeature(data=tensors, tensor_type=kwargs.get("return_tensors") or "pt")

    # transformers' own fetches any URL it is given, and reads neither `Path` nor bytes.
    def fetch_images(
        self,
        image_url_or_urls,
        allow_urls: bool | None = None,
        input_data_format: str | None = None,
        do_convert_rgb: bool = True,
        allowed_dirs: str | os.PathLike | list[str | os.PathLike] | None = None,
    ):
        """Read one picture, or (nested) lists of them.

        Args:
            image_url_or_urls: as `images` of the call.
            allow_urls: whether URLs may be fetched; the processor's own setting unless given.
            input_data_format: "channels_first" or "channels_last" for arrays whose shape does not tell.
            do_convert_rgb: turn grayscale, palette, CMYK and transparent pictures into RGB.
            allowed_dirs: folders out of which no path may lead; the processor's own setting unless given.

        Returns:
            A uint8 tensor (3, H, W), or lists of them nested alike; a batch array gives a list.

        Raises:
            ValueError, OSError: as `preprocess`.
        """
        allow_urls = bool(self.allow_urls if allow_urls is None else allow_urls)
        allowed_dirs = self.allowed_dirs if allowed_dirs is None else allowed_dirs
        images = image_url_or_urls
        if isinstance(images, (list, tuple)):
            if not images:
                raise ValueError("`images` holds an empty list; expected at least one picture")
            options = (allow_urls, input_data_format, do_convert_rgb, allowed_dirs)
            return [self.fetch_images(image, *options) for image in images]
        if isinstance(images, (Image.Image, str, os.PathLike, bytes, bytearray, memoryview)):
            access = {"allow_urls": allow_urls, "allowed_dirs": allowed_dirs}
            return load_rgb_image(images, convert_rgb=do_convert_rgb, **access)
        num_dimensions = getattr(images, "ndim", None)
        if num_dimensions not in (2, 3, 4):
            shape = f" of shape {tuple(images.shape)}" if num_dimensions is not None else ""
            raise ValueError(
                "`images` must be PIL images, paths, bytes, base64 text, URLs, or arrays of 2 to 4 dimensions; got "
                f"{describe_source(type(images).__name__)}{shape}"
            )
        batch = {2: lambda: images[None, :, :, None], 3: lambda: images[None], 4: lambda: images}[num_dimensions]()
        channels = "channels_last" if num_dimensions == 2 else input_data_format
        frames = as_uint8_frames(batch, "images", channels, do_convert_rgb)
        return list(frames) if num_dimensions == 4 else frames[0]


def _flatten(pictures) -> list[torch.Tensor]:
    if isinstance(pictures, torch.Tensor):
        return [pictures]
    return [picture for item in pictures for picture in _flatten(item)]


def count_images_per_prompt(images) -> list[int] | None:
    """How many pictures each prompt has, if they are given in one list for each."""
    if not isinstance(images, (list, tuple)) or not images:
        return None
    if not all(isinstance(own, (list, tuple)) for own in images):
        return None
    return [count_images(own) for own in images]


def count_images(images) -> int:
    """How many pictures `VideoPandaImageProcessor` will make of these."""
    if isinstance(images, (list, tuple)):
        return sum(map(count_images, images))
    return len(images) if getattr(images, "ndim", None) == 4 else 1
