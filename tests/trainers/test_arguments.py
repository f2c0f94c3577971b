"""Arguments of the stages: the paper's values, and the split of the global batch."""

import dataclasses
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_panda.trainers.arguments import (
    InitialAlignmentArguments,
    InstructionTuningArguments,
    VideoPandaTrainingArguments,
    VisualLanguageIntegrationArguments,
    split_global_batch,
)

# Paper, Table 6: global batch, learning rate, warm-up, language model trains, share of the data.
TABLE_6 = [
    (InitialAlignmentArguments, 2048, 4e-4, 0.03, False, 0.5),
    (VisualLanguageIntegrationArguments, 2048, 4e-5, 0.01, True, 1.0),
    (InstructionTuningArguments, 1024, 2e-5, 0.01, True, 1.0),
]


@pytest.mark.parametrize(("arguments", "batch", "rate", "warmup", "trains_llm", "fraction"), TABLE_6)
def test_defaults_are_the_papers(tmp_path, arguments, batch, rate, warmup, trains_llm, fraction):
    args = arguments(output_dir=str(tmp_path))
    assert args.global_batch_size == batch
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == batch
    assert set(args.learning_rates().values()) == {rate}
    assert args.get_warmup_steps(1000) == math.ceil(1000 * warmup)
    assert args.lr_scheduler_type == "cosine"
    assert args.optim.startswith("adamw_torch")
    assert args.weight_decay == 0
    assert args.num_train_epochs == 1
    assert args.trains() == {
        "stab": True,
        "projector": True,
        "alignment_head": True,
        "language_model": trains_llm,
    }
    assert args.data_fraction == fraction
    assert (args.distillation_loss, args.teacher) == ("cosine", "languagebind")


def test_learning_rates_of_parts(tmp_path):
    args = InstructionTuningArguments(output_dir=str(tmp_path), learning_rate=1e-3, stab_learning_rate=5e-4)
    assert args.learning_rates() == {
        "stab": 5e-4,
        "projector": 1e-3,
        "alignment_head": 1e-3,
        "language_model": 1e-3,
    }


def test_accumulation_given_alone_decides_the_global_batch(tmp_path):
    args = InstructionTuningArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    assert args.global_batch_size == 6


def test_processes_share_the_global_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = VideoPandaTrainingArguments.__new__(VideoPandaTrainingArguments)
    for field in dataclasses.fields(VideoPandaTrainingArguments):
        if field.default is not dataclasses.MISSING:
            setattr(args, field.name, field.default)
    args.global_batch_size, args.per_device_train_batch_size = 64, 2
    args._split_global_batch()
    assert args.gradient_accumulation_steps == 8


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 128))
def test_split_is_exact_or_refused_with_values_that_fit(global_batch, micro, processes):
    try:
        steps = split_global_batch(global_batch, micro, processes)
    except ValueError as error:
        assert global_batch % (micro * processes)
        for proposal in str(error).split("try ")[1].split(" or "):
            name, value = proposal.split("=")
            if name == "global_batch_size":
                assert split_global_batch(int(value), micro, processes) >= 1
            else:
                assert split_global_batch(global_batch, int(value), processes) >= 1
    else:
        assert steps * micro * processes == global_batch


def test_contradiction_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"needs gradient_accumulation_steps=4, got 3.*global_batch_size=6"):
        InstructionTuningArguments(
            output_dir=str(tmp_path),
            global_batch_size=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distillation_loss", "l1"),
        ("too_long", "cut"),
        ("unreadable", "replace"),
        ("data_fraction", 0.0),
        ("data_fraction", 1.5),
        ("max_skipped_share", -0.1),
        ("global_batch_size", 0),
        ("num_frames", 0),
        ("max_length", 0),
        ("distillation_layer_step", 0),
        ("label_smoothing_factor", 0.1),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        InstructionTuningArguments(output_dir=str(tmp_path), **{name: value})


def test_copy_keeps_the_values(tmp_path):
    args = InstructionTuningArguments(output_dir=str(tmp_path), global_batch_size=16)
    assert dataclasses.replace(args).gradient_accumulation_steps == args.gradient_accumulation_steps == 2


def test_the_token_is_not_pickled_beside_checkpoints(tmp_path):
    args = InstructionTuningArguments(output_dir=str(tmp_path), hub_token="hf_secret")
    assert b"hf_secret" not in pickle.dumps(args)
    assert args.hub_token == "hf_secret"
    assert pickle.loads(pickle.dumps(args)).global_batch_size == args.global_batch_size
