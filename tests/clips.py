"""Small clips the tests encode for themselves: every frame carries its own number as a barcode that survives coding.

Nothing here needs the network or files that are not in the repository; PyAV (the `test` extra) does the encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

NUM_BITS = 10


def barcode_frame(index: int, width: int = 64, height: int = 48) -> np.ndarray:
    """One frame: black and white vertical bars that spell `index`, most significant bit at the left.

    Args:
        index: the number to write, 0 <= index < 1024.
        width: width, px.
        height: height, px.

    Returns:
        uint8 array (height, width, 3). The lowest quarter is plain red, so that a turned or flipped frame shows.
    """
    if not 0 <= index < 2**NUM_BITS:
        raise ValueError(f"a barcode holds 0 to {2**NUM_BITS - 1}, got {index}")
    bits = np.array([(index >> (NUM_BITS - 1 - place)) & 1 for place in range(NUM_BITS)])
    columns = bits[np.arange(width) * NUM_BITS // width] * 215 + 20
    frame = np.empty((height, width, 3), dtype=np.uint8)
    frame[:] = columns[None, :, None]
    frame[height - height // 4 :] = (200, 30, 30)
    return frame


def read_barcode(frame: np.ndarray) -> int:
    """The number written by `barcode_frame`, from a decoded (possibly resized) upright RGB frame (H, W, 3)."""
    frame = np.asarray(frame).astype(np.float64)
    height, width = frame.shape[:2]
    rows = frame[height // 8 : height // 2].mean(axis=(0, 2))
    number = 0
    for place in range(NUM_BITS):
        left, right = place * width // NUM_BITS, (place + 1) * width // NUM_BITS
        margin = (right - left) // 4
        number = 2 * number + int(rows[left + margin : right - margin].mean() > 128)
    return number


def read_barcodes(frames) -> list[int]:
    """`read_barcode` of each frame of (T, H, W, 3)."""
    return [read_barcode(frame) for frame in frames]


def write_clip(
    path: str | Path,
    num_frames: int = 30,
    fps: float | Fraction = 25,
    width: int = 64,
    height: int = 48,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    container_format: str | None = None,
    pix_fmt: str = "yuv420p",
    ticks: list[int] | None = None,
    with_audio: bool = False,
    picture: Callable[[int, int, int], np.ndarray] = barcode_frame,
) -> Path:
    """Encode a clip whose frame i shows the barcode of i.

    Args:
        path: where to write; its suffix chooses the container unless `container_format` does.
        num_frames: number of frames.
        fps: frames per second; with `ticks`, ticks per second.
        width, height: size, px.
        codec: an FFmpeg encoder name.
        options: the encoder's options, for example `{"g": "10", "bf": "2"}`.
        container_options: the muxer's options.
        container_format: the muxer, for example "mpegts".
        pix_fmt: the pixel format of the encoder.
        ticks: presentation time of each frame in ticks of 1/fps, for a variable frame rate.
        with_audio: add a silent sound track.
        picture: draws frame (index, width, height); uint8 (height, width, 3).

    Returns:
        The path.
    """
    path = Path(path)
    rate = Fraction(fps).limit_denominator(100_000)
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.time_base = 1 / rate
        stream.codec_context.time_base = 1 / rate
        audio = container.add_stream("aac", rate=16_000) if with_audio else None
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index, width, height), format="rgb24")
            frame.pts = index if ticks is None else ticks[index]
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            _write_silence(container, audio, seconds=max(num_frames / float(rate), 0.5))
    return path


def write_audio(path: str | Path, seconds: float = 1.0) -> Path:
    """A file with a silent sound track and no picture."""
    path = Path(path)
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=16_000), seconds)
    return path


def _write_silence(container, stream, seconds: float) -> None:
    num_samples = 1024
    for index in range(max(1, int(seconds * 16_000 / num_samples))):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, num_samples), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, index * num_samples
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def truncate(source: str | Path, target: str | Path, keep: float = 0.5) -> Path:
    """The first `keep` part of a file's bytes: an interrupted download."""
    content = Path(source).read_bytes()
    target = Path(target)
    target.write_bytes(content[: int(len(content) * keep)])
    return target


def set_rotation(path: str | Path, degrees: int) -> Path:
    """Write a display rotation (clockwise, 0/90/180/270) into the track headers of an MP4 or MOV file, in place.

    Phones store upright clips this way: the pictures lie on their side and the header says how to turn them.
    """
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cos, sin, 0, -sin, cos, 0, 0, 0, 1]
    scales = [1 << 16, 1 << 16, 1 << 30] * 3
    packed = struct.pack(">9i", *(value * scale for value, scale in zip(matrix, scales)))
    path = Path(path)
    content = bytearray(path.read_bytes())
    start = content.find(b"tkhd")
    if start < 0:
        raise ValueError(f"{path} has no track header (tkhd); expected an MP4 or MOV file")
    while start >= 0:
        # version 0 header: 4 name + 4 version/flags + 20 times and ids + 8 reserved + 8 layer, group, volume
        at = start + 4 + 4 + 20 + 8 + 8
        content[at : at + 36] = packed
        start = content.find(b"tkhd", at)
    path.write_bytes(bytes(content))
    return path
