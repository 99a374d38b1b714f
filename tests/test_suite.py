"""The benchmark suite's plan, what it counts, and what it refuses to time."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cogview_kernels as ck
from benchmarks.suite import entries as suite
from benchmarks.suite import steps
from benchmarks.suite.cases import AttentionCase, NormCase, StepCase
from benchmarks.suite.methods import Method

CPU = torch.device("cpu")
SMALL = AttentionCase(
    200, 16, 2, 20, batch=2, num_heads=4, num_kv_heads=2, head_dim=16, text_len=9, dtype="float32"
)
STEP = StepCase(
    2, dataclasses.replace(SMALL, seqlen=66, query_window=8, num_kv_heads=0, num_pivots=8), 100
)

WINDOW_S, BUILD_S, START_S, CEILINGS_S = 540, 100, 10, 15  # of a GPU's window


# What is counted


def test_visible_pairs_match_the_dense_mask() -> None:
    draw = random.Random(0)
    for _ in range(60):
        seqlen = draw.randint(5, 90)
        case = AttentionCase(
            seqlen,
            query_window=draw.randint(1, 20),
            key_window_times=draw.randint(1, 4),
            num_pivots=draw.randint(0, seqlen // 2 - 2),
            batch=2,
            text_len=draw.randint(0, seqlen // 2),
            q_len=draw.choice([0, 1]),
        )
        mask = case.layout("cpu").dense_mask(2, case.queries, seqlen)
        causal = torch.ones(case.queries, seqlen).tril(seqlen - case.queries).sum()
        assert case.pairs == mask.sum(), case
        assert case.attended_fraction == pytest.approx(float(mask.sum() / (2 * causal)))


def test_work_and_bytes_of_the_fixed_cases_by_hand() -> None:
    # 4 x 40 heads, 4224 rows of 64 values, 2 bytes each: 54 MB per tensor
    case = AttentionCase(4224, 128, 2, 256, batch=4)
    tensor = 4 * 40 * 4224 * 64 * 2
    assert case.bytes("forward") == 4 * tensor + 4 * 40 * 4224 * 4
    assert case.bytes("backward") == 8 * tensor + 4 * 40 * 4224 * 4
    assert case.flops("backward") == 2.5 * case.flops("forward")
    assert case.flops("forward") == pytest.approx(63e9, rel=0.01)
    grouped = dataclasses.replace(case, num_kv_heads=8)
    assert grouped.bytes("forward") == 2 * tensor + 2 * tensor // 5 + 4 * 40 * 4224 * 4
    # 256 keys of the window's two blocks, 64 of text, and the pivots before the window
    token = AttentionCase(4224, 128, 2, 256, num_heads=1, q_len=1)
    keys = 256 + 64 + int((token.layout("cpu").pivot_idx < 4224 - 256).sum())
    assert token.pairs == keys
    assert token.bytes("forward") == 2 * (2 + 2 * keys) * 64 + 4
    norm = NormCase("sandwich_residual", 10, 8)
    assert (norm.bytes("forward"), norm.bytes("backward")) == (4 * 11 * 16, 6 * 11 * 16)
    layer = AttentionCase(128, 16, 2, 10, batch=3, num_heads=4, head_dim=16, text_len=28)
    step = StepCase(2, layer, 500)
    parameters = 2 * 12 * 64 * 64 + 500 * 64
    attention = 2 * step.attention.flops("forward+backward")
    assert step.flops("step") == 6 * parameters * 3 * 128 + attention


# The plan


def test_the_gpu_s_plan_fits_a_window() -> None:
    plan = suite.entries("cuda")
    compilations = {(e.case, e.method.prepare) for e in plan if e.method.compiles}
    assert 300 <= len(plan) <= 470 and len(compilations) <= 55
    assert BUILD_S + START_S + CEILINGS_S + sum(e.seconds for e in plan) <= WINDOW_S


def test_a_compilation_is_paid_for_once() -> None:
    case = NormCase("layer_norm", 8192, 2560)
    name = "F.layer_norm, compiled"  # its graph replay shares what is compiled
    of_case = [e for e in suite.entries("cuda") if e.case == case and name in e.method.name]
    first, *others = (e.seconds for e in of_case)
    assert len(others) == 3 and first > 3 > 1 > max(others) > 0


def test_the_order_of_the_gpu_s_plan() -> None:
    """Ours; the rival and the best dense on A to D; norms; the rest, with every sweep."""
    plan = suite.entries("cuda")
    stages = [e.stage for e in plan]
    assert stages == sorted(stages, key=suite.STAGES.index) and set(stages) == set(suite.STAGES)
    by_stage = {name: [e for e in plan if e.stage == name] for name in suite.STAGES}
    assert {e.method.role for e in by_stage["ours"]} == {"ours"}
    assert {e.case.op for e in by_stage["ours"]} == set(suite.METHODS)
    second = by_stage["rival and dense"]
    assert {e.method.role for e in second} == {"rival", "dense"}
    assert not any("autotuned" in e.id for e in second) and any("autotuned" in e.id for e in plan)
    cases = list(dict.fromkeys(e.case for e in second))
    assert [(c.seqlen, c.op) for c in cases] == [  # type: ignore[union-attr]
        (1088, "attention"),
        (4224, "attention"),
        (4224, "attention"),
        (16448, "attention"),
        (4224, "decode"),
    ]
    for case in cases[:4]:
        names = [e.method.name for e in second if e.case == case and e.work == "forward"]
        assert names[:4] == ["SDPA flash", "SDPA cuDNN", "FlashAttention-3", "FlashAttention-4"]
        assert [name[-7:] for name in names[4:8]] == ["128x128", " 128x64", ", 64x64", "64, TMA"]
    assert {e.case.op for e in by_stage["norms"]} == {"layer_norm", "sandwich_residual"}
    swept = [e for e in plan if e.stage == "rest" and "fixed" not in e.sweeps]
    sweeps = {sweep for e in swept for sweep in e.sweeps}
    assert sweeps == {"seqlen", "window", "pivots", "head_dim", "dtype", "llm", "hidden"}
    assert {e.method.name for e in swept if e.case.op == "attention"} == {
        "cogview_kernels",
        "SDPA flash",
        "SDPA cuDNN",
        "FlexAttention, gathered pivots, 128x64",
    }


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_entries_are_unique_and_keep_a_case_together(device_type: str) -> None:
    plan = suite.entries(device_type)
    assert len({e.id for e in plan}) == len(plan)
    assert {e.case.op for e in plan} == set(suite.METHODS)
    groups = [(e.stage if device_type == "cuda" else "", e.case) for e in plan]
    runs = [group for at, group in enumerate(groups) if at == 0 or groups[at - 1] != group]
    assert len(set(runs)) == len(runs)
    replayed = {e.case.op for e in plan if e.method.graph}
    expected = {"decode", "layer_norm", "sandwich_residual"} if device_type == "cuda" else set()
    assert replayed == expected
    if device_type == "cpu":
        assert len(plan) < 150
        reasons = [e.method.why_not(e.case, CPU) for e in plan if not e.method.compiles]
        assert not any(reasons)


# What is ready, and what is refused


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        dataclasses.replace(SMALL, seqlen=700),  # three stretches of it are checked
        dataclasses.replace(SMALL, q_len=1),
        NormCase("layer_norm", 30, 48, "float32"),
        NormCase("sandwich_residual", 30, 48, "float32"),
        STEP,
    ],
    ids=lambda case: case.name,
)
def test_every_method_that_runs_here_is_ready_beside_the_others(case: Any) -> None:
    ready = {}
    for method in suite.METHODS[case.op]:
        if method.why_not(case, CPU) or method.compiles:
            continue
        for work in case.works:
            entry = suite.Entry(case, work, method, ("fixed",))
            ready[method.name, work] = suite.ready(entry, CPU)
    assert {("cogview_kernels", work) for work in case.works} < ready.keys()
    for _ in range(2):  # interleaved
        for (name, work), one in ready.items():
            results = one.call()
            results = results if isinstance(results, tuple) else (results,)
            assert all(result.isfinite().all() for result in results), (name, work)
            assert len(results) == {"sandwich_residual": 2}.get(case.op, 1) or "backward" in work
            assert one.info["errors"].keys() == one.info["errors_allowed"].keys() != set()
            assert one.info["work"] == work and one.info["first_call_seconds"] > 0
    suite.forget()


def test_on_a_gpu_ours_is_never_a_substitute() -> None:
    """The kernels or an error: here their tensors lie on a CPU."""
    cuda, half = torch.device("cuda"), dataclasses.replace(SMALL, dtype="bfloat16", head_dim=64)
    q, k = torch.zeros(2, 4, 200, 64).bfloat16(), torch.zeros(2, 2, 200, 64).bfloat16()
    rows, weight = torch.zeros(4, 48), torch.zeros(48)
    step = steps.ours(STEP, cuda)
    ours = {op: methods[0].prepare for op, methods in suite.METHODS.items()}
    layout = half.layout(CPU)
    for call in (
        lambda: ours["attention"](half, layout, cuda)(q, k, k),
        lambda: ours["layer_norm"](None, None, cuda)(rows, weight, weight),
        lambda: ours["sandwich_residual"](None, None, cuda)(rows, rows, *[weight] * 4),
        lambda: step.three_region_attention(q, k, k, layout),
        lambda: step.layer_norm(rows, weight, weight, 1e-5, "row"),
        lambda: step.sandwich_residual(rows, rows, *[weight] * 4),
    ):
        with pytest.raises(ck.KernelUnavailable):
            call()


def spoiled(number: int) -> Callable[..., Any]:
    """Correct attention except for one result, which is 0.1 % off: 0 is out, then dq, dk, dv."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, mine: bool) -> Tensor:
            ctx.mine = mine
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dx: Tensor) -> Any:
            return (dx * 1.001 if ctx.mine else dx), None

    def prepare(case: Any, layout: Any, device: torch.device) -> Callable[..., Tensor]:
        def call(*qkv: Tensor) -> Tensor:
            q, k, v = (Spoil.apply(x, number == at) for at, x in enumerate(qkv, start=1))
            out = ck.three_region_attention(q, k, v, layout)
            return out * 1.001 if number == 0 else out

        return call

    return prepare


def refusal(case: Any, method: Method) -> suite.NotMeasured:
    with pytest.raises(suite.NotMeasured) as caught:
        suite.ready(suite.Entry(case, case.works[0], method, ("fixed",)), CPU)
    return caught.value


@pytest.mark.parametrize(("number", "name"), list(enumerate(["out", "dq", "dk", "dv"])))
def test_a_slightly_wrong_method_is_not_timed(number: int, name: str) -> None:
    for case in (SMALL, dataclasses.replace(SMALL, seqlen=700)):
        reason = refusal(case, Method("spoiled", "three-region", spoiled(number)))
        assert f"{name}: 0.001" in str(reason) and reason.failed


def test_a_method_must_declare_the_function_it_computes() -> None:
    """Also one that was checked before under another name."""
    (dense,) = (m for m in suite.METHODS["attention"] if m.name == "SDPA")
    suite.ready(suite.Entry(SMALL, "forward", dense, ()), CPU)
    assert "wrong" in str(refusal(SMALL, dataclasses.replace(dense, computes="three-region")))


@pytest.mark.parametrize(
    "change",
    [
        lambda layout: {"pivot_idx": layout.pivot_idx[:, 1:]},
        lambda layout: {"pivot_idx": layout.pivot_idx[:, :-40]},
        lambda layout: {"text_len": layout.text_len - 1},
        lambda layout: {"text_bias": 0.1, "pivot_bias": 0.1},
    ],
    ids=["a pivot less", "late pivots less", "a text token less", "a bias"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wrong_layout_exceeds_half_precision_rounding(dtype: str, change: Any) -> None:
    case = AttentionCase(2176, 128, 2, 256, num_heads=2, dtype=dtype)

    def prepare(case: Any, layout: Any, device: torch.device) -> Callable[..., Tensor]:
        slip = dataclasses.replace(layout, **change(layout))
        return lambda q, k, v: ck.three_region_attention(q, k, v, slip)

    assert "wrong" in str(refusal(case, Method("slip", "three-region", prepare)))


def test_whatever_a_peer_raises_is_the_reason_of_one_row() -> None:
    def breaks(*_: Any) -> Callable[..., Any]:
        raise ValueError("no such\n thing")

    def gives_nan(*_: Any) -> Callable[..., Any]:
        return lambda q, k, v: q * k.sum() * v.sum() * float("nan")

    def has_no_kernel(*_: Any) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # none on a CPU
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return call

    for prepare, text, failed in (
        (breaks, "ValueError: no such thing", True),
        (gives_nan, "out: inf", True),
        (has_no_kernel, "no such kernel", False),
    ):
        reason = refusal(SMALL, Method("bad", "three-region", prepare))
        assert text in str(reason) and reason.failed == failed
    absent = Method("absent", "three-region", breaks, lambda case, device: "it is not here")
    assert str(refusal(SMALL, absent)) == "it is not here"
