"""Each program in examples/ runs as a user would run it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_packages_own_model_is_asked_by_its_remote_code(tmp_path):
    folder = ROOT / "default_model"
    program = (ROOT / "examples" / "ask.py").read_text()
    assert "video_panda" not in program
    question, truth = next(iter(json.loads((folder / "example.json").read_text()).items()))
    arguments = [str(folder), str(folder / "example.mp4"), question]
    command = [sys.executable, str(ROOT / "examples" / "ask.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == truth


# Runs a program with a model that tells how often it encodes and how many positions each prefill computes.
COUNTING = """
import json, runpy, sys
from transformers import AutoModel
load, counts = AutoModel.from_pretrained, {"encoded": 0, "prefills": []}

def count_encoding(*call):
    counts["encoded"] += 1

def count_positions(module, args, given):
    num_positions = given["position_ids"].shape[-1]
    if num_positions > 1:
        counts["prefills"].append(num_positions)

def load_and_count(*args, **options):
    model = load(*args, **options)
    counts["code"] = type(model).__module__
    model.model.stab.register_forward_pre_hook(count_encoding)
    model.model.language_model.register_forward_pre_hook(count_positions, with_kwargs=True)
    return model

AutoModel.from_pretrained = load_and_count
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
print(json.dumps(counts))
"""


def test_many_questions_cost_one_encoding_and_one_prefill_of_the_clip(tmp_path):
    folder = ROOT / "default_model"
    truths = json.loads((folder / "example.json").read_text())
    program = [str(ROOT / "examples" / "many_questions.py"), str(folder), str(folder / "example.mp4"), *truths]
    command = [sys.executable, "-c", COUNTING, *program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    *answers, counts = result.stdout.splitlines()
    counts = json.loads(counts)
    assert answers == [f"{question} {truth}" for question, truth in truths.items()]
    assert counts["code"].startswith("transformers_modules.")
    assert counts["encoded"] == 1
    clip, *others = counts["prefills"]
    assert len(others) == len(truths) - 1
    assert max(others) < 20 < clip / 5
