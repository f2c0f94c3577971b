"""What the two shipped folders must agree on, though neither may import the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from video_panda import VideoPandaImageProcessor, VideoPandaVideoProcessor, VideoPandaVisionConfig
from video_panda.modeling_video_panda.stab_video_panda import crop_to_grid
from video_panda.processing.geometry_video_panda import canvas_offset, num_frame_tokens


@pytest.mark.parametrize("processor", [VideoPandaVideoProcessor(), VideoPandaImageProcessor()], ids=["video", "image"])
def test_the_same_sizes_by_default(processor):
    config = VideoPandaVisionConfig()
    names = ("image_size", "patch_size", "downsample_window")
    assert [getattr(processor, name) for name in names] == [getattr(config, name) for name in names]
    assert processor.tokens_per_side == config.num_tokens_per_side
    if isinstance(processor, VideoPandaVideoProcessor):
        assert processor.num_frames == config.num_frames


def test_the_processor_of_a_half_resolution_model():
    """Its canvas has half the side, each patch is a token, and the grid of tokens is the same."""
    config = VideoPandaVisionConfig(downsampling="half_resolution")
    processor = VideoPandaVideoProcessor(image_size=config.canvas_size, downsample_window=config.effective_window)
    assert (processor.image_size, processor.tokens_per_side) == (224, config.num_tokens_per_side)


@given(st.integers(1, 16), st.integers(1, 16), st.booleans())
def test_the_same_number_of_tokens_a_frame(height, width, use_row_token):
    config = VideoPandaVisionConfig(use_row_token=use_row_token)
    assert config.num_frame_tokens(height, width) == num_frame_tokens(height, width, use_row_token)


@given(st.integers(1, 16), st.data(), st.sampled_from([1, 2]))
def test_stab_crops_where_the_processor_pastes(side, data, window):
    height, width = data.draw(st.integers(1, side)), data.draw(st.integers(1, side))
    canvas = torch.arange((side * window) ** 2).view(side * window, side * window, 1)
    top, left = (window * offset for offset in canvas_offset(height, width, side))
    expected = canvas[top : top + window * height, left : left + window * width]
    assert torch.equal(crop_to_grid(canvas, (height, width), window), expected)
