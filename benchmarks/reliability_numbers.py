"""The sections of `reliability.py` about numbers that do not move: memory over many calls and many training steps."""

import concurrent.futures
import gc
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from reliability import Figure
from tiny import tiny_config, tiny_model, tiny_processor
from training_runs import make_trainer, tiny_teacher, write_samples
from transformers import TrainerCallback

NUM_CALLS = NUM_STEPS = 1000
NUM_WARM_UP = 100
MAX_GROWTH_MB = 10


def _memory_mb() -> float:
    """Anonymous memory of this process, MB; what waits to be collected is not counted.

    Not the "unique set size": pages of libtorch join it whenever the last other process that maps them ends.
    """
    gc.collect()
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 2**20


def _in_own_process(function, *arguments):
    """The result of a function in a process that has done nothing else."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _requests(processor, seed: int):
    """A batch as users ask: a video and a picture of sizes of their own, two videos, and text alone."""
    draws = np.random.default_rng(seed)

    def visual(*shape):
        height, width = draws.integers(20, 120, 2)
        return draws.integers(0, 256, (*shape, height, width, 3), dtype=np.uint8)

    videos = [{"type": "video", "video": visual(int(draws.integers(1, 13)))} for _ in range(3)]
    contents = [[videos[0], {"type": "image", "image": visual()}], videos[1:], []]
    chats = [
        [{"role": "user", "content": [*content, {"type": "text", "text": "What? " * int(draws.integers(1, 9))}]}]
        for content in contents[: 1 + seed % 3]
    ]
    return processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)


def generate_many(num_calls: int) -> list[float]:
    """Memory after the warm-up and then after each quarter of the calls, MB.

    In turns with every cache, with beams, with a prefix cache that is handed on, and with chunks of frames in turn.
    """
    torch.set_num_threads(1)
    processor = tiny_processor()
    model = tiny_model(tiny_config(processor.video_token_id))
    ways = ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prefix": True}, {"vision_chunk_batch": 1})
    memory_mb = []
    for call in range(NUM_WARM_UP + num_calls):
        if call >= NUM_WARM_UP and (call - NUM_WARM_UP) % (num_calls // 4) == 0:
            memory_mb.append(_memory_mb())
        options = dict(ways[call % len(ways)])
        inputs = _requests(processor, 0 if "prefix" in options else call)
        if options.pop("prefix", False):
            options["past_key_values"] = model.prefix_cache()
            model.generate(**inputs, **options, max_new_tokens=2, do_sample=False)
        model.generate(**inputs, **options, max_new_tokens=4, do_sample=False)
    return [*memory_mb, _memory_mb()]


class _WatchMemory(TrainerCallback):
    """Looks at the memory after the warm-up and then after each quarter of the steps."""

    def __init__(self, num_steps: int):
        self.num_steps, self.memory_mb = num_steps, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= NUM_WARM_UP and (state.global_step - NUM_WARM_UP) % (self.num_steps // 4) == 0:
            self.memory_mb.append(_memory_mb())


def train_long(num_steps: int) -> list[float]:
    """Memory after the warm-up and then after each quarter of the steps, MB: clips decoded anew, a teacher, a log of each step."""
    watch = _WatchMemory(num_steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            "instruction_tuning",
            write_samples(Path(folder, "data")),
            Path(folder, "run"),
            teacher=tiny_teacher(Path(folder, "teacher")),
            max_steps=NUM_WARM_UP + num_steps,
            callbacks=[watch],
        )
        trainer.train()
    return watch.memory_mb


def _figures(kind: str, count: int, asked: int, memory_mb: list[float], quick: bool) -> list[Figure]:
    growth = round(max(memory_mb[1:]) - memory_mb[0], 1)
    return [
        Figure(kind, f"at least {asked}", count, quick or count >= asked),
        Figure("growth after the warm-up, MB", f"at most {MAX_GROWTH_MB}", growth, growth <= MAX_GROWTH_MB),
        Figure("memory by quarters, MB", "", ", ".join(f"{value:.1f}" for value in memory_mb), None),
    ]


def generate_calls(quick: bool) -> list[Figure]:
    """Memory over calls of `generate`, the processor before each."""
    count = 100 if quick else NUM_CALLS
    return _figures("generate calls", count, NUM_CALLS, _in_own_process(generate_many, count), quick)


def training_steps(quick: bool) -> list[Figure]:
    """Memory over steps of training."""
    count = 100 if quick else NUM_STEPS
    return _figures("training steps", count, NUM_STEPS, _in_own_process(train_long, count), quick)
