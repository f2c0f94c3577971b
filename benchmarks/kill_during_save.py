"""Kills training runs while they save, resumes each, and counts how many go on bit by bit as if nothing had happened.

    python benchmarks/kill_during_save.py [NUM_KILLS] [SEED]

By default 102 runs, 34 a stage, in which every step saves. SIGKILL comes at a random moment of a random save; then the
same run is started again with `resume_from_checkpoint="auto"` and trains to its end. Losses of all steps and all weights
(SHA-256, the alignment head's included) are compared with those of an uninterrupted run. The work is done by
`tests/killing.py`, which the test suite uses too; this program adds what lay on the disk when the run died.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from report import describe_machine, markdown_table, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import killing
from training_runs import STAGE_NAMES

# What a save has come to, in the order of its parts.
MOMENTS = (
    "nothing written yet",
    "files being written, synced and hashed",
    "manifest written, not yet renamed",
    "renamed into place, cleaning up",
    "save over",
)


def find_moment(folder: Path, step: int) -> str:
    """How far the save of a step had come, by what a killed run left."""
    run, name = folder / "run", f"checkpoint-{step}"
    staging = run / f"_staging-{name}"
    ended = any(kind == "end" and own == step for kind, own, _ in killing._read_saves(folder))
    if ended:
        return MOMENTS[4]
    if (run / name).is_dir():
        return MOMENTS[3]
    if not (staging / name).is_dir() or not any((staging / name).iterdir()):
        return MOMENTS[0]
    return MOMENTS[2] if (staging / name / "manifest.json").exists() else MOMENTS[1]


def main() -> int:
    num_kills, seed = (*map(int, sys.argv[1:]), *(102, 1)[len(sys.argv) - 1 :])
    moments = []
    kill = killing._kill_in_save

    def watched(process, folder, step, delay_s):
        is_killed = kill(process, folder, step, delay_s)
        if is_killed:
            moments.append(find_moment(folder, step))
        return is_killed

    killing._kill_in_save = watched
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(killing.kill_saves(Path(folder), num_kills, seed))
    seconds = time.perf_counter() - start
    rows = []
    for stage in STAGE_NAMES:
        own = [outcome for outcome in outcomes if outcome.stage == stage]
        rows.append([stage, str(len(own)), *_resumed(own), f"**{sum(outcome.is_equal for outcome in own)}**"])
    rows.append(
        ["all", str(len(outcomes)), *_resumed(outcomes), f"**{sum(outcome.is_equal for outcome in outcomes)}**"]
    )
    by_moment = []
    for moment in MOMENTS:
        own = [outcome for outcome, when in zip(outcomes, moments) if when == moment]
        by_moment.append([moment, str(len(own)), *_resumed(own), f"**{sum(outcome.is_equal for outcome in own)}**"])
    num_equal = sum(outcome.is_equal for outcome in outcomes)
    delays = sorted(outcome.delay_s for outcome in outcomes)
    steps = Counter(outcome.step for outcome in outcomes)
    header = ["kills", "resumed from the save before", "from the killed save", "from the beginning", "bitwise equal"]
    text = f"""# Killed while saving

{num_equal} of {len(outcomes)} runs ({100 * num_equal / len(outcomes):.0f}%) ended, once resumed, with bitwise the losses and weights of an uninterrupted run. The
signal found {len(outcomes) - moments.count(MOMENTS[4])} of them in the save and {moments.count(MOMENTS[4])} shortly after it.

{markdown_table(["stage", *header], rows)}

{markdown_table(["when the kill came", *header], by_moment)}

Runs of {killing.NUM_STEPS} steps, saves killed: {", ".join(f"{count} of step {step}" for step, count in sorted(steps.items()))}.
From the beginning of a save to the signal: {delays[0] * 1e3:.0f} to {delays[-1] * 1e3:.0f} ms, median
{delays[len(delays) // 2] * 1e3:.0f} ms, drawn evenly up to 1.1 times a save's usual length. Seed {seed}; {seconds / 60:.0f} minutes.

{__doc__.split(chr(10) + chr(10), 2)[2].strip()}

{describe_machine("torch", "transformers", "accelerate")}.
By `python benchmarks/kill_during_save.py`.
"""
    write_result("kill_during_save", text)
    return int(num_equal < len(outcomes))


def _resumed(outcomes: list[killing.Outcome]) -> list[str]:
    """How many went on from the save before the killed one, from that one itself, from the beginning."""
    before = sum(outcome.resumed_from == f"checkpoint-{outcome.step - 1}" for outcome in outcomes)
    itself = sum(outcome.resumed_from == f"checkpoint-{outcome.step}" for outcome in outcomes)
    anew = sum(outcome.resumed_from is None for outcome in outcomes)
    assert before + itself + anew == len(outcomes), "resumed from an older checkpoint than the last one"
    return [str(before), str(itself), str(anew)]


if __name__ == "__main__":
    sys.exit(main())
