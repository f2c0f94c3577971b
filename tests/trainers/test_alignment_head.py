"""The alignment head and the distillation losses: by hand, and against the numbers of the authors' release."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from video_panda import VideoPandaForConditionalGeneration, convert_checkpoint
from video_panda.hub.release_keys import alignment_head_shapes
from video_panda.trainers.alignment_head import (
    ALIGNMENT_HEAD_FILE,
    AlignmentHead,
    cosine_loss,
    distillation_loss,
    distilled_layers,
    load_alignment_head,
    match_grids,
    mse_loss,
    save_alignment_head,
)
from video_panda.trainers.teachers import valid_cells


@pytest.mark.parametrize(
    ("num_layers", "step", "expected"),
    [(32, 4, [32, 28, 24, 20, 16, 12, 8, 4, 0]), (8, 4, [8, 4, 0]), (6, 4, [6, 2]), (2, 4, [2, 0]), (2, 1, [2, 1, 0])],
)
def test_every_fourth_layer_is_distilled(num_layers, step, expected):
    assert distilled_layers(num_layers, step) == expected


@pytest.mark.parametrize(("num_layers", "step"), [(0, 4), (8, 0)])
def test_impossible_layers_are_refused(num_layers, step):
    with pytest.raises(ValueError, match="at least 1"):
        distilled_layers(num_layers, step)


@pytest.fixture(scope="module")
def converted(golden_folder, tmp_path_factory):
    """The tiny release, converted with its alignment head, and its numbers."""
    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    source = golden_folder / "official_tiny"
    convert_checkpoint(source / "checkpoint", folder, keep_alignment_head=True, progress=False)
    model = VideoPandaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, model, load_file(source / "expected.safetensors")


@pytest.mark.parametrize("case", ["square", "landscape", "portrait"])
def test_distillation_loss_is_the_releases(converted, case):
    folder, model, expected = converted
    config = model.config
    frames, height, width = expected[f"{case}.grid_thw"].tolist()
    frame = [config.frame_token_id, *([config.video_token_id] * width + [config.row_token_id]) * height]
    before, after = expected["prompt.before"].tolist(), expected["prompt.after"].tolist()
    input_ids = torch.tensor([[*before, *frame * frames, *after]])
    with torch.no_grad():
        hidden_states = model(
            input_ids=input_ids,
            pixel_values_videos=expected[f"{case}.pixel_values"].float().unsqueeze(0),
            video_grid_thw=torch.tensor([[frames, height, width]]),
            output_hidden_states=True,
        ).hidden_states
    layers = distilled_layers(config.text_config.num_hidden_layers)
    head = AlignmentHead(len(layers), config.text_config.hidden_size)
    assert load_alignment_head(head, folder / ALIGNMENT_HEAD_FILE) == []
    is_patch = input_ids == config.video_token_id
    with torch.no_grad():
        prediction = head([hidden_states[layer][is_patch] for layer in layers]).unflatten(0, (frames, height, width))
    teacher = valid_cells(expected[f"{case}.teacher_features"].float().unflatten(1, (3, 3)), (height, width))
    loss = distillation_loss(prediction, teacher).mean()
    reference = expected[f"{case}.distillation_loss"].squeeze()
    assert abs(loss - reference) / reference <= 1e-5


def test_head_by_hand():
    """Written out for one token from the formula, in float64."""
    torch.manual_seed(0)
    hidden, width, heads = 6, 8, 2
    head = AlignmentHead(3, hidden, width, num_heads=heads).double()
    states = [torch.randn(1, hidden, dtype=torch.float64) for _ in range(3)]
    query, *keys = (
        project.weight @ torch.nn.functional.layer_norm(state[0], (hidden,), norm.weight, norm.bias)
        for state, norm, project in zip(states, head.norms, head.projections)
    )
    fused = torch.zeros(width, dtype=torch.float64)
    for start in range(0, width, width // heads):
        own = slice(start, start + width // heads)
        scores = [float(query[own] @ key[own]) / math.sqrt(width) for key in keys]
        weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        fused[own] = sum(weight * key[own] for weight, key in zip(weights, keys))
    expected = head.input.weight @ states[0][0] + head.input.bias + head.output.weight @ fused + head.output.bias
    torch.testing.assert_close(head(states)[0], expected, rtol=1e-12, atol=1e-12)


def test_head_takes_states_of_another_dtype():
    head = AlignmentHead(2, 4, 8)
    states = [torch.randn(3, 4) for _ in range(2)]
    exact = head([state.bfloat16().float() for state in states])
    assert torch.equal(head([state.bfloat16() for state in states]), exact)


def test_head_has_the_shapes_of_the_conversion():
    head = AlignmentHead(len(distilled_layers(32)), 16)
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes == alignment_head_shapes(32, 16)


@pytest.mark.parametrize(("num_states", "width"), [(1, 8), (2, 9)])
def test_impossible_heads_are_refused(num_states, width):
    with pytest.raises(ValueError, match="AlignmentHead"):
        AlignmentHead(num_states, 4, width)


def test_losses_by_hand():
    prediction = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    teacher = torch.tensor([[4.0, 3.0], [-5.0, 0.0], [0.5, 0.0]])
    torch.testing.assert_close(cosine_loss(prediction, teacher), torch.tensor([1 - 24 / 25, 2.0, 0.0]))
    torch.testing.assert_close(mse_loss(prediction, teacher), torch.tensor([1.0, 18.0, 1.125]))


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_identical_features_have_no_loss(loss):
    features = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(distillation_loss(features, features, loss), torch.zeros(2), atol=1e-6, rtol=0)


def test_loss_of_a_frame_is_the_mean_over_its_tokens():
    prediction, teacher = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    by_token = cosine_loss(prediction, teacher)
    torch.testing.assert_close(
        distillation_loss(prediction, teacher), torch.stack([frame.mean() for frame in by_token])
    )


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="cosine, mse"):
        distillation_loss(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), "l1")


def test_finer_grid_is_pooled():
    fine = torch.arange(16.0).view(1, 4, 4, 1)
    coarse = torch.zeros(1, 2, 2, 1)
    expected = torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    for pooled in (match_grids(fine, coarse)[0], match_grids(coarse, fine)[1]):
        assert torch.equal(pooled[0, :, :, 0], expected)
    untouched, _ = match_grids(coarse, fine)
    assert untouched is coarse


@pytest.mark.parametrize("teacher", [(2, 4, 2, 8), (3, 3, 3, 8), (2, 3, 3, 9)])
def test_grids_that_do_not_match_are_refused(teacher):
    with pytest.raises(ValueError, match="student's"):
        match_grids(torch.zeros(2, 3, 3, 8), torch.zeros(teacher))


class TestFiles:
    def test_saved_and_loaded(self, tmp_path):
        torch.manual_seed(0)
        head, other = AlignmentHead(2, 4, 8), AlignmentHead(2, 4, 8)
        path = save_alignment_head(head.state_dict(), tmp_path)
        assert path.name == ALIGNMENT_HEAD_FILE
        assert load_alignment_head(other, path) == []
        assert all(torch.equal(own, other.state_dict()[name]) for name, own in head.state_dict().items())

    def test_another_width_is_refused(self, tmp_path):
        path = save_alignment_head(AlignmentHead(2, 4, 16).state_dict(), tmp_path)
        with pytest.raises(ValueError, match=r"projections.0.weight has shape \(16, 4\), expected \(8, 4\)|another"):
            load_alignment_head(AlignmentHead(2, 4, 8), path)

    def test_a_deeper_head_is_refused(self, tmp_path):
        path = save_alignment_head(AlignmentHead(3, 4, 8).state_dict(), tmp_path)
        with pytest.raises(ValueError, match="another depth"):
            load_alignment_head(AlignmentHead(2, 4, 8), path)

    def test_what_the_file_lacks_starts_fresh(self, tmp_path):
        """EVE's head fits in part."""
        head = AlignmentHead(2, 4, 8)
        before = head.norms[1].weight.clone()
        save_file({"input.bias": torch.full((8,), 3.0)}, tmp_path / "head.safetensors")
        missing = load_alignment_head(head, tmp_path / "head.safetensors")
        assert "norms.1.weight" in missing
        assert torch.equal(head.norms[1].weight, before)
        assert torch.equal(head.input.bias, torch.full((8,), 3.0))

    def test_no_file_is_said(self, tmp_path):
        with pytest.raises(OSError, match="no alignment head"):
            load_alignment_head(AlignmentHead(2, 4, 8), tmp_path / "head.safetensors")
