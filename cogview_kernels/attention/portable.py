"""Blocked PyTorch formulations: any device, any floating dtype, never ``Sq x Sk``.

Attention, for each tile of query rows: the keys it may attend to are listed (text and pivots
gathered once per call, the window a slice), so that work and memory follow the keys attended:

    list   = text prefix ++ pivots before the window ++ window          the virtual key list
    s      = softmax_scale * q list^T + bias, -inf where the row may not look
    lse    = log sum exp s;  p = softmax(s);  out = p v                 forward
    ds     = p * (dout v^T - (delta - dlse)),  delta = sum(dout * out)   backward, s recomputed
    dq     = softmax_scale * ds k;  dk = softmax_scale * ds^T q;  dv = p^T dout

Backward keeps nothing but q, k, v and out between the passes. Rounding points: products and sums
are float32 (float64 for float64 inputs); out, dq, dk and dv are rounded once. p is never taken from
the rounded lse: where logits are large, such rows would not sum to one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_kernels.attention.layout import window_start
from cogview_kernels.attention.reference import visible_matmul

_TILE_ROWS = 64  # rows per tile where query_window is smaller
_MAX_TILE_ROWS = 256  # and where it is larger


class _FarKeys(NamedTuple):
    """The text prefix and the pivots of each sample, ascending, packed to the left."""

    position: Tensor  # (B, L) int64, padded with k_len, which no window starts behind
    bias: Tensor  # (B, L)
    num_visible: list[int]  # per tile: how many columns may be visible to one of its rows


class _Tile(NamedTuple):
    """Some query rows of one call and the keys that they may attend to."""

    rows: slice  # of q
    window: slice  # of k: the window's keys
    num_far: int  # the first columns are far keys, the others the window
    queries: Tensor  # (B, G, R * rows, D), the R heads of a group below each other, scaled
    keys: Tensor  # (B, G, columns, D)
    values: Tensor  # (B, G, columns, D)
    bias: Tensor  # (B, 1, rows, columns), -inf where not visible


def empty_heads(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor ``(B, H, S, D)``, in memory ``(B, S, H, D)`` where ``like`` has its tokens
    outside its heads, so that the projection before or behind it needs no copy."""
    batch, num_heads, seqlen, head_dim = like.shape
    if like.stride(2) > like.stride(1):
        return like.new_empty(batch, seqlen, num_heads, head_dim, dtype=dtype).transpose(1, 2)
    return like.new_empty(like.shape, dtype=dtype)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _first_key(position: int, query_window: int, key_window_times: int) -> int:
    return max(0, (position // query_window - key_window_times + 1) * query_window)


def _far_keys(
    k_len: int,
    text_len: Tensor,
    pivot_idx: Tensor,
    starts: list[int],
    text_bias: float,
    pivot_bias: float,
    dtype: torch.dtype,
) -> _FarKeys:
    """``starts``: for each tile, ascending, where the window of its last row begins."""
    # Text first, then pivots; whatever no row can see becomes padding and sorts to the right.
    device, last = text_len.device, starts[-1]
    prefix = text_len.long().clamp(0, last).unsqueeze(1)
    text = torch.arange(int(prefix.max()), device=device)
    text = torch.where(text < prefix, text, k_len)
    pivots = pivot_idx.long()
    counts = (pivots >= text_len.clamp_min(0).unsqueeze(1)) & (pivots < last)
    pivots = torch.where(counts, pivots, k_len)
    position = torch.cat([text, pivots], dim=1).sort(dim=1).values
    bound = torch.tensor(starts, device=device).expand(position.shape[0], -1).contiguous()
    num_visible = torch.searchsorted(position, bound).amax(dim=0).tolist()
    position = position[:, : max(num_visible)]
    bias = torch.full(position.shape, pivot_bias, dtype=dtype, device=device)
    bias.masked_fill_(position < prefix, text_bias)
    return _FarKeys(position, bias, num_visible)


def _tile_edges(q_len: int, k_len: int, query_window: int) -> list[tuple[int, int]]:
    """Query positions [begin, end) of each tile: whole blocks where they are small."""
    if query_window < _TILE_ROWS:
        rows = query_window * (_TILE_ROWS // query_window)
    else:
        rows = min(query_window, _MAX_TILE_ROWS)
    first = k_len - q_len
    edges = [first, *range((first // rows + 1) * rows, k_len, rows), k_len]
    return list(itertools.pairwise(edges))


def _gather(tensor: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``position (B, L)`` of ``tensor (B, G, Sk, D)``, the same for all heads; padding reads
    the last row."""
    index = position.clamp_max(tensor.shape[2] - 1)[:, None, :, None]
    index = index.expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index).to(dtype)


def _tile_bias(
    begin: int, end: int, window: slice, far: _FarKeys, tile: int, w: int, n: int
) -> Tensor:
    """What is added to the logits of a tile."""
    device, hidden = far.position.device, float("-inf")
    i = torch.arange(begin, end, device=device).unsqueeze(1)
    start = window_start(i, w, n)
    j = torch.arange(window.start, window.stop, device=device)
    local = torch.zeros(end - begin, len(j), dtype=far.bias.dtype, device=device)
    local = local.masked_fill((j < start) | (j > i), hidden)
    position, bias = (t[:, None, : far.num_visible[tile]] for t in (far.position, far.bias))
    distant = bias.expand(-1, end - begin, -1).masked_fill(position >= start, hidden)
    return torch.cat([distant, local.expand(distant.shape[0], -1, -1)], dim=2).unsqueeze(1)


def _tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: _FarKeys,
    edges: list[tuple[int, int]],
    query_window: int,
    key_window_times: int,
    softmax_scale: float,
) -> Iterator[_Tile]:
    dtype = far.bias.dtype
    far_k, far_v = (_gather(t, far.position, dtype) for t in (k, v))
    first_row = k.shape[2] - q.shape[2]
    for tile, (begin, end) in enumerate(edges):
        rows = slice(begin - first_row, end - first_row)
        window = slice(_first_key(begin, query_window, key_window_times), end)
        num_far = far.num_visible[tile]
        yield _Tile(
            rows,
            window,
            num_far,
            _by_group(q, rows, k.shape[1], dtype) * softmax_scale,
            torch.cat([far_k[:, :, :num_far], k[:, :, window].to(dtype)], dim=2),
            torch.cat([far_v[:, :, :num_far], v[:, :, window].to(dtype)], dim=2),
            _tile_bias(begin, end, window, far, tile, query_window, key_window_times),
        )


def _by_group(tensor: Tensor, rows: slice, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of ``(B, H, Sq, D)``, or of ``(B, H, Sq)`` as one column: ``(B, G, R * rows, D)``."""
    last = tensor.shape[3] if tensor.ndim == 4 else 1
    return tensor[:, :, rows].to(dtype).reshape(tensor.shape[0], num_kv_heads, -1, last)


def _tile_logits(q: Tensor, keys: Tensor, bias: Tensor, exact: bool) -> Tensor:
    """Logits ``(B, G, R * rows, keys)`` of scaled queries; ``exact``: finite inputs cannot make an
    infinite logit, and a NaN behind the mask stays there."""
    logits = q @ keys.mT
    rows, columns = bias.shape[-2:]
    by_row = logits.view(*logits.shape[:2], -1, rows, columns)
    if exact:
        limit = torch.finfo(logits.dtype).max / 4
        finite = q.isfinite().all(-1, keepdim=True) & keys.isfinite().all(-1).unsqueeze(-2)
        logits.copy_(torch.where(finite, logits.nan_to_num(0.0).clamp(-limit, limit), logits))
        by_row.masked_fill_(bias.unsqueeze(2).isneginf(), 0.0)
    by_row.add_(bias.unsqueeze(2))
    return logits


def _visible(tile: _Tile) -> Tensor:
    """Which logits of the tile are visible, ``(B, 1, R * rows, columns)``."""
    heads_per_group = tile.queries.shape[2] // tile.bias.shape[2]
    return (tile.bias > float("-inf")).repeat(1, 1, heads_per_group, 1)


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
) -> tuple[Tensor, Tensor]:
    """``out (B, H, Sq, D)`` in q's dtype and ``lse (B, H, Sq)``; see the public function."""
    dtype = _accumulate_dtype(q.dtype)
    out = empty_heads(q)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    if out.numel() == 0:
        return out, lse
    edges = _tile_edges(q.shape[2], k.shape[2], query_window)
    starts = [_first_key(end - 1, query_window, key_window_times) for _, end in edges]
    far = _far_keys(k.shape[2], text_len, pivot_idx, starts, text_bias, pivot_bias, dtype)
    window = (query_window, key_window_times)
    for exact in (False, True):
        for tile in _tiles(q, k, v, far, edges, *window, softmax_scale):
            logits = _tile_logits(tile.queries, tile.keys, tile.bias, exact)
            p, peak = logits.softmax(-1), logits.amax(-1)
            # The largest weight is exp(peak - lse): two passes, where logsumexp takes five.
            tile_lse = torch.where(peak.isinf(), peak, peak - p.amax(-1).log())
            if exact:
                visible = _visible(tile)
                tile_out = visible_matmul(p.masked_fill_(~visible, 0.0), visible, tile.values)
            else:
                tile_out = p @ tile.values
            out[:, :, tile.rows] = tile_out.view(*q.shape[:2], -1, q.shape[3])
            lse[:, :, tile.rows] = tile_lse.view(*q.shape[:2], -1)
        if not out.isnan().any():
            break
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` with the shapes and dtypes of q, k, v. Deterministic."""
    dtype = _accumulate_dtype(q.dtype)
    dq = empty_heads(q)
    dk, dv = (empty_heads(tensor, dtype).zero_() for tensor in (k, v))
    if out.numel() == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    edges = _tile_edges(q.shape[2], k.shape[2], query_window)
    starts = [_first_key(end - 1, query_window, key_window_times) for _, end in edges]
    far = _far_keys(k.shape[2], text_len, pivot_idx, starts, text_bias, pivot_bias, dtype)
    window = (query_window, key_window_times)
    # Positions are unique in each row; padding has zeros for whichever key it is added to.
    far_index = far.position.clamp_max(k.shape[2] - 1)[:, None, :, None]
    far_index = far_index.expand(-1, k.shape[1], -1, k.shape[3])
    for exact in (False, True):
        far_dk, far_dv = (dk.new_zeros(far_index.shape) for _ in range(2))
        for tile in _tiles(q, k, v, far, edges, *window, softmax_scale):
            tile_dout, tile_out, tile_dlse = (
                _by_group(tensor, tile.rows, k.shape[1], dtype) for tensor in (dout, out, dlse)
            )
            delta = (tile_dout * tile_out).sum(-1, keepdim=True) - tile_dlse
            p = _tile_logits(tile.queries, tile.keys, tile.bias, exact).softmax(-1)
            ds = (tile_dout @ tile.values.mT).sub_(delta).mul_(p)
            if exact:
                visible = _visible(tile)
                p, ds = p.masked_fill_(~visible, 0.0), ds.masked_fill_(~visible, 0.0)
                tile_dq = visible_matmul(ds, visible, tile.keys)
                tile_dk = visible_matmul(ds.mT, visible.mT, tile.queries)
                tile_dv = visible_matmul(p.mT, visible.mT, tile_dout)
            else:
                tile_dq, tile_dk, tile_dv = ds @ tile.keys, ds.mT @ tile.queries, p.mT @ tile_dout
            dq[:, :, tile.rows] = (tile_dq * softmax_scale).view(*q.shape[:2], -1, q.shape[3])
            far_dk[:, :, : tile.num_far] += tile_dk[:, :, : tile.num_far]
            far_dv[:, :, : tile.num_far] += tile_dv[:, :, : tile.num_far]
            dk[:, :, tile.window] += tile_dk[:, :, tile.num_far :]
            dv[:, :, tile.window] += tile_dv[:, :, tile.num_far :]
        dk.scatter_add_(2, far_index, far_dk)
        dv.scatter_add_(2, far_index, far_dv)
        if exact or not (dq.isnan().any() | dk.isnan().any() | dv.isnan().any()):
            break
        dk.zero_()
        dv.zero_()
    return dq, dk.to(k.dtype), dv.to(v.dtype)


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
    q: Tensor, k: Tensor, v: Tensor, far_keys: Tensor, *window_and_scale: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``row_max`` and ``row_log_sum``; the whole of lse stands in ``row_max``."""
    out, lse = attention_forward(q, k, v, far_keys[:, 0], far_keys[:, 2:], *window_and_scale)
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
    layout = far_keys[:, 0], far_keys[:, 2:]
    return attention_backward(dout, dlse, q, k, v, out, *layout, *window_and_scale)
