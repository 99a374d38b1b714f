"""The dense definition of the attention in float64, which every other backend is compared with.

It follows the formulas and is not fast: memory grows with ``Sq x Sk``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels.attention.layout import ThreeRegionLayout


def three_region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    softmax_scale: float,
    kv_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint softmax over the three regions, with the shapes of the public function.

    A key outside the regions has no influence, even if it is NaN or infinite. A row that sees none
    gives zeros and ``-inf``.
    """
    batch, num_heads, q_len, _ = q.shape
    num_kv_heads, k_len = k.shape[1:3]
    q64, k64, v64 = q.double(), k.double(), v.double()
    group = num_heads // num_kv_heads
    k64, v64 = (t.repeat_interleave(group, dim=1) for t in (k64, v64))

    def by_head(region: Tensor) -> Tensor:  # (B, H, Sq, Sk), or (B, 1, Sq, Sk)
        if region.ndim == 3:
            return region.unsqueeze(1)
        return region.repeat_interleave(num_heads // region.shape[1], dim=1)

    regions = layout.regions(batch, q_len, k_len, kv_lens)
    window, text, pivot = (by_head(region.to(q.device)) for region in regions)
    visible = window | text | pivot
    bias = layout.text_bias * text.double() + layout.pivot_bias * pivot.double()

    logits = visible_matmul(q64, torch.ones_like(q64, dtype=torch.bool), k64.mT)
    logits = (logits * softmax_scale + bias).masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1).masked_fill(~visible, 0.0)
    out = visible_matmul(weights, visible, v64)
    return out.to(q.dtype), lse if q.dtype == torch.float64 else lse.float()


def visible_matmul(left: Tensor, visible: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, summed only over the visible pairs; ``visible`` broadcasts to ``left``.

    ``left`` must be zero where it is not visible. In a plain product, such a zero times a NaN or
    infinity in ``right`` is NaN; here a NaN or infinity reaches only the sums that contain it.
    """
    finite = right.isfinite()
    product = left @ right.masked_fill(~finite, 0.0)
    with torch.no_grad():
        kind = product.dtype
        positive, negative = (visible & (left > 0)).to(kind), (visible & (left < 0)).to(kind)
        plus_inf, minus_inf = (right == float("inf")).to(kind), (right == float("-inf")).to(kind)
        plus = positive @ plus_inf + negative @ minus_inf > 0
        minus = positive @ minus_inf + negative @ plus_inf > 0
        nan = visible.to(kind) @ right.isnan().to(kind) > 0
        nan = nan | ((visible & (left == 0)).to(kind) @ (plus_inf + minus_inf) > 0)
        nan = nan | (plus & minus)
    product = torch.where(plus, float("inf"), torch.where(minus, float("-inf"), product))
    return product.masked_fill(nan, float("nan"))
