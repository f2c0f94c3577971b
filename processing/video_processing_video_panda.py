"""The video processor: from files, arrays or pictures to `pixel_values_videos` and `video_grid_thw`.

Works without torchvision: it subclasses transformers' `VideoProcessorMixin` and decodes with its own reader. Source of
the frame rule and the geometry: the behaviour of the authors' release, minus its random left-right flip, which makes
answers random and swaps left and right.

Legend: T frames, C = 3 channels, S px a side of the canvas.
"""

import os
from collections.abc import Callable

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata

from .canvas_video_panda import VideoPandaCanvas, VideoPandaCanvasMixin, as_uint8_frames
from .decode_limits_video_panda import VideoPandaDecodeLimits
from .frame_request_video_panda import VideoPandaFrameRequest, choose_present, indices_per_video
from .options_video_panda import check_names, plain_options
from .sources_video_panda import load_rgb_image
from .video_decoding_video_panda import decode_video
from .video_inputs_video_panda import (
    describe_video,
    flatten_metadata,
    flatten_videos,
    is_array,
    is_video_file,
)


class VideoPandaVideoProcessorKwargs(VideosKwargs, total=False):
    """What the video processor takes beyond transformers' own options.

    Attributes:
        image_size: side of the canvas, px.
        patch_size: side of one patch, px.
        downsample_window: patches a side that become one token.
        frame_indices: the frames to take, for every video, or one list a video.
        start: take frames from here on, seconds.
        end: take frames up to here, itself left out, seconds.
        allow_urls: whether http(s) addresses may be fetched; off unless asked for.
        allowed_dirs: a folder, or several, out of which no path may lead; anywhere unless given.
        isolate: whether files are decoded in a process of their own; URLs only unless given.
    """

    image_size: int | None
    patch_size: int | None
    downsample_window: int | None
    frame_indices: list[int] | list[list[int]] | None
    start: int | float | None
    end: int | float | None
    allow_urls: bool | None
    allowed_dirs: str | os.PathLike | list[str | os.PathLike] | None
    isolate: bool | None


class VideoPandaVideoProcessor(VideoPandaCanvasMixin, VideoProcessorMixin):
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
    valid_kwargs = VideoPandaVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]  # noqa: RUF012 (transformers' contract)

    per_call_kwargs = ("frame_indices", "start", "end", "video_metadata", "return_tensors")
    num_frames = 8
    do_sample_frames = True
    isolate = None

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """Turn videos into the model's inputs.

        Args:
            videos: a path, `Path`, bytes or (with `allow_urls`) URL; a numpy array or tensor (T, H, W, C) or
                (T, C, H, W), uint8 or float in [0, 1]; a list of PIL images, arrays or picture files, which are the
                frames of one video and are not sampled unless asked; or a (nested) list of several of these.
            **kwargs: see `VideoPandaVideoProcessorKwargs` and transformers' `VideosKwargs`. `num_frames`, `fps` (all frames
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
        kwargs = plain_options(kwargs)
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
            allowed_dirs=given.get("allowed_dirs", self.allowed_dirs),
            isolate=given.get("isolate", self.isolate),
            input_data_format=given.get("input_data_format", self.input_data_format),
            do_convert_rgb=given.get("do_convert_rgb", self.do_convert_rgb),
        )
        tensors = self._preprocess(frames, canvas)
        if "device" in given:
            tensors = {key: tensor.to(given["device"]) for key, tensor in tensors.items()}
        output = BatchFeature(data=tensors, tensor_type=kwargs.get("return_tensors") or "pt")
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
        given = plain_options({"num_frames": num_frames, "fps": fps, **kwargs})
        check_names(kwargs, ("frame_indices", "start", "end", "do_sample_frames"), "sample_frames")
        request = self._requests({key: value for key, value in given.items() if value is not None}, 1)[0]
        return np.array(request.choose(metadata), dtype=np.int64)

    # transformers' own fetch_videos is hard-wired to torchcodec and torchvision.
    def fetch_videos(
        self,
        video_url_or_urls,
        sample_indices_fn: Callable | None = None,
        allow_urls: bool | None = None,
        *,
        allowed_dirs: str | os.PathLike | list[str | os.PathLike] | None = None,
        isolate: bool | None = None,
        limits: VideoPandaDecodeLimits | None = None,
    ):
        """Decode one file, or a list of them, with this package's reader.

        Args:
            video_url_or_urls: a path, bytes or, where allowed, URL; or a list of these.
            sample_indices_fn: gives the frame indices for a `VideoMetadata`; the processor's own rule unless given.
            allow_urls, allowed_dirs, isolate: as in `decode_video`; the processor's own settings unless given.
            limits: as in `decode_video`.

        Returns:
            (frames uint8 (T, H, W, 3), metadata); for a list, a pair of lists.

        Raises:
            ValueError, OSError: as `decode_video`.
        """
        if isinstance(video_url_or_urls, (list, tuple)):
            options = {"allowed_dirs": allowed_dirs, "isolate": isolate, "limits": limits}
            pairs = [
                self.fetch_videos(source, sample_indices_fn, allow_urls, **options) for source in video_url_or_urls
            ]
            return [frames for frames, _ in pairs], [metadata for _, metadata in pairs]
        choose = sample_indices_fn or self._requests({}, 1)[0].choose
        return decode_video(
            video_url_or_urls,
            choose,
            allow_urls=bool(self.allow_urls if allow_urls is None else allow_urls),
            allowed_dirs=self.allowed_dirs if allowed_dirs is None else allowed_dirs,
            isolate=self.isolate if isolate is None else isolate,
            limits=limits,
        )

    # transformers' own needs torchvision, refuses lists of pictures when sampling, and knows no frame indices.
    def _decode_and_sample_videos(
        self,
        videos: list,
        video_metadata=None,
        *,
        requests: list[VideoPandaFrameRequest],
        allow_urls: bool = False,
        allowed_dirs: str | os.PathLike | list[str | os.PathLike] | None = None,
        isolate: bool | None = None,
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
                if known is not None:
                    raise ValueError(f"{name}: `video_metadata` is for frames that are given; a file says it itself")
                frames_THWC, metadata = self.fetch_videos(
                    video, request.choose, allow_urls, allowed_dirs=allowed_dirs, isolate=isolate
                )
                frames = [frames_THWC.permute(0, 3, 1, 2)]
            elif is_array(video):
                frames_TCHW = as_uint8_frames(video, name, input_data_format, do_convert_rgb)
                indices, metadata = choose_present(
                    request, known, len(frames_TCHW), resample=request.do_sample or request.is_explicit
                )
                frames = [
                    frames_TCHW
                    if len(indices) == len(frames_TCHW) and not request.is_explicit
                    else frames_TCHW[indices]
                ]
                metadata.height, metadata.width = frames_TCHW.shape[-2:]
            else:
                indices, metadata = choose_present(request, known, len(video), resample=request.is_explicit)
                access = {"allow_urls": bool(allow_urls), "allowed_dirs": allowed_dirs}
                frames = [
                    self._as_frame(video[index], f"{name}[{index}]", input_data_format, do_convert_rgb, access)
                    for index in indices
                ]
                metadata.height, metadata.width = frames[0].shape[-2:]
            all_frames.append(frames)
            all_metadata.append(metadata)
        return all_frames, all_metadata

    @staticmethod
    def _as_frame(picture, name: str, input_data_format, do_convert_rgb: bool, access: dict) -> torch.Tensor:
        """One picture of a list as uint8 (1, 3, H, W)."""
        if is_array(picture):
            return as_uint8_frames(picture[None], name, input_data_format, do_convert_rgb)
        return load_rgb_image(picture, convert_rgb=do_convert_rgb, **access)[None]

    def _preprocess(self, videos: list[list[torch.Tensor]], canvas: VideoPandaCanvas) -> dict[str, torch.Tensor]:
        """Paste and normalise; shorter videos are padded at the end with zeros."""
        pasted = [canvas.paste(frames) for frames in videos]
        most = max(len(canvases) for canvases, _ in pasted)
        pixels = torch.zeros(len(pasted), most, 3, canvas.image_size, canvas.image_size, dtype=canvas.dtype)
        for place, (canvases_TCSS, _) in enumerate(pasted):
            canvas.fill(pixels[place, : len(canvases_TCSS)], canvases_TCSS)
        grids = [(len(canvases), h, w) for canvases, (h, w) in pasted]
        return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids, dtype=torch.int64)}

    def _requests(self, given: dict, num_videos: int) -> list[VideoPandaFrameRequest]:
        """One request a video; they differ in `frame_indices` only."""
        by_index = given.get("frame_indices")
        if by_index is not None:
            others = [name for name in ("num_frames", "fps", "start", "end") if given.get(name) is not None]
            if others:
                raise ValueError(f"`frame_indices` already says which frames to take; got {', '.join(others)} as well")
        num_frames = given.get("num_frames", self.num_frames)
        sampling = ("num_frames", "fps", "frame_indices", "start", "end")
        shared = {
            "num_frames": num_frames,
            # A rate given in the call means all frames at that rate, unless the call limits them as well.
            "max_frames_at_fps": given.get("num_frames") if "fps" in given else num_frames,
            "fps": given.get("fps", self.fps),
            "start": given.get("start"),
            "end": given.get("end"),
            "do_sample": given.get("do_sample_frames", self.do_sample_frames),
            "is_explicit": bool(given.get("do_sample_frames")) or any(name in given for name in sampling),
        }
        return [
            VideoPandaFrameRequest(frame_indices=indices, **shared)
            for indices in indices_per_video(by_index, num_videos)
        ]
