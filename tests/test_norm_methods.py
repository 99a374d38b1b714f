"""The suite's norm and sandwich methods, ours and the peers', compute what they declare."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cogview_kernels as ck
from benchmarks.suite import norms
from benchmarks.suite.cases import NormCase
from benchmarks.suite.methods import Method
from benchmarks.suite.norms import LAYER_NORM_METHODS, PB_RELAX, PLAIN, SANDWICH_METHODS
from benchmarks.suite.problems import NormProblem, NotMeasured

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
METHODS = [
    (op, method)
    for op, methods in (("layer_norm", LAYER_NORM_METHODS), ("sandwich_residual", SANDWICH_METHODS))
    for method in methods
    if not method.graph
]
PACKAGES = ("liger-kernel", "quack-kernels")


def of_methods(*pairs: tuple[str, Method]) -> Any:
    ids = [f"{op}-{method.name}" for op, method in pairs]
    return pytest.mark.parametrize("op, method", pairs, ids=ids)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


class Small(NormProblem):
    """Small inputs: eps makes plain LayerNorm differ from PB-relax."""

    def random(self, *shape: int) -> Tensor:
        return 0.01 * super().random(*shape) + 0.005


def assert_computes(case: NormCase, method: Method) -> None:
    problem = Small(case, CPU)
    assert problem.prepared(method)[1]["errors"].keys() >= {f"d{problem.names[0]}"}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stubs with the peers' published signatures, computed by torch."""

    def module(name: str, **functions: Any) -> None:
        found = ModuleType(name)
        found.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, found)

    def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
        return F.layer_norm(X, W.shape, W, B, eps)

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
        y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
        return y.to(x.dtype), rstd[:, 0], mean[:, 0]

    def layernorm_bwd(
        x: Tensor, weight: Tensor, dout: Tensor, rstd: Tensor, mean: Tensor, has_bias: bool = True
    ) -> tuple[Tensor, ...]:
        assert has_bias
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dout.float(),
            x.float(),
            weight.shape,
            mean[:, None],
            rstd[:, None],
            weight,
            weight,
            [True] * 3,
        )
        return dx.to(x.dtype), dweight, dbias

    module("liger_kernel.transformers.functional", liger_layer_norm=liger_layer_norm)
    module("quack.rmsnorm", layernorm_fwd=layernorm_fwd, layernorm_bwd=layernorm_bwd)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@of_methods(*METHODS)
def test_what_a_method_computes(packages: None, op: str, method: Method, dtype: str) -> None:
    assert_computes(NormCase(op, 5, 48, dtype), method)


@of_methods(*(pair for pair in METHODS if pair[1].name in ("cogview_kernels", "F.layer_norm")))
def test_the_check_distinguishes_the_two_functions(op: str, method: Method) -> None:
    other = {PB_RELAX: PLAIN, PLAIN: PB_RELAX}[method.computes]
    liar = Method("liar", other, method.prepare)
    with pytest.raises(NotMeasured, match="wrong"):
        assert_computes(NormCase(op, 5, 48, "bfloat16"), liar)


def test_pytorch_s_pb_relax_divides_by_each_row_s_maximum_without_its_gradient() -> None:
    """Either would differ by a fraction of eps, which float64 resolves."""
    leaves = [torch.randn(*s).double().requires_grad_() for s in ((5, 48), (48,), (48,))]
    exact = ck.pb_relax_layer_norm(*leaves, relax="row", backend="reference")
    found = norms.pb_relax_layer_norm(*leaves)
    dout = torch.randn(5, 48).double()
    pairs = zip(*((y, *torch.autograd.grad(y, leaves, dout)) for y in (found, exact)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@of_methods(*(pair for pair in METHODS if pair[1].compiles))
def test_compiled(op: str, method: Method) -> None:
    """With a backward that runs twice, as when it is timed alone."""
    with torch.compiler.set_stance("default"):
        problem = Small(NormCase(op, 6, 48, "float32"), CPU)
        backward = problem.timed(problem.prepared(method)[0], "backward")
        assert all(map(torch.equal, backward(), backward()))
