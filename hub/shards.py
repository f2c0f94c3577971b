"""A checkpoint's weights, read shard by shard and written tensor by tensor, so that neither side is ever in memory."""

import errno
import json
import math
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")

# Names of dtypes in the header of a safetensors file.
_DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_BYTES_AT_A_TIME = 4 * 1024**2


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like, without its values."""

    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def weight_map_of(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> file name.

    Raises:
        ValueError: it has none, or one that points out of its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\]", name):
            raise ValueError(f"{index}: expected names of files beside the index, got {name!r}")
    return weight_map


def find_shards(folder: Path) -> list[Path]:
    """The files with the weights of a checkpoint: safetensors before pickle, an index before a single file.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
    """
    for index_name, single_name in zip(INDEX_NAMES, SINGLE_NAMES):
        index = folder / index_name
        if index.is_file():
            shards = [folder / name for name in sorted(set(weight_map_of(index).values()))]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise FileNotFoundError(f"{index} names {', '.join(missing)}, but {folder} does not hold it")
            return shards
        if (folder / single_name).is_file():
            return [folder / single_name]
    raise FileNotFoundError(f"{folder} holds no weights: expected one of {', '.join(INDEX_NAMES + SINGLE_NAMES)}")


def scan_shards(folder: Path) -> dict[str, TensorInfo]:
    """Name, dtype and shape of every tensor of a checkpoint, in the order of its shards.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard cannot be read, holds something else than tensors, or does not agree with the index.
    """
    found: dict[str, TensorInfo] = {}
    for shard in find_shards(folder):
        with open_shard(shard) as tensors:
            for name, tensor in tensors.items():
                if name in found:
                    raise ValueError(f"{name} is both in {found[name].shard.name} and in {shard.name} of {folder}")
                found[name] = TensorInfo(shard, tensor.dtype, tuple(tensor.shape))
    index = folder / (INDEX_NAMES[0] if shard.suffix == ".safetensors" else INDEX_NAMES[1])
    if shard.name not in SINGLE_NAMES:
        for name, shard_name in weight_map_of(index).items():
            if name not in found or found[name].shard.name != shard_name:
                raise ValueError(f"{index} says that {name} is in {shard_name}, but it is not")
    return found


@contextmanager
def open_shard(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of one file, mapped from disk: values are read when they are used.

    Pickles are opened with `weights_only`: nothing in them is ever run.

    Raises:
        ValueError: the file is damaged, or is a pickle of anything else than tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    else:
        tensors = _load_pickle(path)
    yield tensors
    tensors.clear()


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds something else than tensors, and was not loaded: {str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:  # a damaged archive, or the format before PyTorch 1.6
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} must hold a dict of tensors")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def parse_size(size: int | str) -> int:
    """Bytes of 5_000_000_000 or "5GB" (decimal units, as transformers counts)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip(), re.IGNORECASE)
    num_bytes = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if num_bytes < 1:
        raise ValueError(f'max_shard_size must be a number of bytes or like "5GB", got {size!r}')
    return num_bytes


def num_bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def make_scratch() -> torch.Tensor:
    """Space to cast values in, a bit at a time. One for all: taken and given back anew, it would shred the heap."""
    return torch.empty(_BYTES_AT_A_TIME, dtype=torch.uint8)


class SafetensorsWriter:
    """One safetensors file whose tensors come one after the other, in any order.

    Args:
        path: the file to create.
        layout: name -> (dtype, shape) of every tensor it will hold.
        scratch: from `make_scratch`; several writers may share it.
    """

    def __init__(
        self, path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], scratch: torch.Tensor | None = None
    ):
        self.path = path
        self._layout = layout
        self._scratch = make_scratch() if scratch is None else scratch
        self._offsets: dict[str, int] = {}
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Widest elements first, so that every tensor is aligned to its own.
        for name in sorted(layout, key=lambda name: -layout[name][0].itemsize):
            dtype, shape = layout[name]
            self._offsets[name], end = end, end + num_bytes_of(dtype, shape)
            header[name] = {
                "dtype": _DTYPE_CODES[dtype],
                "shape": list(shape),
                "data_offsets": [self._offsets[name], end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close` or `finish`
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._start = 8 + len(encoded)
        self._missing = set(layout)

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """The values of one tensor: `pieces` one behind the other, each of any dtype; cast a bit at a time."""
        dtype, shape = self._layout[name]
        self._missing.remove(name)
        self._file.seek(self._start + self._offsets[name])
        written = 0
        buffer = self._scratch.view(dtype)
        for piece in pieces:
            for part in piece.reshape(-1).split(len(buffer)):
                stored = part if part.dtype == dtype else buffer[: len(part)].copy_(part)
                written += self._file.write(stored.view(torch.uint8).numpy().data)
        assert written == num_bytes_of(dtype, shape), f"{name}: {written} bytes for {dtype} {shape}"

    def finish(self) -> None:
        """Everything is there: bring it to the disk."""
        assert not self._missing, f"{self.path}: never written: {sorted(self._missing)}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Whatever happened, let go of the file."""
        self._file.close()
