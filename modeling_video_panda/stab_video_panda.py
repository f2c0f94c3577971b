"""STAB, the Spatio-Temporal Alignment Block: frames in, tokens with visible rows out (paper section 3).

Shape suffixes: M chunks, K frames of a chunk, S px a side of the canvas, P patches a side of the canvas, D width of
STAB, C colour channels, h x w token grid of a frame, N positions, Q queries, n tokens of a frame, R inner width of LSTE.
Everything is token-major (channels last). The canvas steps (patches, LSTE, GSTRA) see the background too; the token
steps (downsampling, FSRA, rows) see a frame's own h x w grid only.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_video_panda import VideoPandaVisionConfig


class VideoPandaPatchEmbedding(nn.Module):
    """The patch convolution, without bias, as one product over flattened patches. Release: `patch_embedding`.

    A module of its own, like every layer here: offloading (`device_map`) brings a module's weights when it is called.
    """

    def __init__(self, num_channels: int, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, num_channels, patch_size, patch_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(M, K, C, S, S) -> (M, K, P, P, D)."""
        patch, side = self.patch_size, pixel_values.shape[-1] // self.patch_size
        chunks, frames, channels = pixel_values.shape[:3]
        tiles = pixel_values.reshape(chunks, frames, channels, side, patch, side, patch).permute(0, 1, 3, 5, 2, 4, 6)
        return F.linear(tiles.flatten(4), self.weight.flatten(1))


class VideoPandaStatisticsNorm(nn.BatchNorm1d):
    """Batch normalisation over all positions of all chunks; its running statistics stay float32 in a half-precision model.

    The release's `lmhra1.pos_embed.0`, a BatchNorm3d: over (M, D, K, P, P) that is the same as over (M*K*P*P, D).
    """

    def __init__(self, num_features: int, eps: float):
        super().__init__(num_features, eps=eps)
        # Explicit, because a model can be built under another default dtype.
        self.register_buffer("running_mean", torch.zeros(num_features, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(num_features, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # nn.Module's own hook behind .to(), .half(), .bfloat16(): a half-precision running mean cannot accumulate.
        exact = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, statistic in exact.items():
            moved = getattr(self, name)
            if moved.dtype not in (statistic.dtype, torch.float64):
                setattr(self, name, moved if moved.is_meta else statistic.to(moved.device))
        return self

    def forward(self, states_ND: torch.Tensor) -> torch.Tensor:
        exact = self.running_var.dtype  # torch refuses to mix the dtypes of weights and statistics
        weight_D, bias_D = self.weight.to(exact), self.bias.to(exact)
        if self.training:
            self.num_batches_tracked.add_(1)
            statistics = self.running_mean, self.running_var
            normed_ND = F.batch_norm(
                states_ND.to(exact), *statistics, weight_D, bias_D, training=True, momentum=self.momentum, eps=self.eps
            )
            return normed_ND.to(states_ND.dtype)
        scale_D = weight_D * torch.rsqrt(self.running_var + self.eps)
        shift_D = bias_D - self.running_mean * scale_D
        return torch.addcmul(shift_D.to(states_ND.dtype), states_ND, scale_D.to(states_ND.dtype))


class VideoPandaZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero, as the release's last layers of LSTE and GSTRA do.

    A class of its own because transformers initialises only modules that hold parameters themselves: asking for the LSTE
    around it would never come to pass.
    """


class VideoPandaTemporalConvolution(nn.Module):
    """LSTE's depthwise convolution over time only, zero padded: three shifted products, with no change of layout."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, 3))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, states_MKNR: torch.Tensor) -> torch.Tensor:
        """(M, K, N, R) -> (M, K, N, R)."""
        num_frames = states_MKNR.shape[1]
        padded = F.pad(states_MKNR, (0, 0, 0, 0, 1, 1))
        taps_3R = self.weight[:, 0].t()
        mixed = self.bias + padded[:, :num_frames] * taps_3R[0]
        return mixed + padded[:, 1 : num_frames + 1] * taps_3R[1] + padded[:, 2 : num_frames + 2] * taps_3R[2]


class VideoPandaPositionEncoding(nn.Conv3d):
    """LSTE's depthwise 3 x 3 x 3 convolution. Release: `dpe`."""

    def __init__(self, width: int):
        super().__init__(width, width, kernel_size=3, padding=1, groups=width)

    def forward(self, states_MKPPD: torch.Tensor) -> torch.Tensor:
        """(M, K, P, P, D) -> (M, K, P, P, D)."""
        if states_MKPPD.device.type == "cpu" and torch.is_grad_enabled() and states_MKPPD.requires_grad:
            return self._frame_by_frame(states_MKPPD)
        return super().forward(states_MKPPD.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)

    def _frame_by_frame(self, states_MKPPD: torch.Tensor) -> torch.Tensor:
        """The same as one 2-D convolution for each tap in time: on a CPU forward and backward take a quarter of the time."""
        frames = states_MKPPD.shape[1]
        padded_MKPPD = F.pad(states_MKPPD, (0, 0, 0, 0, 0, 0, 1, 1))
        mixed_XPPD = self.bias
        for tap in range(3):
            shifted_XDPP = padded_MKPPD[:, tap : tap + frames].flatten(0, 1).permute(0, 3, 1, 2)
            convolved_XDPP = F.conv2d(shifted_XDPP, self.weight[:, :, tap], padding=1, groups=self.groups)
            mixed_XPPD = mixed_XPPD + convolved_XDPP.permute(0, 2, 3, 1)
        return mixed_XPPD.unflatten(0, (-1, frames))


class VideoPandaLSTE(nn.Module):
    """LSTE, Local Spatio-Temporal Encoding: Y = E + A(E), then Y + DPE(Y). Release: `lmhra1` and `dpe`."""

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size / config.lste_reduction)
        self.norm = VideoPandaStatisticsNorm(width, eps=config.batch_norm_eps)
        self.reduce = nn.Linear(width, inner)
        self.temporal = VideoPandaTemporalConvolution(inner)
        self.expand = VideoPandaZeroLinear(inner, width)
        self.position_encoding = VideoPandaPositionEncoding(width)

    def forward(self, patches_MKPPD: torch.Tensor) -> torch.Tensor:
        """(M, K, P, P, D) -> (M, K, P, P, D)."""
        chunks, frames, side, _, width = patches_MKPPD.shape
        reduced_MKNR = self.reduce(self.norm(patches_MKPPD.reshape(-1, width))).view(chunks, frames, side * side, -1)
        encoded_MKPPD = patches_MKPPD + self.expand(self.temporal(reduced_MKNR)).view_as(patches_MKPPD)
        return encoded_MKPPD + self.position_encoding(encoded_MKPPD)


class VideoPandaGSTRA(GradientCheckpointingLayer):
    """GSTRA, Global Spatio-Temporal Relationship Aggregator: one learned query over a whole chunk.

    u = g + MHA(LN(g), LN(Z)); V = u + MLP(LN(u)). Release: `temporal_cls_token` and `dec`.
    """

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
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
        query_M1D = self.q_proj(self.norm_query(self.query)).expand(context_MND.shape[0], 1, -1)
        attended_M1D = _attend(query_M1D, self.k_proj(context_MND), self.v_proj(context_MND), self.num_heads)
        state_MD = self.query + self.out_proj(attended_M1D.squeeze(1))
        hidden_MD = self.fc1(self.norm_mlp(state_MD))
        hidden_MD = self.dropout(hidden_MD * torch.sigmoid(1.702 * hidden_MD))  # QuickGELU
        return state_MD + self.fc2(hidden_MD)


NUM_FEW_KEYS = 8  # up to so many a CPU multiplies and adds faster than its attention kernel starts


def _attend(query_MQD, key_MND, value_MND, num_heads: int, scale: float | None = None) -> torch.Tensor:
    """Multi-head attention of (M, Q, D) over (M, N, D); `scale` defaults to that of a head's width."""
    if query_MQD.shape[1] == 1 and key_MND.shape[1] <= NUM_FEW_KEYS and query_MQD.device.type == "cpu":
        return _attend_to_few(query_MQD, key_MND, value_MND, num_heads, scale)
    split = (states.unflatten(-1, (num_heads, -1)).transpose(1, 2) for states in (query_MQD, key_MND, value_MND))
    return F.scaled_dot_product_attention(*split, scale=scale).transpose(1, 2).flatten(2)


def _attend_to_few(query_M1D, key_MND, value_MND, num_heads: int, scale: float | None) -> torch.Tensor:
    """The same for one query, as of LSD's many small windows: forward and backward take a quarter of the time."""
    # As the kernel does it: half precision is computed in float32.
    exact = torch.promote_types(value_MND.dtype, torch.float32)
    query_M1hd, key_MNhd, value_MNhd = (
        states.to(exact).unflatten(-1, (num_heads, -1)) for states in (query_M1D, key_MND, value_MND)
    )
    scale = query_M1hd.shape[-1] ** -0.5 if scale is None else scale
    weights_MNh = (query_M1hd * key_MNhd).sum(-1).mul(scale).softmax(dim=1)
    return (weights_MNh.unsqueeze(-1) * value_MNhd).sum(1, keepdim=True).flatten(2).to(value_MND.dtype)


class VideoPandaPooling(GradientCheckpointingLayer):
    """Residual cross-attention of LSD and FSRA: q + W_o softmax(q k) v + b_o. Release: `{local,global}_attention`."""

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

    def forward(self, query_MQD: torch.Tensor, context_MND: torch.Tensor) -> torch.Tensor:
        """(M, Q, D) queries over (M, N, D) positions -> (M, Q, D)."""
        context_MND = self.norm_context(context_MND)
        q_MQD, k_MND = self.q_proj(self.norm_query(query_MQD)), self.k_proj(context_MND)
        attended_MQD = _attend(q_MQD, k_MND, self.v_proj(context_MND), self.num_heads, self.scale)
        return query_MQD + self.out_proj(attended_MQD)


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
        states_XQD = crop_to_grid(self.latents, grid, 1).flatten(0, 1).expand(chunks * frames, -1, -1)
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
        tokens_XND = tokens_MKND.flatten(0, 1)
        context_X1D = self.attention(self.class_embedding.expand(tokens_XND.shape[0], 1, -1), tokens_XND)
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
        return self.linear(self.dropout(self.norm(chunk_context_MKD)))


def crop_to_grid(canvas: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """Cut the frame's own cells out of a canvas (..., G*window, G*window, D) -> (..., h*window, w*window, D).

    The frame stands at token offset floor((G-h)/2), floor((G-w)/2), where the processor pasted it.
    """
    side = canvas.shape[-2] // window
    top, left = ((side - extent) // 2 * window for extent in grid)
    return canvas[..., top : top + grid[0] * window, left : left + grid[1] * window, :]


class VideoPandaSTAB(PreTrainedModel):
    """Spatio-Temporal Alignment Block: chunks of frames of one grid to token sequences. Release: `video_tower`.

    Which parts exist is decided by the ablation fields of `VideoPandaVisionConfig`. It is a `PreTrainedModel` so that
    transformers finds `vision_config`'s model; the attention implementation asked for concerns the language model only.
    """

    config: VideoPandaVisionConfig
    config_class = VideoPandaVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__(config)
        width = config.hidden_size
        self.patch_embedding = VideoPandaPatchEmbedding(config.num_channels, width, config.patch_size)
        self.lste = VideoPandaLSTE(config) if config.use_lste else None
        self.gstra = VideoPandaGSTRA(config) if config.use_gstra else None
        self.lsd = VideoPandaPooling(config) if config.downsampling == "lsd" else None
        perceiver = config.downsampling == "perceiver_resampler"
        self.perceiver_resampler = VideoPandaPerceiverResampler(config) if perceiver else None
        self.fsra = VideoPandaFSRA(config) if config.use_fsra else None
        self.fusion = VideoPandaFusion(config) if config.use_gstra else None
        self.row_embedding = nn.Parameter(torch.empty(width)) if config.use_row_token else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VideoPandaZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, VideoPandaPatchEmbedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, VideoPandaTemporalConvolution):
            init.normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, VideoPandaGSTRA):
            init.zeros_(module.query)
        elif isinstance(module, VideoPandaFSRA):
            init.normal_(module.class_embedding, std=std)
        elif isinstance(module, VideoPandaPerceiverResampler):
            init.normal_(module.latents, std=std)
        elif isinstance(module, VideoPandaFusion) and module.balance is not None:
            init.zeros_(module.balance)
        elif isinstance(module, VideoPandaSTAB) and module.row_embedding is not None:
            init.normal_(module.row_embedding, std=std)

    def forward(self, pixel_values: torch.Tensor, grid, still: bool = False) -> torch.Tensor | list[torch.Tensor]:
        """Encode chunks of frames.

        Args:
            pixel_values: (M, K, C, S, S) normalised canvases, M chunks of K <= num_chunk_frames frames each.
            grid: (h, w) tokens of a frame; or a list with one (h, w) a chunk. LSTE and GSTRA see whole canvases and take
                all chunks together, whatever their grids: in training they share one batch of statistics.
            still: K = 1 canvases of still images: LSTE, GSTRA and the fusion are skipped.

        Returns:
            (M, K, h*(w+1)+1, D), or a list with one (K, h*(w+1)+1, D) a chunk: for each frame its context, then row by
            row the tokens and `<row>`.
        """
        dense_MKPPD, chunk_context_MD = self._encode_canvases(pixel_values, still)
        if not isinstance(grid, list):
            return self._encode_frames(dense_MKPPD, chunk_context_MD, grid)
        chunks_of_grid: dict[tuple[int, int], list[int]] = {}
        for chunk, own_grid in enumerate(grid):
            chunks_of_grid.setdefault(own_grid, []).append(chunk)
        if len(chunks_of_grid) == 1:
            return list(self._encode_frames(dense_MKPPD, chunk_context_MD, grid[0]))
        encoded: list[torch.Tensor] = [None] * len(grid)
        for own_grid, chunks in chunks_of_grid.items():
            context_MD = None if chunk_context_MD is None else chunk_context_MD[chunks]
            for chunk, tokens_KnD in zip(chunks, self._encode_frames(dense_MKPPD[chunks], context_MD, own_grid)):
                encoded[chunk] = tokens_KnD
        return encoded

    def _encode_canvases(self, pixel_values: torch.Tensor, still: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What concerns whole canvases: F (M, K, P, P, D), and V (M, D) where there is one."""
        patches_MKPPD = self.patch_embedding(pixel_values)
        if self.config.downsampling_position == "before_lste":
            side = self.config.num_tokens_per_side
            patches_MKPPD = self._downsample(patches_MKPPD, (side, side))
        if still:
            return patches_MKPPD, None
        local_MKPPD = patches_MKPPD if self.lste is None else self.lste(patches_MKPPD)
        chunk_context_MD = None if self.gstra is None else self.gstra(local_MKPPD.flatten(1, 3))
        return patches_MKPPD if self.lste is None else local_MKPPD + patches_MKPPD, chunk_context_MD

    def _encode_frames(self, dense_MKPPD, chunk_context_MD, grid: tuple[int, int]) -> torch.Tensor:
        """What concerns the cells of a frame's own grid: (M, K, n, D)."""
        if self.config.downsampling_position == "before_lste":
            tokens_MKhwD = crop_to_grid(dense_MKPPD, grid, 1)
        else:
            tokens_MKhwD = self._downsample(crop_to_grid(dense_MKPPD, grid, self.config.effective_window), grid)
        context_MKD = self.fsra(tokens_MKhwD.flatten(2, 3)) if self.fsra is not None else None
        if chunk_context_MD is not None:
            chunk_context_MKD = chunk_context_MD.unsqueeze(1).expand(-1, tokens_MKhwD.shape[1], -1)
            context_MKD = self.fusion(chunk_context_MKD, context_MKD)
        return self._sequence(tokens_MKhwD, context_MKD)

    def _downsample(self, patches_MKPPD: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(M, K, h*window, w*window, D) -> (M, K, h, w, D), by whatever `downsampling` says."""
        if self.config.effective_window == 1 and self.lsd is None and self.perceiver_resampler is None:
            return patches_MKPPD  # half resolution: every patch is a token
        if self.perceiver_resampler is not None:
            return self.perceiver_resampler(patches_MKPPD.flatten(2, 3), grid)
        window, (height, width) = self.config.downsample_window, grid
        chunks, frames = patches_MKPPD.shape[:2]
        windows = patches_MKPPD.reshape(chunks, frames, height, window, width, window, -1).transpose(4, 3)
        windows_XND = windows.reshape(chunks * frames * height * width, window * window, -1)
        tokens_X1D = windows_XND.mean(dim=1, keepdim=True)
        if self.lsd is not None:
            tokens_X1D = self.lsd(tokens_X1D, windows_XND)
        return tokens_X1D.view(chunks, frames, height, width, -1)

    def _sequence(self, tokens_MKhwD: torch.Tensor, context_MKD: torch.Tensor) -> torch.Tensor:
        """Context, then row by row the tokens and `<row>`: (M, K, n, D)."""
        if self.row_embedding is not None:
            rows = self.row_embedding.expand(*tokens_MKhwD.shape[:3], 1, -1)
            tokens_MKhwD = torch.cat((tokens_MKhwD, rows), dim=3)
        return torch.cat((context_MKD.unsqueeze(2), tokens_MKhwD.flatten(2, 3)), dim=2)
