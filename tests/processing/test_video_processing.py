"""From whatever a caller has to the model's video inputs, against the release's numbers and by hand."""

import json
import math
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import barcode_frame, read_barcodes, write_clip
from PIL import Image
from safetensors.torch import load_file
from transformers.video_utils import VideoMetadata

from video_panda.processing import frame_reading_video_panda as decoding
from video_panda.processing import stream_probe_video_panda as stream_probe
from video_panda.processing.canvas_video_panda import CLIP_MEAN, CLIP_STD
from video_panda.processing.video_processing_video_panda import VideoPandaVideoProcessor

SHARED = Path(__file__).parents[2].parent / "shared"
NUM_FRAMES = 60


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """60 frames at 10 a second, 160 x 96 px."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", NUM_FRAMES, 10, width=160, height=96)


@pytest.fixture(scope="module")
def processor():
    return VideoPandaVideoProcessor()


@pytest.fixture(scope="module")
def small():
    """A processor of the golden checkpoint's size: 84 px, 3 x 3 tokens."""
    return VideoPandaVideoProcessor(image_size=84)


def frames_array(indices, width=160, height=96):
    return np.stack([barcode_frame(index, width, height) for index in indices])


def shown(output, place=0):
    """The numbers on the frames of one video in a batch, read back from the canvas."""
    pixels = output["pixel_values_videos"][place]
    num_frames, h, w = output["video_grid_thw"][place].tolist()
    side = pixels.shape[-1]
    top, left = side * ((16 - h) // 2) // 16, side * ((16 - w) // 2) // 16
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    picture = (pixels * std + mean)[:num_frames, :, top : top + side * h // 16, left : left + side * w // 16]
    return read_barcodes(picture.mul(255).permute(0, 2, 3, 1))


GOLDEN_CLIPS = ["sample_demo_1.mp4", "sample_demo_3.mp4", "flipping_a_pancake.mkv", "video_90.mov"]


@pytest.mark.parametrize("name", GOLDEN_CLIPS)
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_golden_numbers(processor, monkeypatch, name, backend):
    golden_file, video = SHARED / "golden" / "preprocess.safetensors", SHARED / "videos" / name
    if not golden_file.exists() or not video.exists():
        pytest.skip(f"{golden_file} or {video} is not here")
    golden = {key.removeprefix(f"{name}/"): value for key, value in load_file(golden_file).items() if name in key}
    if backend == "pyav":
        monkeypatch.setattr(decoding, "_import_decord", lambda: None)
    # decord reads what is too large to be kept, unless PyAV has no more to do.
    monkeypatch.setattr(decoding, "_PIXELS_OF_OPENING", float("-inf"))
    monkeypatch.setattr(stream_probe, "_MAX_KEPT_BYTES", 0)
    # The file of three frames is given as its three frames; the release fills the other places with noise.
    output = processor(video, do_sample_frames=name != "video_90.mov", return_metadata=True)
    metadata = output["video_metadata"][0]
    assert metadata.video_backend == backend
    assert metadata.frames_indices == golden["indices"].tolist()
    num_frames = len(golden["indices"])
    assert output["video_grid_thw"].tolist() == [[num_frames, *golden["grid"].tolist()]]
    blocks = torch.nn.functional.avg_pool2d(output["pixel_values_videos"][0], 28)
    # The file calls the shape (frames, 3, 16, 16), but its values lie in the order (frames, 16, 16, 3): row 0 of
    # "channel 0" repeats the three channels of the background.
    expected = golden["blocks"].reshape(num_frames, 16, 16, 3).permute(0, 3, 1, 2)
    assert (blocks - expected).abs().max() <= 0.02
    rows, columns = golden["offset"].tolist()
    h, w = golden["grid"].tolist()
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[rows : rows + h, columns : columns + w] = False
    background = (torch.tensor([math.floor(255 * mean) for mean in CLIP_MEAN]) / 255 - torch.tensor(CLIP_MEAN)) / (
        torch.tensor(CLIP_STD)
    )
    assert torch.allclose(
        blocks[:, :, outside], background[None, :, None].expand(num_frames, 3, outside.sum()), atol=1e-5
    )


def test_corrupted_clip_of_the_wild(processor):
    video = SHARED / "videos" / "corrupted.mp4"
    if not video.exists():
        pytest.skip(f"{video} is not here")
    with pytest.raises(ValueError, match=r"corrupted\.mp4.*breaks after frame \d+"):
        processor(video)


def test_output_of_one_file(processor, clip):
    output = processor(clip, return_metadata=True)
    assert output["pixel_values_videos"].dtype == torch.float32
    assert tuple(output["pixel_values_videos"].shape) == (1, 8, 3, 448, 448)
    assert output["video_grid_thw"].dtype == torch.int64
    assert output["video_grid_thw"].tolist() == [[8, 10, 16]]
    # Six seconds give six candidates, too few: eight frames as far apart as they go.
    expected = [0, 8, 16, 24, 32, 40, 48, 56]
    assert output["video_metadata"][0].frames_indices == expected
    assert output["video_metadata"][0].timestamps == pytest.approx([index / 10 for index in expected])
    assert shown(output) == expected
    assert "video_metadata" not in processor(clip)


@pytest.mark.parametrize("kind", ["str", "Path", "bytes", "list", "nested"])
def test_the_forms_of_a_file(processor, clip, kind):
    given = {"str": str(clip), "Path": clip, "bytes": clip.read_bytes(), "list": [str(clip)], "nested": [[clip]]}[kind]
    assert torch.equal(processor(given)["pixel_values_videos"], processor(clip)["pixel_values_videos"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_frames": 4}, [0, 10, 30, 50]),
        ({"num_frames": 1}, [0]),
        ({"fps": 1}, [0, 10, 20, 30, 40, 50]),
        ({"fps": 2.5}, list(range(0, 60, 4))),
        ({"fps": 2.5, "num_frames": 4}, [0, 16, 36, 56]),
        ({"frame_indices": [7, 3, 3, 59]}, [7, 3, 3, 59]),
        ({"frame_indices": range(0, 8, 2)}, [0, 2, 4, 6]),
        ({"start": 2.0, "end": 3.0, "do_sample_frames": False}, list(range(20, 30))),
        ({"start": 2.0, "end": 3.0}, [20, 21, 22, 23, 24, 25, 26, 27]),
        ({"start": 5.5, "fps": 5}, [55, 57, 59]),
        ({"end": 0.2}, [0, 0, 0, 0, 1, 1, 1, 1]),
        ({"do_sample_frames": False}, list(range(60))),
    ],
)
def test_choosing_frames(small, clip, options, expected):
    output = small(clip, return_metadata=True, **options)
    assert output["video_metadata"][0].frames_indices == expected
    assert output["video_grid_thw"].tolist() == [[len(expected), 2, 3]]


def test_seconds_are_those_of_the_frames_where_the_rate_varies(small, tmp_path):
    """Forty frames in the first second, then one a second."""
    ticks = [*range(40), *range(40, 440, 40)]
    path = write_clip(tmp_path / "uneven.mp4", 50, 40, width=160, height=96, ticks=ticks)
    output = small(path, start=0.5, end=3.5, do_sample_frames=False, return_metadata=True)
    assert output["video_metadata"][0].frames_indices == [*range(20, 43)]
    assert output["video_metadata"][0].timestamps[-4:] == pytest.approx([0.975, 1, 2, 3])


def test_a_rate_is_that_of_the_times_where_the_rate_varies(small, tmp_path):
    ticks = [*range(40), *range(40, 440, 40)]  # as above
    path = write_clip(tmp_path / "uneven.mp4", 50, 40, width=160, height=96, ticks=ticks)

    def seconds(**options):
        return small(path, return_metadata=True, **options)["video_metadata"][0].timestamps

    assert seconds(fps=1) == pytest.approx(list(range(11)))
    assert seconds(fps=2) == pytest.approx([0, 0.5, *range(1, 11)])
    assert seconds(fps=1, num_frames=3) == pytest.approx([0, 5, 10])
    assert seconds(fps=1, start=0.5, end=4.6) == pytest.approx([0.5, 1, 2, 3, 4])
    assert seconds(fps=1, start=0.5, end=4.4) == pytest.approx([0.5, 1, 2, 3])  # 4.5 is past the end
    assert len(seconds(fps=40)) == 50
    # The times come along with the frames where these are given with the metadata of the file.
    frames, metadata = small.fetch_videos(path, lambda metadata: list(range(metadata.total_num_frames)))
    given = small(frames, video_metadata=metadata, fps=1, return_metadata=True)["video_metadata"][0]
    assert given.timestamps == pytest.approx(list(range(11)))


def test_the_processors_own_rate_gives_at_most_num_frames(clip):
    processor = VideoPandaVideoProcessor(image_size=84, fps=2, num_frames=4)
    assert processor(clip)["video_grid_thw"].tolist() == [[4, 2, 3]]
    assert processor(clip, fps=1)["video_grid_thw"].tolist() == [[6, 2, 3]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_frames": np.int64(4)}, [0, 10, 30, 50]),
        ({"num_frames": torch.tensor(4)}, [0, 10, 30, 50]),
        ({"fps": np.float32(1)}, [0, 10, 20, 30, 40, 50]),
        ({"fps": torch.tensor(1.0)}, [0, 10, 20, 30, 40, 50]),
        ({"fps": Fraction(1, 2)}, [0, 20, 40]),
        ({"start": np.float64(5.5), "end": np.int32(6), "do_sample_frames": False}, [55, 56, 57, 58, 59]),
        ({"frame_indices": torch.tensor([3, 4])}, [3, 4]),
        ({"frame_indices": [np.int64(3), torch.tensor(4)]}, [3, 4]),
        ({"frame_indices": (3, 4)}, [3, 4]),
        ({"frame_indices": [np.array([3, 4])]}, [3, 4]),
        ({"frame_indices": ((3, 4),)}, [3, 4]),
        ({"frame_indices": np.array([[3, 4]])}, [3, 4]),
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch(small, clip, options, expected):
    assert small(clip, return_metadata=True, **options)["video_metadata"][0].frames_indices == expected


def test_the_frames_shown_are_the_frames_chosen(processor, clip):
    assert shown(processor(clip, frame_indices=[7, 3, 59, 3])) == [7, 3, 59, 3]
    assert shown(processor(clip, start=2, fps=2)) == [20, 25, 30, 35, 40, 45, 50, 55]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_indices": [60]}, r"frame_indices.*\[60\].*60 frames"),
        ({"frame_indices": []}, "frame_indices.*empty"),
        ({"frame_indices": [0], "fps": 1}, "frame_indices.*fps"),
        ({"frame_indices": [[0], [1]]}, "2 lists.*1 videos"),
        ({"frame_indices": "0"}, "frame_indices"),
        ({"num_frames": 0}, "num_frames"),
        ({"fps": float("nan")}, "fps.*nan"),
        ({"fps": -1}, "fps.*-1"),
        ({"start": 6.0}, "start=6.0"),
        ({"start": 3, "end": 2}, "`end` must be after `start`"),
        ({"start": float("nan")}, "start.*nan"),
        ({"num_frames": 2.5}, "num_frames.*whole number, got 2.5"),
        ({"num_frames": True}, "num_frames.*True"),
        ({"num_frames": [4]}, r"num_frames.*\[4\]"),
        ({"fps": "2"}, "fps.*'2'"),
        ({"frame_indices": 3}, "frame_indices.*list.*3"),
        ({"frame_indices": [1.5]}, "frame_indices.*1.5"),
        ({"frame_indices": [[1], None]}, "frame_indices.*None"),
        ({"num_frame": 4}, "num_frame"),
        ({"video_metadata": {"fps": float("nan"), "total_num_frames": 60}}, "video_metadata.fps.*nan"),
        ({"video_metadata": {"fps": 10.0, "total_num_frames": 60}}, "video_metadata.*file says it itself"),
        ({"video_metadata": [None, None]}, "2 entries.*1 videos"),
        ({"video_metadata": [{"rate": 3}]}, "video_metadata.*rate"),
        ({"size": {"height": 3, "width": 3}}, "`size`.*image_size"),
        ({"image_size": 450}, "image_size.*28"),
        ({"do_rescale": False}, "do_normalize.*do_rescale"),
        ({"image_mean": [0.5, 0.5]}, "image_mean.*three"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_options(small, clip, options, message):
    with pytest.raises(ValueError, match=message):
        small(clip, **options)


def test_arrays(processor):
    frames = frames_array(range(8))
    expected = processor(frames, do_sample_frames=False)
    assert expected["video_grid_thw"].tolist() == [[8, 10, 16]]
    assert shown(expected) == list(range(8))
    channels_first = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    for same in (
        torch.from_numpy(frames),
        channels_first,
        torch.from_numpy(channels_first),
        frames.astype(np.int64),
        (frames / 255).astype(np.float32),
        torch.from_numpy(channels_first / 255),
        np.concatenate([frames, frames[..., :1]], axis=-1),
        frames[None],
        [frames],
        list(frames),
        list(torch.from_numpy(channels_first)),
        [Image.fromarray(frame) for frame in frames],
        [[Image.fromarray(frame) for frame in frames]],
        frames[::-1][::-1],
    ):
        output = processor(same)
        assert torch.equal(output["pixel_values_videos"], expected["pixel_values_videos"])
    gray = processor(frames[..., :1])["pixel_values_videos"]
    assert tuple(gray.shape) == (1, 8, 3, 448, 448)
    assert frames.dtype == np.uint8


def test_sampling_of_arrays(small):
    frames = frames_array(range(30))

    def chosen(videos, **options):
        return small(videos, return_metadata=True, **options)["video_metadata"][0].frames_indices

    assert chosen(frames) == [0, 4, 8, 12, 16, 20, 24, 29]
    assert chosen(frames[:5]) == [0, 1, 2, 3, 4]
    assert chosen(frames, num_frames=3) == [0, 14, 29]
    assert chosen(frames, do_sample_frames=False) == list(range(30))
    assert chosen(frames, frame_indices=[29, 0]) == [29, 0]
    at_two = {"fps": 2, "total_num_frames": 30}
    assert chosen(frames, video_metadata=at_two) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert chosen(frames, video_metadata=VideoMetadata(**at_two), fps=0.2) == [0, 10, 20]
    assert chosen(frames, video_metadata=[at_two], start=3, end=4.5, do_sample_frames=False) == [6, 7, 8]
    # Frames that were chosen out of a longer video already are taken as they are.
    picked = {"fps": 25, "total_num_frames": 500, "frames_indices": list(range(0, 300, 10))}
    assert chosen(frames, video_metadata=picked) == list(range(0, 300, 10))
    assert chosen(frames, video_metadata=picked, num_frames=2) == [0, 290]
    # The frames of one video as a list are not sampled unless asked.
    assert chosen(list(frames)) == list(range(30))
    assert chosen(list(frames), num_frames=2) == [0, 29]
    assert chosen(list(frames), do_sample_frames=True) == [0, 4, 8, 12, 16, 20, 24, 29]
    for options in ({"fps": 1}, {"start": 1}):
        with pytest.raises(ValueError, match="frame rate"):
            chosen(frames, **options)
    metadata = VideoMetadata(**at_two)
    chosen(frames, video_metadata=metadata)
    assert metadata.frames_indices is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"fps": 5, "total_num_frames": 10}, "total_num_frames=10, but 6 frames.*frames_indices"),
        ({"fps": 5, "total_num_frames": 100, "frames_indices": [1, 2]}, "2 `frames_indices`, but 6 frames"),
        ({"fps": float("nan"), "total_num_frames": 6}, "nan"),
        ({"fps": -5.0}, "-5"),
    ],
)
def test_metadata_that_contradicts_the_frames(small, metadata, message):
    for frames in (frames_array(range(6)), list(frames_array(range(6)))):
        with pytest.raises(ValueError, match=message):
            small(frames, video_metadata=metadata)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"fps": float("nan")}, "fps.*nan"),
        ({"fps": -1}, "fps.*-1"),
        ({"nmu_frames": 3}, "no option `nmu_frames`; did you mean `num_frames`"),
        ({"frame_indices": [3]}, "frame_indices.*belongs in a call"),
        ({"start": 3}, "start.*belongs in a call"),
        ({"end": 0.0}, "end.*belongs in a call"),
    ],
)
def test_bad_options_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        VideoPandaVideoProcessor(**options)


def test_plain_numbers_are_saved(tmp_path):
    VideoPandaVideoProcessor(num_frames=np.int64(4), fps=np.float32(2)).save_pretrained(tmp_path)
    loaded = VideoPandaVideoProcessor.from_pretrained(tmp_path)
    assert (loaded.num_frames, loaded.fps) == (4, 2.0)


def test_frames_that_must_not_be_written_to(small):
    frames = frames_array(range(3))
    frames.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small(frames)["video_grid_thw"].tolist() == [[3, 2, 3]]


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([], "empty list"),
        ([[]], "empty list"),
        (None, "NoneType"),
        (7, "int"),
        ({"path": "a.mp4"}, "dict"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        (np.zeros((2, 8, 8, 2), np.uint8), "channels"),
        (np.zeros((2, 3, 8, 3), np.uint8), "input_data_format"),
        (np.full((2, 8, 8, 3), 2.0, np.float32), r"\[0, 1\].*2"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), r"\[0, 1\].*nan"),
        (np.full((2, 8, 8, 3), -1, np.int64), r"\[0, 255\].*-1"),
        ([np.zeros((8, 8, 3), np.uint8), "a.mp4"], "1 are pictures"),
        (np.zeros((2, 8, 8, 3), np.uint16), "expected whole numbers in 0 ... 255.*uint16"),
        (b"", "empty"),
    ],
)
def test_bad_videos(small, videos, message):
    with pytest.raises(ValueError, match=message):
        small(videos)


def test_channels_that_the_shape_does_not_tell(small):
    frames = np.zeros((2, 3, 8, 3), np.uint8)
    assert small(frames, input_data_format="channels_first")["video_grid_thw"].tolist() == [[2, 3, 2]]
    assert small(frames, input_data_format="channels_last")["video_grid_thw"].tolist() == [[2, 2, 3]]
    with pytest.raises(ValueError, match="input_data_format"):
        small(frames, input_data_format="sideways")


def test_picture_files_are_frames_and_video_files_are_videos(processor, clip, tmp_path):
    paths = []
    for index in (5, 9, 2):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(barcode_frame(index, 160, 96)).save(paths[-1])
    one = processor([str(path) for path in paths])
    assert one["video_grid_thw"].tolist() == [[3, 10, 16]]
    assert shown(one) == [5, 9, 2]
    two = processor([[paths[0], paths[1]], [paths[2]]])
    assert two["video_grid_thw"].tolist() == [[2, 10, 16], [1, 10, 16]]
    assert shown(two, 0) == [5, 9]
    assert shown(two, 1) == [2]
    assert processor(str(paths[0]))["video_grid_thw"].tolist() == [[1, 10, 16]]
    files = processor([clip, str(clip)])
    assert files["video_grid_thw"].tolist() == [[8, 10, 16], [8, 10, 16]]
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        processor([paths[0], tmp_path / "none.png"])


def test_a_batch_of_different_videos(processor, clip):
    portrait = frames_array(range(3), 96, 160)
    together = processor([clip, portrait], do_sample_frames=True)
    assert together["video_grid_thw"].tolist() == [[8, 10, 16], [3, 16, 10]]
    assert torch.equal(together["pixel_values_videos"][0], processor(clip)["pixel_values_videos"][0])
    assert torch.equal(together["pixel_values_videos"][1, :3], processor(portrait)["pixel_values_videos"][0])
    assert together["pixel_values_videos"][1, 3:].abs().max() == 0
    both = processor([clip, clip], frame_indices=[[1, 2], [3]], return_metadata=True)
    assert [metadata.frames_indices for metadata in both["video_metadata"]] == [[1, 2], [3]]


def test_frames_of_different_sizes(processor):
    pictures = [Image.new("RGB", (160, 90), "red"), Image.new("RGB", (50, 200), "blue")]
    output = processor(pictures, do_normalize=False, do_rescale=False)
    assert output["video_grid_thw"].tolist() == [[2, 9, 16]]
    canvas = output["pixel_values_videos"][0]
    assert (canvas[1, 2, 84:336] == 255).all()
    assert (canvas[1, 0, :84] == math.floor(255 * CLIP_MEAN[0])).all()


def test_resizing_is_antialiased_bicubic():
    """Against Pillow's bicubic, which is antialiased: at most two levels apart, on a picture full of fine detail."""
    picture = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    output = VideoPandaVideoProcessor(do_normalize=False, do_rescale=False)(picture[None])
    canvas = output["pixel_values_videos"][0, 0]
    assert canvas.dtype == torch.uint8
    assert output["video_grid_thw"].tolist() == [[1, 11, 16]]
    expected = np.array(Image.fromarray(picture).resize((448, 308), Image.Resampling.BICUBIC)).astype(int)
    found = canvas[:, 56:364].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - expected).max() <= 2


def test_steps_can_be_left_out(small):
    frames = frames_array([1, 2], 84, 84)
    whole = small(frames)["pixel_values_videos"]
    rescaled = small(frames, do_normalize=False)["pixel_values_videos"]
    canvases = small(frames, do_normalize=False, do_rescale=False)["pixel_values_videos"]
    assert canvases.dtype == torch.uint8
    assert torch.equal(canvases[0], torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert torch.allclose(rescaled, canvases.float() / 255, atol=1e-6)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    assert torch.allclose(whole, (canvases.float() / 255 - mean) / std, atol=1e-5)
    assert torch.equal(small(frames, do_resize=False)["pixel_values_videos"], whole)
    with pytest.raises(ValueError, match="do_resize is off"):
        small(frames[:, :60], do_resize=False)
    with pytest.raises(ValueError, match="3 channels"):
        small(frames[..., :1], do_convert_rgb=False)


def test_never_flipped_and_always_the_same(processor, clip):
    outputs = [processor(clip)["pixel_values_videos"] for _ in range(4)]
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert shown({"pixel_values_videos": outputs[0], "video_grid_thw": torch.tensor([[8, 10, 16]])})[1] == 8


def test_kinds_of_tensors(small, clip):
    assert isinstance(small(clip, return_tensors="np")["pixel_values_videos"], np.ndarray)
    assert small(clip, device="meta")["video_grid_thw"].device.type == "meta"
    assert isinstance(small(clip, return_tensors=None)["pixel_values_videos"], torch.Tensor)


def test_files_that_are_not_there(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        small(tmp_path / "none.mp4")
    with pytest.raises(IsADirectoryError):
        small(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="path is empty"):
        small("")
    with pytest.raises(ValueError, match="allow_urls"):
        small("https://localhost:9/a.mp4")


def test_hooks_of_transformers(processor, clip):
    indices = processor.sample_frames(VideoMetadata(total_num_frames=60, fps=10.0))
    assert indices.tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    frames, metadata = processor.fetch_videos(str(clip))
    assert read_barcodes(frames) == indices.tolist()
    assert metadata.frames_indices == indices.tolist()
    many, _ = processor.fetch_videos([clip, clip], sample_indices_fn=lambda metadata: [3])
    assert [read_barcodes(frames) for frames in many] == [[3], [3]]


def test_save_and_load(tmp_path, clip):
    processor = VideoPandaVideoProcessor(image_size=84, num_frames=4, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert stored["auto_map"] == {"AutoVideoProcessor": "video_processing_video_panda.VideoPandaVideoProcessor"}
    assert (stored["image_size"], stored["num_frames"]) == (84, 4)
    loaded = VideoPandaVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(loaded(clip)["pixel_values_videos"], processor(clip)["pixel_values_videos"])
    assert VideoPandaVideoProcessor.from_pretrained(tmp_path, num_frames=2)(clip)["video_grid_thw"][0, 0] == 2
    with pytest.raises(ValueError, match="image_size"):
        VideoPandaVideoProcessor(image_size=100)


@pytest.mark.slow  # tests/examples/test_examples.py runs all saved code
def test_the_saved_code_runs_without_this_package(tmp_path, clip):
    """What is saved beside the weights is complete, flat, and needs neither this package nor torchvision."""
    VideoPandaVideoProcessor(image_size=84).save_pretrained(tmp_path / "saved")
    code = (
        "import sys\n"
        "for name in ('video_panda', 'torchvision'):\n"
        "    sys.modules[name] = None\n"
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module\n"
        "name = 'video_processing_video_panda.VideoPandaVideoProcessor'\n"
        "processor = get_class_from_dynamic_module(name, sys.argv[1]).from_pretrained(sys.argv[1])\n"
        "print(processor(sys.argv[2])['video_grid_thw'].tolist())\n"
        "processor.save_pretrained(sys.argv[3])\n"
    )
    arguments = [str(tmp_path / "saved"), str(clip), str(tmp_path / "again")]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[8, 2, 3]]"
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        path.name for path in (tmp_path / "saved").iterdir() if path.is_file()
    }
