"""The benchmarks there are; a new one is a class in this list."""

import os

from .benchmark import Benchmark
from .shapes_qa import ShapesQA

BENCHMARKS: tuple[type[Benchmark], ...] = (ShapesQA,)


def find_benchmark(name: str) -> type[Benchmark]:
    """The benchmark of a name.

    Raises:
        ValueError: there is none.
    """
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if name not in known:
        raise ValueError(f"benchmark is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def open_benchmark(name: str, data_dir: str | os.PathLike, split: str | None = None, num_clips: int | None = None):
    """A benchmark with its data in a folder.

    Args:
        name: as commands call it.
        data_dir: where its clips are kept.
        split: which part; default: the benchmark's own, for the last look.
        num_clips: only so many clips; default: the benchmark's own number.

    Raises:
        ValueError: an unknown benchmark or split.
    """
    given = {"split": split, "num_clips": num_clips}
    return find_benchmark(name)(data_dir, **{key: value for key, value in given.items() if value is not None})
