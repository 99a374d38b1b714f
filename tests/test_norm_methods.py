"""The suite's norm and sandwich methods, ours and the peers', compute what they declare."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cogview_kernels as ck
from benchmarks.suite import norms as norm_methods
from benchmarks.suite.cases import NormCase
from benchmarks.suite.methods import Method
from benchmarks.suite.norms import LAYER_NORM_METHODS, PB_RELAX, PLAIN, SANDWICH_METHODS
from cogview_kernels import extension
from cogview_kernels.norm import portable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS, HIDDEN = 5, 48
METHODS = [
    *(("layer_norm", method) for method in LAYER_NORM_METHODS),
    *(("sandwich_residual", method) for method in SANDWICH_METHODS),
]
PACKAGES = ("liger-kernel", "quack-kernels", "Apex")
TOLERANCE = {"float32": 1e-6, "bfloat16": 0.02}  # relative error in norm, of results and gradients


def of_methods(*pairs: tuple[str, Method]) -> Any:
    ids = [f"{op}-{method.name}" for op, method in pairs]
    return pytest.mark.parametrize("op, method", pairs, ids=ids)


def inputs(case: NormCase, device: torch.device = CPU) -> list[Tensor]:
    norms = 1 if case.op == "layer_norm" else 2
    shapes = [(case.rows, case.hidden)] * norms + [(case.hidden,)] * 2 * norms
    # Small inputs: eps makes plain LayerNorm differ from PB-relax.
    drawn = [0.01 * torch.randn(shape, device=device) + 0.005 for shape in shapes]
    return [t.to(case.torch_dtype) for t in drawn]


def differentiate(function: Any, tensors: list[Tensor], douts: list[Tensor]) -> list[Tensor]:
    """Results and gradients; ``douts`` may hold more than there are results."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    pairs = zip(results, douts, strict=False)
    grads = torch.autograd.grad(results, leaves, [dout.to(r.dtype) for r, dout in pairs])
    return [*(r.detach() for r in results), *grads]


def definition(op: str, computes: str) -> Any:
    relax = {PB_RELAX: "row", PLAIN: None}[computes]
    function = ck.pb_relax_layer_norm if op == "layer_norm" else ck.sandwich_residual
    return lambda *tensors: function(*tensors, relax=relax, backend="reference")


def assert_computes(case: NormCase, method: Method, computes: str) -> None:
    tensors = inputs(case)
    douts = [torch.randn(case.rows, case.hidden) for _ in range(2)]
    actual = differentiate(method.prepare(case, None, CPU), tensors, douts)
    exact = differentiate(definition(case.op, computes), [t.double() for t in tensors], douts)
    for found, expected in zip(actual, exact, strict=True):
        assert found.dtype == case.torch_dtype
        error = (found.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[case.dtype]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_methods, "compiled", lambda function: function)


@pytest.mark.parametrize("dtype", TOLERANCE)
@of_methods(*(pair for pair in METHODS if pair[1].name not in PACKAGES))
def test_what_a_method_computes(uncompiled: None, op: str, method: Method, dtype: str) -> None:
    assert_computes(NormCase(op, ROWS, HIDDEN, dtype), method, method.computes)


@of_methods(METHODS[0], next(p for p in METHODS if p[1].name == "F.layer_norm"))
def test_the_check_distinguishes_the_two_functions(op: str, method: Method) -> None:
    other = {PB_RELAX: PLAIN, PLAIN: PB_RELAX}[method.computes]
    with pytest.raises(AssertionError):
        assert_computes(NormCase(op, ROWS, HIDDEN, "bfloat16"), method, other)


def test_no_gradient_flows_through_the_maximum() -> None:
    """The gradient would be of the size of eps, which float64 resolves."""
    tensors = [t.double() for t in inputs(NormCase("layer_norm", ROWS, HIDDEN, "float32"))]
    douts = [torch.randn(ROWS, HIDDEN)]
    actual = differentiate(norm_methods.pb_relax_layer_norm, tensors, douts)
    exact = differentiate(definition("layer_norm", PB_RELAX), tensors, douts)
    for found, expected in zip(actual, exact, strict=True):
        assert (found - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.slow
@of_methods(*(pair for pair in METHODS if pair[1].compiles))
def test_compiled(op: str, method: Method) -> None:
    """For two shapes, with a backward that runs twice, as when it is timed alone."""
    for rows in (ROWS, ROWS + 1):
        case = NormCase(op, rows, HIDDEN, "float32")
        assert_computes(case, method, method.computes)
    leaves = [t.requires_grad_() for t in inputs(case)]
    results = method.prepare(case, None, CPU)(*leaves)
    loss = sum(r.sum() for r in (results if isinstance(results, tuple) else (results,)))
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.float()
    return (x.var(-1, correction=0) + eps).rsqrt(), x.mean(-1)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stubs with the peers' published signatures, computed by torch."""

    def module(name: str, **functions: Any) -> None:
        found = ModuleType(name)
        found.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, found)

    def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
        return F.layer_norm(X, W.shape, W, B, eps)

    def fused_layer_norm_affine(
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalized_shape: Any,
        eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> Tensor:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    def layernorm_fwd(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        return_rstd: bool = False,
        return_mean: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert weight.dtype == torch.float32 and bias is not None and bias.dtype == torch.float32
        assert return_rstd and return_mean and x.ndim == 2
        y = F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)
        return y, *statistics(x, eps)

    def layernorm_bwd(
        x: Tensor, weight: Tensor, dout: Tensor, rstd: Tensor, mean: Tensor, has_bias: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        centred = (x.float() - mean[:, None]) * rstd[:, None]
        weighted = dout.float() * weight
        dx = weighted - weighted.mean(-1, keepdim=True)
        dx = (dx - centred * (weighted * centred).mean(-1, keepdim=True)) * rstd[:, None]
        dweight = (dout.float() * centred).sum(0)
        return dx.to(x.dtype), dweight, dout.float().sum(0) if has_bias else None

    module("liger_kernel.transformers.functional", liger_layer_norm=liger_layer_norm)
    module("apex.normalization.fused_layer_norm", fused_layer_norm_affine=fused_layer_norm_affine)
    module("quack.rmsnorm", layernorm_fwd=layernorm_fwd, layernorm_bwd=layernorm_bwd)


@pytest.mark.parametrize("dtype", TOLERANCE)
@of_methods(*(pair for pair in METHODS if pair[1].name in PACKAGES))
def test_packages_are_called_as_published(
    packages: None, op: str, method: Method, dtype: str
) -> None:
    assert_computes(NormCase(op, ROWS, HIDDEN, dtype), method, PLAIN)


@of_methods(*METHODS)
def test_a_method_that_cannot_run_gives_a_reason(op: str, method: Method) -> None:
    case = NormCase(op, ROWS, HIDDEN)
    here, elsewhere = (method.why_not(case, device) for device in (CPU, CUDA))
    if method.compiles:
        assert here == norm_methods.no_compiler(case, CPU)
    else:
        assert bool(here) == (method.name in ("portable", *PACKAGES))
    if method.name.startswith("cogview_kernels"):
        assert elsewhere == extension.why_not_on(CUDA)
    elif not method.compiles:
        assert bool(elsewhere) == (method.name in PACKAGES and "not installed" in str(here))


def test_names_differ_and_ours_come_first() -> None:
    for methods in (LAYER_NORM_METHODS, SANDWICH_METHODS):
        names = [method.name for method in methods]
        assert len(set(names)) == len(names) and names[0] == "cogview_kernels"


@of_methods(*(pair for pair in METHODS if pair[1].name.startswith("cogview_kernels")))
def test_ours_is_never_a_substitute(
    monkeypatch: pytest.MonkeyPatch, op: str, method: Method
) -> None:
    """On a GPU our method calls the kernels' operators or raises."""

    def never(*args: Any) -> None:
        raise AssertionError("portable")

    for name in ("layer_norm", "sandwich_residual"):
        monkeypatch.setattr(portable, name, never)
    case = NormCase(op, ROWS, HIDDEN)
    function = method.prepare(case, None, CUDA)
    with FakeTensorMode():
        tensors = inputs(case, CUDA)
        monkeypatch.setattr(extension, "why_no_kernel_on", lambda *args: "no GPU")
        with pytest.raises(ck.KernelUnavailable):
            function(*tensors)
        monkeypatch.setattr(extension, "why_no_kernel_on", lambda *args: None)
        results = function(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        assert all(r.shape == tensors[0].shape and r.device.type == "cuda" for r in results)


@of_methods(*(pair for pair in METHODS if pair[1].name not in PACKAGES))
def test_on_fake_gpu_tensors(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, op: str, method: Method
) -> None:
    monkeypatch.setattr(extension, "why_no_kernel_on", lambda *args: None)
    case = NormCase(op, ROWS, HIDDEN, "float16")
    function = method.prepare(case, None, CUDA)
    with FakeTensorMode():
        results = function(*inputs(case, CUDA))
    for result in results if isinstance(results, tuple) else (results,):
        assert (result.shape, result.dtype) == ((ROWS, HIDDEN), torch.float16)
