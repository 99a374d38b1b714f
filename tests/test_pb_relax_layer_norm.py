"""pb_relax_layer_norm, PBRelaxLayerNorm and patch."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cogview_kernels as ck
from cogview_kernels import extension
from cogview_kernels.norm import portable

RELAX = (None, "row", "tensor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_CUDA, NO_HOST_MODEL = extension.why_not_usable(), extension.why_not_host_model()
HOST_MODEL = pytest.param(
    "host_model", marks=pytest.mark.skipif(NO_HOST_MODEL is not None, reason=str(NO_HOST_MODEL))
)
# "operator" is what the CUDA kernel is reached through; on the CPU it runs exported programs.
# "host_model" is the kernel's own source on the CPU.
IMPLEMENTATIONS = [
    "portable",
    "operator",
    HOST_MODEL,
    pytest.param("cuda", marks=pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA))),
]


def normalise(
    implementation: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    relax: str | None = "row",
) -> Tensor:
    if implementation == "operator":
        rows = x.reshape(-1, x.shape[-1])
        op = torch.ops.cogview_kernels.pb_relax_layer_norm
        return op(rows, weight, bias, eps, RELAX.index(relax))[0].view(x.shape)
    if implementation == "cuda":
        on_device = (None if t is None else t.cuda() for t in (x, weight, bias))
        return ck.pb_relax_layer_norm(*on_device, eps, relax, "cuda").cpu()  # type: ignore[arg-type]
    return ck.pb_relax_layer_norm(x, weight, bias, eps, relax, implementation)


def relaxation(x: Tensor, relax: str | None) -> Tensor:
    """``c`` of the definition; 1 where all is zero."""
    if relax is None or x.numel() == 0:
        return x.new_ones(())
    c = x.detach().abs().amax(-1, keepdim=True) / 8
    c = c if relax == "row" else c.amax()
    return torch.where(c == 0, 1.0, c)


def formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: str | None
) -> Tensor:
    """``LN(x / c)`` with ``c`` frozen."""
    return F.layer_norm(x / relaxation(x, relax), x.shape[-1:], weight, bias, eps)


def differentiate(function: Any, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, materialize_grads=True)]


# The definition


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_worked_by_hand(implementation: str) -> None:
    x = torch.tensor([[8.0, 0, -8, 0], [16, 0, -16, 0], [0, 0, 0, 0]])
    weight, bias = torch.tensor([3.0, 1, 6, 1]), torch.tensor([0.0, 5, 1, 0])
    # Row: c = 1, 2; var = 32, 128; var + 4 c^2 = 36, 144; x / sqrt = 4/3, -4/3 in both rows.
    row = normalise(implementation, x, weight, bias, 4.0, "row")
    torch.testing.assert_close(row, torch.tensor([[4.0, 5, -7, 0]] * 2 + [[0, 5, 1, 0]]))
    # Tensor: c = 2 for all; var + 16 = 48, 144, 16.
    tensor = normalise(implementation, x, weight, None, 4.0, "tensor")
    first = 8 / math.sqrt(48)
    expected = torch.tensor([[3 * first, 0, -6 * first, 0], [4, 0, -8, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(tensor, expected)
    # Plain: var + 4 = 36, 132, 4.
    plain = normalise(implementation, x, None, None, 4.0, None)
    second = 16 / math.sqrt(132)
    expected = torch.tensor([[4 / 3, 0, -4 / 3, 0], [second, 0, -second, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(plain, expected)


@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 40),
    st.sampled_from(RELAX),
    st.sampled_from([1e-12, 1e-5, 0.1]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
@settings(max_examples=100)
def test_equals_the_formula(
    leading: list[int],
    hidden: int,
    relax: str | None,
    eps: float,
    has_weight: bool,
    has_bias: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dy = 30 * normal(*leading, hidden), normal(*leading, hidden)
    names = [n for n, wanted in (("weight", has_weight), ("bias", has_bias)) if wanted]
    tensors = [x, *(normal(hidden) for _ in names)]

    def call(function: Any, *extra: Any) -> list[Tensor]:
        def run(x: Tensor, *parameters: Tensor) -> Tensor:
            given_ = dict(zip(names, parameters, strict=True))
            return function(x, given_.get("weight"), given_.get("bias"), eps, relax, *extra)

        return differentiate(run, tensors, dy)

    expected = call(formula)
    tolerance = 1e-10 if hidden > 1 else 1e-7  # a row of one is all cancellation
    for backend in ("reference", "portable"):
        for actual, right in zip(call(ck.pb_relax_layer_norm, backend), expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("relax", RELAX)
def test_gradients_are_those_of_the_values(backend: str, relax: str | None) -> None:
    """With the largest entry held fixed, so that c is a constant of the numeric derivative."""
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), 5, 5)
    )
    largest = torch.full((3, 1), 9.0, dtype=torch.float64)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = torch.cat([x, largest], dim=1)
        return ck.pb_relax_layer_norm(x, weight, bias, 0.3, relax, backend)

    assert torch.autograd.gradcheck(norm, (x, weight, bias))
    assert torch.autograd.gradgradcheck(norm, (x, weight, bias))


def test_no_gradient_flows_through_the_maximum() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    dy = torch.randn(3, 5, dtype=torch.float64)
    for relax in ("row", "tensor"):
        detached, attached = (
            differentiate(lambda x, c=c: F.layer_norm(x / c(x), (5,), eps=0.3), [x], dy)[1]
            for c in (
                lambda x, relax=relax: relaxation(x, relax),
                lambda x, relax=relax: x.abs().amax(-1 if relax == "row" else None, True) / 8,
            )
        )
        assert (detached - attached).abs().max() > 1e-3, "this test can tell them apart"
        for backend in ("reference", "portable"):
            actual = differentiate(
                lambda x, relax=relax, backend=backend: ck.pb_relax_layer_norm(
                    x, None, None, 0.3, relax, backend
                ),
                [x],
                dy,
            )
            torch.testing.assert_close(actual[1], detached, rtol=1e-12, atol=1e-12)


# Precision and range


def hard_rows(dtype: torch.dtype, hidden: int) -> Tensor:
    """Rows that break a LayerNorm which is careless with range or cancellation."""
    largest = min(torch.finfo(dtype).max, 2.0**120)  # float32 must also hold differences
    normal = torch.randn(4, hidden)
    sign = torch.ones(hidden)
    sign[::2] = -1
    outlier = 1e-3 * normal[1]
    outlier[hidden // 2] = largest
    lonely = torch.zeros(hidden)
    lonely[0] = max(torch.finfo(dtype).smallest_normal, 2.0**-100)  # 1 / std is in range
    rows = [
        normal[0],
        torch.zeros(hidden),
        torch.full((hidden,), 3.0),
        torch.full((hidden,), largest),
        sign * largest,
        1e-4 * normal[2],
        outlier,
        1000 + normal[3],
        lonely,
    ]
    return torch.stack(rows).to(dtype)


def assert_accurate(
    results: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor, relax: str | None, dy: Tensor
) -> None:
    """Row by row: one rounding to the result's dtype, and float32 rounding of ``x - mean``, which
    the division by the standard deviation magnifies."""
    eps32, eps = torch.finfo(torch.float32).eps, torch.finfo(x.dtype).eps
    wide = [t.double() for t in (x, weight, bias)]

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ck.pb_relax_layer_norm(x, weight, bias, 1e-5, relax, "reference")

    truth = differentiate(reference, wide, dy.double())
    x64, c = wide[0], relaxation(wide[0], relax)
    rstd = (x64.var(-1, correction=0, keepdim=True) + 1e-5 * c * c).rsqrt()
    condition = 1 + x64.abs().amax(-1, keepdim=True) * rstd
    g = (dy.double() * wide[1]).abs().amax(-1, keepdim=True)
    per_row = 8 * eps32 * condition
    floor = torch.finfo(x.dtype).smallest_normal * eps
    bounds = {
        "y": eps * truth[0].abs() + per_row * wide[1].abs().max() + floor,
        "dx": eps * truth[1].abs() + 4 * per_row * g * rstd * condition.clamp_max(1e3) + floor,
        "dweight": 2 * torch.finfo(weight.dtype).eps * truth[2].abs()
        + (4 * per_row * dy.double().abs()).sum(0),
        "dbias": 2 * torch.finfo(bias.dtype).eps * truth[3].abs()
        + 4 * eps32 * dy.double().abs().sum(0),
    }
    for value, expected, (name, bound) in zip(results, truth, bounds.items(), strict=True):
        finite = expected.abs() <= torch.finfo(value.dtype).max
        assert torch.equal(value.isfinite(), finite), f"{name}: not finite"
        error = (value.double() - expected).abs()
        excess = (error / bound)[finite].max().item()
        assert excess <= 1, f"{name}: {excess:.3g} times the allowed error"


@pytest.mark.thinned
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", ["same", "float32"])
@pytest.mark.parametrize("hidden", [64, 301, 1024])
def test_accuracy(
    implementation: str, relax: str | None, dtype: torch.dtype, parameter_dtype: str, hidden: int
) -> None:
    x = hard_rows(dtype, hidden)
    if relax is None:
        # Plain LayerNorm squares what it gets; with one maximum for all, small rows are noise.
        x = x[(x.abs().amax(1) < 1e18)]
    kind = dtype if parameter_dtype == "same" else torch.float32
    weight, bias = torch.randn(2, hidden).to(dtype).to(kind)
    dy = (torch.randn(x.shape) / 8).to(dtype)

    def run(*tensors: Tensor) -> Tensor:
        return normalise(implementation, *tensors, 1e-5, relax)

    results = differentiate(run, [x, weight, bias], dy)
    assert [t.dtype for t in results] == [dtype, dtype, kind, kind]
    assert_accurate(results, x, weight, bias, relax, dy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[2:])
@pytest.mark.parametrize("hidden", [48, 301, 1024])
def test_a_large_offset_costs_nothing(implementation: str, hidden: int) -> None:
    """Whole numbers around 2^20: differences are exact, so the kernels' result is, too."""
    x = 2.0**20 + torch.randint(-8, 9, (5, hidden))
    y = normalise(implementation, x, None, None, 1e-5, None)
    expected = torch.nn.functional.layer_norm(x.double(), (hidden,), eps=1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ["y", "dx", "dweight", "dbias"])
def test_the_bounds_catch_a_lost_result(name: str) -> None:
    x, dy = torch.randn(2, 5, 64).half()
    weight, bias = torch.randn(2, 64)
    results = differentiate(ck.pb_relax_layer_norm, [x, weight, bias], dy)
    assert_accurate(results, x, weight, bias, "row", dy)
    index = ["y", "dx", "dweight", "dbias"].index(name)
    for keep in (0.0, 0.99):
        wrong = [keep * t if n == index else t for n, t in enumerate(results)]
        with pytest.raises(AssertionError, match=f"^{name}: .* times the allowed error"):
            assert_accurate(wrong, x, weight, bias, "row", dy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relax", ["row", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zeros_give_the_bias(
    implementation: str, relax: str | None, dtype: torch.dtype
) -> None:
    x, dy = torch.zeros(3, 16, dtype=dtype), torch.randn(3, 16).to(dtype)
    weight, bias = torch.randn(2, 16).to(dtype)

    def run(*tensors: Tensor) -> Tensor:
        return normalise(implementation, *tensors, 1e-5, relax)

    y, dx, dweight, dbias = differentiate(run, [x, weight, bias], dy)
    assert torch.equal(y, bias.expand(3, 16))
    assert dx.isfinite().all() and dx.abs().max() > 0
    assert torch.equal(dweight, torch.zeros_like(weight))
    torch.testing.assert_close(dbias, dy.float().sum(0).to(dtype))


def test_float64_keeps_its_precision_and_range() -> None:
    x = torch.randn(4, 9, dtype=torch.float64)
    expected = formula(x, None, None, 1e-5, "row")
    for factor in (1e-300, 1e-30, 1e30, 1e300):
        for backend in ("reference", "portable"):
            y = ck.pb_relax_layer_norm(factor * x, None, None, backend=backend)
            torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_scale_of_a_row_cancels(implementation: str) -> None:
    """Powers of two change nothing at all, down to denormal numbers."""
    x = torch.randn(6, 40).half().float()
    expected = normalise(implementation, x, None, None)
    for exponent in (-130, -30, 1, 60, 110):
        leaf = (x * 2.0**exponent).requires_grad_()
        scaled = normalise(implementation, leaf, None, None)
        torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=1e-6)
        scaled.square().sum().backward()
        assert leaf.grad is not None and not leaf.grad.isnan().any()


# Properties


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
def test_rows_are_independent_of_their_mates(implementation: str, value: float) -> None:
    x, dy = torch.randn(2, 7, 33)
    weight, bias = torch.randn(2, 33)

    def run(x: Tensor, dy: Tensor) -> list[Tensor]:
        return differentiate(lambda t: normalise(implementation, t, weight, bias), [x], dy)

    alone, together = run(x[2:3], dy[2:3]), run(x, dy)
    for one, of_all in zip(alone, together, strict=True):
        torch.testing.assert_close(one, of_all[2:3], rtol=1e-6, atol=1e-6)
    changed = x.clone()
    changed[4, 5] = value
    others = [0, 1, 2, 3, 5, 6]
    for before, after in zip(together, run(changed, dy), strict=True):
        assert torch.equal(before[others], after[others])
        assert after[4].isfinite().all() == math.isfinite(value)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_one_maximum_for_the_whole_tensor(backend: str) -> None:
    x = torch.randn(4, 9)
    before = ck.pb_relax_layer_norm(x, None, None, 0.1, "tensor", backend)
    changed = x.clone()
    changed[3] *= 100
    after = ck.pb_relax_layer_norm(changed, None, None, 0.1, "tensor", backend)
    assert not torch.allclose(before[0], after[0])
    single = ck.pb_relax_layer_norm(x[:1], None, None, 0.1, "tensor", backend)
    row = ck.pb_relax_layer_norm(x[:1], None, None, 0.1, "row", backend)
    torch.testing.assert_close(single, row)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_poison_lands_where_the_reference_has_it(
    implementation: str, relax: str | None, value: float
) -> None:
    x = torch.randn(4, 9)
    x[2, 3] = value
    right = ck.pb_relax_layer_norm(x, None, None, relax=relax, backend="reference")
    y = normalise(implementation, x, None, None, 1e-5, relax)
    torch.testing.assert_close(y, right, equal_nan=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relax", RELAX)
def test_runs_are_bitwise_equal(implementation: str, relax: str | None) -> None:
    x, dy = torch.randn(2, 50, 33)
    weight, bias = torch.randn(2, 33)

    def run(*tensors: Tensor) -> Tensor:
        return normalise(implementation, *tensors, 1e-5, relax)

    first, second = (differentiate(run, [x, weight, bias], dy) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relax", RELAX)
def test_strides_do_not_matter(implementation: str, relax: str | None) -> None:
    weight, bias = torch.randn(2, 6)
    wide = torch.randn(3, 4, 8)

    def run(*tensors: Tensor) -> Tensor:
        return normalise(implementation, *tensors, 1e-5, relax)

    for x in (wide[:, :, 1:7], wide.transpose(0, 1)[:, :, :6], wide[:1, :1, :6].expand(3, 4, 6)):
        dy = torch.randn(1).expand(x.shape)
        views = differentiate(run, [x, weight, bias], dy)
        copies = differentiate(run, [x.contiguous(), weight, bias], dy.contiguous())
        for view, copied in zip(views, copies, strict=True):
            torch.testing.assert_close(view, copied, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["portable", "reference", HOST_MODEL])
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("shape", [(6,), (2, 1, 3, 6), (0, 6), (2, 0, 6), (3, 1)])
def test_any_number_of_rows(backend: str, relax: str | None, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    bias = torch.randn(shape[-1:])
    y = ck.pb_relax_layer_norm(x, None, bias, relax=relax, backend=backend)
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape
    if shape[-1] == 1:
        assert torch.equal(y, bias.expand_as(y)), "a row of one is its own mean"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("has_weight, has_bias", [(True, False), (False, True), (False, False)])
def test_operator_without_weight_or_bias(
    implementation: str, has_weight: bool, has_bias: bool
) -> None:
    x = torch.randn(5, 12, requires_grad=True)
    weight = torch.randn(12, requires_grad=True) if has_weight else None
    bias = torch.randn(12, requires_grad=True) if has_bias else None
    leaves = [t for t in (x, weight, bias) if t is not None]
    dy = torch.randn(5, 12)
    actual, expected = (
        torch.autograd.grad(normalise(which, x, weight, bias), leaves, dy)
        for which in (implementation, "portable")
    )
    for value, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, right)


# Module and patch


@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_rows_make_the_same_result(relax: str | None, dtype: torch.dtype) -> None:
    """Without gradients large inputs are computed a few rows at a time; never under vmap, with a
    tangent or while gradients are recorded."""
    x = torch.randn(5, 23, 64).to(dtype)
    weight, bias = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    dropped = torch.rand(x.shape) < 0.3
    whole = ck.pb_relax_layer_norm(x, weight, bias, relax=relax)
    settings = 0.3, 1e-5, relax, True
    sandwich = x, x, weight, bias, weight, bias, dropped, *settings
    whole_sandwich = portable.sandwich_residual(*sandwich)
    num_rows = []
    layer_norm = portable._layer_norm

    def counted(x: Tensor, *rest: Any) -> Any:
        num_rows.append(math.prod(x.shape[:-1]))
        return layer_norm(x, *rest)

    with (
        mock.patch.object(portable, "_PIECE", 7 * 64),
        mock.patch.object(portable, "_layer_norm", counted),
    ):
        assert torch.equal(ck.pb_relax_layer_norm(x, weight, bias, relax=relax), whole)
        assert sorted(num_rows) == [115 % 7, *[7] * (115 // 7)]
        assert all(map(torch.equal, portable.sandwich_residual(*sandwich), whole_sandwich))
        assert max(num_rows) == 7
        leaf = x.clone().requires_grad_()
        ck.pb_relax_layer_norm(leaf, weight, bias, relax=relax).sum().backward()
        torch.func.vmap(lambda x: ck.pb_relax_layer_norm(x, weight, bias, relax=relax))(x)
        torch.func.jvp(lambda x: ck.pb_relax_layer_norm(x, weight, bias, relax=relax), (x,), (x,))
        assert num_rows.count(7) == 3 * (115 // 7) and num_rows[-1] == 115


@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("shape", [(640,), (1, 640), (3, 1, 640), (1, 1, 1, 640)])
def test_pieces_of_any_shape(shape: tuple[int, ...], relax: str | None) -> None:
    x = torch.randn(shape)
    sandwich = x, x, None, None, None, None, None, 0.0, 1e-5, relax, True
    expected = (
        portable.layer_norm(x, None, None, 1e-5, relax),
        *portable.sandwich_residual(*sandwich),
    )
    with mock.patch.object(portable, "_PIECE", 64):
        pieces = (
            portable.layer_norm(x, None, None, 1e-5, relax),
            *portable.sandwich_residual(*sandwich),
        )
    assert all(map(torch.equal, pieces, expected))


def test_module_shares_its_state_with_nn_layer_norm() -> None:
    ours, theirs = ck.PBRelaxLayerNorm(7, eps=1e-3, relax=None), nn.LayerNorm(7, eps=1e-3)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 7)
    torch.testing.assert_close(ours(x), theirs(x))
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x))
    without = ck.PBRelaxLayerNorm(7, bias=False)
    assert list(without.state_dict()) == ["weight"]
    assert not list(ck.PBRelaxLayerNorm(7, elementwise_affine=False).state_dict())


@pytest.mark.parametrize("relax", RELAX)
def test_module_copies_and_casts(relax: str | None) -> None:
    module = ck.PBRelaxLayerNorm(7, eps=1e-3, relax=relax)
    nn.init.normal_(module.weight)
    x = torch.randn(3, 7)
    expected = ck.pb_relax_layer_norm(x, module.weight, module.bias, 1e-3, relax)
    assert torch.equal(module(x), expected)
    twin = copy.deepcopy(module)
    nn.init.zeros_(module.weight)
    assert torch.equal(twin(x), expected)
    half = copy.deepcopy(twin).half()
    assert half(x.half()).dtype == torch.float16
    torch.testing.assert_close(half(x.half()).float(), expected, rtol=5e-3, atol=5e-3)
    assert twin(x.half()).dtype == torch.float16, "float32 weights with half input"
    assert twin(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(twin.double()(x.double()).float(), twin(x.double()).float())
    assert f"relax={relax!r}" in repr(module) and "eps=0.001" in repr(module)
    meta = ck.PBRelaxLayerNorm(7, relax=relax, device="meta", dtype=torch.float16)
    assert meta(torch.empty(2, 7, device="meta", dtype=torch.float16)).shape == (2, 7)


class Net(nn.Module):
    """Norms in several places, one of them in two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norms = nn.ModuleList([nn.LayerNorm(6, eps=1e-3), nn.LayerNorm(6, bias=False)])
        self.shared = self.norms[0]
        self.plain = nn.LayerNorm(6, elementwise_affine=False)
        self.image = nn.LayerNorm((3, 6))
        self.other = type("Derived", (nn.LayerNorm,), {})(6)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.norms[0], self.linear, self.norms[1], self.shared, self.plain):
            x = layer(x)
        return self.other(self.image(x))


def test_patched_models_compute_the_same() -> None:
    model, x = Net(), torch.randn(4, 3, 6)
    state = copy.deepcopy(model.state_dict())
    parameters, expected = list(model.parameters()), model(x)
    names = [name for name, _ in model.named_modules()]
    assert ck.patch(model) is model
    for norm in (*model.norms, model.plain):
        assert type(norm) is ck.PBRelaxLayerNorm and norm.relax is None
    assert model.shared is model.norms[0]
    assert type(model.image) is nn.LayerNorm and type(model.other).__name__ == "Derived"
    torch.testing.assert_close(model(x), expected)
    # What others hold on to is still the model's own.
    assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
    assert names == [name for name, _ in model.named_modules()]
    assert list(model.state_dict()) == list(state)
    Net().load_state_dict(model.state_dict())
    model.load_state_dict(Net().state_dict())
    model.load_state_dict(state)

    ck.patch(model, relax="row")
    assert model.plain.relax is None, "patched once"
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), expected)
    assert type(twin.plain) is ck.PBRelaxLayerNorm and "relax=None" in repr(twin.plain)
    columns = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(model(columns), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_patching_keeps_hooks_and_optimizers() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).eval(), torch.randn(2, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    ck.patch(model)
    assert not model[1].training
    before = model[1].weight.clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert seen == [ck.PBRelaxLayerNorm] and not torch.equal(model[1].weight, before)


def test_a_norm_alone_is_patched() -> None:
    norm, x = nn.LayerNorm(6), 100 * torch.randn(2, 6)
    assert ck.patch(norm, relax="row") is norm and isinstance(norm, ck.PBRelaxLayerNorm)
    assert torch.equal(norm(x), ck.pb_relax_layer_norm(x, norm.weight, norm.bias, relax="row"))


@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_patched_transformer_encoders(relax: str | None, training: bool, nested: bool) -> None:
    """Torch's fused path for evaluation, which would overlook relaxation, is not in the way."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, layer_norm_eps=0.5)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=nested)
    model.train(training)
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.set_grad_enabled(training):
        expected = model(x, src_key_padding_mask=padding)
        ck.patch(model, relax)
        actual = model(x, src_key_padding_mask=padding)
    same = torch.isclose(actual, expected, rtol=1e-4, atol=1e-5)[~padding]
    assert same.all() == (relax is None)
    if relax is not None:
        model.train()
        in_training = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(actual[~padding], in_training[~padding])


def test_an_eps_that_cannot_be_patched_is_named() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=0)))
    with pytest.raises(ValueError, match=r"^1\.1\.eps: expected at least 1e-30, got 0"):
        ck.patch(model)
    assert type(model[0]) is nn.LayerNorm, "nothing was changed"
    with pytest.raises(ValueError, match=r"^eps: expected at least"):
        ck.patch(nn.LayerNorm(4, eps=0.0))
    with pytest.raises(ValueError, match="relax: expected one of"):
        ck.patch(model, relax="rows")


# Bad input

X, ONES = torch.randn(3, 4), torch.ones(4)
NAN = torch.tensor([1.0, math.nan, 1, 1])


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
        ({"x": X.tolist()}, TypeError, "x: expected a tensor, got list"),
        ({"x": X.int()}, TypeError, "x: expected float64.*int32"),
        ({"x": X.cfloat()}, TypeError, "x: expected float64.*complex64"),
        ({"x": X.to(torch.float8_e4m3fn)}, TypeError, "x: expected float64.*float8"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \(..., hidden\), got \(\)"),
        ({"x": X[:, :0]}, ValueError, r"x: expected shape \(..., hidden\), got \(3, 0\)"),
        ({"x": torch.randn(4, 3).t()}, ValueError, "x: expected a contiguous last dimension"),
        ({"weight": ONES[:3]}, ValueError, r"weight: expected \(4,\).*got \(3,\)"),
        ({"weight": ONES[None]}, ValueError, r"weight: expected \(4,\).*got \(1, 4\)"),
        ({"bias": ONES[:1]}, ValueError, r"bias: expected \(4,\).*got \(1,\)"),
        ({"weight": 1.0}, TypeError, "weight: expected a tensor.*got float"),
        ({"weight": ONES.double()}, TypeError, "weight: expected a tensor of dtype torch.float32"),
        ({"bias": ONES.half()}, TypeError, "bias: expected a tensor of dtype torch.float32"),
        ({"x": X.half(), "weight": ONES.half()}, TypeError, "bias: expected dtype torch.float16"),
        ({"weight": ONES.to("meta")}, ValueError, "weight: expected device cpu as x, got meta"),
        ({"weight": NAN}, ValueError, "weight: expected numbers, got NaN"),
        ({"bias": NAN}, ValueError, "bias: expected numbers, got NaN"),
        ({"eps": 0.0}, ValueError, "eps: expected at least 1e-30, got 0.0"),
        ({"eps": -1e-5}, ValueError, "eps: expected at least 1e-30, got -1e-05"),
        ({"eps": math.nan}, ValueError, "eps: expected .*finite.*got nan"),
        ({"eps": "1"}, TypeError, "eps: expected a float, got str"),
        ({"relax": "rows"}, ValueError, "relax: expected one of .*'row'.*got 'rows'"),
        ({"relax": True}, ValueError, "relax: expected one of .*got True"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of .*'gpu'"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input_is_named(
    arguments: dict[str, Any], error: type[Exception], match: str, backend: str
) -> None:
    good = {"x": X, "weight": ONES, "bias": ONES, "backend": backend}
    ck.pb_relax_layer_norm(**good)
    with refused(error, match):
        ck.pb_relax_layer_norm(**{**good, **arguments})


def test_bad_modules_are_named() -> None:
    with pytest.raises(ValueError, match="hidden: expected at least 1"):
        ck.PBRelaxLayerNorm(0)
    with pytest.raises(TypeError, match="hidden: expected an int, got float"):
        ck.PBRelaxLayerNorm(4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="relax: expected one of"):
        ck.PBRelaxLayerNorm(4, relax="max")
    with pytest.raises(ValueError, match="eps: expected at least"):
        ck.PBRelaxLayerNorm(4, eps=0.0)
    with pytest.raises(ValueError, match=r"weight: expected \(5,\) as the last dimension of x"):
        ck.PBRelaxLayerNorm(4)(torch.randn(2, 5))
