"""The definitions of the norms in float64, which every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def pb_relax_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: str | None
) -> Tensor:
    """``(x - mean) / sqrt(var + eps c^2) * weight + bias`` with ``c = max|x| / 8`` detached."""
    return _norm(x.double(), weight, bias, eps, relax).to(x.dtype)


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
    """``h = residual + LN_post(dropout(f))``, rounded to the dtype of ``residual``; with the final
    norm also ``z = LN_pre(h)``."""
    f64 = f.double()
    if dropped is not None:
        scale = 1 - dropout_p or 1.0  # with p = 1, everything is dropped
        f64 = torch.where(dropped, 0.0, f64 / scale)
    h = residual.double() + _norm(f64, post_weight, post_bias, eps, relax)
    h = h.to(residual.dtype)
    return h, pb_relax_layer_norm(h, pre_weight, pre_bias, eps, relax) if final_norm else None


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: str | None
) -> Tensor:
    if relax == "row":
        peak = x.detach().abs().amax(-1, keepdim=True)
    elif relax == "tensor" and x.numel() > 0:
        peak = x.detach().abs().amax()
    else:
        peak = torch.full((), 8.0, dtype=torch.float64, device=x.device)
    c = torch.where(peak == 0, 8.0, peak) / 8  # all zero: any c gives y = bias
    centred = x / c - (x / c).mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    return y
