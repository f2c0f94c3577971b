"""STAB's local part: frames to patches, and LSTE, which mixes each patch with its neighbours in time and space.

Shape suffixes: M chunks, K frames of a chunk, C colour channels, S px a side of the canvas, P patches a side, N positions,
D width of STAB, R inner width of LSTE.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .attention_video_panda import can_be_folded, is_bare
from .configuration_video_panda import VideoPandaVisionConfig


class VideoPandaPatchEmbedding(nn.Module):
    """The patch convolution, without bias, as one product over flattened patches. Release: `patch_embedding`.

    A module of its own, like every layer here: offloading (`device_map`) brings a module's weights when it is called.
    """

    def __init__(self, config: VideoPandaVisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.weight = nn.Parameter(
            torch.empty(config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(M, K, C, S, S), normalised, or uint8 as they come from a file -> (M, K, P, P, D), of the weight's dtype."""
        patch, side = self.patch_size, pixel_values.shape[-1] // self.patch_size
        chunks, frames, channels = pixel_values.shape[:3]
        tiles = pixel_values.reshape(chunks, frames, channels, side, patch, side, patch).permute(0, 1, 3, 5, 2, 4, 6)
        tiles = tiles.flatten(4).to(self.weight.dtype)
        if pixel_values.dtype != torch.uint8:
            return F.linear(tiles, self.weight.flatten(1))
        return F.linear(tiles, *self._normalizing_weights())

    def _normalizing_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (D, C*14*14) and bias (D) for pixels of 0 to 255: W (x/255 - mean)/std is (W/255/std) x - W mean/std."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        mean_C11, std_C11 = (
            torch.tensor(values, dtype=exact, device=self.weight.device).view(-1, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        scaled = self.weight.to(exact) / std_C11
        bias_D = -(scaled * mean_C11).flatten(1).sum(1)
        return (scaled / 255).flatten(1).to(self.weight.dtype), bias_D.to(self.weight.dtype)


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
        if self.training:
            exact = self.running_var.dtype  # torch refuses to mix the dtypes of weights and statistics
            weight_D, bias_D = self.weight.to(exact), self.bias.to(exact)
            self.num_batches_tracked.add_(1)
            statistics = self.running_mean, self.running_var
            normed_ND = F.batch_norm(
                states_ND.to(exact), *statistics, weight_D, bias_D, training=True, momentum=self.momentum, eps=self.eps
            )
            return normed_ND.to(states_ND.dtype)
        scale_D, shift_D = self.scale_and_shift()
        return torch.addcmul(shift_D.to(states_ND.dtype), states_ND, scale_D.to(states_ND.dtype))

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What normalising by the running statistics multiplies by and adds, (D) each, in the statistics' dtype."""
        scale_D = self.weight.to(self.running_var.dtype) * torch.rsqrt(self.running_var + self.eps)
        return scale_D, self.bias.to(self.running_mean.dtype) - self.running_mean * scale_D


class VideoPandaZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero, as the release's last layers of LSTE and GSTRA do.

    A class of its own because transformers initialises only modules that hold parameters themselves: asking for the LSTE
    around it would never come to pass.
    """


class VideoPandaTemporalConvolution(nn.Module):
    """LSTE's depthwise convolution over time only, zero padded, with no change of layout."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, 3))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, states_MKNR: torch.Tensor) -> torch.Tensor:
        """(M, K, N, R) -> (M, K, N, R)."""
        if states_MKNR.device.type == "cpu" and torch.is_grad_enabled() and states_MKNR.requires_grad:
            return self._as_products(states_MKNR)
        states_MRKN = states_MKNR.permute(0, 3, 1, 2)  # channels last in memory
        kernel = self.weight.unsqueeze(-1)
        mixed_MRKN = F.conv2d(states_MRKN, kernel, self.bias, padding=(1, 0), groups=len(kernel))
        return mixed_MRKN.permute(0, 2, 3, 1)

    def _as_products(self, states_MKNR: torch.Tensor) -> torch.Tensor:
        """The same as three shifted products: on a CPU forward and backward take less time."""
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
    """LSTE, Local Spatio-Temporal Encoding: Y = E + A(E), then Y + DPE(Y). Release: `lmhra1` and `dpe`.

    In the folded form the normalisation by running statistics is part of the layer after it.
    """

    is_folded = True

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
        # Without names for what comes between, whose memory is then free for the next; and added in place: a sum that nothing
        # looks at before needs no memory of its own.
        mixed_MKNR = self.temporal(self._reduce(patches_MKPPD.reshape(-1, width)).view(chunks, frames, side * side, -1))
        encoded_MKPPD = self.expand(mixed_MKNR).view_as(patches_MKPPD).add_(patches_MKPPD)
        del mixed_MKNR
        return self.position_encoding(encoded_MKPPD).add_(encoded_MKPPD)

    def _reduce(self, patches_ND: torch.Tensor) -> torch.Tensor:
        """The normalisation and the linear layer from D to R."""
        if not self.is_folded or self.norm.training or not (can_be_folded(self.reduce) and is_bare(self.norm)):
            return self.reduce(self.norm(patches_ND))
        scale_D, shift_D = self.norm.scale_and_shift()
        weight_RD, bias_R = self.reduce.weight, self.reduce.bias
        folded_bias_R = torch.addmv(bias_R.to(shift_D.dtype), weight_RD.to(shift_D.dtype), shift_D)
        return F.linear(patches_ND, (weight_RD * scale_D).to(patches_ND.dtype), folded_bias_R.to(patches_ND.dtype))
