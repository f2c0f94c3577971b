"""Prompts that share videos: what a cache holds is neither encoded nor prefilled again, and the answers stay the same."""

import copy
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_inputs import GENERATE, canvases, left_pad, mixed_inputs, visual_ids
from tiny import tiny_config, tiny_model
from transformers import DynamicCache, MistralConfig, StaticCache

NUM_NEW = GENERATE["max_new_tokens"]
GRID = [8, 2, 3]


@pytest.fixture
def clip(model):
    """Ids of a clip with some text before it, and its pixels."""
    video = {"pixel_values_videos": canvases(1, 8), "video_grid_thw": torch.tensor([GRID])}
    return [1, 5, 6, *visual_ids(model.config, *GRID)], video


def prompt(ids: list[int]) -> dict:
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


@contextmanager
def counting(model):
    """How often STAB is called, and how many positions go through the language model."""
    counts = {"encoded": 0, "positions": 0}

    def count_stab(module, args):
        counts["encoded"] += 1

    def count_positions(module, args, kwargs):
        given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        counts["positions"] += given.shape[0] * given.shape[1]

    hooks = [
        model.model.stab.register_forward_pre_hook(count_stab),
        model.model.language_model.register_forward_pre_hook(count_positions, with_kwargs=True),
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def answers(model, inputs: dict, **options) -> list[list[int]]:
    """The new tokens."""
    output = model.generate(**inputs, **{**GENERATE, **options})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def test_questions_in_turn_cost_one_encoding_and_one_prefill(model, clip):
    start, video = clip
    questions = [[7, 8, 9], [7, 10], [11, 12, 13, 14], [7, 8, 9]]
    cache = model.prefix_cache()
    shared = [0, len(start) + 1, len(start), len(start)]
    for question, num_shared in zip(questions, shared):
        inputs = prompt(start + question)
        expected = answers(model, {**inputs, **video})
        with counting(model) as counts:
            assert answers(model, {**inputs, **video}, past_key_values=cache) == expected
        assert counts["encoded"] == (num_shared == 0)
        # The last of the new tokens is never computed with.
        assert counts["positions"] == len(start) + len(question) - num_shared + NUM_NEW - 1
    with counting(model) as counts:
        assert answers(model, {**inputs, **video}, past_key_values=cache) == expected
    assert counts["positions"] == NUM_NEW, "of a prompt that is held as a whole, the last token is computed"


@pytest.mark.parametrize("with_pixels", [True, False])
def test_a_conversation(model, clip, with_pixels):
    """Turn by turn; the second answer comes back with other tokens, as a tokenizer may give them, and a clip joins in."""
    ids, video = clip
    cache = model.prefix_cache()
    second = {"pixel_values_videos": canvases(1, 8, seed=5), "video_grid_thw": torch.tensor([[4, 3, 1]])}
    both = {name: torch.cat([video[name], second[name]]) for name in video}
    num_encoded = []
    for turn in range(4):
        ids = ids + [20 + turn, 21] + (visual_ids(model.config, 4, 3, 1) if turn == 2 else [])
        given = both if turn >= 2 else video
        expected = answers(model, {**prompt(ids), **given})
        with counting(model) as counts:
            # Without pixels, what the cache holds is taken for what the prompt means.
            own = given if with_pixels or turn in (0, 2) else {}
            assert answers(model, {**prompt(ids), **own}, past_key_values=cache) == expected
        num_encoded.append(counts["encoded"])
        ids = ids + ([30, 31] if turn == 1 else expected[0])
    assert num_encoded == [1, 0, 1, 0]


def test_another_clip_of_the_same_grid_is_noticed(model, clip):
    start, video = clip
    other = {**video, "pixel_values_videos": video["pixel_values_videos"].clone()}
    other["pixel_values_videos"][0, 7, 0, 0, 0] += 1
    cache = model.prefix_cache()
    inputs = prompt([*start, 7])
    for own, num_shared in ((video, 0), (other, 3), (video, 3)):
        expected = answers(model, {**inputs, **own})
        with counting(model) as counts:
            assert answers(model, {**inputs, **own}, past_key_values=cache) == expected
        assert counts == {"encoded": 1, "positions": len(start) + 1 - num_shared + NUM_NEW - 1}
    # The caller's memory may be used again for the next clip.
    video["pixel_values_videos"].mul_(-1)
    expected = answers(model, {**inputs, **video})
    assert answers(model, {**inputs, **video}, past_key_values=cache) == expected


def test_a_clip_of_other_frames_begins_again_at_its_start(model, clip):
    """The ids agree up to the middle of the clip."""
    start, video = clip
    cache = model.prefix_cache()
    answers(model, {**prompt([*start, 7]), **video}, past_key_values=cache)
    longer = {"pixel_values_videos": canvases(1, 9), "video_grid_thw": torch.tensor([[9, 2, 3]])}
    inputs = {**prompt([1, 5, 6, *visual_ids(model.config, 9, 2, 3), 7]), **longer}
    assert answers(model, inputs, past_key_values=cache) == answers(model, inputs)
    shorter = {"pixel_values_videos": canvases(1, 8), "video_grid_thw": torch.tensor([[4, 2, 3]])}
    inputs = {**prompt([1, 5, 6, *visual_ids(model.config, 4, 2, 3), 7]), **shorter}
    assert answers(model, inputs, past_key_values=cache) == answers(model, inputs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_questions_about_one_clip(model, clip, options, side):
    """One row also has a clip of its own behind what is shared, and one a clip and an image."""
    start, video = clip
    second, image = visual_ids(model.config, 4, 3, 1), visual_ids(model.config, 1, 2, 3, "image")
    rows = [[*start, 7], [*start, 7, *second, 9, 10], [*start, 7, *image, 11, *second]]
    pixels = video["pixel_values_videos"]
    visuals = {
        "pixel_values_videos": torch.cat([pixels, pixels, canvases(1, 8, seed=5), pixels, canvases(1, 8, seed=6)]),
        "video_grid_thw": torch.tensor([GRID, GRID, [4, 3, 1], GRID, [4, 3, 1]]),
        "pixel_values": canvases(1, seed=3),
        "image_grid_thw": torch.tensor([[1, 2, 3]]),
    }
    inputs = {**left_pad(rows), **visuals}
    expected = answers(model, inputs, **options)
    if side == "right":
        # Only a prompt of its own can be right-padded in transformers: with a prefix cache all may.
        inputs.update({name: inputs[name].clone() for name in ("input_ids", "attention_mask")})
        for row, ids in enumerate(rows):
            padding = inputs["input_ids"].shape[1] - len(ids)
            for name in ("input_ids", "attention_mask"):
                inputs[name][row] = inputs[name][row].roll(-padding)
    cache = model.prefix_cache()
    for num_encoded in (3, 2):
        with counting(model) as counts:
            assert answers(model, inputs, **options, past_key_values=cache) == expected
        assert counts["encoded"] == num_encoded, "the shared clip the first time, the others each time"
    longest = max(len(row) for row in rows) - len(start)
    num_beams = options.get("num_beams", 1)
    assert counts["positions"] <= 3 * num_beams * (longest + NUM_NEW - 1), "the clip was prefilled again"


def test_beams_of_one_prompt_share_the_prefix(model, clip):
    start, video = clip
    cache = model.prefix_cache()
    for question in ([], [7], [8, 9]):
        inputs = {**prompt(start + question), **video}
        expected = answers(model, inputs, num_beams=3)
        with counting(model) as counts:
            assert answers(model, inputs, num_beams=3, past_key_values=cache) == expected
    assert counts["encoded"] == 0
    assert counts["positions"] < len(start)


def test_a_batch_that_shares_nothing(model, clip):
    start, video = clip
    inputs = {**left_pad([[1, 7, 8], [2, *start, 9]]), **video}
    assert answers(model, inputs, past_key_values=model.prefix_cache()) == answers(model, inputs)


def test_sequences_and_dictionaries_are_those_without_a_cache(model, clip):
    start, video = clip
    inputs = {
        **left_pad([[*start, 7], [*start, 7, 8, 9]]),
        **{name: own.repeat(2, *[1] * (own.ndim - 1)) for name, own in video.items()},
    }
    expected = model.generate(**inputs, **GENERATE)
    output = model.generate(
        **inputs, **GENERATE, past_key_values=model.prefix_cache(), return_dict_in_generate=True, output_logits=True
    )
    assert output.sequences.tolist() == expected.tolist()
    assert len(output.logits) == NUM_NEW
    alone = {**prompt([*start, 7]), **video}
    padded = {**left_pad([[*start, 7], [1] * (len(start) + 3)])}
    padded = {name: own[:1] for name, own in padded.items()}
    got = model.generate(**padded, **video, **GENERATE, past_key_values=model.prefix_cache())
    assert got[0].tolist() == [0, 0, *model.generate(**alone, **GENERATE)[0].tolist()]


def test_features_in_the_place_of_pixels(model, clip):
    start, video = clip
    features = model.get_video_features(**video)
    cache = model.prefix_cache()
    for question in ([7], [8, 9]):
        inputs = prompt(start + question)
        got = answers(model, inputs, mm_encoder_outputs={"video": copy.copy(features)}, past_key_values=cache)
        assert got == answers(model, {**inputs, **video})


def test_a_cache_that_was_cropped_or_interrupted_is_still_right(model, clip):
    start, video = clip
    cache = model.prefix_cache()
    inputs = {**prompt([*start, 7, 8]), **video}
    expected = answers(model, inputs)
    answers(model, inputs, past_key_values=cache)
    cache.crop(-(cache.get_seq_length() - len(start) + 4))  # within the clip
    assert answers(model, inputs, past_key_values=cache) == expected

    class Full:
        def put(self, token_ids):
            if token_ids.numel() == 1:
                raise BrokenPipeError

        def end(self):
            pass

    other = {**prompt([*start, 9, 10, 11]), **video}
    with pytest.raises(BrokenPipeError):
        model.generate(**other, **GENERATE, past_key_values=cache, streamer=Full())
    assert answers(model, inputs, past_key_values=cache) == expected
    assert answers(model, other, past_key_values=copy.deepcopy(cache)) == answers(model, other)


def test_assisted_decoding_with_a_prefix_cache(model, clip):
    start, video = clip
    cache = model.prefix_cache()
    for question in ([7, 8], [7, 9]):
        inputs = {**prompt(start + question), **video}
        assert answers(model, inputs, past_key_values=cache, prompt_lookup_num_tokens=3) == answers(model, inputs)


def test_a_wrong_number_of_visuals_is_still_refused(model, clip):
    start, video = clip
    cache = model.prefix_cache()
    answers(model, {**prompt([*start, 7]), **video}, past_key_values=cache)
    two = {name: own.repeat(2, *[1] * (own.ndim - 1)) for name, own in video.items()}
    with pytest.raises(ValueError, match="0 video placeholder tokens"):
        answers(model, {**prompt([*start, 8]), **two}, past_key_values=cache)
    with pytest.raises(ValueError, match="the videos given have 0 features"):
        answers(model, prompt([1, 9, *start]), past_key_values=cache)


def test_what_does_not_go_with_a_prefix_cache(model, clip):
    start, video = clip
    inputs = {**prompt([*start, 7]), **video}
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    short = {**inputs, "input_ids": inputs["input_ids"][:, 2:]}
    cases = [
        ({**video, **embeds}, "compares token ids"),
        ({**inputs, "use_cache": False}, "use_cache=False"),
        (short, "expected the whole prompt in both"),
    ]
    for given_inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(**given_inputs, **GENERATE, past_key_values=model.prefix_cache())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_plain_cache_and_the_pixels_again(model, clip, kind):
    """A cache of transformers, whole prompts, and a new clip in the second turn."""
    start, video = clip
    config = model.config.text_config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=400)
    first = model.generate(**prompt([*start, 7]), **video, **GENERATE, past_key_values=cache)
    ids = [*first[0].tolist(), 21, *visual_ids(model.config, 4, 3, 1), 22]
    both = {
        "pixel_values_videos": torch.cat([video["pixel_values_videos"], canvases(1, 8, seed=5)]),
        "video_grid_thw": torch.tensor([GRID, [4, 3, 1]]),
    }
    expected = answers(model, {**prompt(ids), **both})
    with counting(model) as counts:
        assert answers(model, {**prompt(ids), **both}, past_key_values=cache) == expected
    assert counts["encoded"] == 1
    assert counts["positions"] == len(ids) - (len(start) + NUM_NEW) + NUM_NEW - 1


def test_a_plain_cache_expanded_for_beams(model, clip):
    start, video = clip
    first = model.generate(**prompt([*start, 7]), **video, **GENERATE, return_dict_in_generate=True)
    inputs = {**prompt([*first.sequences[0].tolist(), *visual_ids(model.config, 1, 2, 3, "image"), 22]), **video}
    inputs.update({"pixel_values": canvases(1, seed=3), "image_grid_thw": torch.tensor([[1, 2, 3]])})
    expected = answers(model, inputs, num_beams=2)
    cache = first.past_key_values
    cache.batch_repeat_interleave(2)
    assert answers(model, inputs, num_beams=2, past_key_values=cache) == expected


def test_a_plain_cache_that_cannot_be_gone_on_from(model, clip):
    start, video = clip
    cache = model.generate(**prompt([*start, 7]), **video, **GENERATE, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match=f"holds {len(start) + NUM_NEW} positions and the prompt has {len(start) + 1}"):
        answers(model, {**prompt([*start, 9]), **video}, past_key_values=cache)
    cache.crop(-(NUM_NEW + 5))
    with pytest.raises(ValueError, match="ends within a video or image"):
        answers(model, {**prompt([*start, 9]), **video}, past_key_values=cache)


def test_only_the_new_tokens_with_a_plain_cache(model, clip):
    start, video = clip
    first = model.generate(**prompt([*start, 7]), **video, **GENERATE, return_dict_in_generate=True)
    new = [*first.sequences[0, -1:].tolist(), 21, 22]
    whole = torch.tensor([[*first.sequences[0].tolist(), 21, 22]])
    expected = answers(model, {**prompt(whole[0].tolist()), **video})
    inputs = {"input_ids": torch.tensor([new]), "attention_mask": torch.ones_like(whole)}
    assert answers(model, inputs, past_key_values=first.past_key_values) == expected


@pytest.fixture(scope="module")
def model_with_windows():
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = MistralConfig(vocab_size=400, num_key_value_heads=2, sliding_window=16, **sizes)
    config = type(tiny_config()).from_text_config(text, vision_config=tiny_config().vision_config)
    return tiny_model(config)


def test_a_language_model_with_windows(model_with_windows, clip):
    model = model_with_windows
    start, video = clip
    cache = model.prefix_cache()
    for question in ([7, 8, 9], [7, 10], [11]):
        inputs = {**prompt(start + question), **video}
        with counting(model) as counts:
            got = answers(model, inputs, past_key_values=cache)
        assert got == answers(model, inputs)
        assert counts["encoded"] == (question == [7, 8, 9])
    two = {name: own.repeat(2, *[1] * (own.ndim - 1)) for name, own in video.items()}
    even = {**left_pad([[*start, 7, 8], [*start, 9, 10]]), **two}
    assert answers(model, even, past_key_values=cache) == answers(model, even)
    uneven = {**left_pad([[*start, 7, 8], [*start, 9]]), **two}
    with pytest.raises(ValueError, match="one prompt at a time with a prefix cache"):
        answers(model, uneven, past_key_values=cache)


def test_a_language_model_with_a_recurrent_state(model):
    config = copy.deepcopy(model.config)
    config.text_config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="recurrent state"):
        type(model.prefix_cache())(config)


# Few enough that prompts share beginnings of every kind.
GRIDS = [("video", [8, 2, 3]), ("video", [4, 3, 1]), ("video", [5, 2, 3]), ("image", [1, 2, 3]), ("image", [1, 3, 3])]
VISUALS = st.tuples(st.sampled_from(GRIDS), st.integers(0, 1)).map(lambda drawn: (*drawn[0], drawn[1]))
PIECES = st.lists(st.one_of(st.sampled_from([[7], [8, 9]]), VISUALS), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_row_of_prompts_is_answered_as_without_a_cache(model, data):
    cache = model.prefix_cache()
    for _ in range(3):
        inputs = mixed_inputs(model.config, [[*data.draw(PIECES), [10]]])
        options = {"max_new_tokens": 4, "min_new_tokens": 4}
        assert answers(model, inputs, past_key_values=cache, **options) == answers(model, inputs, **options)
