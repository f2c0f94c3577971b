"""Reading the frames asked for out of a video file.

Two readers, decord (random access, fast where it is right) and PyAV (from the start, always right), give the same
pixels on the same frame; `stream_probe_video_panda.py` decides between them. Only the real path of a regular file, or
bytes, ever reach them. Source: decisions of the project; frame rate, size and rotation as the release's decord.

Legend of the shape comments: T frames asked for, H and W px after rotation.
"""

import io
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from .containers_video_panda import (
    SELF_CONTAINED_FORMATS,
    is_indexed_container,
    is_known_clip,
    looks_like_text,
    missing_matroska_bytes,
    read_head,
)
from .decode_limits_video_panda import (
    VideoPandaDecodeError,
    VideoPandaDecodeLimits,
    VideoPandaFileError,
    VideoPandaFolderError,
    VideoPandaForbiddenFileError,
    VideoPandaMissingFileError,
)
from .isolated_video_panda import read_isolated
from .sources_video_panda import describe_source, download, is_url, regular_file
from .stream_probe_video_panda import VideoPandaStreamInfo, best_video_stream, follow_damage, probe_stream

try:
    import av
except ImportError:
    av = None

# Any damaged frame that decord patches up with a neighbour is an error; 0 would mean "not limited".
_DECORD_FAULT_TOLERANCE = 1e-9
_MAX_THREADS = 4


VideoDecodeError = VideoPandaDecodeError
VideoDecodeLimits = VideoPandaDecodeLimits


class VideoPandaVideoMetadata(VideoMetadata):
    """transformers' video metadata that also knows when each frame is really shown.

    The base class derives times from index / fps, which is wrong where the frame rate varies.

    Attributes:
        source_frame_times: when each frame of the source begins, seconds after the first one, or None if unknown.
            An attribute and not a field: dict(metadata) stays what transformers expects.
    """

    source_frame_times: list[float] | None = None

    @property
    def timestamps(self) -> list[float]:
        """When each chosen frame begins, seconds after the first frame of the source.

        Raises:
            ValueError: the chosen indices are unknown, or both the times and the frame rate are.
        """
        if self.source_frame_times is None or self.frames_indices is None:
            return super().timestamps
        return [self.source_frame_times[index] for index in self.frames_indices]


@dataclass
class _VideoPandaSource:
    """An opened-up source: `content` is a real path or bytes, `name` is for messages."""

    content: str | bytes
    name: str

    def open(self):
        """What both decoders take: the path, or a file object over the bytes."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content

    def error(self, reason: str) -> VideoPandaDecodeError:
        return VideoPandaDecodeError(f"{self.name}: {reason}")


def decode_video(
    source: str | os.PathLike | bytes,
    choose_frames: Callable[[VideoMetadata], list[int]],
    *,
    allow_urls: bool = False,
    isolate: bool | None = None,
    limits: VideoPandaDecodeLimits | None = None,
    allowed_dirs: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
) -> tuple[torch.Tensor, VideoPandaVideoMetadata]:
    """Decode the chosen frames of a video.

    Args:
        source: a path, the bytes of a file, or, where allowed, an http(s) URL (fetched into memory, at most 1 GiB).
        choose_frames: called once with the metadata (exact number of frames, fps, width and height in px after
            rotation, duration in seconds, `source_frame_times`); returns the wanted frame indices in any order,
            duplicates allowed. It runs in this process, isolated or not.
        allow_urls: whether URLs may be fetched; if not, a URL is refused.
        isolate: decode in a process of its own, which is killed and replaced if the clip makes it crash, hang or take
            too much memory. Default: for URLs only.
        limits: how much the video may ask for; `VideoPandaDecodeLimits()` unless given.
        allowed_dirs: a folder, or several, out of which no path may lead, symbolic links followed; default: anywhere.

    Returns:
        (frames, metadata): frames uint8 (T, H, W, 3) RGB, upright (the file's rotation applied), in the order asked
        for; the metadata with `frames_indices` and `video_backend` ("decord", "decord-sequential" or "pyav") set.

    Raises:
        VideoPandaDecodeError: not a video, no video stream, no frames, no usable frame rate, damaged data, or beyond a
            limit; a URL where URLs are off. Where it is the file that is not there, a folder, no regular file or out of
            bounds, or the URL that cannot be fetched, the error is an `OSError` as well (`FileNotFoundError`,
            `IsADirectoryError`, `PermissionError`).
        ValueError: an index out of range; and what `choose_frames` itself raises.
    """
    limits = limits or VideoPandaDecodeLimits()
    opened = _open_source(source, allow_urls, allowed_dirs)
    try:
        limits.check_declared(opened.content)
    except ValueError as error:
        raise opened.error(str(error)) from None
    if is_url(source) if isolate is None else isolate:
        return _read_elsewhere(opened, choose_frames, limits)
    return read_frames(opened, choose_frames, limits)


def read_frames(
    opened: "_VideoPandaSource", choose_frames: Callable, limits: VideoPandaDecodeLimits
) -> tuple[torch.Tensor, VideoPandaVideoMetadata]:
    """As `decode_video`, for a source that is open, in this process."""
    if av is None:
        return _read_with_decord_alone(opened, choose_frames)
    info = _probe(opened)
    try:
        limits.check_num_frames(info.num_packets)
        limits.check_frame_size(info.width, info.height)
    except ValueError as error:
        raise opened.error(str(error)) from None
    # Where the packets do not tell how many frames there are, all of them are decoded once to count them.
    times = info.packet_times if info.counts_are_exact else _count_frames(opened)
    if not times:
        raise opened.error(f"has a {info.codec} video stream but not a single frame in it")
    metadata = _describe(opened, info, times)
    indices = _ask(choose_frames, metadata, opened)
    try:
        limits.check_output(len(indices), metadata.width, metadata.height)
    except ValueError as error:
        raise opened.error(str(error)) from None

    frames = None
    if info.random_access_is_exact and is_indexed_container(read_head(opened.content)):
        frames = _read_random_access(opened, indices, len(times), (metadata.height, metadata.width))
    metadata.video_backend = "pyav" if frames is None else "decord"
    if frames is None:
        frames = _read_from_start(opened, indices, (metadata.height, metadata.width))
    metadata.frames_indices = indices
    return frames, metadata


def _read_elsewhere(
    opened: "_VideoPandaSource", choose_frames: Callable, limits: VideoPandaDecodeLimits
) -> tuple[torch.Tensor, VideoPandaVideoMetadata]:
    """The same in the worker process; what comes back is plain values and pixels."""
    metadata = None

    def choose(described: dict) -> list[int]:
        nonlocal metadata
        times = described.pop("source_frame_times")
        metadata = VideoPandaVideoMetadata(**described)
        metadata.source_frame_times = times
        return _ask(choose_frames, metadata, opened)

    frames, metadata.frames_indices, metadata.video_backend = read_isolated(opened.content, opened.name, choose, limits)
    return torch.from_numpy(frames), metadata


def _open_source(source, allow_urls: bool, allowed_dirs=None) -> _VideoPandaSource:
    name = describe_source(source)
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise ValueError(f"expected a path, bytes or URL of a video, got {type(source).__name__}")
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            opened = _VideoPandaSource(bytes(source), name)
        elif is_url(source):
            opened = _VideoPandaSource(download(source, allow_urls=allow_urls), name)
        else:
            opened = _VideoPandaSource(regular_file(source, allowed_dirs), name)
        head = read_head(opened.content)
    except OSError as error:
        kinds = {
            FileNotFoundError: VideoPandaMissingFileError,
            IsADirectoryError: VideoPandaFolderError,
            PermissionError: VideoPandaForbiddenFileError,
        }
        raise kinds.get(type(error), VideoPandaFileError)(str(error)) from error
    except ValueError as error:  # a path with a null byte; a URL where they are off
        raise VideoPandaDecodeError(str(error) if name in str(error) else f"{name}: {error}") from error
    if not head:
        raise opened.error("is empty (0 bytes), expected a video")
    if looks_like_text(head):
        raise opened.error(f"is a text, expected a video; it begins with {head[:40].decode('utf-8', 'replace')!r}")
    if num_missing := missing_matroska_bytes(opened.content):
        raise opened.error(f"is cut off: it states a length of {num_missing} bytes more than there are")
    return opened


def _ask(choose_frames: Callable, metadata: VideoMetadata, opened: _VideoPandaSource) -> list[int]:
    num_frames = metadata.total_num_frames
    indices = [int(index) for index in choose_frames(metadata)]
    outside = [index for index in indices if not 0 <= index < num_frames]
    if outside or not indices:
        got = f"indices {outside}" if outside else "no indices"
        raise ValueError(f"{opened.name}: got {got}, expected frame indices from 0 to {num_frames - 1}")
    return indices


# ---------------------------------------------------------------------------------------------------------- PyAV


def _open_pyav(opened: _VideoPandaSource):
    # Nothing inside a file can make FFmpeg open an address ("file" alone) or another file (no lists of files).
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(SELF_CONTAINED_FORMATS)}
    return av.open(opened.open(), options=options)


def _pyav_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises on a file it cannot read; IndexError where a damaged header announces streams as it goes."""
    return av.FFmpegError, ValueError, IndexError


def _probe(opened: _VideoPandaSource) -> VideoPandaStreamInfo:
    try:
        with _open_pyav(opened) as container:
            info = probe_stream(container)
            kinds = sorted({stream.type for stream in container.streams})
    except _pyav_errors() as error:
        raise opened.error(f"is not a video that can be read: {_reason(error)}") from error
    if info is None:
        raise opened.error(f"has no video stream, only {', '.join(kinds) or 'nothing'}")
    if info.num_promised is not None and info.num_read < info.num_promised:
        raise opened.error(
            f"is cut off: its index promises {info.num_promised} frames, only {info.num_read} are in the file"
        )
    return info


def _upright(frame) -> np.ndarray:
    """A decoded PyAV frame as RGB (H, W, 3), turned as the file says; the same pixels as decord's."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _iterate_frames(opened: _VideoPandaSource, num_threads: int | None = None):
    """All frames of a file in the order they are shown, as PyAV frames."""
    num_frames = 0
    try:
        with _open_pyav(opened) as container:
            stream = best_video_stream(container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = num_threads or _num_threads()
            for frame in container.decode(stream):
                yield frame
                num_frames += 1
    except _pyav_errors() as error:
        raise opened.error(f"decoding breaks after frame {num_frames}: {_reason(error)}") from error


def _count_frames(opened: _VideoPandaSource) -> list[float]:
    """When each frame is shown, seconds; NaN where the file does not say."""
    return [math.nan if frame.time is None else frame.time for frame in _iterate_frames(opened)]


def _describe(opened: _VideoPandaSource, info: VideoPandaStreamInfo, times: list[float]) -> VideoPandaVideoMetadata:
    starts = [time - times[0] for time in times]
    ascending = all(later > earlier for earlier, later in itertools.pairwise(starts))  # False for NaN, too
    fps = float(info.fps) if info.fps else None
    if fps is None and ascending and len(starts) > 1:
        fps = (len(starts) - 1) / starts[-1]
    if len(times) > 1 and (fps is None or not math.isfinite(fps) or fps <= 0):
        raise opened.error(f"has no usable frame rate: got {fps}, expected a positive finite number")
    # Size and rotation stand on the first frame; more threads would only decode ahead.
    first = next(_iterate_frames(opened, num_threads=1), None)
    if first is None:
        raise opened.error(f"has a {info.codec} video stream but not a single frame in it")
    turned = round(first.rotation / 90) % 2
    height, width = (first.width, first.height) if turned else (first.height, first.width)
    metadata = VideoPandaVideoMetadata(
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


def _read_from_start(opened: _VideoPandaSource, indices: list[int], size_px: tuple[int, int]) -> torch.Tensor:
    """Decode up to the last frame wanted and keep only those asked for."""
    frames = torch.empty((len(indices), *size_px, 3), dtype=torch.uint8)  # (T, H, W, 3)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    missing = set(places)
    for index, (frame, is_damaged) in enumerate(follow_damage(_iterate_frames(opened))):
        if index in places:
            if is_damaged:
                raise opened.error(f"frame {index} is damaged, or one that it is predicted from")
            picture = _upright(frame)
            if picture.shape[:2] != size_px:
                # Some streams change their size on the way; decord, too, scales to the size of the stream.
                turned = size_px if frame.rotation % 180 == 0 else size_px[::-1]
                picture = _upright(frame.reformat(width=turned[1], height=turned[0]))
            frames[places[index]] = torch.from_numpy(np.ascontiguousarray(picture))
            missing.discard(index)
            if not missing:
                return frames
    raise opened.error(f"frames {sorted(missing)} were expected but cannot be decoded")


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


def _as_tensor(pixels) -> torch.Tensor:
    """decord's result as a tensor, whatever bridge the program has set for itself."""
    if isinstance(pixels, torch.Tensor):
        return pixels
    return torch.from_numpy(pixels.asnumpy() if hasattr(pixels, "asnumpy") else np.asarray(pixels))


def _read_random_access(
    opened: _VideoPandaSource, indices: list[int], num_frames: int, size_px: tuple[int, int]
) -> torch.Tensor | None:
    """decord's random access, or None where it cannot read the file; PyAV then reads it or says what is wrong."""
    decord = _import_decord()
    if decord is None:
        return None
    # In a function of its own, so that the reader and its threads are gone before FFmpeg may speak again.
    with _VideoPandaQuietDecord(decord):
        frames = _get_batch(decord, opened, indices, num_frames)
    # Below 128 px of width decord now and then takes RGB for four channels.
    return frames if frames is not None and frames.shape == (len(indices), *size_px, 3) else None


def _get_batch(decord, opened: _VideoPandaSource, indices: list[int], num_frames: int) -> torch.Tensor | None:
    try:
        reader = decord.VideoReader(opened.open(), num_threads=_num_threads(), fault_tol=_DECORD_FAULT_TOLERANCE)
        return _as_tensor(reader.get_batch(indices)) if len(reader) == num_frames else None
    except _decord_errors(decord):
        return None


def _read_with_decord_alone(
    opened: _VideoPandaSource, choose_frames: Callable
) -> tuple[torch.Tensor, VideoPandaVideoMetadata]:
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
        raise opened.error(f"cannot be decoded: {_reason(error)}") from error
    if first is None:
        raise opened.error("has not a single frame")
    num_frames, picture, fps = last
    if not math.isfinite(fps) or fps <= 0:
        raise opened.error(f"has no usable frame rate: got {fps}, expected a positive finite number")
    metadata = VideoPandaVideoMetadata(
        total_num_frames=num_frames,
        fps=fps,
        width=picture.shape[1],
        height=picture.shape[0],
        duration=num_frames / fps,
    )
    indices = _ask(choose_frames, metadata, opened)
    pictures = {}
    with _VideoPandaQuietDecord(decord):
        for number, picture, _ in _iterate_decord(decord, opened):
            if number - 1 in indices:
                pictures[number - 1] = picture
            if number > max(indices):
                break
    metadata.frames_indices, metadata.video_backend = indices, "decord-sequential"
    return torch.stack([pictures[index] for index in indices]), metadata


def _decord_errors(decord) -> tuple[type[Exception], ...]:
    """What decord raises on a file it cannot read; an assertion guards its number of frames."""
    return decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, IndexError


def _iterate_decord(decord, opened: _VideoPandaSource):
    """(number of frames so far, picture (H, W, 3), average fps), frame by frame."""
    reader = decord.VideoReader(opened.open(), num_threads=_num_threads(), fault_tol=_DECORD_FAULT_TOLERANCE)
    fps = reader.get_avg_fps()
    for number in range(1, len(reader) + 1):
        try:
            picture = _as_tensor(reader.next())
        except StopIteration:
            return
        yield number, picture, fps


def _num_threads() -> int:
    return max(1, min(_MAX_THREADS, os.cpu_count() or 1))


def _reason(error: Exception) -> str:
    """The last line of a decoder's message, without its own source lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
