"""The attention kernels against the definition: their source on the CPU simulator (``host_model``)
and, where there is a GPU, on that (``cuda``)."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    RESULTS,
    Problem,
    assert_as_accurate_as_torch,
    backend_or_skip,
    int32,
    make_problem,
    problems,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cogview_kernels as ck
from cogview_kernels import extension
from cogview_kernels.attention import operators
from cogview_kernels.extension import modelled_device

HEAD_DIMS = (32, 64, 96, 128)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[backend_or_skip("host_model"), backend_or_skip("cuda")], scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(problem: Problem, backend: str) -> dict[str, Tensor]:
    """The kernels' results, on the CPU."""
    if backend == "cuda":
        layout = problem.layout
        tensors = {
            name: value.cuda()
            for name, value in (("text_len", layout.text_len), ("pivot_idx", layout.pivot_idx))
            if isinstance(value, Tensor)
        }
        problem = problem.map(lambda tensor: tensor.cuda())
        problem = dataclasses.replace(problem, layout=dataclasses.replace(layout, **tensors))
    return {name: value.cpu() for name, value in problem.run(backend).items()}


def check(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Run the kernels and compare every result with the definition."""
    results = run(problem, backend)
    dtype = problem.q.dtype
    assert [results[name].dtype for name in RESULTS] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_as_accurate_as_torch(problem, results)
    # lse is float32 whatever the dtype, and must be as good.
    truth = problem.to(torch.float64).run("reference")["lse"]
    largest = max(1.0, truth.abs().max().item()) if truth.numel() > 0 else 1.0
    assert (results["lse"] - truth).abs().max().item() <= 4e-6 * largest if truth.numel() else True
    return results


# What the kernels take


def kernel_modules() -> list[Any]:
    """The built modules that answer for the kernels: the same source, compiled twice."""
    modules = [] if extension._C is None else [extension._C]
    if extension.why_not_host_model() is None:
        modules.append(importlib.import_module("cogview_kernels._host_model"))
    modules = [m for m in modules if hasattr(m, "three_region_attention_unsupported")]
    return modules or pytest.skip("neither the kernels nor the host model are built")


def test_which_problems_have_a_kernel() -> None:
    for module in kernel_modules():
        unsupported = module.three_region_attention_unsupported
        for dtype in ("float16", "bfloat16"):
            taken = [dim for dim in range(-1, 300) if unsupported(dtype, dim, 8, 0) is None]
            assert taken == list(HEAD_DIMS)
        dims = "the kernels take head dimensions of 32, 64, 96 and 128, got 80"
        assert unsupported("float16", 80, 9, 0) == dims
        for dtype in ("float32", "float64"):
            reason = unsupported(dtype, 64, 9, 0)
            assert reason == f"the kernels take float16 and bfloat16, got {dtype}"
        reason = unsupported("bfloat16", 64, 7, 5)
        assert reason == "the kernels need compute capability 8.0 or later, got 7.5"
        assert unsupported("bfloat16", 64, 12, 0) is None


def test_rows_of_partial_sums() -> None:
    """Whole tiles of 64: the pivots, and up to 256 of the first keys."""
    expected = {(40, 6): 128, (1, 0): 64, (64, 64): 128, (65, 65): 256, (1000, 0): 256}
    for module in kernel_modules():
        for (k_len, num_pivots), rows in expected.items():
            assert module.three_region_attention_split_rows(k_len, num_pivots) == rows


# The definition


@pytest.mark.parametrize("dtype", HALVES)
@given(data=st.data())
@settings(max_examples=settings().max_examples // 2)
def test_equals_the_definition(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(problems(300, dtype, max_batch=2, head_dims=HEAD_DIMS))
    with modelled_device(data.draw(st.sampled_from([1, 40]))):  # the backward's splits
        check(problem, backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@given(data=st.data())
@settings(max_examples=10 * settings().max_examples)
def test_equals_the_definition_sweep(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(problems(700, dtype, max_batch=2, head_dims=HEAD_DIMS))
    with modelled_device(data.draw(st.sampled_from([1, 40]))):
        check(problem, backend)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("w, n", [(64, 2), (128, 1), (48, 3), (200, 1)])
def test_many_tiles(backend: str, dtype: torch.dtype, head_dim: int, w: int, n: int) -> None:
    """Several tiles of queries, keys, text and pivots, and their ragged ends."""
    text_len = int32([70, 9])
    pivots = ck.sample_pivots(text_len, 520, 150, torch.Generator().manual_seed(1))
    pivots[1, 100:] = 520  # ragged
    layout = ck.ThreeRegionLayout(text_len, pivots, w, n, math.log(2), -0.5)
    with modelled_device(20):
        check(make_problem(2, 2, 1, 450, 520, head_dim, dtype, layout), backend)


def test_long_lists_of_keys(backend: str) -> None:
    """What a warp sees is found for 32 tiles of 32 keys at once."""
    layout = ck.ThreeRegionLayout(5, None, 1100, 1)
    check(make_problem(1, 1, 1, 128, 1100, 96, torch.bfloat16, layout), backend)


@pytest.mark.parametrize("w, n", [(32, 2), (128, 1)])
def test_pivots_at_the_edges_of_windows(backend: str, w: int, n: int) -> None:
    """A pivot on a window's first key, or beside it: counted once."""
    edges = torch.arange(w, 500, w)
    pivots = torch.cat([edges - 1, edges, edges + 1]).sort().values.to(torch.int32).view(1, -1)
    layout = ck.ThreeRegionLayout(70, pivots, w, n)
    check(make_problem(1, 2, k_len=500, head_dim=32, dtype=torch.bfloat16, layout=layout), backend)


def pivots_of_heads(k_len: int) -> Tensor:
    """For two samples with three key/value heads: many, few, none."""
    generator = torch.Generator().manual_seed(3)
    pivots = torch.rand(2, 3, k_len, generator=generator).argsort()[..., :90].sort().values.int()
    pivots[:, 1, 7:] = k_len
    pivots[1, 2] = k_len
    return pivots


@pytest.mark.parametrize("splits", [1, 40])
@pytest.mark.parametrize("dtype", HALVES)
def test_heads_with_pivots_of_their_own(backend: str, dtype: torch.dtype, splits: int) -> None:
    """The definition, and bitwise what a call for each head alone gives."""
    pivots = pivots_of_heads(300)
    layout = ck.ThreeRegionLayout(int32([20, 70]), pivots, 40, 2, 0.5, -1.0)
    problem = make_problem(2, 6, 3, k_len=300, head_dim=32, dtype=dtype, layout=layout)
    with modelled_device(splits):
        results = check(problem, backend)
    if splits > 1:  # a call for one head alone splits into more
        return
    for g in range(3):

        def of_head(tensor: Tensor, g: int = g) -> Tensor:
            size = tensor.shape[1] // 3
            return tensor[:, g * size : (g + 1) * size]

        shared = dataclasses.replace(layout, pivot_idx=pivots[:, g])
        alone = dataclasses.replace(problem.map(of_head), layout=shared)
        with modelled_device(splits):
            expected = run(alone, backend)
        assert all(torch.equal(of_head(results[name]), expected[name]) for name in RESULTS)


def test_a_pivot_of_one_head_does_not_leak_into_the_others(backend: str) -> None:
    """Rows that are computed again see the keys of their own head."""
    pivots = int32([[[40, 90], [41, 90]]])
    layout = ck.ThreeRegionLayout(5, pivots, 16, 2)
    problem = make_problem(1, 4, 2, k_len=150, head_dim=32, dtype=torch.bfloat16, layout=layout)
    for position in (40, 41, 90):
        for what in ("k", "v"):
            poisoned = dataclasses.replace(problem, k=problem.k.clone(), v=problem.v.clone())
            getattr(poisoned, what)[:, :, position] = math.nan
            results, expected = run(poisoned, backend), poisoned.run("portable")
            for name in RESULTS:
                torch.testing.assert_close(
                    results[name], expected[name], rtol=5e-2, atol=5e-2, equal_nan=True
                )


@pytest.mark.parametrize("bound", [700, 715, 1199])
def test_more_pivots_than_two_searches_of_a_warp_find(backend: str, bound: int) -> None:
    """The search takes a third round."""
    pivots = torch.arange(1300, dtype=torch.int32).view(1, -1)
    pivots = torch.where(pivots < 600, pivots, pivots + bound % 2)
    layout = ck.ThreeRegionLayout(0, pivots, 1, 100)
    problem = make_problem(1, 1, 1, 20, bound + 120, 32, torch.bfloat16, layout)
    check(problem, backend)


@pytest.mark.parametrize("text_len", [40, 300])
def test_blocks_share_the_queries_of_a_tile(
    backend: str, text_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tiles of queries than blocks that share them, and not a multiple; text beyond what is
    packed with the pivots."""
    monkeypatch.setattr(operators, "_num_splits", lambda *_: 4)
    pivots = (text_len + int32([1, 20, 21, 90])).view(1, -1)
    layout = ck.ThreeRegionLayout(text_len, pivots, 48, 1, 0.7, -0.4)
    check(make_problem(1, 2, 1, 400, 400, 32, torch.bfloat16, layout), backend)


@pytest.mark.parametrize("name", RESULTS)
def test_a_lost_result_is_caught(name: str) -> None:
    """The bounds see a lost head, and zeros."""
    problem = make_problem(2, 4, 2, 100, 130, 32, torch.float16)
    results = problem.run("portable")
    assert_as_accurate_as_torch(problem, results)
    lost = results[name].clone()
    lost[:, 1] = 0
    for wrong in (torch.zeros_like(lost), lost):
        with pytest.raises(AssertionError, match=f"^{name}: error"):
            assert_as_accurate_as_torch(problem, {**results, name: wrong})


# Degenerate cases


@pytest.mark.parametrize(
    "layout",
    [
        ck.ThreeRegionLayout(0, None, 4, 2),
        ck.ThreeRegionLayout(0, int32([[3, 8]]), 4, 2),
        ck.ThreeRegionLayout(9, None, 4, 2),
        ck.ThreeRegionLayout(9, int32([[-(2**31), -5, -1, 2**31 - 1]]), 4, 2),
        ck.ThreeRegionLayout(0, torch.arange(137, dtype=torch.int32).view(1, -1), 4, 2),
        ck.ThreeRegionLayout(2**31 - 1, int32([[6, 9]]), 4, 1),
        ck.ThreeRegionLayout(5, int32([[6, 9]]), 1000, 1),
        ck.ThreeRegionLayout(5, int32([[6, 9]]), 137, 1),
        ck.ThreeRegionLayout(5, int32([[6, 9]]), 1, 1),
        ck.ThreeRegionLayout(5, int32([[6, 9]]), 1, 2**62),
        ck.ThreeRegionLayout(5, int32([[6, 9]]), 2**40, 2**40),
    ],
    ids=["window", "no text", "no pivots", "padding", "all pivots", "all text", "Sk<w", "Sk=w"]
    + ["w=1", "n=2^62", "w=2^40"],
)
@pytest.mark.parametrize("q_len", [137, 5, 1])
def test_degenerate_layouts(backend: str, layout: ck.ThreeRegionLayout, q_len: int) -> None:
    check(make_problem(2, 2, 1, q_len, 137, 32, torch.bfloat16, layout), backend)


@pytest.mark.parametrize("batch, q_len, k_len", [(0, 5, 5), (0, 0, 0), (2, 0, 5), (2, 0, 0)])
def test_nothing_to_do(backend: str, batch: int, q_len: int, k_len: int) -> None:
    layout = ck.ThreeRegionLayout(1, int32([[2]]), 2, 1)
    problem = make_problem(
        batch, 4, 2, q_len, k_len, 32, torch.float16, layout=layout, packed=False
    )
    results = run(problem, backend)
    assert results["out"].shape == (batch, 4, q_len, 32)
    assert results["lse"].shape == (batch, 4, q_len)
    for name in ("dk", "dv"):
        assert results[name].shape == (batch, 2, k_len, 32) and results[name].abs().sum() == 0


def test_a_window_that_covers_everything_is_causal_attention(backend: str) -> None:
    layout = ck.ThreeRegionLayout(int32([5, 60]), int32([[6, 9], [7, 70]]), 64, 3, 3.0, -4.0)
    problem = make_problem(2, 4, 2, k_len=150, head_dim=64, dtype=torch.bfloat16, layout=layout)
    out = run(problem, backend)["out"]
    q, k, v = (t.double() for t in (problem.q, problem.k, problem.v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.double(), expected, rtol=8e-3, atol=8e-3)


def test_more_heads_than_a_grid_dimension(backend: str) -> None:
    layout = ck.ThreeRegionLayout(1, int32([[1, 2]]), 1, 1)
    problem = make_problem(1, 65600, k_len=1, head_dim=32, dtype=torch.bfloat16, layout=layout)
    if backend == "host_model":  # some seconds: forward only
        out = ck.three_region_attention(problem.q, problem.k, problem.v, layout, backend=backend)
        expected = problem.to(torch.float64).run("reference")["out"]
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    else:
        check(problem, backend)


@pytest.mark.parametrize("splits", [1, 7])
def test_any_values_in_the_layout_are_safe(backend: str, splits: int) -> None:
    """Unsorted, repeated and wild entries, as a GPU's layout may hold unchecked: they are dropped,
    and nothing outside the tensors is touched."""
    k_len, text_len = 100, int32([2**31 - 1, -7, 4])
    pivot_idx = int32(
        [[5, 3, 9, -1, 200, 7], [9, 9, 4, 2**31 - 1, 30, 12], [3, 50, -(2**31), 50, 51, 99]]
    )
    counted = int32([[100] * 6, [9, 30, 100, 100, 100, 100], [50, 51, 99, 100, 100, 100]])
    clean = ck.ThreeRegionLayout(int32([100, 0, 4]), counted, 16, 1)
    problem = make_problem(3, 2, k_len=k_len, head_dim=32, dtype=torch.bfloat16, layout=clean)
    wild = ck.ThreeRegionLayout(int32([0, 0, 0]), None, 16, 1)
    object.__setattr__(wild, "text_len", text_len)
    object.__setattr__(wild, "pivot_idx", pivot_idx)
    object.__setattr__(wild, "validate", lambda k_len: None)
    with modelled_device(splits):
        expected = check(problem, backend)
        results = run(dataclasses.replace(problem, layout=wild), backend)
    assert all(torch.equal(results[name], expected[name]) for name in RESULTS)


def test_pivots_in_any_order(backend: str) -> None:
    """Of an unsorted row longer than a warp, entries above all that stand before them count."""
    unsorted = torch.randperm(90, generator=torch.Generator().manual_seed(0)).int()
    pivot_idx = torch.cat([unsorted, torch.arange(100, 120, dtype=torch.int32)]).view(1, -1)
    counted = pivot_idx[pivot_idx == pivot_idx.cummax(1).values].view(1, -1)
    clean = ck.ThreeRegionLayout(0, counted, 16, 1)
    problem = make_problem(1, 2, k_len=200, head_dim=32, dtype=torch.bfloat16, layout=clean)
    wild = ck.ThreeRegionLayout(0, None, 16, 1)
    object.__setattr__(wild, "pivot_idx", pivot_idx)
    object.__setattr__(wild, "validate", lambda k_len: None)
    expected = check(problem, backend)
    results = run(dataclasses.replace(problem, layout=wild), backend)
    assert all(torch.equal(results[name], expected[name]) for name in RESULTS)


@pytest.mark.parametrize("num_pivots", [0, 1, 33, 257, 1024, 2500])
def test_what_is_packed(backend: str, num_pivots: int) -> None:
    """Of rows that rise, but not always: in range, and above all before that count."""
    generator = torch.Generator().manual_seed(num_pivots)
    batch, heads, k_len = 3, 2, 3 * num_pivots + 9
    near = torch.randint(-40, 40, (batch, heads, num_pivots), generator=generator)
    pivots = (3 * torch.arange(num_pivots) + near).int()
    wild = torch.rand(pivots.shape, generator=generator)
    for bound, value in ((0.09, -(2**31)), (0.06, 2**31 - 1), (0.03, k_len)):
        pivots[wild < bound] = value
    text_len = int32([-5, 60, 2**31 - 1])
    expected = torch.full((batch, heads, 2 + num_pivots), k_len, dtype=torch.int32)
    for b, g in itertools.product(range(batch), range(heads)):
        prefix, counted = min(max(int(text_len[b]), 0), k_len), []
        for pivot in pivots[b, g].tolist():
            if max([prefix - 1, *counted[-1:]]) < pivot < k_len:
                counted.append(pivot)
        expected[b, g, : 2 + len(counted)] = int32([prefix, len(counted), *counted])
    suffix = "_host_model" if backend == "host_model" else ""
    pack = getattr(torch.ops.cogview_kernels, f"three_region_attention{suffix}_far_keys")
    device = device_of(backend)
    rows_inside = pivots.movedim(0, 2).contiguous().movedim(2, 0).to(device)
    text_len = text_len.to(device)
    for pivot_idx in (pivots.to(device), rows_inside):
        assert torch.equal(pack(text_len, pivot_idx, k_len).cpu(), expected)
    assert torch.equal(pack(text_len, rows_inside[:, 1], k_len).cpu(), expected[:, 1])


@pytest.mark.parametrize("far_keys", [[2**31 - 1, 2**31 - 1, 2**31 - 1, -5, 7], [-9, 3, 9, 2, 7]])
def test_any_packed_layout_is_safe(backend: str, far_keys: list[int]) -> None:
    """Even what the packing kernel would never write stays inside the tensors."""
    problem = make_problem(1, 2, k_len=150, head_dim=32, dtype=torch.bfloat16)
    suffix = "_host_model" if backend == "host_model" else ""
    op = getattr(torch.ops.cogview_kernels, f"three_region_attention{suffix}")
    device = "cpu" if backend == "host_model" else "cuda"
    q, k, v = (t.to(device) for t in (problem.q, problem.k, problem.v))
    out, _, _ = op(q, k, v, int32([far_keys]).to(device), 16, 1, 0.0, 0.0, 0.1)
    assert out.isfinite().all()


# Properties


@pytest.mark.parametrize("dtype", HALVES)
def test_values_of_one_give_one(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem(2, 4, 2, k_len=300, head_dim=64, dtype=dtype)
    problem = dataclasses.replace(problem, v=torch.ones_like(problem.v))
    out = run(problem, backend)["out"]
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("later", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("position", [1, 37, 130, 149])
@pytest.mark.parametrize("dtype", HALVES)
def test_later_tokens_change_nothing(
    backend: str, dtype: torch.dtype, position: int, later: float
) -> None:
    problem = make_problem(2, 4, 2, k_len=150, head_dim=32, dtype=dtype)
    problem.dout[:, :, position:] = 0
    problem.dlse[:, :, position:] = 0
    before = run(problem, backend)
    for tensor in (problem.q, problem.k, problem.v):
        tensor[:, :, position:] = later
    after = run(problem, backend)
    for name in ("out", "lse", "dq"):
        a, b = before[name][:, :, :position], after[name][:, :, :position]
        # float16's ds is scaled by the largest v, so that its smallest bits may change.
        if math.isfinite(later) and not (name == "dq" and dtype == torch.float16):
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hidden_keys_do_not_leak(backend: str, what: str, value: float) -> None:
    """One poisoned key: exactly the rows that may see it know of it."""
    layout = ck.ThreeRegionLayout(5, int32([[40, 90]]), 16, 2)
    problem = make_problem(1, 2, k_len=150, head_dim=32, dtype=torch.bfloat16, layout=layout)
    clean = run(problem, backend)
    for position in (3, 40, 41, 70, 149):
        poisoned = dataclasses.replace(problem, k=problem.k.clone(), v=problem.v.clone())
        getattr(poisoned, what)[:, :, position] = value
        results = run(poisoned, backend)
        sees = layout.dense_mask(1, 150, 150)[0, :, position]
        expected = poisoned.run("portable")  # in which nothing leaks; tested by itself
        for name in ("out", "lse", "dq"):
            torch.testing.assert_close(
                results[name][:, :, ~sees], clean[name][:, :, ~sees], rtol=2e-2, atol=2e-2
            )
        for name in RESULTS:
            same = results[name].isnan() == expected[name].isnan()
            assert same.all(), (name, position)


def test_unseen_queries_do_not_leak(backend: str) -> None:
    """One poisoned gradient: exactly the keys that its query sees know of it."""
    layout = ck.ThreeRegionLayout(5, int32([[40, 90]]), 16, 2, 0.7, -1.1)
    problem = make_problem(1, 2, k_len=150, head_dim=32, dtype=torch.bfloat16, layout=layout)
    for query in (0, 39, 70, 149):
        poisoned = dataclasses.replace(problem, dout=problem.dout.clone())
        poisoned.dout[:, :, query] = math.nan
        for splits in (1, 40):
            with modelled_device(splits):
                results = run(poisoned, backend)
            expected = poisoned.run("portable")  # in which nothing leaks; tested by itself
            for name in ("dq", "dk", "dv"):
                torch.testing.assert_close(
                    results[name], expected[name], rtol=5e-2, atol=5e-2, equal_nan=True
                )


@pytest.mark.parametrize("dtype", HALVES)
def test_reruns_are_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    layout = ck.ThreeRegionLayout(7, ck.sample_pivots(7, 400, 90), 32, 2, 1.0, 0.5)
    problem = make_problem(2, 4, 2, 400, 400, 64, dtype, layout)
    for splits in (1, 40):
        with modelled_device(splits):
            first = run(problem, backend)
            second = run(problem, backend)
        assert all(torch.equal(first[name], second[name]) for name in RESULTS)


# Numbers at the edge


@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 6e4])
@pytest.mark.parametrize("dtype", HALVES)
def test_large_logits(backend: str, dtype: torch.dtype, size: float) -> None:
    """Logits far beyond float16: one key wins each row, and the weights still sum to one."""
    problem = make_problem(1, 2, k_len=150, head_dim=64, dtype=dtype)
    problem = dataclasses.replace(
        problem,
        q=(problem.q.double() * size / 4).clamp(-65504, 65504).to(dtype),
        k=(problem.k.double() * size / 4).clamp(-65504, 65504).to(dtype),
        dlse=torch.zeros_like(problem.dlse),
    )
    results = run(problem, backend)
    truth = problem.to(torch.float64).run("reference")
    assert all(value.isfinite().all() for value in results.values())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results["out"].double(), truth["out"], rtol=2 * eps, atol=4 * eps)
    torch.testing.assert_close(results["lse"].double(), truth["lse"], rtol=4e-6, atol=4e-6)
    # sum over keys of dv = sum over rows of dout, as each row's weights sum to one
    torch.testing.assert_close(
        results["dv"].double().sum(2), problem.dout.double().sum(2), rtol=0, atol=150 * eps
    )


@pytest.mark.parametrize("size", [1e18, 1e30, 3e38])
def test_products_beyond_float32(backend: str, size: float) -> None:
    """bfloat16 reaches as far as float32: products overflow, and still nothing becomes NaN."""
    problem = make_problem(1, 2, k_len=150, head_dim=32, dtype=torch.bfloat16)
    q, k = ((t.sign() * size).to(torch.bfloat16) for t in (problem.q, problem.k))
    out, lse = ck.three_region_attention(
        q.to(device_of(backend)),
        k.to(device_of(backend)),
        problem.v.to(device_of(backend)),
        ck.ThreeRegionLayout(5, None, 4, 2),
        backend=backend,
        return_lse=True,
    )
    assert out.isfinite().all() and lse.isfinite().all()


def test_values_as_large_as_float32(backend: str) -> None:
    """Sums of bfloat16 values overflow; their mean does not."""
    problem = make_problem(1, 2, k_len=150, head_dim=32, dtype=torch.bfloat16)
    v = problem.v.sign() * 3.3e38
    qkv = [t.to(device_of(backend)) for t in (problem.q, problem.k, v)]
    out = ck.three_region_attention(*qkv, ck.ThreeRegionLayout(5, None, 4, 2), backend=backend)
    expected = ck.three_region_attention(
        problem.q.double(), problem.k.double(), v.double(), ck.ThreeRegionLayout(5, None, 4, 2)
    )
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-2, atol=2e36)


def device_of(backend: str) -> str:
    return "cpu" if backend == "host_model" else "cuda"


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("size", [0.0, 2.0**-120, 1.0])
def test_any_scale_and_sign(backend: str, head_dim: int, size: float) -> None:
    problem = make_problem(1, 2, k_len=140, head_dim=head_dim, dtype=torch.float16)
    for scale in (size, -size):
        check(dataclasses.replace(problem, softmax_scale=scale), backend)


def largest_scale(problem: Problem) -> int:
    """The largest exponent by which dout and dlse can be scaled with gradients and themselves
    finite in float16."""
    truth = problem.to(torch.float64).run("reference")
    tensors = [truth["dq"], truth["dk"], truth["dv"], problem.dout.double()]
    return int(math.floor(math.log2(65504 / max(t.abs().max().item() for t in tensors))))


@pytest.mark.parametrize("splits", [1, 40])
def test_a_head_without_gradient_costs_the_others_nothing(backend: str, splits: int) -> None:
    """Heads of a group share the exponent of dk; one that has no gradient must not choose it."""
    base = make_problem(1, 2, 1, k_len=160, head_dim=64, dtype=torch.float16)
    dout = base.dout * 2.0**-16
    dout[:, 1] = 0
    problem = dataclasses.replace(base, dout=dout, dlse=torch.zeros_like(base.dlse))
    truth = problem.to(torch.float64).run("reference")
    with modelled_device(splits):
        results = run(problem, backend)
    error = (results["dk"].double() - truth["dk"]).abs().max().item()
    assert error <= 3e-3 * truth["dk"].abs().max().item() + 2.0**-25


def test_the_mean_of_the_largest_values_is_finite(backend: str) -> None:
    """Weights are rounded before the values are added: 65504 must not become infinite."""
    for key_scale in (0.5, 1.0, 2.0, 4.0):
        problem = make_problem(1, 2, k_len=150, head_dim=32, dtype=torch.float16)
        v = torch.full_like(problem.v, 65504.0)
        problem = dataclasses.replace(problem, k=problem.k * key_scale, v=v)
        assert (run(problem, backend)["out"] == 65504).all()


@pytest.mark.parametrize("value_scale", [1.0, 2.0**10, 2.0**-10])
@pytest.mark.parametrize("key_scale", [1.0, 2.0**7])
def test_gradients_at_any_loss_scale(backend: str, value_scale: float, key_scale: float) -> None:
    """PB-relax: float16 gradients are finite and keep their accuracy from an upstream gradient of
    2^-20 up to the largest whose true gradients fit."""
    base = make_problem(1, 2, 1, k_len=160, head_dim=64, dtype=torch.float16)
    base = dataclasses.replace(
        base,
        q=base.q / key_scale,
        k=base.k * key_scale,
        v=base.v * value_scale,
        dlse=torch.zeros_like(base.dlse),
    )
    largest_exponent = largest_scale(base)
    for exponent in (*range(-20, largest_exponent, 5), largest_exponent):
        problem = base.map(lambda tensor: tensor)
        # rounded as the upstream gradient would be
        problem.dout = (base.dout.double() * 2.0**exponent).to(torch.float16)
        results = run(problem, backend)
        truth = problem.to(torch.float64).run("reference")
        for name in ("dq", "dk", "dv"):
            largest = truth[name].abs().max().item()
            if largest < 2.0**-14:
                continue  # not representable: checked below to be zero or denormal, not NaN
            error = (results[name].double() - truth[name]).abs().max().item()
            # the rounding of p or ds, of the result, and a denormal result's last bit
            assert error <= 3e-3 * largest + 2.0**-24, (name, exponent, error / largest)
        assert all(value.isfinite().all() for value in results.values()), exponent


def test_gradients_of_small_weights_and_values(backend: str) -> None:
    """float16 holds neither weights of 2^-20 nor their ds, with values of 2^-17, unless scaled. The
    first key, whose weight is one, is zero and so hides nothing in dq."""
    base = make_problem(1, 2, 1, k_len=160, head_dim=64, dtype=torch.float16)
    q, k = base.q * 2.0**-10, base.k.clone()
    q[..., 0] = 2.0**-3
    k[..., 0] = -(2.0**6)
    k[:, :, 0] = 0
    problem = dataclasses.replace(
        base,
        q=q,
        k=k * 2.0**4,
        v=base.v * 2.0**-17,
        dout=base.dout * 2.0**12,
        dlse=torch.zeros_like(base.dlse),
        layout=ck.ThreeRegionLayout(0, None, 160, 1),
        softmax_scale=20 * math.log(2) / 2**7,
    )
    results = run(problem, backend)
    truth = problem.to(torch.float64).run("reference")
    for name, rows in (("dq", slice(1, None)), ("dv", slice(1, None))):
        right = truth[name][:, :, rows]
        error = (results[name].double()[:, :, rows] - right).abs().max().item()
        assert error <= 3e-3 * right.abs().max().item(), name


# Memory


def test_strides_do_not_matter(backend: str) -> None:
    problem = make_problem(2, 4, 2, k_len=100, head_dim=32, dtype=torch.bfloat16)
    expected = run(problem, backend)
    changes = {
        "contiguous": lambda t: t.contiguous(),
        "batch inside": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        "odd rows": lambda t: F.pad(t, (0, 3))[..., : t.shape[-1]] if t.ndim == 4 else t,
        "odd address": lambda t: F.pad(t, (1, 0))[..., 1:] if t.ndim == 4 else t,
    }
    for name, change in changes.items():
        results = run(problem.map(change), backend)  # type: ignore[arg-type]
        assert all(torch.equal(results[key], expected[key]) for key in RESULTS), name
    # One head expanded to many: stride 0.
    single = dataclasses.replace(
        problem, k=problem.k[:, :1].expand(-1, 2, -1, -1), v=problem.v[:, :1].expand(-1, 2, -1, -1)
    )
    expected = run(single.map(lambda t: t.contiguous()), backend)
    results = run(single, backend)
    assert all(torch.equal(results[key], expected[key]) for key in ("out", "lse", "dq"))


@pytest.mark.slow  # touches 2 GB
def test_rows_more_than_four_gigabytes_apart(backend: str) -> None:
    """Products of rows and strides need 64 bits; rows in between are never touched."""
    problem = make_problem(1, 1, k_len=2, head_dim=32, dtype=torch.bfloat16)
    expected = run(problem, backend)
    row = 2**31 + 8  # elements of two bytes

    def far_apart(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            return tensor
        spread = torch.empty(row + 32, dtype=tensor.dtype).as_strided((1, 1, 2, 32), (1, 1, row, 1))
        return spread.copy_(tensor)

    results = run(problem.map(far_apart), backend)
    assert all(torch.equal(results[name], expected[name]) for name in RESULTS)
