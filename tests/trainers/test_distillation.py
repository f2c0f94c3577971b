"""Distillation in a step: what the hooks take, what they leave alone, and that every trained part is touched."""

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import GPT2Config, LlamaConfig

from video_panda.trainers.alignment_head import AlignmentHead, distillation_loss, distilled_layers
from video_panda.trainers.distillation import (
    HEAD_NAME,
    DistillationBatch,
    TrainingLosses,
    VideoPandaTrainingOutput,
    find_core,
)

TEACHER_WIDTH = 16


def make_inputs(config, grids: list[tuple[int, int, int]], rows: list[list[int]], seed: int = 0) -> dict:
    """Prompts that hold videos of the given grids; `rows`: for each prompt the videos in it."""
    torch.manual_seed(seed)
    prompts = []
    for videos in rows:
        ids = [1, 5]
        for video in videos:
            frames, height, width = grids[video]
            frame = [config.frame_token_id, *([config.video_token_id] * width + [config.row_token_id]) * height]
            ids += [*frame * frames, 7]
        prompts.append([*ids, 9, 11, 2])
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in prompts])
    labels = torch.full_like(input_ids, -100)
    for row, ids in enumerate(prompts):
        labels[row, len(ids) - 3 : len(ids)] = input_ids[row, len(ids) - 3 : len(ids)]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if grids:
        size = config.vision_config.canvas_size
        inputs["pixel_values_videos"] = torch.randn(len(grids), max(grid[0] for grid in grids), 3, size, size)
        inputs["video_grid_thw"] = torch.tensor(grids)
    return inputs


def make_model(num_layers: int = 6, dropout: float = 0.0, **text):
    vision = {"gstra_dropout": dropout, "fusion_dropout": dropout}
    return tiny_model(tiny_config(vision=vision, text={"num_hidden_layers": num_layers, **text})).train()


def make_head(model, step: int = 4) -> AlignmentHead:
    torch.manual_seed(1)
    text = model.config.text_config
    return AlignmentHead(len(distilled_layers(text.num_hidden_layers, step)), text.hidden_size, TEACHER_WIDTH)


GRIDS = [(8, 3, 3), (4, 2, 3), (6, 3, 1)]
ROWS = [[0, 1], [], [2]]


def teacher_features(grids=GRIDS, seed: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(*grid, TEACHER_WIDTH) for grid in grids]


def losses_by_definition(model, head, inputs, features, num_frames) -> tuple[torch.Tensor, torch.Tensor]:
    """LM loss, and the distillation loss from `output_hidden_states=True` and a stack of all layers."""
    output = model(**inputs, output_hidden_states=True)
    config = model.config
    layers = distilled_layers(config.text_config.num_hidden_layers)
    is_patch = inputs["input_ids"] == config.video_token_id
    prediction = head([output.hidden_states[layer][is_patch] for layer in layers])
    sizes = [frames * height * width for frames, height, width in inputs["video_grid_thw"].tolist()]
    losses = [
        distillation_loss(own.unflatten(0, teacher.shape[:3]), teacher).sum()
        for own, teacher in zip(prediction.split(sizes), features)
    ]
    return output.loss, sum(losses) / num_frames


def run_step(model, losses: TrainingLosses, inputs, batch):
    losses.begin(batch)
    try:
        return model(**inputs)
    finally:
        losses.end()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_definition(checkpointing):
    model, features = make_model(), teacher_features()
    inputs = make_inputs(model.config, GRIDS, ROWS)
    head = make_head(model)
    lm_loss, distilled = losses_by_definition(model, head, inputs, features, num_frames=18)
    (lm_loss + 0.5 * distilled).backward()
    expected = {name: parameter.grad for name, parameter in [*model.named_parameters(), *head.named_parameters()]}
    model.zero_grad()
    head.zero_grad()
    model = make_model()  # running statistics as before
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = TrainingLosses(model, head, weight=0.5)
    output = run_step(model, losses, inputs, DistillationBatch(features, 18))
    assert isinstance(output, VideoPandaTrainingOutput)
    output.loss.backward()
    torch.testing.assert_close(output.lm_loss, lm_loss.detach())
    torch.testing.assert_close(output.distillation_loss, distilled.detach(), rtol=1e-5, atol=1e-6)
    losses.detach(model)
    assert not hasattr(model, HEAD_NAME)
    for name, parameter in [*model.named_parameters(), *head.named_parameters()]:
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "text_config",
    [
        GPT2Config(vocab_size=400, n_embd=32, n_layer=4, n_head=2, n_positions=512),
        LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2),
    ],
    ids=["gpt2", "llama"],
)
def test_states_are_those_of_output_hidden_states(text_config):
    from video_panda import VideoPandaConfig, VideoPandaForConditionalGeneration
    from video_panda.trainers.distillation import HiddenStateCapture

    vision = {"image_size": 84, "patch_size": 14, "hidden_size": 32}
    config = VideoPandaConfig.from_text_config(text_config, vision_config=vision)
    model = VideoPandaForConditionalGeneration(config).eval()
    inputs = make_inputs(config, [(4, 3, 3)], [[0]])
    capture = HiddenStateCapture(model.model.language_model, [4, 3, 1, 0], 4)
    with torch.no_grad():
        reference = model(**inputs, output_hidden_states=True).hidden_states
        assert capture.states == {}
        capture.is_on = True
        model(**inputs)
    taken = capture.pop()
    assert all(torch.equal(own, reference[layer]) for layer, own in zip([4, 3, 1, 0], taken))
    assert capture.states == {}
    capture.remove()


def test_hidden_states_are_held_not_copied():
    """Memory: the capture keeps references to what the layers put out anyway."""
    model = make_model()
    losses = TrainingLosses(model, make_head(model))
    inputs = make_inputs(model.config, GRIDS, ROWS)
    seen = {}
    model.model.language_model.layers[1].register_forward_hook(lambda module, args, output: seen.update(layer=output))
    taken = {}
    pop = losses.capture.pop
    losses.capture.pop = lambda: taken.update(losses.capture.states) or pop()
    run_step(model, losses, inputs, DistillationBatch(teacher_features(), 18))
    assert set(taken) == {6, 2}
    assert taken[2].data_ptr() == seen["layer"].data_ptr()
    assert losses.capture.states == {}


def test_other_calls_are_left_alone():
    """Evaluation and generation between two steps see the model as it is."""
    model = make_model()
    inputs = make_inputs(model.config, GRIDS, ROWS)
    losses = TrainingLosses(model, make_head(model))
    model.eval()
    output = model(**inputs)
    assert not isinstance(output, VideoPandaTrainingOutput)
    assert losses.capture.states == {}


def test_an_error_in_the_model_leaves_nothing_behind():
    model = make_model()
    losses = TrainingLosses(model, make_head(model))
    inputs = make_inputs(model.config, GRIDS, ROWS)
    with pytest.raises(ValueError, match="placeholder"):
        run_step(model, losses, {**inputs, "pixel_values_videos": None}, DistillationBatch(teacher_features(), 18))
    assert not losses.is_on
    assert losses.capture.states == {}


@pytest.mark.parametrize("kind", ["text", "image"])
def test_batch_without_video_touches_every_parameter(kind):
    model = make_model(dropout=0.5)
    config = model.config
    inputs = make_inputs(config, [], [[], []])
    if kind == "image":
        side = [config.image_token_id] * 3 + [config.row_token_id]
        picture = [config.frame_token_id, *side * 3]
        inputs["input_ids"] = torch.tensor([[1, *picture, 9, 11, 2]])
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] > 11, -100)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        size = config.vision_config.canvas_size
        inputs |= {"pixel_values": torch.randn(1, 3, size, size), "image_grid_thw": torch.tensor([[1, 3, 3]])}
    head = make_head(model)
    plain = model(**inputs).loss
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses = TrainingLosses(model, head)
    output = run_step(model, losses, inputs, None)
    output.loss.backward()
    torch.testing.assert_close(output.loss, plain)
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == []
    moved = [name for name, parameter in model.named_parameters() if "stab.lste" in name and parameter.grad.any()]
    assert moved == []  # touched, with a gradient of zero
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert model.model.stab.training


def test_frozen_vision_is_not_run_for_a_batch_of_texts():
    model = make_model()
    for parameter in [*model.model.stab.parameters(), *model.model.projector.parameters()]:
        parameter.requires_grad_(False)
    losses = TrainingLosses(model, None)
    model.model.stab.register_forward_hook(lambda *_: pytest.fail("STAB ran"))
    run_step(model, losses, make_inputs(model.config, [], [[]]), None).loss.backward()


def test_teacher_of_a_coarser_grid():
    model = make_model()
    losses = TrainingLosses(model, make_head(model), loss="mse")
    inputs = make_inputs(model.config, [(4, 3, 3)], [[0]])
    output = run_step(model, losses, inputs, DistillationBatch([torch.randn(4, 2, 2, TEACHER_WIDTH)], 4))
    assert output.distillation_loss.isfinite()


def test_model_without_stab_is_refused():
    with pytest.raises(ValueError, match="no Video-Panda model"):
        find_core(torch.nn.Linear(2, 2))
