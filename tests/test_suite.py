"""The benchmark suite itself: what it counts, checks and times."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cogview_kernels as ck
from benchmarks.suite import bench as bench_suite
from benchmarks.suite import entries as suite
from benchmarks.suite import measure
from benchmarks.suite.cases import AttentionCase, NormCase, StepCase, cases_of
from benchmarks.suite.methods import Method

ROOT = Path(__file__).resolve().parents[1]

CPU = torch.device("cpu")
SMALL = AttentionCase(
    200, 16, 2, 20, batch=2, num_heads=4, num_kv_heads=2, head_dim=16, text_len=9, dtype="float32"
)


def test_visible_pairs_and_keys_match_the_dense_mask() -> None:
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
            q_len=draw.choice([0, 1, 3]),
        )
        mask = case.layout("cpu").dense_mask(2, case.queries, seqlen)
        causal = torch.ones(case.queries, seqlen).tril(seqlen - case.queries).sum()
        assert case._counts == (mask.sum(), mask.any(1).sum()), case
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
    step = StepCase(2, 64, 4, 3, 100, 16, 2, 10, text_len=28, vocab_size=500)
    parameters = 2 * 12 * 64 * 64 + 500 * 64
    attention = 2 * step.attention.flops("forward+backward")
    assert step.flops("step") == 6 * parameters * 3 * 128 + attention


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_entries_are_unique_and_fixed_cases_come_first(device_type: str) -> None:
    entries = suite.entries(device_type)
    ids = [entry.id for entry in entries]
    assert len(set(ids)) == len(ids)
    assert {entry.case.op for entry in entries} == set(suite.METHODS)
    fixed = ["fixed" in entry.sweeps for entry in entries]
    assert fixed == sorted(fixed, reverse=True)
    assert entries[0].method.name == "cogview_kernels"
    attention = [planned for planned in cases_of(device_type) if planned.case.op == "attention"]
    sweeps = {sweep for planned in attention for sweep in planned.sweeps}
    assert sweeps == {"fixed", "seqlen", "window", "pivots", "head_dim", "dtype", "llm"}


def test_the_length_sweep_covers_1k_to_64k_on_a_gpu() -> None:
    lengths = [
        planned.case.seqlen  # type: ignore[union-attr]
        for planned in cases_of("cuda")
        if planned.case.op == "attention" and "seqlen" in planned.sweeps
    ]
    assert lengths == [1 << log2 for log2 in range(10, 17)]


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
        right = suite.ATTENTION_METHODS[0].prepare(case, layout, device)

        def call(*qkv: Tensor) -> Tensor:
            out = right(*(Spoil.apply(x, number == at) for at, x in enumerate(qkv, start=1)))
            return out * 1.001 if number == 0 else out

        return call

    return prepare


@pytest.mark.parametrize(("number", "name"), list(enumerate(["out", "dq", "dk", "dv"])))
def test_a_slightly_wrong_method_is_not_timed(number: int, name: str) -> None:
    method = Method("spoiled", "three-region", spoiled(number))
    entry = suite.Entry(SMALL, "forward", method, ("fixed",))
    with pytest.raises(suite.NotMeasured, match=f"wrong.*{name}: 0.001") as caught:
        suite.run(entry, CPU, 0.01)
    assert caught.value.failed


def test_a_method_must_declare_the_function_it_computes() -> None:
    dense = next(
        m
        for m in suite.ATTENTION_METHODS
        if m.computes == "dense causal" and not m.why_not(SMALL, CPU)
    )
    entry = suite.Entry(SMALL, "forward", dense, ("fixed",))
    assert suite.run(entry, CPU, 0.01)["info"]["computes"] == "dense causal"
    liar = dataclasses.replace(dense, computes="three-region")
    with pytest.raises(suite.NotMeasured, match="wrong"):
        suite.run(dataclasses.replace(entry, method=liar), CPU, 0.01)


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

    entry = suite.Entry(case, "forward", Method("slip", "three-region", prepare), ("fixed",))
    with pytest.raises(suite.NotMeasured, match="wrong"):
        suite.run(entry, CPU, 0.01)


def test_the_most_important_entries_come_first() -> None:
    order = [
        (entry.case.op, entry.method.name, entry.method.compiles)
        for entry in suite.entries("cuda")
        if "fixed" in entry.sweeps
    ]

    def first(op: str, method: str) -> int:
        return next(i for i, entry in enumerate(order) if entry[:2] == (op, method))

    def last(op: str, method: str) -> int:
        return len(order) - 1 - [entry[:2] for entry in order[::-1]].index((op, method))

    rival, steps = suite.RIVAL, "cogview_kernels, compiled"
    stages = [
        ("attention", "cogview_kernels"),
        ("attention", "SDPA flash"),
        ("training_step", "dense SDPA"),
        ("attention", rival),
        ("training_step", steps),
        ("attention", "FlexAttention, plain mask"),
        ("attention", f"{rival}, autotuned"),
    ]
    for before, after in itertools.pairwise(stages):
        assert last(*before) < first(*after)


def test_an_unsupported_case_is_not_a_failure() -> None:
    def prepare(case: Any, layout: Any, device: torch.device) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # none on a CPU
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return call

    entry = suite.Entry(SMALL, "forward", Method("cuDNN", "dense causal", prepare), ())
    with pytest.raises(suite.NotMeasured, match="no such kernel") as caught:
        suite.run(entry, CPU, 0.01)
    assert not caught.value.failed


def test_a_step_leaves_no_gradients_behind() -> None:
    """The next step would free them, and its peak memory would look smaller."""
    case = StepCase(2, 32, 2, 2, 60, 8, 2, 8, text_len=8, vocab_size=100, dtype="float32")
    step = suite.STEP_METHODS[0].prepare(case, None, CPU)
    step()
    assert all(weight.grad is None for weight in step.model.parameters())


def test_a_training_step_with_another_attention_is_wrong() -> None:
    case = StepCase(2, 32, 2, 2, 60, 8, 2, 8, text_len=8, vocab_size=100, dtype="float32")
    dense = next(m for m in suite.STEP_METHODS if m.computes == "dense causal")
    liar = dataclasses.replace(dense, computes="three-region")
    with pytest.raises(suite.NotMeasured, match="wrong.*losses"):
        suite.run(suite.Entry(case, "step", liar, ()), CPU, 0.01)


def test_an_error_or_nan_becomes_the_reason_of_one_row() -> None:
    def breaks(case: Any, layout: Any, device: torch.device) -> Callable[..., Any]:
        raise ValueError("no such\n thing")

    def gives_nan(case: Any, layout: Any, device: torch.device) -> Callable[..., Any]:
        return lambda q, k, v: q * k.sum() * v.sum() * float("nan")

    for prepare, text in ((breaks, "^ValueError: no such thing$"), (gives_nan, "wrong.*out: nan")):
        entry = suite.Entry(SMALL, "forward", Method("bad", "three-region", prepare), ())
        with pytest.raises(suite.NotMeasured, match=text):
            suite.run(entry, CPU, 0.01)


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        dataclasses.replace(SMALL, q_len=1),
        NormCase("layer_norm", 30, 48, "float32"),
        NormCase("sandwich_residual", 30, 48, "float32"),
        StepCase(2, 32, 2, 2, 60, 8, 2, 8, text_len=8, vocab_size=100, dtype="float32"),
    ],
    ids=lambda case: case.op,
)
def test_every_method_that_runs_here_is_correct_and_timed(case: Any) -> None:
    ran = set()
    for method in suite.METHODS[case.op]:
        if method.why_not(case, CPU) or method.compiles:
            continue
        for work in case.works:
            result = suite.run(suite.Entry(case, work, method, ("fixed",)), CPU, 0.01)
            assert all(second > 0 for second in result["seconds"])
            assert len(result["seconds"]) >= measure.MIN_ROUNDS
            info = result["info"]
            assert info["errors"] and set(info["errors"]) == set(info["errors_allowed"])
            assert info["extra_bytes"] > 0
            ran.add((method.name, work))
    assert {("cogview_kernels", work) for work in case.works} < ran
    suite.forget()


def test_peak_memory_counts_tensors_alive_at_the_same_time() -> None:
    megabyte = torch.zeros(1 << 18)

    def run() -> Tensor:
        a = megabyte + 1  # 1
        b = a * 2  # 2
        del a
        return b + megabyte  # b and this: 2

    assert measure.peak_bytes(run, CPU) == pytest.approx(2 << 20, rel=0.01)
    x = torch.zeros(1 << 18, requires_grad=True)
    # x * 2, saved for the gradient of sin, and the value of sin; then gradients
    peak = measure.peak_bytes(lambda: torch.autograd.grad((x * 2).sin().sum(), x), CPU)
    assert 2 << 20 <= peak <= 3.1 * (1 << 20)


def test_gpu_timing_is_between_events_and_after_a_flush(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stubs for the device: checks the order of the calls."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("event")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 2.0  # ms

    class Flushed:
        def zero_(self) -> None:
            calls.append("flush")

    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    sizes: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "empty", lambda size, **_: sizes.append(size) or Flushed())
    seconds, host = measure._time_cuda(lambda: calls.append("run"), CPU, 3)
    assert seconds == [2e-3] * 3 and host > 0
    assert sizes == [256 << 20]  # several times the cache
    text = " ".join(calls)
    timed = re.findall(r"((?:flush )+)event run event wait", text)
    # Five more launches measure the host's time.
    assert len(timed) == 3 and text.count("run") == 3 + 5


def test_cpu_times_are_plausible() -> None:
    a = torch.randn(600, 600)
    timed = measure.measure(lambda: a @ a, CPU, 0.05)
    assert 1e-5 < min(timed.seconds) < 1 and timed.host_seconds is None
    assert len(timed.seconds) <= measure.MAX_ROUNDS


def test_the_record_does_not_name_the_host() -> None:
    import platform

    text = json.dumps([measure.machine_info(CPU), measure.commit_info()])
    assert platform.node() not in text.split('"') and str(ROOT) not in text


def test_without_git_the_working_tree_state_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "output_of", lambda *command: None)
    monkeypatch.setenv("COMMIT", "1234567")
    commit = measure.commit_info()
    assert commit["id"] == "1234567" and commit["dirty"] is None


def test_record_file_names(tmp_path: Path) -> None:
    name = measure.record_name(
        "suite", {"device": "NVIDIA H200"}, {"id": "0123456789abcdef"}, "2026-02-03T04:05:06"
    )
    assert name == "suite-nvidia-h200-2026-02-03-0123456.json"
    record: dict[str, Any] = {
        "datetime": "x",
        "not_measured": [],
        "benchmarks": [{"a": [1]}, {"b": 2}],
    }
    measure.save_record(record, tmp_path / name)
    assert json.loads((tmp_path / name).read_text()) == record
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_pytest_benchmark_reports_the_measured_times(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-enable"]
    command += ["benchmarks/bench_suite.py", "-k", "decode and S1088 and cogview_kernels"]
    done = subprocess.run(
        [*command, f"--benchmark-json={path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    (row,) = record["benchmarks"]
    info = row["extra_info"]
    assert (info["op"], info["method"], info["work"]) == ("decode", "cogview_kernels", "forward")
    assert row["stats"]["rounds"] == len(row["stats"]["data"]) >= measure.MIN_ROUNDS
    assert all(0 < second < 10 for second in row["stats"]["data"])
    assert record["ceilings"]["copy_bytes_per_s"] > 1e8
    assert set(record["machine_info"]) >= {"device", "device_type", "torch", "versions"}
    assert set(record["commit_info"]) == {"id", "time", "dirty"}


def test_a_complete_run_writes_a_record(tmp_path: Path) -> None:
    """With a suite of one case, which includes a method that cannot run here."""
    (tmp_path / "tiny.py").write_text("""
import sys
from pathlib import Path

from benchmarks.suite import measure
from benchmarks.suite import entries as suite
from benchmarks.suite.cases import AttentionCase

case = AttentionCase(64, 16, 2, 8, num_heads=2, head_dim=16, text_len=4, dtype="float32")
few = [m for m in suite.ATTENTION_METHODS if m.name in ("cogview_kernels", "SDPA", "SDPA flash")]
suite.entries = lambda device_type: [suite.Entry(case, "forward", m, ("fixed",)) for m in few]
measure.new_path = lambda path: Path(__file__).parent / path.name
""")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tiny", "-p", "no:cacheprovider"]
    command += ["--benchmark-enable", f"--benchmark-json={tmp_path / 'bench.json'}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for words, kept in ((["-k", "flash"], 0), ([], 1)):
        done = subprocess.run(
            [*command, *words, "benchmarks/bench_suite.py"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        records = list(tmp_path.glob("suite-*.json"))
        assert len(records) == kept
    record = json.loads(records[0].read_text())
    ours, sdpa = (row["extra_info"]["method"] for row in record["benchmarks"])
    assert (ours, sdpa) == ("cogview_kernels", "SDPA")
    (missing,) = record["not_measured"]
    assert missing["method"] == "SDPA flash" and missing["failed"] is False
    assert missing["name"].endswith(" / forward / SDPA flash")
    compare = [sys.executable, "-m", "pytest_benchmark", "compare", str(records[0])]
    done = subprocess.run(compare, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count(" / forward / ") == 2


def test_playback_is_exact() -> None:
    clock = bench_suite.Playback()
    clock.seconds = [0.1 + 1e-9, 2.5]
    durations = []
    for _ in clock.seconds:
        clock.rewind()
        begin = clock.now()
        clock.play()
        durations.append(clock.now() - begin)
    assert durations == clock.seconds
