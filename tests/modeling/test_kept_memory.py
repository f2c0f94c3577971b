"""On a CPU the vision part has glibc keep the memory of its states: by a block of the size that glibc is to keep, given back.

What it gains is in `benchmarks/results/vision.md`: which pages glibc really keeps depends on all else in its heap.
"""

import weakref

import pytest
import torch
from model_inputs import canvases
from tiny import tiny_config, tiny_model

from video_panda.modeling_video_panda import vision_video_panda

LARGEST_KEPT = 32 * 2**20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX: it never keeps a larger block, nor learns from one
CHUNK_BYTES = 4 * 36 * 32 * 4  # states of a chunk of the tiny canvas: 4 frames of 36 patches, 32 wide, float32


@pytest.mark.parametrize(("limit", "num_bytes"), [(None, 4 * CHUNK_BYTES), (1000, 1000)])
def test_a_block_as_large_as_the_states_is_shown_to_the_allocator(monkeypatch, limit, num_bytes):
    shown, storage = [], torch.UntypedStorage

    def make(size):
        made = storage(size)
        shown.append((size, weakref.ref(made)))
        return made

    model = tiny_model(tiny_config())
    if limit is not None:
        monkeypatch.setattr(vision_video_panda, "GLIBC_LARGEST_KEPT_BYTES", limit)
    monkeypatch.setattr(vision_video_panda.torch, "UntypedStorage", make)
    with torch.no_grad():
        model.model.get_video_features(canvases(1, 8), torch.tensor([[8, 2, 3]]))
    [(size, block)] = shown
    assert size == num_bytes
    assert block() is None, "it was given back"


def test_it_is_no_larger_than_glibc_learns_from():
    header_and_alignment = 4096 + 64
    assert LARGEST_KEPT - 2**17 < vision_video_panda.GLIBC_LARGEST_KEPT_BYTES <= LARGEST_KEPT - header_and_alignment
