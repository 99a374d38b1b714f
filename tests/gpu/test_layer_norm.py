"""The LayerNorm kernels at widths and numbers of rows that only a GPU can run;
tests/test_layer_norm_kernels.py has the small ones, on the GPU too."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_layer_norm_kernels import OF_A_ROW, PAIRS, PARAMETERS, Problem, excess_of, laid_out, same
from torch import Tensor

import cogview_kernels as ck
from cogview_kernels.norm import portable

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
    """Run the kernels on all of ``x``, float64 on ``rows`` at a time; return the largest error over
    its bound. The bound of ``y`` and ``dx`` is twice the error of torch in the same dtype, and one
    rounding. That of ``dweight`` and ``dbias`` is one rounding, and 32 float32 steps of the largest
    term for each step of a random walk over the rows."""

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
            assert math.isfinite(allowed)
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
    """Few rows, so far apart that offsets exceed 2^31 elements."""
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


# The sandwich residual


def sandwich(
    rows: int,
    hidden: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    relax: str | None = "row",
    dropout: int = 0,
) -> Problem:
    f, h = dtypes
    tensors = {"f": normal(rows, hidden, dtype=f), "residual": normal(rows, hidden, dtype=h)}
    tensors |= {name: normal(hidden) for name in PARAMETERS}
    upstream = {name: normal(rows, hidden, dtype=h) for name in ("h", "z")}
    return Problem(tensors, upstream, relax=relax, dropout=dropout)


def assert_accurate(problem: Problem, record: Callable[[str, object], None]) -> None:
    excess = excess_of(problem, problem.run("cuda"))
    record("error_ratio", max(excess.values()))
    assert max(excess.values()) <= 1, excess


@pytest.mark.parametrize("dtypes", PAIRS)
def test_widths_of_the_sandwich(
    dtypes: tuple[torch.dtype, torch.dtype], record: Callable[[str, object], None]
) -> None:
    errors = {}
    for n, hidden in enumerate(WIDTHS):
        problem = sandwich(67, hidden, dtypes, (None, "row", "row", "tensor")[n % 4], n % 3 * 6554)
        errors[hidden] = max(excess_of(problem, problem.run("cuda")).values())
    record("error_ratio", max(errors.values()))
    assert max(errors.values()) <= 1, {w: error for w, error in errors.items() if error > 1}


@pytest.mark.parametrize("hidden", [3, 64, 264])
def test_many_rows_of_the_sandwich(hidden: int, record: Callable[[str, object], None]) -> None:
    dtypes = torch.bfloat16, torch.float32
    assert_accurate(sandwich(2**16 + 1, hidden, dtypes, dropout=6554), record)


def test_sandwich_of_more_than_2_to_the_31_elements() -> None:
    """Rows are independent: those at the ends have the same bits in a call of their own."""
    rows, hidden = 2**20, 2056
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB")
    problem = sandwich(rows, hidden, (torch.float16, torch.float16))
    assert problem.rows.numel() > 2**31
    results = problem.run("cuda")
    for some in (slice(0, 500), slice(rows - 500, rows)):
        alone = problem.map(lambda t, some=some: t[some] if t.ndim == 2 else t).run("cuda")
        here = {n: results[n][some] for n in OF_A_ROW if n in results}
        assert not same(here, alone)
    expected = {"dpre_bias": problem.upstream["z"], "dpost_bias": results["dresidual"]}
    for name, tensor in expected.items():
        total = sum(chunk.double().sum(0) for chunk in tensor.split(2**16))
        torch.testing.assert_close(results[name].double(), total, rtol=1e-3, atol=4.0)


def test_sandwich_rows_with_offsets_beyond_int32() -> None:
    problem = sandwich(5, 1000, (torch.bfloat16, torch.bfloat16))
    expected = problem.run("cuda")
    stride = 2**29 + 8
    memory = normal(1, dtype=torch.bfloat16).new_empty(4 * stride + 1000)
    for name, tensor in problem.matrices().items():
        far = memory.as_strided(tensor.shape, (stride, 1)).copy_(tensor)
        assert not same(problem.change(name, far).run("cuda"), expected), name


@pytest.mark.parametrize("layout", ["padded", "odd rows", "odd address"])
@pytest.mark.parametrize("hidden", [1000, 17000])
def test_sandwich_at_any_stride(layout: str, hidden: int) -> None:
    problem = sandwich(300, hidden, (torch.float16, torch.float32), dropout=6554)
    moved = problem.map(lambda tensor: laid_out(tensor, layout))
    assert not same(moved.run("cuda"), problem.run("cuda"))


@pytest.mark.parametrize("rows, hidden", [(70_000, 40), (3000, 1000), (50, 17000)])
def test_dropout_is_that_of_the_portable_path(rows: int, hidden: int) -> None:
    """Element for element, forward and backward, with the mask made on the CPU."""
    problem = sandwich(rows, hidden, (torch.float16, torch.float32), dropout=13107)
    dropped = portable.dropout_mask(torch.tensor([problem.seed]), 13107, problem.rows.shape).cuda()
    results = problem.run("cuda")
    assert not results["df"][dropped].any()
    assert (results["df"][~dropped] != 0).double().mean() > 0.99
    poisoned = problem.change("f", problem.tensors["f"].masked_fill(dropped, math.nan))
    assert not same(poisoned.run("cuda"), results)


@pytest.mark.parametrize("hidden", [8, 1000, 17000])
def test_sandwich_reruns_are_bitwise_equal(hidden: int) -> None:
    for relax in ("row", "tensor"):
        problem = sandwich(5000, hidden, (torch.float16, torch.float32), relax, 6554)
        assert not same(problem.run("cuda"), problem.run("cuda"))
