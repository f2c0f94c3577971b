"""A run whose newest checkpoint is damaged, whichever file and however, goes back to the newest good one."""

import os
import shutil
from pathlib import Path

import damage
import pytest
from training_runs import losses_of, make_trainer
from transformers import TrainerCallback

from video_panda.trainers.checkpoints import find_checkpoint


@pytest.fixture(scope="module")
def run(samples):
    """Makes a trainer that saves after each of its three steps."""

    def make(folder, **options):
        options = {"max_steps": 3, "global_batch_size": 2, "save_strategy": "steps", "save_steps": 1, **options}
        return make_trainer("instruction_tuning", samples, folder, **options)

    return make


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """Read-only: an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer = run(folder)
    trainer.train()
    return folder, trainer


def damages(newest: Path, before: Path) -> list[damage.Damage]:
    """Those of every file of a checkpoint; the files of the one before take the place of its own."""
    found = list(damage.damages(newest, {"the one before": before}, num_cuts=1))
    for path in newest.glob("*.py"):
        content = path.read_bytes()
        ways = {"missing": None, "cut off": content[:-1], "zeroed": bytes(len(content))}
        found += [damage.Damage(path.name, way, left) for way, left in ways.items()]
    return found


@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_any_damage_of_the_newest_checkpoint_is_passed_over(finished, tmp_path, share):
    folder, _ = finished
    cases = damages(folder / "checkpoint-3", folder / "checkpoint-2")
    assert {case.file for case in cases} == {path.name for path in (folder / "checkpoint-3").iterdir()}
    cases = cases[::share]
    target = tmp_path / "run"
    shutil.copytree(folder, target)
    shutil.rmtree(target / "checkpoint-1")
    for case in cases:
        path = target / "checkpoint-3" / case.file
        good = path.read_bytes()
        path.unlink() if case.content is None else path.write_bytes(case.content)
        found, passed_over = find_checkpoint(target)
        assert found == target / "checkpoint-2", case
        assert [place for place, _ in passed_over] == [target / "checkpoint-3"]
        assert case.file in passed_over[0][1] or case.file == "manifest.json"
        path.write_bytes(good)
    assert find_checkpoint(target) == (target / "checkpoint-3", [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "config.json"]
)
def test_it_goes_on_from_the_newest_good_one_as_if_nothing_had_happened(run, finished, tmp_path, name, caplog):
    folder, reference = finished
    target = Path(shutil.copytree(folder, tmp_path / "run"))
    for step, damaged in ((3, b""), (2, bytes((target / "checkpoint-2" / name).stat().st_size))):
        (target / f"checkpoint-{step}" / name).write_bytes(damaged)
    resumed = run(target)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-1" in caplog.text
    assert losses_of(resumed) == losses_of(reference)


class FullDisk(TrainerCallback):
    """From the end of a step on, no file can grow beyond so many bytes."""

    def __init__(self, step: int, max_bytes: int):
        self.step, self.limit = step, damage.full_disk(max_bytes)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.limit.__enter__()


@pytest.mark.parametrize(
    "max_bytes", [600_000, *(pytest.param(size, marks=pytest.mark.slow) for size in (1_000, 100_000))]
)
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(run, finished, tmp_path, max_bytes):
    _, reference = finished
    full = FullDisk(2, max_bytes)
    trainer = run(tmp_path / "run", callbacks=[full])
    try:
        with pytest.raises(OSError, match=str(tmp_path / "run")):
            trainer.train()
    finally:
        full.limit.__exit__(None, None, None)
    assert find_checkpoint(tmp_path / "run") == (tmp_path / "run" / "checkpoint-1", [])
    resumed = run(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(reference)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoint-3")) == sorted(os.listdir(finished[0] / "checkpoint-3"))
