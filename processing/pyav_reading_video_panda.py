"""Reading a video with PyAV: opened once, its packets listed once, its frames decoded once.

Decoding begins at the first packet, or, where each key frame is a clean start, at the key frame before each frame asked for;
only the frames asked for are made into RGB. What is small stays in memory between the steps: the packets, until they are
decoded; and the frames that had to be decoded in order to count them.

Imports neither torch nor transformers: the worker of the isolated mode starts with it.

Legend of the shape comments: T frames asked for, H and W px after rotation.
"""

import bisect
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .containers_video_panda import SELF_CONTAINED_FORMATS
from .decode_limits_video_panda import VideoPandaDecodeError
from .stream_probe_video_panda import VideoPandaStreamInfo, best_video_stream, follow_damage, probe_stream

try:
    import av
except ImportError:
    av = None

_MAX_THREADS = 4
# Pixels of a whole video up to which threads take longer to start than they save.
_PIXELS_FOR_ONE_THREAD = 2**23
_MAX_KEPT_FRAME_BYTES = 2**26  # of decoded frames; more are decoded a second time
_PIXELS_FOR_ONE_CONVERTING_THREAD = 2**19


@dataclass
class VideoPandaSource:
    """An opened-up source: `content` is a real path or bytes, `name` is for messages."""

    content: str | bytes
    name: str

    def open(self):
        """What both decoders take: the path, or a file object over the bytes."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content

    def error(self, reason: str) -> VideoPandaDecodeError:
        return VideoPandaDecodeError(f"{self.name}: {reason}")


class VideoPandaPyavVideo:
    """A video that PyAV has open; to be used in a `with` block.

    Args:
        opened: the source.

    Attributes:
        info: the facts about its stream.
        can_skip: whether what is not needed for a frame may stay undecoded.

    Raises:
        VideoPandaDecodeError: it is no video, or is cut off.
    """

    info: VideoPandaStreamInfo

    def __init__(self, opened: VideoPandaSource):
        self._opened = opened
        self._frames: Iterator | None = None  # decoding goes on here
        self._counted: list | None = None  # all frames, where they were counted and are few
        self._first = None
        self._container = None
        try:
            self._container = _open_container(opened)
            self.info = self._probe()
            self.can_skip = self.info.packets is not None and self.info.groups_stand_alone
        except _pyav_errors() as error:
            self.close()
            if isinstance(error, VideoPandaDecodeError):
                raise
            raise opened.error(f"is not a video that can be read: {reason_of(error)}") from error

    def __enter__(self) -> "VideoPandaPyavVideo":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and forget its packets and frames."""
        if self._frames is not None:
            self._frames.close()
        self._frames = self._counted = self._first = None
        if self._container is not None:
            self._container.close()

    def _probe(self) -> VideoPandaStreamInfo:
        info = probe_stream(self._container)
        if info is None:
            kinds = sorted({stream.type for stream in self._container.streams})
            raise self._opened.error(f"has no video stream, only {', '.join(kinds) or 'nothing'}")
        if info.num_promised is not None and info.num_read < info.num_promised:
            raise self._opened.error(
                f"is cut off: its index promises {info.num_promised} frames, only {info.num_read} are in the file"
            )
        return info

    def count_frames(self) -> list[float]:
        """Decode all frames in order to count them.

        Returns:
            When each frame is shown, seconds; NaN where the file does not say.
        """
        times, kept, num_bytes = [], [], 0
        for frame in self._decode():
            times.append(math.nan if frame.time is None else frame.time)
            if self._first is None:
                self._first = frame
            num_bytes += sum(plane.buffer_size for plane in frame.planes)
            if num_bytes > _MAX_KEPT_FRAME_BYTES:
                kept = None
            if kept is not None:
                kept.append(frame)
        self._counted = kept
        return times

    def first_frame(self):
        """The first frame as PyAV's, which knows size and rotation.

        Raises:
            VideoPandaDecodeError: there is none.
        """
        if self._first is None and self.info.groups_stand_alone and len(self.info.key_frames) > 1:
            # It is a key frame. Decoding on until it would come by itself is for nothing where others are wanted.
            self._first = next(iter([*self._decode_packets([self.info.first_packet], 0)]), None)
        if self._first is None:
            self._frames = self._decode()
            self._first = next(self._frames, None)
        if self._first is None:
            raise self._opened.error(f"has a {self.info.codec} video stream but not a single frame in it")
        return self._first

    def _decode_packets(self, packets: Iterable, wanted: int) -> Iterator:
        """Decode packets that stand alone; what is decoded next begins anew.

        Args:
            packets: in the file's order.
            wanted: the number of a frame among them, for messages.
        """
        try:
            stream = self._decoding_stream()
            for packet in (*packets, None):
                yield from stream.decode(packet)
            stream.codec_context.flush_buffers()
        except _pyav_errors() as error:
            raise self._opened.error(f"decoding breaks on the way to frame {wanted}: {reason_of(error)}") from error

    def read(self, indices: list[int], size_px: tuple[int, int], make_array: Callable | None = None) -> np.ndarray:
        """Decode what the frames wanted need, and make RGB of those asked for. To be called once.

        Args:
            indices: frames in any order, duplicates allowed.
            size_px: (H, W) of the result.
            make_array: as in `read_frames`.

        Returns:
            uint8 (T, H, W, 3), upright.

        Raises:
            VideoPandaDecodeError: decoding breaks, or a frame asked for is damaged or missing.
        """
        shape = (len(indices), *size_px, 3)  # (T, H, W, 3)
        pictures = np.empty(shape, dtype=np.uint8) if make_array is None else make_array(shape)
        # Where the container says when each frame is shown, a frame is known by that: if the decoder leaves out one that
        # it cannot make, those after it do not move up.
        known_by = self.info.display_ticks if self.info.counts_are_exact else None
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(known_by[index] if known_by else index, []).append(place)
        upright = _VideoPandaUpright(size_px)
        groups = self._groups_of(indices) if self.can_skip and self.info.packets is not None else None
        shown = self._from_groups(groups) if groups else follow_damage(self._from_first())
        for number, (frame, is_damaged) in enumerate(shown):
            mine = places.pop(frame.pts if known_by else number, None)
            if mine is None:
                continue
            if is_damaged:
                raise self._opened.error(f"frame {indices[mine[0]]} is damaged, or one that it is predicted from")
            picture = upright(frame)
            for place in mine:
                pictures[place] = picture
            if not places:
                return pictures
        missing = sorted({indices[place] for own in places.values() for place in own})
        raise self._opened.error(f"frames {missing} were expected but cannot be decoded")

    def _groups_of(self, indices: list[int]) -> list[tuple[int, int, int]] | None:
        """The packets that a choice of frames needs, where those are fewer than all up to the last frame.

        Returns:
            (number of a key frame's packet, number behind the last packet needed of its group, a frame in it) of each group;
            or None.
        """
        if self.info.num_decoded_on_the_way(indices) > max(indices):
            return None
        packets = list(self.info.packets)
        number_of = {packet.pts: number for number, packet in enumerate(packets) if packet.size}
        keys = [number for number, packet in enumerate(packets) if packet.size and packet.is_keyframe]
        groups: dict[int, tuple[int, int, int]] = {}
        for index in indices:
            number = number_of[self.info.display_ticks[index]]
            key = keys[bisect.bisect_right(keys, number) - 1]
            stop = max(number + 1, groups[key][1] if key in groups else 0)
            groups[key] = (key, stop, index)
        return [groups[key] for key in sorted(groups)]

    def _from_groups(self, groups: list[tuple[int, int, int]]) -> Iterator:
        """The frames of the groups, and whether damage shows in each: it ends with the group."""
        packets = list(self.info.packets)
        for start, stop, wanted in groups:
            yield from follow_damage(self._decode_packets(packets[start:stop], wanted))

    def _from_first(self) -> Iterator:
        """All frames, from the first one on."""
        if self._counted is not None:
            return iter(self._counted)
        if self._frames is None:
            return self._decode()
        return itertools.chain([self._first], self._frames)

    def _decode(self) -> Iterator:
        """Decode all frames in the order they are shown: the packets that were kept, or else the file once more."""
        packets, self.info.packets = self.info.packets, None
        num_frames = 0
        try:
            if packets is not None:
                self._decoding_stream()
                while packets:
                    for frame in packets.popleft().decode():
                        yield frame
                        num_frames += 1
                return
            with _open_container(self._opened) as container:
                for frame in container.decode(self._decoding_stream(container)):
                    yield frame
                    num_frames += 1
        except _pyav_errors() as error:
            raise self._opened.error(f"decoding breaks after frame {num_frames}: {reason_of(error)}") from error

    @property
    def _is_large(self) -> bool:
        return self.info.num_read * self.info.width * self.info.height > _PIXELS_FOR_ONE_THREAD

    def _decoding_stream(self, container=None):
        """The video's stream, with so many threads as it is worth; they are set before the first packet is decoded."""
        stream = best_video_stream(container or self._container)
        if not stream.codec_context.is_open:
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = num_threads() if self._is_large else 1
        return stream


def _open_container(opened: VideoPandaSource):
    # Nothing inside a file can make FFmpeg open an address ("file" alone) or another file (no lists of files).
    # Not as `options`: those go to the streams as well, which ends the process on MPEG-PS before PyAV 17.
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(SELF_CONTAINED_FORMATS)}
    return av.open(opened.open(), container_options=options)


def _pyav_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises on a file it cannot read; IndexError where a damaged header announces streams as it goes."""
    return av.FFmpegError, ValueError, IndexError


class _VideoPandaUpright:
    """Makes RGB of decoded PyAV frames and turns it as the file says; the same pixels as decord's.

    One for a whole video: what converts is set up for the first frame, threads and all.
    """

    def __init__(self, size_px: tuple[int, int]):
        self._size_px = size_px
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._options = {"format": "rgb24"}
        if math.prod(size_px) <= _PIXELS_FOR_ONE_CONVERTING_THREAD and int(av.__version__.split(".")[0]) >= 17:
            self._options["threads"] = 1

    def __call__(self, frame) -> np.ndarray:
        """A frame as uint8 (H, W, 3)."""
        # Some streams change their size on the way; decord, too, scales to the size of the stream.
        height, width = self._size_px if frame.rotation % 180 == 0 else self._size_px[::-1]
        picture = self._reformatter.reformat(frame, width=width, height=height, **self._options).to_ndarray()
        num_turns = round(frame.rotation / 90) % 4
        if not num_turns:
            return picture
        # Whole pixels are turned, which takes a third of the time that turning their three bytes does.
        return np.rot90(picture.view("V3")[..., 0], num_turns).copy().view(np.uint8).reshape(*self._size_px, 3)


def num_threads() -> int:
    """How many threads decode a video that is worth them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MAX_THREADS, cores)


def reason_of(error: Exception) -> str:
    """The last line of a decoder's message, without its own source lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
