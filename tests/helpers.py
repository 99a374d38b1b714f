"""Shared by the tests: the formulas as plain loops, random problems, error bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cogview_kernels as ck
from cogview_kernels import extension

RESULTS = ("out", "lse", "dq", "dk", "dv")


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def backend_or_skip(name: str) -> Any:
    """A parameter of tests that run the kernels."""
    reasons = {"host_model": extension.why_not_host_model, "cuda": extension.why_not_usable}
    reason = reasons[name]()
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


def region_of(i: int, j: int, text_len: int, pivots: list[int], w: int, n: int) -> str | None:
    """The region of key ``j`` for the query at position ``i``, straight from the definition."""
    start = max(0, (i // w - n + 1) * w)
    if start <= j <= i:
        return "window"
    if j < min(text_len, start):
        return "text"
    if j in pivots and text_len <= j < start:
        return "pivot"
    return None


@dataclasses.dataclass
class Problem:
    """The inputs of one attention call, and the gradients of its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: ck.ThreeRegionLayout
    softmax_scale: float
    dout: Tensor
    dlse: Tensor

    def text_lens(self) -> list[int]:
        batch, text_len = self.q.shape[0], self.layout.text_len
        return [text_len] * batch if isinstance(text_len, int) else text_len.expand(batch).tolist()

    def pivots(self) -> list[list[list[int]]]:
        """Of each sample and key/value head."""
        batch, heads, pivot_idx = self.q.shape[0], self.k.shape[1], self.layout.pivot_idx
        if pivot_idx is None:
            return [[[]] * heads] * batch
        if pivot_idx.ndim == 2:
            pivot_idx = pivot_idx.unsqueeze(1)
        return pivot_idx.expand(batch, heads, -1).tolist()

    def region(self, b: int, g: int, i: int, j: int) -> str | None:
        layout = self.layout
        w, n = layout.query_window, layout.key_window_times
        return region_of(i, j, self.text_lens()[b], self.pivots()[b][g], w, n)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v with the same strides, requiring gradients."""
        return tuple(t.detach().requires_grad_() for t in (self.q, self.k, self.v))  # type: ignore[return-value]

    def differentiate(self, attention: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """``out, lse, dq, dk, dv`` of ``attention(q, k, v) -> out, lse``."""
        leaves = self.leaves()
        out, lse = attention(*leaves)
        gradients = torch.autograd.grad(
            (out, lse),
            leaves,
            (self.dout.to(out.dtype), self.dlse.to(lse.dtype)),
            materialize_grads=True,
        )
        return dict(zip(RESULTS, (out.detach(), lse.detach(), *gradients), strict=True))

    def run(self, backend: str) -> dict[str, Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return ck.three_region_attention(
                q, k, v, self.layout, self.softmax_scale, backend, return_lse=True
            )

        return self.differentiate(attention)

    def to(self, dtype: torch.dtype) -> Problem:
        return self.map(lambda tensor: tensor.to(dtype))

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The problem with ``change`` applied to every tensor but the layout's."""
        names = ("q", "k", "v", "dout", "dlse")
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in names})


def loops(problem: Problem) -> dict[str, Tensor]:
    """The formulas as explicit loops over samples, heads, queries and keys."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        batch, num_heads, q_len, head_dim = q.shape
        num_kv_heads, k_len = k.shape[1:3]
        bias = {
            "window": 0.0,
            "text": problem.layout.text_bias,
            "pivot": problem.layout.pivot_bias,
        }
        out, lse = q * 0, q.sum(-1) * 0
        for b in range(batch):
            for h in range(num_heads):
                g = h // (num_heads // num_kv_heads)
                for r in range(q_len):
                    i = r + k_len - q_len
                    regions = {j: problem.region(b, g, i, j) for j in range(k_len)}
                    keys = [j for j, region in regions.items() if region is not None]
                    logits = torch.stack(
                        [
                            problem.softmax_scale * (q[b, h, r] * k[b, g, j]).sum()
                            + bias[str(regions[j])]
                            for j in keys
                        ]
                    )
                    weights = logits.exp() / logits.exp().sum()
                    row = sum(p * v[b, g, j] for p, j in zip(weights, keys, strict=True))
                    at = torch.tensor([b, h, r])
                    out = out.index_put(tuple(at), torch.as_tensor(row))
                    lse = lse.index_put(tuple(at), logits.exp().sum().log())
        return out, lse

    return problem.differentiate(attention)


def same_dtype_torch(problem: Problem) -> dict[str, Tensor]:
    """Dense attention as PyTorch computes it in the dtype of the inputs."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        window, text, pivot = problem.layout.regions(q.shape[0], q.shape[2], k.shape[2])
        bias = torch.zeros(window.shape, dtype=q.dtype)
        bias = bias.masked_fill(text, problem.layout.text_bias)
        bias = bias.masked_fill(pivot, problem.layout.pivot_bias)
        bias = bias.masked_fill(~(window | text | pivot), -math.inf)
        bias = bias.unsqueeze(1) if bias.ndim == 3 else bias
        bias = bias.repeat_interleave(q.shape[1] // bias.shape[1], 1)
        logits = q @ k.mT * problem.softmax_scale + bias
        return logits.softmax(-1) @ v, logits.logsumexp(-1)

    return problem.differentiate(attention)


def assert_as_accurate_as_torch(problem: Problem, actual: dict[str, Tensor]) -> None:
    """``err(actual) <= 2 err(same-dtype torch) + atol`` for each result; the truth is the
    reference in float64. ``atol``, relative to the largest entry and the largest term of its sum:
    one rounding of the result and ``sqrt(N)`` of float32, a random walk over ``N`` terms."""
    truth, torch_results = problem.to(torch.float64).run("reference"), same_dtype_torch(problem)

    def largest(tensor: Tensor) -> float:
        return tensor.abs().max().item() if tensor.numel() > 0 else 0.0

    num_terms = max(problem.k.shape[2], problem.q.shape[2] * problem.q.shape[1])
    sums = torch.finfo(torch.float32).eps * math.sqrt(num_terms)
    ds = largest((problem.dout * truth["out"]).abs().sum(-1) + problem.dlse.abs())
    ds *= abs(problem.softmax_scale)
    terms = {
        "out": largest(problem.v),
        "lse": 1.0,
        "dq": ds * largest(problem.k),
        "dk": ds * largest(problem.q),
        "dv": largest(problem.dout),
    }
    for name, expected in truth.items():
        value = actual[name]
        assert value.shape == expected.shape, name
        own, of_torch = (largest(t.double() - expected) for t in (value, torch_results[name]))
        atol = (torch.finfo(value.dtype).eps + sums) * max(terms[name], largest(expected))
        bound = 2 * of_torch + atol
        assert own <= bound, f"{name}: error {own:.3g}, allowed {bound:.3g}"


def make_problem(
    batch: int = 2,
    num_heads: int = 2,
    num_kv_heads: int | None = None,
    q_len: int | None = None,
    k_len: int = 40,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    layout: ck.ThreeRegionLayout | None = None,
    softmax_scale: float | None = None,
    packed: bool = True,
    seed: int = 0,
) -> Problem:
    """Normal random inputs; ``packed``: q, k and v are views of one projection ``(B, S, ., D)``."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads = num_kv_heads or num_heads
    q_len = k_len if q_len is None else q_len
    all_heads = num_heads + 2 * num_kv_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    heads = normal(batch, k_len, all_heads, head_dim).transpose(1, 2)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q = q[:, :, k_len - q_len :]
    if not packed:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if layout is None:
        pivots = ck.sample_pivots(torch.full((batch,), 5), k_len, 6, generator)
        layout = ck.ThreeRegionLayout(5, pivots, 4, 2, text_bias=0.4, pivot_bias=-0.7)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    dout, dlse = normal(batch, num_heads, q_len, head_dim), normal(batch, num_heads, q_len)
    return Problem(q, k, v, layout, scale, dout, dlse)


@st.composite
def layouts(draw: st.DrawFn, batch: int, k_len: int, num_kv_heads: int = 1) -> ck.ThreeRegionLayout:
    """Any legal layout: ragged or shared text, ragged or shared pivots, padding of every kind."""
    lengths = st.one_of(st.integers(0, k_len + 3), st.sampled_from([0, k_len, 2**31 - 1]))
    kind = draw(st.sampled_from(["int", "one", "each"]))
    rows = 1 if kind == "one" else batch
    text_len: int | Tensor = draw(lengths)
    text_lens = [int(text_len)] * batch
    if kind != "int":
        drawn = draw(st.lists(lengths, min_size=rows, max_size=rows))
        text_lens = (drawn * batch)[:batch]
        text_len = torch.tensor(drawn, dtype=torch.int32)

    kind = draw(st.sampled_from(["none", "one", "each"]))
    pivot_idx = None
    if kind != "none":
        rows = 1 if kind == "one" else batch
        heads = draw(st.sampled_from([None, 1, num_kv_heads]))  # with pivots of their own
        num_pivots = draw(st.integers(0, min(k_len, 12)))
        table = []
        for row in (row for row in range(rows) for _ in range(heads or 1)):
            # Padding below the text may stand anywhere; padding beyond the keys stands at the end.
            text = min(text_lens[row : row + 1] if rows > 1 else text_lens, default=0)
            below = st.sampled_from([-(2**31), -1, *range(max(0, text - 3), min(text, k_len))])
            above = st.sampled_from([k_len, k_len + 1, 2**31 - 1])
            real = draw(st.sets(st.integers(0, k_len - 1), max_size=num_pivots)) if k_len else []
            entries = [*sorted(real), *[draw(above)] * draw(st.integers(0, 2))][:num_pivots]
            while len(entries) < num_pivots:
                entries.insert(draw(st.integers(0, len(entries))), draw(below))
            table.append(entries)
        shape = (rows, num_pivots) if heads is None else (rows, heads, num_pivots)
        pivot_idx = torch.tensor(table, dtype=torch.int32).reshape(shape)
    return ck.ThreeRegionLayout(
        text_len,
        pivot_idx,
        query_window=draw(st.one_of(st.integers(1, 12), st.integers(13, 2 * k_len + 13))),
        key_window_times=draw(st.integers(1, 5)),
        text_bias=draw(st.sampled_from([0.0, math.log(3), -2.5])),
        pivot_bias=draw(st.sampled_from([0.0, math.log(3), 1.25])),
    )


@st.composite
def problems(
    draw: st.DrawFn,
    max_len: int,
    dtype: torch.dtype = torch.float64,
    max_batch: int = 3,
    head_dims: tuple[int, ...] = (1, 3, 8, 16),
) -> Problem:
    """Any legal call of the attention up to ``max_len`` keys."""
    batch = draw(st.integers(0, max_batch))
    k_len = draw(st.integers(1, max_len))
    num_kv_heads = draw(st.integers(1, 2))
    return make_problem(
        batch,
        num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads,
        draw(st.one_of(st.just(k_len), st.integers(0, k_len))),
        k_len,
        draw(st.sampled_from(head_dims)),
        dtype,
        draw(layouts(batch, k_len, num_kv_heads)),
        draw(st.sampled_from([None, 0.0, -0.5, 1.5])),
        draw(st.booleans()),
        draw(st.integers(0, 2**16)),
    )


class Recorder(TorchDispatchMode):
    """Records the operators that ran and the bytes of the largest tensor they made."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().size())
        return result


@contextmanager
def refused(error: type[Exception], match: str) -> Iterator[None]:
    """The call raises this error before any matrix product or kernel runs."""
    with Recorder() as recorder, pytest.raises(error, match=match):
        yield
    work = {"mm", "bmm", "native_layer_norm", "exp", "linalg_vector_norm"}
    ran = [op.split(".")[:2] for op in recorder.operators]
    assert not [op for op in ran if op[0] == "cogview_kernels" or op[1] in work]
