"""What libraries around transformers ask of a processor: parts given when loading, counts without pixels, its signature."""

import inspect

import numpy as np
import pytest
from tiny import IMAGE_SIZE, PATCH_SIZE, tiny_processor

from video_panda import VideoPandaImageProcessor, VideoPandaProcessor


def test_a_part_given_when_loading_is_taken(tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    own = VideoPandaImageProcessor(image_size=IMAGE_SIZE * 2, patch_size=PATCH_SIZE)
    loaded = VideoPandaProcessor.from_pretrained(tmp_path, image_processor=own)
    assert loaded.image_processor is own
    assert loaded.video_processor.image_size == IMAGE_SIZE


@pytest.mark.parametrize("use_row_token", [True, False])
@pytest.mark.parametrize("options", [{}, {"image_size": 2 * IMAGE_SIZE}])
def test_counts_are_those_of_the_call(use_row_token, options):
    processor = tiny_processor(use_row_token=use_row_token)
    sizes = [(64, 96), (96, 64), (50, 50), (10, 200)]
    images = [np.zeros((*size, 3), dtype=np.uint8) for size in sizes]
    videos = [np.zeros((frames, *size, 3), dtype=np.uint8) for frames, size in zip((1, 2, 5, 8), sizes)]
    counts = processor._get_num_multimodal_tokens(
        image_sizes=sizes, video_sizes=[video.shape[:3] for video in videos], **options
    )
    text = ["<image><video>"] * len(sizes)
    encoded = processor(images, text, videos, return_mm_token_type_ids=True, do_sample_frames=False, **options)
    types = encoded["mm_token_type_ids"]
    assert counts.num_image_tokens == (types == 1).sum(1).tolist()
    assert counts.num_video_tokens == (types == 2).sum(1).tolist()
    areas = encoded["image_grid_thw"].prod(1) * processor.image_processor.downsample_window**2
    assert counts.num_image_patches == areas.tolist()


def test_the_signature_names_what_is_taken():
    parameters = inspect.signature(VideoPandaProcessor.__call__).parameters
    assert "audio" not in parameters
    assert all(parameters[name].annotation is not inspect.Parameter.empty for name in ("images", "text", "videos"))
