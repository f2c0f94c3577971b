"""A tiny model and a prompt for it."""

import pytest
import torch
from model_inputs import canvases, visual_ids
from tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def one_video(model):
    """A prompt with one 16:9 video of 8 frames."""
    ids = [1, 5, 6, *visual_ids(model.config, 8, 2, 3), 7, 8, 9]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values_videos": canvases(1, 8),
        "video_grid_thw": torch.tensor([[8, 2, 3]]),
    }
