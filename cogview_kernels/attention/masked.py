"""The portable attention with caches of fixed size, on devices whose values the host must not
read.

What a sample sees depends on its number of keys, which only the device knows. So every row takes a
softmax over all keys, of which those that it does not see are masked: work follows ``Sk``, memory
too for 64 queries at a time, and nothing synchronises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_kernels.attention.blocked import (
    TILE_ROWS,
    Regions,
    by_group,
    tile_logits,
)
from cogview_kernels.attention.layout import window_start
from cogview_kernels.attention.reference import visible_matmul


class _Tile(NamedTuple):
    rows: slice  # of q
    queries: Tensor  # (B, G, R * rows, D), the R heads of a group below each other, scaled
    visible: Tensor  # (B, 1, R * rows, Sk)
    logits: Tensor  # (B, G, R * rows, Sk), -inf where not visible
    p: Tensor  # as logits: their softmax, zeros where not visible


def _tiles(
    q: Tensor, k: Tensor, regions: Regions, softmax_scale: float, kv_lens: Tensor
) -> Iterator[_Tile]:
    """``k``: in the dtype to compute in."""
    batch, num_kv_heads, k_len, _ = k.shape
    text_len, pivot_idx, w, n, text_bias, pivot_bias = regions
    prefix = text_len.view(batch, 1, 1, 1)
    counts = (pivot_idx >= text_len.clamp_min(0).unsqueeze(1)) & (pivot_idx < k_len)
    column = torch.where(counts, pivot_idx, k_len).long()
    is_pivot = torch.zeros(batch, k_len + 1, dtype=torch.bool, device=k.device)
    is_pivot = is_pivot.scatter(1, column, True)[:, None, None, :k_len]
    j = torch.arange(k_len, device=k.device)
    first = (kv_lens.clamp(0, k_len) - q.shape[2]).view(batch, 1, 1, 1)
    for begin in range(0, q.shape[2], TILE_ROWS):
        rows = slice(begin, min(begin + TILE_ROWS, q.shape[2]))
        i = first + torch.arange(rows.start, rows.stop, device=k.device).view(-1, 1)
        start = window_start(i, w, n)
        is_text, in_front = j < prefix, j < start
        bias = torch.zeros(torch.broadcast_shapes(i.shape, is_pivot.shape), device=k.device)
        bias = bias.to(k.dtype).masked_fill(in_front, float("-inf"))
        bias = bias.masked_fill(in_front & is_pivot & ~is_text, pivot_bias)
        bias = bias.masked_fill(in_front & is_text, text_bias).masked_fill(j > i, float("-inf"))
        queries = by_group(q, rows, num_kv_heads, k.dtype) * softmax_scale
        visible = (bias > float("-inf")).repeat(1, 1, queries.shape[2] // bias.shape[2], 1)
        logits = tile_logits(queries, k, bias, exact=True)
        p = logits.softmax(-1).masked_fill(~visible, 0.0)
        yield _Tile(rows, queries, visible, logits, p)


def forward_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions,
    softmax_scale: float,
    kv_lens: Tensor,
) -> None:
    """Writes ``out`` and ``lse``."""
    k, v = k.to(out.dtype), v.to(out.dtype)
    for rows, _, visible, logits, p in _tiles(q, k, regions, softmax_scale, kv_lens):
        out[:, :, rows] = visible_matmul(p, visible, v).reshape(out[:, :, rows].shape)
        lse[:, :, rows] = logits.logsumexp(-1).reshape(lse[:, :, rows].shape)


def backward_into(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    regions: Regions,
    softmax_scale: float,
    kv_lens: Tensor,
) -> None:
    """Writes ``dq``, and adds to ``dk`` and ``dv``."""
    k, v = k.to(dq.dtype), v.to(dq.dtype)
    for rows, queries, visible, _, p in _tiles(q, k, regions, softmax_scale, kv_lens):
        of_out, of_dout, of_dlse = (
            by_group(tensor, rows, k.shape[1], dq.dtype) for tensor in (out, dout, dlse)
        )
        delta = (of_dout * of_out).sum(-1, keepdim=True) - of_dlse
        ds = ((of_dout @ v.mT - delta) * p).masked_fill(~visible, 0.0)
        of_dq = visible_matmul(ds, visible, k) * softmax_scale
        dq[:, :, rows] = of_dq.reshape(dq[:, :, rows].shape)
        dk += visible_matmul(ds.mT, visible.mT, queries)
        dv += visible_matmul(p.mT, visible.mT, of_dout)
