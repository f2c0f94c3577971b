"""The card of a checkpoint: its words, its numbers, what the Hub reads in its head, and whose text is kept."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from run_folders import edit_json, judge_row, score_row, write_run
from tiny import tiny_config, tiny_model, write_tiny_checkpoint

from video_panda import VideoPandaForConditionalGeneration, write_model_card
from video_panda.hub.card import compose_card, is_written_by_hand
from video_panda.hub.card_results import eval_result_files, public_name, read_run

HAND_WRITTEN = "---\nlicense: mit\nmodel-index: []\nmine: [1, 2]\n---\n# My own words\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Read-only."""
    folder = tmp_path_factory.mktemp("card") / "checkpoint"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory) -> Path:
    """Read-only: MSVD-QA, judged."""
    return write_run(
        tmp_path_factory.mktemp("run"), checkpoint, judges={"gpt-3.5-turbo-0125": [judge_row("what"), judge_row("all")]}
    )


@pytest.fixture
def own_run(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def metrics_of(card: ModelCard) -> dict:
    return {result.metric_name: result.metric_value for result in card.data.eval_results}


def test_a_card_with_results_of_its_own(folder):
    results = {"colour": 0.98765, "shape": 0.5}
    path = write_model_card(
        folder,
        name="tiny",
        repo_id="me/tiny",
        description="Random weights.",
        evaluation="| a | table |",
        results=results,
        dataset="shapes-qa",
        split="test",
    )
    assert path == folder / "README.md"
    card = ModelCard.load(path)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "video-text-to-text")
    assert (card.data.license, card.data.language, card.data.tags) == ("apache-2.0", "en", ["video-panda"])
    assert metrics_of(card) == {"accuracy (colour)": 0.9877, "accuracy (shape)": 0.5}
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {("shapes-qa", "test")}
    model = VideoPandaForConditionalGeneration.from_pretrained(folder)
    num_visual = sum(own.numel() for part in (model.model.stab, model.model.projector) for own in part.parameters())
    numbers = f"{num_visual / 1e6:.2f} M visual parameters of {model.num_parameters() / 1e6:.2f} M in all"
    for words in ("# tiny", "Random weights.", "| a | table |", 'from_pretrained("me/tiny"', numbers):
        assert words in card.text
    assert "{{" not in card.text
    assert "No results" not in card.text
    assert not list(folder.glob(".README*"))


def test_a_card_without_results_says_so(folder):
    card = ModelCard.load(write_model_card(folder, name="tiny"))
    assert card.data.eval_results is None
    assert 'from_pretrained("tiny"' in card.text
    for words in ("No results: none were given", "is not recorded", "Latency was not measured.", "2412.18609"):
        assert words in card.text, words
    for name in ("base_model", "datasets"):
        assert card.data.get(name) is None


def test_six_lines_use_the_model(folder):
    text = write_model_card(folder, name="tiny").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) == 6
    assert max(map(len, code.splitlines())) <= 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"results": {"colour": 0.5}}, "without the data set"),
        ({"results": {"colour": 98}, "dataset": "shapes-qa"}, "accuracy 'colour' is 98, expected a share"),
    ],
)
def test_bad_results_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        write_model_card(folder, name="tiny", **options)
    assert not (folder / "README.md").exists()


# Runs -----------------------------------------------------------------------------------------------------------------


def test_the_metadata_names_judge_and_date_and_what_is_not_judged(folder, run):
    card = ModelCard.load(write_model_card(folder, name="tiny", runs=[run]))
    by = "(judge gpt-3.5-turbo-0125, 2026-11-27)"
    assert metrics_of(card) == {
        "exact match": 0.4,
        "containment": 0.6124,
        "token F1": 0.45,
        f"accuracy {by}": 0.7013,
        f"score 0-5 {by}": 3.46,
    }
    first, judged = card.data.eval_results[0], card.data.eval_results[3]
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("msvd-qa", "MSVD-QA", "test")
    assert first.metric_args["judge"] == "none"
    assert (first.metric_args["num_questions"], first.metric_args["num_left_out"]) == (100, 3)
    assert (judged.metric_args["num_unparsed"], judged.metric_args["num_failed"]) == (2, 1)


def test_the_text_says_how_it_was_measured(folder, run):
    text = " ".join(write_model_card(folder, name="tiny", runs=[run]).read_text().split())
    for words in (
        "### MSVD-QA, split test",
        "103 of 13,157 questions, asked on 2026-11-26; 3 were left out because their clips could not be read.",
        "float32, on NVIDIA H100, 8 frames, answers of at most 32 tokens",
        "| what | 100 | 40.0 | 35.0 to 45.0 | 61.2 | 45.0 | 2 |",
        "Judged by `gpt-3.5-turbo-0125` on 2026-11-27 (openai, template qa-1, temperature 0).",
        "| all | 97 | 70.1 | 65.1 to 75.1 | 3.46 | 3.41 to 3.51 | 2 | 1 |",
    ):
        assert words in text, words
    for words in ("No results", "localhost", str(folder), "None"):
        assert words not in text, words


def test_kinds_have_figures_of_their_own_and_a_control_has_none(folder, tmp_path):
    rows = [score_row("colour", chance=0.25), score_row("count", 50, 0.5, 0.2), score_row("all", 150)]
    blind = {"num_frames": None, "frame_indices": [4] * 8}
    runs = [
        write_run(tmp_path / "a", folder, "shapes-qa", rows=rows, about={"dataset_name": "ShapesQA"}),
        write_run(tmp_path / "b", folder, "shapes-qa", rows=rows, about={"dataset_name": "ShapesQA"}, settings=blind),
    ]
    card = ModelCard.load(write_model_card(folder, name="tiny", runs=runs))
    names = [result.metric_name for result in card.data.eval_results]
    assert names == ["exact match", "exact match (colour)", "exact match (count)", "containment", "token F1"]
    assert "### ShapesQA, split test: control, frame 4 shown again and again" in card.text
    assert "| colour | 100 | 40.0 | 35.0 to 45.0 | 61.2 | 45.0 | 2 | 25.0 |" in card.text


def test_scores_without_right_and_wrong(folder, tmp_path):
    judges = {"judge": [judge_row("correctness", accuracy=None), judge_row("detail", 96, None, 2.5)]}
    judges["judge"].append(judge_row("all", accuracy=None, score=3.0))
    run = write_run(tmp_path / "run", folder, "video-chatgpt", judges=judges)
    card = ModelCard.load(write_model_card(folder, name="tiny", runs=[run]))
    assert metrics_of(card)["score 0-5 of detail (judge judge, 2026-11-27)"] == 2.5
    assert not [name for name in metrics_of(card) if name.startswith("accuracy")]
    assert "| detail | 96 | 2.50 | 2.45 to 2.55 | 2 | 1 |" in card.text


def test_an_older_run_says_less_and_nothing_is_made_up(folder, own_run):
    run = json.loads((own_run / "run.json").read_text())
    edit_json(own_run / "run.json", **{"about": None, "num_frames": None})
    rows = [{**score_row("all"), "containment": None, "token_f1": None}]
    (own_run / "scores.json").write_text(json.dumps({"rows": rows, "total": rows[0]}))
    shutil.rmtree(own_run / "judges")
    text = write_model_card(folder, name="tiny", runs=[own_run]).read_text()
    assert "### MSVD-QA\n" in text
    assert f"{run['num_questions']} questions, asked at an unknown date; it is not known how many were left out" in text
    assert "containment" not in text
    assert "None" not in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_another_dtype_is_the_same_model(folder, tmp_path, dtype):
    run = write_run(tmp_path / "run", folder, dtype=dtype)
    assert "MSVD-QA" in compose_card(folder, name="tiny", runs=[run]).content
    edit_json(run / "run.json", about=None)
    assert "MSVD-QA" in compose_card(folder, name="tiny", runs=[run]).content


def test_a_run_of_another_model_is_refused(folder, run, tmp_path):
    tiny_model(tiny_config(), seed=1).save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"run\.json: the run is of another model: its model_digest is \w+\.\.\., that"
    ):
        compose_card(folder, name="tiny", runs=[run])


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("run.json", {"benchmark": None}, r"run\.json: benchmark must be a text, got None"),
        ("run.json", {"model_digest": 7}, r"run\.json: model_digest must be a text, got 7"),
        ("scores.json", {"total": None}, r"scores\.json: expected `rows` and `total`"),
        ("scores.json", {"total": score_row("all", accuracy=40.0)}, r"accuracy of row 'all' .* from 0 to 1, got 40\.0"),
        ("scores.json", {"total": score_row("all", num_unanswered=-1)}, r"num_unanswered of row 'all'.*got -1"),
        ("scores.json", {"total": score_row("all", token_f1=0.5)}, r"token_f1 of row 'all' must have a value"),
        ("scores.json", {"num_left_out": "3"}, r"num_left_out must be a whole number from 0 on, got '3'"),
        ("judges/judge-0/judge.json", {"date": None}, r"judge\.json: date must be a text, got None"),
        (
            "judges/judge-0/scores.json",
            {"total": judge_row("all", score=7)},
            r"value of score of row 'all'.*0 to 5, got 7",
        ),
    ],
)
def test_a_damaged_run_is_named(own_run, file, values, message):
    edit_json(own_run / file, **values)
    with pytest.raises(ValueError, match=message):
        read_run(own_run)


def test_a_run_that_has_not_ended_and_one_given_twice(folder, own_run, run):
    with pytest.raises(ValueError, match="are runs of the same measurement"):
        compose_card(folder, name="tiny", runs=[run, own_run])
    (own_run / "scores.json").unlink()
    with pytest.raises(OSError, match=r"has no scores\.json: the run is not complete"):
        compose_card(folder, name="tiny", runs=[own_run])
    with pytest.raises(OSError, match=r"holds no run\.json"):
        compose_card(folder, name="tiny", runs=[folder])


def test_leaderboard_files_are_for_data_sets_that_were_named(run):
    import yaml

    assert eval_result_files([read_run(run)], {}) == {}
    files = eval_result_files([read_run(run)], {"msvd-qa": "you/msvd-qa"})
    (entry,) = yaml.safe_load(files[".eval_results/msvd-qa.yaml"])
    assert entry["dataset"] == {"id": "you/msvd-qa", "task_id": "default"}
    assert (entry["value"], entry["date"]) == (0.7013, "2026-11-27")
    assert entry["notes"] == "accuracy (judge gpt-3.5-turbo-0125, 2026-11-27); 97 questions"


def test_names_of_models_without_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "judge").mkdir(parents=True)
    places = ("/data/judge", "C:\\models\\judge", "~/judge", "../judge", "x/y/judge", "a/judge")
    assert {public_name(name) for name in places} == {"judge"}
    assert public_name("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"


# Cards that are there -------------------------------------------------------------------------------------------------


def test_a_card_that_was_written_here_is_written_anew(folder, run):
    write_model_card(folder, name="tiny", license="mit", tags=["mine"], runs=[run])
    write_model_card(folder, name="other", description="New words.")
    card = ModelCard.load(folder / "README.md")
    assert "New words." in card.text
    # What its owner said of it stays; figures are those that are given.
    assert (card.data.license, card.data.tags) == ("mit", ["mine", "video-panda"])
    assert card.data.eval_results is None


def test_that_results_are_lost_is_said(folder, run):
    earlier = compose_card(folder, name="tiny", runs=[run]).content
    assert "without the results of the earlier one" in compose_card(folder, name="tiny", existing=earlier).action


def test_a_text_written_by_hand_is_kept_to_the_letter(folder):
    (folder / "README.md").write_text(HAND_WRITTEN)
    write_model_card(folder, name="tiny", license="apache-2.0")
    assert (folder / "README.md").read_text() == HAND_WRITTEN


def test_only_results_are_put_into_a_card_written_by_hand(folder, run):
    (folder / "README.md").write_text(HAND_WRITTEN)
    for _ in range(2):
        write_model_card(folder, name="tiny", runs=[run])
        card = ModelCard.load(folder / "README.md")
        assert card.text == "# My own words\n"
        assert (card.data.license, card.data.get("mine"), card.data.library_name) == ("mit", [1, 2], None)
        assert len(card.data.eval_results) == 5


def test_results_of_others_stay_and_older_ones_of_the_same_data_go(folder, own_run):
    foreign = {"task": {"type": "video-text-to-text"}, "dataset": {"name": "X", "type": "x"}}
    foreign["metrics"] = [{"type": "accuracy", "value": 0.3, "name": "theirs"}]
    head = json.dumps({"model-index": [{"name": "m", "results": [foreign]}]})
    (folder / "README.md").write_text(f"---\n{head}\n---\nMine.\n")
    write_model_card(folder, name="tiny", runs=[own_run])
    edit_json(own_run / "judges" / "judge-0" / "judge.json", date="2026-12-01")
    write_model_card(folder, name="tiny", runs=[own_run])
    names = metrics_of(ModelCard.load(folder / "README.md"))
    assert names["theirs"] == 0.3
    assert len(names) == 6
    assert not [name for name in names if "2026-11-27" in name]


def test_an_edited_card_counts_as_written_by_hand(folder):
    path = write_model_card(folder, name="tiny")
    assert not is_written_by_hand(path.read_text())
    assert not is_written_by_hand(path.read_text().replace("\n", "\r\n"))
    edited = path.read_text().replace("# tiny", "# My tiny")
    assert is_written_by_hand(edited)
    path.write_text(edited)
    write_model_card(folder, name="tiny")
    assert path.read_text() == edited


def test_metadata_that_cannot_be_read_is_named(folder):
    (folder / "README.md").write_text("---\na: [\n---\nMine.\n")
    with pytest.raises(ValueError, match=r"README\.md: the metadata at its top cannot be read"):
        write_model_card(folder, name="tiny")


def test_latency_is_stated_as_measured(folder):
    rows = [{"device": "H100", "first token (ms)": 41}, {"device": "2 cores", "frames": 8}]
    text = write_model_card(folder, name="tiny", latency=rows).read_text()
    table = "| device | first token (ms) | frames |\n| --- | --- | --- |\n| H100 | 41 |  |\n| 2 cores |  | 8 |"
    assert table in text
    assert "not measured" not in text


def test_memory_is_that_of_the_weights(folder):
    text = write_model_card(folder, name="tiny").read_text()
    count = VideoPandaForConditionalGeneration.from_pretrained(folder).num_parameters()
    assert f"| all | {count:,} | {4 * count / 1e3:.1f} kB | {2 * count / 1e3:.1f} kB |" in text


def test_a_damaged_record_of_training_is_named(folder):
    (folder / "training.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match=r"training\.json: expected format 1, got 9"):
        write_model_card(folder, name="tiny")


def test_ids_on_the_hub_are_stated_and_paths_are_not(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "runs" / "stage1").mkdir(parents=True)
    stages = [{"stage": "instruction_tuning", "data": {"names": ["you/clips", "train.json"]}}]
    training = {"base_model": "you/panda", "stages": stages}
    for given, expected in (
        (None, "you/panda"),
        ("me/panda", "me/panda"),
        (str(folder), "you/panda"),
        ("runs/stage1", "you/panda"),
        ("./panda", "you/panda"),
    ):
        card = ModelCard(compose_card(folder, name="tiny", training=training, base_model=given).content)
        assert card.data.base_model == expected
        assert card.data.datasets == ["you/clips"]
        assert str(folder) not in str(card)
    assert "| data | you/clips, train.json |" in card.text
