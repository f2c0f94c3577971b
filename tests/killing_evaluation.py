"""Kills real evaluations at random moments and lets others go on: the report must be the one of an uninterrupted run.

A program of its own (`python killing_evaluation.py FOLDER NUM_KILLS [SEED]`, one JSON line a run): it imports everything,
computes nothing itself and forks each evaluation, which then takes a second or two.
"""

import json
import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path

import torch
from miniatures import write_zero_shot_qa
from tqdm import tqdm

from video_panda import cli, evaluate
from video_panda.evaluation.asking import Asker
from video_panda.evaluation.benchmarks import open_benchmark

PATIENCE_S = 120
BATCH_SIZE = 2
KEPT = ("answers.jsonl", "scores.json", "scores.md")


def run_evaluation(data: str, output_dir: str) -> None:
    """One evaluation of the demonstration model; writes a line to `batches.txt` for each batch that it begins to answer."""
    log = Path(output_dir).with_suffix(".batches.txt")
    generate = Asker._generate

    def logged(self, inputs):
        with open(log, "a") as file:
            file.write(f"{len(inputs['input_ids'])}\n")
        return generate(self, inputs)

    Asker._generate = logged
    model = cli.load_model(str(cli.DEFAULT_MODEL), "float32", "cpu")
    processor = cli.load_processor(str(cli.DEFAULT_MODEL))
    benchmark = open_benchmark("msvd-qa", data)
    evaluate(model, benchmark, processor, output_dir=output_dir, batch_size=BATCH_SIZE, show_progress=False)


def _start(data: Path, output_dir: Path):
    process = multiprocessing.get_context("fork").Process(target=run_evaluation, args=(str(data), str(output_dir)))
    process.start()
    return process


def _num_batches(output_dir: Path) -> int:
    log = output_dir.with_suffix(".batches.txt")
    return len(log.read_text().splitlines()) if log.exists() else 0


def kill_evaluations(folder: Path, num_kills: int, seed: int = 0):
    """Kill and resume until `num_kills` signals have hit.

    Yields:
        For each run that came to its end: `kills`, how often it was killed; `num_redone`, batches that were begun more
        than once; `is_equal`, whether its files are those of a run that was left alone.
    """
    # Threads do not survive a fork, and what they hold stays locked: neither OpenMP's nor tqdm's may exist here.
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    data = write_zero_shot_qa(folder / "data", folder / "clips", num_clips=6)
    whole = folder / "whole"
    begin = time.monotonic()
    _finish(_start(data, whole))
    num_batches = _num_batches(whole)
    batch_s = (time.monotonic() - begin) / num_batches
    draw = random.Random(seed)
    number = 0
    while num_kills > 0:
        run, kills = folder / f"run-{number}", 0
        number += 1
        process = _start(data, run)
        while kills < num_kills and _kill(process, run, draw.randint(1, 3), draw.uniform(0, batch_s)):
            kills += 1
            process = _start(data, run)
        _finish(process)
        num_kills -= kills
        is_equal = all((run / name).read_bytes() == (whole / name).read_bytes() for name in KEPT)
        yield {"kills": kills, "num_redone": _num_batches(run) - num_batches, "is_equal": is_equal}


def _kill(process, run: Path, num_batches: int, delay_s: float) -> bool:
    """SIGKILL a while after so many batches were begun; False: the run had ended by then."""
    before = _num_batches(run)
    deadline = time.monotonic() + PATIENCE_S
    while _num_batches(run) < before + num_batches and process.is_alive():
        assert time.monotonic() < deadline, "the evaluation hangs"
        time.sleep(0.002)
    process.join(delay_s)
    process.kill()
    process.join(PATIENCE_S)
    return process.exitcode == -signal.SIGKILL


def _finish(process) -> None:
    process.join(PATIENCE_S)
    if process.exitcode != 0:
        process.kill()
        raise AssertionError(f"an evaluation ended with {process.exitcode}")


if __name__ == "__main__":
    for outcome in kill_evaluations(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:])):
        print(json.dumps(outcome), flush=True)
