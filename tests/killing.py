"""Kills real training processes while they save, and lets others go on: what is left must be resumed bit by bit.

A program of its own (`python killing.py FOLDER NUM_KILLS [SEED]`, one JSON line an outcome): it imports everything, trains
nothing itself and forks each run, which then takes a second. Forking a process that has trained would not be safe.
"""

import faulthandler
import hashlib
import json
import multiprocessing
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from training_runs import STAGE_NAMES, losses_of, make_trainer, tiny_teacher, write_samples
from transformers import TrainerCallback

NUM_STEPS = 4
PATIENCE_S = 120


@dataclass
class Outcome:
    """What one killed run left, and what the run after it made of it.

    Attributes:
        stage: of the run.
        step: the save that was killed.
        delay_s: from the beginning of that save to the signal.
        resumed_from: checkpoint that the second run went on from; None: from the beginning.
        is_equal: the second run's losses and all weights are bitwise those of an uninterrupted run.
    """

    stage: str
    step: int
    delay_s: float
    resumed_from: str | None
    is_equal: bool


def _announce_saves(trainer, file: str) -> None:
    """Write a line when a save begins and one when it has ended."""
    save = trainer._save_checkpoint

    def announced(*args):
        with open(file, "a") as log:
            log.write(f"begin {trainer.state.global_step} {time.monotonic()}\n")
        save(*args)
        with open(file, "a") as log:
            log.write(f"end {trainer.state.global_step} {time.monotonic()}\n")

    trainer._save_checkpoint = announced


class _Losses(TrainerCallback):
    """The losses of each step, exactly."""

    def __init__(self):
        self.by_step = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "lm_loss" in logs:
            self.by_step[state.global_step] = [float(logs[name]).hex() for name in ("lm_loss", "distillation_loss")]


def _classes_of_bars(base: type) -> list[type]:
    return [base, *(own for child in base.__subclasses__() for own in _classes_of_bars(child))]


def run_training(stage: str, data: str, output_dir: str) -> None:
    """A whole run, resumed if it can be; writes `saves.txt` as it goes and `result.json` at the end."""
    faulthandler.dump_traceback_later(PATIENCE_S * 0.8, exit=True)  # a run takes seconds: say where it hangs
    # tqdm's own lock is shared by all forked processes: one that is killed while it holds it would hang the others. Each
    # class of bars may have one of its own (transformers' are of `tqdm.auto`).
    for bar in _classes_of_bars(tqdm):
        bar.set_lock(threading.RLock())
    data, output_dir = Path(data), Path(output_dir)
    losses = _Losses()
    trainer = make_trainer(
        stage,
        data / "samples.json",
        output_dir / "run",
        tiny_teacher(data / "teacher"),
        per_device_train_batch_size=1,
        global_batch_size=2,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        callbacks=[losses],
    )
    _announce_saves(trainer, str(output_dir / "saves.txt"))
    choose, chosen = trainer.choose_checkpoint, []
    trainer.choose_checkpoint = lambda asked: chosen.append(choose(asked)) or chosen[0]
    trainer.train(resume_from_checkpoint="auto")
    digest = hashlib.sha256()
    for module in (trainer.model, trainer.alignment_head):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    assert len(losses_of(trainer)) == NUM_STEPS
    result = {"weights": digest.hexdigest(), "losses": losses.by_step, "resumed_from": chosen[0]}
    (output_dir / "result.json").write_text(json.dumps(result))


def _start(context, stage: str, data: Path, output_dir: Path):
    output_dir.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=run_training, args=(stage, str(data), str(output_dir)))
    process.start()
    return process


def _finish(process) -> None:
    process.join(PATIENCE_S)
    if process.exitcode != 0:
        process.kill()
        raise AssertionError(f"a training process ended with {process.exitcode}; where it hung stands on stderr")


def _read_saves(folder: Path) -> list[tuple[str, int, float]]:
    file = folder / "saves.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(kind, int(step), float(when)) for kind, step, when in map(str.split, lines)]


def _kill_in_save(process, folder: Path, step: int, delay_s: float) -> bool:
    """SIGKILL `delay_s` after the save of `step` began; False: the run had ended by then."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(kind == "begin" and own == step for kind, own, _ in _read_saves(folder)):
        if time.monotonic() > deadline or not process.is_alive():
            raise AssertionError(f"the run never came to save step {step}")
        time.sleep(0.001)
    time.sleep(delay_s)
    process.kill()
    process.join(PATIENCE_S)
    return process.exitcode == -signal.SIGKILL


def kill_saves(folder: Path, num_kills: int, seed: int = 0) -> Iterator[Outcome]:
    """Kill `num_kills` runs, spread over the three stages, at random moments of random saves; resume each.

    Args:
        folder: everything is written here.
        num_kills: of them.
        seed: of the moments.
    """
    context = multiprocessing.get_context("fork")
    # Threads do not survive a fork, and what they hold stays locked: neither OpenMP's nor tqdm's may exist here.
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    write_samples(folder / "data", num_clips=4)
    tiny_teacher(folder / "data" / "teacher")
    draw = random.Random(seed)
    references, durations = {}, []
    for stage in STAGE_NAMES:
        reference = folder / f"reference-{stage}"
        _finish(_start(context, stage, folder / "data", reference))
        references[stage] = json.loads((reference / "result.json").read_text())
        times = {(kind, step): when for kind, step, when in _read_saves(reference)}
        durations += [times["end", step] - times["begin", step] for step in range(1, NUM_STEPS + 1)]
    longest = sorted(durations)[len(durations) // 2] * 1.1
    number = 0
    while num_kills:
        stage = STAGE_NAMES[num_kills % len(STAGE_NAMES)]
        run, step, delay_s = folder / f"killed-{number}", draw.randint(1, NUM_STEPS), draw.uniform(0, longest)
        number += 1
        process = _start(context, stage, folder / "data", run)
        if not _kill_in_save(process, run, step, delay_s):
            continue
        _finish(_start(context, stage, folder / "data", run))
        result, reference = json.loads((run / "result.json").read_text()), references[stage]
        is_equal = result["weights"] == reference["weights"] and all(
            reference["losses"][own] == losses for own, losses in result["losses"].items()
        )
        resumed_from = result["resumed_from"] and Path(result["resumed_from"]).name
        yield Outcome(stage, step, delay_s, resumed_from, is_equal)
        num_kills -= 1


if __name__ == "__main__":
    for outcome in kill_saves(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:])):
        print(json.dumps(asdict(outcome)), flush=True)
