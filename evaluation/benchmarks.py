"""The benchmarks there are; a new one is a class in this list."""

import os

from .benchmark import Benchmark
from .folder_benchmark import FolderBenchmark
from .shapes_qa import ShapesQA
from .video_chatgpt import VideoChatGPTBenchmark
from .zero_shot_qa import MSRVTTQA, MSVDQA, TGIFQA, ActivityNetQA

BENCHMARKS: tuple[type[Benchmark], ...] = (ShapesQA, MSVDQA, MSRVTTQA, TGIFQA, ActivityNetQA, VideoChatGPTBenchmark)


def find_benchmark(name: str) -> type[Benchmark]:
    """The benchmark of a name.

    Raises:
        ValueError: there is none.
    """
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if name not in known:
        raise ValueError(f"benchmark is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def open_benchmark(
    name: str, data_dir: str | os.PathLike, split: str | None = None, num_clips: int | None = None
) -> Benchmark:
    """A benchmark with its data in a folder.

    Args:
        name: as commands call it.
        data_dir: where its questions and clips are, or, where they are made, will be kept.
        split: which part; default: the benchmark's own, for the last look.
        num_clips: only so many clips; default: the benchmark's own number.

    Raises:
        ValueError: an unknown benchmark or split, or damaged files.
        OSError: no such folder or file.
    """
    benchmark = find_benchmark(name)
    given = {} if num_clips is None else {"num_clips": num_clips}
    if not issubclass(benchmark, FolderBenchmark):
        return benchmark(data_dir, **given, **({} if split is None else {"split": split}))
    if split not in (None, benchmark.split):
        raise ValueError(f"{name} has only the split {benchmark.split!r}, got {split!r}")
    return benchmark(data_dir, **given)
