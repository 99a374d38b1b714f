"""The LayerNorm kernels at widths and numbers of rows that only a GPU reaches;
tests/test_pb_relax_layer_norm.py holds the small ones, for the GPU too."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cogview_kernels as ck

pytestmark = pytest.mark.usefixtures("cuda")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
EDGES = [2**power + step for power in range(7, 15) for step in (-1, 0, 1, 8)]
WIDTHS = sorted({*range(1, 130), *EDGES, 2560, 5120, 10240, 12288, 16640, 17000})


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def relaxation(x: Tensor, relax: str | None) -> Tensor:
    if relax is None:
        return x.new_ones(())
    return (x.abs().amax(-1, keepdim=True) if relax == "row" else x.abs().amax()) / 8


Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def differentiate(function: Function, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """``y, dx, dweight, dbias``."""
    weight, bias, dy = rest
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def check(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, relax: str | None, rows: int
) -> float:
    """The kernels on all of ``x`` against float64 on ``rows`` at a time; the largest error in units
    of what is allowed. ``y`` and ``dx``: twice the error of torch in the same dtype, and one
    rounding. ``dweight`` and ``dbias``: one rounding, and 32 float32 steps of the largest term for
    each step of a random walk over the rows."""

    def own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ck.pb_relax_layer_norm(x, weight, bias, EPS, relax, "cuda")

    def same_dtype_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        c = relaxation(x.detach(), relax)
        return F.layer_norm(x / c, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ck.pb_relax_layer_norm(x, weight, bias, EPS, relax, "reference")

    def largest(tensor: Tensor) -> float:
        return tensor.abs().max().item()

    *each_row, dweight, dbias = results = differentiate(own, x, weight, bias, dy)
    assert all(result.isfinite().all() for result in results)
    sums = [torch.zeros_like(weight, dtype=torch.float64) for _ in range(2)]
    worst, term = 0.0, 0.0
    for begin in range(0, x.shape[0], rows):
        some = slice(begin, begin + rows)
        here = x[some], weight, bias, dy[some]
        truth = differentiate(definition, *(t.double() for t in here))
        of_torch = differentiate(same_dtype_torch, *here)
        x64 = here[0].double()
        c = relaxation(x64, relax)
        rstd = (x64.var(-1, unbiased=False, keepdim=True) + EPS * c * c).rsqrt()
        float32 = 8 * torch.finfo(torch.float32).eps
        shift = max(1.0, largest(x64 * rstd))  # x - mean cancels: narrow rows have no variance
        scales = shift * largest(weight), shift * largest(here[3].double() * weight * rstd)
        for got, expected, other, scale in zip(each_row, truth, of_torch, scales, strict=False):
            allowed = 2 * largest(other.double() - expected) + float32 * scale
            allowed += (torch.finfo(x.dtype).eps + float32) * largest(expected)
            worst = max(worst, largest(got[some].double() - expected) / allowed)
        for total, expected in zip(sums, truth[2:], strict=True):
            total += expected
        term = max(term, largest(here[3]) * max(shift, largest(truth[0])))
    for got, expected in zip((dweight, dbias), sums, strict=True):
        walk = 32 * torch.finfo(torch.float32).eps * math.sqrt(x.shape[0]) * term
        allowed = torch.finfo(got.dtype).eps * largest(expected) + walk
        worst = max(worst, largest(got.double() - expected) / allowed)
    return worst


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relax", [None, "row", "tensor"])
def test_widths(
    dtype: torch.dtype, relax: str | None, record: Callable[[str, object], None]
) -> None:
    errors = {}
    for hidden in WIDTHS:
        x, dy = normal(67, hidden, dtype=dtype), normal(67, hidden, dtype=dtype)
        errors[hidden] = check(x, 1 + normal(hidden) / 4, normal(hidden), dy, relax, 67)
    record("error_ratio", max(errors.values()))
    assert max(errors.values()) <= 1, {w: error for w, error in errors.items() if error > 1}


@pytest.mark.parametrize("hidden", [3, 64, 1024])
def test_many_rows(hidden: int, record: Callable[[str, object], None]) -> None:
    rows = 2**20 + 1
    x, dy = (normal(rows, hidden, dtype=torch.bfloat16) for _ in range(2))
    worst = check(x, 1 + normal(hidden) / 4, normal(hidden), dy, "row", 2**17)
    record("error_ratio", worst)
    assert worst <= 1


def test_more_than_2_to_the_31_elements(record: Callable[[str, object], None]) -> None:
    rows, hidden = 2**20, 2056
    x, dy = (normal(rows, hidden, dtype=torch.float16) for _ in range(2))
    assert x.numel() > 2**31
    worst = check(x, 1 + normal(hidden) / 4, normal(hidden), dy, "row", 2**16)
    record("error_ratio", worst)
    assert worst <= 1


def test_rows_with_offsets_beyond_int32() -> None:
    """Few rows, so far apart that offsets pass 2^31 elements."""
    x, weight, bias = normal(9, 1000, dtype=torch.bfloat16), normal(1000), normal(1000)
    stride = 2**29
    far = x.new_empty(8 * stride + 1000).as_strided(x.shape, (stride, 1)).copy_(x)
    expected, y = (ck.pb_relax_layer_norm(t, weight, bias, backend="cuda") for t in (x, far))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("hidden", [8, 1000, 17000])
def test_reruns_are_bitwise_equal(hidden: int) -> None:
    x, dy = (normal(5000, hidden, dtype=torch.float16) for _ in range(2))
    weight, bias = normal(hidden), normal(hidden)

    def own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ck.pb_relax_layer_norm(x, weight, bias, backend="cuda")

    first, second = (differentiate(own, x, weight, bias, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
