"""Attention of STAB's few queries over many positions, in the plain form and in the folded one.

The plain form makes a key and a value of every position: two products with (D, D) matrices for each. But a query asks about
all keys of its context alone, and only the weighted sum of the values is used. So W_k can be multiplied into the query,
q . (W_k x) = (W_k^T q) . x, and W_v can wait until the positions are pooled, sum p (W_v x) = W_v (sum p x). The folded form
does so: two products for each *query*, and the same result up to rounding. A bias of the keys adds the same number to all
scores of a query, and the softmax takes it out; a bias of the values is added at the end, as the weights sum to one.

Shape suffixes: M contexts, N positions, Q queries of a context, X queries: one of each context, or 1 for all; D width,
h heads, d width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

# Up to so many keys a CPU multiplies and adds faster than its attention kernel starts.
NUM_FEW_KEYS = 8

# On a CPU: bytes of the queries in the positions' width, (M, h, D), that are made at a time. All of a chunk's windows are the
# largest tensor of STAB: it leaves the caches, and glibc fetches blocks of 32 MiB and more from the system each time.
CPU_ASKED_BYTES = 2**24

# On a CPU, in inference: rows that a product gets at least, up to a width of STAB. One of fewer rows may add up in another order
# than one of more; the last bits of a chunk's context would depend on how many chunks there are, and so on what else is in the
# batch. Wider models see one chunk of large canvases at a time anyway; to them these rows would cost a thirtieth of the time.
NUM_ENOUGH_ROWS = 16
MAX_EVENED_WIDTH = 512


def attend(query_MQD, key_MND, value_MND, num_heads: int, scale: float) -> torch.Tensor:
    """The plain form: multi-head attention of (M, Q, D) over keys and values (M, N, D)."""
    if query_MQD.shape[1] == 1 and key_MND.shape[1] <= NUM_FEW_KEYS and query_MQD.device.type == "cpu":
        return _attend_to_few(query_MQD, key_MND, value_MND, num_heads, scale)
    split = (states.unflatten(-1, (num_heads, -1)).transpose(1, 2) for states in (query_MQD, key_MND, value_MND))
    return F.scaled_dot_product_attention(*split, scale=scale).transpose(1, 2).flatten(2)


def _attend_to_few(query_M1D, key_MND, value_MND, num_heads: int, scale: float) -> torch.Tensor:
    """The same for one query, as of LSD's many small windows: forward and backward take a quarter of the time."""
    # As the kernel does it: half precision is computed in float32.
    exact = torch.promote_types(value_MND.dtype, torch.float32)
    query_M1hd, key_MNhd, value_MNhd = (
        states.to(exact).unflatten(-1, (num_heads, -1)) for states in (query_M1D, key_MND, value_MND)
    )
    weights_MNh = (query_M1hd * key_MNhd).sum(-1).mul(scale).softmax(dim=1)
    return (weights_MNh.unsqueeze(-1) * value_MNhd).sum(1, keepdim=True).flatten(2).to(value_MND.dtype)


def attend_folded(query, context_MND, k_proj: nn.Linear, v_proj: nn.Linear, num_heads: int, scale: float):
    """The folded form: one query a context, without keys and values of the positions.

    Args:
        query: (D), the same for all contexts, or (M, D), a query of each.
        context_MND: (M, N, D), what keys and values would be made of.
        k_proj, v_proj: the layers that would make them; see `can_be_folded`.

    Returns:
        (M, D), as `attend(query, k_proj(context), v_proj(context), ...)`.
    """
    width = context_MND.shape[-1]
    num_turns = _num_turns(query, context_MND, num_heads)
    if num_turns > 1:
        size = -(-len(context_MND) // num_turns)
        pairs = zip(query.split(size), context_MND.split(size))
        return torch.cat([attend_folded(*pair, k_proj, v_proj, num_heads, scale) for pair in pairs])
    key_hdD = k_proj.weight.unflatten(0, (num_heads, -1))
    query_Xhd = (query * scale).reshape(-1, *key_hdD.shape[:2])
    memory = None
    if query.ndim == 1:
        asked_hD = torch.bmm(query_Xhd.transpose(0, 1), key_hdD).squeeze(1)
        scores_MNh = in_enough_rows(lambda rows: F.linear(rows, asked_hD), context_MND.flatten(0, 1), width)
        scores_MhN = scores_MNh.view(*context_MND.shape[:2], -1).transpose(1, 2)
    else:
        asked_MhD = in_enough_rows(lambda rows: _bmm_across(rows.transpose(0, 1), key_hdD), query_Xhd, width)
        scores_MhN = torch.bmm(asked_MhD, context_MND.transpose(1, 2))
        can_be_reused = asked_MhD.is_contiguous() and asked_MhD.dtype == context_MND.dtype
        memory = asked_MhD if can_be_reused else None
    if k_proj.bias is not None and torch.is_grad_enabled():
        # Without effect; but engines that reduce gradients wait for one of every parameter.
        bias_hd1 = k_proj.bias.unflatten(0, (num_heads, -1)).unsqueeze(-1)
        scores_MhN = scores_MhN + torch.bmm(query_Xhd.transpose(0, 1), bias_hd1).transpose(0, 1)
    # As the kernel of the plain form does it: the softmax of half precision is computed in float32.
    exact = torch.promote_types(scores_MhN.dtype, torch.float32)
    weights_MhN = scores_MhN.softmax(-1, dtype=exact).to(context_MND.dtype)
    pooled_MhD = _pool(weights_MhN, context_MND, memory).transpose(0, 1)
    value_hDd = v_proj.weight.unflatten(0, (num_heads, -1)).transpose(1, 2)
    values_Mhd = in_enough_rows(
        lambda rows: torch.bmm(rows.transpose(0, 1), value_hDd).transpose(0, 1), pooled_MhD, width
    )
    values_MD = values_Mhd.flatten(1)
    return values_MD if v_proj.bias is None else values_MD + v_proj.bias


def in_enough_rows(function: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, width: int) -> torch.Tensor:
    """Call a function of rows, each on its own, (rows, ...) -> (rows, ...), with `NUM_ENOUGH_ROWS` where it matters.

    Args:
        width: of STAB.
    """
    num_rows = len(states)
    is_free = states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if is_free or width > MAX_EVENED_WIDTH or num_rows >= NUM_ENOUGH_ROWS:
        return function(states)
    more = states.new_zeros(NUM_ENOUGH_ROWS - num_rows, *states.shape[1:])
    return function(torch.cat([states, more]))[:num_rows]


def _num_turns(query, context_MND, num_heads: int) -> int:
    """In how many turns the contexts are attended to, where each has a query of its own; see `CPU_ASKED_BYTES`."""
    if query.ndim == 1 or query.device.type != "cpu" or not _can_write(query, context_MND):
        return 1
    return -(-query.nbytes * num_heads // CPU_ASKED_BYTES)


def _pool(weights_MhN, context_MND, memory: torch.Tensor | None) -> torch.Tensor:
    """The weighted sums of a context's positions, (h, M, D); in `memory`, of (M, h, D), if there is some to use again."""
    if context_MND.dtype == torch.float32 and memory is not None and _can_write(weights_MhN, context_MND):
        # A CPU's float32 kernel would write elsewhere matrix by matrix, and reads strided matrices well.
        return torch.bmm(weights_MhN, context_MND, out=memory).transpose(0, 1)
    return _bmm_across(weights_MhN, context_MND, memory)


def _bmm_across(batch1, batch2, memory: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.bmm` with the first two dimensions of its result swapped, and laid out so.

    Written there directly where that can be: as a batch of strided matrices the result is read slowly. `memory` is a result
    of an equal size that is not needed any more: these are the largest tensors of STAB, and new pages cost time.
    """
    if not _can_write(batch1, batch2):
        return torch.bmm(batch1, batch2).transpose(0, 1)
    shape = batch1.shape[1], batch1.shape[0], batch2.shape[2]
    result = batch2.new_empty(shape) if memory is None else memory.view(shape)
    torch.bmm(batch1, batch2, out=result.transpose(0, 1))
    return result


def _can_write(batch1, batch2) -> bool:
    """Whether a product may be written into a given place: not for a gradient, by the compiler, or across dtypes."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or batch1.dtype != batch2.dtype)


def can_be_folded(*layers: nn.Module) -> bool:
    """Whether these are linear layers, and what they seem to be, so that their weights may be used without calling them.

    Not so where an adapter or a quantized layer stands in their place; see also `is_bare`.
    """
    return all(type(layer) is nn.Linear and is_bare(layer) for layer in layers)


def is_bare(module: nn.Module) -> bool:
    """Whether a module's weight is plain numbers, and nothing waits for the module's call.

    Something does where the call brings the weight from elsewhere (offloading, ZeRO-3) or its output is looked at.
    """
    return (
        type(module.weight) in (nn.Parameter, torch.Tensor)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__  # accelerate puts its own there
    )
