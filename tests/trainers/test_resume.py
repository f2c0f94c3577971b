"""Stopping and going on: bit by bit what an uninterrupted run gives, whatever was killed or damaged in between."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import killing
import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_processor
from training_runs import STAGE_NAMES, changed_names, losses_of, make_trainer, weights_of
from transformers import AutoModel

from video_panda.trainers.checkpoints import verify


@pytest.fixture(scope="module")
def run(samples, teacher, tmp_path_factory):
    """Makes the trainer of a stage that saves every third of its eight steps, two epochs of four."""

    def make(stage, folder, **options):
        return make_trainer(
            stage,
            samples,
            folder,
            teacher,
            num_train_epochs=2,
            global_batch_size=2,
            save_strategy="steps",
            save_steps=3,
            **options,
        )

    return make


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """For each stage an uninterrupted run: its folder, losses and weights."""
    runs = {}

    def finish(stage):
        if stage not in runs:
            folder = tmp_path_factory.mktemp(stage) / "run"
            trainer = run(stage, folder)
            trainer.train()
            runs[stage] = folder, trainer
        return runs[stage]

    return finish


def copy_run(folder, target, *, without=()):
    shutil.copytree(folder, target)
    for name in without:
        shutil.rmtree(target / name)
    return target


def all_weights(trainer):
    head = {f"head.{name}": tensor for name, tensor in weights_of(trainer.alignment_head).items()}
    return {**weights_of(trainer.model), **head}


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_resumed_run_is_bitwise_the_uninterrupted_one(stage, strategy, run, finished, tmp_path):
    if strategy == "group_by_length":
        folder, reference = finished(stage)
    else:
        folder = tmp_path / "reference"
        reference = run(stage, folder, train_sampling_strategy=strategy)
        reference.train()
    # Step 3 lies in the middle of the first epoch, step 6 in the middle of the second.
    for step in (3, 6) if strategy == "group_by_length" else (6,):
        others = {f"checkpoint-{other}" for other in (3, 6, 8) if other > step}
        target = copy_run(folder, tmp_path / f"resumed-{step}", without=others)
        torch.manual_seed(1234)  # what happens before must not matter
        resumed = run(stage, target, train_sampling_strategy=strategy)
        resumed.train(resume_from_checkpoint=True)
        for name in ("loss", "lm_loss", "distillation_loss"):
            assert losses_of(resumed, name) == losses_of(reference, name)
        assert changed_names(all_weights(reference), all_weights(resumed)) == set()
        last = torch.load(target / "checkpoint-8" / "optimizer.pt", weights_only=True)
        expected = torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)
        torch.testing.assert_close(last, expected, rtol=0, atol=0)


def test_checkpoint_is_whole_and_loads_from_its_folder_alone(finished, tmp_path):
    folder, trainer = finished("initial_alignment")
    checkpoint = shutil.copytree(folder / "checkpoint-8", tmp_path / "elsewhere")
    verify(checkpoint)
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "alignment_head.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "run.json",
        "manifest.json",
        "processor_config.json",
        "tokenizer.json",
        "modeling_video_panda.py",
        "processing_video_panda.py",
    } <= names
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    assert changed_names(weights_of(trainer.model), weights_of(model)) == set()


def test_damaged_checkpoints_are_passed_over(run, finished, tmp_path, caplog):
    folder, reference = finished("instruction_tuning")
    target = copy_run(folder, tmp_path / "run")
    size = (target / "checkpoint-8" / "model.safetensors").stat().st_size
    (target / "checkpoint-8" / "model.safetensors").write_bytes(bytes(size))
    (target / "checkpoint-6" / "optimizer.pt").unlink()
    resumed = run("instruction_tuning", target)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-8" in caplog.text
    assert "model.safetensors" in caplog.text
    assert "optimizer.pt is missing" in caplog.text
    assert losses_of(resumed) == losses_of(reference)


def test_nothing_whole_is_an_error_and_auto_starts_anew(run, finished, tmp_path):
    folder, reference = finished("instruction_tuning")
    target = copy_run(folder, tmp_path / "run", without=["checkpoint-3", "checkpoint-6"])
    (target / "checkpoint-8" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint to resume from; checkpoint-8: .*manifest"):
        run("instruction_tuning", target).train(resume_from_checkpoint=True)
    again = run("instruction_tuning", target)
    again.train(resume_from_checkpoint="auto")
    assert losses_of(again) == losses_of(reference)


class TestRefused:
    def test_another_stage(self, run, finished):
        folder, _ = finished("initial_alignment")
        with pytest.raises(ValueError, match="initial_alignment, expected instruction_tuning"):
            run("instruction_tuning", folder).train(resume_from_checkpoint=True)

    def test_a_checkpoint_of_another_run_and_stage(self, run, finished, tmp_path):
        folder, _ = finished("initial_alignment")
        with pytest.raises(ValueError, match="initial_alignment, expected instruction_tuning"):
            run("instruction_tuning", tmp_path / "own").train(resume_from_checkpoint=str(folder / "checkpoint-3"))

    def test_another_architecture(self, run, finished):
        folder, _ = finished("instruction_tuning")
        config = tiny_config(tiny_processor().video_token_id, text={"num_hidden_layers": 3})
        with pytest.raises(ValueError, match=r"num_hidden_layers: got 2, expected 3"):
            run("instruction_tuning", folder, model=tiny_model(config)).train(resume_from_checkpoint=True)

    def test_a_folder_of_another_run(self, run, finished):
        folder, _ = finished("instruction_tuning")
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(ValueError, match="another run"):
            run("instruction_tuning", folder).train()
        assert sorted(path.name for path in folder.iterdir()) == before

    def test_a_checkpoint_that_is_none(self, run, tmp_path):
        with pytest.raises(ValueError, match="Cannot resume from"):
            run("instruction_tuning", tmp_path / "run").train(resume_from_checkpoint=str(tmp_path))


def test_a_save_that_fails_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    """A full disk, say: the run stops, and what was saved before is still what is resumed."""
    trainer = run("instruction_tuning", tmp_path / "run")
    write = torch.save

    def full_disk(state, file, *args, **kwargs):
        if trainer.state.global_step == 6 and "optimizer" in str(file):
            raise OSError(28, "No space left on device")
        write(state, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = run("instruction_tuning", tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert not list((tmp_path / "run").glob("_staging*"))
    assert (tmp_path / "run" / "checkpoint-8").is_dir()


def test_best_model_is_found_under_its_final_name(run, samples, tmp_path):
    trainer = run(
        "instruction_tuning",
        tmp_path / "run",
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset=str(samples),
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        save_total_limit=1,
        learning_rate=1e-2,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in [str(tmp_path / "run" / f"checkpoint-{step}") for step in (3, 6, 8)]
    state = json.loads((tmp_path / "run" / Path(best).name / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def check_killed(folder, num_kills: int, seed: int) -> None:
    command = [sys.executable, killing.__file__, str(folder), str(num_kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]
    assert len(outcomes) == num_kills
    assert {outcome["stage"] for outcome in outcomes} == set(STAGE_NAMES)
    assert [outcome for outcome in outcomes if not outcome["is_equal"]] == []


def test_killed_while_saving(tmp_path):
    check_killed(tmp_path, 10, seed=0)


@pytest.mark.slow
def test_killed_while_saving_a_hundred_times(tmp_path):
    check_killed(tmp_path, 102, seed=1)
