"""The three stages on tiny clips: they learn, they change what they should, and they refuse what does not fit."""

import copy
import json

import datasets
import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_model, tiny_processor
from training_runs import (
    STAGE_NAMES,
    RememberedBatches,
    changed_names,
    losses_of,
    make_trainer,
    stage_arguments,
    tiny_teacher,
    weights_of,
)
from transformers import Trainer

from video_panda import VideoPandaForConditionalGeneration
from video_panda.trainers.alignment_head import save_alignment_head
from video_panda.trainers.arguments import InitialAlignmentArguments
from video_panda.trainers.checkpoint_saving import CheckpointSaving
from video_panda.trainers.collator import VideoPandaDataCollator
from video_panda.trainers.parameters import part_of
from video_panda.trainers.samples import SampleError
from video_panda.trainers.skipped import TooManySkippedError
from video_panda.trainers.stages import InstructionTuningTrainer, find_stage
from video_panda.trainers.trainer import (
    BATCH_EXTRAS,
    OVERRIDDEN,
    SKIPPED_FILE,
    VideoPandaTrainer,
    _keep_answers,
    find_alignment_head,
)


def overfit(stage, samples, output_dir, teacher, model, num_steps, learning_rate):
    trainer = make_trainer(
        stage,
        samples,
        output_dir,
        teacher=teacher,
        model=model,
        num_train_epochs=num_steps,
        per_device_train_batch_size=8,
        global_batch_size=8,
        learning_rate=learning_rate,
        train_sampling_strategy="sequential",
    )
    trainer.data_collator = RememberedBatches(trainer.data_collator)
    trainer.train()
    return losses_of(trainer, "lm_loss"), losses_of(trainer, "distillation_loss")


def test_every_stage_overfits_and_aligns(samples, teacher, tmp_path):
    """Stage 1 needs a language model that can speak: the one that stage 3 made, behind a STAB that starts anew."""
    model = tiny_model(tiny_config(tiny_processor().video_token_id))
    fresh = copy.deepcopy(model.model)
    lm, distilled = overfit("instruction_tuning", samples, tmp_path / "3", teacher, model, 55, 1e-2)
    assert lm[-1] < 0.05
    assert distilled[-1] < 0.3 * distilled[0]
    model.model.stab.load_state_dict(fresh.stab.state_dict())
    model.model.projector.load_state_dict(fresh.projector.state_dict())
    for stage, num_steps, rate in (("initial_alignment", 45, 1e-2), ("visual_language_integration", 12, 5e-3)):
        lm, distilled = overfit(stage, samples, tmp_path / stage, teacher, model, num_steps, rate)
        assert lm[-1] < 0.05, stage
        assert distilled[-1] < 0.5 * distilled[0], stage


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_stage_changes_what_it_trains(stage, samples, teacher, tmp_path):
    model = tiny_model(tiny_config(tiny_processor().video_token_id))
    before = weights_of(model)
    trainer = make_trainer(stage, samples, tmp_path, teacher=teacher, model=model, num_train_epochs=2)
    head_before = weights_of(trainer.alignment_head)
    trainer.train()
    changed = {part_of(name) for name in changed_names(before, weights_of(model))}
    assert changed == {"stab", "projector"} | ({"language_model"} if stage != "initial_alignment" else set())
    # With the two states of so shallow a language model the query has one key, and no say.
    asks = {"norms.0.weight", "norms.0.bias", "projections.0.weight"}
    assert changed_names(head_before, weights_of(trainer.alignment_head)) == set(head_before) - asks
    for name, parameter in model.named_parameters():
        is_frozen = stage == "initial_alignment" and part_of(name) == "language_model"
        assert parameter.requires_grad != is_frozen
    if stage == "initial_alignment":
        frozen = [parameter for name, parameter in model.named_parameters() if part_of(name) == "language_model"]
        assert all(parameter.grad is None for parameter in frozen)
        assert not any(parameter in trainer.optimizer.state for parameter in frozen)
    assert not hasattr(model, "alignment_head")


def test_frozen_stab_stays_as_it_is(samples, tmp_path):
    """Its running statistics too."""
    model = tiny_model(tiny_config(tiny_processor().video_token_id))
    before = weights_of(model.model.stab)
    make_trainer("instruction_tuning", samples, tmp_path, model=model, train_stab=False, max_steps=1).train()
    assert changed_names(before, weights_of(model.model.stab)) == set()


def test_table_of_parts_is_printed(samples, teacher, tmp_path, capsys):
    make_trainer("initial_alignment", samples, tmp_path, teacher=teacher, max_steps=1).train()
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:6]] == [
        "part",
        "stab",
        "projector",
        "alignment_head",
        "language_model",
        "total",
    ]


def test_micro_batches_add_up_to_the_global_batch(samples, teacher, tmp_path):
    """Both losses are means over the whole step, however it is cut; BatchNorm, which sees micro-batches, is left out."""
    config = tiny_config(
        tiny_processor().video_token_id,
        vision={"use_lste": False, "gstra_dropout": 0.0, "fusion_dropout": 0.0},
    )
    runs = []
    for micro in (4, 1):
        options = {"num_train_epochs": 2, "per_device_train_batch_size": micro, "train_sampling_strategy": "sequential"}
        trainer = make_trainer(
            "instruction_tuning", samples, tmp_path / str(micro), teacher, tiny_model(config), **options
        )
        trainer.train()
        runs.append([losses_of(trainer, name) for name in ("loss", "lm_loss", "distillation_loss")])
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-5, atol=1e-5)
    total, lm, distilled = torch.tensor(runs[0])
    torch.testing.assert_close(total, lm + distilled)
    assert ((distilled > 0) & (distilled < 2)).all()  # a mean of 1 - cosine


def test_head_computes_in_the_precision_of_the_run(samples, teacher, tmp_path):
    trainer = make_trainer("initial_alignment", samples, tmp_path, teacher, max_steps=1, bf16=True)
    seen = set()
    trainer.alignment_head.output.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}


def test_loss_is_the_models_over_all_positions(samples):
    """Logits are asked for where there is something to predict; the loss is the same, also for answers of all lengths."""
    processor = tiny_processor()
    model = tiny_model(tiny_config(processor.video_token_id))
    batch = VideoPandaDataCollator(processor, samples.parent)(json.loads(samples.read_text())[:3])
    inputs = {name: value for name, value in batch.items() if name not in BATCH_EXTRAS}
    kept = _keep_answers(inputs)
    with torch.no_grad():
        expected, output = model(**inputs), model(**kept)
    assert output.logits.shape[1] < expected.logits.shape[1] / 3
    torch.testing.assert_close(output.loss, expected.loss)
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    assert model(**_keep_answers(nothing), num_items_in_batch=torch.tensor(5)).loss == 0


def test_mixed_data(samples, teacher, tmp_path):
    """Videos, pictures and texts: every batch has one kind, and batches without video train as well."""
    Image.new("RGB", (40, 60), (200, 30, 30)).save(samples.parent / "picture.png")
    picture = [
        {"from": "human", "value": "<image>\nWhat colour is the ball?"},
        {"from": "gpt", "value": "It is red."},
    ]
    text = [{"from": "human", "value": "Who threw it?"}, {"from": "gpt", "value": "The child did."}]
    mixed = json.loads(samples.read_text())[:2]
    mixed += [{"id": f"p{i}", "image": "picture.png", "conversations": picture} for i in range(2)]
    mixed += [{"id": f"t{i}", "conversations": text} for i in range(2)]
    trainer = make_trainer(
        "instruction_tuning", samples, tmp_path, teacher, train_dataset=mixed, num_train_epochs=2, global_batch_size=2
    )
    seen = []
    collate = trainer.data_collator

    def noted(raw):
        batch = collate(raw)
        seen.append({key for key in batch if key.startswith("pixel_values")})
        return batch

    trainer.data_collator = noted
    trainer.train()
    assert len(losses_of(trainer)) == 6
    assert all(torch.tensor(losses_of(trainer)).isfinite())
    pictures, videos = {"pixel_values"}, {"pixel_values_videos"}
    assert sorted(map(sorted, seen)) == sorted(map(sorted, [set(), set(), pictures, pictures, videos, videos]))


def test_cached_teacher_gives_the_same_losses_and_is_not_asked_again(samples, teacher, tmp_path):
    runs, calls = [], []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    options = {"num_train_epochs": 2, "train_sampling_strategy": "sequential", "seed": 5}
    for name, cache in (("plain", None), ("first", tmp_path / "cache"), ("second", tmp_path / "cache")):
        calls.clear()
        trainer = make_trainer(
            "initial_alignment",
            samples,
            tmp_path / name,
            teacher,
            teacher_cache_dir=None if cache is None else str(cache),
            **options,
        )
        calls.clear()  # the check of its output at the start
        trainer.train()
        runs.append((losses_of(trainer), len(calls)))
    handle.remove()
    assert runs[0][0] == runs[1][0] == runs[2][0]
    assert runs[0][1] == 8
    assert runs[2][1] == 0


class TestUnreadable:
    def break_one(self, samples, folder):
        records = json.loads(samples.read_text())
        (folder / "clips").mkdir(parents=True)
        for number in range(len(records)):
            (folder / "clips" / f"{number}.mp4").write_bytes((samples.parent / f"clips/{number}.mp4").read_bytes())
        (folder / "clips" / "3.mp4").write_bytes(b"not a video at all" * 40)
        (folder / "samples.json").write_text(json.dumps(records))
        return folder / "samples.json"

    def test_too_many_stop_the_run(self, samples, tmp_path):
        broken = self.break_one(samples, tmp_path / "data")
        with pytest.raises(TooManySkippedError, match="clip-3"):
            make_trainer("instruction_tuning", broken, tmp_path / "run", num_train_epochs=1).train()

    def test_few_are_skipped_counted_and_listed(self, samples, tmp_path):
        broken = self.break_one(samples, tmp_path / "data")
        trainer = make_trainer(
            "instruction_tuning", broken, tmp_path / "run", num_train_epochs=2, max_skipped_share=0.2
        )
        trainer.train()
        assert all(torch.tensor(losses_of(trainer)).isfinite())
        records = [json.loads(line) for line in (tmp_path / "run" / SKIPPED_FILE).read_text().splitlines()]
        assert [(record["id"], record["reason_kind"]) for record in records] == [("clip-3", "unreadable")] * 2
        assert records[0]["reason"]
        assert trainer.skipped.num_unreadable == losses_of(trainer, "num_unreadable")[-1] == 2

    def test_or_are_an_error(self, samples, tmp_path):
        broken = self.break_one(samples, tmp_path / "data")
        with pytest.raises(ValueError, match="clip-3"):
            make_trainer("instruction_tuning", broken, tmp_path / "run", num_train_epochs=1, unreadable="error").train()


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_of_the_hub_library(samples, tmp_path, streaming):
    dataset = datasets.Dataset.from_list(json.loads(samples.read_text()))
    options = {"train_dataset": dataset, "max_steps": 3}
    if streaming:
        options["train_dataset"] = dataset.to_iterable_dataset()
    trainer = make_trainer("instruction_tuning", samples, tmp_path, **options)
    trainer.train()
    assert len(losses_of(trainer)) == 3
    assert trainer.skipped.num_seen >= 8


def test_stream_has_no_random_half(samples, tmp_path):
    stream = datasets.Dataset.from_list(json.loads(samples.read_text())).to_iterable_dataset()
    with pytest.raises(ValueError, match="data_fraction"):
        make_trainer("initial_alignment", samples, tmp_path, train_dataset=stream, data_fraction=0.5, max_steps=1)


def test_first_stage_takes_half_of_the_data(samples, tmp_path):
    def chosen(**options):
        dataset = make_trainer("initial_alignment", samples, tmp_path, data_fraction=0.5, **options).train_dataset
        return [dataset[place][0] for place in range(len(dataset))]

    assert len(chosen()) == 4
    assert chosen() == chosen()
    assert any(chosen(data_fraction_seed=seed) != chosen() for seed in range(1, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
        {"dataloader_num_workers": 1},
        {"optim": "sgd", "weight_decay": 0.1},
        {"train_sampling_strategy": "batch_rebalance"},
        {"include_num_input_tokens_seen": True},
        {"distillation_loss": "mse", "distillation_weight": 0.5},
        {"average_tokens_across_devices": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_of_transformers_keep_working(options, samples, teacher, tmp_path):
    trainer = make_trainer("visual_language_integration", samples, tmp_path, teacher, max_steps=2, **options)
    trainer.train()
    total, lm, distilled = (torch.tensor(losses_of(trainer, name)) for name in ("loss", "lm_loss", "distillation_loss"))
    assert total.isfinite().all()
    torch.testing.assert_close(total, lm + trainer.args.distillation_weight * distilled, rtol=1e-4, atol=1e-4)


def test_evaluation_export_and_generation(samples, teacher, tmp_path):
    trainer = make_trainer(
        "instruction_tuning",
        samples,
        tmp_path / "run",
        teacher,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=str(samples),
    )
    trainer.train()
    assert len(losses_of(trainer, "eval_loss")) == 2
    assert "teacher_pixel_values" not in next(iter(trainer.get_eval_dataloader()))
    assert "teacher_pixel_values" in next(iter(trainer.get_train_dataloader()))
    trainer.save_model(str(tmp_path / "export"))
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_video_panda.py"} <= names
    assert "alignment_head.safetensors" not in names
    exported = VideoPandaForConditionalGeneration.from_pretrained(tmp_path / "export")
    assert changed_names(weights_of(trainer.model), weights_of(exported)) == set()
    trainer.model.save_pretrained(tmp_path / "plain")
    VideoPandaForConditionalGeneration.from_pretrained(tmp_path / "plain")


def test_training_twice_goes_on(samples, teacher, tmp_path):
    trainer = make_trainer("instruction_tuning", samples, tmp_path, teacher, num_train_epochs=2)
    trainer.train()
    first = losses_of(trainer)
    trainer.train()
    assert losses_of(trainer)[0] < first[0]


class TestHeadGoesOn:
    def test_from_a_run(self, samples, teacher, tmp_path):
        first = make_trainer(
            "initial_alignment", samples, tmp_path / "1", teacher, max_steps=2, save_strategy="steps", save_steps=2
        )
        first.train()
        for source in (tmp_path / "1", tmp_path / "1" / "checkpoint-2"):
            second = make_trainer(
                "visual_language_integration", samples, tmp_path / "2", teacher, alignment_head=source
            )
            assert changed_names(weights_of(first.alignment_head), weights_of(second.alignment_head)) == set()

    def test_fresh_heads_follow_the_seed(self, samples, teacher, tmp_path):
        heads = [
            weights_of(make_trainer("initial_alignment", samples, tmp_path, teacher, seed=seed).alignment_head)
            for seed in (1, 1, 2)
        ]
        assert changed_names(heads[0], heads[1]) == set()
        assert "input.weight" in changed_names(heads[0], heads[2])

    def test_nothing_there_is_said(self, tmp_path):
        with pytest.raises(OSError, match=r"alignment_head\.safetensors"):
            find_alignment_head(tmp_path)
        file = save_alignment_head({"x": torch.ones(1)}, tmp_path)
        assert find_alignment_head(tmp_path) == find_alignment_head(file) == file


class TestRefused:
    def test_unknown_stage(self):
        with pytest.raises(ValueError, match="'stage_4', expected one of initial_alignment, "):
            find_stage("stage_4")

    def test_arguments_of_another_stage(self, samples, tmp_path):
        args = stage_arguments("initial_alignment", tmp_path)
        assert isinstance(args, InitialAlignmentArguments)
        with pytest.raises(ValueError, match="takes InstructionTuningArguments, got InitialAlignmentArguments"):
            InstructionTuningTrainer(tiny_model(), args, processing_class=tiny_processor(), train_dataset=str(samples))

    def test_empty_dataset(self, samples, tmp_path):
        with pytest.raises(ValueError, match=r"no samples|empty"):
            make_trainer("instruction_tuning", samples, tmp_path, train_dataset=[])

    def test_bad_sample_before_anything_starts(self, samples, tmp_path):
        bad = [*json.loads(samples.read_text()), {"id": "silent", "video": "clips/0.mp4", "conversations": []}]
        with pytest.raises(SampleError, match=r"8.*silent"):
            make_trainer("instruction_tuning", samples, tmp_path, train_dataset=bad)
        assert not (tmp_path / "checkpoint-1").exists()

    def test_processor_of_another_model(self, samples, tmp_path):
        model = tiny_model(tiny_config(num_text_tokens=390))
        with pytest.raises(ValueError, match="video_token_id"):
            make_trainer("instruction_tuning", samples, tmp_path, model=model)

    def test_another_model(self, samples, tmp_path):
        with pytest.raises(ValueError, match="no Video-Panda model"):
            make_trainer("instruction_tuning", samples, tmp_path, model=torch.nn.Linear(1, 1))

    def test_teacher_of_another_grid_than_it_says(self, samples, tmp_path):
        teacher = tiny_teacher(tmp_path / "teacher")
        teacher.forward = lambda pixels, num_frames=None: torch.zeros(1, pixels.shape[1], 2, 3, 32)
        with pytest.raises(ValueError, match="grid cannot be matched"):
            make_trainer("instruction_tuning", samples, tmp_path, teacher)

    def test_teacher_of_fewer_frames(self, samples, tmp_path):
        teacher = tiny_teacher(tmp_path / "teacher")
        teacher.max_num_frames = 4
        with pytest.raises(ValueError, match="at most 4 frames, num_frames is 8"):
            make_trainer("instruction_tuning", samples, tmp_path, teacher)


def test_overridden_methods_are_still_there():
    for name in OVERRIDDEN:
        assert callable(getattr(Trainer, name, None)), name
        owner = next(cls for cls in VideoPandaTrainer.__mro__ if name in vars(cls))
        assert owner in (VideoPandaTrainer, CheckpointSaving), name
