"""`generate` with every kind of cache, batch and decoding."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_inputs import GENERATE, canvases, left_pad, mixed_inputs, relative_error, visual_ids
from tiny import tiny_model
from transformers import GenerationMixin


@pytest.fixture
def padded_batch(model):
    """Four prompts, left-padded: a video; two videos; an image and a video; text only."""
    config = model.config
    prompts = [
        [1, *visual_ids(config, 8, 2, 3), 7, 8],
        [1, *visual_ids(config, 8, 3, 1), 9, *visual_ids(config, 4, 3, 3), 10],
        [1, *visual_ids(config, 1, 2, 3, "image"), 11, *visual_ids(config, 6, 2, 3), 12, 13],
        [1, 14, 15, 16],
    ]
    return {
        **left_pad(prompts),
        "pixel_values_videos": canvases(4, 8),
        "video_grid_thw": torch.tensor([[8, 2, 3], [8, 3, 1], [4, 3, 3], [6, 2, 3]]),
        "pixel_values": canvases(1, seed=3),
        "image_grid_thw": torch.tensor([[1, 2, 3]]),
    }


OWN_VIDEOS, OWN_IMAGES = [[0], [1, 2], [3], []], [[], [], [0], []]


def single(batch: dict, index: int) -> dict:
    """One prompt of `padded_batch` on its own, without padding."""
    kept = batch["attention_mask"][index].bool()
    alone = {name: batch[name][index : index + 1, kept] for name in ("input_ids", "attention_mask")}
    for own, names in (
        (OWN_VIDEOS, ("pixel_values_videos", "video_grid_thw")),
        (OWN_IMAGES, ("pixel_values", "image_grid_thw")),
    ):
        if own[index]:
            alone.update({name: batch[name][own[index]] for name in names})
    return alone


def test_a_left_padded_batch_generates_what_each_prompt_does(model, padded_batch):
    together = model.generate(**padded_batch, **GENERATE)[:, -8:]
    for index in range(4):
        alone = model.generate(**single(padded_batch, index), **GENERATE)[:, -8:]
        assert together[index].tolist() == alone[0].tolist()


def test_with_and_without_cache_are_equal(model, padded_batch):
    options = {**GENERATE, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**padded_batch, **options)
    plain = model.generate(**padded_batch, **options, use_cache=False)
    assert cached.sequences.tolist() == plain.sequences.tolist()
    kept = model.config.num_text_tokens
    for one, other in zip(cached.logits, plain.logits):
        assert relative_error(one[:, :kept], other[:, :kept]) < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_every_cache_kind(model, padded_batch, cache):
    if cache.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("an offloaded cache needs an accelerator")
    expected = model.generate(**padded_batch, **GENERATE)
    assert model.generate(**padded_batch, **GENERATE, cache_implementation=cache).tolist() == expected.tolist()


def test_the_video_is_encoded_once_per_request(model, padded_batch):
    calls = []
    hook = model.model.projector.register_forward_hook(lambda *args: calls.append(1))
    model.generate(**padded_batch, **GENERATE)
    hook.remove()
    assert len(calls) == 2  # the videos of the batch, and its image


def test_beams_and_several_answers_repeat_each_prompts_visuals_as_a_block(model, padded_batch):
    """Two videos in one prompt and none in another: repeated row by row they would land in the wrong prompts."""
    assert "_expand_multimodal_outputs" in vars(GenerationMixin), "the overridden hook of transformers is gone"
    options = {**GENERATE, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**padded_batch, **options)[:, -8:]
    for index in range(4):
        alone = model.generate(**single(padded_batch, index), **options)[:, -8:]
        assert together[2 * index : 2 * index + 2].tolist() == alone.tolist()


@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
def test_assisted_decoding_gives_the_greedy_answer(model, kind):
    """Prompt lookup finds the text before a video again after it, and proposes what followed: placeholders."""
    ids = [1, 7, 8, *visual_ids(model.config, 8, 2, 3), 5, 6, 7, 8]
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values_videos": canvases(1, 8),
        "video_grid_thw": torch.tensor([[8, 2, 3]]),
    }
    for hook in ("_get_logits_processor", "_prefill"):
        assert hook in vars(GenerationMixin), "an overridden hook of transformers is gone"
    helper = {"prompt_lookup_num_tokens": 3} if kind == "prompt lookup" else {"assistant_model": tiny_model(seed=1)}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert model.generate(**inputs, **options, **helper).tolist() == model.generate(**inputs, **options).tolist()


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_a_prefill_in_chunks_is_refused_with_videos_and_works_without(model, one_video, size):
    with pytest.raises(ValueError, match=f"prefill_chunk_size={size} does not go with videos"):
        model.generate(**one_video, **GENERATE, prefill_chunk_size=size)
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert (
        model.generate(**text, **GENERATE, prefill_chunk_size=size).tolist()
        == model.generate(**text, **GENERATE).tolist()
    )


def test_beams_with_inputs_embeds(model, padded_batch):
    options = {**GENERATE, "num_beams": 2}
    expected = model.generate(**padded_batch, **options)[:, -8:]
    inputs = dict(padded_batch)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert model.generate(**inputs, **options).tolist() == expected.tolist()


def test_generation_never_gives_a_placeholder(model, one_video):
    torch.manual_seed(0)
    output = model.generate(
        **one_video, do_sample=True, temperature=100.0, max_new_tokens=64, num_return_sequences=8, pad_token_id=0
    )
    assert output[:, one_video["input_ids"].shape[1] :].max() < model.config.num_text_tokens


def test_a_conversation_goes_on_from_its_cache(model, one_video):
    first = model.generate(**one_video, **GENERATE, return_dict_in_generate=True)
    follow_up = torch.cat([first.sequences, torch.tensor([[21, 22, 23]])], dim=1)
    visuals = {name: one_video[name] for name in ("pixel_values_videos", "video_grid_thw")}
    expected = model.generate(input_ids=follow_up, **visuals, **GENERATE)
    continued = model.generate(input_ids=follow_up, past_key_values=first.past_key_values, **GENERATE)
    assert continued.tolist() == expected.tolist()


def test_inputs_embeds_in_generate(model, one_video):
    expected = model.generate(**one_video, **GENERATE)[:, -8:]
    inputs = dict(one_video)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert model.generate(**inputs, **GENERATE).tolist() == expected.tolist()


# ------------------------------------------------------------------------------------------ numbers that do not move

SIZES = st.integers(1, 3)
VIDEOS = st.tuples(st.just("video"), st.tuples(st.integers(1, 9), SIZES, SIZES), st.integers(0, 99))
IMAGES = st.tuples(st.just("image"), st.tuples(st.just(1), SIZES, SIZES), st.integers(0, 99))
TEXT = st.lists(st.integers(3, 399), min_size=1, max_size=5)
PROMPTS = st.lists(st.one_of(TEXT, VIDEOS, IMAGES), min_size=1, max_size=3)
drawn = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def new_tokens(model, inputs: dict, **options) -> list[list[int]]:
    return model.generate(**inputs, **{**GENERATE, **options})[:, inputs["input_ids"].shape[1] :].tolist()


def first_logits(model, inputs: dict) -> torch.Tensor:
    """Of the text's tokens, for the first new token of each prompt."""
    with torch.no_grad():
        return model(**inputs, logits_to_keep=1).logits[:, 0, : model.config.num_text_tokens]


@drawn
@given(prompts=st.lists(PROMPTS, min_size=2, max_size=4))
def test_any_mix_gives_in_a_batch_what_each_prompt_gives(model, prompts):
    together = mixed_inputs(model.config, prompts)
    tokens, logits = new_tokens(model, together), first_logits(model, together)
    for index, pieces in enumerate(prompts):
        alone = mixed_inputs(model.config, [pieces])
        assert relative_error(logits[index : index + 1], first_logits(model, alone)) < 1e-5
        assert new_tokens(model, alone) == tokens[index : index + 1]


@drawn
@given(pieces=PROMPTS, count=st.integers(2, 4))
def test_without_padding_only_rounding_depends_on_the_batch(model, pieces, count):
    """Not bit by bit: matrix products of other sizes sum in another order, in the bare language model as well."""
    together = first_logits(model, mixed_inputs(model.config, [pieces] * count))
    alone = first_logits(model, mixed_inputs(model.config, [pieces]))
    assert all(relative_error(row, alone[0]) < 2e-6 for row in together)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("is_checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_setting_changes_the_answer(model, padded_batch, attention, is_checkpointing, cache):
    expected = new_tokens(model, padded_batch)
    own = copy.deepcopy(model)
    own.set_attn_implementation(attention)
    assert own.model.language_model.config._attn_implementation == attention
    if is_checkpointing:
        own.activation_checkpointing_enable()
    assert new_tokens(own, padded_batch, cache_implementation=cache) == expected
    for index in range(4):
        assert new_tokens(own, single(padded_batch, index), cache_implementation=cache) == expected[index : index + 1]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "backend"), [("whole", "aot_eager"), ("language_model", "inductor")])
def test_compiling_does_not_change_the_answer(model, one_video, part, backend):
    torch._dynamo.reset()
    own = copy.deepcopy(model)
    (own if part == "whole" else own.model.language_model).compile(backend=backend)
    for cache in ("static", "dynamic"):
        assert new_tokens(own, one_video, cache_implementation=cache) == new_tokens(model, one_video)
    torch._dynamo.reset()
