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
from benchmarks.suite import bench, conftest, host_time, measure

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

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        record = staticmethod(lambda: log("event"))
        synchronize = staticmethod(lambda: log("wait"))
        elapsed_time = staticmethod(lambda end: 2.0)  # ms

    def zeros(size: Any, device: torch.device) -> Any:
        if size:
            assert 4 * size == 256 << 20  # several times the cache
        return types.SimpleNamespace(zero_=lambda: log("write", 1e-4))

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch, "sum", lambda *_, out: log("read", 1e-4))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: 7)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    monkeypatch.setattr(measure, "MAX_ROUNDS", 5)

    fast, slow = (lambda: log("fast", 1e-6)), (lambda: log("slow", 1e-3))
    cuda = torch.device("cuda")
    timed = measure.measure_interleaved([fast, slow], cuda, 0.1)
    assert [m.seconds for m in timed] == [[2e-3] * 5] * 2 and timed[0].extra_bytes == 7
    assert [m.host_seconds for m in timed] == pytest.approx([1e-6, 1e-3])
    text = " ".join(calls)
    found = re.findall(r"((?:write read )+)event (fast|slow) event wait", text)
    order = ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]
    assert [name for _, name in found] == order
    flushed = {name: 1e-4 * len(flush.split()) for flush, name in found}
    assert flushed == pytest.approx({"fast": 2e-4, "slow": 22e-4})  # seconds
    measure.clock_of.cache_clear()


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
    measure.clock_of.cache_clear()
    assert len(one.seconds) == len(other.seconds) > 20
    assert one.seconds[-1] > 1.4 * one.seconds[0]
    ratio = statistics.median(other.seconds) / statistics.median(one.seconds)
    assert ratio == pytest.approx(2, rel=0.02)
    control = measure.a_a_control("name", takes(1.0), CPU)
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
    faults = []
    for tunables in ("", settings):
        environment = {**os.environ, "GLIBC_TUNABLES": tunables}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        faults.append(int(done.stdout))
    assert faults[0] > 10_000 and faults[1] < 100, faults


def test_peak_memory_counts_tensors_alive_at_the_same_time() -> None:
    megabyte = torch.zeros(1 << 18)

    def run() -> Tensor:
        a = megabyte + 1  # 1
        b = a * 2  # 2
        del a
        return b + megabyte  # b and this: 2

    assert measure.peak_bytes(run, CPU) == pytest.approx(2 << 20, rel=0.01)


def test_spread_and_a_refused_record(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure.spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found == {"minimum": 1.0, "median": 3.0, "iqr": 2.0, "rounds": 5}
    row = {"minimum": 1.0, "difference": 0.02}
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    assert "allocator" in str(conftest.why_refused([row, row]))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    assert conftest.why_refused([row, row]) is None
    apart = conftest.why_refused([row, {**row, "difference": 0.11}])
    assert apart == "the same call, timed as two methods, differs by 11%"
    later = conftest.why_refused([row, {**row, "minimum": 1.25}])
    assert later == "the same call, timed at the start and at the end, differs by 25%"


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


def test_playback_is_exact() -> None:
    clock = bench.Playback()
    clock.play([0.1 + 1e-9, 2.5])
    assert [-clock.now() + clock.now() for _ in range(2)] == [0.1 + 1e-9, 2.5]


@pytest.mark.parametrize(
    ("difference", "entries", "kept"), [(0.05, 1, True), (0.2, 1, False), (0.05, 2, False)]
)
def test_only_a_complete_and_quiet_run_is_kept(
    difference: float, entries: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = {"name": "A/A", "minimum": 1.0, "median": 1.0, "difference": difference}
    entry = types.SimpleNamespace(id="only")
    ready = types.SimpleNamespace(call=None)
    tiny = types.SimpleNamespace(entries=lambda device: [entry] * entries, ready=lambda *_: ready)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    monkeypatch.setattr(conftest, "suite", tiny)
    monkeypatch.setattr(conftest, "_controls", [control])
    monkeypatch.setattr(measure, "a_a_control", lambda *_: control)
    monkeypatch.setattr(measure, "ceilings", lambda device: {"copy_bytes_per_s": 1.0})
    monkeypatch.setattr(host_time, "why_not", lambda device: "nothing to time")
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    info = {"machine_info": {"device": "x"}, "commit_info": {"id": "1234567"}, "datetime": "2026"}
    output: dict[str, Any] = {**info, "benchmarks": [{"name": "only", "params": entry}]}
    conftest.pytest_benchmark_update_json(None, output["benchmarks"], output)
    assert output["controls"] == [control] * 2 and output["drift"][0]["first_median"] == 1.0
    assert len(list(tmp_path.glob("suite-x-2026-1234567.json"))) == kept


PLUGIN = """
import sys
from pathlib import Path
import benchmarks.suite, tiny_suite
from benchmarks import machine
from benchmarks.suite import host_time, measure

whole = tiny_suite.entries
names = "cogview_kernels", "SDPA", "elsewhere"
tiny_suite.entries = lambda device: [entry for entry in whole(device) if entry.method.name in names]
benchmarks.suite.entries = sys.modules["benchmarks.suite.entries"] = tiny_suite
host_time.why_not = lambda device: "nothing to time"
tiny_suite.quick()
measure.BUDGET_S = {"cpu": 0.04}
machine.RESULTS = Path(__file__).parent
"""


def test_make_bench_with_a_suite_of_two_methods(tmp_path: Path) -> None:
    (tmp_path / "tiny_suite.py").write_text(SUITE)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider"]
    command += ["--benchmark-enable", f"--benchmark-json={path}", "benchmarks/suite/bench.py"]
    paths = os.pathsep.join(map(str, (ROOT, tmp_path)))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    ours, _, sdpa, _ = record["benchmarks"]
    assert ours["name"] == "test_suite[attention / tiny / forward / cogview_kernels]"
    assert ours["stats"]["rounds"] == sdpa["stats"]["rounds"] > 10  # in turns
    assert 1e-3 < ours["stats"]["min"] < 2e-3 < sdpa["stats"]["min"]
    assert ours["extra_info"]["role"] == "ours" and ours["extra_info"]["extra_bytes"] == 5 << 20
    assert ours["group"] == sdpa["group"] == "attention / tiny / forward"
    assert {row["reason"] for row in record["not_measured"]} == {"it has no kernel for CPU"}
    assert set(record["commit_info"]) == {"id", "time", "dirty"} and len(record["controls"]) == 2
    compare = [sys.executable, "-m", "pytest_benchmark", "compare", str(path)]
    done = subprocess.run(compare, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count(" / forward / ") == 2
