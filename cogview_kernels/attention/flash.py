"""The portable attention on torch's flash kernels for the CPU.

One call computes the windows of all blocks, which the kernels read in place; one call for every 256
queries computes the far keys (text and pivots, gathered once); lse merges the parts.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_kernels.attention import blocked
from cogview_kernels.attention.blocked import (
    MAX_TILE_ROWS,
    TILE_ROWS,
    Regions,
    accumulate_dtype,
    first_key,
)
from cogview_kernels.attention.layout import window_start


def _find(aten: Any) -> tuple[Any, Any]:
    """The forward and the backward. torch may drop them, as they are not public: then ``None``, and
    the blocked path computes everything."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return getattr(aten, name, None), getattr(aten, f"{name}_backward", None)


_forward, _backward = _find(torch.ops.aten)
_FAR_ROWS = 256  # that share a call for their far keys: the kernels' gain ends here
_KEY_ROWS = 1024  # of gradients that one call of the backward returns for each head
# Samples with one query each: here it is one call for a sample, in blocks one for all of them.
_MAX_SINGLE_QUERIES = 4
# With entries and scale up to this size no product or sum of the kernels leaves float32's range.
# They may lose a NaN, so none is given to them.
_LARGEST = 2.0**24
# Parts of a row are merged, and p is recomputed, by a rounded lse: then p sums to 1 within
# |lse| eps / 2. Rows where that is more than this are left to the blocked path.
_SUM_ERROR = 2.0**-19


def takes(q: Tensor, regions: Regions, softmax_scale: float) -> bool:
    """Whether the kernels exist, and compute such a call on the device of ``q``."""
    largest = max(abs(regions.text_bias), abs(regions.pivot_bias), softmax_scale)
    exist = None not in (_forward, _backward) and q.device.type == "cpu"
    # The kernels hide keys before they scale.
    right = softmax_scale > 0 and largest <= _LARGEST
    return exist and right and (q.shape[2] > 1 or q.shape[0] <= _MAX_SINGLE_QUERIES)


def _inputs(
    regions: Regions, k: Tensor, v: Tensor, *of_queries: Tensor
) -> tuple[list[_Sample], list[Tensor], Tensor]:
    """The samples and ``of_queries`` (q first), zeros in place of rows with large entries; and the
    queries ``(B, H, Sq)`` that see one, in k, in v or in their own rows.

    Whatever stands in keys that a query does not see, it is computed in the same way.
    """
    samples = list(_samples(of_queries[0], k, v, regions))
    if samples[0].k.shape[1] == k.shape[2]:  # the windows hold all keys
        read = [k, v]
    else:
        read = [t for sample in samples for t in (sample.k, sample.v, sample.far_k, sample.far_v)]
    rows = torch.zeros(of_queries[0].shape[:3], dtype=torch.bool)
    if all(map(_is_small, (*of_queries, *read))):
        return samples, list(of_queries), rows
    for tensor in of_queries:
        rows |= _large_rows(tensor)
    large = (_large_rows(k) | _large_rows(v)).unsqueeze(3)
    for tile in blocked.tiles(of_queries[0], large, large, regions, 1.0):
        seen = (tile.bias > float("-inf")) & tile.keys.mT.bool()  # (B, G, rows, columns)
        rows[:, :, tile.rows] |= seen.any(-1).repeat_interleave(rows.shape[1] // k.shape[1], 1)
    k, v, *small = (t.masked_fill(_large_rows(t).unsqueeze(3), 0.0) for t in (k, v, *of_queries))
    return list(_samples(small[0], k, v, regions)), small, rows


def _is_small(tensor: Tensor) -> bool:
    """Whether the root of the sum of squares, and so each entry, is small; one pass. In one step,
    the norm of a view such as q takes three times as long."""
    norms = torch.linalg.vector_norm(tensor, dim=-1, dtype=accumulate_dtype(tensor.dtype))
    return bool(torch.linalg.vector_norm(norms) <= _LARGEST)


def _large_rows(tensor: Tensor) -> Tensor:
    """``(B, H, S)``: rows of ``(B, H, S, D)`` with an entry that is not small."""
    largest = tensor.abs().amax(-1).to(accumulate_dtype(tensor.dtype))
    return ~(largest <= _LARGEST)  # in float16 the bound would be infinity


def _large_lse(lse: Tensor) -> Tensor:
    return ~(lse.abs() * (torch.finfo(lse.dtype).eps / 2) <= _SUM_ERROR)


def forward_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions,
    softmax_scale: float,
) -> Tensor:
    """Writes ``out`` and ``lse``; the rows that are left to the blocked path."""
    if q.shape[2] == 1:
        return _one_query_forward_into(out, lse, q, k, v, regions, softmax_scale)
    samples, (q,), left = _inputs(regions, k, v, q)
    for b, sample in enumerate(samples):
        queries = _all_heads(q[b], q.shape[1], out.dtype)
        _sample_forward(queries, sample, softmax_scale, out[b], lse[b].unsqueeze(2))
    # The first blocks see no far keys: nothing of them was merged.
    merged = max(0, regions.query_window * regions.key_window_times - k.shape[2] + q.shape[2])
    left[:, :, merged:] |= _large_lse(lse[:, :, merged:])
    return left


def _one_query_forward_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions,
    softmax_scale: float,
) -> Tensor:
    """:func:`forward_into` for one query, as in generation: all its keys in one call of the kernel.
    So little is computed that the number of calls decides."""
    text_len, pivot_idx, w, n, text_bias, pivot_bias = regions
    k_len, start = k.shape[2], first_key(k.shape[2] - 1, w, n)
    left = torch.zeros(lse.shape, dtype=torch.bool)
    for b, prefix in enumerate(text_len.clamp(min=0).tolist()):
        pivots = pivot_idx[b]
        pivots = pivots[(pivots >= prefix) & (pivots < start)].long()
        prefix = min(prefix, start)
        position = torch.cat([torch.arange(prefix), pivots, torch.arange(start, k_len)])
        queries, keys, values = (
            _all_heads(tensor, q.shape[1], out.dtype)
            for tensor in (q[b], _gather_sample(k[b], position), _gather_sample(v[b], position))
        )
        if not all(map(_is_small, (queries, keys, values))):
            left[b] = True
            continue
        bias = None
        if text_bias != 0 or pivot_bias != 0:
            bias = queries.new_zeros(1, 1, 1, len(position))
            bias[..., :prefix] = text_bias
            bias[..., prefix : prefix + len(pivots)] = pivot_bias
        inputs = (tensor.unsqueeze(0) for tensor in (queries, keys, values))
        results = _forward(*inputs, 0.0, False, attn_mask=bias, scale=softmax_scale)
        out[b], lse[b] = results[0][0], results[1][0]
    return left


def backward_into(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    regions: Regions,
    softmax_scale: float,
    left_before: Tensor,
) -> Tensor:
    """Writes dq and adds to dk and dv; the rows that are left to the blocked path."""
    samples, (q, dout, out), left = _inputs(regions, k, v, q, dout, out)
    left |= left_before
    if lse is None:
        lse = dq.new_empty(q.shape[:3])
        for b, sample in enumerate(samples):
            queries = _all_heads(q[b], q.shape[1], dq.dtype)
            ignored = torch.empty_like(queries)
            _sample_forward(queries, sample, softmax_scale, ignored, lse[b].unsqueeze(2))
    left |= _large_lse(lse)
    some_left = bool(left.any())
    for b, sample in enumerate(samples):
        queries, douts, outs = (_all_heads(t[b], q.shape[1], dq.dtype) for t in (q, dout, out))
        column = lse[b].unsqueeze(2)
        if some_left:
            rows = left[b].unsqueeze(2)
            if rows.all():
                continue
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
        return _forward(
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
        return _backward(
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
    near: list[_Call]  # the windows: each row once; the same for all samples
    # Made one at a time: their biases together may take (queries) x (keys).
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
    origin = first_key(first, w, n)
    begin = first
    if first == 0:  # the first n blocks see everything
        begin = min(n * w, k_len)
        yield _Call(1, begin, 0, begin, 0, begin, None, causal=True)
    block = w * max(1, TILE_ROWS // w)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for start, stop in _edges(begin, k_len, block, MAX_TILE_ROWS):
        alike = start % block, stop - start, max(0, (n - 1) * w - start)
        groups.setdefault(alike, []).append(start)
    for (_, rows, _), starts in groups.items():
        start = starts[0]
        key = first_key(start, w, n)
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
    for start, stop in _edges(begin, k_len, w * max(1, _FAR_ROWS // w), _FAR_ROWS):
        rows = stop - start
        by_all, by_some = (
            bisect.bisect_left(positions, first_key(i, w, n)) for i in (start, stop - 1)
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
    regions: Regions,
) -> Iterator[_Sample]:
    text_len, pivot_idx, w, n, text_bias, pivot_bias = regions
    dtype = accumulate_dtype(q.dtype)
    (_, num_heads, q_len, _), k_len = q.shape, k.shape[2]
    last = first_key(k_len - 1, w, n)
    origin = first_key(k_len - q_len, w, n)
    near = list(_near_calls(q_len, k_len, w, n, q.new_empty(0, dtype=dtype)))
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
    if not tensor.is_contiguous():
        return tensor.transpose(0, 1).index_select(0, position).transpose(0, 1)
    num_heads, seqlen, _ = tensor.shape
    rows = position + seqlen * torch.arange(num_heads).unsqueeze(1)
    return tensor.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


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
    for call in sample.near:
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
    for call in (part for whole in sample.near for part in whole.split(_KEY_ROWS)):
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
