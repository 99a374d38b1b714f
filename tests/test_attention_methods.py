"""The suite's attention methods compute the function that they declare, on every layout."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import layouts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cogview_kernels as ck
from benchmarks.suite.attention import ATTENTION_METHODS, flex_gathered
from benchmarks.suite.cases import AttentionCase
from benchmarks.suite.methods import Choices, Method, compiled

CPU = torch.device("cpu")
compile_ = torch.compile
NAMED = {method.name: method for method in ATTENTION_METHODS}
SMALL = AttentionCase(
    200, 24, 2, 30, batch=2, num_heads=4, num_kv_heads=2, head_dim=16, text_len=9, dtype="float32"
)


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    """FlexAttention as torch defines it, dense, from the same masks."""
    with torch.compiler.set_stance("force_eager"):
        yield


def assert_computes(method: Method, case: AttentionCase, layout: ck.ThreeRegionLayout) -> None:
    """``out``, by the definition of the method's function."""
    torch.manual_seed(0)
    q = torch.randn(case.batch, case.num_heads, case.queries, case.head_dim).double()
    k, v = torch.randn(2, case.batch, case.kv_heads, case.seqlen, case.head_dim).double()
    out = method.prepare(case, layout, CPU)(q, k, v)
    if method.role == "dense":
        layout = ck.ThreeRegionLayout(0, None, case.seqlen, 1)
    expected = ck.three_region_attention(q, k, v, layout, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


@given(st.data())
@settings(max_examples=30)
def test_gathered_keys_give_three_regions(data: st.DataObject) -> None:
    """Any layout: ragged text and pivots, padding of every kind, windows that cover everything."""
    batch, seqlen = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 100))
    layout = dataclasses.replace(data.draw(layouts(batch, seqlen)), text_bias=0.0, pivot_bias=0.0)
    if layout.pivot_idx is not None and layout.pivot_idx.ndim == 3:  # of the one head
        layout = dataclasses.replace(layout, pivot_idx=layout.pivot_idx[:, 0])
    heads = data.draw(st.integers(1, 2))
    case = AttentionCase(
        seqlen,
        layout.query_window,
        layout.key_window_times,
        num_pivots=0,
        batch=batch,
        num_heads=heads * data.draw(st.integers(1, 2)),
        num_kv_heads=heads,
        head_dim=4,
        q_len=data.draw(st.sampled_from([0, 0, 1])),
        dtype="float64",
    )
    assert_computes(flex_gathered("small blocks", (16, 32)), case, layout)
    if not case.q_len:
        assert_computes(NAMED["CogView's formulation"], case, layout)


def test_the_rival_s_issued_products_on_cogview_s_codes() -> None:
    """Random pivots move the third digit."""
    case = AttentionCase(1088, 64, 4, 192, batch=16)
    for block, expected in (("128x128", 1.72), ("128x64", 1.47), ("64x64", 1.18)):
        method = NAMED[f"FlexAttention, gathered pivots, {block}"]
        issued = method.facts(case, case.layout(CPU))["issued_products"]
        assert issued == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 64)])
def test_hopper_has_a_backward_for_every_block(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], head_dim: int
) -> None:
    """Inductor leaves out configurations that do not divide a block mask's blocks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    assert any(
        block[0] % config.block_m1 == block[0] % config.block_m2 == 0
        and block[1] % config.block_n1 == block[1] % config.block_n2 == 0
        for config in Choices().get_flex_attention_bwd_configs(head_dim, torch.bfloat16, "cuda")
    )


def test_the_rival_s_tiles_are_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward's; torch's own where it searches them, and for a single query."""
    seen: list[Any] = []

    def flex(q: Tensor, *_: Any, kernel_options: Any, **__: Any) -> Tensor:
        seen.append(kernel_options)
        return q

    monkeypatch.setattr("benchmarks.suite.attention.flex_attention", flex)
    k = torch.zeros(2, 2, 200, 16)
    for case in (SMALL, dataclasses.replace(SMALL, q_len=1)):
        for method in ATTENTION_METHODS:
            if method.role == "rival":
                method.prepare(case, case.layout(CPU), CPU)(k, k, k)
    sizes = [(128, 128), (128, 64), (64, 64), (128, 64)]
    tiles = [{"fwd_BLOCK_M": m, "fwd_BLOCK_N": n} for m, n in sizes]
    tma, fa4 = {"USE_TMA": True}, {"BACKEND": "FLASH"}
    assert seen == [*tiles[:3], tiles[3] | tma, fa4, {}, {}, {}, {}, tma, fa4, {}]


@pytest.mark.parametrize("q_len", [0, 1])
def test_dense_attention_asks_for_the_kernel_that_it_names(
    monkeypatch: pytest.MonkeyPatch, q_len: int
) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Any:  # as documented
        assert causal and q.shape[1] == (q_len or SMALL.seqlen) and k.shape[2] == 2
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=not q_len, enable_gqa=True)
        return (out.transpose(1, 2), q.sum(-1)) if lse else out.transpose(1, 2)

    stub: Any = SimpleNamespace(flash_attn_func=flash_attn_func)
    for module in ("flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, stub)
    case = dataclasses.replace(SMALL, q_len=q_len)
    for lse in (False, True):  # noqa: B007 (flash_attn_func's)
        for name in ("SDPA", "SDPA flash", "FlashAttention-3", "FlashAttention-4"):
            assert_computes(NAMED[name], case, case.layout(CPU))
    with pytest.raises(RuntimeError, match="No viable backend"):  # none on a CPU
        assert_computes(NAMED["SDPA cuDNN"], case, case.layout(CPU))


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
