"""STAB's queries and what they gather: GSTRA over a chunk, LSD over a window, FSRA over a frame, and their fusion.

Each takes the folded form of `attention_video_panda.py` where its layers allow it; `is_folded = False`, set by
`VideoPandaSTAB.use_plain_form`, gives the plain one, the reference that tests hold the other to.

Shape suffixes: M chunks or contexts, K frames of a chunk, N positions, Q queries, X frames, D width of STAB, h x w token
grid of a frame.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_video_panda import attend, attend_folded, can_be_folded, in_enough_rows
from .configuration_video_panda import VideoPandaVisionConfig
from .local_encoding_video_panda import VideoPandaZeroLinear


class VideoPandaGSTRA(GradientCheckpointingLayer):
    """GSTRA, Global Spatio-Temporal Relationship Aggregator: one learned query over a whole chunk.

    u = g + MHA(LN(g), LN(Z)); V = u + MLP(LN(u)). Release: `temporal_cls_token` and `dec`.
    """

    is_folded = True

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (width // self.num_heads) ** -0.5
        self.query = nn.Parameter(torch.zeros(width))
        self.norm_query = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm_context = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = VideoPandaZeroLinear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.gstra_mlp_ratio * width)
        self.fc2 = VideoPandaZeroLinear(config.gstra_mlp_ratio * width, width)
        self.dropout = nn.Dropout(config.gstra_dropout)

    def forward(self, context_MND: torch.Tensor) -> torch.Tensor:
        """(M, N, D), all positions of a chunk, background included -> (M, D)."""
        context_MND = self.norm_context(context_MND)
        query_D = self.q_proj(self.norm_query(self.query))
        layers = self.k_proj, self.v_proj
        if self.is_folded and can_be_folded(*layers):
            attended_MD = attend_folded(query_D, context_MND, *layers, self.num_heads, self.scale)
        else:
            query_M1D = query_D.expand(len(context_MND), 1, -1)
            key_MND, value_MND = (layer(context_MND) for layer in layers)
            attended_MD = attend(query_M1D, key_MND, value_MND, self.num_heads, self.scale).squeeze(1)
        return in_enough_rows(self._update, attended_MD, context_MND.shape[-1])

    def _update(self, attended_MD: torch.Tensor) -> torch.Tensor:
        state_MD = self.query + self.out_proj(attended_MD)
        hidden_MD = self.fc1(self.norm_mlp(state_MD))
        hidden_MD = self.dropout(hidden_MD * torch.sigmoid(1.702 * hidden_MD))  # QuickGELU
        return state_MD + self.fc2(hidden_MD)


class VideoPandaPooling(GradientCheckpointingLayer):
    """Residual cross-attention of LSD and FSRA: q + W_o softmax(q k) v + b_o. Release: `{local,global}_attention`."""

    is_folded = True

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = width**-0.5  # PARITY: the release scales by the full width, not by a head's
        self.norm_query = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm_context = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, context_MND: torch.Tensor) -> torch.Tensor:
        """Queries (M, Q, D), or one for all contexts (D), over (M, N, D) positions -> (M, Q, D); Q is 1 for (D)."""
        context_MND = self.norm_context(context_MND)
        if query.ndim == 1:
            q = self.q_proj(self.norm_query(query))
        else:
            q = in_enough_rows(self.q_proj, self.norm_query(query).flatten(0, 1), query.shape[-1])
        layers, has_one = (self.k_proj, self.v_proj), query.ndim == 1 or query.shape[1] == 1
        if self.is_folded and has_one and can_be_folded(*layers):
            attended_MD = attend_folded(q, context_MND, *layers, self.num_heads, self.scale)
            return query + in_enough_rows(self.out_proj, attended_MD, query.shape[-1]).unsqueeze(1)
        q_MQD = q.expand(len(context_MND), 1, -1) if query.ndim == 1 else q.view_as(query)
        key_MND, value_MND = (layer(context_MND) for layer in layers)
        return query + self.out_proj(attend(q_MQD, key_MND, value_MND, self.num_heads, self.scale))


class VideoPandaPerceiverResampler(nn.Module):
    """The Perceiver Resampler of Table 9 in LSD's place: learned latents, one a cell of the token grid, over a frame."""

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        width, side = config.hidden_size, config.num_tokens_per_side
        self.latents = nn.Parameter(torch.empty(side, side, width))
        self.attentions = nn.ModuleList(VideoPandaPooling(config) for _ in range(config.num_perceiver_layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, eps=config.layer_norm_eps),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(config.num_perceiver_layers)
        )

    def forward(self, patches_MKND: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(M, K, patches of the frame, D) -> (M, K, h, w, D)."""
        chunks, frames = patches_MKND.shape[:2]
        states_XQD = crop_to_grid(self.latents, grid, 1).flatten(0, 1).repeat(chunks * frames, 1, 1)
        for attention, mlp in zip(self.attentions, self.mlps):
            states_XQD = attention(states_XQD, patches_MKND.flatten(0, 1))
            states_XQD = states_XQD + mlp(states_XQD)
        return states_XQD.view(chunks, frames, *grid, -1)


class VideoPandaFSRA(nn.Module):
    """FSRA, Frame-wise Spatial Relationship Aggregator: a learned class embedding over the tokens of one frame."""

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.attention = VideoPandaPooling(config)

    def forward(self, tokens_MKND: torch.Tensor) -> torch.Tensor:
        """(M, K, h*w, D) -> (M, K, D)."""
        context_X1D = self.attention(self.class_embedding, tokens_MKND.flatten(0, 1))
        return context_X1D.view(*tokens_MKND.shape[:2], -1)


class VideoPandaFusion(nn.Module):
    """Context of a frame from V (its chunk's) and S (its own): Linear(Dropout(LN((1-a) V + a S))), a = sigmoid(balance).

    Release: `balance`, `proj.0`, `proj.2`. Without FSRA there is no S and nothing to balance.
    """

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        self.balance = nn.Parameter(torch.zeros(config.hidden_size)) if config.use_fsra else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, chunk_context_MKD: torch.Tensor, frame_context_MKD: torch.Tensor | None) -> torch.Tensor:
        """V and S, both (M, K, D) -> (M, K, D)."""
        if self.balance is not None:
            chunk_context_MKD = torch.lerp(chunk_context_MKD, frame_context_MKD, torch.sigmoid(self.balance))
        normed_MKD = self.dropout(self.norm(chunk_context_MKD))
        return in_enough_rows(self.linear, normed_MKD.flatten(0, 1), normed_MKD.shape[-1]).view_as(normed_MKD)


def crop_to_grid(canvas: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """Cut the frame's own cells out of a canvas (..., G*window, G*window, D) -> (..., h*window, w*window, D).

    The frame stands at token offset floor((G-h)/2), floor((G-w)/2), where the processor pasted it.
    """
    side = canvas.shape[-2] // window
    top, left = ((side - extent) // 2 * window for extent in grid)
    return canvas[..., top : top + grid[0] * window, left : left + grid[1] * window, :]
