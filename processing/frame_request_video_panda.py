"""Which frames of a video a caller wants: one request, answered for a file or for frames that are already here."""

from dataclasses import dataclass

from transformers.video_utils import VideoMetadata

from .geometry_video_panda import (
    check_frame_indices,
    choose_frames,
    choose_frames_at_rate,
    choose_frames_at_times,
    frames_in_window,
    spread_evenly,
)
from .video_decoding_video_panda import VideoPandaVideoMetadata


@dataclass(frozen=True)
class VideoPandaFrameRequest:
    """Which frames of one video are wanted; the fields are those of the processor's call."""

    num_frames: int
    max_frames_at_fps: int | None
    fps: float | None
    frame_indices: list[int] | None
    start: float | None
    end: float | None
    do_sample: bool
    is_explicit: bool

    def choose(self, metadata: VideoMetadata) -> list[int]:
        """Frame indices for a video with this metadata.

        Args:
            metadata: `total_num_frames`, `fps` in frames per second (None: unknown) and, if it has them, the
                `source_frame_times` in seconds.

        Returns:
            Frame indices.

        Raises:
            ValueError: the request does not fit the video.
        """
        num_source_frames = metadata.total_num_frames
        if self.frame_indices is not None:
            return check_frame_indices(self.frame_indices, num_source_frames)
        window = range(num_source_frames)
        if self.start is not None or self.end is not None:
            window = frames_in_window(self._frame_times(metadata), self.start, self.end)
        if not self.do_sample:
            return list(window)
        if self.fps is not None:
            times = getattr(metadata, "source_frame_times", None)
            if times is None:
                positions = choose_frames_at_rate(len(window), metadata.fps, self.fps, self.max_frames_at_fps)
            else:
                own_times = [times[index] for index in window]
                ends = [times[window[-1] + 1]] if window[-1] + 1 < len(times) else []
                ends += [] if self.end is None or not ends else [self.end]
                positions = choose_frames_at_times(
                    own_times, metadata.fps, self.fps, self.max_frames_at_fps, end=min(ends, default=None)
                )
        else:
            positions = choose_frames(len(window), metadata.fps, self.num_frames)
        return [window[position] for position in positions]

    def choose_from_frames(self, metadata: VideoMetadata) -> list[int]:
        """The same for frames that are already here: without a frame rate they are only thinned out evenly."""
        if metadata.fps is not None or self.frame_indices is not None or not self.do_sample:
            return self.choose(metadata)
        if self.fps is not None or self.start is not None or self.end is not None:
            raise ValueError(
                "`fps`, `start` and `end` need to know the frame rate of the frames; pass it as "
                "video_metadata={'fps': ..., 'total_num_frames': ...}"
            )
        if metadata.total_num_frames <= self.num_frames:
            return list(range(metadata.total_num_frames))
        return spread_evenly(metadata.total_num_frames, self.num_frames)

    @staticmethod
    def _frame_times(metadata: VideoMetadata) -> list[float]:
        times = getattr(metadata, "source_frame_times", None)
        if times is not None:
            return times
        if metadata.fps is None:
            raise ValueError("`start` and `end` need the frame rate of the video, which is unknown")
        return [index / metadata.fps for index in range(metadata.total_num_frames)]


def indices_per_video(frame_indices, num_videos: int) -> list[list[int] | None]:
    """The `frame_indices` of each video: one list goes for all of them.

    Args:
        frame_indices: None, one list of frame numbers, or one list a video; as `plain_options` gives them.
        num_videos: how many videos there are.

    Returns:
        `num_videos` lists, or None where nothing was asked.

    Raises:
        ValueError: the number of lists is not that of the videos.
    """
    if frame_indices is None:
        return [None] * num_videos
    if not any(isinstance(item, list) for item in frame_indices):
        return [frame_indices] * num_videos
    if len(frame_indices) != num_videos:
        raise ValueError(
            f"`frame_indices` has {len(frame_indices)} lists, expected one for each of {num_videos} videos"
        )
    return [list(indices) for indices in frame_indices]


def choose_present(
    request: VideoPandaFrameRequest, known: VideoPandaVideoMetadata | None, num_present: int, resample: bool
) -> tuple[list[int], VideoPandaVideoMetadata]:
    """Choose among frames that are already here.

    Args:
        request: what is wanted.
        known: what the caller says about the frames, or None. Frames that are a choice out of a longer video say so by
            a larger `total_num_frames` and their `frames_indices`; then they are only chosen from if asked.
        num_present: how many frames there are.
        resample: whether to choose at all.

    Returns:
        (positions among the frames, metadata whose `frames_indices` count in the source).

    Raises:
        ValueError: the request does not fit the frames.
    """
    metadata = known or VideoPandaVideoMetadata(total_num_frames=num_present)
    if metadata.total_num_frames is None:
        metadata.total_num_frames = num_present
    source_indices = metadata.frames_indices
    if source_indices is None and metadata.total_num_frames != num_present:
        raise ValueError(
            f"`video_metadata` says total_num_frames={metadata.total_num_frames}, but {num_present} frames were given; "
            "frames picked out of a longer video need `frames_indices` as well"
        )
    if source_indices is not None and len(source_indices) != num_present:
        raise ValueError(
            f"`video_metadata` has {len(source_indices)} `frames_indices`, but {num_present} frames were given"
        )
    is_choice_already = source_indices is not None and metadata.total_num_frames != num_present
    if not resample or (is_choice_already and not request.is_explicit):
        positions = list(range(num_present))
    else:
        # The source's frame rate says nothing about frames picked out of it.
        fps = None if is_choice_already else metadata.fps
        present = VideoPandaVideoMetadata(total_num_frames=num_present, fps=fps)
        times = metadata.source_frame_times
        if not is_choice_already and times is not None and len(times) == num_present:
            present.source_frame_times = times
        if is_choice_already and (request.fps or request.start is not None or request.end is not None):
            raise ValueError("`fps`, `start` and `end` cannot be asked of frames that are a choice already")
        positions = request.choose_from_frames(present)
    if metadata.duration is None and metadata.fps:
        metadata.duration = metadata.total_num_frames / metadata.fps
    metadata.frames_indices = [source_indices[place] if source_indices is not None else place for place in positions]
    return positions, metadata
