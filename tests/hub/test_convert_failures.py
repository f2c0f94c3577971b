"""The conversion's other side: bad checkpoints, taken destinations, interrupted runs, the Hub, and peak memory."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from release_checkpoints import (
    assert_same_weights,
    release_config_of,
    release_shapes,
    save_sharded,
    spoil,
    weights_of,
    write_json,
)
from safetensors.torch import save_file

from video_panda.hub import destination, release_config, shards
from video_panda.hub.convert import convert_checkpoint

# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"model.video_tower.extra.weight": torch.zeros(2)}),
            "unknown.*model.video_tower.extra.weight",
        ),
        (lambda t: t.update({"model.vision_clip.x": torch.zeros(2)}), r"unknown \(1\): model.vision_clip.x"),
        (lambda t: t.pop("model.video_tower.dpe.bias"), r"missing \(1\): model.video_tower.dpe.bias"),
        (lambda t: t.pop("model.video_tower.dec.attn.in_proj_weight"), r"missing \(1\): .*in_proj_weight$"),
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "missing.*model.layers.2.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "missing.*lm_head.weight"),
        (lambda t: t.pop("model.embed_tokens.weight"), "model.embed_tokens.weight.*it is missing"),
        (
            lambda t: t.update({"model.video_tower.balance": torch.zeros(17)}),
            r"wrong shape \(1\): model.video_tower.balance \(got \(17,\), expected \(16,\)\)",
        ),
        (
            lambda t: t.update({"model.video_tower.lmhra1.pos_embed.1.weight": torch.zeros(10, 16)}),
            r"got \(10, 16\), expected \(10, 16, 1, 1, 1\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(64, 16)}),
            r"lm_head.weight \(got \(64, 16\), expected \(60,",
        ),
        (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(50, 16)}), "vocab_size is 60, but .* 50 rows"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(16).to(torch.int8)}),
            "dtype.*model.norm.weight.*torch.int8",
        ),
    ],
)
def test_wrong_tensors_are_named(change, message, own_release, tmp_path):
    spoil(own_release, change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(own_release, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "another model: model_type is 'llava', expected 'videopanda'"),
        ({"model_type": None}, "another model: model_type is None"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', expected 'mlp2x_gelu'"),
        ({"conv_stride": None}, "lacks conv_stride"),
        ({"hidden_size": 17}, "config.json: .*hidden size"),
        ({"image_size": 50}, "image_size .50 px. must be a multiple"),
        ({"num_hidden_layers": 5}, r"missing \(9\): .*model.layers.4"),
        ({"num_hidden_layers": 3}, r"unknown \(9\): model.layers.3"),
    ],
)
def test_a_config_that_does_not_fit(change, message, own_release, tmp_path):
    config = json.loads((own_release / "config.json").read_text())
    write_json(own_release / "config.json", config | change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(own_release, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(own_release, tmp_path):
    shard = own_release / "pytorch_model-00002-of-00003.bin"
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"index\.json names pytorch_model-00002-of-00003\.bin"):
        convert_checkpoint(own_release, tmp_path / "out", progress=False)
    (own_release / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        convert_checkpoint(own_release, tmp_path / "out", progress=False)
    with pytest.raises(FileNotFoundError, match="release do: name one as the subfolder"):
        convert_checkpoint(tmp_path, tmp_path / "out", progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out", progress=False)
    with pytest.raises(NotADirectoryError, match=r"config\.json is not a folder"):
        convert_checkpoint(own_release / "config.json", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


class Trap:
    """Unpickling this makes a file: what a malicious checkpoint would do."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_malicious_pickle_is_refused_and_not_run(own_release, tmp_path):
    shard = own_release / "pytorch_model-00003-of-00003.bin"
    torch.save({"lm_head.weight": Trap(tmp_path / "sprung")}, shard)
    with pytest.raises(ValueError, match=r"pytorch_model-00003-of-00003\.bin holds something else than tensors"):
        convert_checkpoint(own_release, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


def test_pickles_are_only_mapped_and_never_trusted(release, tmp_path, monkeypatch):
    load, calls = torch.load, []

    def recorded(path, **options):
        calls.append(options)
        return load(path, **options)

    monkeypatch.setattr(torch, "load", recorded)
    convert_checkpoint(release, tmp_path / "out", progress=False)
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": True}] * 6  # 3 shards, looked over and read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"no checkpoint", "was not loaded|cannot be read"),
        ("truncated", "cannot be read"),
        ("list", "must hold a dict of tensors"),
        ("legacy", "cannot be read"),
    ],
)
def test_a_damaged_shard_is_named(content, message, own_release, tmp_path):
    shard = own_release / "pytorch_model-00001-of-00003.bin"
    if content == "list":
        torch.save([torch.zeros(2)], shard)
    elif content == "legacy":
        torch.save({"lm_head.weight": torch.zeros(2)}, shard, _use_new_zipfile_serialization=False)
    else:
        shard.write_bytes(shard.read_bytes()[:5000] if content == "truncated" else content)
    with pytest.raises(ValueError, match=rf"00001-of-00003\.bin.*({message})"):
        convert_checkpoint(own_release, tmp_path / "out", progress=False)


def test_a_truncated_safetensors_file_is_named(own_release, tmp_path, converted):
    for file in own_release.glob("pytorch_model*"):
        file.unlink()
    (own_release / "model.safetensors").write_bytes((converted / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        convert_checkpoint(own_release, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"lm_head.weight": "../elsewhere.bin"}, "files beside the index, got '../elsewhere.bin'"),
        ({"lm_head.weight": "pytorch_model-00001-of-00003.bin"}, "says that .* but it is not"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit(weight_map, message, own_release, tmp_path):
    index = own_release / "pytorch_model.bin.index.json"
    before = json.loads(index.read_text())["weight_map"]
    write_json(index, {"weight_map": {**before, **weight_map} if weight_map else {}})
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(own_release, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
        ({"max_shard_size": "five"}, "max_shard_size .* got 'five'"),
        ({"max_shard_size": 0}, "max_shard_size"),
        ({"vision_config": {"use_gstra": False}}, "EVE checkpoint only"),
    ],
)
def test_wrong_options(options, message, release, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(release, tmp_path / "out", progress=False, **options)
    assert not list(tmp_path.iterdir())


# --- the destination ----------------------------------------------------------------------------------------------------


def test_a_destination_that_is_taken(release, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert_checkpoint(release, out, progress=False)  # an empty folder is not taken
    with pytest.raises(FileExistsError, match="out exists and is not empty"):
        convert_checkpoint(release, out, progress=False)
    (out / "mine.txt").write_text("x")
    convert_checkpoint(release, out, overwrite=True, progress=False)
    assert not (out / "mine.txt").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is not a folder"):
        convert_checkpoint(release, tmp_path / "file", overwrite=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_the_source_is_never_overwritten(own_release):
    for place in (own_release, own_release.parent):
        with pytest.raises(ValueError, match="is the source itself, or holds it"):
            convert_checkpoint(own_release, place, overwrite=True, progress=False)
    assert (own_release / "pytorch_model-00001-of-00003.bin").is_file()


def interrupt(monkeypatch, after: int, error: BaseException) -> None:
    """Let the writing of tensors fail after some."""
    write = shards.SafetensorsWriter.write
    calls = iter(range(10**6))

    def failing(self, name, pieces):
        if next(calls) == after:
            raise error
        write(self, name, pieces)

    monkeypatch.setattr(shards.SafetensorsWriter, "write", failing)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_nothing(error, release, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 40, error)
        with pytest.raises(type(error)):
            convert_checkpoint(release, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
    convert_checkpoint(release, tmp_path / "out", progress=False)


def test_a_killed_run_leaves_nothing_that_looks_finished(release, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(destination.shutil, "rmtree", lambda path: None)  # killed: nobody cleans up
        interrupt(patch, 40, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(release, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not list(tmp_path.rglob("config.json"))
    convert_checkpoint(release, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_between_the_old_folder_and_the_new(release, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    replace = os.replace

    def killed(source, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(destination.os, "replace", killed)
        patch.setattr(destination.shutil, "rmtree", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(release, out, overwrite=True, progress=False)
    assert not out.exists()
    with pytest.raises(FileExistsError):  # the old folder is back before anything else is done
        convert_checkpoint(release, out, progress=False)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_overwrite_keeps_the_old_folder(release, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    interrupt(monkeypatch, 40, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(release, out, overwrite=True, progress=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_foreign_partial_folder_is_left_alone(release, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"out\.partial is in the way"):
        convert_checkpoint(release, tmp_path / "out", progress=False)
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


# --- the Hub, progress, memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_safetensors", [False, True])
def test_only_the_files_needed_are_downloaded(has_safetensors, release, converted, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    shutil.copytree(release, hub / "videopanda_fitu")
    shutil.copytree(release, hub / "videopanda_prtr1")
    if has_safetensors:
        tensors = {}
        for shard in release.glob("*.bin"):
            tensors |= torch.load(shard, weights_only=True)
        save_file(tensors, hub / "videopanda_fitu" / "model.safetensors")
        (hub / "videopanda_fitu" / "pytorch_model.bin.index.json").unlink()
    snapshot = tmp_path / "cache" / "abc123"
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        for path in sorted(hub.rglob("*.*")):
            name = path.relative_to(hub).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(release_config, "snapshot_download", snapshot_download)
    out = convert_checkpoint(
        "jh-yi/Video-Panda-7B", tmp_path / "out", subfolder="videopanda_fitu", revision="main", progress=False
    )
    assert_same_weights(weights_of(out), weights_of(converted))
    assert asked[0] == ("jh-yi/Video-Panda-7B", "main")
    assert set(asked[1:]) == {("jh-yi/Video-Panda-7B", "abc123")}, "all of one commit"
    fetched = {path.name for path in (snapshot / "videopanda_fitu").iterdir()}
    assert [path.name for path in snapshot.iterdir()] == ["videopanda_fitu"]
    assert ("model.safetensors" in fetched) == has_safetensors
    assert any(name.endswith(".bin") for name in fetched) != has_safetensors


def test_a_repository_that_cannot_be_had(tmp_path, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(release_config, "snapshot_download", snapshot_download)
    with pytest.raises(OSError, match=r"no/such: no such folder, and it cannot be had from the Hub: no network"):
        convert_checkpoint("no/such", tmp_path / "out", progress=False)


def test_progress_goes_to_stderr(release, tmp_path, capsys):
    convert_checkpoint(release, tmp_path / "out")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "100%" in captured.err


PEAK_MEMORY = """
import sys
from video_panda.hub.convert import convert_checkpoint

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

small, large, out = sys.argv[1:]
convert_checkpoint(small, out + "/small", progress=False)  # whatever is imported and built on the first use
for dtype in (None, "float32"):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    convert_checkpoint(large, out + "/large", dtype=dtype, overwrite=True, progress=False)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through /proc")
def test_peak_memory(release, large_release, tmp_path):
    command = [sys.executable, "-c", PEAK_MEMORY, str(release), str(large_release), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    largest = max(path.stat().st_size for path in large_release.glob("*.bin"))
    stab = sum(tensor.nbytes for name, tensor in weights_of(tmp_path / "large").items() if ".stab." in name)
    for dtype, growth in zip(("as stored", "float32"), map(int, result.stdout.split())):
        print(f"{dtype}: peak {growth / 1e6:.1f} MB, {growth / largest:.2f} x the largest shard")
        assert growth < 1.3 * largest + stab


@pytest.fixture(scope="module")
def large_release(tmp_path_factory) -> Path:
    """Shards of some 60 MB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 8000, "num_hidden_layers": 6}
    config = release_config_of("videopanda", 16, **sizes)
    shapes = release_shapes(config, "videopanda", 16)
    write_json(folder / "config.json", config)
    save_sharded(folder, {name: torch.full(shape, 0.5, dtype=torch.float16) for name, shape in shapes.items()})
    return folder
