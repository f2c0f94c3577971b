"""What kind of stream a video file holds, found by listing its packets without decoding a picture.

Random access begins decoding at the key frame before the frame that is wanted. On streams where a key frame is not a
clean start, or where the container's times are not those of the pictures, decord then returns *other frames than asked
for*, without an error. This file says where its answer is known to be exact. Measured with barcoded clips
(tests/processing/test_frame_matrix.py):

- exact: H.264 in MP4, MOV and Matroska whose key frames are all IDR pictures (B-frames, variable frame rate and
  interlacing do no harm); VP8 and VP9 in WebM; Motion JPEG and ProRes in MOV;
- wrong: H.264 and HEVC with open GOPs, H.264 with intra refresh, files cut with an edit list, MPEG-4 with B-frames,
  everything in AVI, MPEG-TS, MPEG-PS and WMV; HEVC with closed GOPs fails outright.
"""

import bisect
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

try:
    import av
except ImportError:  # decord alone then reads from the first frame to the last
    av = None

# FFmpeg's names; "mov" is the whole family of MP4, MOV, M4V and 3GP.
_INDEXED_CONTAINERS = frozenset({"mov", "matroska", "webm"})
# One packet is one picture in these, when they lie in one of the containers above.
_PACKET_IS_PICTURE = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg", "prores"})
_CLEAN_KEY_FRAMES = frozenset({"vp8", "vp9"})
_ONLY_KEY_FRAMES = frozenset({"mjpeg", "prores"})
_H264_IDR = 5
_VP8_SHOWN = 0x10
_TELLS_OF_CHANGES = av is not None and hasattr(av.Packet, "has_sidedata")  # PyAV 16
_MAX_REORDERED_FRAMES = 16  # H.264 and HEVC allow no more
_MAX_KEPT_BYTES = 2**25  # of packets; a larger file is opened a second time in order to decode it


@dataclass
class VideoPandaStreamInfo:
    """The facts about a file's video stream that decide how it is read.

    Attributes:
        container: FFmpeg's names of the format, for example ("mov", "mp4", ...).
        codec: FFmpeg's name of the codec.
        width, height: coded size before rotation, px.
        fps: average frames per second as the container states it (decord's get_avg_fps), or None.
        num_packets: packets that carry a picture to show.
        num_promised: packets the container's index promises, or None.
        num_read: packets that could be read, shown or not.
        display_ticks: when each of them is shown, in the stream's units of time, ascending; empty if the container does
            not say.
        packet_times: the same in seconds.
        key_frames: which frames are key frames, ascending; of no meaning unless `counts_are_exact`.
        counts_are_exact: whether every packet to show gives exactly one frame.
        groups_stand_alone: whether, besides, decoding may begin at each key frame.
        random_access_is_exact: whether decord's random access gives the frames asked for.
        packets: the PyAV packets in the file's order, the empty one that ends decoding included; None if they are large.
        first_packet: the first of them in any case; None if there is none.
    """

    container: tuple[str, ...]
    codec: str
    width: int
    height: int
    fps: Fraction | None
    num_packets: int
    num_promised: int | None
    num_read: int
    display_ticks: list[int] = field(default_factory=list)
    packet_times: list[float] = field(default_factory=list)
    key_frames: list[int] = field(default_factory=list)
    counts_are_exact: bool = False
    groups_stand_alone: bool = False
    random_access_is_exact: bool = False
    packets: deque | None = None
    first_packet: object | None = None

    def num_decoded_on_the_way(self, indices: list[int]) -> int:
        """How many frames random access decodes for these: each from the key frame before it on.

        Args:
            indices: frames of a stream whose counts are exact, in any order.
        """
        last_of_group: dict[int, int] = {}
        for index in indices:
            key_frame = self.key_frames[bisect.bisect_right(self.key_frames, index) - 1]
            last_of_group[key_frame] = max(index, last_of_group.get(key_frame, 0))
        return sum(last - key_frame + 1 for key_frame, last in last_of_group.items())


def best_video_stream(container):
    """The stream a player would show, or None; a cover picture of a sound file is not one.

    Args:
        container: an open PyAV input container.
    """
    try:
        stream = container.streams.best("video")
    except IndexError:  # FFmpeg names a stream that turned up while it probed, after PyAV made its list
        stream = next(iter(container.streams.video), None)
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        return None
    return stream


def probe_stream(container) -> VideoPandaStreamInfo | None:
    """List the packets of the video stream, and keep them where they are few.

    Args:
        container: an open PyAV input container, at its beginning.

    Returns:
        The facts, or None if there is no video stream. The packets can be decoded as long as the container is open.

    Raises:
        av.FFmpegError: the file breaks while its packets are listed.
        ValueError: FFmpeg has no decoder for the stream.
    """
    stream = best_video_stream(container)
    if stream is None:
        return None
    codec_context = stream.codec_context
    if codec_context is None:
        raise ValueError("no decoder is known for its video stream")
    names = tuple(container.format.name.split(","))
    # The canonical name: AV1 is "av1" whichever decoder FFmpeg was built with.
    codec = codec_context.codec.canonical_name
    packets = _list_packets(container, stream, codec, _nal_length_size(codec_context.extradata))
    display_ticks, num_read = packets.display_ticks, packets.num_read

    key_frames_are_clean = codec in _CLEAN_KEY_FRAMES
    if codec == "h264":
        key_frames_are_clean = packets.num_keys > 0 and packets.num_idr_keys == packets.num_keys
    elif codec in _ONLY_KEY_FRAMES:
        key_frames_are_clean = packets.num_keys == num_read

    first_ticks = display_ticks[0] if display_ticks else None
    timed = bool(display_ticks) and None not in display_ticks and len(set(display_ticks)) == len(display_ticks)
    # Pictures shown before the first key frame cannot be decoded and are dropped.
    nothing_leads = timed and packets.starts_with_key and min(display_ticks) == first_ticks
    indexed = bool(_INDEXED_CONTAINERS.intersection(names))
    counts_are_exact = indexed and codec in _PACKET_IS_PICTURE and nothing_leads and len(display_ticks) == num_read
    begins_anywhere = counts_are_exact and key_frames_are_clean and not packets.change_the_decoder
    # A fragmented MP4 has no index; decord reads a whole one rightly but crashes the process on some damaged ones.
    has_index = "mov" not in names or stream.frames == num_read
    ascending = sorted(display_ticks) if timed else []
    return VideoPandaStreamInfo(
        container=names,
        codec=codec,
        width=stream.width,
        height=stream.height,
        fps=stream.average_rate or None,
        num_packets=len(display_ticks),
        num_promised=stream.frames if "mov" in names and stream.frames > 0 else None,
        num_read=num_read,
        display_ticks=ascending,
        packet_times=_seconds(ascending, stream.time_base),
        key_frames=[bisect.bisect_left(ascending, ticks) for ticks in sorted(packets.key_ticks)] if timed else [],
        counts_are_exact=counts_are_exact,
        groups_stand_alone=begins_anywhere and _TELLS_OF_CHANGES,
        random_access_is_exact=begins_anywhere and has_index,
        packets=packets.kept,
        first_packet=packets.first,
    )


def _seconds(ticks: list[int], unit: Fraction) -> list[float]:
    """As float(ticks * unit), which takes as long as all the rest of listing packets."""
    return [number * unit.numerator / unit.denominator for number in ticks]


@dataclass
class _VideoPandaPackets:
    """What the packets of a stream say: display times in ticks (hidden pictures left out) and how many are what."""

    display_ticks: list[int | None] = field(default_factory=list)
    num_read: int = 0
    num_keys: int = 0
    num_idr_keys: int = 0
    starts_with_key: bool = False
    change_the_decoder: bool = False
    key_ticks: list[int] = field(default_factory=list)
    kept: deque | None = field(default_factory=deque)
    first: object | None = None


def _list_packets(container, stream, codec: str, nal_length_size: int | None) -> _VideoPandaPackets:
    packets, num_bytes = _VideoPandaPackets(), 0
    for packet in container.demux(stream):
        num_bytes += packet.size
        if packets.first is None:
            packets.first = packet
        if num_bytes > _MAX_KEPT_BYTES:
            packets.kept = None
        if packets.kept is not None:
            packets.kept.append(packet)
        if not packet.size:
            continue
        if packet.is_keyframe:
            packets.starts_with_key = packets.starts_with_key or packets.num_read == 0
            packets.num_keys += 1
            packets.change_the_decoder = packets.change_the_decoder or _changes_the_decoder(packet)
            if codec == "h264":
                packets.num_idr_keys += _has_idr_picture(packet, nal_length_size)
        packets.num_read += 1
        if not packet.is_discard and not (codec == "vp8" and _is_hidden_vp8(packet)):
            packets.display_ticks.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                packets.key_ticks.append(packet.pts)
    return packets


def _changes_the_decoder(packet) -> bool:
    """Whether what is to be known for decoding changes here: those who skip this key frame would not learn it.

    An MP4 or MOV file may describe its stream several times.
    """
    return _TELLS_OF_CHANGES and packet.has_sidedata("new_extradata")


def _is_hidden_vp8(packet) -> bool:
    """Whether a VP8 packet is a picture that others refer to and nobody sees; the bit for that is in its first byte."""
    return not memoryview(packet)[0] & _VP8_SHOWN


def _nal_length_size(extradata: bytes | None) -> int | None:
    """How many bytes give the length of each H.264 unit, from the avcC record; None for start codes (Annex B)."""
    if extradata and len(extradata) > 4 and extradata[0] == 1:
        return (extradata[4] & 3) + 1
    return None


def _has_idr_picture(packet, nal_length_size: int | None) -> bool:
    """Whether an H.264 key packet is an IDR picture: only after one of these does nothing refer further back.

    A container also marks recovery points (open GOP, intra refresh) as key frames; decoding cannot start cleanly there.
    """
    if nal_length_size is None:
        return False
    content = memoryview(packet)
    position = 0
    while position + nal_length_size < len(content):
        length = int.from_bytes(content[position : position + nal_length_size], "big")
        position += nal_length_size
        if content[position] & 0x1F == _H264_IDR:
            return True
        position += length
    return False


def follow_damage(frames: Iterable) -> Iterator[tuple]:
    """Each frame, and whether damage that FFmpeg noticed shows in it.

    FFmpeg flags the picture whose data is bad and not those predicted from it. These are the ones after it, up to the next
    key frame, and B-frames in front of it, which wait here for the picture that follows them.

    Args:
        frames: PyAV frames in the order they are shown.
    """
    waiting, damaged_before = deque(), False
    for frame in itertools.chain(frames, [None]):
        if frame is not None:
            waiting.append(frame)
        is_between = frame is not None and frame.pict_type == av.video.frame.PictureType.B
        damaged_ahead = any(other.is_corrupt for other in waiting)
        # Some encoders write nothing but B-frames: no more than a decoder can hold back are waited for.
        while waiting and (not is_between or len(waiting) > _MAX_REORDERED_FRAMES):
            shown = waiting.popleft()
            yield shown, shown.is_corrupt or (not shown.key_frame and (damaged_before or damaged_ahead))
            damaged_before = shown.is_corrupt or (damaged_before and not shown.key_frame)
