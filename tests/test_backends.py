"""What PyTorch asks of the operators, and what a backend says when it cannot run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import RESULTS, make_problem, refused
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import cogview_kernels as ck
from cogview_kernels import backends, extension

OPS = torch.ops.cogview_kernels
WINDOW = (4, 2, 0.4, -0.7, 0.3)  # query_window, key_window_times, two biases, softmax_scale


def layout_tensors(batch: int, seqlen: int) -> tuple[Tensor, Tensor]:
    text_len = torch.full((batch,), 5, dtype=torch.int32)
    return text_len, ck.sample_pivots(text_len, seqlen, 6)


# Operators


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [24, 3])
def test_opcheck_attention(dtype: torch.dtype, q_len: int) -> None:
    problem = make_problem(2, 4, 2, q_len, 24, dtype=dtype)
    tensors = layout_tensors(2, 24)
    torch.library.opcheck(
        OPS.three_region_attention_portable.default, (*problem.leaves(), *tensors, *WINDOW)
    )
    out, lse = OPS.three_region_attention_portable(
        problem.q, problem.k, problem.v, *tensors, *WINDOW
    )
    gradients = (problem.dout, problem.dlse.to(lse.dtype))
    torch.library.opcheck(
        OPS.three_region_attention_portable_backward.default,
        (*gradients, problem.q, problem.k, problem.v, out, *tensors, *WINDOW),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("relax", [0, 1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck_layer_norm(dtype: torch.dtype, relax: int, affine: bool) -> None:
    x = torch.randn(5, 12).to(dtype).requires_grad_()
    weight, bias = (torch.randn(12, requires_grad=True) for _ in range(2))
    parameters = (weight, bias) if affine else (None, None)
    torch.library.opcheck(OPS.pb_relax_layer_norm.default, (x, *parameters, 1e-5, relax))
    with torch.no_grad():
        _, mean, rstd = OPS.pb_relax_layer_norm(x, *parameters, 1e-5, relax)
    weight_or_none = weight.detach() if affine else None
    torch.library.opcheck(
        OPS.pb_relax_layer_norm_backward.default,
        (x.detach(), x.detach(), weight_or_none, mean, rstd, torch.float32 if affine else None),
    )


class Block(nn.Module):
    """Attention between two norms, as in a transformer layer; pivots are an input."""

    def __init__(self, hidden: int = 16, num_heads: int = 2, relax: str | None = "row") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = ck.PBRelaxLayerNorm(hidden, relax=relax)
        self.post = ck.PBRelaxLayerNorm(hidden, relax=relax)
        self.pre = ck.PBRelaxLayerNorm(hidden, relax=relax)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor, text_len: Tensor, pivot_idx: Tensor) -> Tensor:
        layout = ck.ThreeRegionLayout(text_len, pivot_idx, 8, 2, 0.5, -0.5)
        packed = self.query_key_value(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        out, lse = ck.three_region_attention(q, k, v, layout, return_lse=True)
        f = out.transpose(1, 2).flatten(2) + lse.mean(1).unsqueeze(-1)
        h, z = ck.sandwich_residual(
            f, x, self.post.weight, self.post.bias, self.pre.weight, self.pre.bias
        )
        return h * z


def run_block(block: Any, module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    module.zero_grad()
    x = inputs[0].detach().requires_grad_()
    y = block(x, *inputs[1:])
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert x.grad is not None and len(gradients) == 8
    return [y.detach(), x.grad, *gradients]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_in_one_graph(compiler: str) -> None:
    module = Block().double()
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    for batch in (2, 3):  # the second time with a dynamic batch size
        inputs = (torch.randn(batch, 40, 16).double(), *layout_tensors(batch, 40))
        expected, actual = run_block(module, module, inputs), run_block(compiled, module, inputs)
        for value, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-9)


def test_compile_with_a_layout_as_input() -> None:
    problem = make_problem(2, 4, 2, k_len=30, dtype=torch.float32)

    def attend(q: Tensor, layout: ck.ThreeRegionLayout) -> Tensor:
        return ck.three_region_attention(q, problem.k, problem.v, layout).sin()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for layout in (problem.layout, ck.ThreeRegionLayout(7, None, 5, 1)):
        torch.testing.assert_close(compiled(problem.q, layout), attend(problem.q, layout))


def test_export() -> None:
    module = Block().eval()
    inputs = (torch.randn(2, 40, 16), *layout_tensors(2, 40))
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(module, inputs, dynamic_shapes=({0: batch},) * 3)
    for size in (2, 5):
        others = (torch.randn(size, 40, 16), *layout_tensors(size, 40))
        torch.testing.assert_close(program.module()(*others), module(*others))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    module = Block()
    inputs = (torch.randn(2, 40, 16), *layout_tensors(2, 40))

    def rematerialised(*tensors: Tensor) -> Any:
        return checkpoint(module, *tensors, use_reentrant=use_reentrant)

    expected = run_block(module, module, inputs)
    assert all(map(torch.equal, run_block(rematerialised, module, inputs), expected))


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_autocast(backend: str) -> None:
    problem = make_problem(2, 4, 2, k_len=30, dtype=torch.float32)
    leaves = problem.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = ck.three_region_attention(
            *leaves, problem.layout, backend=backend, return_lse=True
        )
        double = ck.three_region_attention(
            *(t.double() for t in leaves), problem.layout, backend=backend
        )
        weight = torch.ones(8)
        norm = ck.pb_relax_layer_norm(out, weight, weight, backend=backend)
        wide = ck.pb_relax_layer_norm(leaves[0], weight, weight, backend=backend)
    assert (out.dtype, lse.dtype, double.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    assert (norm.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    expected = ck.three_region_attention(
        *(t.bfloat16() for t in leaves), problem.layout, backend=backend
    )
    assert torch.equal(out, expected)
    outside = ck.pb_relax_layer_norm(leaves[0], weight, weight, backend=backend)
    assert torch.equal(wide, outside), "a norm computes in the dtype of its input"
    for gradient in torch.autograd.grad((out.float() + norm.float()).square().sum(), leaves):
        assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


def test_autocast_mixes_dtypes() -> None:
    """As for scaled_dot_product_attention: whatever autocast can cast to one dtype is accepted."""
    problem = make_problem(2, 4, 2, k_len=30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ck.three_region_attention(
            problem.q.bfloat16(), problem.k, problem.v, problem.layout
        )
        expected = ck.three_region_attention(problem.q, problem.k, problem.v, problem.layout)
    assert torch.equal(mixed, expected)


def test_functional_transforms() -> None:
    """``reference`` is ordinary PyTorch; ``portable`` is batched by vmap."""
    problem = make_problem(1, 2, k_len=8, head_dim=3)
    layout = ck.ThreeRegionLayout(1, torch.tensor([[2, 4]], dtype=torch.int32), 2, 1)

    def attend(q: Tensor, backend: str = "reference") -> Tensor:
        return ck.three_region_attention(q, problem.k, problem.v, layout, backend=backend)

    jacobian = torch.func.jacrev(attend)(problem.q)
    expected = torch.autograd.functional.jacobian(lambda q: attend(q, "portable"), problem.q)
    torch.testing.assert_close(jacobian, expected)
    queries = torch.randn(3, *problem.q.shape, dtype=torch.float64)
    for backend in ("reference", "portable"):
        batched = torch.func.vmap(lambda q, backend=backend: attend(q, backend))(queries)
        each = torch.stack([attend(q, backend) for q in queries])
        torch.testing.assert_close(batched, each)
    norm = torch.func.vmap(lambda x: ck.pb_relax_layer_norm(x, None, None))
    torch.testing.assert_close(norm(queries), ck.pb_relax_layer_norm(queries, None, None))


def test_second_derivatives() -> None:
    problem = make_problem(1, 1, k_len=8)
    for backend, possible in (("reference", True), ("portable", False)):
        q, k, v = problem.leaves()
        out = ck.three_region_attention(q, k, v, problem.layout, backend=backend)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        if possible:
            assert torch.autograd.grad(dq.square().sum(), k)[0].abs().max() > 0
        else:
            with pytest.raises(RuntimeError, match="three_region_attention_portable_backward"):
                torch.autograd.grad(dq.square().sum(), k)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_nothing_is_left_unwritten(deterministic: None) -> None:
    """In this mode PyTorch fills new memory with NaN, and refuses what is not deterministic."""
    assert torch.empty(2).isnan().all()
    for q_len in (100, 37, 1):
        results = make_problem(3, 4, 2, q_len, 100, dtype=torch.float32).run("portable")
        assert all(results[name].isfinite().all() for name in RESULTS)
    assert ck.sample_pivots(torch.tensor([3, 60]), 64, 10).max() == 64
    x = torch.randn(5, 12, requires_grad=True)
    y, mean, rstd = OPS.pb_relax_layer_norm(x, None, None, 1e-5, 1)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    assert mean.isfinite().all() and rstd.isfinite().all()


# Backends


@pytest.mark.parametrize("backend", ["cuda", "host_model"])
def test_a_backend_that_cannot_run_says_why(backend: str) -> None:
    problem = make_problem(dtype=torch.float32)
    x, none = torch.randn(3, 8), (None,) * 4
    reason = {"cuda": "on cpu, not on a CUDA device|were not built", "host_model": "no host model"}
    norm = f"^backend='{backend}': .*({reason[backend]})"
    assert issubclass(ck.KernelUnavailable, RuntimeError)
    with refused(ck.KernelUnavailable, f"^backend='{backend}': .*backend='portable'"):
        ck.three_region_attention(problem.q, problem.k, problem.v, problem.layout, backend=backend)
    with refused(ck.KernelUnavailable, norm):
        ck.pb_relax_layer_norm(x, None, None, backend=backend)
    with refused(ck.KernelUnavailable, norm):
        ck.sandwich_residual(x, x, *none, backend=backend)
    # Bad input is named first: it would be wrong on every backend.
    with refused(ValueError, "eps: expected"):
        ck.pb_relax_layer_norm(x, None, None, eps=-1.0, backend=backend)
    with refused(ValueError, "k: expected"):
        ck.three_region_attention(
            problem.q, problem.k[:1], problem.v, problem.layout, backend=backend
        )


def test_float64_has_no_kernel() -> None:
    with refused(ck.KernelUnavailable, "takes float32, float16 and bfloat16, got torch.float64"):
        ck.pb_relax_layer_norm(torch.randn(3, 8).double(), None, None, backend="cuda")


def test_falling_back_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    layout = ck.ThreeRegionLayout(3, None, 4, 1)
    with FakeTensorMode():
        q = torch.randn(2, 4, 16, 8, device="cuda")
        with pytest.warns(UserWarning, match="cogview_kernels: using backend='portable': ") as said:
            for _ in range(3):
                ck.three_region_attention(q, q, q, layout)
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore:cogview_kernels")
def test_fake_cuda_tensors() -> None:
    """Tracing for a GPU on a machine that has none."""
    with FakeTensorMode():
        x = torch.randn(6, 16, device="cuda", dtype=torch.float16)
        weight = torch.ones(16, device="cuda")
        y, mean, rstd = OPS.pb_relax_layer_norm(x, weight, weight, 1e-5, 1)
        dx, dweight, dbias = OPS.pb_relax_layer_norm_backward(
            y, x, weight, mean, rstd, torch.float32
        )
        shapes = {y: (6, 16), mean: (6,), rstd: (6,), dx: (6, 16), dweight: (16,), dbias: (16,)}
        for tensor, shape in shapes.items():
            assert tensor.shape == shape and tensor.device.type == "cuda"
            assert tensor.dtype == (torch.float16 if len(shape) == 2 else torch.float32)
        assert ck.pb_relax_layer_norm(x, weight, weight).device.type == "cuda"

        q = torch.randn(2, 4, 16, 8, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(2, 2, 16, 8, device="cuda", dtype=torch.bfloat16)
        text_len = torch.zeros(2, device="cuda", dtype=torch.int32)
        layout = ck.ThreeRegionLayout(text_len, ck.sample_pivots(text_len, 16, 4), 4, 1)
        out, lse = ck.three_region_attention(q, k, k, layout, backend="portable", return_lse=True)
        assert (out.shape, out.dtype, out.device.type) == ((2, 4, 16, 8), q.dtype, "cuda")
        assert (lse.shape, lse.dtype) == ((2, 4, 16), torch.float32)
        with pytest.raises(ValueError, match="k: expected device cuda:0 as q, got cpu"):
            ck.three_region_attention(q, torch.randn(2, 2, 16, 8).bfloat16(), k, layout)
        with pytest.raises(ValueError, match="layout.text_len: expected device cpu as the queries"):
            cpu = torch.randn(2, 2, 16, 8)
            ck.three_region_attention(cpu, cpu, cpu, layout)


def test_meta_tensors() -> None:
    q, k = torch.randn(2, 4, 16, 8, device="meta"), torch.randn(2, 2, 16, 8, device="meta")
    for backend in ("portable", "reference"):
        out = ck.three_region_attention(q, k, k, ck.ThreeRegionLayout(3, None), backend=backend)
        assert out.shape == q.shape and out.device.type == "meta"
    assert Block().to("meta").norm(torch.empty(2, 16, device="meta")).shape == (2, 16)


def test_what_kernels_run_on() -> None:
    """Machine code runs within its major version, from its minor version up; 9.0a on 9.0 alone;
    PTX on everything newer."""
    for architecture, yes, no in (
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("9.0a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("12.0+PTX", [(12, 0), (12, 1), (13, 0)], [(10, 0), (9, 0)]),
    ):
        assert all(extension._runs_on(architecture, *device) for device in yes), architecture
        assert not any(extension._runs_on(architecture, *device) for device in no), architecture


def test_report_of_the_installation() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cogview_kernels"], capture_output=True, text=True, check=True
    )
    for fact in ("cogview_kernels", torch.__version__, "kernels built for", "CUDA kernels here"):
        assert fact in done.stdout
    reason = extension.why_not_usable()
    assert (f"not usable: {reason}" in done.stdout) == (reason is not None)
