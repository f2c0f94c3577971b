"""Hands tensors from a worker process to its caller without copying them through a pipe.

torch would do so by files in `/dev/shm`, of which many containers have 64 MB: less than a batch of clips, and the process that
fills it is killed. Memory without a name (`memfd_create`, Linux) has no such limit. It is used again and again: new pages for
every batch cost a tiny model a twentieth of its time.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_ALIGNMENT = 64  # bytes: enough for any dtype, and what vector units like


@dataclass(frozen=True)
class Contents:
    """What lies in a buffer: small, and for the pipe.

    Attributes:
        num_bytes: how far it reaches.
        places: name, dtype, shape and first byte of each tensor.
    """

    num_bytes: int
    places: list[tuple[str, torch.dtype, tuple[int, ...], int]]


class SharedBuffer:
    """Memory of a process and of those that are forked from it later. One fills it, and another looks into it in its turn."""

    def __init__(self):
        self._file = os.memfd_create("video_panda")
        self._memory = torch.empty(0, dtype=torch.uint8)

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> Contents:
        """Copy tensors, by name and on the CPU, to where others were; for `look` of another process."""
        places, num_bytes = [], 0
        for name, tensor in tensors.items():
            places.append((name, tensor.dtype, tuple(tensor.shape), num_bytes))
            num_bytes += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        contents = Contents(num_bytes, places)
        if num_bytes > os.fstat(self._file).st_size:
            os.ftruncate(self._file, num_bytes)
        for name, view in self.look(contents).items():
            view.copy_(tensors[name])
        return contents

    def look(self, contents: Contents) -> dict[str, torch.Tensor]:
        """The tensors by name, where they are: as long as nobody fills the buffer again."""
        if contents.num_bytes > len(self._memory):
            path, size = f"/proc/self/fd/{self._file}", os.fstat(self._file).st_size
            self._memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        return {
            name: self._memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, dtype, shape, start in contents.places
        }

    def close(self) -> None:
        """Do without it; its memory is given back when the last tensor in it is gone."""
        os.close(self._file)
        self._memory = None
