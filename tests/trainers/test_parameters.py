"""Which parameters train, how fast, and in which optimizer groups."""

import pytest
import torch
from tiny import tiny_model

from video_panda.trainers.alignment_head import AlignmentHead
from video_panda.trainers.distillation import TrainingLosses
from video_panda.trainers.parameters import PARTS, choose_trainable, format_plan, optimizer_groups, part_of

RATES = {"stab": 1e-4, "projector": 2e-4, "alignment_head": 3e-4, "language_model": 4e-5}
ALL = dict.fromkeys(PARTS, True)
FIRST_STAGE = {**ALL, "language_model": False}


def model_with_head():
    model = tiny_model()
    TrainingLosses(model, AlignmentHead(2, model.config.text_config.hidden_size, 16))
    return model


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.stab.gstra.q_proj.weight", "stab"),
        ("model.projector.linear_1.bias", "projector"),
        ("alignment_head.norms.0.weight", "alignment_head"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "language_model"),
        ("lm_head.weight", "language_model"),
        ("base_model.model.model.stab.modules_to_save.default.lsd.q_proj.weight", "stab"),
        ("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight", "language_model"),
        ("_orig_mod.model.projector.linear_2.weight", "projector"),
    ],
)
def test_part_of_a_parameter(name, part):
    assert part_of(name) == part


def test_every_parameter_belongs_to_one_part():
    model = model_with_head()
    plan = choose_trainable(model, ALL, RATES)
    assert [row.part for row in plan] == list(PARTS)
    assert sum(row.num_parameters for row in plan) == sum(parameter.numel() for parameter in model.parameters())
    stab = sum(parameter.numel() for parameter in model.model.stab.parameters())
    assert plan[0].num_parameters == plan[0].num_trainable == stab


def test_first_stage_freezes_the_language_model():
    model = model_with_head()
    plan = choose_trainable(model, FIRST_STAGE, RATES)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if part_of(name) == "language_model"}
    assert plan[-1].num_trainable == 0
    assert plan[-1].learning_rate is None


def test_a_part_that_was_frozen_trains_again():
    model = model_with_head()
    choose_trainable(model, FIRST_STAGE, RATES)
    choose_trainable(model, ALL, RATES)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="No parameter trains"):
        choose_trainable(model_with_head(), dict.fromkeys(PARTS, False), RATES)


def test_groups_hold_each_trained_parameter_once_with_its_rate():
    model = model_with_head()
    choose_trainable(model, FIRST_STAGE, RATES)
    decayed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    groups = optimizer_groups(model, decayed, 0.1, RATES)
    owner = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(owner)
    for name, parameter in model.named_parameters():
        if part_of(name) == "language_model":
            assert id(parameter) not in owner
        else:
            assert owner[id(parameter)]["lr"] == RATES[part_of(name)]
            assert owner[id(parameter)]["weight_decay"] == (0.1 if name in decayed else 0.0)


def test_first_group_is_the_language_models():
    """The Trainer logs the learning rate of the first group."""
    model = model_with_head()
    choose_trainable(model, ALL, RATES)
    assert optimizer_groups(model, set(), 0.0, RATES)[0]["lr"] == RATES["language_model"]
    torch.optim.AdamW(optimizer_groups(model, set(), 0.0, RATES))


def test_table_names_parts_numbers_and_rates():
    table = format_plan(choose_trainable(model_with_head(), FIRST_STAGE, RATES)).splitlines()
    assert table[0].split() == ["part", "parameters", "trainable", "learning", "rate"]
    assert table[1].split()[0] == "stab"
    assert table[1].split()[-1] == "0.0001"
    assert table[4].split()[-2:] == ["0", "frozen"]
    assert table[5].startswith("total")
