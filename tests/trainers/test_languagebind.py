"""LanguageBind's encoder against the published model's numbers, a second implementation, and transformers' CLIP."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from video_panda.trainers.languagebind import LanguageBindVideoConfig, LanguageBindVideoModel

FIELDS = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "gelu",
        "add_time_attn": True,
        "num_frames": 4,
        "video_decode_backend": "decord",
        "torch_dtype": None,
    }
}


@pytest.fixture
def model():
    """Every weight drawn at random: a norm of ones or a bias of zeros would hide mistakes."""
    torch.manual_seed(0)
    model = LanguageBindVideoModel(LanguageBindVideoConfig.from_checkpoint(FIELDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def videos(num_videos=2, num_frames=4, seed=1):
    return torch.randn(num_videos, num_frames, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_the_published_numbers(golden_folder):
    folder = golden_folder / "languagebind_tiny"
    expected = load_file(folder / "expected.safetensors")
    config = LanguageBindVideoConfig.from_checkpoint(json.loads((folder / "checkpoint/config.json").read_text()))
    assert config.add_time_attn
    assert (config.num_frames, config.hidden_act) == (8, "gelu")
    model = LanguageBindVideoModel.from_pretrained(folder / "checkpoint", config=config)
    assert relative_error(model(expected["pixel_values"]).pooler_output, expected["pooler_output"]) < 1e-5
    model.encoder.layers = model.encoder.layers[:-1]
    second_last = model(expected["pixel_values"]).last_hidden_state
    assert relative_error(second_last, expected["hidden_states_-2"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [4, 3, 1])
def test_each_position_attends_over_the_frames(model, num_frames):
    """One layer's temporal half, position by position and head by head. A single frame gets no temporal embedding."""
    layer = model.encoder.layers[1]
    states = torch.randn(2, num_frames, 5, 32)
    embedding = layer.temporal_embedding[0, :num_frames] if num_frames > 1 else 0
    attention = layer.temporal_attn
    expected = torch.empty_like(states)
    for video in range(2):
        for position in range(5):
            embedded = states[video, :, position] + embedding
            normed = F.layer_norm(
                embedded, (32,), layer.temporal_layer_norm1.weight, layer.temporal_layer_norm1.bias, eps=1e-5
            )
            heads = []
            for head in range(4):
                part = slice(8 * head, 8 * head + 8)
                query, key, value = (
                    projection(normed)[:, part] for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                heads.append((query @ key.T / 8**0.5).softmax(-1) @ value)
            expected[video, :, position] = embedded + attention.out_proj(torch.cat(heads, -1))
    got = layer._attend_over_time(states.flatten(0, 1), num_frames).unflatten(0, (2, num_frames))
    assert relative_error(got, expected) < 1e-5


@torch.no_grad()
def test_without_temporal_attention_it_is_clip(model):
    weights = {name: tensor for name, tensor in model.state_dict().items() if "temporal" not in name}
    config = LanguageBindVideoConfig.from_checkpoint(FIELDS)
    config.add_time_attn = False
    ours = LanguageBindVideoModel(config).eval()
    ours.load_state_dict(weights)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    clip_config = CLIPVisionConfig(**{name: FIELDS["vision_config"][name] for name in names}, hidden_act="gelu")
    clip = CLIPVisionModel(clip_config).eval()
    clip.load_state_dict(weights)
    pixels = videos(num_frames=6)
    expected, got = clip(pixels.flatten(0, 1)), ours(pixels)
    assert torch.equal(got.last_hidden_state.flatten(0, 1), expected.last_hidden_state)
    assert torch.allclose(got.pooler_output, expected.pooler_output.unflatten(0, (2, 6)).mean(1))
    assert not torch.allclose(got.last_hidden_state[:, :4], model(pixels[:, :4]).last_hidden_state, atol=0.1)


@torch.no_grad()
def test_videos_do_not_see_each_other(model):
    pixels = videos()
    together = model(pixels).last_hidden_state
    assert torch.allclose(together[1:], model(pixels[1:]).last_hidden_state, atol=1e-5)
    changed = pixels.clone()
    changed[0, 3] += 1
    assert torch.equal(model(changed).last_hidden_state[1], together[1])
    assert not torch.allclose(model(changed).last_hidden_state[0, 0], together[0, 0], atol=1e-3), "frames do"


def test_more_frames_than_temporal_embeddings(model):
    with pytest.raises(ValueError, match=r"at most 4 frames .* got 5"):
        model(videos(num_frames=5))


def test_pictures_instead_of_videos(model):
    with pytest.raises(ValueError, match=r"expected videos \(V, T, 3, S, S\), got shape \(4, 3, 28, 28\)"):
        model(videos()[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected an object `vision_config`, got None"),
        ({"vision_config": [1]}, "expected an object `vision_config`"),
        ({"vision_config": {**FIELDS["vision_config"], "hidden_size": "wide"}}, "hidden_size"),
        ({"vision_config": {**FIELDS["vision_config"], "num_attention_heads": 5}}, "not a multiple"),
        ({"vision_config": {**FIELDS["vision_config"], "num_frames": 0}}, "num_frames` must be at least 1, got 0"),
        ({"vision_config": {**FIELDS["vision_config"], "add_time_attn": "yes"}}, "add_time_attn"),
    ],
)
def test_a_configuration_that_is_none(fields, message):
    with pytest.raises(ValueError, match=message):
        LanguageBindVideoConfig.from_checkpoint(fields)
