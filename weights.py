"""Which weights a model has."""

import hashlib

import torch

_NUM_READ = 4096


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, dtypes and values of a model's weights: the same wherever they lie.

    Of each tensor at most 4096 numbers, evenly spread, are read: it tells trainings apart, not single numbers.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _NUM_READ)].cpu().contiguous()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
