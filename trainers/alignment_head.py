"""The alignment head and the losses of the distillation: what the language model saw, compared with a teacher's features.

Shape suffixes: N patch tokens, H width of the language model, W width of the teacher, J distilled layers, T frames, (h, w)
token grid of a frame.
"""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

logger = logging.getLogger(__name__)

ALIGNMENT_HEAD_FILE = "alignment_head.safetensors"
LAYER_STEP = 4
DISTILLATION_LOSSES = ("cosine", "mse", "none")


def distilled_layers(num_layers: int, step: int = LAYER_STEP) -> list[int]:
    """The layer outputs that are compared with the teacher: L, L-4, ... down to 0 (release).

    Args:
        num_layers: L, decoder layers of the language model.
        step: between two of them; a model with fewer layers than that uses L and 0.

    Returns:
        Numbers as transformers counts `hidden_states`: 0 is the input embeddings, L comes after the final norm.

    Raises:
        ValueError: either number is below 1.
    """
    if num_layers < 1 or step < 1:
        raise ValueError(
            f"distilled_layers: expected at least 1 layer and a step of at least 1, got {num_layers}, {step}"
        )
    return list(range(num_layers, -1, -min(step, num_layers)))


class AlignmentHead(nn.Module):
    """Fuses hidden states of several depths and predicts the teacher's features. Release: `video_tower_compressor`.

    The deepest state asks the others, by 8-head attention over the layers of each token.

    Args:
        num_states: J, hidden states given to `forward`, the deepest first.
        hidden_size: H.
        teacher_width: W, a multiple of `num_heads`.
        num_heads: of the attention over layers.
    """

    def __init__(self, num_states: int, hidden_size: int, teacher_width: int = 1024, num_heads: int = 8):
        super().__init__()
        if num_states < 2:
            raise ValueError(f"AlignmentHead: num_states is {num_states}, expected at least 2 (a query and a key)")
        if teacher_width % num_heads:
            raise ValueError(f"AlignmentHead: teacher_width is {teacher_width}, expected a multiple of {num_heads}")
        self.num_heads = num_heads
        self.teacher_width = teacher_width
        self.scale = teacher_width**-0.5  # PARITY: the release scales by the full width, not by a head's
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size, eps=1e-5) for _ in range(num_states))
        self.projections = nn.ModuleList(nn.Linear(hidden_size, teacher_width, bias=False) for _ in range(num_states))
        self.input = nn.Linear(hidden_size, teacher_width)
        self.output = nn.Linear(teacher_width, teacher_width)

    def forward(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Hidden states, J tensors (N, H), the deepest first -> prediction (N, W), in the dtype of the head's weights."""
        # The residual stream may be of another dtype than the head: a language model in bfloat16, frozen.
        states = [state.to(self.input.weight.dtype) for state in states]
        query_NW, *keys = (project(norm(state)) for state, norm, project in zip(states, self.norms, self.projections))
        heads = (self.num_heads, self.teacher_width // self.num_heads)
        keys_NJhd = torch.stack([key.unflatten(-1, heads) for key in keys], dim=1)
        weights_NJh = (query_NW.unflatten(-1, heads).unsqueeze(1) * keys_NJhd).sum(-1).mul(self.scale).softmax(dim=1)
        fused_NW = (weights_NJh.unsqueeze(-1) * keys_NJhd).sum(1).flatten(1)
        return self.input(states[0]) + self.output(fused_NW)


def cosine_loss(prediction: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each token: (..., W) twice -> (...,), float32 (paper, Table 5: "negative cosine")."""
    return 1 - F.cosine_similarity(prediction.float(), teacher.float(), dim=-1)


def mse_loss(prediction: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each token: (..., W) twice -> (...,), float32 (paper, Table 5)."""
    return (prediction.float() - teacher.float()).square().mean(-1)


TOKEN_LOSSES = {"cosine": cosine_loss, "mse": mse_loss}


def match_grids(prediction: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring both to the coarser of their grids: the finer one is average-pooled (release).

    Args:
        prediction: (T, h, w, W).
        teacher: (T, h', w', W).

    Returns:
        Both, on one grid.

    Raises:
        ValueError: their frames or widths differ, or neither grid is the finer one in both directions.
    """
    if prediction.shape[0] != teacher.shape[0] or prediction.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"The student's {tuple(prediction.shape)} and the teacher's features {tuple(teacher.shape)} (frames, rows, "
            "columns, width) differ in frames or width"
        )
    ours, theirs = prediction.shape[1:3], teacher.shape[1:3]
    coarser = min(ours, theirs)
    if any(size < least for grid in (ours, theirs) for size, least in zip(grid, coarser)):
        raise ValueError(
            f"The teacher's grid of {tuple(theirs)} tokens a frame cannot be matched with the student's {tuple(ours)}: one "
            "is finer in rows, the other in columns"
        )
    return _pool(prediction, coarser), _pool(teacher, coarser)


def _pool(features: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    if features.shape[1:3] == grid:
        return features
    # Adaptive pooling of bfloat16 has no kernel on every device, and the loss is taken in float32 anyway.
    pooled = F.adaptive_avg_pool2d(features.float().permute(0, 3, 1, 2), tuple(grid))
    return pooled.permute(0, 2, 3, 1)


def distillation_loss(prediction: torch.Tensor, teacher: torch.Tensor, loss: str = "cosine") -> torch.Tensor:
    """The loss of each frame: the mean over its tokens (architecture, section 5).

    Args:
        prediction: (T, h, w, W), of the alignment head.
        teacher: (T, h', w', W), the teacher's features of the same frames, valid cells only.
        loss: "cosine" or "mse".

    Returns:
        (T,) float32.

    Raises:
        ValueError: an unknown loss, or as `match_grids`.
    """
    if loss not in TOKEN_LOSSES:
        raise ValueError(f"distillation_loss: loss must be one of {', '.join(TOKEN_LOSSES)}, got {loss!r}")
    return TOKEN_LOSSES[loss](*match_grids(prediction, teacher)).flatten(1).mean(1)


def load_alignment_head(head: AlignmentHead, file: str | Path) -> list[str]:
    """Read the weights of an alignment head.

    Args:
        head: takes the weights.
        file: `alignment_head.safetensors` of a checkpoint, of an earlier stage, or of the conversion.

    Returns:
        Names that the file lacks, which stay as they are: EVE's head has another number of layers.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: it holds weights of another shape, or unknown ones; they are named.
    """
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{file}: no alignment head can be read from it: {error}") from error
    own = head.state_dict()
    unknown = sorted(set(found) - set(own))
    if unknown:
        raise ValueError(
            f"{file} holds {unknown[0]} ({len(unknown)} such weights), which an alignment head of "
            f"{len(head.norms)} layers has not: it belongs to a language model of another depth"
        )
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}: it was trained with "
                "another language model or another teacher"
            )
    head.load_state_dict(found, strict=False)
    missing = sorted(set(own) - set(found))
    if missing:
        logger.warning("%s lacks %d weights of the alignment head, which start fresh: %s", file, len(missing), missing)
    return missing


def save_alignment_head(state_dict: dict[str, torch.Tensor], folder: str | Path) -> Path:
    """Write `alignment_head.safetensors` into a folder; `state_dict` as of an `AlignmentHead`. Returns its path."""
    path = Path(folder, ALIGNMENT_HEAD_FILE)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}, path, {"format": "pt"})
    return path
