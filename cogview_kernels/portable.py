"""Blocked PyTorch formulations: any device, any floating dtype, never ``Sq x Sk``.

Attention, for each tile of query rows: the keys it may attend to are listed (text and pivots
gathered once per call, the window a slice), so that work and memory follow the keys attended:

    list   = text prefix ++ pivots before the window ++ window          the virtual key list
    s      = softmax_scale * q list^T + bias, -inf where the row may not look
    lse    = log sum exp s;  p = exp(s - lse);  out = p v               forward
    ds     = p * (dout v^T - (delta - dlse)),  delta = sum(dout * out)   backward, s recomputed
    dq     = softmax_scale * ds k;  dk = softmax_scale * ds^T q;  dv = p^T dout

Backward keeps nothing but q, k, v, out and lse between the passes. Rounding points: products and
sums are float32 (float64 for float64 inputs); out, dq, dk and dv are rounded once.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_kernels.layout import window_start
from cogview_kernels.reference import visible_matmul

_TILE_ROWS = 64  # rows per tile where query_window is smaller
_MAX_TILE_ROWS = 256  # and where it is larger


class _FarKeys(NamedTuple):
    """The text prefix and the pivots of each sample, ascending, packed to the left."""

    position: Tensor  # (B, L) int64, padded with k_len, which no window starts behind
    bias: Tensor  # (B, L)
    num_visible: list[int]  # per tile: how many columns can be visible to one of its rows


class _Problem(NamedTuple):
    """One call's geometry, shared by forward and backward."""

    q_len: int
    k_len: int
    query_window: int
    key_window_times: int
    far: _FarKeys
    tiles: list[tuple[int, int]]  # query positions [begin, end) of each tile


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _first_key(position: int, query_window: int, key_window_times: int) -> int:
    return max(0, (position // query_window - key_window_times + 1) * query_window)


def _plan(
    q: Tensor,
    k: Tensor,
    text_len: Tensor,
    pivot_idx: Tensor,
    query_window: int,
    key_window_times: int,
    text_bias: float,
    pivot_bias: float,
) -> _Problem:
    q_len, k_len = q.shape[2], k.shape[2]
    if query_window < _TILE_ROWS:
        rows = query_window * (_TILE_ROWS // query_window)
    else:
        rows = min(query_window, _MAX_TILE_ROWS)
    first = k_len - q_len
    edges = [first, *range((first // rows + 1) * rows, k_len, rows), k_len]
    tiles = list(itertools.pairwise(edges))
    starts = [_first_key(end - 1, query_window, key_window_times) for _, end in tiles]
    last = starts[-1]

    # Text first, then pivots; whatever no row can see becomes padding and sorts to the right.
    prefix = text_len.long().clamp(0, last).unsqueeze(1)
    text = torch.arange(int(prefix.max()), device=q.device)
    text = torch.where(text < prefix, text, k_len)
    pivots = pivot_idx.long()
    counts = (pivots >= text_len.clamp_min(0).unsqueeze(1)) & (pivots < last)
    pivots = torch.where(counts, pivots, k_len)
    position = torch.cat([text, pivots], dim=1).sort(dim=1).values
    bound = torch.tensor(starts, device=q.device).expand(position.shape[0], -1).contiguous()
    visible = torch.searchsorted(position, bound)
    num_visible = visible.amax(dim=0).tolist()
    position = position[:, : max(num_visible)]
    dtype = _accumulate_dtype(q.dtype)
    bias = torch.full(position.shape, pivot_bias, dtype=dtype, device=q.device)
    bias.masked_fill_(position < prefix, text_bias)
    far = _FarKeys(position, bias, num_visible)
    return _Problem(q_len, k_len, query_window, key_window_times, far, tiles)


def _gather(tensor: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``position (B, L)`` of ``tensor (B, G, Sk, D)``, the same for all heads; padding reads
    the last row."""
    index = position.clamp_max(tensor.shape[2] - 1)[:, None, :, None]
    index = index.expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index).to(dtype)


def _tile_bias(problem: _Problem, tile: int, first_key: int) -> Tensor:
    """What is added to a tile's logits: ``(B, 1, rows, keys)``, ``-inf`` where not visible."""
    begin, end = problem.tiles[tile]
    position, bias, num_visible = problem.far
    device = position.device
    i = torch.arange(begin, end, device=device).unsqueeze(1)
    start = window_start(i, problem.query_window, problem.key_window_times)
    j = torch.arange(first_key, end, device=device)
    hidden = float("-inf")
    window = torch.zeros(end - begin, end - first_key, dtype=bias.dtype, device=device)
    window = window.masked_fill((j < start) | (j > i), hidden)
    far = bias[:, None, : num_visible[tile]].expand(-1, end - begin, -1)
    far = far.masked_fill(position[:, None, : num_visible[tile]] >= start, hidden)
    return torch.cat([far, window.expand(far.shape[0], -1, -1)], dim=2).unsqueeze(1)


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
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, k_len = k.shape[1:3]
    dtype = _accumulate_dtype(q.dtype)
    out = q.new_empty(batch, num_heads, q_len, head_dim)
    lse = q.new_empty(batch, num_heads, q_len, dtype=dtype)
    if out.numel() == 0:
        return out, lse
    problem = _plan(
        q, k, text_len, pivot_idx, query_window, key_window_times, text_bias, pivot_bias
    )
    far_k, far_v = (_gather(t, problem.far.position, dtype) for t in (k, v))
    grouped = (batch, num_kv_heads, num_heads // num_kv_heads)

    for tile, (begin, end) in enumerate(problem.tiles):
        rows = slice(begin - (k_len - q_len), end - (k_len - q_len))
        first_key = _first_key(begin, query_window, key_window_times)
        count = problem.far.num_visible[tile]
        keys = torch.cat([far_k[:, :, :count], k[:, :, first_key:end].to(dtype)], dim=2)
        values = torch.cat([far_v[:, :, :count], v[:, :, first_key:end].to(dtype)], dim=2)
        queries = q[:, :, rows].to(dtype).reshape(*grouped[:2], -1, head_dim) * softmax_scale
        bias = _tile_bias(problem, tile, first_key)

        logits = _tile_logits(queries, keys, bias, exact=False)
        tile_lse = logits.logsumexp(-1, keepdim=True)
        tile_out = logits.sub_(tile_lse).exp_() @ values
        if tile_out.isnan().any():
            logits = _tile_logits(queries, keys, bias, exact=True)
            tile_lse = logits.logsumexp(-1, keepdim=True)
            visible = (bias > float("-inf")).repeat(1, 1, grouped[2], 1)
            weights = (logits - tile_lse).exp().masked_fill(~visible, 0.0)
            tile_out = visible_matmul(weights, visible, values)
        out[:, :, rows] = tile_out.view(batch, num_heads, -1, head_dim)
        lse[:, :, rows] = tile_lse.view(batch, num_heads, -1)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    text_len: Tensor,
    pivot_idx: Tensor,
    query_window: int,
    key_window_times: int,
    text_bias: float,
    pivot_bias: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` with the shapes and dtypes of q, k, v. Deterministic."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, k_len = k.shape[1:3]
    dtype = _accumulate_dtype(q.dtype)
    dq = q.new_empty(q.shape)
    dk = k.new_zeros(k.shape, dtype=dtype)
    dv = torch.zeros_like(dk)
    if out.numel() == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    problem = _plan(
        q, k, text_len, pivot_idx, query_window, key_window_times, text_bias, pivot_bias
    )
    far_k, far_v = (_gather(t, problem.far.position, dtype) for t in (k, v))
    far_dk, far_dv = torch.zeros_like(far_k), torch.zeros_like(far_v)
    grouped = (batch, num_kv_heads, num_heads // num_kv_heads)

    for tile, (begin, end) in enumerate(problem.tiles):
        rows = slice(begin - (k_len - q_len), end - (k_len - q_len))
        first_key = _first_key(begin, query_window, key_window_times)
        count = problem.far.num_visible[tile]
        keys = torch.cat([far_k[:, :, :count], k[:, :, first_key:end].to(dtype)], dim=2)
        values = torch.cat([far_v[:, :, :count], v[:, :, first_key:end].to(dtype)], dim=2)
        bias = _tile_bias(problem, tile, first_key)

        def by_group(tensor: Tensor, rows: slice = rows) -> Tensor:
            last = tensor.shape[3:] or (1,)
            return tensor[:, :, rows].to(dtype).reshape(*grouped[:2], -1, *last)

        queries = by_group(q) * softmax_scale
        tile_dout = by_group(dout)
        delta = (tile_dout * by_group(out)).sum(-1, keepdim=True) - by_group(dlse)
        tile_lse = by_group(lse)

        p = _tile_logits(queries, keys, bias, exact=False).sub_(tile_lse).exp_()
        ds = (tile_dout @ values.mT).sub_(delta).mul_(p)
        tile_dq, tile_dk, tile_dv = ds @ keys, ds.mT @ queries, p.mT @ tile_dout
        if (tile_dq.isnan().any() | tile_dk.isnan().any() | tile_dv.isnan().any()).item():
            visible = (bias > float("-inf")).repeat(1, 1, grouped[2], 1)
            p = (_tile_logits(queries, keys, bias, exact=True) - tile_lse).exp()
            p = p.masked_fill(~visible, 0.0)
            ds = (p * (tile_dout @ values.mT - delta)).masked_fill(~visible, 0.0)
            tile_dq = visible_matmul(ds, visible, keys)
            tile_dk = visible_matmul(ds.mT, visible.mT, queries)
            tile_dv = visible_matmul(p.mT, visible.mT, tile_dout)

        dq[:, :, rows] = (tile_dq * softmax_scale).view(batch, num_heads, -1, head_dim)
        far_dk[:, :, :count] += tile_dk[:, :, :count]
        far_dv[:, :, :count] += tile_dv[:, :, :count]
        dk[:, :, first_key:end] += tile_dk[:, :, count:]
        dv[:, :, first_key:end] += tile_dv[:, :, count:]

    # Positions are unique in each row, so every key gets one addition, and the last key also
    # zeros from the padding: the order of additions does not matter.
    index = problem.far.position.clamp_max(k_len - 1)[:, None, :, None].expand_as(far_dk)
    dk.scatter_add_(2, index, far_dk)
    dv.scatter_add_(2, index, far_dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: str | None
) -> Tensor:
    """PB-relax LayerNorm; see the public function. Ordinary differentiable PyTorch.

    With ``u = x / max|x|`` the norm is ``LN(8 u)``, and ``var(8 u) + eps = 64 (var(u) + eps/64)``:
    one division keeps everything in range, denormal rows included.
    """
    dtype = _accumulate_dtype(x.dtype)
    u, eps, _ = _relaxed(x.to(dtype), eps, relax)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return torch.nn.functional.layer_norm(u, u.shape[-1:], weight, bias, eps).to(x.dtype)


def _relaxed(x: Tensor, eps: float, relax: str | None) -> tuple[Tensor, float, Tensor]:
    """``u``, the eps that belongs to it, and by what ``x`` was divided."""
    if relax is None or x.numel() == 0:
        return x, eps, x.new_ones(())
    magnitude = x.detach().abs()
    peak = magnitude.amax(-1, keepdim=True) if relax == "row" else magnitude.amax()
    peak = peak.masked_fill(peak == 0, 8.0)
    return x / peak, eps / 64, peak


def layer_norm_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``cogview_kernels::pb_relax_layer_norm`` on the CPU, where programs exported
    from a GPU may run: ``y``, ``mean``, ``rstd`` of rows."""
    wide = x.to(_accumulate_dtype(x.dtype))
    u, scaled_eps, divisor = _relaxed(wide, eps, (None, "row", "tensor")[relax])
    var, mean = torch.var_mean(u, dim=-1, correction=0, keepdim=True)
    rstd = (var + scaled_eps).rsqrt()
    y = (u - mean) * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    mean, rstd = mean * divisor, (rstd / divisor).clamp_max(torch.finfo(torch.float32).max)
    return y.to(x.dtype), mean.squeeze(-1).float(), rstd.squeeze(-1).float()


def layer_norm_rows_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of :func:`layer_norm_rows`; ``parameters`` is the dtype of dweight and dbias."""
    wide = x.to(_accumulate_dtype(x.dtype))
    dy = dy.to(wide.dtype)
    xhat = (wide - mean.unsqueeze(1)) * rstd.unsqueeze(1)
    g = dy if weight is None else dy * weight
    dx = g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
    dx = (dx * rstd.unsqueeze(1)).to(x.dtype)
    if parameters is None:
        return dx, x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    return dx, (dy * xhat).sum(0).to(parameters), dy.sum(0).to(parameters)
