"""STAB's folded forms against the plain ones: the same results, in the same module, with the same parameters."""

from copy import deepcopy

import pytest
import torch
from model_inputs import GENERATE, canvases, relative_error
from tiny import tiny_config, tiny_model, tiny_processor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from video_panda import (
    VideoPandaConfig,
    VideoPandaImageProcessor,
    VideoPandaModel,
    VideoPandaVideoProcessor,
    VideoPandaVisionConfig,
)
from video_panda.modeling_video_panda import vision_video_panda
from video_panda.modeling_video_panda.stab_video_panda import VideoPandaSTAB
from video_panda.processing.canvas_video_panda import CLIP_MEAN, CLIP_STD

EIGHT_FRAMES = torch.tensor([[8, 2, 3]])


def wide_stab() -> VideoPandaSTAB:
    """Of the published width, on a canvas of 2 x 2 tokens; no part of it starts at zero."""
    torch.manual_seed(0)
    stab = VideoPandaSTAB(VideoPandaVisionConfig(image_size=56, gstra_dropout=0.0, fusion_dropout=0.0)).eval()
    for name, parameter in stab.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.5)
    stab.lste.norm.running_mean.normal_()
    stab.lste.norm.running_var.uniform_(0.5, 2)
    return stab


def wide_chunks(num_chunks: int = 2) -> torch.Tensor:
    return torch.randn(num_chunks, 4, 3, 56, 56, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("grid", [(2, 2), (1, 2)])
def test_the_folded_form_is_the_plain_one(dtype, limit, grid):
    stab, chunks = wide_stab().to(dtype), wide_chunks().to(dtype)
    with torch.no_grad():
        folded = stab(chunks, grid)
        plain = stab.use_plain_form()(chunks, grid)
        assert not torch.equal(folded, plain), "two ways, of which one is not taken"
        assert relative_error(folded, plain) <= limit
        still = stab(chunks[:, :1], grid, still=True)
        assert relative_error(stab.use_plain_form(False)(chunks[:, :1], grid, still=True), still) <= limit


def test_autocast_takes_the_folded_form_too():
    """Its linear layers give bfloat16, its norms float32: products meet operands of two dtypes."""
    stab, chunks = wide_stab(), wide_chunks()
    with torch.no_grad():
        expected = stab(chunks, (2, 2))
        for in_bfloat16 in (False, True):
            if in_bfloat16:
                stab.lsd.q_proj.to(torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16):
                assert relative_error(stab(chunks, (2, 2)), expected) <= 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        stab(chunks, (2, 2)).float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stab.parameters())


def test_half_precision_is_as_near_to_the_truth_in_either_form():
    stab, chunks = wide_stab(), wide_chunks()
    with torch.no_grad():
        truth = deepcopy(stab).double()(chunks.double(), (2, 2))
        for dtype, allowed in ((torch.bfloat16, 1.25), (torch.float16, 1.25)):
            half = deepcopy(stab).to(dtype)
            folded = relative_error(half(chunks.to(dtype), (2, 2)).double(), truth)
            plain = relative_error(half.use_plain_form()(chunks.to(dtype), (2, 2)).double(), truth)
            assert folded <= allowed * plain


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_the_same(training):
    gradients = []
    for plain in (False, True):
        stab, chunks = wide_stab().train(training).use_plain_form(plain), wide_chunks().requires_grad_()
        weights = torch.randn(2, 4, 7, 1024, generator=torch.Generator().manual_seed(2))
        (stab(chunks, (2, 2)) * weights).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in stab.named_parameters()} | {"": chunks.grad})
    for name, gradient in gradients[0].items():
        if name == "gstra.k_proj.bias":  # without effect on anything
            assert gradient.abs().max() < 1e-4
        else:
            assert relative_error(gradient, gradients[1][name]) <= 1e-4, name


LAYERS = ("lste.norm", "gstra.k_proj", "gstra.v_proj", "lsd.k_proj", "lsd.v_proj")
LAYERS += ("fsra.attention.k_proj", "fsra.attention.v_proj")


def called_layers(stab: VideoPandaSTAB) -> set[str]:
    """Which of the layers that can be folded are called as modules; looked at by a hook that concerns no single layer."""
    names, called = {stab.get_submodule(name): name for name in LAYERS}, set()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: called.add(names.get(module)))
    with torch.no_grad():
        stab(wide_chunks(1), (2, 2))
    handle.remove()
    return called - {None}


def test_a_layer_that_is_more_than_its_weights_is_called():
    """An adapter, a hook or an offloaded weight sends its own attention the plain way; the others stay folded."""
    stab = wide_stab()
    with torch.no_grad():
        expected = stab(wide_chunks(1), (2, 2))
    assert called_layers(stab) == set()
    stab.lsd.k_proj = nn.Sequential(stab.lsd.k_proj)
    assert called_layers(stab) == {"lsd.k_proj", "lsd.v_proj"}
    seen = []
    stab.fsra.attention.v_proj.register_forward_hook(lambda *args: seen.append(1))
    assert called_layers(stab) == set(LAYERS[3:])
    assert seen == [1]
    stab.lste.norm.forward = stab.lste.norm.forward  # as accelerate's hooks for offloading do
    assert called_layers(stab) == {"lste.norm", *LAYERS[3:]}
    with torch.no_grad():
        assert relative_error(stab(wide_chunks(1), (2, 2)), expected) < 1e-5
    assert called_layers(stab.use_plain_form()) == set(LAYERS)


# uint8 canvases, and chunks in turn


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_uint8_canvases_are_normalised_by_the_patch_embedding(dtype, limit):
    model = tiny_model().to(dtype).model
    pixels = torch.randint(0, 256, (2, 8, 3, 84, 84), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    grid = EIGHT_FRAMES.repeat(2, 1)
    with torch.no_grad():
        expected = model.get_video_features((pixels / 255 - mean) / std, grid)
        got = model.get_video_features(pixels, grid)
        assert relative_error(got.last_hidden_state, expected.last_hidden_state) <= limit
        assert got.pooler_output[0].dtype == dtype
        image = model.get_image_features(pixels[:, 0], torch.tensor([[1, 2, 3]] * 2)).last_hidden_state
        as_floats = model.get_image_features((pixels[:, 0] / 255 - mean) / std, torch.tensor([[1, 2, 3]] * 2))
        assert relative_error(image, as_floats.last_hidden_state) <= limit


def test_pixels_that_stay_uint8_give_the_same_answer():
    processor = tiny_processor()
    model = tiny_model(tiny_config(processor.video_token_id))
    frames = torch.randint(0, 256, (8, 60, 90, 3), dtype=torch.uint8)
    answers = []
    for options in ({}, {"do_rescale": False, "do_normalize": False}):
        inputs = processor(text="<video> What?", videos=[frames], **options)
        answers.append(model.generate(**inputs, **GENERATE).tolist())
    assert inputs["pixel_values_videos"].dtype == torch.uint8
    assert answers[0] == answers[1]


def test_other_statistics_than_clips_count():
    model = tiny_model(tiny_config(vision={"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]})).model
    pixels = torch.randint(0, 256, (1, 8, 3, 84, 84), dtype=torch.uint8)
    std = torch.tensor([0.25, 0.5, 1.0])[:, None, None]
    with torch.no_grad():
        expected = model.get_video_features((pixels / 255 - 0.5) / std, EIGHT_FRAMES).last_hidden_state
        assert relative_error(model.get_video_features(pixels, EIGHT_FRAMES).last_hidden_state, expected) < 1e-5


def test_the_processors_normalise_as_the_configuration_says():
    vision = VideoPandaVisionConfig()
    for processor in (VideoPandaVideoProcessor(), VideoPandaImageProcessor()):
        assert (list(processor.image_mean), list(processor.image_std)) == (vision.image_mean, vision.image_std)
    assert (vision.image_mean, vision.image_std) == (list(CLIP_MEAN), list(CLIP_STD))


@pytest.mark.parametrize("chunk_batch", [1, 2, 100])
def test_chunks_in_turn_give_the_same(chunk_batch):
    model = tiny_model().model
    grids = torch.tensor([[8, 2, 3], [11, 3, 3], [1, 2, 2], [6, 2, 3]])
    calls = []
    model.stab.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with torch.no_grad():
        expected = model.get_video_features(canvases(4, 11), grids)
        calls.clear()
        got = model.get_video_features(canvases(4, 11), grids, vision_chunk_batch=chunk_batch)
    assert max(calls) == min(chunk_batch, 5)
    assert relative_error(got.last_hidden_state, expected.last_hidden_state) < 1e-6
    for own, other in zip(got.pooler_output, expected.pooler_output, strict=True):
        assert relative_error(own, other) < 1e-6


@pytest.mark.parametrize(("num_bytes", "at_a_time"), [(1, 1), (2 * 4 * 36 * 32 * 4, 2), (2**24, 5)])
def test_on_a_cpu_so_many_chunks_go_together_as_stay_in_its_caches(monkeypatch, num_bytes, at_a_time):
    model = tiny_model().model
    assert model.config.vision_config.num_patches_per_side**2 * model.config.vision_config.hidden_size == 36 * 32
    given = canvases(4, 11), torch.tensor([[8, 2, 3], [11, 3, 3], [1, 2, 2], [6, 2, 3]])
    calls = []
    model.stab.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    monkeypatch.setattr(vision_video_panda, "CPU_CHUNK_BYTES", num_bytes)
    with torch.no_grad():
        got = model.get_video_features(*given)
    assert max(calls) == at_a_time
    calls.clear()
    expected = model.get_video_features(*given)
    assert max(calls) == 5, "with a gradient all go together"
    for own, other in zip(got.pooler_output, expected.pooler_output, strict=True):
        assert relative_error(own, other) < 1e-6
    calls.clear()
    model.stab.train()
    with torch.no_grad():
        model.get_video_features(*given)
    assert max(calls) == 5, "in training they share their statistics"


def test_generate_takes_chunks_in_turn(one_video):
    model, calls = tiny_model(), []
    expected = model.generate(**one_video, **GENERATE)
    model.model.stab.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert model.generate(**one_video, **GENERATE, vision_chunk_batch=1).tolist() == expected.tolist()
    assert calls == [1, 1]
    logits = model(**one_video, vision_chunk_batch=1).logits
    torch.testing.assert_close(logits, model(**one_video).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_of_chunks_is_refused(wrong):
    with pytest.raises(ValueError, match="vision_chunk_batch must be a positive integer or None, got"):
        tiny_model().get_video_features(canvases(1, 8), EIGHT_FRAMES, vision_chunk_batch=wrong)


def test_chunks_in_turn_are_refused_in_training():
    with pytest.raises(ValueError, match="share their statistics"):
        tiny_model().train().get_video_features(canvases(1, 8), EIGHT_FRAMES, vision_chunk_batch=1)


# What it costs, counted


class CountOperators(TorchDispatchMode):
    """How many operators are dispatched."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.total += 1
        return function(*args, **(kwargs or {}))


def published_vision_part(**vision) -> VideoPandaModel:
    """The published sizes, without memory, before a language model of hardly any layers."""
    config = VideoPandaConfig(vision_config=vision)
    config.text_config.num_hidden_layers, config.text_config.intermediate_size = 1, 8
    with torch.device("meta"):
        return VideoPandaModel(config).eval()


# GFLOP (a multiplication and an addition are two) and dispatched operators of STAB and projector.
RECORDED = {(8, 16, 16): (137.40, 203), (8, 9, 16): (92.15, 203)}
TWO_PERCENT = 0.02


@pytest.mark.parametrize(("grid", "recorded"), RECORDED.items())
def test_the_vision_part_costs_what_was_recorded(grid, recorded):
    model = published_vision_part()
    pixels = torch.empty(1, grid[0], 3, 448, 448, device="meta")
    with torch.no_grad(), CountOperators() as operators, FlopCounterMode(display=False) as flops:
        model.get_video_features(pixels, torch.tensor([grid]))
    counted = (flops.get_total_flops() / 1e9, operators.total)
    assert counted == pytest.approx(recorded, rel=TWO_PERCENT)


def test_the_cost_is_linear_in_frames_without_a_loop_over_them():
    model, counts = published_vision_part(), []
    for num_frames in (8, 128):
        pixels = torch.empty(1, num_frames, 3, 448, 448, device="meta")
        with torch.no_grad(), CountOperators() as operators, FlopCounterMode(display=False) as flops:
            model.get_video_features(pixels, torch.tensor([[num_frames, 16, 16]]))
        counts.append((flops.get_total_flops(), operators.total))
    (few_flops, few_operators), (many_flops, many_operators) = counts
    assert many_flops == pytest.approx(16 * few_flops, rel=0.01)
    assert many_operators == few_operators
