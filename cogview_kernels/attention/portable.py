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

import functools
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


# With pivots for each key/value head, these and the query heads that read them are samples.


def _groups_as_samples(tensor: Tensor, num_groups: int) -> Tensor:
    """``(B, H, ...)`` or ``(B, G, ...)`` as ``(B * G, H / G, ...)``; copies where strides ask for
    it."""
    batch, num_heads, *rest = tensor.shape
    return tensor.reshape(batch * num_groups, num_heads // num_groups, *rest)


def _samples_as_groups(tensor: Tensor, like: Tensor) -> Tensor:
    """The way back, for a tensor of the shape of ``like``."""
    heads = empty_heads(like)
    groups = tensor.unflatten(0, (like.shape[0], like.shape[1] // tensor.shape[1]))
    heads.unflatten(1, groups.shape[1:3]).copy_(groups)
    return heads


def _rows_of_groups(text_len: Tensor, pivot_idx: Tensor) -> tuple[Tensor, Tensor]:
    """``(B * G,)`` and ``(B * G, P)`` of ``pivot_idx (B, G, P)``."""
    return text_len.repeat_interleave(pivot_idx.shape[1]), pivot_idx.flatten(0, 1)


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
    scalars: Any = (query_window, key_window_times, text_bias, pivot_bias, softmax_scale)
    if pivot_idx.ndim == 3:
        fold = functools.partial(_groups_as_samples, num_groups=pivot_idx.shape[1])
        regions_of_groups = _rows_of_groups(text_len, pivot_idx)
        kv_lens = None if kv_lens is None else kv_lens.repeat_interleave(pivot_idx.shape[1])
        of_groups: Any = (fold(q), fold(k), fold(v), *regions_of_groups, *scalars, kv_lens)
        out, lse = attention_forward(*of_groups)
        return _samples_as_groups(out, q), lse.view(q.shape[:3])
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
            for b, rows, keys in _samples(kv_lens, q, k):
                qkv = q[b, :, rows], k[b, :, keys], v[b, :, keys]
                of_sample = attention_forward(*qkv, text_len[b], pivot_idx[b], *scalars)
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
    scalars: Any = (query_window, key_window_times, text_bias, pivot_bias, softmax_scale)
    if pivot_idx.ndim == 3:
        fold = functools.partial(_groups_as_samples, num_groups=pivot_idx.shape[1])
        tensors = fold(dout), fold(dlse), fold(q), fold(k), fold(v), fold(out)
        regions_of_groups = _rows_of_groups(text_len, pivot_idx)
        lse = None if lse is None else fold(lse)
        kv_lens = None if kv_lens is None else kv_lens.repeat_interleave(pivot_idx.shape[1])
        of_groups: Any = (*tensors, *regions_of_groups, *scalars, lse, kv_lens)
        gradients = attention_backward(*of_groups)
        dq, dk, dv = map(_samples_as_groups, gradients, (q, k, v))
        return dq, dk, dv
    dtype = accumulate_dtype(q.dtype)
    dq, dk, dv = (empty_heads(tensor, dtype).zero_() for tensor in (q, k, v))
    if out.numel() > 0:
        regions = Regions(
            text_len, pivot_idx, query_window, key_window_times, text_bias, pivot_bias
        )
        if kv_lens is not None:
            inputs = dout, dlse, q, k, v, out
            if kv_lens.is_cpu:
                for b, rows, keys in _samples(kv_lens, q, k):
                    at = rows, rows, rows, keys, keys, rows
                    parts = (t[b, :, part] for t, part in zip(inputs, at, strict=True))
                    of_lse = None if lse is None else lse[b, :, rows]
                    read: Any = (*parts, text_len[b], pivot_idx[b], *scalars, of_lse)
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
    """``(B, 2 + P)`` or ``(B, G, 2 + P)``, int32: text length, number of pivots, the pivots that
    count, ``k_len``."""
    prefix = text_len.clamp(0, k_len).view(-1, *[1] * (pivot_idx.ndim - 1))
    prefix = prefix.expand(*pivot_idx.shape[:-1], 1)
    in_range = (pivot_idx >= prefix) & (pivot_idx < k_len)
    previous = torch.nn.functional.pad(torch.where(in_range, pivot_idx, -1), (1, 0), value=-1)
    counts = in_range & (pivot_idx > previous.cummax(dim=-1).values[..., :-1])
    pivots = torch.where(counts, pivot_idx, k_len).sort(dim=-1).values
    return torch.cat([prefix, counts.sum(-1, keepdim=True), pivots], dim=-1).to(torch.int32)


def _unpacked(far_keys: Tensor) -> tuple[Tensor, Tensor]:
    text_len = far_keys[..., 0] if far_keys.ndim == 2 else far_keys[:, 0, 0]
    return text_len, far_keys[..., 2:]


def attention_forward_packed(
    q: Tensor, k: Tensor, v: Tensor, far_keys: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``row_max`` and ``row_log_sum``; the whole of lse stands in ``row_max``."""
    out, lse = attention_forward(q, k, v, *_unpacked(far_keys), *rest)
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
    regions = _unpacked(far_keys)
    return attention_backward(dout, dlse, q, k, v, out, *regions, *window_and_scale)
