"""Pushing from a training run to a (local) Hub server, and training adapters with the Trainer."""

from pathlib import Path

import pytest
import torch
from hub_server import USER, HubServer, run_client
from tiny import tiny_config, tiny_model, tiny_processor
from training_runs import changed_names, losses_of, make_trainer, weights_of
from transformers import Trainer

from video_panda import VideoPandaForConditionalGeneration
from video_panda.trainers.checkpoints import verify
from video_panda.trainers.lora import lora_config

TRAIN = """
    import os, sys
    sys.path.insert(0, os.environ["TESTS"])
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from training_runs import make_trainer, tiny_teacher

    data = Path(os.environ["DATA"])
    trainer = make_trainer(
        "instruction_tuning", data / "samples.json", Path("run"), tiny_teacher(data / "teacher"), max_steps=2,
        save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id=os.environ["REPO"],
        hub_strategy=os.environ["STRATEGY"], hub_always_push=True,
    )
    trainer.train()
    if trainer.args.hub_strategy == "end":
        trainer.push_to_hub()
    trainer._finish_current_push()
"""

LOAD = """
    import os
    from transformers import AutoModel, AutoProcessor

    AutoModel.from_pretrained(os.environ["REPO"], trust_remote_code=True)
    AutoProcessor.from_pretrained(os.environ["REPO"], trust_remote_code=True)
"""


def push_from_training(server, samples, strategy: str, home: Path) -> dict[str, bytes]:
    """Files of the repository after a run with this `hub_strategy`."""
    repo_id = f"{USER}/trained"
    environment = {"DATA": str(samples.parent), "REPO": repo_id, "STRATEGY": strategy}
    run_client(TRAIN, server, home, TESTS=str(Path(__file__).parents[1]), **environment)
    assert server.unknown_requests == []
    assert server.internal_errors == []
    return {path: file.content for path, file in server.repositories[repo_id].files().items()}


def test_last_checkpoint_is_pushed_whole_and_the_model_without_head(samples, teacher, tmp_path):
    with HubServer() as server:
        files = push_from_training(server, samples, "checkpoint", tmp_path / "writer")
        run_client(LOAD, server, tmp_path / "reader", blocked=["video_panda"], REPO=f"{USER}/trained")
    top = {path for path in files if "/" not in path}
    last = {path.removeprefix("last-checkpoint/") for path in files if path.startswith("last-checkpoint/")}
    assert {"config.json", "model.safetensors", "modeling_video_panda.py", "processor_config.json"} <= top
    assert {"manifest.json", "alignment_head.safetensors", "optimizer.pt", "model.safetensors"} <= last
    assert not top & {"alignment_head.safetensors", "optimizer.pt", "manifest.json"}
    assert not [path for path in files if path.startswith(("_", "checkpoint-"))]


def test_a_checkpoint_is_pushed_once_and_when_it_is_whole(samples, teacher, tmp_path, monkeypatch):
    pushed = []

    def push(trainer, folder):
        verify(Path(folder))
        pushed.append((Path(folder).name, (tmp_path / "modeling_video_panda.py").exists()))

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer: None)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    make_trainer("instruction_tuning", samples, tmp_path, teacher, **options).train()
    assert pushed == [("checkpoint-1", True), ("checkpoint-2", True)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["end", "every_save", "all_checkpoints"])
def test_other_strategies(strategy, samples, teacher, tmp_path):
    with HubServer() as server:
        files = push_from_training(server, samples, strategy, tmp_path / "writer")
        run_client(LOAD, server, tmp_path / "reader", blocked=["video_panda"], REPO=f"{USER}/trained")
    folders = {path.split("/")[0] for path in files if "/" in path}
    assert folders == ({"checkpoint-1", "checkpoint-2"} if strategy == "all_checkpoints" else set())


def adapted(seed: int = 0):
    import peft

    torch.manual_seed(seed)
    model = tiny_model(tiny_config(tiny_processor().video_token_id))
    return peft.get_peft_model(model, lora_config(model, r=4, lora_alpha=8, lora_dropout=0.1))


def test_adapter_trains_saves_and_resumes(samples, teacher, tmp_path):
    options = {"num_train_epochs": 2, "global_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer("instruction_tuning", samples, tmp_path / "run", teacher, adapted(), **options)
    before = weights_of(trainer.model)
    trainer.train()
    changed = changed_names(before, weights_of(trainer.model))
    assert any("lora_B" in name for name in changed)
    assert any("stab.modules_to_save" in name for name in changed)
    assert not [name for name in changed if "base_layer" in name or "original_module" in name or "lm_head" in name]
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert {"adapter_model.safetensors", "adapter_config.json", "alignment_head.safetensors"} <= {
        path.name for path in checkpoint.iterdir()
    }
    resumed = make_trainer("instruction_tuning", samples, tmp_path / "run", teacher, adapted(), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(resumed) == losses_of(trainer)
    assert changed_names(weights_of(trainer.model), weights_of(resumed.model)) == set()


def test_merged_adapter_is_a_plain_checkpoint(samples, tmp_path):
    trainer = make_trainer("instruction_tuning", samples, tmp_path / "run", model=adapted(), max_steps=2)
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = VideoPandaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert changed_names(weights_of(merged), weights_of(loaded)) == set()
