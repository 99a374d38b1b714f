"""The attention methods of the benchmark suite compute the function they declare, on every layout;
FlexAttention's block masks list exactly the blocks that the mask needs."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import layouts, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.nn.attention import flex_attention as torch_flex

import cogview_kernels as ck
from benchmarks.suite import attention as attention_methods
from benchmarks.suite import cases
from benchmarks.suite.attention import ATTENTION_METHODS
from benchmarks.suite.cases import AttentionCase, cases_of
from benchmarks.suite.methods import Method

ROOT = Path(__file__).resolve().parents[1]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
METHODS = {method.name: method for method in ATTENTION_METHODS}
FLEX = (
    "FlexAttention, gathered pivots",
    "FlexAttention, plain mask",
    "window + pivots, merged by lse",
)
THREE_REGION = ("cogview_kernels", "SDPA, dense mask", "CogView's formulation", *FLEX)
BLOCK = 16  # small, so that short sequences have many blocks


class BlockwiseFlex:
    """``flex_attention`` as its kernels compute it, differentiable in any dtype: skips blocks that
    are not listed and does not mask full blocks. Keeps the block masks."""

    def __init__(self) -> None:
        self.block_masks: list[Any] = []

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        score_mod: Any = None,
        block_mask: Any = None,
        enable_gqa: bool = False,
        return_aux: Any = None,
        kernel_options: Any = None,
    ) -> Any:
        self.block_masks.append(block_mask)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert block_mask.seq_lengths == (q.shape[2], k.shape[2])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        place = [
            torch.arange(size).view(*[-1 if i == dim else 1 for i in range(4)])
            for dim, size in enumerate((*q.shape[:3], k.shape[2]))
        ]
        partial, full = (
            by_position(blocks, block_mask) for blocks in listed_blocks(block_mask, q.shape[0])
        )
        visible = partial & block_mask.mask_mod(*place) | full
        logits = q @ k.mT * q.shape[3] ** -0.5
        logits = logits if score_mod is None else score_mod(logits, *place)
        logits = logits.masked_fill(~visible, -math.inf)
        # As in the kernels, a row without keys has out 0 and no gradient.
        lse = logits.logsumexp(-1).masked_fill(~visible.any(-1), -math.inf)
        p = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
        return p @ v if return_aux is None else (p @ v, torch_flex.AuxOutput(lse=lse))


def listed_blocks(block_mask: Any, batch: int) -> list[Tensor]:
    """Partial and full blocks, bool ``(B, 1, Nq, Nk)``, from the lists that the kernels read."""
    found = []
    for number, index in (
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        listed = torch.arange(index.shape[3]) < number[..., None]
        blocks = torch.zeros(index.shape, dtype=torch.bool)
        found.append(blocks.scatter(3, index.long(), listed).expand(batch, -1, -1, -1))
    return found


def by_position(blocks: Tensor, block_mask: Any) -> Tensor:
    rows, columns = block_mask.seq_lengths
    blocks = blocks.repeat_interleave(block_mask.BLOCK_SIZE[0], 2)
    return blocks.repeat_interleave(block_mask.BLOCK_SIZE[1], 3)[:, :, :rows, :columns]


@pytest.fixture
def flex() -> Iterator[BlockwiseFlex]:
    """FlexAttention in float64, block by block, not compiled."""
    blockwise = BlockwiseFlex()
    attention_methods._block_mask_builder.cache_clear()
    with (
        mock.patch.object(attention_methods, "compiled", lambda function, mode=None: function),
        mock.patch.object(attention_methods, "flex_attention", blockwise),
        mock.patch.object(attention_methods, "BLOCK", BLOCK),
        mock.patch.dict(cases.DTYPES, float64=torch.float64),
    ):
        yield blockwise
    attention_methods._block_mask_builder.cache_clear()


@dataclasses.dataclass(frozen=True)
class Call:
    case: AttentionCase
    layout: ck.ThreeRegionLayout
    seed: int = 0

    def run(self, method: Method, layout: ck.ThreeRegionLayout | None = None) -> dict[str, Tensor]:
        """``out, dq, dk, dv`` of the method, or of the definition of ``layout``."""
        case = self.case
        problem = make_problem(
            case.batch,
            case.num_heads,
            case.kv_heads,
            case.queries,
            case.seqlen,
            case.head_dim,
            case.torch_dtype,
            layout or self.layout,
            seed=self.seed,
        )
        if layout is not None:
            problem = problem.to(torch.float64)
            problem = dataclasses.replace(problem, dlse=torch.zeros_like(problem.dlse))
            results = problem.run("reference")
            return {name: results[name] for name in ("out", "dq", "dk", "dv")}
        q, k, v = leaves = problem.leaves()
        out = method.prepare(case, self.layout, CPU)(q, k, v)
        assert out.shape == q.shape and out.dtype == q.dtype
        gradients = torch.autograd.grad(out, leaves, problem.dout)
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))

    def check(self, name: str, tolerance: float = 1e-11) -> None:
        method = METHODS[name]
        case = self.case
        expected = self.run(
            method,
            {
                "three-region": self.layout,
                "dense causal": ck.ThreeRegionLayout(0, None, case.seqlen, 1),
                "local window": dataclasses.replace(self.layout, text_len=0, pivot_idx=None),
            }[method.computes],
        )
        for name, value in self.run(method).items():
            torch.testing.assert_close(
                value,
                expected[name],
                rtol=tolerance,
                atol=tolerance,
                check_dtype=False,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any layout: ragged text and pivots, padding of every kind, windows that cover everything."""
    batch, seqlen = draw(st.integers(1, 3)), draw(st.integers(1, 100))
    layout = draw(layouts(batch, seqlen))
    if draw(st.booleans()):  # more pivots than one block of the list holds
        count = draw(st.integers(BLOCK, 3 * BLOCK))
        text_len = torch.as_tensor(layout.text_len).expand(batch)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        pivot_idx = ck.sample_pivots(text_len, seqlen, count, generator)
        layout = dataclasses.replace(layout, pivot_idx=pivot_idx)
    num_kv_heads = draw(st.integers(1, 2))
    case = AttentionCase(
        seqlen,
        layout.query_window,
        layout.key_window_times,
        num_pivots=0,
        batch=batch,
        num_heads=num_kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=num_kv_heads,
        head_dim=4,
        q_len=draw(st.one_of(st.just(0), st.just(1), st.integers(1, seqlen))),
        dtype="float64",
    )
    return Call(case, layout, draw(st.integers(0, 99)))


@pytest.mark.parametrize("name", THREE_REGION)
def test_computes_three_regions(flex: BlockwiseFlex, name: str) -> None:
    @given(calls())
    @settings(max_examples=40)
    def check(call: Call) -> None:
        call.check(name)

    check()


@pytest.mark.parametrize("name", THREE_REGION)
@pytest.mark.parametrize(
    "case",
    [
        # Windows and sequences that are and are not multiples of a block; one token; a chunk.
        AttentionCase(512, 128, 2, 90, batch=2, num_heads=2, dtype="float64"),
        AttentionCase(300, 64, 3, 40, num_heads=4, num_kv_heads=2, head_dim=128, dtype="float64"),
        AttentionCase(700, 100, 2, 200, num_heads=1, dtype="float64"),
        AttentionCase(700, 128, 2, 200, batch=2, num_heads=2, q_len=1, dtype="float64"),
        AttentionCase(700, 64, 2, 200, num_heads=2, num_kv_heads=1, q_len=190, dtype="float64"),
    ],
    ids=lambda case: case.name,
)
def test_computes_three_regions_at_the_suite_s_sizes(
    flex: BlockwiseFlex, name: str, case: AttentionCase
) -> None:
    with mock.patch.object(attention_methods, "BLOCK", 128):
        Call(case, case.layout(CPU)).check(name)


SMALL = AttentionCase(
    200, 24, 2, 30, batch=2, num_heads=4, num_kv_heads=2, head_dim=16, text_len=9, dtype="float32"
)


@pytest.mark.parametrize(
    "name, q_len, bias", [(FLEX[0], 1, 0.0), *((name, 0, 0.7) for name in FLEX)]
)
def test_torchs_own_flex_attention_agrees(name: str, q_len: int, bias: float) -> None:
    """Traced in one graph, forward and backward, as for a GPU, but not compiled to kernels."""
    attention_methods._block_mask_builder.cache_clear()
    case = dataclasses.replace(SMALL, q_len=q_len)
    layout = dataclasses.replace(case.layout(CPU), text_bias=bias, pivot_bias=2 * bias)
    on_cpu = functools.partial(_compile_without_kernels, torch.compile)
    with (
        mock.patch.object(torch_flex, "_validate_device", lambda *qkv: None),  # no backward on CPUs
        mock.patch.object(torch, "compile", on_cpu),
    ):
        Call(case, layout).check(name, 1e-5)
    attention_methods._block_mask_builder.cache_clear()


def _compile_without_kernels(compile: Any, function: Any, **options: Any) -> Any:
    return compile(function, **{**options, "backend": "aot_eager", "mode": None})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if "Flex" in name])
def test_compiled_on_a_cpu(name: str) -> None:
    case = dataclasses.replace(SMALL, seqlen=700, q_len=200, num_pivots=200)
    call = Call(case, case.layout(CPU))
    method = METHODS[name]
    if method.why_not(case, CPU) is not None:
        pytest.skip("not on a CPU")
    q, k, v = make_problem(2, 4, 2, 200, 700, 16, torch.float32, call.layout).leaves()
    with torch.no_grad():
        out = method.prepare(case, call.layout, CPU)(q.detach(), k.detach(), v.detach())
    expected = ck.three_region_attention(q, k, v, call.layout, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# Block masks


def tiles(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of a dense mask that some query sees in part, and that every query sees in full."""
    *_, rows, columns = visible.shape
    padding = (0, -columns % BLOCK, 0, -rows % BLOCK)

    def tiled(mask: Tensor) -> Tensor:
        mask = mask.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        return mask.movedim(-3, -2)  # (..., Nq, Nk, BLOCK, BLOCK)

    seen = tiled(F.pad(visible, padding)).any(-1).any(-1)
    filled = F.pad(F.pad(visible, (0, -columns % BLOCK)), (0, 0, 0, -rows % BLOCK), value=True)
    return seen, tiled(filled).all(-1).all(-1)


@given(calls())
@settings(max_examples=80)
def check_blocks(flex: BlockwiseFlex, merged: bool, call: Call) -> None:
    case, layout = call.case, call.layout
    far = attention_methods.far_keys(layout, case, BLOCK)
    window, text, pivot = layout.regions(case.batch, case.queries, case.seqlen)
    # The list, position by position: no query sees entries after a sample's last one.
    number = (far.place >= 0).sum(1)[:, None, None]
    entry = torch.arange(far.index.shape[1])
    index = far.index[:, None].expand(-1, case.queries, -1)
    in_list = (text | pivot).gather(2, index) & (entry < number)
    assert torch.equal(in_list.sum(2), (text | pivot).sum(2))
    first_key = int(window.any(0).any(0).int().argmax())
    in_window = window[:, :, first_key:]

    flex.block_masks.clear()
    call.run(METHODS[FLEX[2] if merged else FLEX[0]])
    visible = [in_window, in_list] if merged else [torch.cat([in_list, in_window], 2)]
    for block_mask, dense in zip(flex.block_masks, visible, strict=True):
        seen, full = tiles(dense)
        listed = listed_blocks(block_mask, case.batch)
        assert torch.equal(listed[0][:, 0], seen & ~full)
        assert torch.equal(listed[1][:, 0], full)
        # The same by keys, for the backward.
        for kind, number, index in (
            (0, block_mask.q_num_blocks, block_mask.q_indices),
            (1, block_mask.full_q_num_blocks, block_mask.full_q_indices),
        ):
            queries = torch.zeros(index.shape, dtype=torch.bool)
            which = torch.arange(index.shape[3]) < number[..., None]
            queries = queries.scatter(3, index.long(), which).expand(case.batch, -1, -1, -1)
            assert torch.equal(queries.mT, listed[kind])


@pytest.mark.parametrize("merged", [False, True])
def test_blocks_are_exactly_those_the_mask_needs(flex: BlockwiseFlex, merged: bool) -> None:
    check_blocks(flex, merged)


def test_blocks_by_hand(flex: BlockwiseFlex) -> None:
    # Blocks of 16 queries, windows of 32 keys, 16 text keys, 24 pivots 17, 19, ..., 63.
    pivots = torch.arange(17, 65, 2, dtype=torch.int32)[None]
    layout = ck.ThreeRegionLayout(torch.tensor([16], dtype=torch.int32), pivots, 16, 2)
    case = AttentionCase(96, 16, 2, 24, num_heads=1, head_dim=4, text_len=16, dtype="float64")
    Call(case, layout).check(FLEX[0])
    (block_mask,) = flex.block_masks
    # The list has 48 entries: text, 17..47 and 49..63 with padding; then six blocks of keys.
    assert block_mask.seq_lengths == (96, 48 + 96)
    partial, full = (blocks[0, 0].tolist() for blocks in listed_blocks(block_mask, 1))
    x, o = True, False
    assert full == [
        [o, o, o, o, o, o, o, o, o],
        [o, o, o, x, o, o, o, o, o],
        [x, o, o, o, x, o, o, o, o],
        [x, o, o, o, o, x, o, o, o],
        [x, x, o, o, o, o, x, o, o],
        [x, x, o, o, o, o, o, x, o],
    ]
    assert partial == [
        [o, o, o, x, o, o, o, o, o],
        [o, o, o, o, x, o, o, o, o],
        [o, o, o, o, o, x, o, o, o],
        [o, x, o, o, o, o, x, o, o],
        [o, o, o, o, o, o, o, x, o],
        [o, o, x, o, o, o, o, o, x],
    ]


def test_more_cases_than_torch_recompiles() -> None:
    compile = functools.partial(torch.compile, backend="eager")

    def doubled(times: int) -> Any:
        def attention(x: Tensor) -> Tensor:
            return x * times

        return attention_methods.compiled(attention)

    def compile_eagerly(function: Any, **options: Any) -> Any:
        return compile(function, fullgraph=options["fullgraph"], dynamic=options["dynamic"])

    with mock.patch.object(torch, "compile", compile_eagerly):
        functions = [doubled(times) for times in range(torch._dynamo.config.recompile_limit + 4)]
        for times, function in enumerate(functions):
            assert function(torch.ones(1)).item() == times


# Dense causal attention, other packages


@pytest.mark.parametrize("backend", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("q_len", [0, 1, 30])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_sdpa_aligns_the_last_query_with_the_last_key(
    flex: BlockwiseFlex, backend: SDPBackend | None, q_len: int, num_kv_heads: int
) -> None:
    case = dataclasses.replace(SMALL, dtype="float64", q_len=q_len, num_kv_heads=num_kv_heads)
    method = Method("SDPA", "dense causal", attention_methods._sdpa(backend))
    with mock.patch.dict(METHODS, SDPA=method):
        Call(case, case.layout(CPU)).check("SDPA")


@pytest.mark.parametrize("name", ["SDPA flash", "SDPA cuDNN", "SDPA efficient", "SDPA math"])
@pytest.mark.parametrize("q_len", [0, 1])
def test_sdpa_takes_cuda_tensors(name: str, q_len: int) -> None:
    """Fake tensors check the shapes of a call, not which kernel would run."""
    case = dataclasses.replace(SMALL, dtype="bfloat16", q_len=q_len)
    attention = METHODS[name].prepare(case, case.layout(CPU), CUDA)
    with FakeTensorMode():
        q = torch.empty(2, 4, case.queries, 16, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.empty(2, 2, 200, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        sdpa = F.scaled_dot_product_attention
        with mock.patch.object(F, "scaled_dot_product_attention", wraps=sdpa) as called:
            out = attention(q, k, v)
    assert (out.shape, out.device.type, out.dtype) == (q.shape, "cuda", torch.bfloat16)
    grouped = name != "SDPA efficient"  # which refuses grouped heads on a GPU
    _, key, value, _ = called.call_args.args
    assert key.shape[1] == value.shape[1] == (2 if grouped else 4)
    assert called.call_args.kwargs["enable_gqa"] == grouped


def lower_right(q: Tensor, k: Tensor, v: Tensor, window_start: Any = None) -> Tensor:
    """Takes ``(B, S, H, D)``, as the replaced package documents."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    i = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    j = torch.arange(k.shape[2])
    mask = j <= i
    if window_start is not None:
        mask &= window_start(i, k.shape[2]) <= j
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa).transpose(1, 2)


def out_alone(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Any:
    assert causal
    return lower_right(q, k, v)


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any) -> Tensor:
    assert attn_bias == ("bottom right" if q.shape[1] < k.shape[1] else "lower triangle")
    return lower_right(q, k, v)


def na1d(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, stride: int, is_causal: bool) -> Tensor:
    def window_start(i: Tensor, seqlen: int) -> Tensor:
        leader = (i // stride * stride + stride - 1).clamp(max=seqlen - 1)
        return (leader - kernel_size + 1).clamp(min=0)

    assert is_causal and q.shape[1] == k.shape[1] >= kernel_size >= stride
    return lower_right(q, k, v, window_start)


def with_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Any:
    return out_alone(q, k, v, causal=causal), q.sum(-1)


@pytest.mark.parametrize(
    "name, module, contents",
    [
        ("FlashAttention-2", "flash_attn.flash_attn_interface", {"flash_attn_func": out_alone}),
        ("FlashAttention-3", "flash_attn_interface", {"flash_attn_func": out_alone}),
        ("FlashAttention-4", "flash_attn.cute", {"flash_attn_func": with_lse}),
        ("xformers", "xformers.ops", {"memory_efficient_attention": memory_efficient_attention}),
        ("NATTEN", "natten", {"na1d": na1d}),
    ],
)
@pytest.mark.parametrize("q_len", [0, 1])
def test_other_packages_are_called_as_documented(
    flex: BlockwiseFlex, name: str, module: str, contents: dict[str, Any], q_len: int
) -> None:
    case = dataclasses.replace(SMALL, seqlen=192, dtype="float64", q_len=q_len, num_kv_heads=4)
    if name == "NATTEN" and q_len:
        assert METHODS[name].why_not(case, CUDA) is not None
        return
    stub = types.ModuleType(module)
    vars(stub).update(contents)
    bias = types.ModuleType("xformers.ops.fmha.attn_bias")
    bias.LowerTriangularMask = lambda: "lower triangle"  # type: ignore[attr-defined]
    bias.LowerTriangularFromBottomRightMask = lambda: "bottom right"  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {module: stub, bias.__name__: bias}):
        Call(case, case.layout(CPU)).check(name)


# Methods that cannot run


@pytest.mark.parametrize("method", ATTENTION_METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_method_that_cannot_run_gives_a_reason(method: Method, device: torch.device) -> None:
    for planned in cases_of(device.type):
        if isinstance(planned.case, AttentionCase):
            reason = method.why_not(planned.case, device)
            assert reason is None or (len(reason.split()) >= 4 and not reason.endswith("."))


def test_what_is_refused_on_a_gpu() -> None:
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    for case, names in (
        (SMALL, ("SDPA flash", "SDPA cuDNN")),
        (half, ("SDPA",)),
        (dataclasses.replace(half, batch=4, seqlen=32768), ("SDPA, dense mask",)),
    ):
        for name in names:
            assert METHODS[name].why_not(case, CUDA) is not None
    for name in ("SDPA flash", "SDPA cuDNN", "SDPA math", FLEX[0], "CogView's formulation"):
        assert METHODS[name].why_not(half, CUDA) is None


def test_what_runs_on_a_cpu() -> None:
    def running(case: AttentionCase) -> list[str]:
        return [method.name for method in ATTENTION_METHODS if method.why_not(case, CPU) is None]

    everywhere = ["cogview_kernels", "SDPA", "SDPA, dense mask", "CogView's formulation"]
    assert running(SMALL) == everywhere
    assert running(dataclasses.replace(SMALL, q_len=1)) == [*everywhere, *FLEX[:2]]
    long = dataclasses.replace(SMALL, seqlen=32768)
    assert "SDPA, dense mask" not in running(long)


def test_the_portable_path_is_never_timed_as_the_kernels() -> None:
    """On a GPU, inputs that the kernels do not support raise."""
    ours = METHODS["cogview_kernels"]
    reason = ours.why_not(SMALL, CUDA)
    assert reason is not None and "float32" in reason
    half = dataclasses.replace(SMALL, dtype="bfloat16", head_dim=64)
    extension = attention_methods.extension
    with mock.patch.object(extension, "why_no_attention_kernel", lambda *args: None):
        assert ours.why_not(half, CUDA) is None
    with mock.patch.object(extension, "why_no_attention_kernel", lambda *args: f"no: {args}"):
        head_dim_16 = ours.why_not(dataclasses.replace(half, head_dim=16), CUDA)
        assert head_dim_16 == f"no: {(torch.bfloat16, 16, CUDA, 'cuda')}"
    with mock.patch.object(extension, "why_not_on", lambda device: "no kernels"):
        assert ours.why_not(half, CUDA) == "no kernels"
    q, k = torch.zeros(2, 4, 200, 64).bfloat16(), torch.zeros(2, 2, 200, 64).bfloat16()
    attention = ours.prepare(half, half.layout(CPU), CUDA)
    with pytest.raises(ck.KernelUnavailable):
        attention(q, k, k)
