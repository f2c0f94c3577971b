"""Model inputs written out by hand, for tests that go without a processor."""

import torch
from tiny import IMAGE_SIZE

GENERATE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def visual_ids(config, frames: int, height: int, width: int, patch: str = "video") -> list[int]:
    """The placeholder ids of a video or image, written out from the layout of the design."""
    patch_id = config.video_token_id if patch == "video" else config.image_token_id
    return frames * ([config.frame_token_id] + height * ([patch_id] * width + [config.row_token_id]))


def canvases(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def left_pad(prompts: list[list[int]]) -> dict:
    """Batch prompts of different lengths, padded on the left with id 0."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]),
    }


def relative_error(got, expected) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


NAMES = {"video": ("pixel_values_videos", "video_grid_thw"), "image": ("pixel_values", "image_grid_thw")}


def mixed_inputs(config, prompts: list[list]) -> dict:
    """Inputs of a left-padded batch.

    Args:
        prompts: each a list of pieces: token ids (a list), or a visual, ("video" or "image", its grid, a seed for its pixels).
    """
    batch, visuals = [], {"video": [], "image": []}
    for pieces in prompts:
        ids = [1]
        for piece in pieces:
            if isinstance(piece, list):
                ids += piece
                continue
            kind, grid, seed = piece
            ids += visual_ids(config, *grid, kind)
            visuals[kind].append((canvases(*grid[:1], seed=seed) if kind == "video" else canvases(seed=seed), grid))
        batch.append(ids)
    inputs = left_pad(batch)
    for kind, names in NAMES.items():
        if visuals[kind]:
            pixels, grids = zip(*visuals[kind])
            if kind == "video":
                pixels = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)
            else:
                pixels = torch.stack(pixels)
            inputs.update(zip(names, (pixels, torch.tensor(grids))))
    return inputs
