"""Decoding the frames asked for of a path, bytes or a URL: checks the source, then reads it here or in a worker process.

What reads is `frame_reading_video_panda.py`; what may be opened at all is in `sources_video_panda.py` and
`containers_video_panda.py`, and how much a video may ask for in `decode_limits_video_panda.py`.

Legend of the shape comments: T frames asked for, H and W px after rotation.
"""

import os
from collections.abc import Callable, Sequence

import torch
from transformers.video_utils import VideoMetadata

from .containers_video_panda import looks_like_text, missing_matroska_bytes, read_head
from .decode_limits_video_panda import (
    VideoPandaDecodeError,
    VideoPandaDecodeLimits,
    VideoPandaFileError,
    VideoPandaFolderError,
    VideoPandaForbiddenFileError,
    VideoPandaMissingFileError,
)
from .frame_reading_video_panda import VideoPandaDescription, VideoPandaSource, read_frames
from .isolated_video_panda import read_isolated
from .sources_video_panda import describe_source, download, is_url, regular_file

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
    read = read_isolated if (is_url(source) if isolate is None else isolate) else read_frames
    metadata = None

    def choose(description: VideoPandaDescription) -> list[int]:
        nonlocal metadata
        known = dict(vars(description))
        times = known.pop("source_frame_times")
        metadata = VideoPandaVideoMetadata(**known)
        metadata.source_frame_times = times
        indices = _ask(choose_frames, metadata, opened)
        try:
            limits.check_output(len(indices), metadata.width, metadata.height)
        except ValueError as error:
            raise opened.error(str(error)) from None
        return indices

    frames, metadata.frames_indices, metadata.video_backend = read(opened, choose, limits)
    return torch.from_numpy(frames), metadata


def _open_source(source, allow_urls: bool, allowed_dirs=None) -> VideoPandaSource:
    name = describe_source(source)
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise ValueError(f"expected a path, bytes or URL of a video, got {type(source).__name__}")
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            opened = VideoPandaSource(bytes(source), name)
        elif is_url(source):
            opened = VideoPandaSource(download(source, allow_urls=allow_urls), name)
        else:
            opened = VideoPandaSource(regular_file(source, allowed_dirs), name)
        head = read_head(opened.content)
    except OSError as error:
        kinds = {
            FileNotFoundError: VideoPandaMissingFileError,
            IsADirectoryError: VideoPandaFolderError,
            PermissionError: VideoPandaForbiddenFileError,
        }
        message = str(error) if name in str(error) else f"{name}: {error}"
        raise kinds.get(type(error), VideoPandaFileError)(message) from error
    except ValueError as error:  # a path with a null byte; a URL where they are off
        raise VideoPandaDecodeError(str(error) if name in str(error) else f"{name}: {error}") from error
    if not head:
        raise opened.error("is empty (0 bytes), expected a video")
    if looks_like_text(head):
        raise opened.error(f"is a text, expected a video; it begins with {head[:40].decode('utf-8', 'replace')!r}")
    if num_missing := missing_matroska_bytes(opened.content):
        raise opened.error(f"is cut off: it states a length of {num_missing} bytes more than there are")
    return opened


def _ask(choose_frames: Callable, metadata: VideoMetadata, opened: VideoPandaSource) -> list[int]:
    num_frames = metadata.total_num_frames
    indices = [int(index) for index in choose_frames(metadata)]
    outside = [index for index in indices if not 0 <= index < num_frames]
    if outside or not indices:
        got = f"indices {outside}" if outside else "no indices"
        raise ValueError(f"{opened.name}: got {got}, expected frame indices from 0 to {num_frames - 1}")
    return indices
