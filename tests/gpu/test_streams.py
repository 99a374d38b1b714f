"""What only a GPU's runtime can show: memory, streams, graphs, compilation and synchronisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cogview_kernels as ck
from cogview_kernels import extension
from cogview_kernels.attention import operators as attention
from cogview_kernels.norm import function as norm
from cogview_kernels.norm import portable
from cogview_kernels.norm.operators import _num_summing_blocks as num_summing_blocks

pytestmark = pytest.mark.usefixtures("cuda")

SLEEP_CYCLES = 400_000_000  # a few tenths of a second

Call = Callable[..., tuple[Tensor, ...]]


def layout_on_gpu(seed: int, batch: int = 2, seqlen: int = 600) -> ck.ThreeRegionLayout:
    generator = torch.Generator().manual_seed(seed)
    text_len = torch.randint(5, 40, (batch,), generator=generator)
    pivots = ck.sample_pivots(text_len, seqlen, 70, generator)
    return ck.ThreeRegionLayout(text_len.int().cuda(), pivots.cuda(), 64, 2, 0.5, 1.5)


def attention_inputs(seed: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """q, k, v, dout, and the layout's text lengths and pivots."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(2, 8, 600, 64), (2, 4, 600, 64), (2, 4, 600, 64), (2, 8, 600, 64)]
    normal = [torch.randn(s, generator=generator, device="cuda", dtype=dtype) for s in shapes]
    layout = layout_on_gpu(seed)
    assert isinstance(layout.text_len, Tensor) and layout.pivot_idx is not None
    return [*normal, layout.text_len, layout.pivot_idx]


def attend(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, text_len: Tensor, pivot_idx: Tensor
) -> tuple[Tensor, ...]:
    """Forward and backward."""
    layout = ck.ThreeRegionLayout(text_len, pivot_idx, 64, 2, 0.5, 1.5)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = ck.three_region_attention(*leaves, layout, backend="cuda")  # type: ignore[call-overload]
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def norm_inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(3000, 1024), (1024,), (1024,), (3000, 1024)]
    return [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]


def normalise(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = ck.pb_relax_layer_norm(*leaves, backend="cuda")
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def sandwich_inputs(seed: int) -> list[Tensor]:
    """f, residual, the four parameters, dh, dz."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(3000, 1024)] * 2 + [(1024,)] * 4 + [(3000, 1024)] * 2
    return [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]


def step(*tensors: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    """Forward and backward of the sandwich."""
    leaves = [t.detach().requires_grad_() for t in tensors[:6]]
    h, z = ck.sandwich_residual(*leaves, backend="cuda", **settings)
    gradients = torch.autograd.grad((h, z), leaves, tensors[6:])
    return (h.detach(), z.detach(), *gradients)


ATTENTION, NORM = (attention_inputs, attend), (norm_inputs, normalise)
ONE_RESULT = pytest.mark.parametrize("inputs, call", [ATTENTION, NORM], ids=["attention", "ln"])
OPERATORS = pytest.mark.parametrize(
    "inputs, call",
    [ATTENTION, NORM, (sandwich_inputs, step)],
    ids=["attention", "ln", "sandwich"],
)
Inputs = Callable[[int], list[Tensor]]


def equal(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# Memory. These come first: graphs and compiled functions of other tests keep memory.


def requested() -> int:
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def peak_of(call: Callable[[], object]) -> tuple[object, int]:
    """The call's result, and the most bytes that it had allocated at a time."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested()
    result = call()
    return result, int(torch.cuda.memory_stats()["requested_bytes.all.peak"]) - before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, num_heads, seqlen", [(1, 2, 4096), (8, 32, 1024)])
def test_memory(batch: int, num_heads: int, seqlen: int, dtype: torch.dtype) -> None:
    """As the docstring says: the results, two numbers for each query row, and the backward's
    workspace."""
    num_pivots, head_dim = 100, 64
    pivots = ck.sample_pivots(torch.full((batch,), 9), seqlen, num_pivots).cuda()
    text_len = torch.full((batch,), 9, dtype=torch.int32, device="cuda")
    layout = ck.ThreeRegionLayout(text_len, pivots, 128, 2)
    shape = batch, num_heads, seqlen, head_dim
    leaves = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]
    dout = torch.randn(shape, device="cuda", dtype=dtype)

    def forward() -> Tensor:
        own = dataclasses.replace(layout)  # which packs its keys again
        return ck.three_region_attention(*leaves, own, backend="cuda")  # type: ignore[call-overload]

    torch.autograd.grad(forward(), leaves, dout)  # allocates what is kept for all calls
    elements, rows = batch * num_heads * seqlen * head_dim, batch * num_heads * seqlen
    out, peak = peak_of(forward)
    assert isinstance(out, Tensor)
    assert peak == 2 * elements + 2 * 4 * rows + 4 * batch * (2 + num_pivots)
    _, peak = peak_of(lambda: torch.autograd.grad(out, leaves, dout))
    num_sms = extension.num_sms(out.device)
    far_rows = extension.attention_split_rows(seqlen, num_pivots, out.device)
    splits = attention._num_splits(batch * num_heads, 1, seqlen, seqlen, far_rows, 256, num_sms)
    assert (splits > 1) == (batch == 1)
    workspace = 4 * rows + (4 * batch * 3 * num_heads if dtype == torch.float16 else 0)
    if splits > 1:
        assert far_rows == -(-num_pivots // 64) * 64 + 256
        workspace += 8 * splits * batch * num_heads * far_rows * head_dim
    assert peak == 3 * 2 * elements + workspace


@pytest.fixture
def little_memory() -> Iterator[Callable[[], None]]:
    """Allow 64 MiB more than is in use now."""

    def limit() -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        allowed = torch.cuda.memory_reserved() + 2**26
        torch.cuda.set_per_process_memory_fraction(allowed / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_of_the_sandwich() -> None:
    """The forward keeps the results and sixteen bytes for each row and norm; the backward needs
    partial sums."""
    *tensors, dh, dz = sandwich_inputs(0)
    leaves = [t.half().requires_grad_() for t in tensors]
    rows, hidden = dh.shape

    def forward() -> Any:
        return ck.sandwich_residual(*leaves, backend="cuda")

    upstream = dh.half(), dz.half()
    torch.autograd.grad(forward(), leaves, upstream)  # allocates what is kept for all calls
    results, peak = peak_of(forward)
    assert peak == 2 * 2 * rows * hidden + 2 * 16 * rows
    _, peak = peak_of(lambda: torch.autograd.grad(results, leaves, upstream))
    blocks = num_summing_blocks(rows, upstream[0], 2 * 6, torch.half, torch.half)
    partial = 4 * 4 * blocks * hidden
    assert peak == 2 * 2 * rows * hidden + 4 * 2 * hidden + partial


def test_out_of_memory(little_memory: Callable[[], None]) -> None:
    """The usual error, forward and backward; later calls give the right results."""
    shape = 8, 32, 4096, 64  # 128 MiB
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    layout = ck.ThreeRegionLayout(9, None, 128, 2)

    def forward() -> Tensor:
        return ck.three_region_attention(*leaves, layout, backend="cuda")  # type: ignore[call-overload]

    out = forward()
    little_memory()
    with pytest.raises(torch.OutOfMemoryError):
        forward()
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(out, leaves, dout, retain_graph=True)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(forward(), out)
    assert all(t.isfinite().all() for t in torch.autograd.grad(out, leaves, dout))


# Streams


@OPERATORS
def test_side_stream(inputs: Inputs, call: Call) -> None:
    """Work waits for earlier work on its stream, and for nothing else."""
    old, new = inputs(0), inputs(1)
    before, expected = call(*old), call(*new)
    assert not equal(before, expected)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        call(*old)  # so that the allocator has memory for this stream
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        for tensor, value in zip(old, new, strict=True):
            tensor.copy_(value)  # seen only by work behind the sleep
        results = call(*old)
        done = side.record_event()
    assert not done.query()  # queued, not waited for
    on_default = torch.cuda.current_stream().record_event()
    on_default.synchronize()
    assert not done.query()  # nothing of it ran on the default stream
    torch.cuda.synchronize()
    assert equal(results, expected)


@OPERATORS
def test_two_streams_at_once(inputs: Inputs, call: Call) -> None:
    tasks = [inputs(0), inputs(1)]
    expected = [call(*task) for task in tasks]
    streams = [torch.cuda.Stream() for _ in tasks]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for stream, task, kept in zip(streams, tasks, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(call(*task))
    torch.cuda.synchronize()
    for kept, one in zip(results, expected, strict=True):
        assert all(equal(result, one) for result in kept)


@OPERATORS
def test_device_guard(inputs: Inputs, call: Call) -> None:
    """Tensors that are not on the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = call(*inputs(0))
    results = call(*(tensor.to("cuda:1") for tensor in inputs(0)))
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert equal(tuple(result.to("cuda:0") for result in results), expected)
    assert torch.cuda.current_device() == 0


@OPERATORS
def test_nothing_waits_for_the_device(inputs: Inputs, call: Call) -> None:
    task = inputs(0)
    call(*task)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*task)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dropout_waits_for_nothing() -> None:
    """The seed is drawn on the device and stays there."""
    task = sandwich_inputs(0)
    step(*task, dropout_p=0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*task, dropout_p=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dropout_on_a_side_stream() -> None:
    """The same seed drops the same elements there, while the default stream is busy."""
    task = sandwich_inputs(0)
    torch.manual_seed(1)
    expected = step(*task, dropout_p=0.1)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        step(*task, dropout_p=0.1)  # so that the allocator has memory for this stream
    torch.cuda.synchronize()
    torch.manual_seed(1)
    torch.cuda._sleep(SLEEP_CYCLES)
    busy = torch.cuda.current_stream().record_event()
    with torch.cuda.stream(side):
        results = step(*task, dropout_p=0.1)
    side.synchronize()
    assert not busy.query()  # no part of it was queued behind the sleep
    torch.cuda.synchronize()
    assert equal(results, expected)


# Graphs


@pytest.mark.parametrize("batch, q_len", [(1, 1), (2, 3), (40, 1)])
def test_graph_of_decoding(batch: int, q_len: int) -> None:
    """One graph decodes while the sequences grow in a cache of fixed size: new tokens, lengths and
    rows of the cache are written in place, and what lies behind the keys is NaN."""
    size, pivots = 2000, torch.arange(3, 1400, 7, dtype=torch.int32).view(1, -1).cuda()
    layout = ck.ThreeRegionLayout(5, pivots, 64, 2, 0.5, 1.5)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (batch, 8, q_len, 64), (batch, 2, size, 64), (batch, 2, size, 64)
    q, all_k, all_v = (
        torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes
    )
    k, v = (torch.full_like(tensor, float("nan")) for tensor in (all_k, all_v))
    kv_lens = torch.full((batch,), q_len, dtype=torch.int32, device="cuda")

    def attend() -> tuple[Tensor, Tensor]:
        return ck.three_region_attention(
            q, k, v, layout, backend="cuda", return_lse=True, kv_lens=kv_lens
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attend()
    for length in (q_len - 1, q_len, 60, 128, 129, 700, 1999, size):
        lengths = [max(length - 9 * sample, 0) for sample in range(batch)]
        for sample, own in enumerate(lengths):
            k[sample, :, :own], v[sample, :, :own] = all_k[sample, :, :own], all_v[sample, :, :own]
        q.copy_(torch.randn(q.shape, generator=generator, device="cuda"))
        kv_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        assert equal(results, attend()), length
        truth = ck.three_region_attention(
            q, k, v, layout, backend="reference", return_lse=True, kv_lens=kv_lens
        )
        torch.testing.assert_close(results[0], truth[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(results[1], truth[1], rtol=1e-5, atol=1e-5)


@OPERATORS
def test_graph(inputs: Inputs, call: Call) -> None:
    """Forward and backward, captured once and replayed on other values, pivots and text lengths."""
    static = inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*static)
    for seed in (1, 2, 3):
        values = inputs(seed)
        for tensor, value in zip(static, values, strict=True):
            tensor.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert equal(results, call(*values)), seed


@pytest.mark.parametrize("inputs, call", [NORM, (sandwich_inputs, step)], ids=["ln", "sandwich"])
def test_partial_sums_wait_for_the_backward(inputs: Inputs, call: Call) -> None:
    """The kernel that adds up partial sums may start while the backward is running. Calls at once
    behind each other, whose workspace holds NaN or another call's sums, give the bits of each
    alone; so do replays of a graph of all."""
    tasks = [inputs(seed) for seed in range(4)]
    expected = []
    for task in tasks:
        expected.append(call(*task))
        torch.cuda.synchronize()
        truth = task[-1].double().sum(0)  # the last gradient is that of a bias
        torch.testing.assert_close(expected[-1][-1].double(), truth, rtol=1e-5, atol=1e-3)
    for _ in range(20):
        for megabytes in (1, 2, 4):  # what is freed here becomes the next workspace
            torch.full((2**18 * megabytes,), float("nan"), device="cuda")
        results = [call(*task) for task in tasks]
        assert all(map(equal, results, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(*task) for task in tasks]
    for _ in range(20):
        for _ in range(5):
            graph.replay()
        assert all(map(equal, results, expected))


@pytest.mark.parametrize("own_generator", [False, True])
def test_replays_draw_new_masks(own_generator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward in one graph share a mask, and every replay has a new one: with torch's
    generator, which is registered with every graph, and with one that the test registers."""
    static = sandwich_inputs(0)
    generator = torch.Generator("cuda").manual_seed(5) if own_generator else None
    seeds: list[Tensor] = []
    draw = norm._draw_seed

    def draw_and_keep(*arguments: Any) -> Tensor:
        seeds.append(draw(*arguments))
        return seeds[-1]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*static, dropout_p=0.25, generator=generator)
    torch.cuda.current_stream().wait_stream(side)
    monkeypatch.setattr(norm, "_draw_seed", draw_and_keep)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        results = step(*static, dropout_p=0.25, generator=generator)
    (seed,) = seeds
    masks = []
    for values in (sandwich_inputs(1), sandwich_inputs(1), sandwich_inputs(2)):
        for tensor, value in zip(static, values, strict=True):
            tensor.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        dropped = portable.dropout_mask(seed, 16384, static[0].shape)
        assert ((results[2] == 0) == dropped).double().mean() > 0.9999  # some gradients are zero
        assert not results[2][dropped].any()
        with monkeypatch.context() as patch:
            patch.setattr(norm, "_draw_seed", lambda *arguments: seed.clone())
            assert equal(results, step(*values, dropout_p=0.25))
        masks.append(dropped)
    assert not any(torch.equal(masks[a], masks[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@ONE_RESULT
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile(inputs: Inputs, call: Call, mode: str | None) -> None:
    """One graph, forward and backward, with the same results; with CUDA graphs too."""
    torch._dynamo.reset()

    def forward(*tensors: Tensor) -> Tensor:
        if call is normalise:
            return ck.pb_relax_layer_norm(*tensors, backend="cuda")
        *heads, text_len, pivot_idx = tensors
        layout = ck.ThreeRegionLayout(text_len, pivot_idx, 64, 2, 0.5, 1.5)
        return ck.three_region_attention(*heads, layout, backend="cuda")  # type: ignore[call-overload]

    compiled = torch.compile(forward, fullgraph=True, mode=mode)
    for seed in (0, 1, 2, 3):  # reduce-overhead records in the second call and replays later
        task = inputs(seed)
        dout = task.pop(3)
        leaves = [t.requires_grad_() for t in task[:3]]
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*leaves, *task[3:])
        gradients = torch.autograd.grad(out, leaves, dout)
        results = tuple(t.detach().clone() for t in (out, *gradients))
        assert equal(results, call(*inputs(seed))), seed


# Training


def test_autocast() -> None:
    q, k, v, dout, text_len, pivot_idx = attention_inputs(0, torch.float32)
    layout = ck.ThreeRegionLayout(text_len, pivot_idx, 64, 2, 0.5, 1.5)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.autocast("cuda", torch.bfloat16):
        out = ck.three_region_attention(*leaves, layout, backend="cuda")  # type: ignore[call-overload]
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out, leaves, dout.bfloat16())
    expected = attend(*(t.detach().bfloat16() for t in (q, k, v, dout)), text_len, pivot_idx)
    assert torch.equal(out, expected[0])
    assert equal(gradients, tuple(t.float() for t in expected[1:]))


@ONE_RESULT
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(inputs: Inputs, call: Call, use_reentrant: bool) -> None:
    task = inputs(0)
    expected = call(*task)
    dout = task.pop(3)
    leaves = [t.requires_grad_() for t in task[:3]]

    def forward(*tensors: Tensor) -> Tensor:
        if call is normalise:
            return ck.pb_relax_layer_norm(*tensors, backend="cuda")
        layout = ck.ThreeRegionLayout(task[3], task[4], 64, 2, 0.5, 1.5)
        return ck.three_region_attention(*tensors, layout, backend="cuda")  # type: ignore[call-overload]

    out = checkpoint(forward, *leaves, use_reentrant=use_reentrant)
    out.backward(dout)
    assert equal((out.detach(), *(leaf.grad for leaf in leaves)), expected)  # type: ignore[call-overload]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compile_the_sandwich(mode: str | None, dropout_p: float) -> None:
    """One graph, forward and backward, with dropout that is drawn inside it."""
    torch._dynamo.reset()

    def forward(*tensors: Tensor) -> Any:
        return ck.sandwich_residual(*tensors, backend="cuda", dropout_p=dropout_p)

    compiled = torch.compile(forward, fullgraph=True, mode=mode)
    before = None
    for seed in (0, 1, 2, 3):  # reduce-overhead records in the second call and replays later
        task = sandwich_inputs(seed)
        leaves = [t.requires_grad_() for t in task[:6]]
        torch.compiler.cudagraph_mark_step_begin()
        both = compiled(*leaves)
        gradients = torch.autograd.grad(both, leaves, task[6:])
        results = tuple(t.detach().clone() for t in (*both, *gradients))
        if dropout_p == 0:
            assert equal(results, step(*sandwich_inputs(seed))), seed
            continue
        dropped = results[2] == 0
        assert 0.24 < dropped.double().mean() < 0.26
        assert before is None or not torch.equal(dropped, before)
        before = dropped


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same_again(use_reentrant: bool) -> None:
    task = sandwich_inputs(0)
    torch.manual_seed(3)
    expected = step(*task, dropout_p=0.25)
    torch.manual_seed(3)
    leaves = [t.requires_grad_() for t in task[:6]]

    def forward(*tensors: Tensor) -> Any:
        return ck.sandwich_residual(*tensors, backend="cuda", dropout_p=0.25)

    h, z = checkpoint(forward, *leaves, use_reentrant=use_reentrant)
    torch.autograd.backward((h, z), task[6:])
    assert equal((h.detach(), z.detach(), *(leaf.grad for leaf in leaves)), expected)  # type: ignore[arg-type]
