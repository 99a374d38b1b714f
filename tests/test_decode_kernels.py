"""Attention of few queries, and in caches of fixed size (``kv_lens``): every backend against the
definition; the decode kernels on the CPU simulator and, where there is a GPU, on that."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    backend_or_skip,
    int32,
    layouts,
    make_problem,
    refused,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cogview_kernels as ck
from cogview_kernels import extension
from cogview_kernels.attention import masked, operators, portable
from cogview_kernels.attention.blocked import Regions
from cogview_kernels.backends import KernelUnavailable
from cogview_kernels.extension import modelled_device

OPS = torch.ops.cogview_kernels
HALVES = (torch.bfloat16, torch.float16)


KERNELS = [backend_or_skip("host_model"), backend_or_skip("cuda")]
kernels = pytest.mark.parametrize("backend", KERNELS)


@dataclasses.dataclass
class Step:
    """A call of the attention without gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: ck.ThreeRegionLayout
    kv_lens: Tensor | None = None
    softmax_scale: float | None = None

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        device = "cuda" if backend == "cuda" else "cpu"

        def there(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        tensors = {
            name: there(value)
            for name, value in vars(self.layout).items()
            if isinstance(value, Tensor)
        }
        out, lse = ck.three_region_attention(
            *map(there, (self.q, self.k, self.v)),
            dataclasses.replace(self.layout, **tensors),
            self.softmax_scale,
            backend,
            return_lse=True,
            kv_lens=there(self.kv_lens),
        )
        return out.cpu(), lse.cpu()

    def truth(self) -> tuple[Tensor, Tensor]:
        """The reference in float64, sample by sample, each with its own keys alone."""
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        lse = torch.full(self.q.shape[:3], -math.inf, dtype=torch.float64)
        batch, _, q_len, _ = self.q.shape
        k_len = self.k.shape[2]
        kv_lens = [k_len] * batch if self.kv_lens is None else self.kv_lens.tolist()
        text_len, pivots = self.layout.tensors(batch, torch.device("cpu"))
        for b, length in enumerate(kv_lens):
            if length == 0:
                continue
            rows, at = slice(max(q_len - length, 0), q_len), slice(b, b + 1)
            layout = dataclasses.replace(self.layout, text_len=text_len[at], pivot_idx=pivots[at])
            k, v = (tensor[at, :, :length].double() for tensor in (self.k, self.v))
            q = self.q[at, :, rows].double()
            out[at, :, rows], lse[at, :, rows] = ck.three_region_attention(
                q, k, v, layout, self.softmax_scale, "reference", return_lse=True
            )
        return out, lse


def make_step(
    q_len: int,
    k_len: int,
    layout: ck.ThreeRegionLayout,
    kv_lens: list[int] | None = None,
    batch: int = 1,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    softmax_scale: float | None = None,
    seed: int = 0,
) -> Step:
    """Random inputs with sharp weights, so that a lost key shows; NaN in rows of k and v that hold
    no key."""
    shape = batch, num_heads, num_kv_heads, q_len, k_len, head_dim, dtype
    problem = make_problem(*shape, layout, softmax_scale, seed=seed)
    k, v = (tensor.clone(memory_format=torch.preserve_format) for tensor in (problem.k, problem.v))
    for b, length in enumerate(kv_lens or ()):
        k[b, :, length:] = math.nan
        v[b, :, length:] = math.nan
    lengths = None if kv_lens is None else int32(kv_lens)
    return Step(problem.q * 3, k, v, layout, lengths, problem.softmax_scale)


def check(step: Step, backend: str) -> tuple[Tensor, Tensor]:
    """Out is as good as two roundings of its terms, p's and its own; lse as float32."""
    out, lse = step.run(backend)
    right_out, right_lse = step.truth()
    v = step.v.double().nan_to_num(0.0)
    largest = v.abs().max().item() if v.numel() > 0 else 0.0
    bound = (torch.finfo(step.q.dtype).eps + 2e-6) * largest
    assert out.dtype == step.q.dtype and lse.dtype == torch.float32
    assert out.shape == step.q.shape and lse.shape == step.q.shape[:3]
    if out.numel() > 0:
        assert (out.double() - right_out).abs().max().item() <= bound
        torch.testing.assert_close(lse.double(), right_lse, rtol=4e-6, atol=4e-6)
    return out, lse


# The definition


@pytest.mark.parametrize("backend", ["reference", "portable", *KERNELS])
@pytest.mark.parametrize("dtype", HALVES)
@given(data=st.data())
@settings(max_examples=settings().max_examples // 2)
def test_decoding_as_defined(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    draw = data.draw
    batch, k_len = draw(st.integers(0, 3)), draw(st.integers(1, draw(st.sampled_from([300, 800]))))
    num_kv_heads = draw(st.integers(1, 2))
    has_lengths = draw(st.booleans())
    q_len = draw(st.integers(1, min(40 if has_lengths else 8, k_len)))
    lengths = st.one_of(st.integers(0, k_len), st.sampled_from([0, q_len - 1, k_len]))
    kv_lens = draw(st.lists(lengths, min_size=batch, max_size=batch)) if has_lengths else None
    step = make_step(
        q_len,
        k_len,
        draw(layouts(batch, k_len, num_kv_heads)),
        kv_lens,
        batch,
        num_kv_heads * draw(st.sampled_from([1, 2, 3, 8, 12])),
        num_kv_heads,
        draw(st.sampled_from([32, 64, 96, 128])),
        dtype,
        draw(st.sampled_from([None, 0.0, -0.5])),
        draw(st.integers(0, 2**16)),
    )
    with modelled_device(draw(st.sampled_from([1, 8, 132]))):
        check(step, backend)


@pytest.mark.thinned
@kernels
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("q_len", range(1, 9))
def test_few_queries(backend: str, q_len: int, head_dim: int, dtype: torch.dtype) -> None:
    """Lists of several tiles, in one part and in several; windows that begin at odd places."""
    text_len = int32([600, 9, 300, 600])
    pivots = ck.sample_pivots(text_len, 900, 200, torch.Generator().manual_seed(1))
    layout = ck.ThreeRegionLayout(text_len, pivots, 33, 2, math.log(2), -0.5)
    shape = {"batch": 4, "head_dim": head_dim, "dtype": dtype}
    for kv_lens in (None, [900, q_len - 1, 641, 64 + q_len]):
        step = make_step(q_len, 900, layout, kv_lens, **shape)  # type: ignore[arg-type]
        results = []
        for num_sms in (1, 132):
            with modelled_device(num_sms):
                results.append(check(step, backend))
                again = step.run(backend)
            assert all(map(torch.equal, results[-1], again)), "reruns are bitwise equal"
        assert not torch.equal(results[0][0], results[1][0]), "one was not split"


@kernels
@pytest.mark.parametrize("num_heads, q_len", [(40, 8), (70, 1), (3, 64), (1, 70), (16, 20)])
def test_more_rows_than_a_block_takes(backend: str, num_heads: int, q_len: int) -> None:
    layout = ck.ThreeRegionLayout(20, int32([[30, 41, 60, 90]]), 16, 2, 0.5, -0.5)
    kv_lens = [150, q_len // 2]
    shape = {"batch": 2, "num_heads": num_heads}
    check(make_step(q_len, 150, layout, kv_lens, **shape), backend)  # type: ignore[arg-type]


@kernels
def test_a_window_of_each_query(backend: str) -> None:
    """query_window = 1: no two queries see the same keys; a pivot is far for one and in the window
    of another."""
    pivots = torch.arange(0, 900, 3, dtype=torch.int32).view(1, -1)
    layout = ck.ThreeRegionLayout(4, pivots, 1, 320, 0.0, -0.7)
    for num_sms in (1, 132):
        with modelled_device(num_sms):
            check(make_step(8, 900, layout), backend)
            check(make_step(8, 900, layout, [823]), backend)


@kernels
def test_gradients_without_kv_lens(backend: str) -> None:
    """The backward takes the statistics of the decode kernel as it takes the forward's."""
    layout = ck.ThreeRegionLayout(9, int32([[12, 40, 90]]), 128, 5, 0.3, -0.3)
    problem = make_problem(1, 4, 2, 8, 700, 64, torch.float16, layout)
    with modelled_device(132):
        results = problem.run(backend) if backend == "host_model" else None
    if results is None:
        return
    truth = problem.to(torch.float64).run("reference")
    for name, expected in truth.items():
        torch.testing.assert_close(results[name].double(), expected, rtol=2e-2, atol=4e-3)


# Numbers at the edge


@kernels
@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_poisoned_keys_of_a_cache(backend: str, what: str, value: float) -> None:
    """Exactly the rows that may see a poisoned key know of it, in whichever part it lies."""
    layout = ck.ThreeRegionLayout(300, int32([[340, 390, 550]]), 1, 230)
    clean = make_step(8, 700, layout, [690])
    right, _ = clean.run("portable")
    sees = layout.dense_mask(1, 8, 700, int32([690]))[0]
    for position in (3, 290, 340, 341, 455, 458, 550, 686, 689, 690):
        poisoned = dataclasses.replace(clean, k=clean.k.clone(), v=clean.v.clone())
        getattr(poisoned, what)[:, :, position] = value
        expected, expected_lse = poisoned.run("portable")
        for num_sms in (1, 132):
            with modelled_device(num_sms):
                out, lse = poisoned.run(backend)
            hidden = ~sees[:, position]
            torch.testing.assert_close(out[:, :, hidden], right[:, :, hidden], rtol=2e-2, atol=2e-2)
            assert (out.isnan() == expected.isnan()).all(), position
            assert (lse.isnan() == expected_lse.isnan()).all(), position


@kernels
@pytest.mark.parametrize("num_sms", [1, 132])
def test_decoding_does_not_overflow(backend: str, num_sms: int) -> None:
    layout = ck.ThreeRegionLayout(5, None, 128, 5)
    with modelled_device(num_sms):
        # Products beyond float32.
        step = make_step(4, 700, layout)
        q, k = ((tensor.sign() * 1e30).to(torch.bfloat16) for tensor in (step.q, step.k))
        out, lse = dataclasses.replace(step, q=q, k=k).run(backend)
        assert out.isfinite().all() and lse.isfinite().all()
        # Sums of values, but not their mean.
        large = dataclasses.replace(step, v=step.v.sign() * 3.3e38)
        right, _ = large.truth()
        out, _ = large.run(backend)
        torch.testing.assert_close(out.double(), right, rtol=2e-2, atol=2e36)
        # A mean of 65504, with weights that all are rounded up but for one of each sixteen.
        step = make_step(4, 700, layout, dtype=torch.float16)
        q, k = torch.zeros_like(step.q), torch.zeros_like(step.k)
        q[..., 0], k[..., 0] = 1, -1
        k[:, :, ::16] = 0
        scale = math.log(2 / (1 + 2**-11 + 2**-14))
        v = torch.full_like(step.v, 65504.0)
        out, _ = dataclasses.replace(step, q=q, k=k, v=v, softmax_scale=scale).run(backend)
        assert (out == 65504).all()


@kernels
def test_any_kv_lens_are_safe(backend: str) -> None:
    """As a GPU may hold them, unchecked."""
    layout = ck.ThreeRegionLayout(5, int32([[9, 40, 90]]), 16, 2)
    step = make_step(3, 100, layout, [0, 100, 50], batch=3)
    expected = step.run(backend)
    suffix = "_host_model" if backend == "host_model" else ""
    device = "cpu" if backend == "host_model" else "cuda"
    far_keys = getattr(OPS, f"three_region_attention{suffix}_far_keys")
    attend = getattr(OPS, f"three_region_attention{suffix}")
    tensors = [tensor.to(device) for tensor in layout.tensors(3, torch.device("cpu"))]
    qkv = [tensor.to(device) for tensor in (step.q, step.k, step.v)]
    kv_lens = int32([-7, 2**31 - 1, 50]).to(device)
    window = 16, 2, 0.0, 0.0, step.softmax_scale
    out, row_max, row_log_sum = attend(*qkv, far_keys(*tensors, 100), *window, kv_lens)
    assert torch.equal(out.cpu(), expected[0])
    assert torch.equal((row_max + row_log_sum).cpu() * math.log(2), expected[1])


# Calls


def lengths_and_problem() -> tuple[Tensor, Any]:
    layout = ck.ThreeRegionLayout(int32([3, 0, 30]), int32([[4, 9, 14, 50]]), 8, 2, 0.4, -0.7)
    problem = make_problem(3, 4, 2, 12, 60, 8, torch.float64, layout)
    return int32([60, 5, 33]), problem


@pytest.mark.parametrize("backend", ["portable", "masked"])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_gradients_of_portable(backend: str, with_dlse: bool) -> None:
    """``masked``: what portable does on devices whose values the host must not read."""
    kv_lens, problem = lengths_and_problem()
    if not with_dlse:
        problem.dlse.zero_()

    def attend(name: str) -> Callable[..., Any]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
            arguments = q, k, v, problem.layout, problem.softmax_scale, name
            return ck.three_region_attention(*arguments, return_lse=True, kv_lens=kv_lens)  # type: ignore[call-overload]

        return attention

    # Rows without a position have an lse of -inf, of which no gradient can be asked.
    problem.dlse[1, :, :7] = 0
    expected = problem.differentiate(attend("reference"))
    if backend == "portable":
        results = problem.differentiate(attend("portable"))
    else:
        layout = problem.layout
        window = layout.query_window, layout.key_window_times, layout.text_bias, layout.pivot_bias
        regions = Regions(*layout.tensors(3, torch.device("cpu")), *window)
        read = problem.q, problem.k, problem.v
        out, lse = torch.empty_like(problem.q), torch.empty_like(problem.dlse)
        rest = regions, problem.softmax_scale, kv_lens
        masked.forward_into(out, lse, *read, *rest)
        gradients = [torch.zeros_like(tensor) for tensor in read]
        masked.backward_into(*gradients, problem.dout, problem.dlse, *read, out, *rest)  # type: ignore[call-arg]
        results = dict(zip(expected, (out, lse, *gradients), strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-9, atol=1e-9)
    assert results["out"][1, :, :7].abs().sum() == 0
    assert results["lse"][1, :, :7].isneginf().all()
    assert results["dk"][1, :, 5:].abs().sum() == 0


@pytest.mark.parametrize("backend", ["portable", "masked"])
def test_portable_does_not_read_behind_the_keys(backend: str) -> None:
    kv_lens, problem = lengths_and_problem()
    regions = Regions(*problem.layout.tensors(3, torch.device("cpu")), 8, 2, 0.4, -0.7)
    q, k, v = problem.q, problem.k.clone(), problem.v.clone()
    for b, length in enumerate(kv_lens.tolist()):
        k[b, :, length:], v[b, :, length:] = math.nan, math.inf
    arguments = q, k, v, regions, problem.softmax_scale, kv_lens
    if backend == "masked":
        out = torch.empty_like(q)
        masked.forward_into(out, torch.empty_like(problem.dlse), *arguments)
    else:
        out, _ = portable.attention_forward(q, k, v, *regions, problem.softmax_scale, kv_lens)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["portable", *KERNELS])
def test_vmap_and_compile(backend: str) -> None:
    layout = ck.ThreeRegionLayout(5, int32([[9, 40, 90]]), 16, 2)
    step = make_step(3, 100, layout, [100, 50], batch=2)
    device = "cuda" if backend == "cuda" else "cpu"
    q, k, v, kv_lens = (t.to(device) for t in (step.q, step.k, step.v, step.kv_lens))  # type: ignore[union-attr]
    if backend == "cuda":
        layout = dataclasses.replace(layout, pivot_idx=layout.pivot_idx.cuda())  # type: ignore[union-attr]

    def attend(q: Tensor, kv_lens: Tensor) -> Tensor:
        return ck.three_region_attention(q, k, v, layout, backend=backend, kv_lens=kv_lens)

    out = attend(q, kv_lens)
    lengths = torch.stack([kv_lens, kv_lens - 20])
    batched = torch.func.vmap(attend, in_dims=(None, 0))(q, lengths)
    assert torch.equal(batched, torch.stack([out, attend(q, lengths[1])]))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, kv_lens), out)
    torch._dynamo.reset()
    dynamic = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(dynamic(q, kv_lens), out)


@pytest.mark.parametrize("backend", ["portable", *KERNELS])
def test_opcheck(backend: str) -> None:
    layout = ck.ThreeRegionLayout(5, int32([[9, 40, 90]]), 16, 2)
    step = make_step(3, 100, layout, [100, 50], batch=2, num_heads=2, num_kv_heads=2)
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    tensors = [t.to(device) for t in layout.tensors(2, torch.device("cpu"))]
    qkv = [t.to(device) for t in (step.q, step.k, step.v)]
    window, kv_lens = (16, 2, 0.0, 0.0, 0.2), int32([100, 50]).to(device)
    if backend == "portable":
        torch.library.opcheck(
            OPS.three_region_attention_portable.default,
            (*(t.requires_grad_() for t in qkv), *tensors, *window, kv_lens),
        )
    else:
        family = operators.HOST_MODEL if backend == "host_model" else operators.CUDA
        suffix = "_host_model" if backend == "host_model" else ""
        attend = getattr(OPS, f"three_region_attention{suffix}").default
        far_keys = family.far_keys(*tensors, 100)
        torch.library.opcheck(attend, (*qkv, far_keys, *window, kv_lens))


@kernels
def test_kernels_have_no_gradients_with_kv_lens(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = ck.ThreeRegionLayout(5, None, 16, 2)
    step = make_step(3, 100, layout, [100])
    if backend == "cuda":
        step = dataclasses.replace(step, **{n: getattr(step, n).cuda() for n in ("q", "k", "v")})
    q = step.q.requires_grad_()
    kv_lens = int32([100]).to(q.device)
    with refused(KernelUnavailable, "the kernels have no gradients with kv_lens"):
        ck.three_region_attention(q, step.k, step.v, layout, backend=backend, kv_lens=kv_lens)
    with torch.no_grad():
        ck.three_region_attention(q, step.k, step.v, layout, backend=backend, kv_lens=kv_lens)
    out = ck.three_region_attention(q, step.k, step.v, layout, backend="portable", kv_lens=kv_lens)
    out.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()

    def attend(q: Tensor) -> Tensor:
        arguments = q, step.k, step.v, layout
        return ck.three_region_attention(*arguments, backend=backend, kv_lens=kv_lens)

    with refused(KernelUnavailable, "the kernels have no gradients with kv_lens"):
        torch.func.vmap(attend)(q.unsqueeze(0))


def test_bad_lengths() -> None:
    step = make_step(3, 100, ck.ThreeRegionLayout(5, None, 16, 2), batch=2)

    def attend(kv_lens: Any) -> None:
        ck.three_region_attention(step.q, step.k, step.v, step.layout, kv_lens=kv_lens)

    for wrong, error, match in (
        (50, TypeError, r"kv_lens: expected an int32 tensor \(B,\), got int"),
        (torch.tensor([50, 50]), TypeError, "kv_lens: expected an int32 tensor"),
        (int32([50]), ValueError, r"kv_lens: expected \(2,\), got \(1,\)"),
        (int32([50, 50]).to("meta"), ValueError, "kv_lens: expected device cpu as q, got meta"),
        (int32([-1, 50]), ValueError, "kv_lens: expected lengths of 0 to Sk = 100, got -1"),
        (int32([50, 101]), ValueError, "kv_lens: expected lengths of 0 to Sk = 100, got 101"),
    ):
        with refused(error, match):
            attend(wrong)
        if "device" not in match:  # a mask lies where the layout does
            with refused(error, match):
                step.layout.dense_mask(2, 3, 100, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("by_head", [False, True])
def test_portable_reads_no_kv_lens_on_the_host(by_head: bool) -> None:
    """A tensor without values cannot be read."""
    pivots = int32([[[9, 40, 90], [3, 60, 70]]] if by_head else [[9, 40, 90]])
    step = make_step(3, 100, ck.ThreeRegionLayout(5, pivots, 16, 2), [50], 1, 4, 2)
    assert step.kv_lens is not None
    tensors = step.layout.tensors(1, torch.device("cpu"))
    q, k, v, *regions, kv_lens = (
        t.to("meta") for t in (step.q, step.k, step.v, *tensors, step.kv_lens)
    )
    window = 16, 2, 0.5, -0.5, 0.2
    out, lse = portable.attention_forward(q, k, v, *regions, *window, kv_lens)
    inputs = out, lse, q, k, v, out
    gradients = portable.attention_backward(*inputs, *regions, *window, lse, kv_lens)
    assert [t.shape for t in (out, *gradients)] == [t.shape for t in (q, q, k, v)]


def test_number_of_parts() -> None:
    """A block for each of 132 multiprocessors, where the keys are worth as many."""
    expected = {  # batch, heads, kv heads, Sq, Sk, pivots, window
        (16, 40, 40, 1, 4224, 256, 256): 1,
        (16, 40, 5, 1, 4224, 256, 256): 1,
        (1, 40, 40, 1, 4224, 256, 256): 3,
        (1, 8, 1, 1, 4224, 256, 256): 16,
        (1, 8, 1, 8, 4224, 256, 256): 3,
        (1, 1, 1, 1, 2**20, 256, 256): 18,
        (1, 1, 1, 1, 2**20, 0, 2**20): 64,
        (1, 1, 1, 1, 511, 256, 256): 1,
        (1, 1, 1, 9, 4224, 256, 256): 1,
        (0, 1, 1, 1, 4224, 256, 256): 1,
    }
    if extension.why_not_host_model() is not None:
        pytest.skip(str(extension.why_not_host_model()))
    of = functools.partial(extension.attention_forward_splits, device=torch.device("cpu"))
    with modelled_device(132):
        for shape, parts in expected.items():
            assert of(*shape, has_kv_lens=False) == parts, shape
        assert of(1, 1, 1, 9, 4224, 256, 256, has_kv_lens=True) == 16


def test_parts_follow_the_pivots_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def splits(*shape: int, **_: Any) -> int:
        asked.append(shape)
        return 1

    monkeypatch.setattr(extension, "attention_forward_splits", splits)
    monkeypatch.setattr(operators, "_forward_out", lambda *_: None)
    step = make_step(3, 100, ck.ThreeRegionLayout(5, None), num_kv_heads=2)
    for shape in ((1, 2 + 30), (1, 2, 2 + 30)):
        far_keys = torch.zeros(shape, dtype=torch.int32)
        operators._forward(step.q, step.k, step.v, far_keys, 16, 2, 0.0, 0.0, 0.2)
    assert asked == [(1, 2, 2, 3, 100, 30, 32)] * 2
