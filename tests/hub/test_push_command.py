"""`push_checkpoint` against the tests' Hub: what is there afterwards, what is refused, and what is said about it."""

import json
import shutil
from pathlib import Path

import pytest
from clips import write_clip
from hub_server import USER, HubServer, run_client
from run_folders import judge_row, write_run
from tiny import tiny_config, tiny_model, write_tiny_checkpoint

from video_panda.hub.push import parse_dataset_ids, push_checkpoint, read_latency

REPO = f"{USER}/panda"

PUSH = """
    import json, os
    from video_panda.hub.push import push_checkpoint

    folder, run = os.environ["FOLDER"], os.environ["RUN"]
    done = push_checkpoint(
        folder, os.environ["REPO"], results=[run], dataset_ids={"msvd-qa": "you/msvd-qa"}, device="cpu", report=print
    )
    print(json.dumps([done.commit, done.card]))
"""

# Without the package: the card is valid, the Hub shows its results, and its six lines answer a question.
READ = """
    import json, os
    from huggingface_hub import ModelCard, model_info

    repo_id = os.environ["REPO"]
    card = ModelCard.load(repo_id)
    card.validate()
    shown = model_info(repo_id).card_data.eval_results
    code = card.text.split("```python\\n")[1].split("```")[0].replace("clip.mp4", os.environ["CLIP"])
    names = {}
    exec(code, names)
    print(json.dumps([[[own.metric_name, own.metric_value] for own in shown], type(names["model"]).__module__]))
"""


def last_line(process):
    return json.loads(process.stdout.splitlines()[-1])


def check_faultless(server):
    assert server.unknown_requests == []
    assert server.internal_errors == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Read-only."""
    folder = tmp_path_factory.mktemp("push") / "checkpoint"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def test_round_trip_with_results(folder, tmp_path):
    run = write_run(tmp_path / "run", folder, judges={"gpt-3.5-turbo-0125": [judge_row("all")]})
    write_clip(tmp_path / "clip.mp4", num_frames=12, fps=4, width=96, height=64)
    (folder / "trainer_state.json").write_text("{}")
    with HubServer() as server:
        environment = {"FOLDER": str(folder), "RUN": str(run), "REPO": REPO}
        process = run_client(PUSH, server, tmp_path / "writer", **environment)
        environment = {"REPO": REPO, "CLIP": str(tmp_path / "clip.mp4")}
        read = run_client(READ, server, tmp_path / "reader", blocked=["video_panda"], **environment)
    check_faultless(server)
    commit, card = last_line(process)
    shown, module = last_line(read)

    # One commit after that of the empty repository, with everything in it and nothing else.
    repository = server.repositories[REPO]
    assert list(repository.commits)[1:] == [commit]
    pushed = {path: file.content for path, file in repository.files().items()}
    expected = {path.name for path in folder.iterdir()} - {"trainer_state.json"}
    assert set(pushed) == expected | {".gitattributes", ".eval_results/msvd-qa.yaml"}
    assert pushed["README.md"] == (folder / "README.md").read_bytes()

    assert card == "written"
    assert dict(shown) == {
        "exact match": 0.4,
        "containment": 0.6124,
        "token F1": 0.45,
        "accuracy (judge gpt-3.5-turbo-0125, 2026-11-27)": 0.7013,
        "score 0-5 (judge gpt-3.5-turbo-0125, 2026-11-27)": 3.46,
    }
    assert module.startswith(f"transformers_modules.{USER}.panda.")

    # What was said beforehand: files with sizes, the sum, where to, what not.
    for words in (
        f"{len(pushed) - 1} files, ",
        f"go to {REPO} (revision main, new):",
        "model.safetensors",
        "left out: trainer_state.json",
        "README.md: written",
        "pushed: http",
    ):
        assert words in process.stdout, words


# Several pushes by one process, which does not load what it pushes: that is tested above.
SCENES = """
    import json, os, traceback
    from pathlib import Path
    from video_panda import VideoPandaForConditionalGeneration
    from video_panda.hub import push as module
    from video_panda.hub.push import push_checkpoint
    from huggingface_hub import HfApi

    check, folder, said = module.check_folder, Path(os.environ["FOLDER"]), {}
    module.check_folder = lambda folder, **options: check(folder, **{**options, "loads": False})

    def push(name, *args, **options):
        lines = []
        try:
            done = push_checkpoint(folder, *args, report=lines.append, **options)
            said[name] = {"commit": done.commit, "removed": done.removed, "card": done.card, "lines": lines}
        except (ValueError, OSError) as error:
            said[name] = {"error": f"{type(error).__name__}: {error}", "lines": lines}

    push("private", "user/private", private=True, revision="v1")
    push("again", "user/private", revision="v1")
    push("first", "user/panda")
    push("public", "user/panda", private=True)
    HfApi().upload_file(path_or_fileobj=b"Mine.\\n", path_in_repo="README.md", repo_id="user/panda")
    VideoPandaForConditionalGeneration.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    push("sharded", "user/panda")
    push("token", "user/other", token="hf_wrong")

    create_commit = HfApi.create_commit
    def fail(*args, **options):
        raise ConnectionError("the line is dead\\nfor good")
    HfApi.create_commit = fail
    push("broken", "user/broken", revision="v2")
    HfApi.create_commit = create_commit
    push("mended", "user/broken", revision="v2")

    describe = module.describe
    def describe_while_somebody_pushes(*args):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="user/private", revision="v1")
        return describe(*args)
    module.describe = describe_while_somebody_pushes
    push("race", "user/private", revision="v1")
    print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def scenes(checkpoint, tmp_path_factory):
    """(what was said, the server afterwards) of `SCENES`."""
    home = tmp_path_factory.mktemp("scenes")
    folder = shutil.copytree(checkpoint, home / "checkpoint")
    with HubServer() as server:
        said = last_line(run_client(SCENES, server, home / "home", FOLDER=str(folder)))
    check_faultless(server)
    return said, server


def test_private_and_a_branch_that_was_not_there(scenes):
    said, server = scenes
    repository = server.repositories["user/private"]
    assert repository.private
    assert "model.safetensors" in repository.files("v1")
    assert "model.safetensors" not in repository.files("main")
    assert "go to user/private (revision v1, new):" in said["private"]["lines"][1]


def test_pushing_the_same_again_is_no_new_commit(scenes):
    said, _ = scenes
    assert said["again"]["commit"] == said["private"]["commit"]
    assert "go to user/private (revision v1):" in said["again"]["lines"][1]


def test_a_public_repository_does_not_become_private(scenes):
    said, server = scenes
    assert "user/panda is there and is public" in said["public"]["error"]
    assert not server.repositories["user/panda"].private


def test_weights_of_an_earlier_push_go_in_the_same_commit(scenes):
    said, server = scenes
    repository = server.repositories["user/panda"]
    assert said["sharded"]["removed"] == ["model.safetensors"]
    assert any("removed by the same commit: model.safetensors" in line for line in said["sharded"]["lines"])
    before, after = (set(repository.files(said[name]["commit"])) for name in ("first", "sharded"))
    assert "model.safetensors" in before
    assert "model.safetensors" not in after
    assert "model.safetensors.index.json" in after
    assert len(repository.commits) == 4  # empty, first, the card, sharded


def test_a_card_written_on_the_hub_is_kept(scenes):
    said, server = scenes
    assert server.repositories["user/panda"].files()["README.md"].content == b"Mine.\n"
    assert "written or edited by hand" in said["sharded"]["card"]


def test_a_refusal_of_the_hub_is_one_line(scenes):
    said, server = scenes
    assert said["token"]["error"].startswith("OSError: user/other: the Hub confirmed no commit")
    assert "401" in said["token"]["error"]
    assert "\n" not in said["token"]["error"]
    assert "user/other" not in server.repositories


def test_what_a_failure_leaves_is_said_and_the_next_push_mends_it(scenes):
    said, server = scenes
    assert said["broken"]["error"] == (
        "OSError: user/broken: the Hub confirmed no commit, so that no file was pushed; made was the repository user/broken, "
        "which is empty and the branch v2, which is a copy of main. Give the same command again (ConnectionError: the line is "
        "dead)"
    )
    assert "model-00001-of-" in str(sorted(server.repositories["user/broken"].files("v2")))
    assert said["mended"]["commit"] == server.repositories["user/broken"].resolve("v2")


def test_what_somebody_else_pushed_meanwhile_is_not_overwritten(scenes):
    said, server = scenes
    assert "the Hub confirmed no commit, so that no file was pushed. Give" in said["race"]["error"]
    assert {"x.txt", "model.safetensors"} <= set(server.repositories["user/private"].files("v1"))


# Without a Hub --------------------------------------------------------------------------------------------------------


def dry(folder, repo_id="you/panda", **options):
    """A dry run that does not load, and what it says."""
    lines = []
    return push_checkpoint(folder, repo_id, dry_run=True, report=lines.append, **options), lines


@pytest.fixture
def unloaded(monkeypatch):
    from video_panda.hub import push as module

    check = module.check_folder
    monkeypatch.setattr(module, "check_folder", lambda folder, **options: check(folder, **{**options, "loads": False}))
    # Nothing is asked of a Hub.
    monkeypatch.setattr(module, "HfApi", lambda **options: None)


@pytest.mark.usefixtures("unloaded")
def test_a_dry_run_lists_and_writes_nothing(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    plan, lines = dry(folder, exclude=["chat_template.jinja"])
    assert plan.commit is None
    assert plan.files["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert plan.files["README.md"] > 1000
    assert plan.num_bytes == sum(plan.files.values())
    assert "chat_template.jinja" in plan.left_out
    assert "would go to you/panda (revision main):" in lines[1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.usefixtures("unloaded")
def test_results_of_another_model_are_refused_before_anything(folder, tmp_path):
    run = write_run(tmp_path / "run", folder)
    tiny_model(tiny_config(), seed=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="the run is of another model"):
        dry(folder, results=[run])


@pytest.mark.usefixtures("unloaded")
def test_the_card_is_checked_like_a_file(folder):
    for words, message in (("hf_" + "aB3" * 11, "a Hugging Face token"), ("See /home/me/notes.", "an absolute path")):
        with pytest.raises(ValueError, match=rf"README\.md: line \d+: {message}"):
            dry(folder, description=words)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("repo_id", ["panda", "a/b/c", "you/pan da"])
def test_names_of_repositories(folder, repo_id):
    with pytest.raises(ValueError, match=r"[Rr]epo"):
        dry(folder, repo_id)


def test_a_folder_that_is_not_fit_is_not_pushed(folder):
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"not fit to be pushed \(1 problems\):\n  optimizer\.pt: only training needs it"
    ):
        dry(folder)


def test_options_of_the_command_line(tmp_path):
    assert parse_dataset_ids(["msvd-qa=you/msvd-qa"]) == {"msvd-qa": "you/msvd-qa"}
    for wrong in ("msvd-qa", "msvd-qa=", "=you/x", "msvd-qa=x"):
        with pytest.raises(ValueError, match=r"BENCHMARK=OWNER/DATASET"):
            parse_dataset_ids([wrong])
    path = tmp_path / "latency.json"
    path.write_text('[{"device": "H100", "ms": 41}]')
    assert read_latency(path) == [{"device": "H100", "ms": 41}]
    for content in ("{}", "[1]", "[{}]", '[{"a": [1]}]', "["):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"latency\.json"):
            read_latency(path)
