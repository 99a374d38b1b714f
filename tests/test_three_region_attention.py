"""three_region_attention: the formulas, CogView's own formulation, and every way to break them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    RESULTS,
    Problem,
    Recorder,
    assert_as_accurate_as_torch,
    int32,
    loops,
    make_problem,
    problems,
    refused,
    same_dtype_torch,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cogview_kernels as ck
from cogview_kernels.attention import blocked, flash, portable

BACKENDS = ("reference", "portable")
HALVES = (torch.bfloat16, torch.float16)
# Rows without a gradient of lse take torch's flash kernels backward on the CPU, others do not.
both_backwards = pytest.mark.parametrize("with_dlse", [False, True], ids=["flash", "blocked"])


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name in RESULTS:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            check_dtype=False,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# The definition


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_by_hand(backend: str) -> None:
    # Six positions in blocks of one, window of one block, text 2, pivots 3 and 4 (and padding).
    # Row 5 sees text 0, 1 (weight 2), pivots 3, 4 (weight 3) and itself; logits q k = k, scale 2,
    # so that key j has weight exp(2 k_j) = w_j of the table.
    w = torch.tensor([1.0, 2.0, 99.0, 4.0, 5.0, 3.0], dtype=torch.float64)
    v = torch.tensor([1.0, 10.0, 1e6, 100.0, 1000.0, -7.0], dtype=torch.float64)
    layout = ck.ThreeRegionLayout(2, int32([[0, 3, 4, 6]]), 1, 1, math.log(2), math.log(3))
    k = (w.log() / 2).view(1, 1, 6, 1)
    out, lse = ck.three_region_attention(
        torch.ones_like(k), k, v.view(1, 1, 6, 1), layout, 2.0, backend, return_lse=True
    )
    # row: 0 itself; 1 text 0 and itself; 2 text; 3 text; 4 text and pivot 3; 5 all.
    total = torch.tensor(
        [1.0, 2 + 2, 2 + 4 + 99, 2 + 4 + 4, 2 + 4 + 12 + 5, 2 + 4 + 12 + 15 + 3],
        dtype=torch.float64,
    )
    weighted = torch.tensor(
        [
            1.0,
            2 * 1 + 2 * 10,
            2 * 1 + 4 * 10 + 99 * 1e6,
            2 * 1 + 4 * 10 + 4 * 100,
            2 * 1 + 4 * 10 + 12 * 100 + 5 * 1000,
            2 * 1 + 4 * 10 + 12 * 100 + 15 * 1000 + 3 * -7,
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(lse.flatten(), total.log(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(out.flatten(), weighted / total, rtol=1e-14, atol=0)


@given(problems(max_len=11, max_batch=2))
@settings(max_examples=25)
def test_equals_the_loops(problem: Problem) -> None:
    expected = loops(problem)
    for backend in BACKENDS:
        close(problem.run(backend), expected, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_cogviews_own_formulation(backend: str) -> None:
    """Two score matrices, one of the pivot list and one of overlapping chunks of the keys, each
    masked by -10000, concatenated for one softmax."""
    batch, num_heads, s, head_dim, w, times, num_pivots = 3, 2, 48, 8, 4, 3, 14
    text_len = int32([6, 0, 9])
    pivot_idx = torch.stack(
        [
            torch.cat([torch.arange(t), t + torch.randperm(s - t)[: num_pivots - t]])
            for t in text_len.tolist()
        ]
    )
    pivot_idx = pivot_idx[:, torch.randperm(num_pivots)]

    def cogview(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        index = pivot_idx[:, None, :, None].expand(-1, num_heads, -1, head_dim)
        pivot_k, pivot_v = k.gather(2, index), v.gather(2, index)
        block_start = torch.arange(s) // w * w - (times - 1) * w
        pivot_attention_mask = (pivot_idx[:, None, :] < block_start[:, None])[:, None].to(q.dtype)
        pivot_scores = q @ pivot_k.mT * pivot_attention_mask / math.sqrt(head_dim)
        pivot_scores = pivot_scores - 10000.0 * (1 - pivot_attention_mask)
        pivot_scores = pivot_scores + math.log(s // num_pivots)

        def chunks(x: Tensor) -> Tensor:  # (B, H, s / w, times w, D), zeros before the start
            return F.pad(x, (0, 0, (times - 1) * w, 0)).unfold(2, times * w, w).mT

        window_mask = torch.ones(w, times * w, dtype=q.dtype).tril((times - 1) * w)
        scores = q.unflatten(2, (-1, w)) @ chunks(k).mT
        scores = scores * window_mask / math.sqrt(head_dim) - 10000.0 * (1 - window_mask)
        before_start = torch.zeros(s // w, 1, times * w, dtype=q.dtype)
        for t in range(times - 1):
            before_start[t, :, : (times - 1 - t) * w] = 10000.0
        window_scores = (scores - before_start).flatten(2, 3)

        joint = torch.cat([pivot_scores, window_scores], dim=-1)
        p = joint.softmax(-1)
        out = p[..., :num_pivots] @ pivot_v
        p_window = p[..., num_pivots:].unflatten(2, (-1, w))
        return out + (p_window @ chunks(v)).flatten(2, 3), joint.logsumexp(-1)

    layout = ck.ThreeRegionLayout.from_cogview(pivot_idx, text_len, w, times, s)
    problem = make_problem(batch, num_heads, k_len=s, head_dim=head_dim, layout=layout)
    close(problem.run(backend), problem.differentiate(cogview), 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len", [9, 4, 1])
def test_gradients_are_those_of_the_values(backend: str, q_len: int) -> None:
    layout = ck.ThreeRegionLayout(
        int32([3, 0]), int32([[-1, 3, 5], [1, 4, 9]]), 2, 1, math.log(2), -0.5
    )
    problem = make_problem(2, 2, 1, q_len, 9, 3, layout=layout)

    def attention(*qkv: Tensor) -> Any:
        return ck.three_region_attention(*qkv, layout, 0.7, backend, return_lse=True)

    leaves = problem.leaves()
    assert torch.autograd.gradcheck(attention, leaves)
    if backend == "reference" and q_len == 4:
        assert torch.autograd.gradgradcheck(attention, leaves)


# Portable against the definition


@both_backwards
@given(data=st.data())
@settings(max_examples=80)
def test_portable_equals_reference(with_dlse: bool, data: st.DataObject) -> None:
    problem = data.draw(problems(max_len=150))
    problem.dlse *= with_dlse
    close(problem.run("portable"), problem.run("reference"), 1e-11)


@both_backwards
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@given(data=st.data())
@settings(max_examples=25)
def test_portable_is_as_accurate_as_torch(
    dtype: torch.dtype, with_dlse: bool, data: st.DataObject
) -> None:
    problem = data.draw(problems(max_len=100, dtype=dtype))
    problem.dlse *= with_dlse
    results = problem.run("portable")
    expected_dtypes = [dtype, torch.float32, dtype, dtype, dtype]
    assert [results[name].dtype for name in RESULTS] == expected_dtypes
    assert_as_accurate_as_torch(problem, results)


@pytest.mark.slow
@both_backwards
@given(data=st.data())
@settings(max_examples=5 * settings().max_examples)
def test_portable_equals_reference_sweep(with_dlse: bool, data: st.DataObject) -> None:
    problem = data.draw(problems(max_len=700))
    problem.dlse *= with_dlse
    close(problem.run("portable"), problem.run("reference"), 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@given(data=st.data())
@settings(max_examples=5 * settings().max_examples)
def test_portable_is_as_accurate_as_torch_sweep(dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(problems(max_len=500, dtype=dtype))
    problem.dlse *= data.draw(st.booleans())
    assert_as_accurate_as_torch(problem, problem.run("portable"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", RESULTS)
def test_the_bounds_catch_a_lost_result(dtype: torch.dtype, name: str) -> None:
    """A result of zeros, or with one head lost, is far outside the bounds used above."""
    problem = make_problem(k_len=60, dtype=dtype)
    results = problem.run("portable")
    assert_as_accurate_as_torch(problem, results)
    without_head = results[name].clone()
    without_head[:, 1] = 0
    for wrong in (torch.zeros_like(results[name]), without_head):
        with pytest.raises(AssertionError, match=f"^{name}: error"):
            assert_as_accurate_as_torch(problem, {**results, name: wrong})


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_keep_their_precision(backend: str) -> None:
    """Whatever the default dtype is."""
    layout = ck.ThreeRegionLayout(4, int32([[5, 7, 9]]), 2, 1, math.log(3), 0.1)
    problem = make_problem(k_len=16, layout=layout)
    expected = same_dtype_torch(problem)
    torch.set_default_dtype(torch.bfloat16)
    try:
        results = problem.run(backend)
    finally:
        torch.set_default_dtype(torch.float32)
    close(results, expected, 1e-12)


# Degenerate cases


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("w, n", [(16, 4), (7, 9), (1000, 1), (1, 2**62), (2**40, 2**40)])
def test_a_window_that_covers_everything_is_causal_attention(backend: str, w: int, n: int) -> None:
    layout = ck.ThreeRegionLayout(int32([5, 60]), int32([[6, 9], [7, 70]]), w, n, 3.0, -4.0)
    problem = make_problem(2, 4, 2, k_len=50, layout=layout)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        logits = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
        hidden = torch.ones(50, 50, dtype=torch.bool).triu(1)
        return out, logits.masked_fill(hidden, -math.inf).logsumexp(-1)

    close(problem.run(backend), problem.differentiate(causal), 1e-12)


@pytest.mark.parametrize("text_len", [10**6, 2**31 - 1, 2**40])
def test_text_beyond_the_keys_means_all_of_them(text_len: int) -> None:
    layout = ck.ThreeRegionLayout(text_len, int32([[3, 8]]), 4, 1)
    problem = make_problem(k_len=30, layout=layout)
    everything = ck.ThreeRegionLayout(30, None, 4, 1)
    mask = layout.dense_mask(1, 30, 30)
    assert torch.equal(mask, torch.ones(1, 30, 30, dtype=torch.bool).tril())
    expected = make_problem(k_len=30, layout=everything).run("reference")
    for backend in BACKENDS:
        close(problem.run(backend), expected, 1e-12)


@pytest.mark.parametrize(
    "layout",
    [
        ck.ThreeRegionLayout(0, None, 4, 2),
        ck.ThreeRegionLayout(0, int32([[3, 8]]), 4, 2),
        ck.ThreeRegionLayout(9, None, 4, 2),
        ck.ThreeRegionLayout(9, torch.empty(2, 0, dtype=torch.int32), 4, 2),
        ck.ThreeRegionLayout(9, int32([[-(2**31), -5, -1, 2**31 - 1]]), 4, 2),
        ck.ThreeRegionLayout(0, torch.arange(37, dtype=torch.int32).view(1, -1), 4, 2),
        ck.ThreeRegionLayout(5, int32([[6, 9]]), 100, 1),
        ck.ThreeRegionLayout(5, int32([[6, 9]]), 37, 1),
        ck.ThreeRegionLayout(5, int32([[6, 9]]), 1, 1),
    ],
    ids=["window", "no text", "no pivots", "P=0", "padding", "all", "Sk<w", "Sk=w", "w=1"],
)
@pytest.mark.parametrize("q_len", [37, 36, 5, 1])
def test_degenerate_layouts(layout: ck.ThreeRegionLayout, q_len: int) -> None:
    problem = make_problem(2, 2, 1, q_len, k_len=37, layout=layout)
    expected = same_dtype_torch(problem)
    for backend in BACKENDS:
        close(problem.run(backend), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, q_len, k_len", [(0, 5, 5), (0, 0, 0), (2, 0, 5), (2, 0, 0)])
def test_nothing_to_do(backend: str, batch: int, q_len: int, k_len: int) -> None:
    layout = ck.ThreeRegionLayout(1, int32([[2]]), 2, 1)
    problem = make_problem(batch, 4, 2, q_len, k_len, layout=layout, packed=False)
    results = problem.run(backend)
    assert results["out"].shape == (batch, 4, q_len, 8)
    assert results["lse"].shape == (batch, 4, q_len)
    assert results["dk"].shape == (batch, 2, k_len, 8) and results["dk"].abs().sum() == 0
    assert results["dv"].shape == (batch, 2, k_len, 8) and results["dv"].abs().sum() == 0


def test_more_heads_than_a_grid_dimension() -> None:
    layout = ck.ThreeRegionLayout(1, int32([[1, 2]]), 1, 1)
    problem = make_problem(2, 33000, k_len=4, head_dim=1, dtype=torch.float32, layout=layout)
    close(problem.run("portable"), problem.to(torch.float64).run("reference"), 1e-5)


def test_strides_do_not_matter() -> None:
    problem = make_problem(2, 4, 2, k_len=30)
    expected = problem.run("portable")
    for turn in (
        lambda t: t.contiguous(),
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    ):
        q, k, v = (turn(t) for t in (problem.q, problem.k, problem.v))
        results = Problem(q, k, v, *list(vars(problem).values())[3:]).run("portable")
        assert all(torch.equal(results[name], expected[name]) for name in RESULTS)
    # One head expanded to many, and one sample to the batch: stride 0.
    q = problem.q[:1, :1].expand(3, 4, -1, -1)
    k, v = (t[:1, :1].expand(3, 2, -1, -1) for t in (problem.k, problem.v))
    layout = ck.ThreeRegionLayout(5, int32([[6, 9]]), 4, 1)
    views = ck.three_region_attention(q, k, v, layout)
    copies = ck.three_region_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout)
    assert torch.equal(views, copies)
    dout = torch.ones(1, dtype=torch.float64).expand_as(q)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    from_expanded = torch.autograd.grad(ck.three_region_attention(*leaves, layout), leaves, dout)
    from_copy = torch.autograd.grad(
        ck.three_region_attention(*leaves, layout), leaves, dout.contiguous()
    )
    assert all(map(torch.equal, from_expanded, from_copy))


def test_layout_tensors_of_any_stride() -> None:
    problem = make_problem(3, 2, k_len=30)
    pivots = ck.sample_pivots(int32([5, 5, 5]), 30, 6)
    text = int32([5, 9, 5, 9, 5, 9])
    expected = ck.ThreeRegionLayout(text[::2].contiguous(), pivots, 4, 1)
    strided = ck.ThreeRegionLayout(text[::2], pivots.t().contiguous().t(), 4, 1)
    qkv = problem.q, problem.k, problem.v
    results = [ck.three_region_attention(*qkv, layout) for layout in (expected, strided)]
    assert torch.equal(*results)


# Properties


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_values_of_one_give_one(dtype: torch.dtype) -> None:
    problem = make_problem(2, 4, 2, k_len=150, dtype=dtype)
    out = ck.three_region_attention(
        problem.q, problem.k, torch.ones_like(problem.v), problem.layout
    )
    torch.testing.assert_close(
        out, torch.ones_like(out), rtol=0, atol=150 * torch.finfo(torch.float32).eps
    )


@both_backwards
@pytest.mark.parametrize(
    "dtype, later",
    [
        *((torch.float32, later) for later in (math.nan, math.inf, 1e30, 1e3)),
        *((torch.float16, later) for later in (math.nan, math.inf, 65504.0)),
        (torch.bfloat16, math.inf),
    ],
)
@pytest.mark.parametrize("position", [1, 37, 70, 129, 149])
def test_later_tokens_change_nothing(
    position: int, dtype: torch.dtype, later: float, with_dlse: bool
) -> None:
    problem = make_problem(2, 4, 2, k_len=150, dtype=dtype)
    problem.dlse *= with_dlse
    problem.dout[:, :, position:] = 0
    problem.dlse[:, :, position:] = 0
    before = problem.run("portable")
    for tensor in (problem.q, problem.k, problem.v):
        tensor[:, :, position:] = later
    after = problem.run("portable")
    for name in ("out", "lse", "dq"):
        assert torch.equal(before[name][:, :, :position], after[name][:, :, :position]), name


@both_backwards
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [2, 14, 20, 65, 99])
def test_poison_reaches_those_who_look_and_no_one_else(
    backend: str, what: str, value: float, position: int, with_dlse: bool
) -> None:
    pivots = int32([[8, 14, 33, 65, 100], [20, 21, 99, 100, 100]])
    layout = ck.ThreeRegionLayout(5, pivots, 4, 2, 0.4, -0.7)
    problem = make_problem(2, 4, 2, k_len=100, layout=layout)
    problem.dlse *= with_dlse
    clean = problem.run(backend)
    getattr(problem, what)[:, 1, position, 3] = value  # key head 1: query heads 2 and 3
    poisoned = problem.run(backend)

    mask = layout.dense_mask(2, 100, 100)
    looks = torch.zeros(2, 4, 100, dtype=torch.bool)
    looks[:, 2:] = mask[:, :, position].unsqueeze(1)
    shared = torch.zeros(2, 2, 100, dtype=torch.bool)  # keys of rows that look at the poison
    shared[:, 1] = (mask & mask[:, :, position].unsqueeze(2)).any(1)
    assert 0 < looks.sum() < looks.numel()
    untouched = {"out": ~looks, "lse": ~looks, "dq": ~looks, "dk": ~shared, "dv": ~shared}
    for name, kept in untouched.items():
        assert torch.equal(poisoned[name][kept], clean[name][kept]), f"{name}: poison leaked"

    rows = poisoned["out"][looks]
    if what == "v":
        column = torch.full_like(rows[:, 3], value)
        torch.testing.assert_close(rows[:, 3], column, rtol=0, atol=0, equal_nan=True)
        others = [0, 1, 2, 4, 5, 6, 7]
        torch.testing.assert_close(rows[:, others], clean["out"][looks][:, others])
        torch.testing.assert_close(poisoned["lse"], clean["lse"])
    elif math.isnan(value):
        assert rows.isnan().all() and poisoned["lse"][looks].isnan().all()
    else:
        # A logit of +inf takes everything and makes NaN, as softmax does; -inf hides the key.
        taken = problem.q[looks][:, 3].sign() == math.copysign(1, value)
        assert torch.equal(rows.isnan().all(1), taken) and torch.equal(rows.isnan().any(1), taken)
        assert (poisoned["lse"][looks][taken] == math.inf).all()
        assert poisoned["lse"][looks][~taken].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["q", "dout"])
@both_backwards
def test_a_bad_row_spoils_its_own_results_alone(what: str, value: float, with_dlse: bool) -> None:
    problem = make_problem(2, 4, 2, k_len=100)
    problem.dlse *= with_dlse
    clean = problem.run("portable")
    getattr(problem, what)[1, 2, 50, 3] = value
    spoiled = problem.run("portable")
    looks = problem.layout.dense_mask(2, 100, 100)[1, 50]
    row = torch.zeros(2, 4, 100, dtype=torch.bool)
    row[1, 2, 50] = True
    keys = torch.zeros(2, 2, 100, dtype=torch.bool)
    keys[1, 1] = looks
    for name, bad in {"out": row, "lse": row, "dq": row, "dk": keys, "dv": keys}.items():
        assert torch.equal(spoiled[name][~bad], clean[name][~bad]), name
    assert not spoiled["dq"][row].isfinite().any()
    assert not spoiled["dv"][keys].isfinite().all()
    assert spoiled["out"][row].isfinite().all() == (what == "dout")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, huge",
    [
        (torch.float32, 3e38),
        (torch.bfloat16, 3e38),
        (torch.float16, 65504.0),
        (torch.float32, 1e20),
    ],
)
def test_huge_finite_inputs_give_finite_results(
    backend: str, dtype: torch.dtype, huge: float
) -> None:
    problem = make_problem(2, 4, 2, k_len=90, dtype=dtype)
    for tensor in (problem.q, problem.k):
        tensor.copy_(tensor.sign() * huge)

    def attention() -> Any:
        return ck.three_region_attention(
            problem.q, problem.k, problem.v, problem.layout, backend=backend, return_lse=True
        )

    out, lse = attention()
    assert out.isfinite().all() and not lse.isnan().any()
    assert backend == "reference" or lse.isfinite().all()
    largest = problem.v.abs().amax((2, 3)).repeat_interleave(2, 1)
    assert (out.abs().amax((2, 3)) <= 1.001 * largest).all(), "weights sum to one"
    problem.v.copy_(problem.v.sign() * huge)
    assert attention()[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
def test_weights_of_large_logits_sum_to_one(backend: str, size: float) -> None:
    """Equal keys share a row evenly, forward and backward, however large their logits are: an
    exponential of ``logit - lse`` does not, for lse is rounded."""
    layout = ck.ThreeRegionLayout(0, None, 100, 1)
    problem = make_problem(1, 1, k_len=3, head_dim=1, dtype=torch.float32, layout=layout)
    problem.q.fill_(1.0)
    problem.k.fill_(size)
    problem.dlse.zero_()
    results = problem.run(backend)
    count = torch.arange(1, 4)
    mean = problem.v.flatten().cumsum(0) / count
    torch.testing.assert_close(results["out"].flatten(), mean)
    dv = (problem.dout.flatten() / count).flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(results["dv"].flatten(), dv)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e6])
def test_weights_of_large_logits_sum_to_one_across_regions(size: float) -> None:
    """As above, where text, pivots and window share a row. Every other query is small: its row
    stays with the flash kernels."""
    layout = ck.ThreeRegionLayout(3, int32([[4, 9, 20]]), 4, 1)
    problem = make_problem(1, 1, k_len=50, head_dim=1, dtype=torch.float32, layout=layout)
    problem.q.fill_(1.0)
    problem.q[:, :, ::2] = 1e-6
    problem.k.fill_(size)
    problem.dlse.zero_()
    results = problem.run("portable")
    visible = layout.dense_mask(1, 50, 50)[0].float()
    p = visible / visible.sum(1, keepdim=True)
    tolerance = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(results["out"][0, 0], p @ problem.v[0, 0], **tolerance)
    torch.testing.assert_close(results["dv"][0, 0], p.T @ problem.dout[0, 0], **tolerance)


@pytest.mark.parametrize("q_len", [300, 299, 40, 1])
@pytest.mark.parametrize("w, n", [(5, 1), (64, 2), (100, 1), (280, 1)])
def test_the_flash_kernels_compute_ordinary_rows(w: int, n: int, q_len: int) -> None:
    """All of them, forward and backward, and as the blocked path does."""
    layout = ck.ThreeRegionLayout(int32([6, 0]), int32([[7, 90, 300], [3, 33, 50]]), w, n, 0.4)
    problem = make_problem(2, 4, 2, q_len, 300, dtype=torch.float32, layout=layout)
    problem.dlse.zero_()
    with mock.patch.object(blocked, "tiles", side_effect=AssertionError("blocked path")):
        results = problem.run("portable")
    with mock.patch.object(flash, "takes", return_value=False):
        close(problem.run("portable"), results, 2e-5)


def test_a_torch_without_the_flash_kernels() -> None:
    problem = make_problem(2, 4, 2, dtype=torch.float32)
    problem.dlse.zero_()
    expected = problem.run("portable")
    assert None not in flash._find(torch.ops.aten)
    forward, backward = flash._find(torch.ops.cogview_kernels)
    assert forward is None and backward is None
    with (
        mock.patch.object(flash, "_forward", forward),
        mock.patch.object(flash, "_backward", backward),
    ):
        close(problem.run("portable"), expected, 2e-5)


def test_gradients_that_float16_can_hold_come_out() -> None:
    """Whatever the loss scale: dS alone would vanish or overflow in float16."""
    for loss_scale in (2.0**-12, 2.0**12):
        problem = make_problem(2, 4, 2, k_len=90, dtype=torch.float16)
        problem.dout, problem.dlse = problem.dout * loss_scale, problem.dlse * loss_scale
        results = problem.run("portable")
        truth = problem.to(torch.float64).run("reference")
        for name in ("dq", "dk", "dv"):
            largest = truth[name].abs().max()
            assert largest < 65504
            error = (results[name].double() - truth[name]).abs().max()
            assert error < 2e-3 * largest + 2.0**-24, name


def test_lse_gradient_alone() -> None:
    """``d lse_i / d q_i = scale sum_j p_ij k_j``, and nothing for v."""
    problem = make_problem(2, 2, k_len=30, softmax_scale=0.3)
    leaves = problem.leaves()
    _, lse = ck.three_region_attention(*leaves, problem.layout, 0.3, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse, leaves, problem.dlse)
    mean_key = ck.three_region_attention(
        problem.q, problem.k, problem.k.contiguous(), problem.layout, 0.3
    )
    torch.testing.assert_close(dq, 0.3 * mean_key * problem.dlse.unsqueeze(-1))
    assert dk.abs().max() > 0.01
    assert dv.abs().max() == 0


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(wanted: tuple[int, ...]) -> None:
    problem = make_problem(k_len=20)
    everything = problem.run("portable")
    tensors = [problem.q, problem.k, problem.v]
    leaves = [t.clone().requires_grad_(n in wanted) for n, t in enumerate(tensors)]
    out, lse = ck.three_region_attention(*leaves, problem.layout, return_lse=True)
    torch.autograd.backward((out, lse), (problem.dout, problem.dlse))
    for n, name in enumerate(("dq", "dk", "dv")):
        if n in wanted:
            torch.testing.assert_close(leaves[n].grad, everything[name])
        else:
            assert leaves[n].grad is None


def test_runs_are_bitwise_equal() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem(2, 4, 2, k_len=200, dtype=dtype)
        first, second = problem.run("portable"), problem.run("portable")
        assert all(torch.equal(first[name], second[name]) for name in RESULTS)
        automatic = problem.run("auto")
        assert all(torch.equal(first[name], automatic[name]) for name in RESULTS)


@pytest.mark.parametrize("w, n", [(4, 2), (5, 1), (64, 1), (100, 2)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_decoding_in_chunks_equals_the_full_forward(w: int, n: int, chunk: int) -> None:
    seqlen = 70
    layout = ck.ThreeRegionLayout(int32([6, 0]), int32([[6, 9, 40], [3, 33, 50]]), w, n, 0.4, -0.7)
    problem = make_problem(2, 4, 2, k_len=seqlen, layout=layout)
    q, k, v = problem.q, problem.k, problem.v
    full, full_lse = ck.three_region_attention(q, k, v, layout, return_lse=True)
    for begin in range(0, seqlen, chunk):
        end = min(begin + chunk, seqlen)
        cache_k, cache_v = k[:, :, :end], v[:, :, :end]  # views of a longer cache
        out, lse = ck.three_region_attention(
            q[:, :, begin:end], cache_k, cache_v, layout, return_lse=True
        )
        torch.testing.assert_close(out, full[:, :, begin:end], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(lse, full_lse[:, :, begin:end], rtol=1e-13, atol=1e-13)


# Cost


def operator_arguments(
    seqlen: int, q_len: int, layout: ck.ThreeRegionLayout
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    problem = make_problem(1, 1, 1, q_len, seqlen, 8, torch.float32, layout)
    text_len, pivot_idx = layout.tensors(1, torch.device("cpu"))
    settings = layout.query_window, layout.key_window_times, layout.text_bias, layout.pivot_bias
    return (problem.q, problem.k, problem.v), (text_len, pivot_idx, *settings, 0.3)


def flash_flops(num_products: int, q_index: int) -> Callable[..., int]:
    """Of torch's flash kernels for the CPU, masked pairs included."""

    def flops(*shapes: Any, out_val: Any = None, **settings: Any) -> int:
        batch, num_heads, q_len, head_dim = shapes[q_index]
        return num_products * 2 * batch * num_heads * q_len * shapes[q_index + 1][2] * head_dim

    return flops


FLASH = "_scaled_dot_product_flash_attention_for_cpu"
FLASH_FLOPS = {
    getattr(torch.ops.aten, FLASH): flash_flops(2, 0),
    getattr(torch.ops.aten, f"{FLASH}_backward"): flash_flops(5, 1),
}


def count_flops(function: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False, custom_mapping=FLASH_FLOPS) as counter:
        result = function(*args)
    return counter.get_total_flops(), result


def long_layout() -> ck.ThreeRegionLayout:
    return ck.ThreeRegionLayout(64, ck.sample_pivots(64, 700, 128), 128, 2)


def test_work_follows_the_keys_attended() -> None:
    seqlen = 4096
    layout = long_layout()
    qkv, rest = operator_arguments(seqlen, seqlen, layout)
    pairs = int(layout.dense_mask(1, seqlen, seqlen).sum())
    assert pairs < seqlen * seqlen / 10
    flops, (out, lse) = count_flops(portable.attention_forward, *qkv, *rest)
    assert 1 <= flops / (pairs * 8 * 2 * 2) < 1.6, "q k and p v"
    for dlse in (torch.zeros_like(lse), torch.ones_like(lse)):  # flash, blocked
        flops, _ = count_flops(portable.attention_backward, out, dlse, *qkv, out, *rest, lse)
        assert 1 <= flops / (pairs * 8 * 2 * 5) < 1.6, "q k, dout v, ds k, ds q and p dout"


def test_a_token_costs_the_same_however_long_the_cache() -> None:
    layout = long_layout()
    costs = []
    for seqlen in (1024, 16 * 1024):
        qkv, rest = operator_arguments(seqlen, 1, layout)
        with Recorder() as recorder:
            flops, _ = count_flops(portable.attention_forward, *qkv, *rest)
        costs.append((flops, len(recorder.operators)))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("tokens_outside_heads", [True, False])
def test_a_token_allocates_the_same_however_long_the_cache(tokens_outside_heads: bool) -> None:
    """Copies inside torch's operators included."""
    layout = long_layout()
    allocated = []
    for seqlen in (1024, 16 * 1024):
        cache = torch.randn(1, 2, seqlen + 1, 8)
        if tokens_outside_heads:
            cache = torch.randn(1, seqlen, 2, 8).transpose(1, 2)
        keys = cache[:, :, :seqlen]
        with torch.profiler.profile(profile_memory=True) as profile:
            ck.three_region_attention(keys[:, :, -1:], keys, keys, layout, backend="portable")
        usage = [event.self_cpu_memory_usage for event in profile.key_averages()]
        allocated.append(sum(size for size in usage if size > 0))
    assert allocated[0] == allocated[1] > 0


def test_memory_never_holds_queries_times_keys() -> None:
    seqlen = 16 * 1024
    qkv, rest = operator_arguments(seqlen, seqlen, long_layout())
    with Recorder() as recorder:
        out, lse = portable.attention_forward(*qkv, *rest)
        portable.attention_backward(out, torch.zeros_like(lse), *qkv, out, *rest)
    one_mask = seqlen * seqlen  # bytes of a dense bool mask
    assert recorder.largest < one_mask / 100


PEAK = """
import resource, torch
import cogview_kernels as ck
from cogview_kernels.attention import portable

def run(seqlen):
    q, k, v = (torch.randn(1, 1, seqlen, 8, requires_grad=True) for _ in range(3))
    layout = ck.ThreeRegionLayout(64, ck.sample_pivots(64, seqlen, NUM_PIVOTS), 128, NUM_BLOCKS)
    ck.three_region_attention(q[:, :, NUM_BEFORE:], k, v, layout).sum().backward()

run(512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(16 * 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "num_pivots, num_blocks, num_before", [(128, 2, 0), (2048, 2, 0), (0, 64, 1)]
)
def test_peak_memory_of_a_process(num_pivots: int, num_blocks: int, num_before: int) -> None:
    """Nor does it hold queries times far keys, or times the keys of long windows."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = f"NUM_PIVOTS, NUM_BLOCKS, NUM_BEFORE = {num_pivots, num_blocks, num_before}"
    done = subprocess.run(
        [sys.executable, "-c", f"{settings}\n{PEAK}"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert int(done.stdout) < 60 * 1024, "KiB; one dense float32 matrix takes 1 GiB"


# Bad input


def changed(name: str, value: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments[name] = value(arguments[name])

    return change


def given_as(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return changed(name, lambda _: value)


WRONG_BATCH = ck.ThreeRegionLayout(1, int32([[1], [2], [3]]), 4, 1)
WRONG_HEADS = ck.ThreeRegionLayout(1, int32([[[1], [2], [3]]]), 4, 1)
UNSORTED = ck.ThreeRegionLayout(1, int32([[2, 4, 9, 9], [2, 4, 6, 12]]), 4, 1)


@pytest.mark.parametrize(
    "change, error, match",
    [
        (given_as("q", None), TypeError, "q: expected a tensor, got NoneType"),
        (given_as("k", [1.0]), TypeError, r"k: expected a tensor, got list \[1.0\]"),
        (changed("v", lambda t: t.tolist()), TypeError, "v: expected a tensor, got list"),
        (changed("q", lambda t: t.int()), TypeError, "q: expected float64.*got a int32 tensor"),
        (changed("k", lambda t: t.cfloat()), TypeError, "k: expected float64.*complex64"),
        (changed("q", lambda t: t.to(torch.float8_e5m2)), TypeError, "q: expected float64.*float8"),
        (changed("k", lambda t: t.double()), TypeError, "k: expected dtype torch.float32 as q"),
        (changed("v", lambda t: t.half()), TypeError, "v: expected dtype torch.float32 as q"),
        (changed("q", lambda t: t[0]), ValueError, r"q: expected shape \(B, H, Sq, D\), got \(4,"),
        (changed("k", lambda t: t[:, 0]), ValueError, r"k: expected shape \(B, G, Sk, D\), got"),
        (changed("v", lambda t: t[None]), ValueError, r"v: expected shape \(B, G, Sk, D\), got"),
        (changed("k", lambda t: t[:1]), ValueError, r"k: expected \(2, G, Sk, 8\).*\(1, 2, 10, 8"),
        (changed("k", lambda t: t[..., :4]), ValueError, r"k: expected \(2, G, Sk, 8\) to match"),
        (changed("v", lambda t: t[..., :4]), ValueError, r"v: expected \(2, 2, 10, 8\) as k"),
        (changed("v", lambda t: t[:, :, :9]), ValueError, r"v: expected \(2, 2, 10, 8\) as k, got"),
        (changed("v", lambda t: t[:, :1]), ValueError, r"v: expected \(2, 2, 10, 8\) as k, got"),
        (changed("q", lambda t: t[:, :3]), ValueError, "k: expected a number of heads that div"),
        (changed("q", lambda t: t[:, :0]), ValueError, "q: expected heads and a head dimension"),
        (changed("q", lambda t: t[..., :0]), ValueError, "q: expected heads and a head dimension"),
        (changed("q", lambda t: t.repeat(1, 1, 2, 1)), ValueError, "q: expected at most.* 10 keys"),
        (changed("k", lambda t: t.to("meta")), ValueError, "k: expected device cpu as q, got meta"),
        (changed("v", lambda t: t.to("meta")), ValueError, "v: expected device cpu as q, got meta"),
        (changed("q", lambda t: t.to("meta")), ValueError, "k: expected device meta as q, got cpu"),
        (changed("q", lambda t: t.mT.contiguous().mT), ValueError, "q: expected a contiguous last"),
        (changed("k", lambda t: t.mT.contiguous().mT), ValueError, "k: expected a contiguous last"),
        (changed("v", lambda t: t.mT.contiguous().mT), ValueError, "v: expected a contiguous last"),
        (changed("v", lambda t: t[..., :1].expand_as(t)), ValueError, "v: expected a contiguous"),
        (given_as("layout", None), TypeError, "layout: expected a ThreeRegionLayout, got NoneType"),
        (given_as("layout", WRONG_BATCH), ValueError, r"layout.pivot_idx: expected \(2, 1\)"),
        (
            given_as("layout", WRONG_HEADS),
            ValueError,
            r"layout.pivot_idx: expected \(1, 2, 1\) to match the heads of k, got \(1, 3, 1\)",
        ),
        (given_as("layout", UNSORTED), ValueError, "pivot_idx: expected unique.* got 9 after 9"),
        (given_as("softmax_scale", math.nan), ValueError, "softmax_scale: expected.*got nan"),
        (given_as("softmax_scale", math.inf), ValueError, "softmax_scale: expected.*got inf"),
        (given_as("softmax_scale", "1"), TypeError, "softmax_scale: expected a float, got str"),
        (given_as("softmax_scale", torch.ones(())), TypeError, "softmax_scale: expected a float"),
        (given_as("backend", "gpu"), ValueError, "backend: expected one of .*'portable'.*'gpu'"),
        (given_as("backend", None), ValueError, "backend: expected one of"),
        (given_as("backend", ["cuda"]), ValueError, "backend: expected one of"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input_is_named(
    change: Callable[[dict[str, Any]], None], error: type[Exception], match: str, backend: str
) -> None:
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 4, 10, 8),
        "k": torch.randn(2, 2, 10, 8),
        "v": torch.randn(2, 2, 10, 8),
        "layout": ck.ThreeRegionLayout(1, int32([[3], [5]]), 4, 1),
        "softmax_scale": None,
        "backend": backend,
    }
    ck.three_region_attention(**arguments)
    change(arguments)
    with refused(error, match):
        ck.three_region_attention(**arguments)


def test_layout_on_another_device() -> None:
    q = torch.randn(2, 4, 10, 8)
    layout = ck.ThreeRegionLayout(int32([1, 2]).to("meta"), None, 4, 1)
    with refused(ValueError, "layout.text_len: expected device cpu as the queries, got meta"):
        ck.three_region_attention(q, q, q, layout)


def test_layouts_whose_values_were_never_checked_stay_inside_the_tensors() -> None:
    """On a GPU values are not read, so the operator itself must survive any of them."""
    problem = make_problem(2, 2, k_len=40, dtype=torch.float32)
    wild = int32([[2**31 - 1, -(2**31), 39, 3, 3, -7, 40], [0, 0, 0, 41, 39, 38, -1]])
    out, lse = torch.ops.cogview_kernels.three_region_attention_portable(
        problem.q, problem.k, problem.v, int32([-(2**31), 2**31 - 1]), wild, 4, 1, 0.0, 0.0, 0.3
    )
    gradients = torch.ops.cogview_kernels.three_region_attention_portable_backward(
        problem.dout, problem.dlse, problem.q, problem.k, problem.v, out,
        int32([-(2**31), 2**31 - 1]), wild, 4, 1, 0.0, 0.0, 0.3,
    )  # fmt: skip
    assert all(t.isfinite().all() for t in (out, lse, *gradients))


def test_one_tensor_in_every_role() -> None:
    problem = make_problem(2, 2, k_len=20)
    x = problem.q.clone().requires_grad_()
    for backend in BACKENDS:
        out = ck.three_region_attention(x, x, x, problem.layout, backend=backend)
        (dx,) = torch.autograd.grad(out, x, problem.dout)
        copies = [x.detach().clone().requires_grad_() for _ in range(3)]
        apart = ck.three_region_attention(*copies, problem.layout, backend=backend)
        assert torch.equal(out, apart)
        torch.testing.assert_close(dx, sum(torch.autograd.grad(apart, copies, problem.dout)))


def test_inference_mode_and_writes_to_saved_inputs() -> None:
    problem = make_problem(2, 2, k_len=20)
    expected = problem.run("portable")["out"]
    with torch.inference_mode():
        out = ck.three_region_attention(problem.q, problem.k, problem.v, problem.layout)
    assert torch.equal(out, expected) and out.is_inference()
    leaves = problem.leaves()
    key = leaves[1].clone()
    out = ck.three_region_attention(leaves[0], key, leaves[2], problem.layout)
    key.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
