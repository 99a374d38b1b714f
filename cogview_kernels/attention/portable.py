"""PyTorch formulations of the attention: any device, any floating dtype, never ``Sq x Sk``.

Each query has a list of keys, so that work and memory follow the keys attended:

    list   = text prefix ++ pivots before the window ++ window          the virtual key list
    s      = softmax_scale * q list^T + bias, -inf where the row may not look
    lse    = log sum exp s;  p = softmax(s);  out = p v                 forward
    ds     = p * (dout v^T - (delta - dlse)),  delta = sum(dout * out)   backward, s recomputed
    dq     = softmax_scale * ds k;  dk = softmax_scale * ds^T q;  dv = p^T dout

On the CPU torch's flash kernels compute the window of all blocks in one call and the far keys (text
and pivots, gathered once) in one call for every 256 queries; lse merges the parts. The blocked path
lists the keys of a tile of queries and takes one softmax. It computes what those kernels cannot:
other devices, and rows with entries or an lse that are too large, or with a gradient of lse. Which
path computes a row depends on nothing that the row does not see.

Backward keeps q, k, v, out and lse between the passes. Rounding points: products and sums are
float32 (float64 for float64 inputs); out, dq, dk and dv are rounded once. Merging, and p taken from
lse, add ``|lse|`` roundings of p, which is bounded (``_FLASH_SUM_ERROR``).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_kernels.attention.layout import window_start
from cogview_kernels.attention.reference import visible_matmul

_TILE_ROWS = 64  # rows per tile where query_window is smaller
_MAX_TILE_ROWS = 256  # and where it is larger


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


class _Layout(NamedTuple):
    text_len: Tensor  # (B,)
    pivot_idx: Tensor  # (B, P)
    query_window: int
    key_window_times: int
    text_bias: float
    pivot_bias: float


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
    out = empty_heads(q, dtype)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    if out.numel() == 0:
        return out.to(q.dtype), lse
    layout = _Layout(text_len, pivot_idx, query_window, key_window_times, text_bias, pivot_bias)
    if _flash_takes(q, layout, softmax_scale):
        left = _flash_forward_into(out, lse, q, k, v, layout, softmax_scale)
    else:
        left = torch.ones_like(lse, dtype=torch.bool)
    if left.any():
        _blocked_forward_into(out, lse, q, k, v, layout, softmax_scale, left)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` with the shapes and dtypes of q, k, v. Deterministic.

    ``lse`` of the forward saves two of seven products; without it they are computed again.
    """
    dtype = _accumulate_dtype(q.dtype)
    dq = empty_heads(q, dtype)
    dk, dv = (empty_heads(tensor, dtype).zero_() for tensor in (k, v))
    if out.numel() > 0:
        layout = _Layout(text_len, pivot_idx, query_window, key_window_times, text_bias, pivot_bias)
        left = dlse != 0
        if not _flash_takes(q, layout, softmax_scale):
            left.fill_(True)
        if not left.all():
            read = dout, q, k, v, out, lse
            left |= _flash_backward_into(dq, dk, dv, *read, layout, softmax_scale, left)
        if left.any():
            inputs = dout, dlse, q, k, v, out
            _blocked_backward_into(dq, dk, dv, *inputs, layout, softmax_scale, left)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# Flash: torch's kernels for the CPU. They read the windows in place.


def _find_flash(aten: Any) -> tuple[Any, Any]:
    """The forward and the backward. torch may drop them, as they are not public: then ``None``, and
    the blocked path computes everything."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return getattr(aten, name, None), getattr(aten, f"{name}_backward", None)


_flash_forward, _flash_backward = _find_flash(torch.ops.aten)
_FLASH_FAR_ROWS = 256  # that share a call for their far keys: the kernels' gain ends here
_FLASH_KEY_ROWS = 1024  # of gradients that one call of the backward returns for each head
# With entries and scale up to this size no product or sum of the kernels leaves float32's range.
# They may lose a NaN, so none is given to them.
_FLASH_LARGEST = 2.0**24
# Parts of a row are merged, and p is recomputed, by a rounded lse: then p sums to 1 within
# |lse| eps / 2. Rows where that is more than this are left to the blocked path.
_FLASH_SUM_ERROR = 2.0**-19


def _flash_takes(q: Tensor, layout: _Layout, softmax_scale: float) -> bool:
    largest = max(abs(layout.text_bias), abs(layout.pivot_bias), softmax_scale)
    exist = None not in (_flash_forward, _flash_backward)
    # The kernels hide keys before they scale.
    return exist and q.device.type == "cpu" and softmax_scale > 0 and largest <= _FLASH_LARGEST


def _flash_inputs(
    layout: _Layout, k: Tensor, v: Tensor, *of_queries: Tensor
) -> tuple[list[_Sample], list[Tensor], Tensor]:
    """The samples and ``of_queries`` (q first), zeros in place of rows with large entries; and the
    queries ``(B, H, Sq)`` that see one, in k, in v or in their own rows.

    Whatever stands in keys that a query does not see, it is computed in the same way.
    """
    samples = list(_samples(of_queries[0], k, v, layout))
    read = [t for sample in samples for t in (sample.k, sample.v, sample.far_k, sample.far_v)]
    rows = torch.zeros(of_queries[0].shape[:3], dtype=torch.bool)
    if all(map(_is_small, (*of_queries, *read))):
        return samples, list(of_queries), rows
    for tensor in of_queries:
        rows |= _large_rows(tensor)
    large = (_large_rows(k) | _large_rows(v)).unsqueeze(3)
    for tile in _tiles(of_queries[0], large, large, layout, 1.0):
        seen = (tile.bias > float("-inf")) & tile.keys.mT.bool()  # (B, G, rows, columns)
        rows[:, :, tile.rows] |= seen.any(-1).repeat_interleave(rows.shape[1] // k.shape[1], 1)
    k, v, *small = (t.masked_fill(_large_rows(t).unsqueeze(3), 0.0) for t in (k, v, *of_queries))
    return list(_samples(small[0], k, v, layout)), small, rows


def _is_small(tensor: Tensor) -> bool:
    """Whether the root of the sum of squares, and so each entry, is small; one pass."""
    norm = torch.linalg.vector_norm(tensor, dtype=_accumulate_dtype(tensor.dtype))
    return bool(norm <= _FLASH_LARGEST)


def _large_rows(tensor: Tensor) -> Tensor:
    """``(B, H, S)``: rows of ``(B, H, S, D)`` with an entry that is not small."""
    largest = tensor.abs().amax(-1).to(_accumulate_dtype(tensor.dtype))
    return ~(largest <= _FLASH_LARGEST)  # in float16 the bound would be infinity


def _large_lse(lse: Tensor) -> Tensor:
    return ~(lse.abs() * (torch.finfo(lse.dtype).eps / 2) <= _FLASH_SUM_ERROR)


def _flash_forward_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: _Layout,
    softmax_scale: float,
) -> Tensor:
    """Writes ``out`` and ``lse``; the rows that are left to the blocked path."""
    samples, (q,), left = _flash_inputs(layout, k, v, q)
    for b, sample in enumerate(samples):
        queries = _all_heads(q[b], q.shape[1], out.dtype)
        _sample_forward(queries, sample, softmax_scale, out[b], lse[b].unsqueeze(2))
    # The first blocks see no far keys: nothing of them was merged.
    merged = max(0, layout.query_window * layout.key_window_times - k.shape[2] + q.shape[2])
    left[:, :, merged:] |= _large_lse(lse[:, :, merged:])
    return left


def _flash_backward_into(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    layout: _Layout,
    softmax_scale: float,
    left_before: Tensor,
) -> Tensor:
    """Writes dq and adds to dk and dv; the rows that are left to the blocked path."""
    samples, (q, dout, out), left = _flash_inputs(layout, k, v, q, dout, out)
    left |= left_before
    for b, sample in enumerate(samples):
        queries, douts, outs = (_all_heads(t[b], q.shape[1], dq.dtype) for t in (q, dout, out))
        if lse is None:
            column = dq.new_empty(*queries.shape[:2], 1)
            _sample_forward(queries, sample, softmax_scale, torch.empty_like(queries), column)
        else:
            column = lse[b].unsqueeze(2)
        left[b] |= _large_lse(column.squeeze(2))
        if left[b].all():
            continue
        if left[b].any():
            rows = left[b].unsqueeze(2)
            douts, outs = (t.masked_fill(rows, 0.0) for t in (douts, outs))
            column = column.masked_fill(rows, float("inf"))  # p = 0
        grads = dq[b], dk[b], dv[b]
        _sample_backward(douts, queries, sample, outs, column, softmax_scale, *grads)
    return left


class _Call(NamedTuple):
    """One call of a flash kernel: ``num`` blocks of rows, ``step`` apart, each with its keys."""

    num: int
    step: int
    row: int  # the first block's first row of q
    rows: int
    key: int  # and its first key, of the window or of the far keys
    keys: int
    bias: Tensor | None  # broadcasts to (1, 1, rows, keys)
    causal: bool = False

    def queries(self, tensor: Tensor) -> Tensor:
        """Rows of ``(H, Sq, D)``: ``(num, H, rows, D)``, a view."""
        return self._blocks(tensor, self.row, self.rows)

    def list(self, tensor: Tensor) -> Tensor:
        """Keys of ``(H, Sk, D)``: ``(num, H, keys, D)``, a view whose blocks may overlap."""
        return self._blocks(tensor, self.key, self.keys)

    def add_to_keys(self, total: Tensor, gradient: Tensor) -> None:
        """Add ``(num, H, keys, D)`` to ``(H, Sk, D)``; pieces of ``step`` keys do not overlap."""
        for begin in range(0, self.keys, self.step):
            size = min(self.step, self.keys - begin)
            piece = gradient[:, :, begin : begin + size]
            self._blocks(total, self.key + begin, size).add_(piece)

    def split(self, max_keys: int) -> Iterator[_Call]:
        num = max(1, max_keys // self.keys)
        for block in range(0, self.num, num):
            yield self._replace(
                num=min(num, self.num - block),
                row=self.row + block * self.step,
                key=self.key + block * self.step,
            )

    def _blocks(self, tensor: Tensor, begin: int, size: int) -> Tensor:
        end = begin + (self.num - 1) * self.step + size
        return tensor[:, begin:end].unfold(1, size, self.step).permute(1, 0, 3, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return _flash_forward(
            self.queries(q),
            self.list(k),
            self.list(v),
            is_causal=self.causal,
            attn_mask=self.bias,
            scale=scale,
        )

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """lse: ``(H, Sq, 1)``, of all keys of a row, as out."""
        return _flash_backward(
            self.queries(dout),
            self.queries(q),
            self.list(k),
            self.list(v),
            self.queries(out),
            self.queries(lse).squeeze(3),
            0.0,
            self.causal,
            attn_mask=self.bias,
            scale=scale,
        )


class _Sample(NamedTuple):
    """What the kernels read of one sample, and their calls."""

    k: Tensor  # (H, Sk - first key of any window, D), as v
    v: Tensor
    far_position: Tensor  # (L,) of the keys that some row sees in front of its window
    far_k: Tensor  # (H, L, D)
    far_v: Tensor
    # Calls are made one at a time: their biases together may take (queries) x (keys).
    near: Callable[[], Iterator[_Call]]  # the windows: each row once
    far: Callable[[], Iterator[_Call]]


def _edges(begin: int, end: int, block: int, max_rows: int) -> list[tuple[int, int]]:
    """``[begin, end)`` cut at multiples of ``block``, each block cut into ``max_rows``."""
    pieces = []
    while begin < end:
        start = begin // block * block
        stop = start + ((begin - start) // max_rows + 1) * max_rows
        pieces.append((begin, min(stop, start + block, end)))
        begin = pieces[-1][1]
    return pieces


def _near_calls(q_len: int, k_len: int, w: int, n: int, like: Tensor) -> Iterator[_Call]:
    first = k_len - q_len
    origin = _first_key(first, w, n)
    begin = first
    if first == 0:  # the first n blocks see everything
        begin = min(n * w, k_len)
        yield _Call(1, begin, 0, begin, 0, begin, None, causal=True)
    block = w * max(1, _TILE_ROWS // w)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for start, stop in _edges(begin, k_len, block, _MAX_TILE_ROWS):
        alike = start % block, stop - start, max(0, (n - 1) * w - start)
        groups.setdefault(alike, []).append(start)
    for (_, rows, _), starts in groups.items():
        start = starts[0]
        key = _first_key(start, w, n)
        i = torch.arange(start, start + rows, device=like.device).unsqueeze(1)
        j = torch.arange(key, start + rows, device=like.device)
        hidden = (j < window_start(i, w, n)) | (j > i)
        bias = like.new_zeros(1, 1, *hidden.shape).masked_fill_(hidden, float("-inf"))
        yield _Call(len(starts), block, start - first, rows, key - origin, len(j), bias)


def _far_calls(
    q_len: int, k_len: int, w: int, n: int, position: Tensor, bias: Tensor
) -> Iterator[_Call]:
    first = k_len - q_len
    positions: list[int] = position.tolist()
    if not positions:
        return
    begin = max(first, (positions[0] // w + n) * w)  # earlier rows see no far key
    for start, stop in _edges(begin, k_len, w * max(1, _FLASH_FAR_ROWS // w), _FLASH_FAR_ROWS):
        rows = stop - start
        by_all, by_some = (
            bisect.bisect_left(positions, _first_key(i, w, n)) for i in (start, stop - 1)
        )
        call_bias = bias[:by_some].expand(1, 1, rows, -1) if bias.any() else None
        if by_all < by_some:
            i = torch.arange(start, stop, device=bias.device).unsqueeze(1)
            hidden = position[:by_some] >= window_start(i, w, n)
            call_bias = bias[:by_some].masked_fill(hidden, float("-inf")).expand(1, 1, -1, -1)
        yield _Call(1, rows, start - first, rows, 0, by_some, call_bias)


def _samples(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: _Layout,
) -> Iterator[_Sample]:
    text_len, pivot_idx, w, n, text_bias, pivot_bias = layout
    dtype = _accumulate_dtype(q.dtype)
    (_, num_heads, q_len, _), k_len = q.shape, k.shape[2]
    last = _first_key(k_len - 1, w, n)
    origin = _first_key(k_len - q_len, w, n)
    near = functools.partial(_near_calls, q_len, k_len, w, n, q.new_empty(0, dtype=dtype))
    for b in range(q.shape[0]):
        prefix = max(int(text_len[b]), 0)
        pivots = pivot_idx[b].long()
        pivots = pivots[(pivots >= prefix) & (pivots < last)].sort().values
        prefix = min(prefix, last)
        position = torch.cat([torch.arange(prefix, device=pivots.device), pivots])
        bias = torch.full(position.shape, pivot_bias, dtype=dtype, device=pivots.device)
        bias[:prefix] = text_bias
        window_k, window_v, far_k, far_v = (
            _all_heads(t, num_heads, dtype)
            for t in (
                k[b, :, origin:],
                v[b, :, origin:],
                _gather_sample(k[b], position),
                _gather_sample(v[b], position),
            )
        )
        far = functools.partial(_far_calls, q_len, k_len, w, n, position, bias)
        yield _Sample(window_k, window_v, position, far_k, far_v, near, far)


def _gather_sample(tensor: Tensor, position: Tensor) -> Tensor:
    """Rows ``position`` of ``(G, S, D)``. Along another dimension than the first, ``index_select``
    copies the whole of a view, such as a cache, before it reads the rows."""
    return tensor.transpose(0, 1).index_select(0, position).transpose(0, 1)


def _all_heads(tensor: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """``(G, S, D)`` for each query head, and with rows that do not overlap, as products need it."""
    tensor = tensor.to(dtype)
    if tensor.shape[0] != num_heads:
        return tensor.repeat_interleave(num_heads // tensor.shape[0], 0)
    return tensor if tensor.stride(1) >= tensor.shape[2] else tensor.contiguous()


def _sample_forward(
    q: Tensor, sample: _Sample, softmax_scale: float, out: Tensor, lse: Tensor
) -> None:
    """Of ``q (H, Sq, D)``; writes ``out (H, Sq, D)`` and ``lse (H, Sq, 1)``."""
    for call in sample.near():
        call_out, call_lse = call.forward(q, sample.k, sample.v, softmax_scale)
        call.queries(out).copy_(call_out)
        call.queries(lse).copy_(call_lse.unsqueeze(3))
    for call in sample.far():
        far_out, far_lse = call.forward(q, sample.far_k, sample.far_v, softmax_scale)
        near_out, near_lse, far_lse = call.queries(out), call.queries(lse), far_lse.unsqueeze(3)
        near_out.lerp_(far_out, (far_lse - near_lse).sigmoid())
        near_lse.copy_(torch.logaddexp(near_lse, far_lse))


def _sample_backward(
    dout: Tensor,
    q: Tensor,
    sample: _Sample,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Of ``q (H, Sq, D)``; writes dq, and adds to ``dk, dv (G, Sk, D)``."""
    num_heads, num_kv_heads = q.shape[0], dk.shape[0]
    near = [total[:, total.shape[1] - sample.k.shape[1] :] for total in (dk, dv)]
    grouped = num_heads != num_kv_heads
    if grouped:
        near = [torch.zeros_like(t) for t in (sample.k, sample.v)]
    far = [torch.zeros_like(t) for t in (sample.far_k, sample.far_v)]
    for call in (part for whole in sample.near() for part in whole.split(_FLASH_KEY_ROWS)):
        inputs = dout, q, sample.k, sample.v, out, lse, softmax_scale
        call_dq, *call_dkv = call.backward(*inputs)
        call.queries(dq).copy_(call_dq)
        for total, gradient in zip(near, call_dkv, strict=True):
            call.add_to_keys(total, gradient)
    for call in sample.far():
        inputs = dout, q, sample.far_k, sample.far_v, out, lse, softmax_scale
        call_dq, *call_dkv = call.backward(*inputs)
        call.queries(dq).add_(call_dq)
        for total, gradient in zip(far, call_dkv, strict=True):
            call.add_to_keys(total, gradient)
    for total, of_window, of_far in zip((dk, dv), near, far, strict=True):
        if grouped:
            of_window, of_far = (
                part.unflatten(0, (num_kv_heads, -1)).sum(1) for part in (of_window, of_far)
            )
            total[:, total.shape[1] - of_window.shape[1] :] += of_window
        total.index_add_(1, sample.far_position, of_far)


# Blocked: any device, any logits, NaN and infinity.


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


def _far_keys(q_len: int, k_len: int, layout: _Layout, dtype: torch.dtype) -> _FarKeys:
    text_len, pivot_idx, w, n, text_bias, pivot_bias = layout
    starts = [_first_key(end - 1, w, n) for _, end in _tile_edges(q_len, k_len, w)]
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
    layout: _Layout,
    softmax_scale: float,
) -> Iterator[_Tile]:
    dtype, (w, n) = _accumulate_dtype(q.dtype), layout[2:4]
    far = _far_keys(q.shape[2], k.shape[2], layout, dtype)
    edges = _tile_edges(q.shape[2], k.shape[2], w)
    far_k, far_v = (_gather(t, far.position, dtype) for t in (k, v))
    first_row = k.shape[2] - q.shape[2]
    for tile, (begin, end) in enumerate(edges):
        rows = slice(begin - first_row, end - first_row)
        window = slice(_first_key(begin, w, n), end)
        num_far = far.num_visible[tile]
        yield _Tile(
            rows,
            window,
            num_far,
            _by_group(q, rows, k.shape[1], dtype) * softmax_scale,
            torch.cat([far_k[:, :, :num_far], k[:, :, window].to(dtype)], dim=2),
            torch.cat([far_v[:, :, :num_far], v[:, :, window].to(dtype)], dim=2),
            _tile_bias(begin, end, window, far, tile, w, n),
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


def _blocked_forward_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: _Layout,
    softmax_scale: float,
    wanted: Tensor,
) -> None:
    """Writes the rows ``wanted (B, H, Sq)`` of ``out`` and ``lse``."""
    for exact in (False, True):
        for tile in _tiles(q, k, v, layout, softmax_scale):
            rows = wanted[:, :, tile.rows]
            if not rows.any():
                continue
            logits = _tile_logits(tile.queries, tile.keys, tile.bias, exact)
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


def _blocked_backward_into(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    layout: _Layout,
    softmax_scale: float,
    wanted: Tensor,
) -> None:
    """Writes the rows ``wanted (B, H, Sq)`` of dq, and adds their part to dk and dv."""
    dtype = dq.dtype
    position = _far_keys(q.shape[2], k.shape[2], layout, dtype).position
    # Positions are unique in each row; padding has zeros for whichever key it is added to.
    far_index = position.clamp_max(k.shape[2] - 1)[:, None, :, None]
    far_index = far_index.expand(-1, k.shape[1], -1, k.shape[3])
    for exact in (False, True):
        part_dk, part_dv = (torch.zeros_like(t) for t in (dk, dv))
        far_dk, far_dv = (dk.new_zeros(far_index.shape) for _ in range(2))
        for tile in _tiles(q, k, v, layout, softmax_scale):
            rows = wanted[:, :, tile.rows]
            if not rows.any():
                continue
            tile_dout, tile_out, tile_dlse, of_rows = (
                _by_group(tensor, tile.rows, k.shape[1], dtype)
                for tensor in (dout, out, dlse, wanted)
            )
            delta = (tile_dout * tile_out).sum(-1, keepdim=True) - tile_dlse
            p = _tile_logits(tile.queries, tile.keys, tile.bias, exact).softmax(-1)
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
