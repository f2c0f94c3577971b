"""Pushing to the Hub (the tests' own) and loading back by repo id, in processes without the package."""

import json
import math

import pytest
import torch
from hub_server import USER, HubServer, run_client
from tiny import write_tiny_checkpoint

INLINE = {"lfs_threshold_bytes": math.inf, "lfs_suffixes": ()}
LFS = {"lfs_threshold_bytes": 100_000, "lfs_suffixes": (".safetensors",)}

# Writes with the installed package, as its users do: model and processor, then a changed model.
PUSH = """
    import json, os, torch
    from video_panda import VideoPandaForConditionalGeneration, VideoPandaProcessor

    source, repo_id = os.environ["SOURCE"], os.environ["REPO"]
    model = VideoPandaForConditionalGeneration.from_pretrained(source)
    processor = VideoPandaProcessor.from_pretrained(source)
    commits = [model.push_to_hub(repo_id, tags=["video-panda"]).oid, processor.push_to_hub(repo_id).oid]
    commits.append(processor.push_to_hub(repo_id).oid)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    commits.append(model.push_to_hub(repo_id, commit_message="Double the head").oid)
    try:
        refused = f"no error: {processor.push_to_hub('user/refused', token='hf_wrong')}"
    except OSError as error:
        refused = f"{type(error).__name__} {error.response.status_code}"
    print(json.dumps([*commits, refused]))
"""

# Loads without the package, and pushes what it loaded as remote code to another repository.
LOAD = """
    import json, os, torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

    torch.manual_seed(0)
    repo_id, pinned, flag = os.environ["REPO"], os.environ["PINNED"], {"trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(repo_id, **flag)
    prompt = "USER: <video> What happens in this video? ASSISTANT:"
    inputs = processor(text=[prompt], videos=[torch.load(os.environ["CLIP"])])
    results = {"pixels": inputs["pixel_values_videos"], "input_ids": inputs["input_ids"]}
    modules = []
    for name, options in (("main", {}), ("pinned", {"revision": pinned})):
        model = AutoModelForCausalLM.from_pretrained(repo_id, **options, **flag)
        modules.append(type(model).__module__)
        with torch.no_grad():
            results[f"logits_{name}"] = model(**inputs).logits
        results[f"ids_{name}"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    again = os.environ.get("AGAIN")
    if again:
        model.push_to_hub(again)
        processor.push_to_hub(again)
    torch.save(results, os.environ["RESULTS"])
    kinds = [AutoConfig, AutoImageProcessor, AutoTokenizer]
    kinds = [type(auto.from_pretrained(repo_id, revision=pinned, **flag)).__name__ for auto in kinds]
    print(json.dumps({"modules": modules, "kinds": kinds}))
"""


def check_faultless(server):
    assert server.unknown_requests == []
    assert server.internal_errors == []


def last_line(process):
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "panda"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(T, H, W, C) frames in a file."""
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(torch.randint(0, 256, (6, 60, 100, 3), dtype=torch.uint8), path)
    return path


@pytest.fixture(scope="module")
def expected(checkpoint, clip):
    """What the installed classes make of the pushed folder."""
    from video_panda import VideoPandaForConditionalGeneration, VideoPandaProcessor

    model = VideoPandaForConditionalGeneration.from_pretrained(checkpoint)
    processor = VideoPandaProcessor.from_pretrained(checkpoint)
    prompt = "USER: <video> What happens in this video? ASSISTANT:"
    inputs = processor(text=[prompt], videos=[torch.load(clip)])
    with torch.no_grad():
        logits = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        model.lm_head.weight.mul_(2)
        doubled = model(**inputs).logits
    pixels = inputs["pixel_values_videos"]
    return {"pixels": pixels, "input_ids": inputs["input_ids"], "pinned": logits, "ids": generated, "main": doubled}


def check_results(path, expected):
    got = torch.load(path)
    for name in ("pixels", "input_ids"):
        assert torch.equal(got[name], expected[name]), name
    assert torch.equal(got["logits_pinned"], expected["pinned"])
    assert torch.equal(got["ids_pinned"], expected["ids"])
    torch.testing.assert_close(got["logits_main"], expected["main"], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(got["logits_main"], got["logits_pinned"])


@pytest.mark.parametrize("settings", [pytest.param(INLINE, marks=pytest.mark.slow), LFS], ids=["inline", "lfs"])
def test_pushed_checkpoints_load_without_the_package(checkpoint, clip, expected, settings, tmp_path):
    repo_id, again = f"{USER}/panda", f"{USER}/panda-again"
    with HubServer(**settings) as server:
        environment = {"SOURCE": str(checkpoint), "REPO": repo_id}
        commits = last_line(run_client(PUSH, server, tmp_path / "writer", **environment))
        with_model, with_processor, unchanged, changed, refused = commits
        files = server.repositories[repo_id].files
        environment = {"REPO": repo_id, "PINNED": with_processor, "CLIP": str(clip), "AGAIN": again}
        environment["RESULTS"] = str(tmp_path / "results.pt")
        found = last_line(run_client(LOAD, server, tmp_path / "reader", blocked=["video_panda"], **environment))
        check_results(tmp_path / "results.pt", expected)
    check_faultless(server)
    assert refused == "HfHubHTTPError 401"
    assert set(server.repositories) == {repo_id, again}

    # Every module came from the repository, at the commit asked for.
    assert found["kinds"][:2] == ["VideoPandaConfig", "VideoPandaImageProcessor"]
    assert all(module.startswith(f"transformers_modules.{USER}.panda.") for module in found["modules"])
    assert [module.endswith(f"{changed}.modeling_video_panda") for module in found["modules"]] == [True, False]

    # A change is a commit, what did not change is none, and only weights went through LFS.
    assert len({with_model, with_processor, changed}) == 3
    assert unchanged == with_processor
    assert "processor_config.json" not in files(with_model)
    different = {path for path, file in files(changed).items() if file != files(with_processor).get(path)}
    assert different == {"model.safetensors", "saved_files.json"}
    uses_lfs = settings is LFS
    assert [path for path, file in files(changed).items() if file.is_lfs] == ["model.safetensors"] * uses_lfs

    # All files of a saved folder are there; a card comes with the model.
    pushed = {path: file.content for path, file in files(with_processor).items()}
    assert pushed.keys() - {path.name for path in checkpoint.iterdir()} == {".gitattributes", "README.md"}
    assert pushed.keys() >= {path.name for path in checkpoint.iterdir()}
    assert b"- video-panda" in pushed["README.md"]

    # Pushed again from remote code: the same files, and nothing refers to the repository they came from.
    copied = {path: file.content for path, file in server.repositories[again].files().items()}
    assert copied.keys() == pushed.keys()
    assert [path for path, content in copied.items() if f"{repo_id}--".encode() in content] == []
    different = {path for path in pushed if copied[path] != pushed[path]}
    assert different <= {
        "README.md",
        "saved_files.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }  # these say where from, and how it padded
