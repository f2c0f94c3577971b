"""Reading the frames asked for out of a video that is open: the same code in this process and in the isolated worker.

Two readers give the same pixels on the same frame: PyAV, always right, which skips what it has in memory (files of up to
32 MiB) and reads larger ones from the start; and for those decord, whose random access is right on some streams, as
`stream_probe_video_panda.py` finds out. Only the real path of a regular file, or bytes, ever reach them. Source: decisions of the project; frame rate, size and rotation as the release's decord.

Imports neither torch nor transformers: the worker starts with it.

Legend of the shape comments: T frames asked for, H and W px after rotation.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .containers_video_panda import is_indexed_container, is_known_clip, read_head
from .decode_limits_video_panda import VideoPandaDecodeLimits
from .pyav_reading_video_panda import VideoPandaPyavVideo, VideoPandaSource, av, num_threads, reason_of
from .stream_probe_video_panda import VideoPandaStreamInfo

# Any damaged frame that decord patches up with a neighbour is an error; 0 would mean "not limited".
_DECORD_FAULT_TOLERANCE = 1e-9
# Pixels that PyAV may decode on top of those that decord's random access would: about what it takes to open decord.
_PIXELS_OF_OPENING = 2**21


@dataclass
class VideoPandaDescription:
    """What is known about a video before its frames are chosen.

    Attributes:
        total_num_frames: exact number of frames.
        fps: average frames per second, or None for a single picture.
        width, height: after rotation, px.
        duration: seconds, or None.
        source_frame_times: when each frame begins, seconds after the first one, or None if unknown.
    """

    total_num_frames: int
    fps: float | None
    width: int
    height: int
    duration: float | None
    source_frame_times: list[float] | None = None


def read_frames(
    opened: VideoPandaSource,
    choose_frames: Callable[[VideoPandaDescription], list[int]],
    limits: VideoPandaDecodeLimits,
    make_array: Callable[[tuple[int, ...]], object] | None = None,
) -> tuple[np.ndarray, list[int], str]:
    """Decode the chosen frames in this process.

    Args:
        opened: the source.
        choose_frames: called once; returns indices from 0 to the number of frames, at least one.
        limits: what the video may declare.
        make_array: called with (T, H, W, 3), gives what takes the frames in the place of an array, by `array[place] = frame`,
            any frame first; it may be left alone, where they come as an array of a decoder, which cannot be written to.

    Returns:
        (frames, indices, backend): uint8 (T, H, W, 3), the indices as chosen, and "decord", "decord-sequential" or "pyav".

    Raises:
        VideoPandaDecodeError: it is no video that can be read, or beyond a limit.
        ImportError: no decoder is installed; and what `choose_frames` raises.
    """
    if av is None:
        return _read_with_decord_alone(opened, choose_frames, limits)
    with VideoPandaPyavVideo(opened) as video:
        info = video.info
        _check(limits, opened, max(info.num_packets, info.num_promised or 0), info.width, info.height)
        # Where the packets do not tell how many frames there are, all of them are decoded once to count them.
        times = info.packet_times if info.counts_are_exact else video.count_frames()
        description = _describe(opened, info, times, video.first_frame())
        indices = choose_frames(description)
        size_px = (description.height, description.width)
        frames = None
        if not video.can_skip and _is_random_access_better(opened, info, indices):
            frames = _read_random_access(opened, indices, len(times), size_px, may_borrow=make_array is not None)
        if frames is not None:
            return frames, indices, "decord"
        return video.read(indices, size_px, make_array), indices, "pyav"


def _is_random_access_better(opened: VideoPandaSource, info: VideoPandaStreamInfo, indices: list[int]) -> bool:
    """Whether decord's random access is exact for a video and has less to do than PyAV from the first frame on."""
    if not info.random_access_is_exact:
        return False
    num_saved = max(indices) + 1 - info.num_decoded_on_the_way(indices)
    if num_saved * info.width * info.height <= _PIXELS_OF_OPENING:
        return False
    return is_indexed_container(read_head(opened.content))


def _check(limits: VideoPandaDecodeLimits, opened: VideoPandaSource, num_frames: int, width: int, height: int) -> None:
    """Compare what is known of a stream with the limits, before its pictures are made."""
    try:
        limits.check_num_frames(num_frames)
        limits.check_frame_size(width, height)
    except ValueError as error:
        raise opened.error(str(error)) from None


def _describe(opened: VideoPandaSource, info: VideoPandaStreamInfo, times: list[float], first) -> VideoPandaDescription:
    """What is known about a video; `first` is its first frame, on which size and rotation stand."""
    starts = [time - times[0] for time in times]
    ascending = all(later > earlier for earlier, later in itertools.pairwise(starts))  # False for NaN, too
    fps = float(info.fps) if info.fps else None
    if fps is None and ascending and len(starts) > 1:
        fps = (len(starts) - 1) / starts[-1]
    if len(times) > 1 and (fps is None or not math.isfinite(fps) or fps <= 0):
        raise opened.error(f"has no usable frame rate: got {fps}, expected a positive finite number")
    turned = round(first.rotation / 90) % 2
    height, width = (first.width, first.height) if turned else (first.height, first.width)
    metadata = VideoPandaDescription(
        total_num_frames=len(times),
        fps=fps,
        width=width,
        height=height,
        duration=len(times) / fps if fps else None,
    )
    if ascending or len(times) == 1:
        metadata.source_frame_times = starts if len(times) > 1 else [0.0]
        if fps and len(times) > 1:
            metadata.duration = starts[-1] + 1 / fps
    return metadata


# --------------------------------------------------------------------------------------------------------- decord


def _import_decord():
    """The decord package, or None. Imported late: it loads its own FFmpeg, which costs half of our import time."""
    try:
        import decord
    except (ImportError, OSError):  # OSError: the shared library does not load here
        return None
    return decord


class _VideoPandaQuietDecord:
    """Keeps decord's FFmpeg from writing to stderr meanwhile: what goes wrong is raised and told once, by us."""

    def __init__(self, decord):
        self._logging = decord.logging

    def __enter__(self):
        self._logging.set_level(self._logging.QUIET)

    def __exit__(self, *exception):
        self._logging.set_level(self._logging.ERROR)  # decord's own default; it cannot be asked for the present one


def _as_array(pixels, may_borrow: bool = False) -> np.ndarray:
    """decord's result as an array, whatever bridge the program has set for itself; borrowed, it cannot be written to."""
    if may_borrow and hasattr(pixels, "to_dlpack"):
        return np.from_dlpack(_VideoPandaBorrowed(pixels))
    return pixels.asnumpy() if hasattr(pixels, "asnumpy") else np.asarray(pixels)


class _VideoPandaBorrowed:
    """decord's memory in the form that numpy takes it: decord knows the older half of that protocol only."""

    def __init__(self, pixels):
        self._pixels = pixels

    def __dlpack__(self, **options):
        return self._pixels.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # main memory


def _read_random_access(
    opened: VideoPandaSource, indices: list[int], num_frames: int, size_px: tuple[int, int], may_borrow: bool
) -> np.ndarray | None:
    """decord's random access, or None where it cannot read the file; PyAV then reads it or says what is wrong."""
    decord = _import_decord()
    if decord is None:
        return None
    # In a function of its own, so that the reader and its threads are gone before FFmpeg may speak again.
    with _VideoPandaQuietDecord(decord):
        frames = _get_batch(decord, opened, indices, num_frames, may_borrow)
    # Below 128 px of width decord now and then takes RGB for four channels.
    return frames if frames is not None and frames.shape == (len(indices), *size_px, 3) else None


def _get_batch(
    decord, opened: VideoPandaSource, indices: list[int], num_frames: int, may_borrow: bool
) -> np.ndarray | None:
    try:
        reader = decord.VideoReader(opened.open(), num_threads=num_threads(), fault_tol=_DECORD_FAULT_TOLERANCE)
        return _as_array(reader.get_batch(indices), may_borrow) if len(reader) == num_frames else None
    except _decord_errors(decord):
        return None


def _read_with_decord_alone(
    opened: VideoPandaSource, choose_frames: Callable, limits: VideoPandaDecodeLimits
) -> tuple[np.ndarray, list[int], str]:
    """Without PyAV nothing is known about the stream, so decord reads it from the first frame to the last, twice."""
    decord = _import_decord()
    if decord is None:
        raise ImportError("neither PyAV nor decord can be imported; install one of them: pip install av decord2")
    head = read_head(opened.content)
    if head[:1] == b"G" and head[188:189] == b"G":
        raise opened.error("is an MPEG transport stream, which decord alone reads wrongly; pip install av")
    if not is_known_clip(head):
        raise opened.error("is not of a format that is safe to open with decord alone; pip install av")
    try:
        with _VideoPandaQuietDecord(decord):
            first = last = None
            for last in _iterate_decord(decord, opened):
                first = last if first is None else first
    except _decord_errors(decord) as error:
        raise opened.error(f"cannot be decoded: {reason_of(error)}") from error
    if first is None:
        raise opened.error("has not a single frame")
    num_frames, picture, fps = last
    _check(limits, opened, num_frames, picture.shape[1], picture.shape[0])
    if not math.isfinite(fps) or fps <= 0:
        raise opened.error(f"has no usable frame rate: got {fps}, expected a positive finite number")
    description = VideoPandaDescription(
        total_num_frames=num_frames,
        fps=fps,
        width=picture.shape[1],
        height=picture.shape[0],
        duration=num_frames / fps,
    )
    indices = choose_frames(description)
    pictures = {}
    with _VideoPandaQuietDecord(decord):
        for number, picture, _ in _iterate_decord(decord, opened):
            if number - 1 in indices:
                pictures[number - 1] = picture
            if number > max(indices):
                break
    return np.stack([pictures[index] for index in indices]), indices, "decord-sequential"


def _decord_errors(decord) -> tuple[type[Exception], ...]:
    """What decord raises on a file it cannot read; an assertion guards its number of frames."""
    return decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, IndexError


def _iterate_decord(decord, opened: VideoPandaSource):
    """(number of frames so far, picture (H, W, 3), average fps), frame by frame."""
    reader = decord.VideoReader(opened.open(), num_threads=num_threads(), fault_tol=_DECORD_FAULT_TOLERANCE)
    fps = reader.get_avg_fps()
    for number in range(1, len(reader) + 1):
        try:
            picture = _as_array(reader.next())
        except StopIteration:
            return
        yield number, picture, fps
