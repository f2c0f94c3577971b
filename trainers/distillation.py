"""Distillation in a training step: hidden states are taken from the distilled layers by hooks while the model runs.

The model itself knows nothing of it. Hooks see the layers' outputs by reference, so no state is copied and
`output_hidden_states` is never needed; only the patch tokens are read, some frames at a time, in a block that is recomputed
in the backward pass. What a step keeps beyond the language model's own activations is the teacher's features.

Shape suffixes: B prompts, L prompt length, H width of the language model, V videos, T frames, (h, w) token grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import ModelOutput

from .alignment_head import AlignmentHead, distillation_loss, distilled_layers

HEAD_NAME = "alignment_head"  # under which the trained model carries the head while it trains
NUM_TOKENS_AT_ONCE = 512  # that the head computes together, in whole frames


@dataclass
class VideoPandaTrainingOutput(ModelOutput):
    """What a training step computes.

    `loss` = LM loss + weight x distillation loss; `distillation_loss` is the sum over this batch's frames divided by the
    number of frames that the step has in all its batches.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    distillation_loss: torch.FloatTensor | None = None


@dataclass
class DistillationBatch:
    """What the losses of one batch need beside the model's inputs.

    Attributes:
        teacher_features: one tensor (T, h', w', W) a video, valid cells only.
        num_frames_in_step: distilled frames in all batches of the optimizer step, over all processes.
    """

    teacher_features: Sequence[torch.Tensor]
    num_frames_in_step: int | torch.Tensor


def find_core(model: nn.Module) -> nn.Module:
    """The `VideoPandaModel` inside whatever wraps it: a head, PEFT, a distributed engine.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        names = dict(module.named_children())
        if {"stab", "projector", "language_model"} <= set(names):
            return module
    raise ValueError(
        f"{type(model).__name__} holds no Video-Panda model (a module with stab, projector, language_model)"
    )


def decoder_layers(language_model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The decoder layers of any language model of transformers.

    Raises:
        ValueError: it has no list of `num_layers` modules.
    """
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"{type(language_model).__name__} has no list of {num_layers} decoder layers to distil from")


class HiddenStateCapture:
    """Holds the hidden states of chosen layers of the forward pass that runs while it is switched on.

    Args:
        language_model: its decoder layers get the hooks.
        layers: as `distilled_layers` numbers them.
        num_layers: of the language model.
    """

    def __init__(self, language_model: nn.Module, layers: Sequence[int], num_layers: int):
        self.layers = list(layers)
        self.is_on = False
        self.states: dict[int, torch.Tensor] = {}
        decoder = decoder_layers(language_model, num_layers)
        self.handles = []
        for layer in self.layers:
            if layer == 0:
                hook = decoder[0].register_forward_pre_hook(self._take_input, with_kwargs=True)
            elif layer == num_layers:
                hook = language_model.register_forward_hook(self._take_output(layer))
            else:
                hook = decoder[layer - 1].register_forward_hook(self._take_output(layer))
            self.handles.append(hook)

    def _take_input(self, module, args, kwargs) -> None:
        if self.is_on:
            self.states[0] = args[0] if args else kwargs["hidden_states"]

    def _take_output(self, layer: int):
        def take(module, args, output) -> None:
            if self.is_on:  # the recomputation of a checkpointed layer runs while it is off
                self.states[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return take

    def pop(self) -> list[torch.Tensor]:
        """The states (B, L, H) in the order of `layers`; they are let go of here."""
        states = [self.states[layer] for layer in self.layers]
        self.states.clear()
        return states

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self.handles:
            handle.remove()


class TrainingLosses:
    """Adds distillation to a model's forward pass, and lets every batch touch every trained part.

    While it is attached the model carries the head as the sub-module `alignment_head`, so that optimizers and distributed
    engines treat it like any other part of the model. A call between `begin` and `end` returns a
    `VideoPandaTrainingOutput`; other calls (evaluation, generation) are left alone.

    Args:
        model: the trained model, as the Trainer holds it (perhaps wrapped by PEFT).
        head: the alignment head; None: no distillation.
        loss: "cosine" or "mse".
        weight: of the distillation loss in the sum.
        layer_step: as in `distilled_layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        head: AlignmentHead | None,
        loss: str = "cosine",
        weight: float = 1.0,
        layer_step: int = 4,
    ):
        self.loss, self.weight = loss, weight
        self.core = find_core(model)
        self.batch: DistillationBatch | None = None
        self.is_on = False
        self.lacks_motion = False
        self.capture = None
        if head is not None:
            model.add_module(HEAD_NAME, head)
            num_layers = self.core.config.text_config.num_hidden_layers
            self.capture = HiddenStateCapture(
                self.core.language_model, distilled_layers(num_layers, layer_step), num_layers
            )
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.core.get_input_embeddings().register_forward_hook(self._touch_vision),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def begin(self, batch: DistillationBatch | None) -> None:
        """Switch the losses on for the next call of the model; `batch` None: it has no video to distil from."""
        self.batch, self.is_on = batch, True

    def end(self) -> None:
        """Switch them off; nothing of the batch is kept, also after an error in the model."""
        self.batch, self.is_on = None, False
        if self.capture is not None:
            self.capture.is_on = False
            self.capture.states.clear()

    def detach(self, model: nn.Module) -> None:
        """Take the hooks and the head off the model again."""
        for handle in self.handles:
            handle.remove()
        if self.capture is not None:
            self.capture.remove()
            delattr(model, HEAD_NAME)

    def _before(self, model, args, kwargs) -> None:
        if self.is_on and not _trains(self.core.stab):
            self.core.stab.eval()  # the Trainer puts all in training mode; statistics of a frozen STAB must not move
        grids = kwargs.get("video_grid_thw")
        is_moving = grids is not None and kwargs.get("pixel_values") is None and bool((grids[:, 0] > 1).all())
        self.lacks_motion = self.is_on and not is_moving and _trains(self.core.stab, self.core.projector)
        if self.capture is not None:
            self.capture.is_on = self.is_on and self.batch is not None

    @torch.compiler.disable
    def _after(self, model, args, kwargs, output):
        if not self.is_on:
            return output
        lm_loss = output.loss
        loss, distilled = lm_loss, None
        if self.batch is not None:
            distilled = self._distil(model, kwargs["input_ids"], kwargs["video_grid_thw"])
            loss = loss + self.weight * distilled
        elif self.capture is not None:
            loss = loss + self._touch_head(model)
        return VideoPandaTrainingOutput(
            loss=loss,
            logits=output.logits,
            lm_loss=lm_loss.detach(),
            distillation_loss=None if distilled is None else distilled.detach(),
        )

    def _distil(self, model: nn.Module, input_ids: torch.Tensor, video_grid_thw: torch.Tensor) -> torch.Tensor:
        """Sum over the frames of this batch, divided by the number of frames of the step."""
        head = getattr(model, HEAD_NAME)
        places = self._patch_places(input_ids, video_grid_thw.tolist())
        # One view a prompt: the gradient of a video's tokens is then as large as its prompt, not as the batch.
        states_JB = [state.unbind(0) for state in self.capture.pop()]
        total = 0.0
        for group in _groups(places, self.batch.teacher_features, input_ids.device):
            states = [[of_layer[piece.row] for piece in group] for of_layer in states_JB]
            total = total + checkpoint(
                self._group_loss, head, group, states, use_reentrant=False, preserve_rng_state=False
            )
        return total / self.batch.num_frames_in_step

    def _group_loss(self, head, group: "list[_Piece]", states_JVLH: list[list[torch.Tensor]]) -> torch.Tensor:
        """Sum over the frames of some pieces of videos, all of one grid."""
        columns_Thw = torch.cat([piece.columns_Thw for piece in group])
        tokens_JNH = [
            torch.cat([state.index_select(0, piece.columns_Thw.flatten()) for state, piece in zip(of_layer, group)])
            for of_layer in states_JVLH
        ]
        teacher_ThwW = torch.cat([piece.teacher_ThwW for piece in group])
        prediction_ThwW = head(tokens_JNH).unflatten(0, columns_Thw.shape)
        return distillation_loss(prediction_ThwW, teacher_ThwW, self.loss).sum()

    def _patch_places(self, input_ids: torch.Tensor, grids: list) -> list[tuple[int, torch.Tensor, tuple]]:
        """For each video its prompt, the columns of its patch tokens there, and (T, h, w)."""
        is_patch = input_ids == self.core.config.video_token_id
        rows, columns = is_patch.nonzero(as_tuple=True)
        sizes = [frames * height * width for frames, height, width in grids]
        firsts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        row_of_video = rows[firsts.to(rows.device)].tolist()
        return [
            (row, own, tuple(grid)) for row, own, grid in zip(row_of_video, columns.split(sizes), grids, strict=True)
        ]

    # A batch of texts or pictures leaves STAB's temporal parts and the head without a gradient. Engines that reduce or
    # gather parameters together (DDP, FSDP, ZeRO) wait for all of them on every rank.

    @torch.compiler.disable
    def _touch_vision(self, embedding, args, output):
        """Add zero, computed by STAB and projector, to the embeddings of a batch in which not all is video.

        The place matters. Before the language model: the gradient then passes through it on every rank, also if it is
        frozen; FSDP gathers its layers for that. Before pictures are encoded: parameters get their gradients in the order
        of the black clip's, which is a video's; ZeRO-2 adds up what arrives on the ranks in the order of arrival.
        """
        if not self.lacks_motion:
            return output
        self.lacks_motion = False
        return output + (_sum(self._encode_black_clip()) * 0).to(output.dtype)

    def _touch_head(self, model: nn.Module) -> torch.Tensor:
        """Zero, computed from every parameter of the head."""
        head = getattr(model, HEAD_NAME)
        weight = head.input.weight
        state = weight.new_zeros(1, weight.shape[1])
        return _sum(head([state] * len(head.norms))) * 0

    def _encode_black_clip(self) -> torch.Tensor:
        """Features of two black frames of one token.

        STAB stays in training mode, in which the parameters of its BatchNorm get their gradients in another order than
        otherwise; but the running statistics see copies.
        """
        core, vision = self.core, self.core.config.vision_config
        shape = (1, 2, vision.num_channels, vision.canvas_size, vision.canvas_size)
        device = core.get_input_embeddings().weight.device
        norms = [module for module in core.stab.modules() if isinstance(module, nn.BatchNorm1d)]
        statistics = [dict(norm.named_buffers()) for norm in norms]
        for norm in norms:
            for name, buffer in norm.named_buffers():
                norm._buffers[name] = buffer.clone()
        try:
            grid = torch.tensor([[2, 1, 1]])
            return core.get_video_features(torch.zeros(shape, device=device), grid).pooler_output[0]
        finally:
            for norm, own in zip(norms, statistics):
                norm._buffers.update(own)


class _Piece(NamedTuple):
    """Some frames of a video.

    Attributes:
        row: of its prompt in the batch.
        columns_Thw: of its patch tokens in the prompt.
        teacher_ThwW: what the teacher sees there, on a grid of its own.
    """

    row: int
    columns_Thw: torch.Tensor
    teacher_ThwW: torch.Tensor


def _groups(places, teacher_features: Sequence[torch.Tensor], device) -> Iterator[list[_Piece]]:
    """Neighbouring pieces of the same grids, together at most `NUM_TOKENS_AT_ONCE` tokens, but at least a frame.

    Fewer tokens at a time take less memory: what the head computes for a token is many times as large as its states. More
    take fewer launches: short videos go together.
    """
    group, num_tokens = [], 0
    for (row, columns, grid), teacher_ThwW in zip(places, teacher_features, strict=True):
        if len(teacher_ThwW) != grid[0]:
            raise ValueError(f"A video of {grid[0]} frames has teacher features of {len(teacher_ThwW)}")
        num_frames = max(1, NUM_TOKENS_AT_ONCE // (grid[1] * grid[2]))
        for columns_Thw, teacher in zip(
            columns.view(grid).split(num_frames), teacher_ThwW.to(device).split(num_frames)
        ):
            piece = _Piece(row, columns_Thw, teacher)
            fits = not group or (
                num_tokens + columns_Thw.numel() <= NUM_TOKENS_AT_ONCE
                and all(own.shape[1:] == last.shape[1:] for own, last in zip(piece[1:], group[-1][1:]))
            )
            if not fits:
                yield group
                group, num_tokens = [], 0
            group.append(piece)
            num_tokens += columns_Thw.numel()
    if group:
        yield group


def _trains(*modules: nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().sum()
