"""The portable attention in blocks: any device, any logits, NaN and infinity.

For each tile of queries it lists the keys that one of them sees, and takes one softmax over them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_kernels.attention.layout import window_start
from cogview_kernels.attention.reference import visible_matmul

TILE_ROWS = 64  # rows per tile where query_window is smaller
MAX_TILE_ROWS = 256  # and where it is larger


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def first_key(position: int, query_window: int, key_window_times: int) -> int:
    return max(0, (position // query_window - key_window_times + 1) * query_window)


class Regions(NamedTuple):
    text_len: Tensor  # (B,)
    pivot_idx: Tensor  # (B, P)
    query_window: int
    key_window_times: int
    text_bias: float
    pivot_bias: float


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


def _far_keys(q_len: int, k_len: int, regions: Regions, dtype: torch.dtype) -> _FarKeys:
    text_len, pivot_idx, w, n, text_bias, pivot_bias = regions
    starts = [first_key(end - 1, w, n) for _, end in _tile_edges(q_len, k_len, w)]
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
    if query_window < TILE_ROWS:
        rows = query_window * (TILE_ROWS // query_window)
    else:
        rows = min(query_window, MAX_TILE_ROWS)
    first = k_len - q_len
    edges = [first, *range((first // rows + 1) * rows, k_len, rows), k_len]
    return list(itertools.pairwise(edges))


def _gather(tensor: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``position (B, L)`` of ``tensor (B, G, Sk, D)``, the same for all heads; padding reads
    the last row."""
    sample = torch.arange(len(position), device=position.device).unsqueeze(1)
    index = sample, position.clamp_max(tensor.shape[2] - 1)
    return tensor.transpose(1, 2)[index].transpose(1, 2).to(dtype)


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


def tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions,
    softmax_scale: float,
) -> Iterator[_Tile]:
    dtype, (w, n) = accumulate_dtype(q.dtype), regions[2:4]
    far = _far_keys(q.shape[2], k.shape[2], regions, dtype)
    edges = _tile_edges(q.shape[2], k.shape[2], w)
    far_k, far_v = (_gather(t, far.position, dtype) for t in (k, v))
    first_row = k.shape[2] - q.shape[2]
    for tile, (begin, end) in enumerate(edges):
        rows = slice(begin - first_row, end - first_row)
        window = slice(first_key(begin, w, n), end)
        num_far = far.num_visible[tile]
        yield _Tile(
            rows,
            window,
            num_far,
            by_group(q, rows, k.shape[1], dtype) * softmax_scale,
            torch.cat([far_k[:, :, :num_far], k[:, :, window].to(dtype)], dim=2),
            torch.cat([far_v[:, :, :num_far], v[:, :, window].to(dtype)], dim=2),
            _tile_bias(begin, end, window, far, tile, w, n),
        )


def by_group(tensor: Tensor, rows: slice, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of ``(B, H, Sq, D)``, or of ``(B, H, Sq)`` as one column: ``(B, G, R * rows, D)``."""
    last = tensor.shape[3] if tensor.ndim == 4 else 1
    return tensor[:, :, rows].to(dtype).reshape(tensor.shape[0], num_kv_heads, -1, last)


def tile_logits(q: Tensor, keys: Tensor, bias: Tensor, exact: bool) -> Tensor:
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


def forward_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions,
    softmax_scale: float,
    wanted: Tensor,
) -> None:
    """Writes the rows ``wanted (B, H, Sq)`` of ``out`` and ``lse``."""
    for exact in (False, True):
        for tile in tiles(q, k, v, regions, softmax_scale):
            rows = wanted[:, :, tile.rows]
            if not rows.any():
                continue
            logits = tile_logits(tile.queries, tile.keys, tile.bias, exact)
            p, peak = logits.softmax(-1), logits.amax(-1)
            # The largest weight is exp(peak - lse): two passes, where logsumexp takes five.
            tile_lse = torch.where(peak.isinf(), peak, peak - p.amax(-1).log())
            if exact:
                visible = _visible(tile)
                tile_out = visible_matmul(p.masked_fill_(~visible, 0.0), visible, tile.values)
            else:
                tile_out = p @ tile.values
            out[:, :, tile.rows][rows] = tile_out.view(*rows.shape, -1)[rows]
            lse[:, :, tile.rows][rows] = tile_lse.view(rows.shape)[rows]
        if not (out.isnan().any(-1) & wanted).any():
            break


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
    wanted: Tensor,
) -> None:
    """Writes the rows ``wanted (B, H, Sq)`` of dq, and adds their part to dk and dv."""
    dtype = dq.dtype
    position = _far_keys(q.shape[2], k.shape[2], regions, dtype).position
    # Positions are unique in each row; padding has zeros for whichever key it is added to.
    far_index = position.clamp_max(k.shape[2] - 1)[:, None, :, None]
    far_index = far_index.expand(-1, k.shape[1], -1, k.shape[3])
    for exact in (False, True):
        part_dk, part_dv = (torch.zeros_like(t) for t in (dk, dv))
        far_dk, far_dv = (dk.new_zeros(far_index.shape) for _ in range(2))
        for tile in tiles(q, k, v, regions, softmax_scale):
            rows = wanted[:, :, tile.rows]
            if not rows.any():
                continue
            tile_dout, tile_out, tile_dlse, of_rows = (
                by_group(tensor, tile.rows, k.shape[1], dtype)
                for tensor in (dout, out, dlse, wanted)
            )
            delta = (tile_dout * tile_out).sum(-1, keepdim=True) - tile_dlse
            p = tile_logits(tile.queries, tile.keys, tile.bias, exact).softmax(-1)
            ds = (tile_dout @ tile.values.mT).sub_(delta).mul_(p)
            if exact:
                visible = _visible(tile) & of_rows.bool()
                p, ds = p.masked_fill_(~visible, 0.0), ds.masked_fill_(~visible, 0.0)
                tile_dq = visible_matmul(ds, visible, tile.keys)
                tile_dk = visible_matmul(ds.mT, visible.mT, tile.queries)
                tile_dv = visible_matmul(p.mT, visible.mT, tile_dout)
            else:
                if not rows.all():
                    others = ~of_rows.bool()
                    p, ds = p.masked_fill_(others, 0.0), ds.masked_fill_(others, 0.0)
                tile_dq, tile_dk, tile_dv = ds @ tile.keys, ds.mT @ tile.queries, p.mT @ tile_dout
            dq[:, :, tile.rows][rows] = (tile_dq * softmax_scale).view(*rows.shape, -1)[rows]
            far_dk[:, :, : tile.num_far] += tile_dk[:, :, : tile.num_far]
            far_dv[:, :, : tile.num_far] += tile_dv[:, :, : tile.num_far]
            part_dk[:, :, tile.window] += tile_dk[:, :, tile.num_far :]
            part_dv[:, :, tile.window] += tile_dv[:, :, tile.num_far :]
        part_dk.scatter_add_(2, far_index, far_dk)
        part_dv.scatter_add_(2, far_index, far_dv)
        if not (
            (dq.isnan().any(-1) & wanted).any() | part_dk.isnan().any() | part_dv.isnan().any()
        ):
            break
    dk += part_dk
    dv += part_dv
