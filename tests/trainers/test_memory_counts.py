"""What distillation costs in memory, counted: live bytes of tensors' storages, whatever the machine is doing."""

import weakref

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from video_panda.trainers import distillation
from video_panda.trainers.alignment_head import AlignmentHead, distillation_loss, distilled_layers
from video_panda.trainers.distillation import DistillationBatch, TrainingLosses

NUM_LAYERS, WIDTH, GRID = 16, 64, (8, 3, 3)
NUM_FRAMES_AT_ONCE = 2


@pytest.fixture(autouse=True)
def few_tokens_at_once(monkeypatch):
    """In proportion to the small grid: two frames, and something left over."""
    monkeypatch.setattr(distillation, "NUM_TOKENS_AT_ONCE", (NUM_FRAMES_AT_ONCE + 1) * GRID[1] * GRID[2] - 1)


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of every storage that operations make while it is active, until it is let go of."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = {}  # id of a storage -> weak reference to it

    def note_all(self, values) -> None:
        """Storages that were there before are not counted."""
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage(), 0)

    def _note(self, storage, nbytes: int) -> None:
        key = id(storage)
        if key in self.known:
            return
        self.known[key] = weakref.ref(storage, lambda _: self._forget(key, nbytes))
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, nbytes: int) -> None:
        self.known.pop(key, None)
        self.live -= nbytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note_all([args, kwargs or {}])
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage(), value.untyped_storage().nbytes())
        return result


def make_batch(num_videos: int):
    """A model without dropout, its head, prompts with one video each, the teacher's features."""
    text = {"num_hidden_layers": NUM_LAYERS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    model = tiny_model(tiny_config(vision={"gstra_dropout": 0.0, "fusion_dropout": 0.0}, text=text)).train()
    config, (frames, height, width) = model.config, GRID
    torch.manual_seed(1)
    head = AlignmentHead(len(distilled_layers(NUM_LAYERS)), WIDTH, WIDTH)
    row = [config.video_token_id] * width + [config.row_token_id]
    input_ids = torch.tensor([[1, *[config.frame_token_id, *row * height] * frames, 9, 11, 2]] * num_videos)
    size = config.vision_config.canvas_size
    inputs = {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(torch.arange(input_ids.shape[1]) < input_ids.shape[1] - 3, -100),
        "logits_to_keep": 4,
        "pixel_values_videos": torch.randn(num_videos, frames, 3, size, size),
        "video_grid_thw": torch.tensor([GRID] * num_videos),
    }
    inputs["labels"] = inputs["labels"][:, -4:]
    return model, head, inputs, [torch.randn(*GRID, WIDTH) for _ in range(num_videos)]


def ours(model, head, inputs, features):
    losses = TrainingLosses(model, head)
    losses.begin(DistillationBatch(features, len(features) * GRID[0]))
    try:
        return model(**inputs).loss
    finally:
        losses.end()


def naive(model, head, inputs, features):
    output = model(**inputs, output_hidden_states=True)
    of_patches = torch.stack(output.hidden_states)[:, inputs["input_ids"] == model.config.video_token_id]
    prediction = head([of_patches[layer] for layer in distilled_layers(NUM_LAYERS)])
    teacher = torch.cat(features)
    return output.loss + distillation_loss(prediction.view_as(teacher), teacher).mean()


def without(model, head, inputs, features):
    return model(**inputs).loss


def count_step(losses, num_videos: int, checkpointing: bool) -> tuple[int, float]:
    """Peak bytes of forward and backward, and the loss."""
    model, head, inputs, features = make_batch(num_videos)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with LiveStorages() as storages:
        storages.note_all([list(model.parameters()), list(model.buffers()), list(head.parameters()), inputs, features])
        loss = losses(model, head, inputs, features)
        loss.backward()
    return storages.peak, loss.item()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_videos", [1, 3])
def test_extra_peak_is_a_third_of_the_naive_way_at_most(num_videos, checkpointing):
    plain, _ = count_step(without, num_videos, checkpointing)
    (own, own_loss), (other, other_loss) = (count_step(way, num_videos, checkpointing) for way in (ours, naive))
    assert own_loss == pytest.approx(other_loss, rel=1e-5)
    assert own > plain
    # Where everything is kept anyway, the head's own work is what shows: it takes a few frames at a time.
    assert (own - plain) * (3 if checkpointing else 4) <= other - plain


def test_storages_are_counted_until_they_are_let_go_of():
    with LiveStorages() as storages:
        first = torch.zeros(1000)
        second = first * 2
        view = second[:10]
        del first, second
        third = torch.ones(500)
    assert (storages.live, storages.peak) == (6000, 8000)
    del view, third
    assert storages.live == 0


def test_states_of_all_layers_are_never_asked_for_nor_stacked():
    model, head, inputs, features = make_batch(2)
    asked, rows = [], []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs.get("output_hidden_states")), with_kwargs=True
    )
    head.register_forward_pre_hook(lambda module, args: rows.append([len(state) for state in args[0]]))
    num_states = inputs["input_ids"].numel() * WIDTH

    class NoLargeTensor(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor):
                    assert value.shape[:1] != (NUM_LAYERS + 1,) or value.numel() < NUM_LAYERS * num_states, function
            return result

    with NoLargeTensor():
        ours(model, head, inputs, features).backward()
    assert set(asked) <= {None, False}
    num_tokens = NUM_FRAMES_AT_ONCE * GRID[1] * GRID[2]
    num_calls = 2 * 2 * GRID[0] // NUM_FRAMES_AT_ONCE  # two videos, forward and recomputation
    assert rows == [[num_tokens] * len(distilled_layers(NUM_LAYERS))] * num_calls
