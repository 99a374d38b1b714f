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

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Torch's flash kernels for the CPU lose NaN in places and overflow where logits do. With entries up
# to this size, whatever is multiplied with whatever stays in float32's range.
_MAX_FLASH_ENTRY = 2.0**24
# Their backward takes p = exp(s - lse) with a rounded lse: a row sums to 1 within 2^-24 |lse|.
_MAX_FLASH_LSE = 16.0


class _FarKeys(NamedTuple):
    """The text prefix and the pivots of each sample, ascending, packed to the left."""

    position: Tensor  # (B, L) int64, padded with k_len, which no window starts behind
    bias: Tensor  # (B, L)
    num_visible: list[int]  # per tile: columns that its last row sees, the most of any sample
    num_settled: list[int]  # per tile: columns that its first row sees, the fewest of any sample


class _Plan(NamedTuple):
    """The tiles of a call. Their key lists fill one buffer: ``max_window`` columns for the window,
    aligned to the right, then the far keys."""

    edges: list[tuple[int, int]]  # query positions [begin, end) of each tile
    far: _FarKeys
    max_window: int
    query_window: int
    key_window_times: int


class _Tile(NamedTuple):
    """Some query rows of one call and the keys that they may attend to."""

    rows: slice  # of q
    window: slice  # of k
    num_far: int
    bias: Tensor  # (B, 1, rows, window ++ far keys), -inf where not visible; valid until the next


def _far_rows(tensor: Tensor, position: Tensor) -> Tensor:
    """Rows ``position (B, L)`` of ``tensor (B, G, Sk, D)``, the same for all heads; padding reads
    the last row."""
    sample = torch.arange(tensor.shape[0], device=tensor.device).unsqueeze(1)
    return tensor.transpose(1, 2)[sample, position.clamp_max(tensor.shape[2] - 1)].transpose(1, 2)


class _KeyLists:
    """The lists of keys, or of values, of one tile after the other, for each query head."""

    def __init__(self, source: Tensor, plan: _Plan, num_heads: int, dtype: torch.dtype) -> None:
        batch, num_kv_heads, _, head_dim = source.shape
        position, self.max_window = plan.far.position, plan.max_window
        columns = self.max_window + position.shape[1]
        self.source = source
        self.buffer = source.new_empty(batch, num_heads, columns, head_dim, dtype=dtype)
        self.by_group = self.buffer.view(batch, num_kv_heads, -1, columns, head_dim)
        self.by_group[:, :, :, self.max_window :] = _far_rows(source, position).unsqueeze(2)

    def of(self, tile: _Tile) -> Tensor:
        """``(B, H, window ++ far keys, D)``, valid until the next call."""
        begin = self.max_window - (tile.window.stop - tile.window.start)
        window = self.source[:, :, tile.window].unsqueeze(2)
        self.by_group[:, :, :, begin : self.max_window] = window
        return self.buffer[:, :, begin : self.max_window + tile.num_far]


class _KeyGradients:
    """The sum of the gradients of one tile after the other."""

    def __init__(self, like: Tensor, plan: _Plan, dtype: torch.dtype) -> None:
        batch, num_kv_heads, k_len, head_dim = like.shape
        self.sum = empty_heads(like, dtype).zero_()
        position = plan.far.position
        self.far = self.sum.new_zeros(batch, num_kv_heads, position.shape[1], head_dim)
        self.far_index = position.clamp_max(k_len - 1)[:, None, :, None].expand_as(self.far)

    def add(self, tile: _Tile, gradient: Tensor) -> None:
        """``gradient (B, H, window ++ far keys, D)`` of the tile's list."""
        if gradient.shape[1] != self.sum.shape[1]:
            gradient = gradient.unflatten(1, (self.sum.shape[1], -1)).sum(2)
        width = tile.window.stop - tile.window.start
        self.sum[:, :, tile.window] += gradient[:, :, :width]
        self.far[:, :, : tile.num_far] += gradient[:, :, width:]

    def total(self) -> Tensor:
        # Positions are unique in each row; padding has zeros for whichever key it is added to.
        return self.sum.scatter_add_(2, self.far_index, self.far)


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


def _plan(
    q_len: int,
    k_len: int,
    text_len: Tensor,
    pivot_idx: Tensor,
    query_window: int,
    key_window_times: int,
    text_bias: float,
    pivot_bias: float,
    dtype: torch.dtype,
) -> _Plan:
    edges = _tile_edges(q_len, k_len, query_window)
    first, last = (
        [_first_key(position, query_window, key_window_times) for position in positions]
        for positions in ([begin for begin, _ in edges], [end - 1 for _, end in edges])
    )
    far = _far_keys(k_len, text_len, pivot_idx, first, last, text_bias, pivot_bias, dtype)
    max_window = max(end - start for (_, end), start in zip(edges, first, strict=True))
    return _Plan(edges, far, max_window, query_window, key_window_times)


def _far_keys(
    k_len: int,
    text_len: Tensor,
    pivot_idx: Tensor,
    first_starts: list[int],
    last_starts: list[int],
    text_bias: float,
    pivot_bias: float,
    dtype: torch.dtype,
) -> _FarKeys:
    """``first_starts``, ``last_starts``: for each tile, ascending, where the windows of its first
    and its last row begin."""
    # Text first, then pivots; whatever no row can see becomes padding and sorts to the right.
    device, last = text_len.device, last_starts[-1]
    prefix = text_len.long().clamp(0, last).unsqueeze(1)
    text = torch.arange(int(prefix.max()), device=device)
    text = torch.where(text < prefix, text, k_len)
    pivots = pivot_idx.long()
    counts = (pivots >= text_len.clamp_min(0).unsqueeze(1)) & (pivots < last)
    pivots = torch.where(counts, pivots, k_len)
    position = torch.cat([text, pivots], dim=1).sort(dim=1).values
    starts = torch.tensor([first_starts, last_starts], device=device).view(1, -1)
    visible = torch.searchsorted(position, starts.expand(position.shape[0], -1).contiguous())
    visible_first, visible_last = visible.chunk(2, dim=1)
    num_visible = visible_last.amax(dim=0).tolist()
    position = position[:, : max(num_visible)]
    bias = torch.full(position.shape, pivot_bias, dtype=dtype, device=device)
    bias.masked_fill_(position < prefix, text_bias)
    return _FarKeys(position, bias, num_visible, visible_first.amin(dim=0).tolist())


def _tile_edges(q_len: int, k_len: int, query_window: int) -> list[tuple[int, int]]:
    """Query positions [begin, end) of each tile: whole blocks where they are small."""
    if query_window < _TILE_ROWS:
        rows = query_window * (_TILE_ROWS // query_window)
    else:
        rows = min(query_window, _MAX_TILE_ROWS)
    first = k_len - q_len
    edges = [first, *range((first // rows + 1) * rows, k_len, rows), k_len]
    return list(itertools.pairwise(edges))


def _tiles(plan: _Plan) -> Iterator[_Tile]:
    """The biases stand in one buffer, of which each tile writes what differs from the last one."""
    edges, far, max_window, w, n = plan
    device, hidden = far.position.device, float("-inf")
    max_rows = max(end - begin for begin, end in edges)
    shape = far.position.shape[0], 1, max_rows, max_window + far.position.shape[1]
    buffer = far.bias.new_full(shape, hidden)
    window_bias, far_bias = buffer.split([max_window, far.position.shape[1]], dim=3)
    far_position, far_value = (t[:, None, None] for t in (far.position, far.bias))
    written, settled = None, 0
    for tile, (begin, end) in enumerate(edges):
        rows, window = end - begin, slice(_first_key(begin, w, n), end)
        width = end - window.start
        i = torch.arange(begin, begin + max_rows, device=device).unsqueeze(1)
        if written != (rows, width, begin % w):
            written = rows, width, begin % w
            j = torch.arange(window.start, end, device=device)
            visible = (j >= window_start(i, w, n)) & (j <= i)
            local = torch.where(visible[:rows], 0.0, hidden).to(buffer.dtype)
            window_bias[:, :, :rows, max_window - width :] = local
        num_far = far.num_visible[tile]
        if settled < num_far:
            # All rows of the buffer, for columns before these are not written again.
            columns = (..., slice(settled, num_far))
            ahead = far_position[columns] >= window_start(i, w, n)
            far_bias[columns] = torch.where(ahead, hidden, far_value[columns])
            settled = far.num_settled[tile]
        bias = buffer[:, :, :rows, max_window - width : max_window + num_far]
        yield _Tile(slice(begin - edges[0][0], end - edges[0][0]), window, num_far, bias)


def _rows_of(tensor: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of ``(B, H, Sq, D)`` as a matrix product takes them: rows do not overlap."""
    part = tensor[:, :, rows].to(dtype)
    return part if part.stride(2) >= part.shape[3] else part.contiguous()


def _flash_takes(q: Tensor, plan: _Plan, softmax_scale: float) -> bool:
    return (
        q.device.type == "cpu"
        and abs(softmax_scale) <= _MAX_FLASH_ENTRY
        and _all_small(plan.far.bias)
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


def _all_small(*tensors: Tensor) -> bool:
    return all(t.numel() == 0 or bool(t.abs().amax() <= _MAX_FLASH_ENTRY) for t in tensors)


def _large_rows(tensor: Tensor) -> Tensor:
    """Rows with an entry that the flash kernels do not take, NaN among them: ``(B, H, S, 1)``."""
    return ~(tensor.abs().amax(-1, keepdim=True) <= _MAX_FLASH_ENTRY)


def _without_large_rows(*tensors: Tensor) -> list[Tensor]:
    return [tensor.masked_fill(_large_rows(tensor), 0.0) for tensor in tensors]


def _rows_with_large_entries(
    plan: _Plan, k: Tensor, v: Tensor, *query_rows: Tensor
) -> Tensor | None:
    """Queries ``(B, H, Sq, 1)`` that see an entry which the flash kernels do not take, in k, in v
    or in their own rows; ``None`` where there are none. It does not depend on hidden keys."""
    first = plan.edges[0][0]
    used = [t[:, :, _first_key(first, plan.query_window, plan.key_window_times) :] for t in (k, v)]
    far = [_far_rows(t, plan.far.position) for t in (k, v)] if first > 0 else []
    if _all_small(*query_rows, *used, *far):
        return None
    rows = torch.stack([_large_rows(t) for t in query_rows]).any(0)
    large_keys = (_large_rows(k) | _large_rows(v)).to(plan.far.bias.dtype)
    lists = _KeyLists(large_keys, plan, rows.shape[1], plan.far.bias.dtype)
    for tile in _tiles(plan):
        visible = (tile.bias > float("-inf")).to(plan.far.bias.dtype)
        rows[:, :, tile.rows] |= visible @ lists.of(tile) > 0
    return rows


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
    layout = text_len, pivot_idx, query_window, key_window_times, text_bias, pivot_bias
    plan = _plan(q.shape[2], k.shape[2], *layout, dtype)
    if not _flash_takes(q, plan, softmax_scale):
        _blocked_forward(q, k, v, plan, softmax_scale, _all_rows(q), out, lse)
        return out, lse
    left = _rows_with_large_entries(plan, k, v, q)
    inputs = [q, k, v] if left is None else _without_large_rows(q, k, v)
    keys, values = (_KeyLists(t, plan, q.shape[1], dtype) for t in inputs[1:])
    for tile in _tiles(plan):
        queries = _rows_of(inputs[0], tile.rows, dtype)
        out[:, :, tile.rows], lse[:, :, tile.rows] = _flash_forward(
            queries, keys.of(tile), values.of(tile), attn_mask=tile.bias, scale=softmax_scale
        )
    if left is not None:
        _blocked_forward(q, k, v, plan, softmax_scale, left, out, lse)
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
    if out.numel() == 0:
        return dq, torch.zeros_like(k), torch.zeros_like(v)
    layout = text_len, pivot_idx, query_window, key_window_times, text_bias, pivot_bias
    plan = _plan(q.shape[2], k.shape[2], *layout, dtype)
    inputs = dout, dlse, q, k, v, out
    if not _flash_takes(q, plan, softmax_scale):
        dk, dv = _blocked_backward(*inputs, plan, softmax_scale, _all_rows(q), dq)
    else:
        dk, dv, left = _flash_backward(*inputs, plan, softmax_scale, dq)
        if left is not None:
            left_dk, left_dv = _blocked_backward(*inputs, plan, softmax_scale, left, dq)
            dk, dv = dk + left_dk, dv + left_dv
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _flash_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    plan: _Plan,
    softmax_scale: float,
    dq: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Writes dq, returns dk, dv, and the rows ``(B, H, Sq, 1)`` that are left out of all three."""
    dtype = plan.far.bias.dtype
    large = _rows_with_large_entries(plan, k, v, q, dout, out)
    if large is not None:
        dout, q, k, v, out = _without_large_rows(dout, q, k, v, out)
    left = torch.zeros_like(_all_rows(q)) if large is None else large
    keys, values = (_KeyLists(t, plan, q.shape[1], dtype) for t in (k, v))
    dk, dv = (_KeyGradients(t, plan, dtype) for t in (k, v))
    for tile in _tiles(plan):
        lists = keys.of(tile), values.of(tile)
        tile_q, tile_out, tile_dout = (_rows_of(t, tile.rows, dtype) for t in (q, out, dout))
        bias_and_scale = {"attn_mask": tile.bias, "scale": softmax_scale}
        _, lse = _flash_forward(tile_q, *lists, **bias_and_scale)
        left[:, :, tile.rows] |= (
            (lse.abs() > _MAX_FLASH_LSE) | (dlse[:, :, tile.rows] != 0)
        ).unsqueeze(3)
        tile_left = left[:, :, tile.rows]
        if tile_left.any():
            tile_dout, tile_out = (t.masked_fill(tile_left, 0.0) for t in (tile_dout, tile_out))
            lse = lse.masked_fill(tile_left.squeeze(3), float("inf"))  # p = 0
        dq[:, :, tile.rows], tile_dk, tile_dv = _flash_backward_kernel(
            tile_dout, tile_q, *lists, tile_out, lse, 0.0, False, **bias_and_scale
        )
        dk.add(tile, tile_dk)
        dv.add(tile, tile_dv)
    return dk.total(), dv.total(), left if left.any() else None


def _all_rows(q: Tensor) -> Tensor:
    return torch.ones(*q.shape[:3], 1, dtype=torch.bool, device=q.device)


# The exact path: any device, any logits, NaN and infinity.


def _tile_logits(q: Tensor, keys: Tensor, bias: Tensor, exact: bool) -> Tensor:
    """Logits ``(B, H, rows, keys)`` of scaled queries; ``exact``: finite inputs cannot make an
    infinite logit, and a NaN behind the mask stays there."""
    logits = q @ keys.mT
    if exact:
        limit = torch.finfo(logits.dtype).max / 4
        finite = q.isfinite().all(-1, keepdim=True) & keys.isfinite().all(-1).unsqueeze(-2)
        logits = torch.where(finite, logits.nan_to_num(0.0).clamp(-limit, limit), logits)
        logits.masked_fill_(bias.isneginf(), 0.0)
    return logits.add_(bias)


def _blocked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: _Plan,
    softmax_scale: float,
    rows: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes ``rows (B, H, Sq, 1)`` of out and lse."""
    dtype = plan.far.bias.dtype
    keys, values = (_KeyLists(t, plan, q.shape[1], dtype) for t in (k, v))
    for exact in (False, True):
        for tile in _tiles(plan):
            tile_rows = rows[:, :, tile.rows]
            if not tile_rows.any():
                continue
            queries = q[:, :, tile.rows].to(dtype) * softmax_scale
            logits = _tile_logits(queries, keys.of(tile), tile.bias, exact)
            p, peak = logits.softmax(-1), logits.amax(-1)
            # The largest weight is exp(peak - lse): two passes, where logsumexp takes five.
            tile_lse = torch.where(peak.isinf(), peak, peak - p.amax(-1).log())
            if exact:
                visible = (tile.bias > float("-inf")).expand_as(p)
                tile_out = visible_matmul(p.masked_fill_(~visible, 0.0), visible, values.of(tile))
            else:
                tile_out = p @ values.of(tile)
            old_out, old_lse = out[:, :, tile.rows], lse[:, :, tile.rows]
            old_out.copy_(torch.where(tile_rows, tile_out.to(out.dtype), old_out))
            old_lse.copy_(torch.where(tile_rows.squeeze(3), tile_lse, old_lse))
        if not (out.isnan() & rows).any():
            break


def _blocked_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    plan: _Plan,
    softmax_scale: float,
    rows: Tensor,
    dq: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes ``rows (B, H, Sq, 1)`` of dq; their part of dk and dv."""
    dtype = plan.far.bias.dtype
    keys, values = (_KeyLists(t, plan, q.shape[1], dtype) for t in (k, v))
    for exact in (False, True):
        sums = [_KeyGradients(t, plan, dtype) for t in (k, v)]
        for tile in _tiles(plan):
            tile_rows = rows[:, :, tile.rows]
            if not tile_rows.any():
                continue
            tile_dout, tile_out = (t[:, :, tile.rows].to(dtype) for t in (dout, out))
            tile_dlse = dlse[:, :, tile.rows].to(dtype).unsqueeze(3)
            queries = q[:, :, tile.rows].to(dtype) * softmax_scale
            list_k, list_v = keys.of(tile), values.of(tile)
            delta = (tile_dout * tile_out).sum(-1, keepdim=True) - tile_dlse
            p = _tile_logits(queries, list_k, tile.bias, exact).softmax(-1)
            ds = (tile_dout @ list_v.mT).sub_(delta).mul_(p)
            if exact:
                visible = (tile.bias > float("-inf")) & tile_rows
                p, ds = p.masked_fill_(~visible, 0.0), ds.masked_fill_(~visible, 0.0)
                tile_dq = visible_matmul(ds, visible, list_k)
                tile_dk = visible_matmul(ds.mT, visible.mT, queries)
                tile_dv = visible_matmul(p.mT, visible.mT, tile_dout)
            else:
                p, ds = p.masked_fill_(~tile_rows, 0.0), ds.masked_fill_(~tile_rows, 0.0)
                tile_dq, tile_dk, tile_dv = ds @ list_k, ds.mT @ queries, p.mT @ tile_dout
            old_dq = dq[:, :, tile.rows]
            old_dq.copy_(torch.where(tile_rows, (tile_dq * softmax_scale).to(dq.dtype), old_dq))
            for total, gradient in zip(sums, (tile_dk, tile_dv), strict=True):
                total.add(tile, gradient)
        dk, dv = (total.total() for total in sums)
        if not ((dq.isnan() & rows).any() | dk.isnan().any() | dv.isnan().any()):
            break
    return dk, dv


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
