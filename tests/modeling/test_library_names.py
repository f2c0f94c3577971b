"""The names under which transformers looks for the parts of a model."""

import pytest
from tiny import tiny_model
from torch import nn


@pytest.mark.parametrize("modality", ["image", "video"])
def test_the_encoder_of_a_modality_is_stab(modality):
    model = tiny_model()
    assert model.get_encoder(modality=modality) is model.model.stab
    other = nn.Identity()
    model.model.set_encoder(other, modality=modality)
    assert model.model.get_encoder(modality=modality) is other is model.model.stab
    assert "visual" not in dict(model.model.named_children())


def test_the_head_is_split_with_the_language_model():
    plan = tiny_model().tp_plan
    assert plan["lm_head"] == "colwise_gather_output"
    assert plan["model.language_model.layers.*.mlp.up_proj"] == "colwise"
    assert not any("stab" in name for name in plan)
