"""STAB, the Spatio-Temporal Alignment Block: frames in, tokens with visible rows out (paper section 3).

Shape suffixes: M chunks, K frames of a chunk, S px a side of the canvas, P patches a side of the canvas, D width of
STAB, C colour channels, h x w token grid of a frame, p patches a side of a token's window, X windows, n tokens of a frame.
Everything is token-major (channels last). The canvas steps (patches, LSTE, GSTRA) see the background too; the token
steps (downsampling, FSRA, rows) see a frame's own h x w grid only.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .aggregation_video_panda import (
    VideoPandaFSRA,
    VideoPandaFusion,
    VideoPandaGSTRA,
    VideoPandaPerceiverResampler,
    VideoPandaPooling,
    crop_to_grid,
)
from .configuration_video_panda import VideoPandaVisionConfig
from .local_encoding_video_panda import (
    VideoPandaLSTE,
    VideoPandaPatchEmbedding,
    VideoPandaTemporalConvolution,
    VideoPandaZeroLinear,
)


class VideoPandaFrames(NamedTuple):
    """What STAB makes of the frames of one grid, before it is put into sequences.

    Attributes:
        chunks: which of the chunks given these are.
        tokens_MKhwD: (M, K, h, w, D).
        context_MKD: (M, K, D), one a frame.
        row_D: (D), the learned `<row>`, or None where the configuration has none.
    """

    chunks: list[int]
    tokens_MKhwD: torch.Tensor
    context_MKD: torch.Tensor
    row_D: torch.Tensor | None

    def sequences(self) -> torch.Tensor:
        """(M, K, n, D): of each frame the context, then row by row the tokens and `<row>`."""
        row_end = [] if self.row_D is None else [self.row_D.expand(*self.context_MKD.shape[:2], 1, -1)]
        parts = [self.context_MKD.unsqueeze(2)]
        for tokens_MKwD in self.tokens_MKhwD.unbind(2):
            parts += [tokens_MKwD, *row_end]
        return torch.cat(parts, dim=2)

    def write_sequence(self, place: int, sequence_KnD: torch.Tensor) -> None:
        """The same of one chunk, `chunks[place]`, into memory that is there."""
        sequence_KnD[:, 0] = self.context_MKD[place]
        tokens_KhwD = self.tokens_MKhwD[place]
        height, width = tokens_KhwD.shape[1:3]
        rows_KhnD = sequence_KnD[:, 1:].unflatten(1, (height, -1))
        rows_KhnD[:, :, :width] = tokens_KhwD
        if self.row_D is not None:
            rows_KhnD[:, :, width] = self.row_D


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
        self.patch_embedding = VideoPandaPatchEmbedding(config)
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

    def use_plain_form(self, plain: bool = True) -> "VideoPandaSTAB":
        """Compute keys, values and normalisation as they are written in the paper: slower, and what tests compare with."""
        for module in self.modules():
            if isinstance(module, (VideoPandaLSTE, VideoPandaGSTRA, VideoPandaPooling)):
                module.is_folded = not plain
        return self

    def forward(
        self, pixel_values: torch.Tensor, grid, still: bool = False, return_frames: bool = False
    ) -> torch.Tensor | list[torch.Tensor] | list[VideoPandaFrames]:
        """Encode chunks of frames.

        Args:
            pixel_values: (M, K, C, S, S) canvases, normalised or uint8, M chunks of K <= num_chunk_frames frames each.
            grid: (h, w) tokens of a frame; or a list with one (h, w) a chunk. LSTE and GSTRA see whole canvases and take
                all chunks together, whatever their grids: in training they share one batch of statistics.
            still: K = 1 canvases of still images: LSTE, GSTRA and the fusion are skipped.
            return_frames: give the parts, a `VideoPandaFrames` for each grid there is, in the place of sequences.

        Returns:
            (M, K, h*(w+1)+1, D), or a list with one (K, h*(w+1)+1, D) a chunk: for each frame its context, then row by
            row the tokens and `<row>`.
        """
        chunks_of_grid: dict[tuple[int, int], list[int]] = {}
        for chunk, own_grid in enumerate(grid if isinstance(grid, list) else [grid] * len(pixel_values)):
            chunks_of_grid.setdefault(own_grid, []).append(chunk)
        windows, chunk_context_MD = self._encode_canvases(pixel_values, chunks_of_grid, still)
        frames = [self._encode_windows(windows.pop(0), chunk_context_MD, chunks) for chunks in chunks_of_grid.values()]
        if return_frames:
            return frames
        if not isinstance(grid, list):
            return frames[0].sequences()
        encoded = {}
        for own in frames:
            encoded.update(zip(own.chunks, own.sequences()))
        return [encoded[chunk] for chunk in range(len(pixel_values))]

    def _encode_canvases(self, pixel_values: torch.Tensor, chunks_of_grid, still: bool):
        """What concerns whole canvases.

        Returns:
            F of each grid, (M, K, h, w, p, p, D), and V (M, D), or None where it is not there. E and Z are not kept: what
            follows takes as much memory again.
        """
        patches_MKPPD = self.patch_embedding(pixel_values)
        if self.config.downsampling_position == "before_lste":
            patches_MKPPD = self._downsample(_cut_into_windows(patches_MKPPD, self.config.effective_window))
        local_MKPPD = None if still or self.lste is None else self.lste(patches_MKPPD)
        seen_MKPPD = patches_MKPPD if local_MKPPD is None else local_MKPPD
        chunk_context_MD = None if still or self.gstra is None else self.gstra(seen_MKPPD.flatten(1, 3))
        parts = [part for part in (local_MKPPD, patches_MKPPD) if part is not None]
        return [self._cut_out(parts, chunks, grid) for grid, chunks in chunks_of_grid.items()], chunk_context_MD

    def _cut_out(self, parts_MKPPD: list[torch.Tensor], chunks: list[int], grid: tuple[int, int]) -> torch.Tensor:
        """F = Z + E (the dense connection), or E alone, of the cells of one grid in the chunks that have it."""
        window = 1 if self.config.downsampling_position == "before_lste" else self.config.effective_window
        cells = [crop_to_grid(part_MKPPD, grid, window) for part_MKPPD in parts_MKPPD]
        if len(chunks) < len(cells[0]):
            cells = [cells_MKPPD[chunks] for cells_MKPPD in cells]
        return _add_up([_cut_into_windows(cells_MKPPD, window) for cells_MKPPD in cells])

    def _encode_windows(self, windows_MKhwppD, chunk_context_MD, chunks: list[int]) -> VideoPandaFrames:
        """What concerns the frames' own grid."""
        before = self.config.downsampling_position == "before_lste"
        tokens_MKhwD = windows_MKhwppD.flatten(4) if before else self._downsample(windows_MKhwppD)
        context_MKD = self.fsra(tokens_MKhwD.flatten(2, 3)) if self.fsra is not None else None
        if chunk_context_MD is not None:
            is_all = len(chunks) == len(chunk_context_MD)
            chunk_context_MKD = (chunk_context_MD if is_all else chunk_context_MD[chunks]).unsqueeze(1)
            context_MKD = self.fusion(chunk_context_MKD.expand(-1, tokens_MKhwD.shape[1], -1), context_MKD)
        return VideoPandaFrames(chunks, tokens_MKhwD, context_MKD, self.row_embedding)

    def _downsample(self, windows_MKhwppD: torch.Tensor) -> torch.Tensor:
        """(M, K, h, w, p, p, D) -> (M, K, h, w, D), by whatever `downsampling` says."""
        if self.config.downsampling == "half_resolution":
            return windows_MKhwppD.flatten(4)  # every patch is a token
        grid = windows_MKhwppD.shape[2:4]
        if self.perceiver_resampler is not None:
            return self.perceiver_resampler(windows_MKhwppD.flatten(2, 5), grid)
        windows_XppD = windows_MKhwppD.flatten(0, 3)
        # On channels last, which is several times faster on a CPU than a mean over the positions.
        tokens_X1D = F.avg_pool2d(windows_XppD.permute(0, 3, 1, 2), windows_XppD.shape[1]).flatten(1).unsqueeze(1)
        if self.lsd is not None:
            tokens_X1D = self.lsd(tokens_X1D, windows_XppD.flatten(1, 2))
        return tokens_X1D.view(*windows_MKhwppD.shape[:4], -1)


def _cut_into_windows(canvas_MKPPD: torch.Tensor, window: int) -> torch.Tensor:
    """(M, K, h*p, w*p, D) -> (M, K, h, w, p, p, D), a view."""
    return canvas_MKPPD.unflatten(3, (-1, window)).unflatten(2, (-1, window)).transpose(3, 4)


def _add_up(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum of one or two views of one shape; contiguous, so that rearranging the cells and adding is one pass."""
    if len(parts) == 1:
        return parts[0]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or parts[0].dtype != parts[1].dtype:
        return parts[0] + parts[1]
    return torch.add(*parts, out=parts[0].new_empty(parts[0].shape))
