"""``make gpu-bench`` on the CPU: entries that run, are wrong, raise, die or hang; the end of the
window; resuming from an earlier record."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.suite import gpu

ROOT = Path(__file__).resolve().parents[1]

# A suite without torch's kernels: the runner's outcomes do not depend on what is timed.
SUITE = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from benchmarks.suite import host_time, measure

def quick():
    ceilings = {"matmul_flops": {"float32": 1e12}, "copy_bytes_per_s": 1e12}
    measure.ceilings = lambda device: ceilings
    measure.CPU_FLUSH_BYTES = 1 << 10
    measure.BUDGET_S = {"cpu": 0.001}
    measure.peak_bytes = lambda call, device: 5 << 20
    host_time.rows = lambda device: [{"name": "norm", "ours": 3.0, "torchs": 2.0}]

if "--end" in sys.argv:  # in a worker
    quick()
    sys.modules["__main__"].LATE_S = 4

class NotMeasured(Exception):
    def __init__(self, reason, failed):
        super().__init__(reason)
        self.failed = failed

def raises(error):
    raise error

def hangs():
    Path(__file__).with_name("mended").exists() or time.sleep(60)

METHODS = (
    ("cogview_kernels", lambda: time.sleep(1e-3), "ours", "ours"),
    ("SDPA", lambda: time.sleep(2e-3), "rival and dense", "dense"),
    ("Flex", lambda: time.sleep(3e-3), "rival and dense", "rival"),
    ("elsewhere", lambda: raises(NotMeasured("it has no kernel for CPU", False)), "rest", ""),
    ("wrong", lambda: raises(NotMeasured("wrong: relative error 0.01", True)), "rest", ""),
    ("breaks", lambda: raises(ValueError("of no use")), "rest", ""),
    ("dies", os.abort, "rest", ""),
    ("last", lambda: 0, "rest", ""),
    ("hangs", hangs, "rest", ""),
)
SHAPE = dict(dtype="float32", batch=1, seqlen=8, key_window_times=1)

def entry(work, name, call, stage, role):
    group = f"attention / tiny / {work}"
    computes = "dense causal" if role == "dense" else "three-region"
    info = dict(op="attention", work=work, case=SHAPE, case_name="tiny", sweeps=["fixed"],
                method=name, role=role, graph=False, computes=computes, flops=1000, bytes=1000)
    method = SimpleNamespace(name=name, compiles=name == "SDPA", graph=False)
    case = SimpleNamespace(op="attention", name="tiny")
    return SimpleNamespace(id=f"{group} / {name}", group=group, method=method, stage=stage,
                           case=case, seconds=0.5, call=call, info=lambda: info)

def entries(device_type):
    return [entry(work, *rest) for rest in METHODS for work in ("forward", "backward")]

def ready(entry, device):
    entry.call()
    return SimpleNamespace(call=entry.call, info=entry.info())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the suite, the results and $OUT, for this process and its workers."""
    (tmp_path / "tiny_suite.py").write_text(SUITE)
    out, paths = str(tmp_path / "out"), os.pathsep.join(map(str, (ROOT, tmp_path)))
    for name, value in {"OUT": out, "PYTHONPATH": paths, "COMMIT": "1234567"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(machine, "output_of", lambda *command: None)  # as without git
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "LOG", tmp_path / "gpu-bench.log")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def bench(*words: str) -> int:
    return gpu.main("--device", "cpu", "--suite", "tiny_suite", *words)


def record_in(here: Path) -> Any:
    (path,) = here.glob("results/*.json")
    return json.loads(path.read_text())


def methods(rows: Iterable[Any]) -> list[str]:
    """Without the work, of rows or names."""
    return [(row if isinstance(row, str) else row["name"]).split(" / ")[-1] for row in rows]


def test_outcomes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 1
    printed, record = capsys.readouterr().out, record_in(here)
    (path,) = here.glob("out/suite-*-1234567.json")
    assert record == json.loads(path.read_text())
    log = (here / "out" / "gpu-bench.log").read_text()
    assert "forward / last" in log and "in hangs" in log  # where it hung
    assert record["commit_info"]["dirty"] is None and "running" not in record

    rows = {row["name"].split(" / ", 2)[2]: row for row in record["rows"]}
    timed = ("cogview_kernels", "SDPA", "Flex", "last")
    assert list(rows) == [f"{work} / {name}" for name in timed for work in ("forward", "backward")]
    ours, sdpa = rows["forward / cogview_kernels"], rows["forward / SDPA"]
    assert set(sdpa["seconds"]) == {"minimum", "median", "iqr", "rounds"}
    assert 2e-3 <= sdpa["seconds"]["minimum"] <= sdpa["seconds"]["median"] < 1
    assert sdpa["extra_bytes"] == 5 << 20 and sdpa["graph"] is False
    reasons = {(row["method"], row["failed"]): row["reason"] for row in record["not_measured"]}
    hung = reasons.pop(("hangs", True))
    assert hung.startswith("its process ended with status 1 after ")
    assert reasons == {
        ("elsewhere", False): "it has no kernel for CPU",
        ("wrong", True): "wrong: relative error 0.01",
        ("breaks", True): "ValueError: of no use",
        ("dies", True): "died with signal 6",  # both kinds of work at the price of one
    }
    assert printed.count("lost: ") == 2 and "stopped: no\n" in printed
    assert [row["after_stage"] for row in record["drift"]] == ["ours", "rival and dense"]
    assert record["drift"][0]["first_median"] == ours["seconds"]["median"]
    (control,) = record["controls"]
    assert control["name"].startswith("A/A: attention / tiny") and control["difference"] >= 0

    lines = printed.splitlines()
    assert lines[-3] == "8 measured, 2 cannot run here, 8 failed, 0 not reached"
    (line,) = [line for line in lines if " | forward | " in line]
    for name in ("SDPA", "Flex"):
        factor = rows[f"forward / {name}"]["seconds"]["median"] / ours["seconds"]["median"]
        assert f"{factor:.2f}x ({name})" in line.replace("*", "")
    assert any("A/A" in line and 'ours again after "ours"' in line for line in lines)
    assert "ours / torch's: norm 1.50" in printed


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.time() + 60
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def hangs(here: Path) -> bool:
    if not list(here.glob("results/*.json")):
        return False
    return record_in(here).get("running", {"name": ""})["name"].endswith("hangs")


def a_worker_lives(here: Path) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            line = (process / "cmdline").read_bytes()
            if b"--end" in line and str(here).encode() in line:
                return True
    return False


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_stopped_run_leaves_no_worker_and_is_resumed(here: Path, how: signal.Signals) -> None:
    program = f"""
from pathlib import Path
from benchmarks import machine
from benchmarks.suite import gpu
machine.output_of = lambda *command: None
machine.RESULTS, gpu.LOG = Path({str(here)!r}, "results"), Path({str(here)!r}, "log")
gpu.main("--device", "cpu", "--suite", "tiny_suite")
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: hangs(here))
    assert a_worker_lives(here)
    process.send_signal(how)
    printed = process.communicate()[0]
    wait_for(lambda: not a_worker_lives(here))
    assert "Timeout" not in (here / "log").read_text()  # it did not wait for the hang's own end
    first = record_in(here)
    if how == signal.SIGTERM:
        assert "stopped: the process was told to end" in printed and "2 not reached" in printed
        assert methods(first["not_reached"]) == ["hangs"] * 2 and "running" not in first

    (here / "mended").touch()
    assert bench("--resume", str(next(here.glob("results/*.json")))) == 1
    second = record_in(here)
    assert second["rows"][:8] == first["rows"] and second["controls"] == first["controls"]
    assert methods(second["rows"][8:]) == ["hangs"] * 2 and second["not_reached"] == []
    tried_again = methods(row for row in second["not_measured"] if row["failed"])
    assert tried_again == ["wrong"] * 2 + ["breaks"] * 2 + ["dies"] * 2
    log = (here / "gpu-bench.log").read_text()
    assert log.index("/ backward / hangs") < log.index("/ forward / wrong")  # last


def test_what_the_window_s_end_cuts_off_has_not_failed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(command: Any, seconds: float, log: Path, path: Path, *_: Any, **__: Any) -> Any:
        running = {"running": {"name": "attention / tiny / forward / SDPA"}}
        rates = {"ceilings": {"matmul_flops": {}, "copy_bytes_per_s": 1}}
        path.write_text(json.dumps(json.loads(path.read_text()) | running | rates))
        time.sleep(1)
        return -9, "killed: out of time"

    monkeypatch.setattr(machine, "run_process", cut_off)
    assert bench("--budget", "3") == 1
    record = record_in(here)
    assert record["not_measured"] == [] and len(record["not_reached"]) == 18


def test_a_record_of_something_else_is_not_resumed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, device = here / "record.json", machine.machine_info(torch.device("cpu"))["device"]
    for commit, of, reason in (("1234567", "x", "device x"), ("7654321", device, "id 7654321")):
        known = {"commit_info": {"id": commit, "dirty": None}, "machine_info": {"device": of}}
        path.write_text(json.dumps(known))
        assert bench("--resume", str(path)) == 2
        assert f"the record is of another machine or commit: {reason}" in capsys.readouterr().out
    monkeypatch.delenv("COMMIT")
    assert bench() == 2 and "neither git nor $COMMIT" in capsys.readouterr().out


def test_dry_run_on_a_bare_machine(here: Path) -> None:
    """Order, estimated seconds and their sum, without the packages that only tests need."""
    blocked = "pytest pytest_benchmark hypothesis matplotlib omegaconf PIL sklearn tqdm".split()
    program = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))  # cannot be imported
from benchmarks.suite import gpu
for suite in ("tiny_suite", "benchmarks.suite.entries"):
    assert gpu.main("--dry-run", "--suite", suite) == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, [*lines[-1:], done.stderr]
    assert lines[2].split(maxsplit=4)[:4] == ["121", "s", "0.5", "s"]
    assert [lines[3], lines[8], *lines[21:23]] == [
        "ours: 2 entries, 1 s",
        "rival and dense: 4 entries, 2 s",
        "rest: 12 entries, 6 s",
        "18 entries, 1 compilations, 138 s of 540 s",
    ]
