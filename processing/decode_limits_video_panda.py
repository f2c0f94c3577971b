"""How much a video may ask for before it is refused, and the one error of a video that cannot be read.

A file of 4 KB can declare two thousand million frames, or frames of a gigapixel; a decoder that believes it takes the
machine's memory or aborts the process. What a file declares is compared with these limits before anything is decoded.

Imports neither torch nor transformers: the worker process of the isolated mode starts with it.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_MP4_PARENTS = frozenset({b"moov", b"mdia", b"minf", b"stbl"})
_MAX_BOXES = 20_000  # of a file; one with more is left to the decoder, whose own limits are below these


class VideoPandaDecodeError(ValueError):
    """A file is not a video that can be read, or breaks while it is read; names the file and the reason."""


class VideoPandaFileError(VideoPandaDecodeError, OSError):
    """There is no regular file at a path, or a URL cannot be fetched: a decode error that is an `OSError` as well."""


class VideoPandaMissingFileError(VideoPandaFileError, FileNotFoundError):
    """Nothing is at a path."""


class VideoPandaFolderError(VideoPandaFileError, IsADirectoryError):
    """A folder is at a path."""


class VideoPandaForbiddenFileError(VideoPandaFileError, PermissionError):
    """A path may not be read, or leads out of the allowed folders."""


@dataclass(frozen=True)
class VideoPandaDecodeLimits:
    """What one video may take. The defaults let through 8K video, a day of film and 300 frames of full HD.

    Attributes:
        seconds: of wall time, from the request to the frames; isolated mode only.
        memory_bytes: what decoding may take beside the frames that it gives; isolated mode only.
        num_frames: frames in the file.
        frame_pixels: width times height of a frame, px.
        output_bytes: of all frames asked for, 3 bytes a pixel.
    """

    seconds: float = 120.0
    memory_bytes: int = 4 * 2**30
    num_frames: int = 10_000_000
    frame_pixels: int = 2**26
    output_bytes: int = 8 * 2**30

    def __post_init__(self):
        for name, value in vars(self).items():
            kind = (int, float) if name == "seconds" else int
            if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
                raise ValueError(f"`{name}` of the limits must be a positive number, got {value!r}")

    def check_num_frames(self, num_frames: int) -> None:
        """Raises: ValueError where a file has, or says it has, too many frames."""
        if num_frames > self.num_frames:
            raise ValueError(f"declares {num_frames} frames, more than the limit of {self.num_frames}")

    def check_frame_size(self, width: int, height: int) -> None:
        """Raises: ValueError where a frame is, or is said to be, too large."""
        if width * height > self.frame_pixels:
            raise ValueError(
                f"has frames of {width} x {height} px, more than the limit of {self.frame_pixels} px a frame"
            )

    def check_output(self, num_chosen: int, width: int, height: int) -> None:
        """Raises: ValueError where the frames asked for take too much memory."""
        if (num_bytes := 3 * num_chosen * width * height) > self.output_bytes:
            raise ValueError(
                f"{num_chosen} frames of {width} x {height} px take {num_bytes} bytes, more than the limit of "
                f"{self.output_bytes}; ask for fewer frames"
            )

    def check_declared(self, source: str | bytes) -> None:
        """Compare what the header of an MP4 or MOV file declares with the limits, before any decoder sees the file.

        A table of samples of one size says how many there are without listing them, so a tiny file can announce any
        number, and FFmpeg makes an index of them all. Each sample takes at least a byte, of sound as well.

        Args:
            source: the path of the file, or its bytes.

        Raises:
            ValueError: says what is declared and what the limit is.
            OSError: the file cannot be read.
        """
        tracks, num_bytes = read_mp4_tracks(source)
        for track in tracks:
            if track.num_samples > num_bytes:
                raise ValueError(f"declares {track.num_samples} samples in a file of {num_bytes} bytes")
            if track.handler == b"vide":
                self.check_num_frames(track.num_samples)


@dataclass
class VideoPandaMp4Track:
    """What the tables of a track announce: its kind (`vide`, `soun`, ...) and the largest number of samples."""

    handler: bytes = b""
    num_samples: int = 0


def read_mp4_tracks(source: str | bytes) -> tuple[list[VideoPandaMp4Track], int]:
    """The tracks of an MP4 or MOV file, from its boxes alone.

    Args:
        source: the path of the file, or its bytes.

    Returns:
        (tracks, bytes of the file); no tracks where there are no such boxes, as in every other format.
    """
    if isinstance(source, bytes):
        return _read_tracks(lambda start, size: source[start : start + size], len(source)), len(source)
    with open(os.fspath(source), "rb") as file:

        def read(start: int, size: int) -> bytes:
            file.seek(start)
            return file.read(size)

        num_bytes = os.fstat(file.fileno()).st_size
        return _read_tracks(read, num_bytes), num_bytes


def _read_tracks(read: Callable[[int, int], bytes], num_bytes: int) -> list[VideoPandaMp4Track]:
    tracks = []
    pending: list[tuple[int, int, VideoPandaMp4Track]] = [(0, num_bytes, VideoPandaMp4Track())]
    num_boxes = 0
    while pending:
        position, end, track = pending.pop()
        while position + 8 <= end and num_boxes < _MAX_BOXES:
            num_boxes += 1
            header = read(position, 16)
            size, kind = struct.unpack(">I4s", header[:8]) if len(header) >= 8 else (1, b"")
            content = position + 8
            if size == 1 and len(header) == 16:
                size, content = struct.unpack(">Q", header[8:])[0], position + 16
            stop = end if size == 0 else min(end, position + size)
            if stop < content:
                break
            if kind == b"trak":
                tracks.append(VideoPandaMp4Track())
                pending.append((content, stop, tracks[-1]))
            elif kind in _MP4_PARENTS:
                pending.append((content, stop, track))
            elif kind == b"hdlr" and read(content + 4, 4) != b"dhlr":  # a QuickTime data handler is not the track's
                track.handler = read(content + 8, 4)
            elif kind in (b"stsz", b"stz2", b"stts", b"ctts"):
                track.num_samples = max(track.num_samples, _count_samples(kind, read, content, stop))
            position = stop
    return tracks


def _count_samples(kind: bytes, read: Callable[[int, int], bytes], content: int, stop: int) -> int:
    """How many samples a table announces: a number in itself, or the sum of its runs."""
    if kind in (b"stsz", b"stz2"):
        return int.from_bytes(read(content + 8, 4), "big")
    num_runs = int.from_bytes(read(content + 4, 4), "big")
    runs = read(content + 8, max(0, min(8 * num_runs, stop - content - 8)))
    return int(np.frombuffer(runs[: len(runs) // 8 * 8], dtype=">u4")[::2].sum(dtype=np.uint64))
