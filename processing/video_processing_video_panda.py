"""The video processor: from files, arrays or pictures to `pixel_values_videos` and `video_grid_thw`.

Works without torchvision: it subclasses transformers' `VideoProcessorMixin` and decodes with its own reader. Source of
the frame rule and the geometry: the behaviour of the authors' release, minus its random left-right flip, which makes
answers random and swaps left and right.

Legend: T frames, C = 3 channels, S px a side of the canvas.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata

from .canvas_video_panda import VideoPandaCanvas, as_channel_triplet, as_uint8_frames
from .geometry_video_panda import (
    check_frame_indices,
    choose_frames,
    choose_frames_at_rate,
    frames_in_window,
    spread_evenly,
)
from .sources_video_panda import load_rgb_image
from .video_decoding_video_panda import VideoPandaVideoMetadata, decode_video
from .video_inputs_video_panda import (
    describe_video,
    flatten_metadata,
    flatten_videos,
    is_array,
    is_video_file,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VideoPandaVideosKwargs(VideosKwargs, total=False):
    """What the video processor takes beyond transformers' own options.

    Attributes:
        image_size: side of the canvas, px.
        patch_size: side of one patch, px.
        downsample_window: patches a side that become one token.
        frame_indices: the frames to take, for every video, or one list a video.
        start: take frames from here on, seconds.
        end: take frames up to here, itself left out, seconds.
        allow_urls: whether http(s) addresses may be fetched; off unless asked for.
    """

    image_size: int | None
    patch_size: int | None
    downsample_window: int | None
    frame_indices: list[int] | list[list[int]] | None
    start: int | float | None
    end: int | float | None
    allow_urls: bool | None


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
            positions = choose_frames_at_rate(len(window), metadata.fps, self.fps, self.max_frames_at_fps)
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


class VideoPandaVideoProcessor(VideoProcessorMixin):
    """Decodes videos, chooses frames, pastes them on a square canvas and normalises them.

    Args:
        image_size: side of the canvas, px. Default 448.
        patch_size: side of one patch, px. Default 14.
        downsample_window: patches a side that become one token. Default 2.
        num_frames: frames of one video. Default 8.
        fps: frames per second to take instead of the release's rule; at most `num_frames` of them.
        image_mean, image_std: of each channel, for pixels in [0, 1]. Default CLIP's.
        do_resize, do_rescale, do_normalize, do_convert_rgb, do_sample_frames: the steps; all on.

    Raises:
        ValueError: a value of the wrong kind, or sizes that do not fit each other.
    """

    _auto_class = "AutoVideoProcessor"
    valid_kwargs = VideoPandaVideosKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]  # noqa: RUF012 (transformers' contract)

    image_size = 448
    patch_size = 14
    downsample_window = 2
    num_frames = 8
    image_mean = CLIP_MEAN
    image_std = CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    allow_urls = False

    def __init__(self, **kwargs):
        self._check_kwargs({key: value for key, value in kwargs.items() if key in self.valid_kwargs.__annotations__})
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self._canvas({})

    @property
    def tokens_per_side(self) -> int:
        """G, tokens a side of the canvas."""
        return self._canvas({}).tokens_per_side

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """Turn videos into the model's inputs.

        Args:
            videos: a path, `Path`, bytes or (with `allow_urls`) URL; a numpy array or tensor (T, H, W, C) or
                (T, C, H, W), uint8 or float in [0, 1]; a list of PIL images, arrays or picture files, which are the
                frames of one video and are not sampled unless asked; or a (nested) list of several of these.
            **kwargs: see `VideoPandaVideosKwargs` and transformers' `VideosKwargs`. `num_frames`, `fps` (all frames
                at that rate, or at most `num_frames` if that is given too), `frame_indices`, `start`, `end`,
                `do_sample_frames=False` (all frames), `video_metadata` (the frame rate of arrays),
                `return_metadata=True`, `return_tensors` ("pt" unless given).

        Returns:
            `pixel_values_videos`: float32 (num_videos, T, 3, S, S), shorter videos padded at the end with zeros
            (uint8 canvases if neither rescaled nor normalised); `video_grid_thw`: int64 (num_videos, 3), the true T,
            and h, w in tokens; with `return_metadata`, `video_metadata`: one a video, with `frames_indices`,
            `timestamps` in seconds and `video_backend`.

        Raises:
            ValueError: an option or a video that does not fit, or damaged data; says which and why.
            OSError: a file that is missing or not a regular file, or a URL that cannot be fetched.
        """
        self._check_kwargs(kwargs)
        given = {key: value for key, value in kwargs.items() if value is not None}
        canvas = self._canvas(given)
        sources = flatten_videos(videos)
        requests = self._requests(given, len(sources))
        frames, metadata = self._decode_and_sample_videos(
            sources,
            given.get("video_metadata"),
            requests=requests,
            allow_urls=given.get("allow_urls", self.allow_urls),
            input_data_format=given.get("input_data_format", getattr(self, "input_data_format", None)),
            do_convert_rgb=given.get("do_convert_rgb", self.do_convert_rgb),
        )
        output = self._preprocess(frames, canvas)
        output = BatchFeature(data=dict(output), tensor_type=kwargs.get("return_tensors") or "pt")
        if given.get("return_metadata", self.return_metadata):
            output["video_metadata"] = metadata
        return output

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        **kwargs,
    ) -> np.ndarray:
        """The frames the processor takes of a video with this metadata.

        Args:
            metadata: `total_num_frames` and `fps` of the video.
            num_frames: how many; the processor's own unless given.
            fps: frames per second to take instead of the release's rule.
            **kwargs: `frame_indices`, `start`, `end` as in the call.

        Returns:
            int64 array of frame indices.

        Raises:
            ValueError: the request does not fit the video.
        """
        given = {"num_frames": num_frames, "fps": fps, **kwargs}
        request = self._requests({key: value for key, value in given.items() if value is not None}, 1)[0]
        return np.array(request.choose(metadata), dtype=np.int64)

    # transformers' own fetch_videos is hard-wired to torchcodec and torchvision.
    def fetch_videos(
        self, video_url_or_urls, sample_indices_fn: Callable | None = None, allow_urls: bool | None = None
    ):
        """Decode one file, or a list of them, with this package's reader.

        Args:
            video_url_or_urls: a path, bytes or, where allowed, URL; or a list of these.
            sample_indices_fn: gives the frame indices for a `VideoMetadata`; the processor's own rule unless given.
            allow_urls: whether URLs may be fetched; the processor's own setting unless given.

        Returns:
            (frames uint8 (T, H, W, 3), metadata); for a list, a pair of lists.

        Raises:
            ValueError, OSError: as `decode_video`.
        """
        if isinstance(video_url_or_urls, (list, tuple)):
            pairs = [self.fetch_videos(source, sample_indices_fn, allow_urls) for source in video_url_or_urls]
            return [frames for frames, _ in pairs], [metadata for _, metadata in pairs]
        choose = sample_indices_fn or self._requests({}, 1)[0].choose
        allow_urls = self.allow_urls if allow_urls is None else allow_urls
        return decode_video(video_url_or_urls, choose, allow_urls=bool(allow_urls))

    # transformers' own needs torchvision, refuses lists of pictures when sampling, and knows no frame indices.
    def _decode_and_sample_videos(
        self,
        videos: list,
        video_metadata=None,
        *,
        requests: list[VideoPandaFrameRequest],
        allow_urls: bool = False,
        input_data_format: str | None = None,
        do_convert_rgb: bool = True,
    ) -> tuple[list[list[torch.Tensor]], list[VideoMetadata]]:
        """The chosen frames of each video as uint8 tensors (T_i, 3, H_i, W_i), and the metadata."""
        all_frames, all_metadata = [], []
        for place, (video, known, request) in enumerate(
            zip(videos, flatten_metadata(video_metadata, len(videos)), requests)
        ):
            name = describe_video(video, place)
            if is_video_file(video):
                frames_THWC, metadata = self.fetch_videos(video, request.choose, allow_urls)
                frames = [frames_THWC.permute(0, 3, 1, 2)]
            elif is_array(video):
                frames_TCHW = as_uint8_frames(video, name, input_data_format, do_convert_rgb)
                indices, metadata = _choose_present(request, known, len(frames_TCHW), resample=request.do_sample)
                frames = [
                    frames_TCHW
                    if len(indices) == len(frames_TCHW) and not request.is_explicit
                    else frames_TCHW[indices]
                ]
                metadata.height, metadata.width = frames_TCHW.shape[-2:]
            else:
                indices, metadata = _choose_present(request, known, len(video), resample=request.is_explicit)
                frames = [
                    self._as_frame(video[index], f"{name}[{index}]", input_data_format, do_convert_rgb, allow_urls)
                    for index in indices
                ]
                metadata.height, metadata.width = frames[0].shape[-2:]
            all_frames.append(frames)
            all_metadata.append(metadata)
        return all_frames, all_metadata

    @staticmethod
    def _as_frame(picture, name: str, input_data_format, do_convert_rgb: bool, allow_urls: bool) -> torch.Tensor:
        """One picture of a list as uint8 (1, 3, H, W)."""
        if is_array(picture):
            return as_uint8_frames(picture[None], name, input_data_format, do_convert_rgb)
        return load_rgb_image(picture, allow_urls=bool(allow_urls), convert_rgb=do_convert_rgb)[None]

    def _preprocess(self, videos: list[list[torch.Tensor]], canvas: VideoPandaCanvas) -> dict[str, torch.Tensor]:
        """Paste and normalise; shorter videos are padded at the end with zeros."""
        pasted = [canvas.paste(frames) for frames in videos]
        most = max(len(canvases) for canvases, _ in pasted)
        pixels = torch.zeros(len(pasted), most, 3, canvas.image_size, canvas.image_size, dtype=canvas.dtype)
        for place, (canvases_TCSS, _) in enumerate(pasted):
            canvas.fill(pixels[place, : len(canvases_TCSS)], canvases_TCSS)
        grids = [(len(canvases), h, w) for canvases, (h, w) in pasted]
        return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids, dtype=torch.int64)}

    def _check_kwargs(self, kwargs: dict) -> None:
        checked = {key: value for key, value in kwargs.items() if value is not None}
        if isinstance(checked.get("frame_indices"), (tuple, range, np.ndarray)):
            checked["frame_indices"] = np.asarray(checked["frame_indices"]).tolist()
        try:
            validate_typed_dict(self.valid_kwargs, checked)
        except (StrictDataclassError, TypeError) as error:
            raise ValueError(f"VideoPandaVideoProcessor: {error}") from error
        for key in ("size", "crop_size", "do_center_crop", "do_pad"):
            if checked.get(key):
                raise ValueError(
                    f"`{key}` is not an option of VideoPandaVideoProcessor, got {checked[key]!r}; the canvas is a "
                    "square of `image_size` px, and pictures are neither cropped nor padded otherwise"
                )

    def _canvas(self, given: dict) -> VideoPandaCanvas:
        names = ("image_size", "patch_size", "downsample_window", "rescale_factor")
        steps = ("do_resize", "do_rescale", "do_normalize")
        chosen = {name: given.get(name, getattr(self, name)) for name in names + steps}
        for name in ("image_mean", "image_std"):
            chosen[name] = as_channel_triplet(name, given.get(name, getattr(self, name)))
        return VideoPandaCanvas(**chosen)

    def _requests(self, given: dict, num_videos: int) -> list[VideoPandaFrameRequest]:
        """One request a video; they differ in `frame_indices` only."""
        by_index = given.get("frame_indices")
        if by_index is not None:
            others = [name for name in ("num_frames", "fps", "start", "end") if given.get(name) is not None]
            if others:
                raise ValueError(f"`frame_indices` already says which frames to take; got {', '.join(others)} as well")
        num_frames = given.get("num_frames", self.num_frames)
        if isinstance(num_frames, bool) or num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames!r}")
        sampling = ("num_frames", "fps", "frame_indices", "start", "end")
        shared = {
            "num_frames": num_frames,
            # A rate given in the call means all frames at that rate, unless the call limits them as well.
            "max_frames_at_fps": given.get("num_frames") if "fps" in given else num_frames,
            "fps": given.get("fps", getattr(self, "fps", None)),
            "start": given.get("start"),
            "end": given.get("end"),
            "do_sample": given.get("do_sample_frames", self.do_sample_frames),
            "is_explicit": bool(given.get("do_sample_frames")) or any(name in given for name in sampling),
        }
        return [
            VideoPandaFrameRequest(frame_indices=indices, **shared)
            for indices in _indices_per_video(by_index, num_videos)
        ]


def _indices_per_video(frame_indices, num_videos: int) -> list[list[int] | None]:
    if frame_indices is None:
        return [None] * num_videos
    frame_indices = list(frame_indices)
    if not any(isinstance(item, (list, tuple, range, np.ndarray)) for item in frame_indices):
        return [frame_indices] * num_videos
    if len(frame_indices) != num_videos:
        raise ValueError(
            f"`frame_indices` has {len(frame_indices)} lists, expected one for each of {num_videos} videos"
        )
    return [list(indices) for indices in frame_indices]


def _choose_present(
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
    """
    metadata = known or VideoPandaVideoMetadata(total_num_frames=num_present)
    if metadata.total_num_frames is None:
        metadata.total_num_frames = num_present
    source_indices = metadata.frames_indices
    if source_indices is not None and len(source_indices) != num_present:
        source_indices = None
    is_choice_already = source_indices is not None and metadata.total_num_frames != num_present
    if not resample or (is_choice_already and not request.is_explicit):
        positions = list(range(num_present))
    else:
        present = VideoPandaVideoMetadata(total_num_frames=num_present, fps=metadata.fps)
        if is_choice_already and (request.fps or request.start is not None or request.end is not None):
            raise ValueError("`fps`, `start` and `end` cannot be asked of frames that are a choice already")
        positions = request.choose_from_frames(present)
    metadata.frames_indices = [source_indices[place] if source_indices is not None else place for place in positions]
    return positions, metadata
