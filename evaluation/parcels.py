"""Sends tensors from a worker process to its caller without copying them through a pipe.

torch would do so by files in `/dev/shm`, of which many containers have 64 MB: less than a batch of clips, and the process that
fills it is killed. Memory without a name (`memfd_create`, Linux) has no such limit.
"""

import math
import os
from collections.abc import Mapping
from multiprocessing.reduction import DupFd

import torch

_ALIGNMENT = 64  # bytes: enough for any dtype, and what vector units like


class Parcel:
    """Tensors in shared memory. Pickled, once, for another process of `multiprocessing`; unpickled, it is a dict of them.
    The process that sends it must be there until then.

    Args:
        tensors: by name, on the CPU.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._places, self._num_bytes = [], 0
        for name, tensor in tensors.items():
            self._places.append((name, tensor.dtype, tuple(tensor.shape), self._num_bytes))
            self._num_bytes += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        self._file = os.memfd_create("video_panda")
        os.ftruncate(self._file, self._num_bytes)
        for name, view in _views(self._file, self._num_bytes, self._places).items():
            view.copy_(tensors[name])

    def __reduce__(self):
        try:
            return _receive, (DupFd(self._file), self._num_bytes, self._places)
        finally:
            os.close(self._file)


def _receive(duplicate, num_bytes: int, places: list) -> dict[str, torch.Tensor]:
    file = duplicate.detach()
    try:
        return _views(file, num_bytes, places)
    finally:
        os.close(file)


def _views(file: int, num_bytes: int, places: list) -> dict[str, torch.Tensor]:
    """Tensors that lie in the file; its memory is given back when the last of them is gone."""
    memory = torch.empty(0, dtype=torch.uint8)
    if num_bytes:
        memory = torch.from_file(f"/proc/self/fd/{file}", shared=True, size=num_bytes, dtype=torch.uint8)
    return {
        name: memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for name, dtype, shape, start in places
    }
