"""The norms in plain PyTorch: any device, any floating dtype."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_kernels.checks import values_readable


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: str | None
) -> Tensor:
    """PB-relax LayerNorm; see the public function. Ordinary differentiable PyTorch."""
    of_all = _peak(x, relax) if relax == "tensor" else None

    def norm(x: Tensor) -> Tensor:
        x = x.to(_accumulate_dtype(x.dtype))
        peak = _peak(x, relax) if of_all is None else of_all
        return _layer_norm(x, weight, bias, eps, peak).y

    return _in_pieces(norm, x, (x,), (weight, bias))


def sandwich_residual(
    f: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    dropped: Tensor | None,
    dropout_p: float,
    eps: float,
    relax: str | None,
    final_norm: bool,
) -> tuple[Tensor, Tensor | None]:
    """The step between two sub-layers; see the public function. Ordinary differentiable PyTorch.

    ``h`` is rounded once: the norm of ``f`` is added to ``residual`` before it is.
    """
    kept_scale = kept_scale_of(dropped, dropout_p)
    of_all = _peak(zero_dropped(f, dropped), relax, kept_scale) if relax == "tensor" else None

    def add(f: Tensor, residual: Tensor, dropped: Tensor | None) -> Tensor:
        f = zero_dropped(f, dropped).to(_accumulate_dtype(f.dtype))
        peak = _peak(f, relax, kept_scale) if of_all is None else of_all
        return residual + _layer_norm(f, post_weight, post_bias, eps, peak, kept_scale).y

    h = _in_pieces(add, residual, (f, residual, dropped), (post_weight, post_bias))
    return h, layer_norm(h, pre_weight, pre_bias, eps, relax) if final_norm else None


_PIECE = 2**18  # elements


def _in_pieces(
    function: Callable[..., Tensor],
    like: Tensor,
    inputs: tuple[Tensor | None, ...],
    parameters: tuple[Tensor | None, ...],
) -> Tensor:
    """``function(*inputs)``, which treats rows alike, rounded to the dtype of ``like``.

    Where nothing records or traces the operations, pieces of rows: what lies between the steps then
    stays in the cache, and in pages that the process has already.
    """
    tensors = [t for t in (*inputs, *parameters) if t is not None]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if (
        like.numel() <= 8 * _PIECE
        or recorded
        or torch.jit.is_tracing()
        or not all(values_readable(t) for t in tensors)
        or not all(t.is_contiguous() for t in inputs if t is not None)
        or any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    ):
        return function(*inputs).to(like.dtype)
    result = torch.empty_like(like)
    hidden = like.shape[-1]
    rows = max(1, _PIECE // hidden)
    by_row = [t if t is None else t.view(-1, hidden) for t in inputs]
    for begin in range(0, like.numel() // hidden, rows):
        piece = slice(begin, begin + rows)
        result.view(-1, hidden)[piece] = function(*(t if t is None else t[piece] for t in by_row))
    return result


class _Norm(NamedTuple):
    y: Tensor  # before it is rounded
    mean: Tensor  # (..., 1), of x / peak
    rstd: Tensor


def _layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    peak: Tensor | None,
    kept_scale: float = 1.0,
) -> _Norm:
    """The norm of ``x / kept_scale``, relaxed where there is a ``peak``.

    With ``u = x / max|x|`` the norm is ``LN(8 u)``, and ``var(8 u) + eps = 64 (var(u) + eps/64)``:
    one division keeps everything in range, denormal rows included.
    """
    u = x.to(_accumulate_dtype(x.dtype))
    weight, bias = (None if t is None else t.to(u.dtype) for t in (weight, bias))
    if peak is None:
        eps *= kept_scale**2
    else:
        u, eps = u / peak, eps / 64
    return _Norm(*torch.native_layer_norm(u, u.shape[-1:], weight, bias, eps))


def _peak(x: Tensor, relax: str | None, kept_scale: float = 1.0) -> Tensor | None:
    """``max|x|``, or ``8 kept_scale`` where all is zero; ``None`` for plain LayerNorm."""
    if relax is None or x.numel() == 0:
        return None
    x, dim = x.detach(), -1 if relax == "row" else tuple(range(x.ndim))
    low, high = (extreme(x, dim, keepdim=relax == "row") for extreme in (torch.amin, torch.amax))
    peak = torch.maximum(high, -low).to(_accumulate_dtype(x.dtype))
    return peak.masked_fill(peak == 0, 8.0 * kept_scale)


def zero_dropped(f: Tensor, dropped: Tensor | None) -> Tensor:
    return f if dropped is None else f.masked_fill(dropped, 0.0)


def kept_scale_of(dropped: Tensor | None, dropout_p: float) -> float:
    """``1 - dropout_p``. The elements that stay are not divided by it: a norm sees the scale of its
    input in eps alone, and relaxation scales that along. So nothing overflows."""
    if dropped is None or dropout_p == 1:  # where all is dropped any scale will do
        return 1.0
    return 1 - dropout_p


def dropout_mask(seed: Tensor, dropout: int, shape: torch.Size) -> Tensor:
    """Where ``dropout / 65536`` of the elements are dropped: bool, the same for the same seed on
    every backend.

    Args:
        seed: int64 ``(1,)``; its low and high 32 bits are Philox's key.
        dropout: elements are dropped whose 16 random bits are less.
        shape: ``(..., hidden)``. Column ``c`` of row ``r`` (of all rows) takes the bits that
            counter ``(c // 8, r mod 2^32, r // 2^32, 0)`` gives: low or high half ``c % 2`` of
            word ``c % 8 // 2``.
    """
    rows, hidden = math.prod(shape[:-1]), shape[-1]
    row = torch.arange(rows, device=seed.device).unsqueeze(1)
    column = torch.arange(-(-hidden // 8), device=seed.device)
    counter = column, row & _WORD, row >> 32, torch.zeros_like(column)
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    halves = [(word & 0xFFFF < dropout, word < dropout << 16) for word in words]
    mask = torch.stack(list(itertools.chain(*halves)), dim=-1).flatten(1)
    return mask.narrow(1, 0, hidden).reshape(shape)


_WORD = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32; words are int64 in ``[0, 2^32)`` that broadcast.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        # The multipliers less 2^32: products of 64 bits, which keep their low word, and whose high
        # word lacks the other factor.
        p0, p1 = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        high0, high1 = (p0 >> 32) + c0, (p1 >> 32) + c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


# The kernels' operators on rows, on the CPU, where programs exported from a GPU may run. What they
# exchange is described in csrc/pb_relax_layer_norm: ``statistics (rows, 4)`` float32 are a rough
# mean, what it lacks, 1 / std, and the scale of the row's units, which the first three are in.

_RELAX = (None, "row", "tensor")


def layer_norm_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: int
) -> tuple[Tensor, Tensor]:
    """``y`` and ``statistics``."""
    y, statistics = _rows_forward(x, weight, bias, eps, _RELAX[relax])
    return y.to(x.dtype), statistics


def layer_norm_rows_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of :func:`layer_norm_rows`; ``parameters`` is the dtype of dweight and dbias."""
    dx, dweight, dbias = _rows_backward(dy, x, weight, statistics, parameters)
    return dx.to(x.dtype), dweight, dbias


def sandwich_residual_rows(
    f: Tensor,
    residual: Tensor,
    final_norm: bool,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    seed: Tensor | None,
    dropout: int,
    eps: float,
    relax: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``h``, ``z`` and the statistics of both norms' inputs; without the final norm, the rows of
    its results have no elements."""
    dropped = None if seed is None else dropout_mask(seed, dropout, f.shape)
    f, kept_scale = zero_dropped(f, dropped), kept_scale_of(dropped, dropout / 65536)
    post, f_statistics = _rows_forward(f, post_weight, post_bias, eps, _RELAX[relax], kept_scale)
    h = (residual + post).to(residual.dtype)
    if not final_norm:
        return h, h.new_empty(h.shape[0], 0), f_statistics, f_statistics.new_empty(h.shape[0], 0)
    z, h_statistics = _rows_forward(h, pre_weight, pre_bias, eps, _RELAX[relax])
    return h, z.to(h.dtype), f_statistics, h_statistics


def sandwich_residual_rows_backward(
    dh: Tensor,
    dz: Tensor | None,
    f: Tensor,
    h: Tensor | None,
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    f_statistics: Tensor,
    h_statistics: Tensor | None,
    seed: Tensor | None,
    dropout: int,
    post_parameters: torch.dtype | None,
    pre_parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of :func:`sandwich_residual_rows`: of f, residual, and the parameters in their
    order."""
    wide = dh.to(_accumulate_dtype(f.dtype))
    dresidual = dh.new_empty(dh.shape[0], 0)  # without the final norm it is dh
    dpre_weight, dpre_bias = (f.new_empty(0, dtype=torch.float32) for _ in range(2))
    if dz is not None and h is not None and h_statistics is not None:
        of_h, dpre_weight, dpre_bias = _rows_backward(
            dz, h, pre_weight, h_statistics, pre_parameters
        )
        wide = wide + of_h
        dresidual = wide.to(dh.dtype)
    dropped = None if seed is None else dropout_mask(seed, dropout, f.shape)
    kept = zero_dropped(f, dropped)
    df, dpost_weight, dpost_bias = _rows_backward(
        wide, kept, post_weight, f_statistics, post_parameters
    )
    df = zero_dropped(df, dropped)
    return df.to(f.dtype), dresidual, dpost_weight, dpost_bias, dpre_weight, dpre_bias


def _rows_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relax: str | None,
    kept_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """y before it is rounded, and ``statistics``."""
    x = x.to(_accumulate_dtype(x.dtype))
    peak = _peak(x, relax, kept_scale)
    y, mean, rstd = _layer_norm(x, weight, bias, eps, peak, kept_scale)
    scale, shrunk = torch.ones_like(mean), torch.ones_like(mean)
    if peak is not None:
        scale = (scale / peak).clamp_max(2.0**126)  # in range for the smallest denormal number
        shrunk = (peak * scale).nan_to_num(1.0)  # an infinite peak has scale 0
    statistics = [mean * shrunk, torch.zeros_like(mean), rstd / shrunk, scale]
    return y, torch.cat(statistics, dim=-1).float()


def _rows_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(_accumulate_dtype(x.dtype))
    dy = dy.to(wide.dtype)
    rough_mean, shift, rstd, scale = statistics.split(1, dim=1)
    xhat = ((wide * scale - rough_mean) - shift) * rstd
    g = dy if weight is None else dy * weight
    dx = g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
    dx = dx * rstd * scale
    if parameters is None:
        return dx, x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    return dx, (dy * xhat).sum(0).to(parameters), dy.sum(0).to(parameters)
