"""The attention kernels at sizes that only a GPU can run; tests/test_attention_kernels.py has the
small sizes, on the GPU too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import RESULTS, Problem, assert_as_accurate_as_torch
from torch import Tensor

import cogview_kernels as ck
from cogview_kernels import extension

pytestmark = pytest.mark.usefixtures("cuda")

# batch, heads, sequence length, query_window, key_window_times, pivots: CogView's 32x32 setting,
# its talk, its paper's proportions, and a long sequence; 64 tokens of text.
CASES = [
    (16, 40, 1088, 64, 4, 192),
    (4, 40, 4224, 128, 2, 256),
    (4, 40, 4224, 128, 6, 704),
    (1, 40, 16448, 128, 2, 512),
]


def problem_on_gpu(
    batch: int,
    num_heads: int,
    seqlen: int,
    layout: ck.ThreeRegionLayout,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    num_kv_heads: int | None = None,
) -> Problem:
    """Normal random inputs, made on the GPU as views of one projection (B, S, ., D)."""
    num_kv_heads = num_kv_heads or num_heads
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    heads = normal(batch, seqlen, num_heads + 2 * num_kv_heads, head_dim).transpose(1, 2)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    dout, dlse = normal(batch, num_heads, seqlen, head_dim), normal(batch, num_heads, seqlen)
    return Problem(q, k, v, layout, head_dim**-0.5, dout, dlse)


def layout_on_gpu(
    batch: int, seqlen: int, query_window: int, key_window_times: int, num_pivots: int
) -> ck.ThreeRegionLayout:
    generator = torch.Generator().manual_seed(1)
    pivots = ck.sample_pivots(torch.full((batch,), 64), seqlen, num_pivots, generator)
    text_len = torch.full((batch,), 64, dtype=torch.int32, device="cuda")
    return ck.ThreeRegionLayout(
        text_len, pivots.cuda(), query_window, key_window_times, text_bias=0.5, pivot_bias=1.5
    )


def pieces(problem: Problem) -> Iterator[tuple[Problem, tuple[slice, slice]]]:
    """The problem in pieces of one sample and some heads, so small that several dense matrices fit
    into memory. Expects as many key heads as query heads."""
    batch, num_heads, seqlen, _ = problem.q.shape
    step = max(1, 2**28 // seqlen**2)
    for b in range(batch):
        sample = samples_of(problem, slice(b, b + 1))
        for h in range(0, num_heads, step):
            heads = slice(h, h + step)
            piece = sample.map(lambda tensor, heads=heads: tensor[:, heads])  # type: ignore[misc]
            yield piece, (slice(b, b + 1), heads)


def samples_of(problem: Problem, samples: slice) -> Problem:
    layout = problem.layout
    assert isinstance(layout.text_len, Tensor) and layout.pivot_idx is not None
    of_samples = dataclasses.replace(
        layout, text_len=layout.text_len[samples], pivot_idx=layout.pivot_idx[samples]
    )
    return dataclasses.replace(problem.map(lambda tensor: tensor[samples]), layout=of_samples)


def check(problem: Problem, results: dict[str, Tensor]) -> None:
    with torch.device("cuda"):
        for piece, where in pieces(problem):
            assert_as_accurate_as_torch(piece, {name: t[where] for name, t in results.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_fixed_cases(case: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every head, forward and backward; a second run gives the same bits."""
    batch, num_heads, seqlen, *rest = case
    problem = problem_on_gpu(
        batch, num_heads, seqlen, layout_on_gpu(batch, seqlen, *rest), dtype=dtype
    )
    results = problem.run("cuda")
    again = problem.run("cuda")
    assert all(torch.equal(results[name], again[name]) for name in RESULTS)
    check(problem, results)


@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_head_dims(head_dim: int) -> None:
    problem = problem_on_gpu(2, 8, 2112, layout_on_gpu(2, 2112, 128, 2, 256), head_dim)
    check(problem, problem.run("cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_close_to_the_host_model(
    head_dim: int, dtype: torch.dtype, record: Callable[[str, object], None]
) -> None:
    """The same source on the same inputs. The order of a tensor core's sums and the last bits of
    exp2 differ, which may change how a weight is rounded."""
    if extension.why_not_host_model() is not None:
        pytest.skip(str(extension.why_not_host_model()))
    layout = layout_on_gpu(2, 300, 48, 2, 40)
    problem = problem_on_gpu(2, 4, 300, layout, head_dim, dtype, num_kv_heads=2)
    results = problem.run("cuda")
    assert isinstance(layout.text_len, Tensor) and layout.pivot_idx is not None
    on_cpu = dataclasses.replace(
        problem.map(lambda tensor: tensor.cpu()),
        layout=dataclasses.replace(
            layout, text_len=layout.text_len.cpu(), pivot_idx=layout.pivot_idx.cpu()
        ),
    )
    with extension.modelled_device(extension.num_sms(torch.device("cuda"))):
        model = on_cpu.run("host_model")
    steps = {}
    for name in RESULTS:
        apart = (results[name].cpu().double() - model[name].double()).abs().max().item()
        largest = model[name].abs().max().item()
        # lse is float32, whose steps are those of the sums before the logarithm.
        eps = 2.0**-18 if name == "lse" else torch.finfo(dtype).eps
        steps[name] = apart / (largest * eps)
        record(f"{name}_steps_of_largest", round(steps[name], 3))
    assert all(value <= 4 for value in steps.values()), steps


def at_far_offsets(tensor: Tensor) -> Tensor:
    """The same values, with heads so far apart that offsets exceed 2^31 elements."""
    batch, num_heads, seqlen, head_dim = tensor.shape
    stride = 2**32 // num_heads // 64 * 64
    memory = tensor.new_empty(stride * (num_heads - 1) + batch * seqlen * head_dim)
    far = memory.as_strided(tensor.shape, (seqlen * head_dim, stride, head_dim, 1))
    return far.copy_(tensor)


def test_inputs_with_offsets_beyond_int32() -> None:
    problem = problem_on_gpu(2, 5, 300, layout_on_gpu(2, 300, 64, 2, 40))
    expected = problem.run("cuda")
    far = dataclasses.replace(
        problem, **{name: at_far_offsets(getattr(problem, name)) for name in ("q", "k", "v")}
    )
    assert far.q[1, 4].storage_offset() > 2**31
    results = far.run("cuda")
    assert all(torch.equal(results[name], expected[name]) for name in RESULTS)


def test_more_than_2_to_the_31_elements() -> None:
    """Many samples, so that each tensor has more elements than int32 counts. Checks samples at both
    ends and in the middle."""
    batch, num_heads, seqlen, head_dim = 16400, 8, 256, 64
    problem = problem_on_gpu(
        batch, num_heads, seqlen, layout_on_gpu(batch, seqlen, 64, 2, 20), head_dim
    )
    assert problem.q.numel() > 2**31
    results = problem.run("cuda")
    for samples in (slice(0, 4), slice(batch // 2, batch // 2 + 4), slice(batch - 4, batch)):
        some = {name: tensor[samples] for name, tensor in results.items()}
        check(samples_of(problem, samples), some)


def test_more_samples_than_a_grid_dimension() -> None:
    problem = problem_on_gpu(70_000, 1, 80, layout_on_gpu(70_000, 80, 16, 1, 8), 32)
    results = problem.run("cuda")
    last = slice(69_990, 70_000)
    check(samples_of(problem, last), {name: tensor[last] for name, tensor in results.items()})
    assert all(tensor.isfinite().all() for tensor in results.values())


def test_generation() -> None:
    """One token, and chunks of tokens, at the end of a long cache."""
    for q_len in (1, 7, 200):
        base = problem_on_gpu(2, 8, 8192, layout_on_gpu(2, 8192, 128, 2, 512))
        problem = dataclasses.replace(
            base,
            q=base.q[:, :, -q_len:],
            dout=base.dout[:, :, -q_len:],
            dlse=base.dlse[:, :, -q_len:],
        )
        check(problem, problem.run("cuda"))
