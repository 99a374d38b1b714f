"""Three-region attention beside dense causal attention: ``make bench``.

Both run in float32 on the same random inputs, 4 heads of dimension 64. "dense" is torch's
``scaled_dot_product_attention(is_causal=True)``: it attends to every earlier key, so it computes
another function; what is compared is the cost of a token's context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cogview_kernels as ck

NUM_HEADS, HEAD_DIM = 4, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# (sequence length, query_window, key_window_times, pivots, text): CogView's 32x32 setting, its
# talk, its paper's proportions, and a long sequence
CASES = [
    (1088, 64, 4, 192, 64),
    (4224, 128, 2, 256, 64),
    (4224, 128, 6, 704, 64),
    (16448, 128, 2, 512, 64),
]

Attention = Callable[[Tensor, Tensor, Tensor, ck.ThreeRegionLayout], Tensor]
METHODS: dict[str, Attention] = {
    "three-region": lambda q, k, v, layout: ck.three_region_attention(q, k, v, layout),
    "dense": lambda q, k, v, layout: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True
    ),
}


@pytest.mark.parametrize("work", ["forward", "forward+backward"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_attention(benchmark: Any, case: tuple[int, ...], method: str, work: str) -> None:
    seqlen, query_window, key_window_times, num_pivots, text_len = case
    generator = torch.Generator(DEVICE).manual_seed(0)
    backward = work == "forward+backward"
    q, k, v = (
        torch.randn(
            1, NUM_HEADS, seqlen, HEAD_DIM, device=DEVICE, generator=generator
        ).requires_grad_(backward)
        for _ in range(3)
    )
    dout = torch.randn(q.shape, device=DEVICE, generator=generator)
    pivots = ck.sample_pivots(text_len, seqlen, num_pivots, generator)
    layout = ck.ThreeRegionLayout(text_len, pivots, query_window, key_window_times)

    def run() -> None:
        out = METHODS[method](q, k, v, layout)
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    mask = layout.dense_mask(1, seqlen, seqlen)
    benchmark.group = f"{case} {work}"
    benchmark.extra_info.update(
        seqlen=seqlen,
        query_window=query_window,
        key_window_times=key_window_times,
        num_pivots=num_pivots,
        text_len=text_len,
        method=method,
        work=work,
        attended_fraction=mask.sum().item() / (seqlen * (seqlen + 1) / 2),
    )
    benchmark.pedantic(run, rounds=7, warmup_rounds=2)
