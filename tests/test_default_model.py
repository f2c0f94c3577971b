"""The model that comes with the package: complete, small, as good as its card says, and what `ask` uses without a name."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from video_panda import ShapesQA, VideoPandaForConditionalGeneration, VideoPandaProcessor, ask, cli, evaluate

ROOT = Path(__file__).resolve().parents[1]
FOLDER = cli.DEFAULT_MODEL
NUM_QUESTIONS = 200
FIRST_CLIP = 500_000  # far from those on which choices were made


EXAMPLE: dict[str, str] = json.loads((FOLDER / "example.json").read_text())  # question: truth
COMMAND = re.search(r"<!-- command: main-job -->\n```bash\n(.*)\n```", (ROOT / "README.md").read_text())[1]
QUESTION = re.search(r'"([^"]*\?)"', COMMAND)[1]


@pytest.fixture(scope="module")
def card_scores() -> dict:
    return json.loads((FOLDER / "evaluation.json").read_text())


def test_the_weights_are_small_and_in_bfloat16():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 8e6
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if "running_" not in name and "num_batches" not in name]  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_its_code_is_the_shipped_code():
    shipped = {
        path.name: path for folder in ("modeling_video_panda", "processing") for path in (ROOT / folder).glob("*.py")
    }
    own = {path.name: path for path in FOLDER.glob("*.py")}
    assert set(own) == set(shipped) - {"__init__.py"}
    for name, path in own.items():
        assert path.read_bytes() == shipped[name].read_bytes(), f"{name} is stale"


def test_ask_without_a_model_uses_it_and_says_so_in_one_line():
    result = CliRunner().invoke(cli.app, ["ask", str(FOLDER / "example.mp4"), QUESTION])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == EXAMPLE[QUESTION]
    notes = [line for line in result.stderr.splitlines() if "demonstration" in line and "--model" in line]
    assert len(notes) == 1
    assert "synthetic shapes only" in notes[0]


def test_every_question_about_the_example_is_answered_right():
    for question, truth in EXAMPLE.items():
        assert ask(FOLDER / "example.mp4", question)["answer"] == truth


def test_the_readme_asks_it_about_the_example():
    assert "--model" not in COMMAND
    assert str((FOLDER / "example.mp4").relative_to(ROOT)) in COMMAND


def test_it_is_as_good_as_its_card_says(tmp_path, card_scores):
    benchmark = ShapesQA(tmp_path, "validation", 100, first=FIRST_CLIP)
    benchmark.questions = benchmark.questions[:NUM_QUESTIONS]
    assert len(benchmark.questions) == NUM_QUESTIONS
    model = VideoPandaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    scores = evaluate(
        model, benchmark, VideoPandaProcessor.from_pretrained(FOLDER), batch_size=50, max_new_tokens=8
    ).scores
    assert scores.total.accuracy >= card_scores["scores"]["total"]["accuracy"] - 0.03


def test_the_card_states_the_scores(card_scores):
    card = (FOLDER / "README.md").read_text()
    assert re.search(r"ShapesQA, (validation|test) split", card)
    assert "synthetic" in card
    for row in card_scores["scores"]["rows"]:
        assert re.search(rf"\| {row['kind']} \| {row['num_questions']} \| {100 * row['accuracy']:.1f} \|", card), row
    for row in card_scores["one_frame"]["rows"]:  # nothing is known about time from one frame: within 4 deviations
        allowed = 4 * (row["chance"] * (1 - row["chance"]) / row["num_questions"]) ** 0.5
        assert abs(row["accuracy"] - row["chance"]) < allowed, row
