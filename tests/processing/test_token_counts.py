"""As many placeholder ids as features, for any size and any number of frames, without a pixel.

The count stands in four places: the processor's text, what it tells serving engines, the model's configuration, and what the
vision part gives. Here each is held to one closed form: T frames of (h, w) tokens give T * (h * (w + 1) + 1).
"""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_tokenizer

from video_panda import (
    VideoPandaImageProcessor,
    VideoPandaModel,
    VideoPandaProcessor,
    VideoPandaVideoProcessor,
    VideoPandaVisionConfig,
)
from video_panda.processing.geometry_video_panda import token_grid

# Canvas and patch, px, and window: the tests' own, the published ones, larger, and one without a window.
CANVASES = ((84, 14, 2), (448, 14, 2), (672, 14, 2), (96, 16, 1))
SIDES_PX = st.one_of(st.integers(1, 10_000), st.sampled_from([1, 2, 10_000]), st.integers(1, 40))
FRAMES = st.integers(1, 10**9)


@functools.cache
def make_processor(canvas: tuple[int, int, int], use_row_token: bool) -> VideoPandaProcessor:
    sizes = dict(zip(("image_size", "patch_size", "downsample_window"), canvas))
    parts = VideoPandaImageProcessor(**sizes), VideoPandaVideoProcessor(**sizes), tiny_tokenizer("byte_bpe")
    return VideoPandaProcessor(*parts, use_row_token=use_row_token)


def closed_form(canvas: tuple[int, int, int], size_px: tuple[int, int], use_row_token: bool) -> tuple[int, int, int]:
    """(h, w, tokens of a frame) of a picture of (height, width) px, by exact fractions."""
    image_size, patch_size, window = canvas
    side = image_size // (patch_size * window)
    longest = max(size_px)
    height, width = (math.ceil(Fraction(side * extent, longest)) for extent in size_px)
    return height, width, 1 + height * width + (height if use_row_token else 0)


@settings(max_examples=300, deadline=None)
@example((1, 1), 1, CANVASES[1], True)
@example((1, 10_000), 10**9, CANVASES[1], True)
@example((10_000, 1), 7, CANVASES[1], False)
@example((9_999, 10_000), 8, CANVASES[1], True)
@given(st.tuples(SIDES_PX, SIDES_PX), FRAMES, st.sampled_from(CANVASES), st.booleans())
def test_every_count_is_the_closed_form(size_px, num_frames, canvas, use_row_token):
    processor = make_processor(canvas, use_row_token)
    height, width, num_tokens = closed_form(canvas, size_px, use_row_token)
    assert processor.video_processor.token_grid(*size_px) == (height, width)
    assert processor.image_processor.token_grid(*size_px) == (height, width)
    told = processor._get_num_multimodal_tokens(image_sizes=[size_px], video_sizes=[(num_frames, *size_px)])
    assert told.num_video_tokens == [num_frames * num_tokens]
    assert told.num_image_tokens == [num_tokens]
    assert told.num_image_patches == [height * width * canvas[2] ** 2]
    image_size, patch_size, window = canvas
    vision = VideoPandaVisionConfig(
        image_size=image_size, patch_size=patch_size, downsample_window=window, use_row_token=use_row_token
    )
    assert vision.num_frame_tokens(height, width) == num_tokens
    assert min(height, width) >= 1
    assert max(height, width) == vision.num_tokens_per_side


@settings(max_examples=60, deadline=None)
@given(st.tuples(SIDES_PX, SIDES_PX), st.integers(1, 12), st.sampled_from(CANVASES), st.booleans())
def test_the_text_becomes_as_many_ids(size_px, num_frames, canvas, use_row_token):
    processor = make_processor(canvas, use_row_token)
    height, width, num_tokens = closed_form(canvas, size_px, use_row_token)
    video = processor.replace_video_token({"video_grid_thw": [[num_frames, height, width]]}, 0)
    image = processor.replace_image_token({"image_grid_thw": [[1, height, width]]}, 0)
    texts, _ = processor.get_text_with_replacements(["A <video> and <image>."], [image], [video])
    ids = processor.tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    own = [processor.frame_token_id, processor.row_token_id, processor.video_token_id, processor.image_token_id]
    num_rows = (num_frames + 1) * height if use_row_token else 0
    expected = [num_frames + 1, num_rows, num_frames * height * width, height * width]
    assert [ids.count(token) for token in own] == expected
    assert sum(expected) == (num_frames + 1) * num_tokens


@functools.cache
def make_model(use_row_token: bool, device: str) -> VideoPandaModel:
    """On the tests' canvas; on `meta` it has no memory, and neither have its features."""
    with torch.device(device):
        return VideoPandaModel(tiny_config(400, vision={"use_row_token": use_row_token})).eval()


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), SIDES_PX, SIDES_PX), min_size=1, max_size=4), st.booleans())
def test_the_vision_part_gives_as_many_features(videos, use_row_token):
    grids, expected = [], []
    for num_frames, *size_px in videos:
        height, width, num_tokens = closed_form(CANVASES[0], tuple(size_px), use_row_token)
        grids.append([num_frames, height, width])
        expected.append(num_frames * num_tokens)
    pixels = torch.empty(len(videos), max(grid[0] for grid in grids), 3, 84, 84, device="meta")
    with torch.no_grad():
        features = make_model(use_row_token, "meta").get_video_features(pixels, torch.tensor(grids)).pooler_output
    assert [len(own) for own in features] == expected
    told = make_processor(CANVASES[0], use_row_token)._get_num_multimodal_tokens(video_sizes=videos)
    assert told.num_video_tokens == expected


@pytest.mark.parametrize("size_px", [(1, 1), (1, 10_000), (10_000, 1), (3, 9_999)])
@pytest.mark.parametrize("use_row_token", [True, False])
def test_slivers_of_pictures_in_truth(size_px, use_row_token):
    """With pixels: what the processor draws has the grid that was counted, and the model as many features."""
    processor = make_processor(CANVASES[0], use_row_token)
    frames = np.zeros((3, *size_px, 3), dtype=np.uint8)
    inputs = processor(text="<video><image>", videos=frames, images=frames[0], input_data_format="channels_last")
    grid = token_grid(size_px[1], size_px[0], 3)
    assert inputs["video_grid_thw"].tolist() == [[3, *grid]]
    num_tokens = closed_form(CANVASES[0], size_px, use_row_token)[2]
    assert inputs["input_ids"].shape == (1, 4 * num_tokens)
    with torch.no_grad():
        model = make_model(use_row_token, "cpu")
        [video] = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
        [image] = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert (len(video), len(image)) == (3 * num_tokens, num_tokens)
