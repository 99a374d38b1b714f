"""The benchmark suite's plan, what it counts, and what it refuses to time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cogview_kernels as ck
from benchmarks.suite import entries as suite
from benchmarks.suite import norms, steps
from benchmarks.suite.cases import AttentionCase, NormCase, StepCase
from benchmarks.suite.methods import Method
from benchmarks.suite.problems import NormProblem, StepProblem

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = AttentionCase(
    200, 16, 2, 20, batch=2, num_heads=4, num_kv_heads=2, head_dim=16, text_len=9, dtype="float32"
)
LAYER = AttentionCase(64, 8, 2, 6, batch=2, num_heads=2, head_dim=16, text_len=6, dtype="float32")
STEP = StepCase(2, LAYER, 50)

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


def test_work_and_bytes_by_hand() -> None:
    # 4 x 40 heads, 4224 rows of 64 values, 2 bytes each: 54 MB per tensor
    case = AttentionCase(4224, 128, 2, 256, batch=4, num_kv_heads=8)
    tensor, statistics = 4 * 40 * 4224 * 64 * 2, 4 * 40 * 4224 * 4
    assert case.bytes("forward") == 2 * tensor + 2 * tensor // 5 + statistics
    assert case.bytes("forward+backward") == 6 * tensor + 6 * tensor // 5 + 2 * statistics
    assert case.flops("backward") == 2.5 * case.flops("forward")
    assert case.flops("forward") == pytest.approx(63e9, rel=0.01)
    # 256 keys of the window's two blocks, 64 of text, and the pivots before the window
    token = AttentionCase(4224, 128, 2, 256, num_heads=1, q_len=1)
    keys = 256 + 64 + int((token.layout("cpu").pivot_idx < 4224 - 256).sum())
    assert token.pairs == keys and token.bytes("forward") == 2 * (2 + 2 * keys) * 64 + 4
    norm = NormCase("sandwich_residual", 10, 8)
    assert (norm.bytes("forward"), norm.bytes("backward")) == (4 * 11 * 16, 6 * 11 * 16)
    products = 2 * 12 * 32 * 32 + 50 * 32
    attention = 2 * LAYER.flops("forward+backward")
    assert STEP.flops("step") == 6 * products * 2 * 64 + attention


# The plan


def test_the_gpu_s_plan_fits_a_window() -> None:
    plan = suite.entries("cuda")
    compilations = {(e.case, e.method.prepare) for e in plan if e.method.compiles}
    assert 300 <= len(plan) <= 470 and len(compilations) <= 55
    assert BUILD_S + START_S + CEILINGS_S + sum(e.seconds for e in plan) <= WINDOW_S
    # A method and its graph replay share what is compiled.
    norm = "layer_norm / 8192x2560 bfloat16"
    first, *others = (e for e in plan if norm in e.id and "F.layer_norm, compiled" in e.id)
    assert len(others) == 3 and first.seconds > 3 > 1 > max(e.seconds for e in others) > 0


def test_the_order_of_the_gpu_s_plan() -> None:
    """Ours; the rival and the best dense on A to D; norms; the rest, with every sweep."""
    plan = suite.entries("cuda")
    by_stage = {name: [e for e in plan if e.stage == name] for name in suite.STAGES}
    assert plan == [e for stage in by_stage.values() for e in stage]
    ours, second, of_norms, rest = by_stage.values()
    assert {e.method.role for e in ours} == {"ours"}
    assert {e.case.op for e in ours} == set(suite.METHODS)
    cases: list[Any] = list(dict.fromkeys(e.case for e in second))
    assert [(c.seqlen, c.op) for c in cases] == [
        *((seqlen, "attention") for seqlen in (1088, 4224, 4224, 16448)),
        (4224, "decode"),
    ]
    for case in cases[:4]:
        names = [e.method.name for e in second if e.case == case and e.work == "forward"]
        assert names[:4] == ["SDPA flash", "SDPA cuDNN", "FlashAttention-3", "FlashAttention-4"]
        assert [name[-7:] for name in names[4:8]] == ["128x128", " 128x64", ", 64x64", "64, TMA"]
    assert {e.case.op for e in of_norms} == {"layer_norm", "sandwich_residual"}
    assert {e.method.name.split(", ")[-1] for e in rest} > {"autotuned", "CogView's formulation"}
    swept = {sweep for e in rest for sweep in e.sweeps} - {"fixed"}
    assert swept == {"seqlen", "window", "pivots", "head_dim", "llm", "hidden"}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_entries_are_unique_and_keep_a_case_together(device_type: str) -> None:
    plan = suite.entries(device_type)
    assert len({e.id for e in plan}) == len(plan)
    assert {e.case.op for e in plan} == set(suite.METHODS)
    assert {e.method.only_on for e in plan} == {"", device_type}
    assert (device_type == "cpu") == any(
        e.method.name.startswith("SDPA,") or e.method.name == "SDPA" for e in plan
    )
    runs = itertools.groupby((e.stage if device_type == "cuda" else "", e.case) for e in plan)
    assert max(Counter(key for key, _ in runs).values()) == 1
    replayed = {e.case.op for e in plan if e.method.graph}
    expected = {"decode", "layer_norm", "sandwich_residual"} if device_type == "cuda" else set()
    assert replayed == expected and (device_type == "cuda" or len(plan) < 150)


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
        if method.only_on != "cuda" and not method.compiles:
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
            assert one.info["work"] == work


def test_on_a_gpu_ours_is_never_a_substitute() -> None:
    """The kernels or an error: here their tensors lie on a CPU."""
    layout, step = SMALL.layout(CPU), steps.ours(STEP, CUDA)
    qkv, rows = [torch.zeros(2, 4, 200, 16)] * 3, [torch.zeros(48)] * 6
    for op, of_step, inputs in (
        ("attention", functools.partial(step.three_region_attention, layout=layout), qkv),
        ("layer_norm", step.layer_norm, rows[:3]),
        ("sandwich_residual", step.sandwich_residual, rows),
    ):
        call = suite.METHODS[op][0].prepare(SMALL, layout, CUDA)
        with pytest.raises(ck.KernelUnavailable):
            of_step(*inputs)
        with pytest.raises(ck.KernelUnavailable):
            call(*inputs)


def refusal(case: Any, method: Method) -> suite.NotMeasured:
    with pytest.raises(suite.NotMeasured) as caught:
        suite.ready(suite.Entry(case, case.works[0], method, ("fixed",)), CPU)
    return caught.value


@pytest.mark.parametrize("spoiled", ["out", "dq", "dk", "dv"])
def test_a_slightly_wrong_method_is_not_timed(spoiled: str) -> None:
    def grows(x: Tensor, name: str) -> Tensor:  # 0.1 % too large a gradient
        return x + 1e-3 * (x - x.detach()) if name == spoiled else x

    def prepare(case: Any, layout: Any, device: torch.device) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            inputs = grows(q, "dq"), grows(k, "dk"), grows(v, "dv")
            return ck.three_region_attention(*inputs, layout) * (1 + 1e-3 * (spoiled == "out"))

        return call

    for case in (SMALL, dataclasses.replace(SMALL, seqlen=700)):
        reason = refusal(case, Method("spoiled", "three-region", prepare))
        assert f"{spoiled}: 0.001" in str(reason) and reason.failed


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
def test_a_wrong_layout_exceeds_half_precision_rounding(change: Any) -> None:
    def prepare(case: Any, layout: Any, device: torch.device) -> Any:
        slip = dataclasses.replace(layout, **change(layout))
        return lambda q, k, v: ck.three_region_attention(q, k, v, slip)

    case = AttentionCase(2176, 128, 2, 256, num_heads=2)
    assert "wrong" in str(refusal(case, Method("slip", "three-region", prepare)))


def test_whatever_a_peer_raises_is_the_reason_of_one_row() -> None:
    def breaks(*_: Any) -> Any:
        raise ValueError("no such\n thing")

    def gives_nan(*_: Any) -> Any:
        return lambda q, k, v: q * k.sum() * v.sum() * float("nan")

    def has_no_kernel(*_: Any) -> Any:
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(  # none on a CPU
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        )

    for prepare, module, text, failed in (
        (breaks, "", "ValueError: no such thing", True),
        (str, "absent.module", "absent.module is not installed", False),
        (gives_nan, "", "out: inf", True),
        (has_no_kernel, "", "no such kernel", False),
    ):
        reason = refusal(SMALL, Method("bad", "three-region", prepare, module=module))
        assert text in str(reason) and reason.failed == failed


# What the check compares with


class SmallInputs(NormProblem):
    """eps makes plain LayerNorm differ from PB-relax."""

    def random(self, *shape: int) -> Tensor:
        return 0.01 * super().random(*shape) + 0.005


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["layer_norm", "sandwich_residual"])
def test_norms_compute_what_they_declare(monkeypatch: Any, op: str, dtype: str) -> None:
    def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:  # as published
        return F.layer_norm(X, W.shape, W, B, eps)

    stub: Any = SimpleNamespace(__spec__=True, liger_layer_norm=liger_layer_norm)
    monkeypatch.setitem(sys.modules, "liger_kernel", stub)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", stub)
    problem = SmallInputs(NormCase(op, 5, 48, dtype), CPU)
    for method in suite.METHODS[op]:
        with torch.compiler.set_stance("force_eager"):
            assert len(problem.prepared(method)[1]["errors"]) == {"layer_norm": 4}.get(op, 8)
            other = {norms.PB_RELAX: norms.PLAIN, norms.PLAIN: norms.PB_RELAX}[method.computes]
            with pytest.raises(suite.NotMeasured, match="wrong"):
                problem.prepared(dataclasses.replace(method, computes=other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", steps.STEP_METHODS, ids=lambda method: method.name)
def test_steps_compute_what_they_declare(method: Method, dtype: str) -> None:
    case = StepCase(2, dataclasses.replace(LAYER, dtype=dtype), 50)
    error = StepProblem(case, CPU).prepared(method)[1]["errors"]["losses"]
    assert (error > 1e-5) == (dtype == "bfloat16"), "autocast"
    (other,) = {"three-region", "dense causal"} - {method.computes}
    with pytest.raises(suite.NotMeasured, match="wrong.*losses"):
        StepProblem(case, CPU).prepared(dataclasses.replace(method, computes=other))


def test_a_step_s_loss_and_gradients_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is predicted from those before it; gradients are clipped, and none are left: the
    next step would free them, and its peak memory would look smaller."""
    training: Any = steps.STEP_METHODS[1].prepare(STEP, None, CPU)  # dense
    tokens, model = training.tokens, training.model
    z = model(tokens[:, :-1], training.positions, [None] * STEP.num_layers)
    scores = model.logits(z).log_softmax(-1).gather(2, tokens[:, 1:, None])
    lengths = []

    def observed() -> None:
        lengths.append(sum(p.grad.square().sum() for p in model.parameters()).sqrt())

    monkeypatch.setattr(training.optimizer, "step", observed)  # every step repeats the first
    for _ in range(2):
        torch.testing.assert_close(training(), -scores.detach().mean())
        assert all(p.grad is None for p in model.parameters())
    assert lengths[0] == lengths[1] <= 1 + 1e-4


def test_cogview_s_formulation_does_not_call_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("three_region_attention", "pb_relax_layer_norm", "sandwich_residual"):
        monkeypatch.setattr(ck, name, None)
    operators = vars(steps.as_cogview_computes(STEP, CPU))
    used = [operator for name, operator in operators.items() if name != "causal_attention"]
    assert {operator.__module__ for operator in used} == {steps.__name__}
    steps.STEP_METHODS[2].prepare(STEP, None, CPU)()
