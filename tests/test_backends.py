"""What PyTorch asks of the operators, and what a backend says when it cannot run."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    RESULTS,
    Problem,
    assert_as_accurate_as_torch,
    make_problem,
    refused,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cogview_kernels as ck
from cogview_kernels import backends, extension
from cogview_kernels.attention import operators as attention

ROOT = Path(__file__).resolve().parents[1]
OPS = torch.ops.cogview_kernels
WINDOW = (4, 2, 0.4, -0.7, 0.3)  # query_window, key_window_times, two biases, softmax_scale
NO_CUDA, NO_HOST_MODEL = extension.why_not_usable(), extension.why_not_host_model()
HOST_MODEL = pytest.param(
    "host_model", marks=pytest.mark.skipif(NO_HOST_MODEL is not None, reason=str(NO_HOST_MODEL))
)
KERNELS = [
    HOST_MODEL,
    pytest.param("cuda", marks=pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA))),
]


def kernel_problem(
    backend: str, *shape: int, dtype: torch.dtype = torch.float16, by_head: bool = False
) -> Problem:
    """A problem that the kernels take, where ``backend`` runs. ``by_head``: each of two key/value
    heads has pivots of its own."""
    problem = make_problem(*(shape or (2, 4, 2, 30, 40)), head_dim=32, dtype=dtype)
    device = "cuda" if backend == "cuda" else "cpu"
    if by_head:
        pivots = problem.layout.pivot_idx
        assert pivots is not None
        layout = dataclasses.replace(problem.layout, pivot_idx=torch.stack([pivots, pivots + 1], 1))
        problem = dataclasses.replace(problem, layout=layout)
    layout = dataclasses.replace(problem.layout, pivot_idx=problem.layout.pivot_idx.to(device))  # type: ignore[union-attr]
    tensors = {name: getattr(problem, name).to(device) for name in ("q", "k", "v", "dout", "dlse")}
    return dataclasses.replace(problem, layout=layout, **tensors)


def layout_tensors(batch: int, seqlen: int) -> tuple[Tensor, Tensor]:
    text_len = torch.full((batch,), 5, dtype=torch.int32)
    return text_len, ck.sample_pivots(text_len, seqlen, 6)


# Operators


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len, by_head", [(24, False), (24, True), (3, False)])
def test_opcheck_attention(dtype: torch.dtype, q_len: int, by_head: bool) -> None:
    problem = make_problem(2, 4, 2, q_len, 24, dtype=dtype)
    text_len, pivots = layout_tensors(2, 24)
    tensors = text_len, torch.stack([pivots, pivots + 1], 1) if by_head else pivots
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


@pytest.mark.thinned
@pytest.mark.parametrize("backend", ["portable", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "q_len, packed, by_head",
    [(24, True, False), (24, False, True), (3, True, False), (24, True, True)],
)
def test_opcheck_attention_kernels(
    backend: str, dtype: torch.dtype, q_len: int, packed: bool, by_head: bool
) -> None:
    """``portable``: what computes these operators on the CPU."""
    problem = kernel_problem(backend, 2, 4, 2, q_len, 24, dtype=dtype, by_head=by_head)
    q, k, v = (t if packed else t.contiguous() for t in (problem.q, problem.k, problem.v))
    pack, attend, differentiate = (
        operator(f"three_region_attention{part}", backend)
        for part in ("_far_keys", "", "_backward")
    )
    text_len, pivot_idx = problem.layout.tensors(2, q.device)
    torch.library.opcheck(pack, (text_len, pivot_idx, 24))
    far_keys = pack(text_len, pivot_idx, 24)
    leaves = (t.detach().requires_grad_() for t in (q, k, v))
    torch.library.opcheck(attend, (*leaves, far_keys, *WINDOW))
    out, row_max, row_log_sum = attend(q, k, v, far_keys, *WINDOW)
    for dlse in (None, problem.dlse.float()):
        kept = q, k, v, out, row_max, row_log_sum, far_keys
        torch.library.opcheck(differentiate, (problem.dout, dlse, *kept, *WINDOW))


def operator(name: str, backend: str) -> Any:
    """The functional operator behind ``backend``."""
    if backend == "host_model":
        name = name.replace("attention", "attention_host_model").replace("norm", "norm_host_model")
    return getattr(OPS, name).default


@pytest.mark.thinned
@pytest.mark.parametrize("backend", ["portable", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("relax", [0, 1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck_layer_norm(backend: str, dtype: torch.dtype, relax: int, affine: bool) -> None:
    norm, differentiate = (
        operator(name, backend) for name in ("pb_relax_layer_norm", "pb_relax_layer_norm_backward")
    )
    device = "cuda" if backend == "cuda" else "cpu"
    x = torch.randn(5, 12, device=device).to(dtype).requires_grad_()
    weight, bias = (torch.randn(12, device=device, requires_grad=True) for _ in range(2))
    parameters = (weight, bias) if affine else (None, None)
    torch.library.opcheck(norm, (x, *parameters, 1e-5, relax))
    with torch.no_grad():
        _, statistics = norm(x, *parameters, 1e-5, relax)
    weight_or_none = weight.detach() if affine else None
    torch.library.opcheck(
        differentiate,
        (x.detach(), x.detach(), weight_or_none, statistics, torch.float32 if affine else None),
    )


class Block(nn.Module):
    """Attention between two norms, as in a transformer layer; pivots are an input."""

    def __init__(self, backend: str = "auto", num_heads: int = 2) -> None:
        super().__init__()
        self.backend = backend
        self.num_heads = num_heads
        hidden = num_heads * (8 if backend == "auto" else 32)
        self.norm, self.post, self.pre = (ck.PBRelaxLayerNorm(hidden) for _ in range(3))
        self.query_key_value = nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor, text_len: Tensor, pivot_idx: Tensor) -> Tensor:
        layout = ck.ThreeRegionLayout(text_len, pivot_idx, 8, 2, 0.5, -0.5)
        backend = self.backend
        x_norm = ck.pb_relax_layer_norm(x, self.norm.weight, self.norm.bias, backend=backend)
        packed = self.query_key_value(x_norm).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        out, lse = ck.three_region_attention(q, k, v, layout, backend=backend, return_lse=True)
        f = out.transpose(1, 2).flatten(2) + lse.mean(1).unsqueeze(-1).to(out.dtype)
        parameters = self.post.weight, self.post.bias, self.pre.weight, self.pre.bias
        h, z = ck.sandwich_residual(f, x, *parameters, backend=backend)
        return h * z

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Tokens and a layout for this block, where it lies and in its dtype."""
        weight = self.query_key_value.weight
        x = torch.randn(batch, 40, weight.shape[1]).to(weight)
        return x, *(tensor.to(weight.device) for tensor in layout_tensors(batch, 40))


def make_block(backend: str) -> Block:
    """In float64 for the portable path, in float16 for the kernels."""
    block = Block(backend).to("cuda" if backend == "cuda" else "cpu")
    return block.double() if backend == "auto" else block.half()


def run_block(block: Any, module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    module.zero_grad()
    x = inputs[0].detach().requires_grad_()
    y = block(x, *inputs[1:])
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert x.grad is not None and len(gradients) == 8
    return [y.detach(), x.grad, *gradients]


@pytest.mark.parametrize(
    "backend, compiler",
    [
        ("auto", "aot_eager"),
        pytest.param("auto", "inductor", marks=pytest.mark.slow),
        *(
            pytest.param(*kernel.values, compiler, marks=kernel.marks)
            for kernel in KERNELS
            for compiler in ("aot_eager", "inductor")
        ),
    ],
)
def test_compile_in_one_graph(backend: str, compiler: str) -> None:
    module = make_block(backend)
    tolerance = 1e-9 if backend == "auto" else 2e-2  # of the largest entry
    # A cache on disk would know an older form of the operators.
    with torch.compiler.config.patch(force_disable_caches=True):
        compiled = torch.compile(module, backend=compiler, fullgraph=True)
        for batch in (2, 3):  # the second time with a dynamic batch size
            inputs = module.inputs(batch)
            expected = run_block(module, module, inputs)
            actual = run_block(compiled, module, inputs)
            for value, right in zip(actual, expected, strict=True):
                atol = tolerance * right.abs().max().item()
                torch.testing.assert_close(value, right, rtol=0, atol=atol)


def test_compile_with_a_layout_as_input() -> None:
    problem = make_problem(2, 4, 2, k_len=30, dtype=torch.float32)

    def attend(q: Tensor, layout: ck.ThreeRegionLayout) -> Tensor:
        return ck.three_region_attention(q, problem.k, problem.v, layout).sin()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    pivots = problem.layout.pivot_idx
    assert pivots is not None
    by_head = dataclasses.replace(problem.layout, pivot_idx=torch.stack([pivots, pivots + 1], 1))
    for layout in (problem.layout, ck.ThreeRegionLayout(7, None, 5, 1), by_head):
        torch.testing.assert_close(compiled(problem.q, layout), attend(problem.q, layout))


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
def test_export(backend: str) -> None:
    module = make_block(backend).eval()
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(module, module.inputs(2), dynamic_shapes=({0: batch},) * 3)
    for size in (2, 5):
        inputs = module.inputs(size)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend: str, use_reentrant: bool) -> None:
    module = make_block(backend)
    inputs = module.inputs(2)

    def rematerialised(*tensors: Tensor) -> Any:
        return checkpoint(module, *tensors, use_reentrant=use_reentrant)

    expected = run_block(module, module, inputs)
    assert all(map(torch.equal, run_block(rematerialised, module, inputs), expected))


@pytest.mark.parametrize("backend", ["portable", "reference", *KERNELS])
def test_autocast(backend: str) -> None:
    problem = kernel_problem(backend, dtype=torch.float32)
    leaves, device = problem.leaves(), problem.q.device.type
    with torch.autocast(device, torch.bfloat16):
        out, lse = ck.three_region_attention(
            *leaves, problem.layout, backend=backend, return_lse=True
        )
        double = ck.three_region_attention(
            *(t.double() for t in leaves), problem.layout, backend="portable"
        )
        weight = torch.ones(32, device=device)
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


@pytest.fixture
def no_vmap_fallback() -> Iterator[None]:
    """Operators without a rule of their own are an error, not a slow loop."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


@pytest.mark.usefixtures("no_vmap_fallback")
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("backend", ["portable", *KERNELS])
def test_vmap_of_the_attention_operators(backend: str, by_head: bool) -> None:
    """Forward and backward take a mapped dimension as part of the batch."""
    problem = kernel_problem(backend, by_head=by_head)
    k = problem.k.detach().requires_grad_()
    queries = torch.randn(3, *problem.q.shape).to(problem.q)

    def attend(q: Tensor) -> Any:
        layout = problem.layout
        return ck.three_region_attention(q, k, problem.v, layout, backend=backend, return_lse=True)

    each = [torch.stack(results) for results in zip(*map(attend, queries), strict=True)]
    for dim in (0, 2):
        mapped = queries.movedim(0, dim).contiguous()
        for batched, right in zip(torch.func.vmap(attend, dim)(mapped), each, strict=True):
            assert torch.equal(batched, right)

    def attend_to(pivots: Tensor) -> Tensor:
        layout = dataclasses.replace(problem.layout, pivot_idx=pivots)
        return ck.three_region_attention(problem.q, k, problem.v, layout, backend=backend)

    pivots = problem.layout.pivot_idx
    assert pivots is not None
    mapped = torch.stack([pivots, pivots + 1, pivots + 2])
    alone = torch.stack([*map(attend_to, mapped)])
    assert torch.equal(torch.func.vmap(attend_to)(mapped), alone)
    assert not torch.equal(alone[0], alone[1])
    out, _ = attend(problem.q)
    upstream = torch.randn(3, *out.shape).to(out)
    differentiate = functools.partial(torch.autograd.grad, out, k, retain_graph=True)
    (batched,) = torch.func.vmap(differentiate)(upstream)
    assert torch.equal(batched, torch.cat([differentiate(dout)[0][None] for dout in upstream]))


@pytest.mark.usefixtures("no_vmap_fallback")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("relax", ["row", "tensor", None])
@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (0, 0), (None, 1)])
def test_vmap_of_the_layer_norm_kernels(
    backend: str, relax: str | None, in_dims: tuple[int | None, ...]
) -> None:
    def norm(x: Tensor, parameter: Tensor) -> Tensor:
        return ck.pb_relax_layer_norm(x, parameter, parameter, relax=relax, backend=backend)

    device = "cuda" if backend == "cuda" else "cpu"
    # Samples of different magnitude, so that one maximum over all of them would be seen.
    magnitude = torch.tensor([1.0, 4.0, 1e3], device=device).view(3, 1, 1, 1)
    x = torch.randn(3, 4, 5, 32, device=device) * magnitude
    parameter = torch.randn(3, 32, device=device)
    mapped, samples = [], []
    for part, dim in zip((x, parameter), in_dims, strict=True):
        mapped.append(part[0] if dim is None else part.movedim(0, dim).contiguous())
        samples.append(part[:1].expand_as(part) if dim is None else part)
    batched = torch.func.vmap(norm, in_dims)(*mapped)
    assert torch.equal(
        batched, torch.stack([norm(*sample) for sample in zip(*samples, strict=True)])
    )

    x = x[0].detach().requires_grad_()
    parameter = parameter[0].detach().requires_grad_()
    out = norm(x, parameter)
    upstream = torch.randn(3, *out.shape, device=device)
    gradients = functools.partial(torch.autograd.grad, out, (x, parameter), retain_graph=True)
    each = zip(*map(gradients, upstream), strict=True)
    for together, alone in zip(torch.func.vmap(gradients)(upstream), each, strict=True):
        assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("backend", ["portable", *KERNELS])
def test_vmap_over_nothing(backend: str) -> None:
    problem = kernel_problem(backend)
    layout, x = problem.layout, problem.q
    none = x.expand(0, *x.shape)

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return ck.three_region_attention(q, k, problem.v, layout, backend=backend)

    def norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return ck.pb_relax_layer_norm(x, weight, weight, backend=backend)

    assert torch.func.vmap(attend, (0, None))(none, problem.k).shape == none.shape
    assert torch.func.vmap(attend, (None, 1))(x, problem.k[:, None][:, :0]).shape == none.shape
    assert torch.func.vmap(norm)(none).shape == none.shape
    assert torch.func.vmap(norm)(none, x.new_zeros(0, x.shape[-1])).shape == none.shape


@pytest.mark.parametrize("backend", ["reference", "portable", *KERNELS])
@pytest.mark.parametrize("name", ["q", "k", "v", "x", "weight", "bias"])
def test_forward_mode(backend: str, name: str) -> None:
    """A derivative, or an error that names the tensor: never a zero."""
    problem = kernel_problem(backend)
    attention_tensors = {"q": problem.q, "k": problem.k, "v": problem.v}
    norm_tensors = dict(zip(("weight", "bias"), problem.q[0, 0], strict=False), x=problem.q)

    def call(tensor: Tensor) -> Tensor:
        if name in norm_tensors:
            return ck.pb_relax_layer_norm(**{**norm_tensors, name: tensor}, backend=backend)
        tensors = {**attention_tensors, name: tensor}
        return ck.three_region_attention(**tensors, layout=problem.layout, backend=backend)

    tensor = {**attention_tensors, **norm_tensors}[name]
    tangent = torch.randn_like(tensor)
    if backend == "reference" or (backend == "portable" and name in norm_tensors):
        assert torch.func.jvp(call, (tensor,), (tangent,))[1].abs().max() > 0
        return
    refuses = pytest.raises(NotImplementedError, match=f"^{name}: expected no tangent.*'reference'")
    with refuses:
        torch.func.jvp(call, (tensor,), (tangent,))
    with refuses:
        torch.func.jvp(torch.func.vmap(call), (tensor[None],), (tangent[None],))
    with torch.autograd.forward_ad.dual_level():
        call(tensor)
        torch.func.vmap(call)(tensor[None])
        with refuses:
            call(torch.autograd.forward_ad.make_dual(tensor, tangent))


@pytest.mark.parametrize("backend", ["reference", "portable", *KERNELS])
def test_second_derivatives(backend: str) -> None:
    problem = kernel_problem(backend)
    q, k, v = problem.leaves()
    out = ck.three_region_attention(q, k, v, problem.layout, backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    if backend == "reference":
        assert torch.autograd.grad(dq.square().sum(), k)[0].abs().max() > 0
    else:
        with pytest.raises(RuntimeError, match="three_region_attention.*_backward.*no autograd"):
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
    y, statistics = OPS.pb_relax_layer_norm(x, None, None, 1e-5, 1)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    assert statistics.isfinite().all()
    results = OPS.sandwich_residual(x, x, True, *(None,) * 4, torch.tensor([3]), 6554, 1e-5, 1)
    assert torch.autograd.grad(results[:2], x, (y, y))[0].isfinite().all()
    assert all(result.isfinite().all() for result in results)


# Backends


@pytest.mark.parametrize("backend", ["cuda", "host_model"])
def test_a_backend_that_cannot_run_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_not_host_model", lambda: "there is no host model")
    problem = make_problem(head_dim=32, dtype=torch.float16)
    x, none = torch.randn(3, 8), (None,) * 4
    reason = {"cuda": "on cpu, not on a CUDA device|were not built", "host_model": "no host model"}
    match = f"^backend='{backend}': .*({reason[backend]}).*backend='portable'"
    assert issubclass(ck.KernelUnavailable, RuntimeError)
    with refused(ck.KernelUnavailable, match):
        ck.three_region_attention(problem.q, problem.k, problem.v, problem.layout, backend=backend)
    with refused(ck.KernelUnavailable, match):
        ck.pb_relax_layer_norm(x, None, None, backend=backend)
    with refused(ck.KernelUnavailable, match):
        ck.sandwich_residual(x, x, *none, backend=backend)
    # Bad input is named first: it would be wrong on every backend.
    with refused(ValueError, "eps: expected"):
        ck.pb_relax_layer_norm(x, None, None, eps=-1.0, backend=backend)
    with refused(ValueError, "k: expected"):
        ck.three_region_attention(
            problem.q, problem.k[:1], problem.v, problem.layout, backend=backend
        )


def test_the_host_model_takes_cpu_tensors() -> None:
    with FakeTensorMode():
        q = torch.randn(2, 4, 16, 32, device="cuda", dtype=torch.float16)
        with pytest.raises(ck.KernelUnavailable, match="takes tensors on the CPU, got cuda"):
            ck.three_region_attention(
                q, q, q, ck.ThreeRegionLayout(3, None, 4, 1), backend="host_model"
            )


@pytest.mark.parametrize("backend", ["cuda", "host_model"])
@pytest.mark.parametrize(
    "dtype, head_dim, k_len, match",
    [
        (torch.float32, 32, 8, "float16 and bfloat16, got torch.float32; torch.autocast casts"),
        (torch.float64, 32, 8, "float16 and bfloat16, got torch.float64; backend='portable'"),
        (torch.float16, 40, 8, "head dimensions of 32, 64, 96 and 128, got 40"),
        (torch.float16, 32, 2**30 + 1, r"up to 2\^30 keys, got 1073741825"),
    ],
)
def test_what_the_attention_kernels_take(
    backend: str, dtype: torch.dtype, head_dim: int, k_len: int, match: str
) -> None:
    q = torch.randn(1, 1, 1, head_dim).to(dtype)
    k = q.expand(1, 1, k_len, head_dim)
    layout = ck.ThreeRegionLayout(0, None, 1, 1)
    match = f"the kernels take {match}"
    if head_dim == 40:  # what only the compiled module knows
        match = extension.why_no_kernel_on(q.device, backend) or match
        match = match.split(";")[0]
    with refused(ck.KernelUnavailable, f"^backend='{backend}': {match}"):
        ck.three_region_attention(q, k, k, layout, backend=backend)


def test_float64_has_no_kernel() -> None:
    with refused(ck.KernelUnavailable, "take float32, float16 and bfloat16, got torch.float64"):
        ck.pb_relax_layer_norm(torch.randn(3, 8).double(), None, None, backend="cuda")


def test_falling_back_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    layout = ck.ThreeRegionLayout(3, None, 4, 1)
    message = r"cogview_kernels: three_region_attention: using backend='portable': .*torch.float32"
    with FakeTensorMode():
        q = torch.randn(2, 4, 16, 32, device="cuda")
        with pytest.warns(UserWarning, match=message) as warned:
            for _ in range(3):
                ck.three_region_attention(q, q, q, layout)
        norm = ck.PBRelaxLayerNorm(32, device="cuda", dtype=torch.float64).requires_grad_(False)
        with pytest.warns(UserWarning, match="pb_relax_layer_norm: using") as warned_by_the_module:
            norm(q.double())
    assert len(warned) == len(warned_by_the_module) == 1
    # The warning shows the caller's line, also with torch's modules between.
    assert warned[0].filename == warned_by_the_module[0].filename == __file__


def test_falling_back_does_not_break_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())

    def choose(x: Tensor) -> Tensor:
        taken = backends.kernels_usable("f", "auto", f"no kernel for {x.dtype}")
        return x + 1 if taken else x - 1

    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match="f: using backend='portable': no kernel for torch.float"):
        assert torch.equal(compiled(torch.ones(2)), torch.zeros(2))


# Kernels


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_are_wired(backend: str, dtype: torch.dtype) -> None:
    """Every argument arrives: all of them matter in this problem."""
    problem = kernel_problem(backend, dtype=dtype)
    assert_as_accurate_as_torch(
        kernel_problem("cpu", dtype=dtype),
        {name: result.cpu() for name, result in problem.run(backend).items()},
    )
    for change in ({"text_len": 9}, {"pivot_idx": None}, {"query_window": 5}, {"text_bias": 0.0}):
        layout = dataclasses.replace(problem.layout, **change)  # type: ignore[arg-type]
        other = dataclasses.replace(problem, layout=layout).run(backend)
        assert not torch.equal(other["out"], problem.run(backend)["out"]), change


class BackwardArguments(TorchDispatchMode):
    """What the attention's backward operator is given."""

    dlse: Any = "never called"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "three_region_attention" in str(func) and "backward" in str(func):
            self.dlse = args[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["portable", *KERNELS])
def test_either_result_may_go_without_a_gradient(backend: str) -> None:
    problem = kernel_problem(backend)
    leaves = problem.leaves()
    both = problem.run(backend)
    out, lse = ck.three_region_attention(
        *leaves, problem.layout, problem.softmax_scale, backend, return_lse=True
    )
    with BackwardArguments() as given:
        of_out = torch.autograd.grad(out, leaves, problem.dout, retain_graph=True)
    if backend != "portable":
        assert given.dlse is None, "no zeros are made for it"
    of_lse = torch.autograd.grad(lse, leaves, problem.dlse.to(lse), materialize_grads=True)
    for name, one, other in zip(RESULTS[2:], of_out, of_lse, strict=True):
        total = one.float() + other.float()
        torch.testing.assert_close(total, both[name].float(), rtol=0, atol=4e-3)
        assert one.abs().max() > 0.1
        assert (other.abs().max() > 0.1) == (name != "dv"), "lse does not depend on v"


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_the_operator_on_the_cpu_computes_the_same(backend: str, by_head: bool) -> None:
    """A program exported from a GPU, run on a CPU: the same numbers go between its operators."""
    problem = kernel_problem("cpu", by_head=by_head)
    text_len, pivot_idx = problem.layout.tensors(2, torch.device("cpu"))
    pivot_idx = pivot_idx.clone()
    pivot_idx[0, ..., 3:] = torch.tensor([-7, 7, 2**31 - 1])  # padding in any place
    window = (*WINDOW[:2], 0.0, 0.0, 0.2)
    results = []
    for name in ("portable", backend):
        device = "cuda" if name == "cuda" else "cpu"
        pack, attend = (
            operator(f"three_region_attention{part}", name) for part in ("_far_keys", "")
        )
        far_keys = pack(text_len.to(device), pivot_idx.to(device), 40)
        leaves = [tensor.to(device).detach().requires_grad_() for tensor in (problem.q, problem.k)]
        out, row_max, row_log_sum = attend(*leaves, problem.v.to(device), far_keys, *window)
        gradients = torch.autograd.grad(out, leaves, problem.dout.to(device))
        assert not row_max.requires_grad and row_log_sum.requires_grad
        results.append([far_keys.cpu(), (row_max + row_log_sum).cpu(), out.cpu(), *gradients])
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-3, atol=4e-3)


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_in_any_place_of_memory(backend: str) -> None:
    """Misaligned rows and upstream gradients with any strides are copied, not refused."""
    problem = kernel_problem(backend)

    def shifted(tensor: Tensor, offset: int, last: int) -> Tensor:
        memory = tensor.new_zeros((*tensor.shape[:3], last)).flatten()
        memory = torch.cat([memory, memory.new_zeros(offset)])[offset:]
        return memory.view(*tensor.shape[:3], last)[..., :32].copy_(tensor)

    expected = problem.run(backend)
    for offset, last in ((1, 32), (0, 33), (8, 40)):
        q, k, v = (shifted(t, offset, last) for t in (problem.q, problem.k, problem.v))
        actual = dataclasses.replace(problem, q=q, k=k, v=v).run(backend)
        assert all(torch.equal(actual[name], expected[name]) for name in RESULTS)
    contiguous = problem.dout[:1, :, :, :1].expand(problem.dout.shape).contiguous()
    for dout in (contiguous[:1, :, :, :1].expand(contiguous.shape), contiguous.mT.contiguous().mT):
        copied = dataclasses.replace(problem, dout=contiguous).run(backend)
        actual = dataclasses.replace(problem, dout=dout).run(backend)
        assert all(torch.equal(actual[name], copied[name]) for name in RESULTS)
    # The stride of a dimension of size one may be anything.
    token = kernel_problem(backend, 1, 1, 1, 1, 40)
    odd = dataclasses.replace(token, q=token.q.contiguous().as_strided((1, 1, 1, 32), (3, 5, 7, 1)))
    expected, actual = token.run(backend), odd.run(backend)
    assert all(torch.equal(actual[name], expected[name]) for name in RESULTS)


@pytest.mark.parametrize("backend", ["portable", *KERNELS])
def test_results_lie_in_memory_as_the_inputs(backend: str) -> None:
    problem = kernel_problem(backend)
    for name in ("q", "k", "v"):
        results = problem.run(backend)
        for result in (f"d{name}", *(["out"] if name == "q" else [])):
            assert results[result].transpose(1, 2).is_contiguous()
        changed = {name: getattr(problem, name).contiguous()}
        results = dataclasses.replace(problem, **changed).run(backend)  # type: ignore[arg-type]
        assert results[f"d{name}"].is_contiguous()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 30, 40), (2, 4, 2, 0, 40), (2, 4, 2, 0, 0)])
def test_nothing_to_attend(backend: str, shape: tuple[int, ...]) -> None:
    problem = kernel_problem(backend, *shape)
    problem = dataclasses.replace(problem, layout=ck.ThreeRegionLayout(3, None, 4, 2))
    for name, result in problem.run(backend).items():
        like = {"out": problem.q, "lse": problem.q[..., 0], "dq": problem.q}.get(name, problem.k)
        assert result.shape == like.shape and not result.any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("num_splits", [2, 5])
@pytest.mark.parametrize("num_pivots, k_len", [(0, 10), (6, 64), (64, 65), (70, 300)])
def test_splits_of_the_backward(
    backend: str, num_splits: int, num_pivots: int, k_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradients; the kernels and Python agree on the size of the workspace."""
    problem = kernel_problem(backend, 1, 2, 1, k_len, k_len)
    pivots = ck.sample_pivots(3, k_len, num_pivots, device=problem.q.device)
    layout = ck.ThreeRegionLayout(3, pivots, 8, 2)
    problem = dataclasses.replace(problem, layout=layout)
    whole = problem.run(backend)
    monkeypatch.setattr(attention, "_num_splits", lambda *_: num_splits)
    split = problem.run(backend)
    for name in RESULTS:
        atol = 2e-3 * whole[name].abs().max().item()
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=atol)


def test_number_of_splits() -> None:
    def splits(num_samples: int, seqlen: int, num_pivots: int, window: int, sms: int = 132) -> int:
        rows = 64 * -(-num_pivots // 64) + min(256, seqlen)  # as the kernels count them
        return attention._num_splits(num_samples, 1, seqlen, seqlen, rows, window, sms)

    assert splits(640, 1088, 192, 256) == 1, "many samples fill the GPU"
    # 12 tiles of 257 products, 257 of 5: 4369 for 264 blocks is 16.5 each; 257 / 16.5 = 15.5.
    assert splits(1, 16448, 512, 256) == 16
    assert splits(4, 16448, 512, 256) == 4
    assert splits(1, 16448, 512, 256, sms=1) == 1
    assert splits(1, 64, 0, 64) == 1, "a loop of one tile cannot be split"
    assert splits(1, 2**20, 0, 64, sms=10**6) == 16, "at most"


# Errors of csrc/operators: arguments that Python's checks refuse, given to the operators directly.


def good_arguments() -> dict[str, Tensor]:
    """Of the forward and backward operators, in float16: 2 samples, 4 heads, 2 key heads."""
    problem = kernel_problem("host_model")
    arguments = {name: getattr(problem, name) for name in ("q", "k", "v", "dout")}
    arguments["far_keys"] = operator("three_region_attention_far_keys", "host_model")(
        *problem.layout.tensors(2, problem.q.device), 40
    )
    for name in ("dlse", "row_max", "row_log_sum", "delta"):
        arguments[name] = torch.zeros(2, 4, 30)
    arguments |= {"out": torch.zeros_like(problem.dout), "dq": torch.zeros_like(problem.dout)}
    arguments |= {name: torch.zeros(2, 2, 40, 32).half() for name in ("dk", "dv")}
    arguments["bounds"] = torch.zeros(2 * (2 * 4 + 2), dtype=torch.int32)
    return arguments


def call_out(arguments: dict[str, Any], backward: bool) -> None:
    a = {"window": WINDOW, "kv_lens": None, "num_splits": 1, "partial": None, **arguments}
    window = a["window"]
    if backward:
        names = ("dout", "dlse", "q", "k", "v", "out", "row_max", "row_log_sum", "far_keys")
        outputs = [a[name] for name in ("dq", "dk", "dv", "delta", "bounds")]
        inputs = [a[name] for name in names]
        OPS.three_region_attention_backward_out(
            *inputs, *window, *outputs, a["num_splits"], a["partial"]
        )
    else:
        inputs = [a[name] for name in ("q", "k", "v", "far_keys")]
        outputs = [a[name] for name in ("out", "row_max", "row_log_sum")]
        OPS.three_region_attention_forward_out(
            *inputs, *window, a["kv_lens"], *outputs, a["num_splits"], a["partial"]
        )


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.flatten(), tensor.new_zeros(1)])[1:].view(tensor.shape)


BAD_FORWARD: list[tuple[str, Any, str]] = [
    ("q", lambda t: t.float(), "q: expected float16 or bfloat16"),
    ("q", lambda t: t.double(), "q: expected float32, float16 or bfloat16"),
    ("q", lambda t: t[0], "q: expected a tensor"),
    ("q", lambda t: t[:0], "q: expected a tensor .* with elements"),
    (
        "q",
        lambda t: t[..., :16],
        "q: the kernels take head dimensions of 32, 64, 96 and 128, got 16",
    ),
    ("q", lambda t: t.mT.contiguous().mT, "q: expected a contiguous last dimension"),
    ("q", misaligned, "q: expected rows at multiples of 16 bytes"),
    ("q", lambda t: torch.cat([t, t], 2), "q: expected at most 40 rows as k, got 60"),
    ("k", lambda t: t.bfloat16(), "k: expected the dtype of q"),
    ("k", lambda t: t[:1], r"k: expected shape \(2, 2, 40, 32\), got \(1, 2, 40, 32\)"),
    ("k", lambda t: t[:, :1].expand(2, 3, 40, 32), "k: expected a number of heads that divides 4"),
    ("v", lambda t: t[:, :, :39], r"v: expected shape \(2, 2, 40, 32\), got \(2, 2, 39, 32\)"),
    ("v", lambda t: t.new_zeros(2, 2, 40, 33)[..., :32], "v: expected rows at multiples"),
    ("far_keys", lambda t: t.long(), "far_keys: expected int32"),
    ("far_keys", lambda t: t[:1], r"far_keys: expected shape \(2, 8\), got \(1, 8\)"),
    ("far_keys", lambda t: t[:, :1], "far_keys: expected at least two columns, got 1"),
    (
        "far_keys",
        lambda t: torch.stack([t] * 3, 1),
        r"far_keys: expected shape \(2, 2, 8\), got \(2, 3, 8\)",
    ),
    ("far_keys", lambda t: t.mT.contiguous().mT, "far_keys: expected a contiguous tensor"),
    ("window", lambda w: (0, *w[1:]), "query_window, key_window_times: expected at least 1"),
    ("window", lambda w: (4, -1, *w[2:]), "query_window, key_window_times: expected at least 1"),
    ("out", lambda t: t[:, :, :29], r"out: expected shape \(2, 4, 30, 32\)"),
    ("out", lambda t: t.bfloat16(), "out: expected the dtype of q"),
    ("row_max", lambda t: t.half(), "row_max: expected float32"),
    ("row_log_sum", lambda t: t[..., :1], r"row_log_sum: expected shape \(2, 4, 30\)"),
    ("kv_lens", lambda _: torch.ones(2), "kv_lens: expected int32"),
    ("kv_lens", lambda _: torch.ones(1).int(), r"kv_lens: expected shape \(2\), got \(1\)"),
    ("num_splits", lambda _: 0, "num_splits: expected at least 1"),
    ("num_splits", lambda _: 2, "partial: expected with more than one split"),
    ("partial", lambda _: torch.zeros(1), "partial: expected with more than one split"),
]
BAD_BACKWARD: list[tuple[str, Any, str]] = [
    ("dout", misaligned, "dout: expected rows at multiples of 16 bytes"),
    ("dlse", lambda t: t.half(), "dlse: expected float32"),
    ("out", lambda t: t[:1], "out: expected shape"),
    ("dq", lambda t: t[:1], "dq: expected shape"),
    ("dk", lambda t: t[:, :1], "dk: expected shape"),
    ("dv", lambda t: t.bfloat16(), "dv: expected the dtype of q"),
    ("delta", lambda t: t[..., :1], "delta: expected shape"),
    ("row_max", lambda t: t.mT.contiguous().mT, "row_max: expected a contiguous tensor"),
    ("row_log_sum", lambda t: t.double(), "row_log_sum: expected float32"),
    ("bounds", lambda t: None, "bounds: expected with float16, and only then"),
    ("bounds", lambda t: t[:-1], r"bounds: expected shape \(20\), got \(19\)"),
    ("bounds", lambda t: t.float(), "bounds: expected int32"),
    ("num_splits", lambda _: 0, "num_splits: expected at least 1"),
    ("num_splits", lambda _: 2, "partial: expected with more than one split"),
    ("partial", lambda _: torch.zeros(1), "partial: expected with more than one split"),
]


@pytest.mark.skipif(NO_HOST_MODEL is not None, reason=str(NO_HOST_MODEL))
@pytest.mark.parametrize(
    "backward, name, change, match",
    [(False, *bad) for bad in BAD_FORWARD] + [(True, *bad) for bad in BAD_BACKWARD],
)
def test_operators_refuse_what_is_not_safe(
    backward: bool, name: str, change: Any, match: str
) -> None:
    arguments: dict[str, Any] = {"window": WINDOW, "num_splits": 1, "partial": None}
    arguments["kv_lens"] = None
    arguments |= good_arguments()
    call_out(arguments, backward)
    with pytest.raises(RuntimeError, match=match) as raised:
        call_out({**arguments, name: change(arguments[name])}, backward)
    # It names a line of the sources, but not the folder of the build.
    message = str(raised.value)
    assert re.search(r"csrc/operators/\w+\.(h|cpp):\d+", message) and str(ROOT) not in message


@pytest.mark.skipif(NO_HOST_MODEL is not None, reason=str(NO_HOST_MODEL))
def test_operators_refuse_workspaces_of_the_wrong_size() -> None:
    arguments = good_arguments()
    rows = extension.attention_split_rows(40, 6, torch.device("cpu"))
    partial = torch.zeros(2, 2, 2, 2, rows, 32)
    call_out({**arguments, "num_splits": 2, "partial": partial}, True)
    for wrong in (partial[:, :, :, :, 1:].contiguous(), partial[:1]):
        with pytest.raises(RuntimeError, match="partial: expected shape"):
            call_out({**arguments, "num_splits": 2, "partial": wrong}, True)
    with pytest.raises(RuntimeError, match="partial: expected float32"):
        call_out({**arguments, "num_splits": 2, "partial": partial.half()}, True)
    with pytest.raises(RuntimeError, match="partial: expected to begin at a multiple of 16 bytes"):
        call_out({**arguments, "num_splits": 2, "partial": misaligned(partial)}, True)
    of_forward = torch.zeros(2, 2, 4, 30, 36)
    call_out({**arguments, "num_splits": 2, "partial": of_forward}, False)
    with pytest.raises(RuntimeError, match=r"partial: expected shape \(2, 2, 4, 30, 36\)"):
        call_out({**arguments, "num_splits": 2, "partial": partial}, False)


@pytest.mark.skipif(NO_HOST_MODEL is not None, reason=str(NO_HOST_MODEL))
def test_windows_as_large_as_an_int64() -> None:
    problem = kernel_problem("host_model")
    largest = ck.ThreeRegionLayout(5, None, 2**63 - 1, 2**63 - 1)
    causal = ck.ThreeRegionLayout(5, None, 40, 1)
    one, other = (
        dataclasses.replace(problem, layout=layout).run("host_model")
        for layout in (largest, causal)
    )
    assert all(torch.equal(one[name], other[name]) for name in RESULTS)


@pytest.mark.filterwarnings("ignore:cogview_kernels")
def test_fake_cuda_tensors() -> None:
    """Tracing for a GPU on a machine that has none."""
    with FakeTensorMode():
        x = torch.randn(6, 16, device="cuda", dtype=torch.float16)
        weight = torch.ones(16, device="cuda")
        y, statistics = OPS.pb_relax_layer_norm(x, weight, weight, 1e-5, 1)
        dx, dweight, dbias = OPS.pb_relax_layer_norm_backward(
            y, x, weight, statistics, torch.float32
        )
        shapes = {y: (6, 16), statistics: (6, 4), dx: (6, 16), dweight: (16,), dbias: (16,)}
        for tensor, shape in shapes.items():
            assert tensor.shape == shape and tensor.device.type == "cuda"
            assert tensor.dtype == (torch.float16 if shape == (6, 16) else torch.float32)
        assert ck.pb_relax_layer_norm(x, weight, weight).device.type == "cuda"
        for tensor in ck.sandwich_residual(x, x.float(), *[weight] * 4, dropout_p=0.1):
            assert (tensor.shape, tensor.dtype) == ((6, 16), torch.float32)
            assert tensor.device.type == "cuda"

        q = torch.randn(2, 16, 4, 32, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        k = torch.randn(2, 2, 16, 32, device="cuda", dtype=torch.bfloat16)
        text_len = torch.zeros(2, device="cuda", dtype=torch.int32)
        layout = ck.ThreeRegionLayout(text_len, ck.sample_pivots(text_len, 16, 4), 4, 1)
        out, lse = ck.three_region_attention(q, k, k, layout, backend="portable", return_lse=True)
        assert (out.shape, out.dtype, out.device.type) == ((2, 4, 16, 32), q.dtype, "cuda")
        assert (lse.shape, lse.dtype) == ((2, 4, 16), torch.float32)
        far_keys = OPS.three_region_attention_far_keys(*layout.tensors(2, q.device), 16)
        assert (far_keys.shape, far_keys.dtype) == ((2, 6), torch.int32)
        kept = OPS.three_region_attention(q, k, k, far_keys, *WINDOW)
        gradients = OPS.three_region_attention_backward(q, None, q, k, k, *kept, far_keys, *WINDOW)
        for tensor, like in zip((kept[0], *gradients), (q, q, k, k), strict=True):
            assert (tensor.shape, tensor.stride()) == (like.shape, like.stride())
            assert (tensor.dtype, tensor.device) == (q.dtype, q.device)
        for tensor in kept[1:]:
            assert (tensor.shape, tensor.dtype) == ((2, 4, 16), torch.float32)
        with pytest.raises(ValueError, match="k: expected device cuda:0 as q, got cpu"):
            ck.three_region_attention(q, torch.randn(2, 2, 16, 32).bfloat16(), k, layout)
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
        ("10.0", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("12.0", [(12, 0), (12, 1)], [(13, 0)]),
        ("12.0+PTX", [(12, 0), (12, 1), (13, 0)], [(10, 0), (9, 0)]),
    ):
        assert all(extension._runs_on(architecture, *device) for device in yes), architecture
        assert not any(extension._runs_on(architecture, *device) for device in no), architecture
