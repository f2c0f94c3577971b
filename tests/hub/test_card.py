"""The card of a checkpoint: its words, its numbers, what the Hub reads in its head."""

import pytest
from huggingface_hub import ModelCard
from tiny import write_tiny_checkpoint

from video_panda import VideoPandaForConditionalGeneration, write_model_card


@pytest.fixture
def folder(tmp_path):
    write_tiny_checkpoint(tmp_path)
    return tmp_path


def test_a_card_with_results(folder):
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
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy (colour)": 0.9877, "accuracy (shape)": 0.5}
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {("shapes-qa", "test")}
    model = VideoPandaForConditionalGeneration.from_pretrained(folder)
    num_visual = sum(own.numel() for part in (model.model.stab, model.model.projector) for own in part.parameters())
    numbers = f"{num_visual / 1e6:.2f} M visual parameters of {model.num_parameters() / 1e6:.2f} M in all"
    for words in ("# tiny", "Random weights.", "| a | table |", 'from_pretrained("me/tiny"', numbers):
        assert words in card.text
    assert "{{" not in card.text
    assert not list(folder.glob(".README*"))


def test_a_card_without_results(folder):
    card = ModelCard.load(write_model_card(folder, name="tiny"))
    assert card.data.eval_results is None
    assert 'from_pretrained("tiny"' in card.text


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
