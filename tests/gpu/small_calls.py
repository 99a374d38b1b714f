"""The smallest calls that reach every kernel, which test_sanitizer.py runs under compute-sanitizer.
Inputs are made on the CPU, so that few kernels run besides those under test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cogview_kernels as ck


def on_gpu(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype).cuda()


def attend(head_dim: int, dtype: torch.dtype) -> None:
    """Several tiles of queries and keys, partly filled, the backward's splits, and one query."""
    k_len = 150
    text_len = torch.tensor([70, 9], dtype=torch.int32)
    pivots = ck.sample_pivots(text_len, k_len, 20, torch.Generator().manual_seed(0))
    layout = ck.ThreeRegionLayout(text_len.cuda(), pivots.cuda(), 48, 1, 0.5, -0.5)
    for q_len in (k_len, 1):
        q, dout = (on_gpu(2, 2, q_len, head_dim, dtype=dtype) for _ in range(2))
        k, v = (on_gpu(2, 1, k_len, head_dim, dtype=dtype) for _ in range(2))
        leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        out = ck.three_region_attention(*leaves, layout, backend="cuda")
        for result in (out, *torch.autograd.grad(out, leaves, dout)):
            assert result.cpu().isfinite().all()


def normalise(hidden: int, dtype: torch.dtype, relax: str) -> None:
    x, dy = (on_gpu(9, hidden, dtype=dtype) for _ in range(2))
    weight, bias = (on_gpu(hidden, dtype=torch.float32) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = ck.pb_relax_layer_norm(*leaves, relax=relax, backend="cuda")
    for result in (y, *torch.autograd.grad(y, leaves, dy)):
        assert result.cpu().isfinite().all()


def step(hidden: int, dtypes: tuple[torch.dtype, torch.dtype], relax: str, final: bool) -> None:
    """The sandwich, with dropout."""
    f, h = dtypes
    tensors = [on_gpu(9, hidden, dtype=f), on_gpu(9, hidden, dtype=h)]
    tensors += [on_gpu(hidden, dtype=torch.float32) for _ in range(4 if final else 2)]
    leaves = [t.requires_grad_() for t in tensors]
    parameters = [*leaves[2:], *(None,) * (6 - len(leaves))]
    settings: dict[str, Any] = {"relax": relax, "backend": "cuda", "final_norm": final}
    results = ck.sandwich_residual(*leaves[:2], *parameters, dropout_p=0.1, **settings)
    results = results if final else results[:1]
    upstream = [on_gpu(9, hidden, dtype=h) for _ in results]
    for result in (*results, *torch.autograd.grad(results, leaves, upstream)):
        assert result.cpu().isfinite().all()


if __name__ == "__main__":
    torch.manual_seed(0)
    for head_dim in (32, 64, 96, 128):
        for dtype in (torch.bfloat16, torch.float16):
            attend(head_dim, dtype)
    for hidden in (7, 512, 1000, 2560, 5120, 17000):
        for dtype in (torch.float32, torch.float16):
            normalise(hidden, dtype, "row")
    normalise(1000, torch.bfloat16, "tensor")
    for hidden in (7, 512, 1000, 2560, 5120, 17000):
        for dtype in (torch.float32, torch.float16):
            step(hidden, (dtype, torch.float32), "row", True)
    step(1000, (torch.bfloat16, torch.bfloat16), "tensor", True)
    step(1000, (torch.float16, torch.float32), "row", False)
    print("all calls ran")
