"""Sorting out what a caller passed as `videos`: one or many, files or frames.

A list of pictures, or of paths that end like pictures, is the frames of *one* video; a list of anything else is
several videos. Nested lists (one a prompt) are flattened down to the videos in them.
"""

import os
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from .geometry_video_panda import check_fps
from .sources_video_panda import describe_source, is_image_file_name
from .video_decoding_video_panda import VideoPandaVideoMetadata


def is_array(value, num_dimensions: int | None = None) -> bool:
    """Whether a value is a numpy array or tensor, of so many dimensions if given."""
    return isinstance(value, (np.ndarray, torch.Tensor)) and num_dimensions in (None, value.ndim)


def is_frame(value) -> bool:
    """Whether a value is one picture of a video: a PIL image, a 3-dimensional array, or the name of a picture file."""
    return isinstance(value, Image.Image) or is_array(value, 3) or is_image_file_name(value)


def is_video_file(value) -> bool:
    """Whether a value stands for an encoded video: a path, URL or bytes, and not the name of a picture file."""
    return isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview)) and not is_image_file_name(value)


def flatten_videos(videos) -> list:
    """The videos in whatever a caller passed.

    Args:
        videos: a path, `Path`, URL, bytes, 4-dimensional array, picture, list of pictures, or lists of these; a
            5-dimensional array is a batch.

    Returns:
        One entry a video: a path, URL or bytes; a 4-dimensional array; or a list of pictures.

    Raises:
        ValueError: nothing there, of an unknown kind, or pictures and videos mixed in one list.
    """
    if is_video_file(videos) or is_array(videos, 4):
        return [videos]
    if is_array(videos, 5):
        return list(videos)
    if is_frame(videos):
        return [[videos]]
    if not isinstance(videos, (list, tuple)):
        shape = f" of shape {tuple(videos.shape)}" if is_array(videos) else ""
        raise ValueError(
            "`videos` must be a path, URL, bytes, array of 4 dimensions, list of pictures, or a list of these; "
            f"got {type(videos).__name__}{shape}"
        )
    if not videos:
        raise ValueError("`videos` holds an empty list; expected at least one video or frame")
    num_pictures = sum(is_frame(item) for item in videos)
    if num_pictures == len(videos):
        return [list(videos)]
    if num_pictures:
        raise ValueError(
            f"`videos` holds a list of {len(videos)} items of which {num_pictures} are pictures; expected pictures "
            "only (the frames of one video) or videos only"
        )
    return [video for item in videos for video in flatten_videos(item)]


def count_videos_per_prompt(videos) -> list[int] | None:
    """How many videos each prompt has, if they are given in one list for each.

    Args:
        videos: as in `flatten_videos`, with empty lists for prompts without any.

    Returns:
        Their numbers, or None where there is no such nesting: [[frame, frame], [frame]] may be two prompts or the two
        videos of one.
    """
    if not isinstance(videos, (list, tuple)) or not videos or not all(isinstance(own, (list, tuple)) for own in videos):
        return None
    if all(own and all(is_frame(item) for item in own) for own in videos):
        return None
    return [len(flatten_videos(own)) if own else 0 for own in videos]


def without_empty(visuals):
    """Drop the empty lists of a batch in which some prompts have no visuals; None if nothing is left of it."""
    if not isinstance(visuals, (list, tuple)) or not any(isinstance(own, (list, tuple)) and not own for own in visuals):
        return visuals
    return [own for own in visuals if not (isinstance(own, (list, tuple)) and not own)] or None


def describe_video(video, place: int) -> str:
    """How an error message calls one of the videos."""
    return describe_source(video) if is_video_file(video) else f"videos[{place}]"


def flatten_metadata(video_metadata, num_videos: int) -> list[VideoPandaVideoMetadata | None]:
    """One metadata object a video, copied, so that a caller's own stays as it was.

    Args:
        video_metadata: None, one mapping or `VideoMetadata`, or (nested) lists of these with None where unknown.
        num_videos: how many there must be.

    Returns:
        `num_videos` objects or None.

    Raises:
        ValueError: their number is wrong, or one of them is something else or has unknown fields.
    """
    if video_metadata is None:
        return [None] * num_videos
    pending = list(video_metadata) if isinstance(video_metadata, (list, tuple)) else [video_metadata]
    flat = []
    while pending:
        item = pending.pop(0)
        if isinstance(item, (list, tuple)):
            pending = [*item, *pending]
        elif item is None:
            flat.append(None)
        elif isinstance(item, (Mapping, VideoMetadata)):
            flat.append(_copy_metadata(item))
        else:
            raise ValueError(f"`video_metadata` must hold mappings or VideoMetadata, got {type(item).__name__}")
    if len(flat) != num_videos:
        raise ValueError(f"`video_metadata` has {len(flat)} entries, expected one for each of {num_videos} videos")
    return flat


def _copy_metadata(item) -> VideoPandaVideoMetadata:
    fields = dict(item)
    try:
        copy = VideoPandaVideoMetadata(**{"total_num_frames": None, **fields})
    except TypeError as error:
        raise ValueError(f"`video_metadata` has a field that is not known: {error}") from error
    if copy.fps is not None:
        check_fps(copy.fps, "video_metadata.fps")
    copy.source_frame_times = getattr(item, "source_frame_times", None)
    return copy
