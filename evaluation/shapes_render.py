"""From a scene of ShapesQA to pixels, to an mp4 file, and to labels of each cell for a teacher.

Legend of the shape suffixes: T = 8 frames, H = W = 64 px, C = 3 channels, h = w = cells a side.
"""

import io
import os
from dataclasses import dataclass
from functools import cache

import av
import numpy as np

from .files import write_whole
from .shapes_scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    DRIFT_PX,
    NUM_FRAMES,
    SHAPES,
    SIDE_PX,
    SIZES,
    STEPS,
    TEXTURES,
    Background,
    Draws,
    Scene,
    SceneObject,
    draw_scene,
    extent_px,
    half_width_px,
)

# Raise it when the pixels of a seed change, so that no clip of another version is taken for one of this.
RENDERER_VERSION = 2
FPS = 1  # the model looks at one frame a second: it sees each of these

RGB = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 40),
    "purple": (205, 60, 215),
    "cyan": (45, 205, 215),
}
_DIM = 0.55
_DARK = 0.5  # of the dark parts of a texture
_STRIPE_PX, _CHECK_PX = 2, 3
_NOISE_PX = 2
_NOISE = 24  # at most, shades of grey
_WAVE = 20  # of each of two waves, shades of grey

# Every frame is coded by itself and with a fixed quantizer: a frame then holds no trace of the frames around it, and
# what one frame shows is all that it shows. One thread: the clips are small, and the bytes the same everywhere.
_CODEC = "libx264"
_CODEC_OPTIONS = {"preset": "ultrafast", "qp": "16", "g": "1"}
_MIN_COVER = 0.3  # the share of a cell's pixels from which on it belongs to an object


@dataclass(frozen=True)
class CellLabels:
    """What is in each cell of each frame; int64 (T, h, w) but for `cover`. 0 stands for "none".

    Attributes:
        object: 1 + the number of the object that covers most of the cell, if it covers enough of it.
        shape, colour, texture, size: 1 + the place of that object's word in the lists of `shapes_scenes`.
        is_bright: of that object: 1 dim, 2 in full light.
        direction: where that object moves, 1 + place in `DIRECTIONS`.
        background: place in `BACKGROUNDS`, also behind objects.
        drift: where the background drifts, 1 + place in `DIRECTIONS`.
        cover: float32, the share of the cell that is covered by objects.
    """

    object: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    texture: np.ndarray
    size: np.ndarray
    is_bright: np.ndarray
    direction: np.ndarray
    background: np.ndarray
    drift: np.ndarray
    cover: np.ndarray


# -------------------------------------------------------------------------------------------------------------- pixels


def render_scene(scene: Scene) -> np.ndarray:
    """The pixels of a scene.

    Args:
        scene: what to draw.

    Returns:
        uint8 (T, H, W, C), RGB.
    """
    frames_THWC = np.empty((NUM_FRAMES, SIDE_PX, SIDE_PX, 3), np.float32)
    frames_THWC[:] = _background(scene.background)[..., None]
    for item in scene.objects:
        cover, paint = _cover(item.shape, item.radius_px)[..., None], _paint(item)
        behind = 1 - cover
        coats = [paint * (cover * light) for light in (np.float32(_DIM), np.float32(1))]
        for frame_HWC, centre, is_bright in zip(frames_THWC, item.centres, item.is_bright):
            place = frame_HWC[_window(item, centre)]
            place *= behind
            place += coats[is_bright]
    return (frames_THWC + 0.5).astype(np.uint8)


def _window(item: SceneObject, centre: tuple[int, int]) -> tuple[slice, slice]:
    extent, (x, y) = item.extent_px, centre
    return slice(y - extent, y + extent + 1), slice(x - extent, x + extent + 1)


def _background(background: Background) -> np.ndarray:
    """Shades of grey, float32 (T, H, W) or (1, H, W) where nothing changes."""
    if background.kind == "noisy":
        num_blocks = SIDE_PX // _NOISE_PX
        noise = Draws(background.noise_seed, 2).bytes(num_blocks**2).reshape(1, num_blocks, num_blocks)
        noise = (noise.astype(np.float32) / 255 * 2 - 1) * _NOISE
        return background.grey + noise.repeat(_NOISE_PX, axis=1).repeat(_NOISE_PX, axis=2)
    if background.kind == "drifting":
        steps = STEPS[background.drift]
        along_x, along_y = (
            _waves(background.period_px, phase, DRIFT_PX * step) for phase, step in zip(background.phases_px, steps)
        )
        return background.grey + along_y[:, :, None] + along_x[:, None, :]
    return np.full((1, SIDE_PX, SIDE_PX), background.grey, np.float32)


@cache  # a few dozen at most
def _waves(period_px: int, phase_px: int, step_px: int) -> np.ndarray:
    """A wave along one axis in each frame, float32 (T, 64)."""
    shifts = phase_px + step_px * np.arange(NUM_FRAMES)
    places = (np.arange(SIDE_PX)[None] - shifts[:, None]) % period_px
    return (_WAVE * np.cos(2 * np.pi * np.arange(period_px) / period_px)).astype(np.float32)[places]


@cache
def _cover(shape: str, radius_px: int) -> np.ndarray:
    """The share of each pixel that a shape covers, float32, square with its centre in the middle."""
    extent, half = extent_px(shape, radius_px), half_width_px(shape, radius_px)
    x = np.arange(-extent, extent + 1, dtype=np.float64)[None]
    y = x.T
    if shape == "circle":
        distance = np.hypot(x, y) - half
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - half
    elif shape == "triangle":
        # The point at the top, the sides twice as steep as a diagonal.
        sides = (2 * np.abs(x) - (y + half)) / np.sqrt(5)
        distance = np.maximum(sides, y - half)
    else:
        bar = 0.38 * half
        upright = np.maximum(np.abs(x) - bar, np.abs(y) - half)
        lying = np.maximum(np.abs(x) - half, np.abs(y) - bar)
        distance = np.minimum(upright, lying)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


@cache
def _pattern(texture: str, extent: int) -> np.ndarray:
    """How bright each pixel of an object is, float32; fixed to the object, so that it moves with it."""
    place = np.arange(2 * extent + 1)
    stripes = (place // _STRIPE_PX) % 2
    checks = (place // _CHECK_PX) % 2
    is_dark = {
        "plain": np.zeros((len(place), len(place)), bool),
        "striped": np.broadcast_to(stripes[:, None] == 1, (len(place), len(place))),
        "checked": checks[:, None] != checks[None],
    }[texture]
    return np.where(is_dark, np.float32(_DARK), np.float32(1))


def _paint(item: SceneObject) -> np.ndarray:
    """The colours of an object's pixels in full light, float32 (side, side, C)."""
    return _pattern(item.texture, item.extent_px)[..., None] * np.array(RGB[item.colour], np.float32)


# --------------------------------------------------------------------------------------------------------------- files


def encode_clip(frames_THWC: np.ndarray) -> bytes:
    """An mp4 file (H.264) of the frames, one a second.

    Args:
        frames_THWC: uint8 (T, H, W, C), RGB; H and W even.

    Returns:
        The content of the file: the same for the same frames and the same encoder.
    """
    content = io.BytesIO()
    with av.open(content, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(_CODEC, rate=FPS, options=_CODEC_OPTIONS)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number, frame_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return content.getvalue()


def write_clip(seed: int, path: str | os.PathLike) -> None:
    """Render the clip of a seed into a file, which appears whole or not at all.

    Args:
        seed: of the scene.
        path: where to; its folder must exist. A file that is there is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(path, encode_clip(render_scene(draw_scene(seed))), is_synced=False)  # an empty one is rendered again


# -------------------------------------------------------------------------------------------------------------- labels


def cell_labels(scene: Scene, cell_px: int = 8) -> CellLabels:
    """What a teacher of the cells is trained on.

    Args:
        scene: a scene.
        cell_px: side of a cell, px; must divide 64. The model's patch, or its token.

    Returns:
        The labels of every cell in every frame.

    Raises:
        ValueError: the cells do not fill the picture.
    """
    if isinstance(cell_px, bool) or not isinstance(cell_px, int) or cell_px < 1 or SIDE_PX % cell_px:
        raise ValueError(f"`cell_px` must divide the side of {SIDE_PX} px, got {cell_px!r}")
    num_cells = SIDE_PX // cell_px
    # Entry 0 is the background: the share that no object covers.
    covers_NTHW = np.zeros((len(scene.objects) + 1, NUM_FRAMES, SIDE_PX, SIDE_PX), np.float32)
    covers_NTHW[0] = 1
    for number, item in enumerate(scene.objects, start=1):
        cover = _cover(item.shape, item.radius_px)
        for frame, centre in enumerate(item.centres):
            place = (slice(None), frame, *_window(item, centre))
            covers_NTHW[place] *= 1 - cover  # it hides what lies behind it
            covers_NTHW[number][place[1:]] += cover
    covers_NThw = covers_NTHW.reshape(-1, NUM_FRAMES, num_cells, cell_px, num_cells, cell_px).mean(axis=(3, 5))
    shares_NThw = covers_NThw[1:]
    # Large cells may hold no more than a part of a small object: its fullest one is its own all the same.
    needed_NT11 = np.minimum(_MIN_COVER, shares_NThw.max(axis=(2, 3), keepdims=True))
    owned_NThw = np.where(shares_NThw >= needed_NT11, shares_NThw, 0)
    object_Thw = np.where(owned_NThw.max(axis=0) > 0, 1 + owned_NThw.argmax(axis=0), 0)

    def words(name: str, options: tuple[str, ...]) -> np.ndarray:
        codes = [0] + [1 + options.index(getattr(item, name)) for item in scene.objects]
        return np.array(codes)[object_Thw]

    light_NT = np.array(
        [(0,) * NUM_FRAMES] + [tuple(1 + bright for bright in item.is_bright) for item in scene.objects]
    )
    direction = 0 if scene.direction is None else 1 + DIRECTIONS.index(scene.direction)
    drift = 0 if scene.background.drift is None else 1 + DIRECTIONS.index(scene.background.drift)
    return CellLabels(
        object=object_Thw,
        shape=words("shape", SHAPES),
        colour=words("colour", COLOURS),
        texture=words("texture", TEXTURES),
        size=words("size", SIZES),
        is_bright=light_NT[object_Thw, np.arange(NUM_FRAMES)[:, None, None]],
        direction=np.where(object_Thw > 0, direction, 0),
        background=np.full_like(object_Thw, BACKGROUNDS.index(scene.background.kind)),
        drift=np.full_like(object_Thw, drift),
        cover=1 - covers_NThw[0],
    )
