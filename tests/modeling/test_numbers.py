"""Numbers that do not move: a prompt in a batch and alone, and half precision against float32, as `docs/numerics.md` says."""

import copy
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_inputs import GENERATE, canvases, mixed_inputs, relative_error
from tiny import tiny_config, tiny_model, tiny_processor

from video_panda import VideoPandaForConditionalGeneration, VideoPandaProcessor, cli
from video_panda.modeling_video_panda import attention_video_panda

PAGE = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What is promised, and what rounding gives of it on the machines tried: a few units in the last place of float32.
PADDED, UNPADDED = 1e-5, 2e-6

SIZES = st.integers(1, 3)
VIDEOS = st.tuples(st.just("video"), st.tuples(st.integers(1, 9), SIZES, SIZES), st.integers(0, 99))
IMAGES = st.tuples(st.just("image"), st.tuples(st.just(1), SIZES, SIZES), st.integers(0, 99))
TEXT = st.lists(st.integers(3, 399), min_size=1, max_size=5)
PROMPTS = st.lists(st.lists(st.one_of(TEXT, VIDEOS, IMAGES), min_size=1, max_size=3), min_size=2, max_size=4)


@functools.cache
def shared_model() -> VideoPandaForConditionalGeneration:
    return tiny_model()


def largest_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of the token (row) that has the largest: a context token is short, and one of many."""
    got, expected = got.double(), expected.double()
    return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def features(model, inputs: dict, **options) -> dict[str, tuple[torch.Tensor, ...]]:
    """Of the videos and of the images of a batch, in their order."""
    found = {}
    if "video_grid_thw" in inputs:
        given = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        found["video"] = model.get_video_features(*given, **options).pooler_output
    if "image_grid_thw" in inputs:
        given = inputs["pixel_values"], inputs["image_grid_thw"]
        found["image"] = model.get_image_features(*given, **options).pooler_output
    return found


@torch.no_grad()
def check_a_batch_against_each_alone(model, prompts: list[list]) -> None:
    """Features and logits of all of a prompt's tokens, up to rounding; in turn the features are bit by bit the same."""
    num_text_tokens = model.config.num_text_tokens
    inputs = mixed_inputs(model.config, prompts)
    logits = model(**inputs).logits[..., :num_text_tokens]
    together = {in_turn: features(model, inputs, vision_chunk_batch=in_turn) for in_turn in (None, 1)}
    place = {"video": 0, "image": 0}
    for index, pieces in enumerate(prompts):
        alone = mixed_inputs(model.config, [pieces])
        own_logits = model(**alone).logits[0, :, :num_text_tokens]
        assert largest_error(logits[index, -len(own_logits) :], own_logits) <= PADDED
        own = {in_turn: features(model, alone, vision_chunk_batch=in_turn) for in_turn in (None, 1)}
        for kind in own[None]:
            for number, (rounded, exact) in enumerate(zip(own[None][kind], own[1][kind], strict=True)):
                assert largest_error(together[None][kind][place[kind] + number], rounded) <= UNPADDED
                assert torch.equal(together[1][kind][place[kind] + number], exact)
            place[kind] += len(own[None][kind])


@settings(max_examples=5, deadline=None)
@given(PROMPTS)
def test_a_prompt_in_any_batch_is_what_it_is_alone(prompts):
    check_a_batch_against_each_alone(shared_model(), prompts)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(PROMPTS)
def test_a_prompt_in_any_of_many_batches_is_what_it_is_alone(prompts):
    check_a_batch_against_each_alone(shared_model(), prompts)


@pytest.mark.parametrize("grid", [[8, 2, 3], [6, 3, 1], [1, 2, 3]])
@pytest.mark.parametrize("plain", [False, True])
def test_the_same_video_twice(grid, plain):
    """Folded or plain: products with more rows may sum in another order, so only one chunk at a time is exact anywhere."""
    model = copy.deepcopy(shared_model())
    model.model.stab.use_plain_form(plain)
    pixels, grids = canvases(1, grid[0]), torch.tensor([grid])
    with torch.no_grad():
        for options, limit in (({}, UNPADDED), ({"vision_chunk_batch": 1}, 0.0)):
            [alone] = model.get_video_features(pixels, grids, **options).pooler_output
            twice = model.get_video_features(pixels.repeat(2, 1, 1, 1, 1), grids.repeat(2, 1), **options).pooler_output
            assert all(largest_error(own, alone) <= limit for own in twice)
            if limit == 0.0:
                assert all(torch.equal(own, alone) for own in twice)


@pytest.mark.parametrize("grid", [[8, 2, 3], [6, 3, 1], [1, 2, 3], [1, 1, 1], [9, 1, 1]])
def test_no_product_has_so_few_rows_that_their_number_matters(grid, monkeypatch):
    """In inference on a CPU: those of a few contexts are given more, and the result is the same."""
    model = copy.deepcopy(shared_model()).model
    pixels, grids = canvases(1, grid[0]), torch.tensor([grid])
    num_rows = []
    stab = model.stab
    for layer in (stab.gstra.out_proj, stab.gstra.fc1, stab.gstra.fc2, model.projector):
        layer.register_forward_pre_hook(lambda module, args: num_rows.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        [enough] = model.get_video_features(pixels, grids).pooler_output
        assert len(num_rows) >= (1 if grid[0] == 1 else 4)  # pictures are not aggregated over time
        assert min(num_rows) >= attention_video_panda.NUM_ENOUGH_ROWS
        num_rows.clear()
        monkeypatch.setattr(attention_video_panda, "MAX_EVENED_WIDTH", 0)
        [few] = model.get_video_features(pixels, grids).pooler_output
    assert min(num_rows) < attention_video_panda.NUM_ENOUGH_ROWS
    assert largest_error(enough, few) <= UNPADDED
    num_rows.clear()
    monkeypatch.undo()
    model.get_video_features(pixels, grids)
    assert min(num_rows) < attention_video_panda.NUM_ENOUGH_ROWS, "with a gradient nothing is added"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_published_width_in_a_batch(dtype):
    """STAB of width 1024 on a small canvas."""
    text = {"hidden_size": 1024, "intermediate_size": 64, "num_attention_heads": 8, "num_hidden_layers": 1}
    model = tiny_model(tiny_config(vision={"image_size": 112, "hidden_size": 1024}, text=text)).to(DTYPES[dtype]).model
    draws = torch.Generator().manual_seed(0)
    grids = [[8, 4, 4], [6, 1, 4], [1, 2, 4], [9, 3, 4]]
    pixels = torch.randn(4, 9, 3, 112, 112, generator=draws).to(DTYPES[dtype])
    with torch.no_grad():
        for options, limit in (({}, UNPADDED if dtype == "float32" else 2e-2), ({"vision_chunk_batch": 1}, 0.0)):
            together = model.get_video_features(pixels, torch.tensor(grids), **options).pooler_output
            for index, grid in enumerate(grids):
                own = pixels[index : index + 1, : grid[0]], torch.tensor([grid])
                [alone] = model.get_video_features(*own, **options).pooler_output
                assert largest_error(together[index], alone) <= limit


# ------------------------------------------------------------------------------------------------------ half precision


@functools.cache
def subject(name: str):
    """(model in float32, its inputs, its processor)."""
    if name == "tiny":
        processor = tiny_processor()
        model = tiny_model(tiny_config(processor.video_token_id))
        frames = torch.randint(0, 256, (8, 60, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        clip, questions = {"video": frames}, ["What happens in this video?"]
    else:
        processor = VideoPandaProcessor.from_pretrained(cli.DEFAULT_MODEL)
        model = VideoPandaForConditionalGeneration.from_pretrained(cli.DEFAULT_MODEL, dtype=torch.float32).eval()
        clip = {"path": str(cli.DEFAULT_MODEL / "example.mp4")}
        questions = list(json.loads((cli.DEFAULT_MODEL / "example.json").read_text()))
    chats = [
        [{"role": "user", "content": [{"type": "video", **clip}, {"type": "text", "text": words}]}]
        for words in questions
    ]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    return model, dict(inputs), processor


@torch.no_grad()
def compute(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The features of the videos, and the logits of the next token at each place of the prompts."""
    model, inputs, _ = subject(name)
    model = copy.deepcopy(model).to(dtype)
    inputs = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].to(dtype)}
    videos = features(model, inputs)["video"]
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    return {"features": torch.cat(videos), "logits": logits[:, : model.config.num_text_tokens]}


def recorded() -> dict[tuple[str, str], dict[str, float]]:
    """The table of the page: relative errors by model and dtype."""
    rows = re.findall(r"^\| (tiny|default) \| (\w+) \| ([\d.e-]+) \| ([\d.e-]+) \|$", PAGE.read_text(), re.MULTILINE)
    return {(name, dtype): {"features": float(one), "logits": float(two)} for name, dtype, one, two in rows}


@pytest.mark.parametrize("name", ["tiny", "default"])
def test_half_precision_is_as_near_as_the_page_says(name):
    """float16 and bfloat16 against float32, and float32 against float64; another machine may round twice as much."""
    references = {"float32": compute(name, torch.float64)}
    references["float16"] = references["bfloat16"] = compute(name, torch.float32)
    for dtype, reference in references.items():
        found = references["float16"] if dtype == "float32" else compute(name, DTYPES[dtype])
        for what, stated in recorded()[name, dtype].items():
            error = relative_error(found[what], reference[what])
            print(name, dtype, what, f"{error:.1e}")
            assert stated / 4 <= error <= 2 * stated, (dtype, what)


def test_the_default_model_answers_the_same_in_every_precision():
    model, inputs, processor = subject("default")
    answers = {}
    for name, dtype in DTYPES.items():
        own = copy.deepcopy(model).to(dtype)
        output = own.generate(**inputs, **{**GENERATE, "min_new_tokens": None})[:, inputs["input_ids"].shape[1] :]
        answers[name] = [words.strip() for words in processor.batch_decode(output, skip_special_tokens=True)]
    truths = list(json.loads((cli.DEFAULT_MODEL / "example.json").read_text()).values())
    assert answers == dict.fromkeys(DTYPES, truths)
