"""What a run says about itself: `training.json` beside the weights, and the card that is made of it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.file_download import repo_folder_name
from tiny import tiny_processor
from training_runs import make_trainer

from video_panda import VideoPandaForConditionalGeneration, VideoPandaTrainer, write_model_card
from video_panda.hub.card_training import read_training
from video_panda.trainers import training_facts as facts_module
from video_panda.trainers.training_facts import TRAINING_FILE, name_data, read_origin


@pytest.fixture(scope="module")
def two_stages(samples, teacher, tmp_path_factory) -> Path:
    """Read-only: a folder with the output folders of stages 1 and 2; the second starts from the first's checkpoint."""
    folder = tmp_path_factory.mktemp("stages")
    options = {"max_steps": 2, "num_frames": 4, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer("initial_alignment", samples, folder / "one", teacher, **options)
    first.train()
    first.save_model()
    model = VideoPandaForConditionalGeneration.from_pretrained(folder / "one")
    second = make_trainer("visual_language_integration", samples, folder / "two", model=model, **options)
    second.train()
    second.save_model()
    second.create_model_card(model_name="tiny", dataset_tags="you/clips")
    tiny_processor().save_pretrained(folder / "two")
    return folder


def test_the_record_says_what_was_done(two_stages):
    record = read_training(two_stages / "two")
    first, second = record["stages"]
    assert [first["stage"], second["stage"]] == ["initial_alignment", "visual_language_integration"]
    assert first["data"] == {"names": ["samples.json"], "num_samples": 8, "num_used": 8, "num_skipped": {}}
    assert first["steps"] == 2
    assert first["trained_parts"] == ["stab", "projector"]
    assert second["trained_parts"] == ["stab", "projector", "language_model"]
    assert first["hyper_parameters"]["global_batch_size"] == 4
    assert first["hyper_parameters"]["num_frames"] == 4
    assert first["distillation"]["teacher"] == "clip"
    assert second["distillation"] is None
    assert set(first["losses"]) == {"loss", "lm_loss", "distillation_loss"}
    assert second["hardware"] == {"device": "cpu", "num_processes": 1}
    assert {"video-panda", "torch", "transformers"} <= set(second["versions"])
    assert record["base_model"] is None  # a folder's name is none


def test_the_record_lies_beside_the_weights_of_checkpoints_too(two_stages):
    checkpoint = read_training(two_stages / "one" / "checkpoint-2")
    assert checkpoint["stages"][0]["steps"] == 2
    assert TRAINING_FILE in json.loads((two_stages / "one" / "checkpoint-2" / "manifest.json").read_text())["files"]


def test_no_path_of_this_machine_is_in_it(two_stages):
    text = (two_stages / "two" / TRAINING_FILE).read_text() + (two_stages / "two" / "README.md").read_text()
    assert str(two_stages) not in text
    assert "samples.json" in text


def test_the_card_says_it_in_words(two_stages):
    card = ModelCard.load(two_stages / "two" / "README.md")
    assert card.data.datasets == "you/clips"
    assert card.data.base_model is None
    assert card.data.eval_results is None
    for words in (
        "# tiny\n",
        "### Stage 1: initial alignment",
        "### Stage 2: visual-language integration",
        "| data | samples.json, 8 samples |",
        "| distillation | clip; loss cosine, weight 1, layer step 4 |",
        "| learning rates | stab 0.001, projector 0.001, alignment head 0.001 |",
        "| hardware | cpu |",
        "No results: none were given",
    ):
        assert words in card.text, words
    assert "None" not in card.text


def test_the_same_card_is_made_from_the_folder_alone(two_stages, tmp_path):
    for path in (two_stages / "two").iterdir():
        if path.is_file() and path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    write_model_card(tmp_path, name="tiny", repo_id="two", datasets="you/clips")
    own = (two_stages / "two" / "README.md").read_text()
    # Where the Trainer has no repository yet, the title stands in the place of its id.
    assert (tmp_path / "README.md").read_text().split("## Training")[1] == own.split("## Training")[1]


def test_a_card_that_somebody_wrote_is_kept(two_stages, samples, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    make_trainer("instruction_tuning", samples, tmp_path).create_model_card()
    assert (tmp_path / "README.md").read_text() == "---\nlicense: mit\n---\nMine.\n"


class Named:
    """A model of which only the name is asked."""

    def __init__(self, name):
        self.config = self
        self.name_or_path = name
        self.model_type = "video_panda"


def test_a_base_model_is_named_where_it_was_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(facts_module, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(facts_module, "find_core", lambda model: model)
    monkeypatch.chdir(tmp_path)
    assert read_origin(Named("you/panda"))["base_model"] is None  # never downloaded: it could be a folder
    (tmp_path / "cache" / repo_folder_name(repo_id="you/panda", repo_type="model")).mkdir(parents=True)
    assert read_origin(Named("you/panda"))["base_model"] == "you/panda"
    (tmp_path / "you" / "panda").mkdir(parents=True)
    assert read_origin(Named("you/panda"))["base_model"] is None
    assert read_origin(Named(str(tmp_path)))["base_model"] is None


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "stages": []}'])
def test_a_damaged_record_is_not_handed_on_and_says_so(content, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(facts_module, "find_core", lambda model: model)
    (tmp_path / TRAINING_FILE).write_text(content)
    assert read_origin(Named(str(tmp_path))) == {"base_model": None, "stages": []}
    assert str(tmp_path / TRAINING_FILE) in caplog.text


def test_the_pickled_arguments_are_not_pushed(samples, tmp_path, monkeypatch):
    pushed = []
    trainer = make_trainer("instruction_tuning", samples, tmp_path, max_steps=1)
    monkeypatch.setattr(type(trainer), "init_hf_repo", lambda self, **options: None)

    def upload(**options):
        pushed.extend(path.name for path in Path(options["folder_path"]).iterdir())

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: type("Api", (), {"upload_folder": staticmethod(upload)}))
    trainer.hub_model_id = "you/panda"
    assert isinstance(trainer, VideoPandaTrainer)
    trainer.push_to_hub()
    assert {"README.md", TRAINING_FILE, "model.safetensors", "modeling_video_panda.py"} <= set(pushed)
    assert "training_args.bin" not in pushed
    trainer.save_model()
    assert (tmp_path / "training_args.bin").exists()


def test_names_of_data(samples):
    assert name_data(str(samples)) == ["samples.json"]
    assert name_data("you/clips") == ["you/clips"]
    assert name_data([{"id": 1}]) == []


def test_a_data_set_brings_its_name():
    datasets = pytest.importorskip("datasets")
    assert name_data(datasets.Dataset.from_list([{"id": 1}])) == []
    named = datasets.Dataset.from_list([{"id": 1}])
    named.info.dataset_name = "clips"
    assert name_data(named) == ["clips"]
