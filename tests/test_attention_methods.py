"""The suite's attention methods compute the function that they declare, on every layout."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import layouts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.choices import InductorChoices
from torch._inductor.template_heuristics.triton import FlexBwDConfig

import cogview_kernels as ck
from benchmarks.suite.attention import ATTENTION_METHODS, ON_FA4, far_keys, flex_gathered
from benchmarks.suite.cases import DTYPES, AttentionCase
from benchmarks.suite.entries import METHODS, entries
from benchmarks.suite.methods import Choices, Method, compiled
from cogview_kernels import extension

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
compile_ = torch.compile
NAMED = {method.name: method for method in ATTENTION_METHODS}
SMALL = AttentionCase(
    200, 24, 2, 30, batch=2, num_heads=4, num_kv_heads=2, head_dim=16, text_len=9, dtype="float32"
)


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    """FlexAttention as torch defines it, dense, from the same masks; float64 is a dtype."""
    with torch.compiler.set_stance("force_eager"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(DTYPES, "float64", torch.float64)
        yield


def assert_computes(
    method: Method, case: AttentionCase, layout: ck.ThreeRegionLayout, declared: Any = None
) -> None:
    """``out``, by the definition of ``declared`` or of the layout."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(case.batch, heads, length, case.head_dim, generator=generator).double()
        for heads, length in (
            (case.num_heads, case.queries),
            (case.kv_heads, case.seqlen),
            (case.kv_heads, case.seqlen),
        )
    )
    out = method.prepare(case, layout, CPU)(q, k, v)
    expected = ck.three_region_attention(q, k, v, declared or layout, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


@st.composite
def calls(draw: st.DrawFn, q_lens: Any) -> tuple[AttentionCase, ck.ThreeRegionLayout]:
    """Any layout: ragged text and pivots, padding of every kind, windows that cover everything."""
    batch, seqlen = draw(st.integers(1, 3)), draw(st.integers(1, 100))
    layout = draw(layouts(batch, seqlen))
    heads = draw(st.integers(1, 2))
    case = AttentionCase(
        seqlen,
        layout.query_window,
        layout.key_window_times,
        num_pivots=0,
        batch=batch,
        num_heads=heads * draw(st.integers(1, 2)),
        num_kv_heads=heads,
        head_dim=4,
        q_len=draw(q_lens),
        dtype="float64",
    )
    return case, layout


@given(calls(q_lens=st.sampled_from([0, 0, 1])))
@settings(max_examples=40)
def test_the_rival_computes_three_regions(
    call: tuple[AttentionCase, ck.ThreeRegionLayout],
) -> None:
    assert_computes(flex_gathered("small blocks", (16, 32)), *call)


@given(calls(q_lens=st.just(0)))
@settings(max_examples=40)
def test_cogview_s_formulation_computes_three_regions(
    call: tuple[AttentionCase, ck.ThreeRegionLayout],
) -> None:
    case, layout = call
    layout = dataclasses.replace(layout, text_bias=0.0, pivot_bias=0.0)
    assert_computes(NAMED["CogView's formulation"], case, layout)


def test_the_gradient_of_gathered_keys() -> None:
    case = AttentionCase(40, 8, 2, 12, batch=2, num_heads=1, text_len=5)
    x = torch.randn(2, 2, 40, 3, dtype=torch.float64, requires_grad=True)
    far = far_keys(case.layout(CPU), case, multiple=16)
    assert far.index.shape[1] == 16 < 5 + 12
    for sample in range(2):  # what follows a sample's last key is never seen, and has no gradient
        number = int((far.place[sample] >= 0).sum())
        assert torch.autograd.gradcheck(
            lambda x, number=number, sample=sample: far.gather(x)[sample, :, :number], x
        )


def test_the_rival_s_issued_products_on_cogview_s_codes() -> None:
    """Random pivots move the third digit."""
    case = next(e.case for e in entries("cuda") if e.case.op == "attention")
    assert (case.seqlen, case.query_window) == (1088, 64)  # type: ignore[union-attr]
    for block, expected in (("128x128", 1.72), ("128x64", 1.47), ("64x64", 1.18)):
        method = NAMED[f"FlexAttention, gathered pivots, {block}"]
        facts = method.facts(case, case.layout(CPU))  # type: ignore[union-attr]
        assert facts["issued_products"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 64)])
def test_hopper_has_a_backward_for_every_block(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], head_dim: int
) -> None:
    """Inductor leaves out configurations that do not divide a block mask's blocks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    def fitting(choices: InductorChoices) -> list[FlexBwDConfig]:
        return [
            config
            for config in choices.get_flex_attention_bwd_configs(head_dim, torch.bfloat16, "cuda")
            if not block[0] % config.block_m1 + block[0] % config.block_m2
            and not block[1] % config.block_n1 + block[1] % config.block_n2
        ]

    assert fitting(Choices())
    assert fitting(InductorChoices()) or block[1] == 64, "torch's own would do"


def test_the_rival_s_tiles_are_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward's; torch's own where it searches them, and for a single query."""
    seen: list[Any] = []

    def flex(q: Tensor, *_: Any, kernel_options: Any) -> Tensor:
        seen.append(kernel_options)
        return q

    monkeypatch.setattr("benchmarks.suite.attention.flex_attention", flex)
    q, k = torch.zeros(2, 4, 200, 16), torch.zeros(2, 2, 200, 16)
    rivals = [method for method in ATTENTION_METHODS if method.role == "rival"]
    for method in rivals:
        method.prepare(SMALL, SMALL.layout(CPU), CPU)(q, k, k)
    one = dataclasses.replace(SMALL, q_len=1)
    rivals[1].prepare(one, one.layout(CPU), CPU)(q[:, :, :1], k, k)
    tiles = [(o.get("fwd_BLOCK_M"), o.get("fwd_BLOCK_N")) for o in seen]
    none = None, None
    assert tiles == [(128, 128), (128, 64), (64, 64), (128, 64), none, none, none]
    assert [o.get("USE_TMA", False) for o in seen] == [False] * 3 + [True] + [False] * 3
    assert seen[4] == {"BACKEND": "FLASH"}


@pytest.mark.slow
def test_compiled_on_a_cpu() -> None:
    case = dataclasses.replace(SMALL, seqlen=700, q_len=1, num_pivots=200)
    (method,) = (m for m in METHODS["decode"] if m.role == "rival" and not m.graph)
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 700, 16)
    with torch.compiler.set_stance("default"):
        out = method.prepare(case, case.layout(CPU), CPU)(q, k, k)
    expected = ck.three_region_attention(q, k, k, case.layout(CPU), backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_sdpa_asks_for_the_kernel_that_it_names() -> None:
    for q_len in (0, 1):
        case = dataclasses.replace(SMALL, q_len=q_len)
        dense = ck.ThreeRegionLayout(0, None, case.seqlen, 1)
        for name in ("SDPA", "SDPA flash"):
            assert_computes(NAMED[name], case, case.layout(CPU), dense)
        with pytest.raises(RuntimeError, match="No viable backend"):  # none on a CPU
            assert_computes(NAMED["SDPA cuDNN"], case, case.layout(CPU), dense)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("q_len", [0, 1])
@pytest.mark.parametrize(
    "name, module",
    [("FlashAttention-3", "flash_attn_interface"), ("FlashAttention-4", "flash_attn.cute")],
)
def test_flash_attention_is_called_as_documented(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, q_len: int, lse: bool
) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Any:
        assert causal and q.shape[1] == (q_len or SMALL.seqlen) and k.shape[2] == 2
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=not q_len, enable_gqa=True)
        return (out.transpose(1, 2), q.sum(-1)) if lse else out.transpose(1, 2)

    stub = types.ModuleType(module)
    vars(stub).update(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, module, stub)
    case = dataclasses.replace(SMALL, q_len=q_len)
    dense = ck.ThreeRegionLayout(0, None, case.seqlen, 1)
    assert_computes(NAMED[name], case, case.layout(CPU), dense)


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    half = dataclasses.replace(SMALL, dtype="bfloat16", head_dim=64)
    monkeypatch.setattr(extension, "why_no_attention_kernel", lambda *args: None)
    for case, device, expected in (
        (SMALL, CPU, {"cogview_kernels", "SDPA", "CogView's formulation"}),
        (dataclasses.replace(half, head_dim=16), CUDA, set(NAMED) - {"SDPA"}),
        (SMALL, CUDA, {name for name, m in NAMED.items() if m.role in ("rival", "")} - {ON_FA4}),
    ):
        for name, method in NAMED.items():
            reason = method.why_not(case, device)
            if reason is not None and "not installed" in reason:
                assert name.startswith("FlashAttention-") or name == ON_FA4
                continue
            assert (reason is None) == (name in expected), (name, reason)
            assert reason is None or (len(reason.split()) >= 4 and not reason.endswith("."))
    monkeypatch.setattr(extension, "why_no_attention_kernel", lambda *args: f"no: {args}")
    reason = NAMED["cogview_kernels"].why_not(half, CUDA)
    assert reason == f"no: {(torch.bfloat16, 64, CUDA, 'cuda')}"


def test_more_cases_than_torch_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda f, options, **rest: compile_(f, backend=compiler, **rest)
    )
    number = torch._dynamo.config.recompile_limit + 4
    scaled = [compiled(functools.partial(torch.mul, other=times)) for times in range(number)]
    with torch.compiler.set_stance("default"):
        assert [function(torch.ones(1)) for function in scaled] == list(range(number))
    assert len(graphs) == number
