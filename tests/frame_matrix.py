"""Kinds of streams in which a frame asked for may be missed: containers, codecs, groups of pictures, times, sizes.

The tests encode each small, `benchmarks/exact_frames.py` large; docs/exact_frames.md has a line for each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from clips import barcode_frame, set_rotation, write_clip

GROUP = 12  # frames from one key frame to the next, unless the caller wants others
_GROUP = "GROUP"  # stands for their number in an encoder's options


@dataclass(frozen=True)
class Combination:
    """One container x codec x group of pictures.

    Attributes:
        file: name of the clip; its suffix is the container.
        pictures: codec and group of pictures, in words.
        random_access: whether every key frame is a clean start, so that the frames before it may be skipped.
        encoding: arguments of `write_clip`.
        num_frames: of the clip; None: as many as the caller wants.
        size_px: width and height, upright, if they are not the caller's.
        ticks: when frame i is shown, in 1/fps seconds; None: i.
        degrees: rotation in the header, clockwise.
        first_shown: number on the first frame; above 0 where an edit list cuts the clip.
        decord_is_exact: see `is_for_decord`.
    """

    file: str
    pictures: str
    random_access: bool = False
    encoding: dict = field(default_factory=dict)
    num_frames: int | None = None
    size_px: tuple[int, int] | None = None
    ticks: Callable[[int], int] | None = None
    degrees: int = 0
    first_shown: int = 0
    decord_is_exact: bool | None = None

    @property
    def is_for_decord(self) -> bool:
        """Whether decord, too, may skip: as `random_access` says, unless something else stands against it."""
        return self.random_access if self.decord_is_exact is None else self.decord_is_exact

    @property
    def container(self) -> str:
        return self.file.rsplit(".", 1)[1]


def _x264(options: str = "", group: int | str = _GROUP, **encoding) -> dict:
    params = f"bframes=3:b-adapt=0:keyint={group}:min-keyint={group}:scenecut=0{options}"
    return {"codec": "libx264", "options": {"x264-params": params, "preset": "veryfast"}, **encoding}


def _x265(options: str, **encoding) -> dict:
    params = f"keyint={_GROUP}:min-keyint={_GROUP}:scenecut=0:bframes=3:b-adapt=0:log-level=none:pools=1:{options}"
    return {"codec": "libx265", "options": {"x265-params": params, "preset": "superfast"}, **encoding}


def _vpx(codec: str = "libvpx-vp9", **encoding) -> dict:
    options = {"g": _GROUP, "b": "400000", "cpu-used": "8", "deadline": "realtime"}
    return {"codec": codec, "options": options, **encoding}


def _av1(**encoding) -> dict:
    # Faster presets leave a bar out of a picture.
    options = {"g": _GROUP, "crf": "5", "preset": "8", "svtav1-params": "lp=1"}
    return {"codec": "libsvtav1", "options": options, **encoding}


def _mpeg(codec: str, num_b_frames: int = 2, **encoding) -> dict:
    options = {"g": _GROUP, "b": "2000000", **({"bf": str(num_b_frames)} if num_b_frames else {})}
    return {"codec": codec, "options": options, **encoding}


_MJPEG = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "options": {"q": "3"}}
_GIF = {"codec": "gif", "pix_fmt": "rgb8"}
_FRAGMENTS = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}


def _uneven(index: int) -> int:
    return index * (index + 9) // 7


def _late(index: int) -> int:
    return index + 50


COMBINATIONS = (
    Combination("closed.mp4", "H.264, closed GOP, B-frames", True, _x264()),
    Combination("no_b.mp4", "H.264, closed GOP, no B-frames", True, _x264(":bframes=0")),
    Combination("one_group.mp4", "H.264, one GOP", True, _x264(group=1000)),
    Combination("all_keys.mp4", "H.264, key frames only", True, _x264(group=1)),
    Combination("uneven.mp4", "H.264, variable frame rate", True, _x264(), ticks=_uneven),
    Combination("late.mp4", "H.264, first timestamp not 0", True, _x264(), ticks=_late),
    Combination("interlaced.mp4", "H.264, interlaced", True, _x264(":interlaced=1")),
    Combination("ten_bit.mp4", "H.264, 10-bit", True, _x264(pix_fmt="yuv420p10le")),
    Combination("444.mp4", "H.264, 4:4:4", True, _x264(pix_fmt="yuv444p")),
    Combination("odd.mp4", "H.264, 4:4:4, odd size", True, _x264(pix_fmt="yuv444p"), size_px=(161, 97)),
    Combination("turned.mp4", "H.264, rotated by 90 degrees", True, _x264(), degrees=90),
    Combination("one.mp4", "H.264, one frame", True, _x264(), num_frames=1),
    Combination("sound.mp4", "H.264, index first, with sound", True, _x264(with_audio=True)),
    Combination("open.mp4", "H.264, open GOP", False, _x264(":open-gop=1")),
    Combination("refresh.mp4", "H.264, intra refresh", False, _x264(":intra-refresh=1")),
    # decord crashes on some damaged ones
    Combination("fragments.mp4", "H.264, fragmented", True, _x264(**_FRAGMENTS), decord_is_exact=False),
    Combination("cut.mp4", "H.264, cut with an edit list", False, _x264(), first_shown=18),
    Combination("hevc_closed.mp4", "HEVC, closed GOP", False, _x265("open-gop=0")),
    Combination("hevc_open.mp4", "HEVC, open GOP", False, _x265("open-gop=1")),
    Combination("hevc_ten_bit.mp4", "HEVC, closed GOP, 10-bit", False, _x265("open-gop=0", pix_fmt="yuv420p10le")),
    Combination("av1.mp4", "AV1", False, _av1()),
    Combination("av1_ten_bit.mp4", "AV1, 10-bit", False, _av1(pix_fmt="yuv420p10le")),
    Combination("vp9.mp4", "VP9", True, _vpx()),
    Combination("mpeg4.mp4", "MPEG-4, B-frames", False, _mpeg("mpeg4")),
    Combination("closed.mov", "H.264, closed GOP, B-frames", True, _x264()),
    Combination("turned.mov", "H.264, rotated by 270 degrees", True, _x264(), degrees=270),
    Combination("mjpeg.mov", "Motion JPEG", True, _MJPEG),
    Combination("prores.mov", "ProRes, 10-bit 4:2:2", True, {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
    Combination("closed.mkv", "H.264, closed GOP, B-frames", True, _x264()),
    Combination("open.mkv", "H.264, open GOP", False, _x264(":open-gop=1")),
    Combination("uneven.mkv", "H.264, variable frame rate", True, _x264(), ticks=_uneven),
    Combination("hevc_closed.mkv", "HEVC, closed GOP", False, _x265("open-gop=0")),
    Combination("av1.mkv", "AV1", False, _av1()),
    Combination("mpeg4.mkv", "MPEG-4, B-frames", False, _mpeg("mpeg4")),
    Combination("ffv1.mkv", "FFV1", False, {"codec": "ffv1"}),
    Combination("vp8.webm", "VP8", True, _vpx("libvpx")),
    Combination("vp9.webm", "VP9", True, _vpx()),
    Combination("vp9_uneven.webm", "VP9, variable frame rate", True, _vpx(), ticks=_uneven),
    Combination("vp9_odd.webm", "VP9, odd size", True, _vpx(), size_px=(161, 97)),
    Combination("av1.webm", "AV1", False, _av1()),
    Combination("closed.avi", "H.264, closed GOP", False, _x264()),
    Combination("mpeg4.avi", "MPEG-4, B-frames", False, _mpeg("mpeg4")),
    Combination("mjpeg.avi", "Motion JPEG", False, _MJPEG),
    Combination("closed.ts", "H.264, closed GOP, B-frames", False, _x264(container_format="mpegts")),
    Combination("open.ts", "H.264, open GOP", False, _x264(":open-gop=1", container_format="mpegts")),
    Combination("hevc_open.ts", "HEVC, open GOP", False, _x265("open-gop=1", container_format="mpegts")),
    Combination("mpeg2.ts", "MPEG-2, B-frames", False, _mpeg("mpeg2video", container_format="mpegts")),
    Combination("closed.flv", "H.264, closed GOP, B-frames", False, _x264()),
    Combination("flv1.flv", "Sorenson H.263", False, _mpeg("flv", 0)),
    Combination("wmv2.wmv", "WMV 8", False, _mpeg("wmv2", 0)),
    Combination("mpeg1.mpg", "MPEG-1, B-frames", False, _mpeg("mpeg1video")),
    Combination("mpeg2.mpg", "MPEG-2, B-frames", False, _mpeg("mpeg2video")),
    Combination("animation.gif", "GIF", False, _GIF),
    Combination("uneven.gif", "GIF, variable frame rate", False, _GIF, ticks=_uneven),
    Combination("one.gif", "GIF, one frame", False, _GIF, num_frames=1),
)


def encode(
    combination: Combination,
    path: Path,
    num_frames: int,
    width: int,
    height: int,
    group: int = GROUP,
    picture: Callable = barcode_frame,
) -> list[int] | None:
    """Write a clip of a kind.

    Args:
        combination: the kind.
        path: where to; the suffix must be the kind's.
        num_frames, width, height: of the clip, where the kind leaves it open; px, upright.
        group: frames from one key frame to the next, where the kind leaves it open.
        picture: draws frame (index, width, height) with the barcode of its index.

    Returns:
        The number on each frame in the order shown; None where this PyAV lacks the encoder.
    """
    num_frames = combination.num_frames or num_frames
    width, height = combination.size_px or (width, height)
    ticks = [combination.ticks(index) for index in range(num_frames)] if combination.ticks else None
    num_turns = combination.degrees // 90
    lying = (height, width) if num_turns % 2 else (width, height)

    def stored(index: int, *_) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(picture(index, width, height), num_turns))

    options = combination.encoding.get("options", {})
    encoding = {
        **combination.encoding,
        "options": {name: value.replace(_GROUP, str(group)) for name, value in options.items()},
    }
    try:
        write_clip(
            path,
            num_frames,
            width=lying[0],
            height=lying[1],
            ticks=ticks,
            picture=stored,
            **encoding,
        )
    except av.codec.codec.UnknownCodecError:
        return None
    if combination.degrees:
        set_rotation(path, combination.degrees)
    if combination.first_shown:
        _cut(path, combination.first_shown, combination.first_shown // group * group)
    return list(range(combination.first_shown, num_frames))


def _cut(path: Path, first_shown: int, first_kept: int, fps: int = 25) -> None:
    """Copy the stream from a key frame on, with times that an edit list hides up to the first one shown.

    What is left out are pictures that are in the file, and decoded, but never shown.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source = path.rename(Path(folder, path.name))
        with av.open(str(source)) as read, av.open(str(path), "w") as written:
            stream = read.streams.video[0]
            copy = written.add_stream_from_template(stream)
            frame_ticks = int(1 / fps / stream.time_base)
            for packet in [packet for packet in read.demux(stream) if packet.size]:
                if packet.pts >= first_kept * frame_ticks:
                    packet.pts -= first_shown * frame_ticks
                    packet.dts -= first_shown * frame_ticks
                    packet.stream = copy
                    written.mux(packet)
