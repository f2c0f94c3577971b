"""Where the patch embedding begins. The paper takes it from EVE, pretrained; here it is made of the clips' own statistics.

Of fresh, random filters nearly all answer to the brightness of a patch, and learning what is in it takes thousands of steps.
"""

import torch


def whitening_filters(frames_NCSS: torch.Tensor, patch_size: int, num_filters: int) -> torch.Tensor:
    """The directions in which patches differ most (principal components), each scaled to answers of variance 1.

    Args:
        frames_NCSS: pictures, as the model sees them.
        patch_size: px a side.
        num_filters: at most the numbers in a patch; more would have nothing to answer to.

    Returns:
        Filters (num_filters, C, patch_size, patch_size).

    Raises:
        ValueError: more filters than numbers in a patch.
    """
    channels, patch = frames_NCSS.shape[1], patch_size
    size = channels * patch * patch
    if num_filters > size:
        raise ValueError(f"a patch of {patch} px has {size} numbers: at most so many filters, got {num_filters}")
    tiles = frames_NCSS.unfold(2, patch, patch).unfold(3, patch, patch)
    patches_XW = tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, size).double()
    variances, directions = torch.linalg.eigh(patches_XW.mT @ patches_XW / len(patches_XW))
    chosen = slice(size - num_filters, None)  # eigh sorts upwards
    filters = directions[:, chosen] / variances[chosen].clamp_min(1e-6).sqrt()
    return filters.mT.flip(0).reshape(num_filters, channels, patch, patch).float()
