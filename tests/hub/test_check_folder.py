"""What may not be pushed is refused, all of it at once and by the name of its file; what may be is loaded as others will."""

import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny_checkpoint

from video_panda import VideoPandaForConditionalGeneration, cli
from video_panda.hub import leaks
from video_panda.hub.check_folder import FolderProblemsError, check_folder
from video_panda.hub.fresh_process import load_in_fresh_process

TOKEN = "hf_" + "aB3" * 11


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Read-only."""
    folder = tmp_path_factory.mktemp("check") / "checkpoint"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def problems_of(folder: Path, **options) -> dict[str, str]:
    """File -> what is wrong with it; every problem has one."""
    with pytest.raises(FolderProblemsError) as error:
        check_folder(folder, **{"loads": False, **options})
    for problem in error.value.problems:
        assert str(problem) in str(error.value)
    return {problem.file: problem.text for problem in error.value.problems}


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_whole_folder_loads_and_answers(folder):
    for name in (".hidden", "_notes.txt", "trainer_state.json", "run.json"):
        (folder / name).write_text("/home/me/secret")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"")
    (folder / "notes").mkdir()
    (folder / "notes" / "more.md").write_text("See https://example.org/home/page and data/train.json.")
    checked = check_folder(folder, timeout_s=300, device="cpu")
    assert set(checked.left_out) == {".hidden", "_notes.txt", "trainer_state.json", "run.json", "checkpoint-5/"}
    assert {"config.json", "model.safetensors", "modeling_video_panda.py", "notes/more.md"} <= set(checked.files)
    assert not {".hidden", "_notes.txt", "checkpoint-5/optimizer.pt"} & set(checked.files)


def test_the_model_of_the_package_whose_code_is_links():
    # The links lead to what the package ships; the files themselves are what is uploaded.
    checked = check_folder(cli.DEFAULT_MODEL, loads=False)
    assert "stab_video_panda.py" in checked.files


def test_all_problems_are_found_at_once(folder):
    (folder / "processor_config.json").unlink()
    (folder / "stab_video_panda.py").unlink()
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "notes.md").write_text(f"token: {TOKEN}")
    found = problems_of(folder)
    assert set(found) == {"processor_config.json", "stab_video_panda.py", "optimizer.pt", "notes.md"}
    assert problems_of(folder, exclude=["notes.md", "*.pt"]).keys() == {"processor_config.json", "stab_video_panda.py"}


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "model.safetensors"])
def test_what_is_missing_is_named(folder, name):
    (folder / name).unlink()
    assert "is missing" in problems_of(folder)[name]


def test_no_folder(tmp_path):
    with pytest.raises(OSError, match="none is not a folder"):
        check_folder(tmp_path / "none")


# Code -----------------------------------------------------------------------------------------------------------------


def test_code_files_by_auto_map_and_by_imports(folder):
    code = sorted(path.name for path in folder.glob("*.py"))
    assert len(code) > 15
    for name in code:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert "is missing" in problems_of(folder)[name]
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("value", "file", "message"),
    [
        ("other/repo--modeling_video_panda.VideoPandaModel", "config.json", "from another repository, other/repo"),
        ("modeling_video_panda.Missing", "modeling_video_panda.py", "has no class Missing"),
        ("nowhere.Missing", "nowhere.py", "is missing: auto_map.AutoModel of config.json names it"),
    ],
)
def test_auto_map(folder, value, file, message):
    edit(folder / "config.json", lambda content: content["auto_map"].update(AutoModel=value))
    assert message in problems_of(folder)[file]


def test_auto_map_of_a_part_of_the_processor(folder):
    edit(
        folder / "processor_config.json",
        lambda content: content["video_processor"]["auto_map"].update(AutoVideoProcessor="lost.Lost"),
    )
    assert "is missing" in problems_of(folder)["lost.py"]


def test_a_checkpoint_without_code_and_one_of_another_model(folder):
    edit(folder / "config.json", lambda content: content.update(auto_map=None, model_type="llama"))
    found = problems_of(folder)["config.json"]
    assert "auto_map has no" in found
    with pytest.raises(FolderProblemsError, match="model_type is 'llama', expected 'video_panda'"):
        check_folder(folder, loads=False)


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(folder) -> Path:
    VideoPandaForConditionalGeneration.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    return folder


def test_shards_and_their_index(sharded):
    check_folder(sharded, loads=False)
    first, second, *_ = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    shutil.copy(sharded / first, sharded / second)
    assert "does not hold" in problems_of(sharded)[second]
    (sharded / second).unlink()
    assert "is missing: model.safetensors.index.json names it" in problems_of(sharded)[second]


def test_two_sets_of_weights_and_some_of_nobody(sharded, checkpoint):
    shutil.copy(checkpoint / "model.safetensors", sharded)
    assert "not clear which of the two" in problems_of(sharded)["model.safetensors"]
    (sharded / "model.safetensors").rename(sharded / "more.safetensors")
    assert "is loaded by nothing" in problems_of(sharded)["more.safetensors"]


def test_weights_that_were_cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut off" in problems_of(folder)["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("alignment_head.safetensors", "alignment head"),
        ("optimizer.pt", "optimizer"),
        ("training_args.bin", "pickled training arguments"),
        ("rng_state_0.pth", "random number generators"),
        ("scheduler.pt", "scheduler"),
        ("global_step4/zero_pp_rank_0.pt", "DeepSpeed"),
        ("adapter_model.safetensors", "LoRA adapter"),
    ],
)
def test_what_only_training_needs(folder, name, what):
    (folder / name).parent.mkdir(exist_ok=True)
    save_file({"x": torch.zeros(1)}, folder / name)
    text = problems_of(folder)[name]
    assert "only training needs it" in text
    assert what in text
    assert "remove it, or exclude it" in text


@pytest.mark.parametrize(
    ("tensor", "what"), [("alignment_head.0.weight", "alignment head"), ("model.q.lora_A.weight", "LoRA adapter")]
)
def test_tensors_that_only_training_needs(folder, tensor, what):
    path = folder / "model.safetensors"
    save_file({**load_file(path), tensor: torch.zeros(2)}, path)
    text = problems_of(folder)["model.safetensors"]
    assert what in text
    assert tensor in text


@pytest.mark.parametrize("name", ["weights.bin", "weights.dat", "notes.txt", "clip.mp4"])
def test_a_pickle_by_name_or_by_content(folder, name):
    torch.save({"x": torch.zeros(1)}, folder / name)
    assert "pickle" in problems_of(folder)[name]
    (folder / name).write_bytes(pickle.dumps({"x": [1, 2, 3]}))
    assert "is a pickle" in problems_of(folder)[name]


def test_what_only_begins_like_a_pickle(folder):
    (folder / "noise.dat").write_bytes(b"\x80\x04" + bytes(range(255, 100, -1)))
    check_folder(folder, loads=False)


# What must not leave the disk -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        (TOKEN, "a Hugging Face token"),
        ("sk-proj-" + "a1B2" * 8, "an OpenAI-like key"),
        ("AKIA" + "ABCD1234" * 2, "an AWS key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("ghp_" + "a1B2" * 9, "a GitHub token"),
    ],
)
@pytest.mark.parametrize("file", ["notes.md", "tokenizer_config.json", "model.safetensors", "clip.mp4"])
def test_tokens_and_keys_in_any_file(folder, secret, kind, file):
    path = folder / file
    if file.endswith(".json"):
        edit(path, lambda content: content.update(name_or_path=secret))
    elif file.endswith(".safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", "note": secret})
    else:
        path.write_bytes((b"\0\xff" if file.endswith(".mp4") else b"line\n") + f"= {secret} =".encode())
    text = problems_of(folder)[file]
    assert kind in text
    assert secret not in text


@pytest.mark.parametrize(
    "path", ["/home/me/models/panda", "/Users/me/x", "C:\\Users\\me\\panda", "/root/x", "/mnt/d/x"]
)
def test_absolute_paths_in_text(folder, path):
    (folder / "README.md").write_text(f"# Panda\n\nTrained from `{path}`.\n")
    assert f"line 3: an absolute path ({path}" in problems_of(folder)["README.md"]
    (folder / "README.md").unlink()
    edit(folder / "config.json", lambda content: content["text_config"].update(_name_or_path=path))
    assert "an absolute path" in problems_of(folder)["config.json"]


def test_a_token_across_two_pieces_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(leaks, "_BYTES_AT_A_TIME", 64)
    path = tmp_path / "clip.mp4"
    for place in range(30, 100, 7):
        path.write_bytes(b"\0" * place + TOKEN.encode() + b"\0" * 200)
        assert [line.split(":")[0] for line in leaks.find_secrets(path)][-1:] == [f"byte {place}"]


def test_any_absolute_path_as_a_value_of_json_and_the_folders_own(folder):
    (folder / "training.json").write_text(json.dumps({"data": ["/data/valley/train.json"]}))
    (folder / "notes.md").write_text(f"It lies in {folder}.")
    found = problems_of(folder)
    assert "/data/valley/train.json" in found["training.json"]
    assert str(folder) in found["notes.md"]


def test_words_that_only_look_like_secrets(folder):
    (folder / "notes.md").write_text(
        "hf_hub_download, hf_transfer, risk-averse-and-task-specific-learning, https://example.org/home/page, ~/.cache, "
        "and/or, C:\\, /home, sk-learn-is-a-library-of-some-size"
    )
    check_folder(folder, loads=False)


# Links and other things -----------------------------------------------------------------------------------------------


def test_links(folder, tmp_path):
    (tmp_path / "outside.txt").write_text("private")
    (tmp_path / "away").mkdir()
    (folder / "out.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "broken.txt").symlink_to(tmp_path / "nothing")
    (folder / "away").symlink_to(tmp_path / "away")
    (folder / "alias.json").symlink_to("config.json")  # inside: the file is uploaded
    found = problems_of(folder)
    assert set(found) == {"out.txt", "broken.txt", "away"}
    assert "outside the folder" in found["out.txt"]
    assert "not there" in found["broken.txt"]
    assert "link to a folder" in found["away"]


@pytest.mark.skipif(os.name == "nt", reason="has no such files")
def test_what_is_no_file(folder, monkeypatch):
    monkeypatch.chdir(folder)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as own:
        own.bind("queue")
        assert "no regular file" in problems_of(folder)["queue"]


# The fresh process ----------------------------------------------------------------------------------------------------


def test_code_that_needs_this_package_does_not_load(folder):
    path = folder / "generation_video_panda.py"
    path.write_text("import video_panda\n" + path.read_text())
    text = problems_of(folder, loads=True)["the folder"]
    assert "does not load in a fresh process" in text
    assert "video_panda" in text
    assert "\n" not in text


@pytest.mark.slow
def test_weights_that_are_damaged_do_not_answer(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"].fill_(torch.nan)
    save_file(weights, path, metadata={"format": "pt"})
    assert "not finite" in problems_of(folder, loads=True)["the folder"]


def test_time_is_limited(folder):
    files = check_folder(folder, loads=False).files
    assert "within 0.01 s" in load_in_fresh_process(files, timeout_s=0.01)


@pytest.mark.slow
def test_only_what_is_uploaded_is_there(folder):
    files = check_folder(folder, loads=False).files
    error = load_in_fresh_process({name: path for name, path in files.items() if name != "tokenizer.json"})
    assert error is not None
    assert "\n" not in error
