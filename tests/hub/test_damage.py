"""Damage: of a checkpoint it is noticed when it is loaded, and a full disk leaves what was there."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import damage
import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_processor, write_tiny_checkpoint

from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaProcessor
from video_panda.evaluation import files
from video_panda.evaluation.questions import Question
from video_panda.evaluation.run_folder import Answer, RunFolder
from video_panda.hub.convert import convert_checkpoint
from video_panda.trainers.teacher_cache import TeacherCache

LOADERS = {
    "config": VideoPandaConfig.from_pretrained,
    "model": VideoPandaForConditionalGeneration.from_pretrained,
    "processor": VideoPandaProcessor.from_pretrained,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "panda"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    """One of other sizes, and one of the same sizes: other weights, words, settings."""
    return damage.write_others(tmp_path_factory.mktemp("others"))


def counts(cases, checkpoint: Path, folder: Path, good: dict, caplog) -> dict[str, list[str]]:
    """The cases by what became of them."""
    found: dict[str, list[str]] = {}
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.propagate = True
    for number, case in enumerate(cases):
        caplog.clear()
        target = case.copy_of(checkpoint, folder / f"case{number}")
        told = damage.verdict(case, damage.load_all(target, LOADERS), good, caplog.text)
        found.setdefault(told, []).append(f"{case.file} {case.way}")
        shutil.rmtree(target)
    return found


def test_damage_is_noticed(checkpoint, others, tmp_path, caplog):
    good = damage.load_all(checkpoint, LOADERS)["answer"]
    cases = list(damage.damages(checkpoint, others, num_cuts=1))
    cases = [case for number, case in enumerate(cases) if number % 2 or case.way.startswith("of ")]
    found = counts(cases, checkpoint, tmp_path, good, caplog)
    assert found.keys() <= {"noticed", "warned of", "harmless"}, found
    assert set(found.get("harmless", ())) <= {"saved_files.json missing", "saved_files.json cut off"}
    assert {case.split()[0] for case in found["warned of"]} <= {
        "config.json",
        "generation_config.json",
        "processor_config.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True])
def test_all_damage_is_noticed(checkpoint, others, tmp_path, caplog, is_sharded):
    if is_sharded:
        checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "sharded"))
        VideoPandaForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(
            checkpoint, max_shard_size="200KB"
        )
        assert not (checkpoint / "model.safetensors").exists()
    good = damage.load_all(checkpoint, LOADERS)["answer"]
    found = counts(damage.damages(checkpoint, others, num_cuts=10), checkpoint, tmp_path, good, caplog)
    assert found.keys() <= {"noticed", "warned of", "harmless"}, found


@pytest.mark.slow
def test_damaged_code_is_noticed(checkpoint, tmp_path):
    cases = list(damage.damages_of_code(checkpoint, num_cuts=3, num_files=6))
    outcomes = damage.load_damaged_code(cases, checkpoint, tmp_path)
    found = {f"{case.file} {case.way}": damage.verdict(case, *outcome) for case, outcome in zip(cases, outcomes)}
    assert {name: told for name, told in found.items() if told not in ("noticed", "harmless")} == {}


def test_a_file_changed_on_purpose_is_accepted(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(OSError, match=r"chat_template\.jinja .*take its line out of .*saved_files\.json"):
        VideoPandaProcessor.from_pretrained(folder)
    record = json.loads((folder / "saved_files.json").read_text())
    del record["chat_template.jinja"]
    (folder / "saved_files.json").write_text(json.dumps(record))
    processor = VideoPandaProcessor.from_pretrained(folder)
    assert processor.chat_template.startswith("{{ messages")
    processor.save_pretrained(folder)
    assert "chat_template.jinja" in json.loads((folder / "saved_files.json").read_text())


def test_a_checkpoint_without_a_record_loads_as_before(checkpoint, others, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "old"))
    (folder / "saved_files.json").unlink()
    assert damage.load_all(folder, LOADERS) == damage.load_all(checkpoint, LOADERS)
    shutil.copy(others["another of other sizes"] / "tokenizer.json", folder)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json and .*config\.json are not of the same checkpoint: video_token"
    ):
        VideoPandaProcessor.from_pretrained(folder)


# --- a full disk --------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("max_bytes", [0, 3_000, 100_000])
@pytest.mark.parametrize("part", ["model", "sharded model", "processor", "config"])
def test_saving_on_a_full_disk(checkpoint, tmp_path, part, max_bytes):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "saved"))
    processor = tiny_processor("metaspace_bpe")
    model = tiny_model(tiny_config(processor.video_token_id), seed=1)
    saved = {"processor": processor, "config": model.config}.get(part, model)
    options = {"max_shard_size": "150KB"} if part == "sharded model" else {}
    before = contents(folder)
    with damage.full_disk(max_bytes):
        if (part, max_bytes) in (("processor", 100_000), ("config", 100_000)):
            saved.save_pretrained(folder, **options)  # fits
            return
        with pytest.raises(OSError, match=str(folder)):
            saved.save_pretrained(folder, **options)
    assert contents(folder) == before
    assert list(folder.glob(".saving*")) == []
    saved.save_pretrained(folder, **options)  # and when there is room again
    assert contents(folder) != before


@pytest.mark.parametrize("max_bytes", [0, 5_000, 60_000])
def test_converting_on_a_full_disk(release, tmp_path, max_bytes):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with damage.full_disk(max_bytes), pytest.raises(OSError, match=str(out)):
        convert_checkpoint(release, out, overwrite=True, progress=False)
    assert contents(tmp_path) == {"out/mine.txt": b"x"}


def test_the_teacher_cache_on_a_full_disk(tmp_path):
    cache = TeacherCache(tmp_path, "teacher")
    cache.put("first", torch.ones(1, 2, 2, 8))
    cache.flush()
    before = contents(tmp_path)
    features = torch.randn(4, 8, 8, 64)
    cache.put("second", features)
    with damage.full_disk(4_000), pytest.raises(OSError, match=str(cache.folder)):
        cache.flush()
    assert contents(tmp_path) == before
    cache.flush()
    assert torch.equal(TeacherCache(tmp_path, "teacher").get("second"), features)


def test_an_evaluation_on_a_full_disk(tmp_path):
    questions = [Question(id=str(n), video="v.mp4", question="What?", answer="a", kind="what") for n in range(40)]
    run = RunFolder(tmp_path / "run", {"model": "m"})
    run.add(questions[:1], [Answer("red")])
    before = contents(tmp_path / "run")
    with damage.full_disk(600), pytest.raises(OSError, match=r"answers\.jsonl"):
        run.add(questions[1:], [Answer("blue")] * 39)
    with damage.full_disk(10), pytest.raises(OSError, match=r"answers\.jsonl"):
        run.gather(questions)
    run.close()
    assert contents(tmp_path / "run") == before
    again = RunFolder(tmp_path / "run", {"model": "m"})
    assert again.answers == {"0": Answer("red")}
    again.close()


def test_a_disk_that_gives_up_while_the_next_batch_is_answered(tmp_path, monkeypatch):
    file = files.GrowingFile(tmp_path / "answers.jsonl")
    file.append("first\n")
    file.wait()

    def give_up(number):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "fsync", give_up)
    file.append("second\n")
    with pytest.raises(OSError, match=r"answers\.jsonl"):
        file.append("third\n")
    file.close()
    assert file.path.read_text() == "first\n"


# --- shards that would run code -----------------------------------------------------------------------------------------


class Payload:
    """Unpickling this runs a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, subprocess.check_call, torch.load, __import__])
def test_a_malicious_shard_runs_nothing(own_release, tmp_path, function, is_zip):
    trace = tmp_path / "ran"
    calls = {
        os.system: f"touch {trace}",
        eval: f"open({str(trace)!r}, 'w')",
        subprocess.check_call: ["touch", str(trace)],
    }
    payload = Payload(function, calls.get(function, "antigravity"))
    shard = own_release / "pytorch_model-00002-of-00003.bin"
    good = torch.load(shard, weights_only=True)
    torch.save({**good, "model.norm.weight": payload}, shard, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=shard.name):
        convert_checkpoint(own_release, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]
    assert "antigravity" not in sys.modules
