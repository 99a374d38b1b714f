"""PyTorch formulations of the attention: any device, any floating dtype, never ``Sq x Sk``.

Each query has a list of keys, so that work and memory follow the keys attended:

    list   = text prefix ++ pivots before the window ++ window          the virtual key list
    s      = softmax_scale * q list^T + bias, -inf where the row may not look
    lse    = log sum exp s;  p = softmax(s);  out = p v                 forward
    ds     = p * (dout v^T - (delta - dlse)),  delta = sum(dout * out)   backward, s recomputed
    dq     = softmax_scale * ds k;  dk = softmax_scale * ds^T q;  dv = p^T dout

With ``kv_lens`` the CPU takes each sample alone; other devices must not read them, and mask instead
(masked.py).

On the CPU torch's flash kernels compute the window of all blocks in one call and the far keys (text
and pivots, gathered once) in one call for every 256 queries; lse merges the parts. The blocked path
lists the keys of a tile of queries and takes one softmax. It computes what those kernels cannot:
other devices, and rows with entries or an lse that are too large, or with a gradient of lse. Which
path computes a row depends on nothing that the row does not see.

Backward keeps q, k, v, out and lse between the passes. Rounding points: products and sums are
float32 (float64 for float64 inputs); out, dq, dk and dv are rounded once. Merging, and p taken from
lse, add ``|lse|`` roundings of p, which is bounded (flash.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cogview_kernels.attention import blocked, flash, masked
from cogview_kernels.attention.blocked import Regions, accumulate_dtype


def empty_heads(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor ``(B, H, S, D)``, in memory ``(B, S, H, D)`` where ``like`` has its tokens
    outside its heads, so that the projection before or behind it needs no copy."""
    batch, num_heads, seqlen, head_dim = like.shape
    if like.stride(2) > like.stride(1):
        return like.new_empty(batch, seqlen, num_heads, head_dim, dtype=dtype).transpose(1, 2)
    return like.new_empty(like.shape, dtype=dtype)


def _samples(kv_lens: Tensor, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Each sample with keys: its place in the batch, its rows of q with a position, its keys."""
    for sample, num_keys in enumerate(kv_lens.clamp(0, k.shape[2]).tolist()):
        if num_keys > 0:
            rows = slice(max(q.shape[2] - num_keys, 0), q.shape[2])
            yield slice(sample, sample + 1), rows, slice(num_keys)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_len: Tensor,
    pivot_idx: Tensor,
    query_window: int,
    key_window_times: int,
    text_bias: float,
    pivot_bias: float,
    softmax_scale: float,
    kv_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``out (B, H, Sq, D)`` in q's dtype and ``lse (B, H, Sq)``; see the public function."""
    dtype = accumulate_dtype(q.dtype)
    out = empty_heads(q, dtype)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    if out.numel() == 0:
        return out.to(q.dtype), lse
    regions = Regions(text_len, pivot_idx, query_window, key_window_times, text_bias, pivot_bias)
    if kv_lens is not None:
        if kv_lens.is_cpu:
            out.zero_()
            lse.fill_(float("-inf"))
            rest: Any = (*regions[2:], softmax_scale)
            for b, rows, keys in _samples(kv_lens, q, k):
                qkv = q[b, :, rows], k[b, :, keys], v[b, :, keys]
                of_sample = attention_forward(*qkv, text_len[b], pivot_idx[b], *rest)
                out[b, :, rows], lse[b, :, rows] = of_sample
        else:
            masked.forward_into(out, lse, q, k, v, regions, softmax_scale, kv_lens)
        return out.to(q.dtype), lse
    if flash.takes(q, regions, softmax_scale):
        left = flash.forward_into(out, lse, q, k, v, regions, softmax_scale)
    else:
        left = torch.ones_like(lse, dtype=torch.bool)
    if left.any():
        blocked.forward_into(out, lse, q, k, v, regions, softmax_scale, left)
    return out.to(q.dtype), lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    text_len: Tensor,
    pivot_idx: Tensor,
    query_window: int,
    key_window_times: int,
    text_bias: float,
    pivot_bias: float,
    softmax_scale: float,
    lse: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` with the shapes and dtypes of q, k, v. Deterministic.

    ``lse`` of the forward saves two of seven products; without it they are computed again.
    """
    dtype = accumulate_dtype(q.dtype)
    dq, dk, dv = (empty_heads(tensor, dtype).zero_() for tensor in (q, k, v))
    if out.numel() > 0:
        regions = Regions(
            text_len, pivot_idx, query_window, key_window_times, text_bias, pivot_bias
        )
        if kv_lens is not None:
            inputs = dout, dlse, q, k, v, out
            if kv_lens.is_cpu:
                rest: Any = (*regions[2:], softmax_scale)
                for b, rows, keys in _samples(kv_lens, q, k):
                    at = rows, rows, rows, keys, keys, rows
                    parts = (t[b, :, part] for t, part in zip(inputs, at, strict=True))
                    of_lse = None if lse is None else lse[b, :, rows]
                    read: Any = (*parts, text_len[b], pivot_idx[b], *rest, of_lse)
                    dq[b, :, rows], dk[b, :, keys], dv[b, :, keys] = attention_backward(*read)
            else:
                masked.backward_into(dq, dk, dv, *inputs, regions, softmax_scale, kv_lens)
            return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
        left = dlse != 0
        if not flash.takes(q, regions, softmax_scale):
            left.fill_(True)
        if not left.all():
            of_flash = dout, q, k, v, out, lse
            left |= flash.backward_into(dq, dk, dv, *of_flash, regions, softmax_scale, left)
        if left.any():
            inputs = dout, dlse, q, k, v, out
            blocked.backward_into(dq, dk, dv, *inputs, regions, softmax_scale, left)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# The kernels' operators on the CPU, where programs exported from a GPU may run. What they exchange
# is described in csrc/three_region_attention.


def pack_far_keys(text_len: Tensor, pivot_idx: Tensor, k_len: int) -> Tensor:
    """``(B, 2 + P)`` int32: text length, number of pivots, the pivots that count, ``k_len``."""
    prefix = text_len.clamp(0, k_len).unsqueeze(1)
    in_range = (pivot_idx >= prefix) & (pivot_idx < k_len)
    previous = torch.nn.functional.pad(torch.where(in_range, pivot_idx, -1), (1, 0), value=-1)
    counts = in_range & (pivot_idx > previous.cummax(dim=1).values[:, :-1])
    pivots = torch.where(counts, pivot_idx, k_len).sort(dim=1).values
    return torch.cat([prefix, counts.sum(1, keepdim=True), pivots], dim=1).to(torch.int32)


def attention_forward_packed(
    q: Tensor, k: Tensor, v: Tensor, far_keys: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``row_max`` and ``row_log_sum``; the whole of lse stands in ``row_max``."""
    out, lse = attention_forward(q, k, v, far_keys[:, 0], far_keys[:, 2:], *rest)
    row_max = (lse / math.log(2)).float()
    return out, row_max, torch.zeros_like(row_max)


def attention_backward_packed(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_log_sum: Tensor,
    far_keys: Tensor,
    *window_and_scale: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if dlse is None:
        dlse = torch.zeros_like(row_max)
    regions = far_keys[:, 0], far_keys[:, 2:]
    return attention_backward(dout, dlse, q, k, v, out, *regions, *window_and_scale)
