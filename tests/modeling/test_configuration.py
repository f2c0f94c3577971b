"""Configurations: the published defaults, any causal language model, round trips, and every bad value refused."""

import dataclasses
import json
import re

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import IMAGE_SIZE, tiny_config, tiny_model
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaVisionConfig
from video_panda.modeling_video_panda.configuration_video_panda import AUTO_MAP

NUM_TEXT_TOKENS = 131  # of the small language models here: not a multiple of anything
SIZES = {
    "vocab_size": NUM_TEXT_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LANGUAGE_MODELS = {
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=8, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=NUM_TEXT_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**GROUPED),
    "phi3": lambda: transformers.Phi3Config(**GROUPED, pad_token_id=0),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **GROUPED, moe_intermediate_size=16, num_experts=4, shared_expert_intermediate_size=16
    ),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
}
TINY_VISION = {"image_size": IMAGE_SIZE, "hidden_size": 32}


def own_fields(config: PreTrainedConfig) -> dict:
    """What the class itself declares, without what every configuration of transformers has."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in common}


def video_inputs(config: VideoPandaConfig) -> dict:
    """One prompt with a landscape video of four frames."""
    frame = [config.frame_token_id, *([config.video_token_id] * 3 + [config.row_token_id]) * 2]
    input_ids = torch.tensor([[1, 5, *frame * 4, 7, 8, 9]])
    side = config.vision_config.canvas_size
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values_videos": torch.randn(1, 4, 3, side, side, generator=torch.Generator().manual_seed(1)),
        "video_grid_thw": torch.tensor([[4, 2, 3]]),
    }


# What a configuration says


def test_the_defaults_are_the_published_model():
    vision, text = VideoPandaConfig().vision_config, VideoPandaConfig().text_config
    assert own_fields(vision) == {
        "image_size": 448,
        "patch_size": 14,
        "num_channels": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "downsample_window": 2,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_frames": 8,
        "num_chunk_frames": 4,
        "lste_reduction": 1.5,
        "gstra_mlp_ratio": 4,
        "gstra_dropout": 0.5,
        "fusion_dropout": 0.5,
        "projector_hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "batch_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "use_row_token": True,
        "use_fsra": True,
        "use_lste": True,
        "use_gstra": True,
        "downsampling": "lsd",
        "downsampling_position": "after_lste",
        "num_perceiver_layers": 2,
    }
    # Vicuna-7B v1.5; a square video of 2184 tokens would not even fit into a Llama's default 2048 positions.
    vicuna = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    assert {name: text.to_dict()[name] for name in vicuna} == vicuna
    assert (VideoPandaConfig().num_text_tokens, text.vocab_size) == (32000, 32064)
    assert VideoPandaConfig().placeholder_token_ids == (32000, 32001, 32002, 32003)
    assert not VideoPandaConfig().tie_word_embeddings


def test_derived_sizes():
    vision = VideoPandaVisionConfig()
    assert (vision.canvas_size, vision.num_patches_per_side, vision.num_tokens_per_side) == (448, 32, 16)
    assert (vision.effective_window, vision.num_frame_tokens(16, 16), vision.num_frame_tokens(9, 16)) == (2, 273, 154)
    half = VideoPandaVisionConfig(downsampling="half_resolution", use_row_token=False)
    assert (half.canvas_size, half.num_patches_per_side, half.num_tokens_per_side) == (224, 16, 16)
    assert (half.effective_window, half.num_frame_tokens(16, 16), half.num_frame_tokens(9, 16)) == (1, 257, 145)


def test_sub_configurations_as_object_dict_or_nothing():
    vision, text = VideoPandaVisionConfig(num_frames=16), LlamaConfig(vocab_size=32064, num_hidden_layers=3)
    from_objects = VideoPandaConfig(vision_config=vision, text_config=text)
    from_dicts = VideoPandaConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    from_short_dicts = VideoPandaConfig(
        vision_config={"num_frames": 16}, text_config={"vocab_size": 32064, "num_hidden_layers": 3}
    )
    assert from_objects.to_dict() == from_dicts.to_dict() == from_short_dicts.to_dict()
    for config in (from_objects, from_dicts, from_short_dicts):
        assert isinstance(config.vision_config, VideoPandaVisionConfig)
        assert isinstance(config.text_config, LlamaConfig)
    only_defaults = VideoPandaConfig(vision_config=None, text_config=None)
    assert only_defaults.to_dict() == VideoPandaConfig().to_dict()
    assert only_defaults.get_text_config() is only_defaults.text_config


def test_instances_share_no_state():
    first, second = VideoPandaConfig(), VideoPandaConfig()
    first.vision_config.num_frames, first.text_config.vocab_size = 99, 99999
    assert (second.vision_config.num_frames, second.text_config.vocab_size) == (8, 32064)
    assert VideoPandaConfig().text_config.vocab_size == 32064


# Any causal language model


@given(num_tokens=st.integers(1, 300_000), more=st.integers(0, 5000), give_number=st.booleans())
def test_from_text_config_for_any_vocabulary(num_tokens, more, give_number):
    # A published vocabulary is often padded already: `more` rows of the embedding hold no token.
    text = LlamaConfig(vocab_size=num_tokens + more if give_number else num_tokens)
    before = text.to_dict()
    config = VideoPandaConfig.from_text_config(text, num_text_tokens=num_tokens if give_number else None)
    assert config.placeholder_token_ids == tuple(range(num_tokens, num_tokens + 4))
    assert config.num_text_tokens == num_tokens
    assert config.text_config.vocab_size % 64 == 0
    assert 0 <= config.text_config.vocab_size - (num_tokens + 4) < 64
    assert text.to_dict() == before, "the language model's own configuration is not changed"


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_any_causal_language_model(name, tie, tmp_path):
    config = VideoPandaConfig.from_text_config(
        LANGUAGE_MODELS[name](), vision_config=TINY_VISION, tie_word_embeddings=tie
    )
    model = tiny_model(config)
    assert model.config.text_config.model_type == name
    inputs = video_inputs(config)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], 192)
    assert (logits[..., NUM_TEXT_TOKENS:] == torch.finfo(logits.dtype).min).all()
    new = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, -4:]
    assert (new < NUM_TEXT_TOKENS).all()

    model.save_pretrained(tmp_path)
    loaded = VideoPandaForConditionalGeneration.from_pretrained(tmp_path).eval()
    for which in (model, loaded):
        assert (which.lm_head.weight is which.get_input_embeddings().weight) is tie
    own, again = model.state_dict(), loaded.state_dict()
    assert own.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in own.items())
    with torch.no_grad():
        # The same weights, but at other addresses: the last bits of a product can depend on those.
        torch.testing.assert_close(loaded(**inputs).logits, logits, rtol=1e-5, atol=1e-6)
    assert own_fields(loaded.config.text_config) == own_fields(model.config.text_config)


def test_tying_is_taken_from_the_language_model():
    assert VideoPandaConfig.from_text_config(LlamaConfig(tie_word_embeddings=True)).tie_word_embeddings is True
    assert VideoPandaConfig.from_text_config(LlamaConfig()).tie_word_embeddings is False
    assert VideoPandaConfig.from_text_config(transformers.GPT2Config()).tie_word_embeddings is True
    assert (
        VideoPandaConfig.from_text_config(transformers.GPT2Config(), tie_word_embeddings=False).tie_word_embeddings
        is False
    )


TRANSFORMED_LOGITS = {
    "Gemma2Config": ({}, "final_logit_softcapping=30.0"),
    "CohereConfig": ({}, "logit_scale=0.0625"),
    "GraniteConfig": ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
    "FalconH1Config": ({"lm_head_multiplier": 0.5}, "lm_head_multiplier=0.5"),
    "RecurrentGemmaConfig": ({}, "logits_soft_cap=30.0"),
    "PhimoeConfig": ({"lm_head_bias": True}, "lm_head_bias=True"),
}


@pytest.mark.parametrize("name", TRANSFORMED_LOGITS)
def test_language_models_that_do_more_to_their_logits_are_refused(name):
    fields, setting = TRANSFORMED_LOGITS[name]
    with pytest.raises(ValueError, match=f"text_config .* sets {re.escape(setting)}"):
        VideoPandaConfig.from_text_config(getattr(transformers, name)(**fields))


def test_the_same_language_models_with_plain_logits_are_taken():
    for text in (
        transformers.Gemma2Config(final_logit_softcapping=None),
        transformers.CohereConfig(logit_scale=1.0),
        transformers.GraniteConfig(),
        transformers.Gemma3TextConfig(),
    ):
        assert VideoPandaConfig.from_text_config(text).text_config.model_type == text.model_type


NO_LANGUAGE_MODELS = {
    "image encoder": (transformers.ViTConfig, "'vit'.*no vocab_size"),
    "multimodal": (transformers.Qwen3VLConfig, "'qwen3_vl'.*no vocab_size.*its own text_config"),
    "Video-Panda": (VideoPandaConfig, "'video_panda'.*no vocab_size"),
    "STAB": (VideoPandaVisionConfig, "'video_panda_vision'.*no vocab_size"),
    "encoder-decoder": (transformers.BartConfig, "'bart'.*encoder-decoder"),
}


@pytest.mark.parametrize("kind", NO_LANGUAGE_MODELS)
def test_what_is_no_causal_language_model_is_refused(kind):
    config_class, message = NO_LANGUAGE_MODELS[kind]
    with pytest.raises(ValueError, match=message):
        VideoPandaConfig(text_config=config_class())
    with pytest.raises(ValueError, match=message):
        VideoPandaConfig.from_text_config(config_class())


def test_a_multimodal_models_own_language_model_is_taken():
    text = transformers.Gemma3Config().text_config
    assert VideoPandaConfig.from_text_config(text).text_config.model_type == "gemma3_text"


def test_every_causal_language_model_of_transformers_is_taken_or_refused_with_a_reason():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    num_taken = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            text = CONFIG_MAPPING[model_type]()
        except Exception:  # noqa: BLE001 - it has no defaults; not what is asked here
            continue
        refusal = None
        try:
            config = VideoPandaConfig.from_text_config(text)
        except ValueError as error:
            refusal = str(error)
        if refusal is None:
            num_taken += 1
            assert config.num_text_tokens == text.vocab_size, model_type
        else:
            assert f"({text.model_type})" in refusal or f"{text.model_type!r}" in refusal, refusal
    assert num_taken > 100


# Round trips


def unlike_the_defaults() -> VideoPandaConfig:
    vision = {
        "use_row_token": False,
        "use_gstra": False,
        "downsampling": "avg_pool",
        "num_frames": 5,
        "num_chunk_frames": 2,
        "lste_reduction": 2.0,
        "projector_hidden_act": "silu",
    }
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    return tiny_config(777, vision=vision, text=text, rotary_table_dtype="float16", tie_word_embeddings=True)


@pytest.mark.parametrize("make", [VideoPandaConfig, tiny_config, unlike_the_defaults])
def test_round_trips(make, tmp_path):
    config = make()
    assert VideoPandaConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    for read in (VideoPandaConfig.from_pretrained, AutoConfig.from_pretrained):  # no trust_remote_code
        again = read(tmp_path)
        assert type(again) is VideoPandaConfig
        assert own_fields(again).keys() == own_fields(config).keys()
        for name in set(own_fields(config)) - {"vision_config", "text_config"}:
            assert getattr(again, name) == getattr(config, name), name
        assert own_fields(again.vision_config) == own_fields(config.vision_config)
        assert again.text_config.to_dict() == config.text_config.to_dict()
    again.save_pretrained(tmp_path)
    assert VideoPandaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_vision_configuration_of_a_checkpoint(tmp_path):
    unlike_the_defaults().save_pretrained(tmp_path)
    vision = VideoPandaVisionConfig.from_pretrained(tmp_path)
    assert own_fields(vision) == own_fields(unlike_the_defaults().vision_config)


def test_the_saved_auto_map_is_complete(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    assert set(AUTO_MAP) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
        "AutoVideoProcessor",
        "AutoImageProcessor",
    }
    assert saved["model_type"] == "video_panda"
    assert "auto_map" not in saved["vision_config"]
    assert "auto_map" not in saved["text_config"]


# Bad values

NAN = float("nan")
BAD_VISION_VALUES = [
    *[("image_size", value) for value in ("448", 448.0, True, 0, -28, None, (448, 448))],
    *[("patch_size", value) for value in (0, 14.0)],
    *[("num_channels", value) for value in (0, "3")],
    *[("downsample_window", value) for value in (0, 2.0)],
    *[("image_mean", value) for value in (None, 0.5, [0.5, 0.5], [0.5, 0.5, 128], [0.5, 0.5, "0.5"], [0.5, 0.5, NAN])],
    *[("image_std", value) for value in ([0.2, 0.2, 0], [True] * 3, [0.2] * 4, [0.2, 0.2, -0.2])],
    *[("hidden_size", value) for value in (0, None)],
    *[("num_attention_heads", value) for value in (0, True)],
    *[("num_frames", value) for value in (0, 8.5)],
    *[("num_chunk_frames", value) for value in (0, None)],
    *[("gstra_mlp_ratio", value) for value in (0, 4.0)],
    *[("num_perceiver_layers", value) for value in (0, -1)],
    *[("gstra_dropout", value) for value in (1.0, -0.1, NAN, "0.5", None, True, False)],
    *[("fusion_dropout", value) for value in (1, 1.5, None)],
    *[("lste_reduction", value) for value in (0, 0.5, 2000, NAN, True, "1.5", None)],
    *[("layer_norm_eps", value) for value in (0, -1e-5, NAN, float("inf"), "1e-5")],
    *[("batch_norm_eps", value) for value in (0.0, None, True)],
    *[("initializer_range", value) for value in (-0.02, NAN, "0.02", None)],
    *[("projector_hidden_act", value) for value in ("nonsense", None, 3, ["gelu"])],
    *[("use_row_token", value) for value in (0, "no")],
    *[("use_fsra", value) for value in (None, 1)],
    *[("use_lste", value) for value in ("False", 0)],
    *[("use_gstra", value) for value in ([], 1.0)],
    *[("downsampling", value) for value in ("LSD", "max_pool", None, ["lsd"], True)],
    *[("downsampling_position", value) for value in ("before", "BEFORE_LSTE", None, 0)],
]


@pytest.mark.parametrize(("name", "value"), BAD_VISION_VALUES)
def test_a_bad_vision_field_is_refused(name, value):
    message = rf"VideoPandaVisionConfig\.{name} must .*got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=message):
        VideoPandaVisionConfig(**{name: value})
    with pytest.raises(ValueError, match=message):
        VideoPandaConfig(vision_config={name: value})


# Fields that do not fit together: what was got, and each name concerned.
CONTRADICTIONS = [
    ({"image_size": 450}, r"image_size \(450 px\) must be a multiple of patch_size x downsample_window = 14 x 2 px"),
    ({"image_size": 448 + 14}, r"image_size \(462 px\) must be a multiple of patch_size x downsample_window"),
    ({"downsample_window": 3}, r"image_size \(448 px\).*downsample_window = 14 x 3 px"),
    ({"hidden_size": 1023}, r"hidden_size \(1023\) must be a multiple of num_attention_heads \(8\)"),
    ({"num_attention_heads": 7}, r"hidden_size \(1024\) must be a multiple of num_attention_heads \(7\)"),
    ({"use_fsra": False, "use_gstra": False}, "use_fsra=False with use_gstra=False"),
    (
        {"use_lste": False, "downsampling_position": "before_lste"},
        'downsampling_position="before_lste".*use_lste=False',
    ),
    ({"downsampling": "half_resolution", "downsampling_position": "before_lste"}, "got 'half_resolution'"),
    ({"downsampling": "perceiver_resampler", "downsampling_position": "before_lste"}, "got 'perceiver_resampler'"),
]


@pytest.mark.parametrize(("fields", "message"), CONTRADICTIONS)
def test_contradicting_vision_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoPandaVisionConfig(**fields)


@pytest.mark.parametrize(
    "name", ["use_row", "without_lste", "use_LSTE", "downsample", "image_token_index", "hiden_size"]
)
def test_an_unknown_field_or_ablation_is_refused(name):
    with pytest.raises(ValueError, match=rf"VideoPandaVisionConfig: unknown field {name}\. .*use_lste"):
        VideoPandaVisionConfig(**{name: False})
    with pytest.raises(ValueError, match=rf"VideoPandaVisionConfig: unknown field {name}\. "):
        VideoPandaConfig(vision_config={name: False})
    with pytest.raises(ValueError, match=rf"VideoPandaConfig: unknown field {name}\. .*video_token_id"):
        VideoPandaConfig(**{name: False})
    with pytest.raises(ValueError, match=rf"unknown field {name}\. "):
        VideoPandaConfig.from_text_config(LlamaConfig(), **{name: False})


def test_an_ablation_outside_the_vision_configuration_is_refused():
    with pytest.raises(ValueError, match=r"VideoPandaConfig: unknown field use_lste\. The fields are: .*vision_config"):
        VideoPandaConfig(use_lste=False)


BAD_IDS = [
    (5, 32001, 32002, 32003),
    (32000, 32001, 32002, 32004),
    (32000, 32001, 32002, 32002),
    (-1, 0, 1, 2),
    (True, 2, 3, 4),
    (32000.0, 32001, 32002, 32003),
    ("32000", 32001, 32002, 32003),
    (None, 32001, 32002, 32003),
]
ID_FIELDS = ("video_token_id", "row_token_id", "frame_token_id", "image_token_id")


@pytest.mark.parametrize("ids", BAD_IDS, ids=str)
def test_bad_placeholder_ids_are_refused(ids):
    with pytest.raises(ValueError, match=rf"VideoPandaConfig: .*ids.*got {re.escape(str(ids))}"):
        VideoPandaConfig(**dict(zip(ID_FIELDS, ids)))


@pytest.mark.parametrize("vocab_size", [32000, 32003])
@pytest.mark.parametrize("as_dict", [True, False])
def test_a_wrong_vocabulary_size_is_refused(vocab_size, as_dict):
    text = LlamaConfig(vocab_size=vocab_size)
    message = rf"text_config\.vocab_size is {vocab_size}, .* up to 32003: expected at least 32004 .*from_text_config"
    with pytest.raises(ValueError, match=message):
        VideoPandaConfig(text_config=text.to_dict() if as_dict else text)


def test_the_smallest_vocabulary_that_holds_the_placeholders_is_taken():
    assert VideoPandaConfig(text_config=LlamaConfig(vocab_size=32004)).num_text_tokens == 32000


BAD_FIELDS = [
    ({"rotary_table_dtype": "float8"}, "rotary_table_dtype must be .*got 'float8'"),
    ({"rotary_table_dtype": torch.float16}, "rotary_table_dtype must be .*got torch.float16"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be True or False, got 'yes'"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings must be True or False, got None"),
    ({"initializer_range": -1.0}, r"VideoPandaConfig\.initializer_range must .*got -1.0"),
    ({"text_config": 3}, r"VideoPandaConfig\.text_config must be .*got 3"),
    ({"text_config": "llama"}, r"VideoPandaConfig\.text_config must be .*got 'llama'"),
    ({"text_config": {"model_type": "nonsense"}}, "nonsense"),
    ({"text_config": {"vocab_size": "32064"}}, r"(?s)VideoPandaConfig: .*vocab_size.*'32064'"),
    ({"text_config": {"vocab_size": 32064, "hidden_size": 4097}}, r"(?s)VideoPandaConfig: .*4097"),
    ({"text_config": {"vocab_size": 32064, "dtype": "float3"}}, "VideoPandaConfig: .*float3"),
    ({"dtype": "float3"}, "VideoPandaConfig: .*float3"),
    ({"vision_config": "stab"}, r"VideoPandaConfig\.vision_config must be .*got 'stab'"),
    ({"vision_config": []}, r"VideoPandaConfig\.vision_config must be .*got \[\]"),
    ({"vision_config": LlamaConfig()}, r"(?s)VideoPandaConfig\.vision_config must be .*LlamaConfig"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config is of model_type 'siglip_vision_model'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_a_bad_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoPandaConfig(**fields)


@pytest.mark.parametrize("number", [0, -3, True, 400.5, "400"])
def test_a_bad_number_of_text_tokens_is_refused(number):
    with pytest.raises(ValueError, match=f"num_text_tokens must be a positive integer, got {re.escape(repr(number))}"):
        VideoPandaConfig.from_text_config(LlamaConfig(), num_text_tokens=number)


def test_from_text_config_of_something_else_is_refused():
    with pytest.raises(ValueError, match="text_config must be the configuration of a language model, got 'gpt2'"):
        VideoPandaConfig.from_text_config("gpt2")


# Fields assigned after the configuration was made

SPOILED = [
    ("vision_config.downsampling", "max_pool"),
    ("vision_config.use_lste", 0),
    ("vision_config.image_size", 85),
    ("text_config.vocab_size", 403),
    ("row_token_id", 7),
    ("tie_word_embeddings", "no"),
]


def spoil(config: VideoPandaConfig, path: str, value) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, value)


@pytest.mark.parametrize(("path", "value"), SPOILED)
def test_nothing_is_written_by_a_refused_save(path, value, tmp_path):
    config = tiny_config()
    spoil(config, path, value)
    with pytest.raises(ValueError, match=re.escape(str(value))):
        config.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_save_leaves_an_earlier_one_as_it_was(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    spoil(config, "vision_config.downsampling", "max_pool")
    with pytest.raises(ValueError, match="downsampling"):
        config.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_weights_are_written_with_a_refused_configuration(tmp_path):
    model = tiny_model()
    spoil(model.config, "vision_config.downsampling", "max_pool")
    with pytest.raises(ValueError, match=r"downsampling must .*got 'max_pool'"):
        model.save_pretrained(tmp_path)
    # transformers copies the shipped code first; that alone is no checkpoint.
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py"] == []


@pytest.mark.parametrize(("path", "value"), SPOILED)
def test_no_model_is_built_from_a_spoiled_configuration(path, value):
    config = tiny_config()
    spoil(config, path, value)
    with pytest.raises(ValueError, match=re.escape(str(value))):
        VideoPandaForConditionalGeneration(config)


def test_a_spoiled_config_json_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["vision_config"]["use_fsr"] = False
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="unknown field use_fsr"):
        VideoPandaConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown field use_fsr"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_keys_that_transformers_itself_stores_are_no_unknown_fields(tmp_path):
    model = tiny_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = VideoPandaConfig.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.dtype == torch.bfloat16
    assert again.architectures == ["VideoPandaForConditionalGeneration"]
