"""How the suite times, what it keeps, and what ``make bench`` does with it."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_bench import SUITE
from torch import Tensor

from benchmarks import machine
from benchmarks.suite import conftest, measure

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_a_gpu_call_is_timed_between_events_after_a_flush_that_leaves_clean_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stubs for the device: the order of the calls. Flushes outlast the host's launches."""
    calls: list[str] = []
    now = 0.0

    def log(word: str, seconds: float = 0.0) -> None:
        nonlocal now
        now += seconds
        calls.append(word)

    def zeros(size: Any, device: torch.device) -> Any:
        if size:
            assert 4 * size == 256 << 20  # several times the cache
        return types.SimpleNamespace(zero_=lambda: log("write", 1e-4))

    event = types.SimpleNamespace(
        record=lambda: log("event"),
        synchronize=lambda: log("wait"),
        elapsed_time=lambda end: 2.0,  # ms
    )
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch, "sum", lambda *_, out: log("read", 1e-4))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: 7)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    monkeypatch.setattr(measure, "MAX_ROUNDS", 5)

    fast, slow = (lambda: log("fast", 1e-6)), (lambda: log("slow", 1e-3))
    timed = measure.measure_interleaved([fast, slow], torch.device("cuda"), 0.1)
    measure.clock_of.cache_clear()
    assert [m.seconds for m in timed] == [[2e-3] * 5] * 2 and timed[0].extra_bytes == 7
    assert [m.host_seconds for m in timed] == pytest.approx([1e-6, 1e-3])
    found = re.findall(r"((?:write read )+)event (fast|slow) event wait", " ".join(calls))
    order = ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]
    assert [name for _, name in found] == order
    flushed = {name: 1e-4 * len(flush.split()) for flush, name in found}
    assert flushed == pytest.approx({"fast": 2e-4, "slow": 22e-4})  # seconds


def test_what_slows_the_machine_for_a_while_slows_all_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fake clock that runs ever more slowly: calls that take turns keep their ratio."""
    now, speed = 0.0, 1.0

    def takes(seconds: float) -> Any:
        def call() -> None:
            nonlocal now, speed
            speed *= 1.01
            now += seconds * speed

        return call

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    monkeypatch.setattr(measure, "CPU_FLUSH_BYTES", 1 << 10)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: 0)
    measure.clock_of.cache_clear()
    one, other = measure.measure_interleaved([takes(1.0), takes(2.0)], CPU, 100.0)
    control = measure.a_a_control("name", takes(1.0), CPU)
    measure.clock_of.cache_clear()
    assert len(one.seconds) == len(other.seconds) > 20
    assert one.seconds[-1] > 1.4 * one.seconds[0]
    ratio = statistics.median(other.seconds) / statistics.median(one.seconds)
    assert ratio == pytest.approx(2, rel=0.02)
    assert control["name"] == "A/A: name" and control["difference"] < 0.02


def test_make_bench_keeps_freed_memory() -> None:
    """The allocator's settings in the Makefile: calls map no tensors anew."""
    program = """
import resource, torch
def call(): x = torch.ones(16 << 20); y = x * 2; return x + y  # 64 MiB each
call(); call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4): call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    (settings,) = re.findall(r"GLIBC_TUNABLES=(\S+)", (ROOT / "Makefile").read_text())
    environment = {**os.environ, "GLIBC_TUNABLES": settings}
    command = [sys.executable, "-c", program]
    faults = int(subprocess.check_output(command, env=environment))
    assert faults < 100  # of more than 100,000 pages


def test_peak_memory_counts_tensors_alive_at_the_same_time() -> None:
    megabyte = torch.zeros(1 << 18)

    def run() -> Tensor:
        a = megabyte + 1  # 1
        b = a * 2  # 2
        del a
        return b + megabyte  # b and this: 2

    assert measure.peak_bytes(run, CPU) == pytest.approx(2 << 20, rel=0.01)
    spread = measure.spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert spread == {"minimum": 1.0, "median": 3.0, "iqr": 2.0, "rounds": 5}


def test_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each row, a copy in $OUT, nothing that names the host; a commit without git."""
    info = [machine.machine_info(CPU), machine.commit_info()]
    assert platform.node() not in json.dumps(info).split('"') and str(ROOT) not in json.dumps(info)

    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("COMMIT", "0123456789abcdef")
    monkeypatch.setattr(machine, "output_of", lambda *command: None)  # as without git
    commit = machine.commit_info()
    assert commit["dirty"] is None
    name = machine.record_name("suite", {"device": "NVIDIA H200"}, commit, "2026-02-03T04:05:06")
    assert name == "suite-nvidia-h200-2026-02-03-0123456.json"
    record = {"datetime": "x", "empty": [], "rows": [{"a": [1]}, {"b": 2}], "info": {"c": {"d": 1}}}
    machine.save_record(record, tmp_path / name)
    assert json.loads((tmp_path / name).read_text()) == record
    assert '\n  {"a": [1]},\n  {"b": 2}\n' in (tmp_path / "out" / name).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out", name}
    assert machine.new_path(tmp_path / name) == tmp_path / f"{name[:-5]}-2.json"


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"minimum": 1.0, "difference": 0.02}
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    assert "allocator" in str(conftest.why_refused([row, row]))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    assert conftest.why_refused([row, row]) is None
    apart = conftest.why_refused([row, {**row, "difference": 0.11}])
    assert apart == "the same call, timed as two methods, differs by 11%"
    later = conftest.why_refused([row, {**row, "minimum": 1.25}])
    assert later == "the same call, timed at the start and at the end, differs by 25%"


PLUGIN = """
import sys
from pathlib import Path
import benchmarks.suite, tiny_suite
from benchmarks import machine
from benchmarks.suite import measure

whole = tiny_suite.entries
names = "cogview_kernels", "SDPA", "elsewhere"
tiny_suite.entries = lambda device: [entry for entry in whole(device) if entry.method.name in names]
benchmarks.suite.entries = sys.modules["benchmarks.suite.entries"] = tiny_suite
tiny_suite.quick()
measure.BUDGET_S = {"cpu": 0.04}
control = measure.a_a_control
measure.a_a_control = lambda *args: control(*args) | {"minimum": 1.0, "difference": 0.05}
machine.RESULTS = Path(__file__).parent
"""


@pytest.mark.parametrize(("select", "kept"), [("forward or backward", 1), ("forward", 0)])
def test_make_bench_with_a_suite_of_two_methods(select: str, kept: int, tmp_path: Path) -> None:
    """Only a complete run is kept."""
    (tmp_path / "tiny_suite.py").write_text(SUITE)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider"]
    command += ["--benchmark-enable", f"--benchmark-json={path}", "benchmarks/suite/bench.py"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, tmp_path))),
        "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0",
    }
    done = subprocess.run(
        [*command, "-k", select], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    rows = {row["name"]: row for row in record["benchmarks"]}
    ours, sdpa = (
        rows[f"test_suite[attention / tiny / forward / {name}]"]
        for name in ("cogview_kernels", "SDPA")
    )
    assert ours["stats"]["rounds"] == sdpa["stats"]["rounds"] > 10  # in turns
    assert 1e-3 < ours["stats"]["min"] < 2e-3 < sdpa["stats"]["min"]
    assert ours["extra_info"]["role"] == "ours" and ours["extra_info"]["extra_bytes"] == 5 << 20
    assert ours["group"] == sdpa["group"] == "attention / tiny / forward"
    assert {row["reason"] for row in record["not_measured"]} == {"it has no kernel for CPU"}
    assert set(record["commit_info"]) == {"id", "time", "dirty"} and len(record["controls"]) == 2
    assert platform.node() not in path.read_text().split('"')
    assert len(list(tmp_path.glob("suite-*.json"))) == kept
    compare = [sys.executable, "-m", "pytest_benchmark", "compare", str(path)]
    table = subprocess.check_output(compare, text=True, cwd=tmp_path)
    assert table.count(" / forward / ") == 2
