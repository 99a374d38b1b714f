"""``make gpu-bench`` on the CPU: entries that run, are wrong, raise, die or hang; the end of the
window; resuming from an earlier record."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
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
from benchmarks.suite import measure

def quick():
    ceilings = {"matmul_flops": {"float32": 1e12}, "copy_bytes_per_s": 1e12}
    measure.ceilings = lambda device: ceilings
    measure.CPU_FLUSH_BYTES = 1 << 10
    measure.BUDGET_S = {"cpu": 0.001}
    measure.peak_bytes = lambda call, device: 5 << 20

if "--end" in sys.argv:  # in a worker
    quick()

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
    ("hangs", hangs, "rest", ""),
    ("last", lambda: 0, "rest", ""),
)
SHAPE = dict(dtype="float32", batch=1, seqlen=8, key_window_times=1)

def entry(work, name, call, stage, role):
    group = f"attention / tiny / {work}"
    computes = "dense causal" if role == "dense" else "three-region"
    info = dict(op="attention", work=work, case=SHAPE, case_name="tiny", sweeps=["fixed"],
                method=name, role=role, graph=False, computes=computes, flops=1000, bytes=1000)
    method = SimpleNamespace(name=name, compiles=name == "SDPA", graph=False)
    return SimpleNamespace(id=f"{group} / {name}", group=group, method=method, stage=stage,
                           case=SimpleNamespace(op="attention", name="tiny"), seconds=0.5,
                           call=call, info=lambda: info)

def entries(device_type):
    found = [entry(work, *rest) for rest in METHODS for work in ("forward", "backward")]
    return [entry for entry in found if entry.id != "attention / tiny / backward / dies"]

def ready(entry, device):
    entry.call()
    return SimpleNamespace(call=entry.call, info=entry.info())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the suite, the results and $OUT, for this process and its workers."""
    (tmp_path / "tiny_suite.py").write_text(SUITE)
    out = str(tmp_path / "out")
    for name, value in {"OUT": out, "PYTHONPATH": str(tmp_path), "COMMIT": "1234567"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(machine, "output_of", lambda *command: None)  # as without git
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "LOG", tmp_path / "gpu-bench.log")
    monkeypatch.setattr(gpu, "ENTRY_S", 6)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def bench(*words: str) -> int:
    return gpu.main("--device", "cpu", "--suite", "tiny_suite", *words)


def path_of(here: Path) -> Path:
    (path,) = here.glob("results/*.json")
    return path


def methods(rows: Iterable[Any]) -> list[str]:
    """Without the work, of rows or names."""
    return [(row if isinstance(row, str) else row["name"]).split(" / ")[-1] for row in rows]


def test_outcomes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 1
    lines = capsys.readouterr().out.splitlines()
    path = path_of(here)
    record = json.loads(path.read_text())
    assert path.name.startswith("suite-") and path.name.endswith("-1234567.json")
    assert record == json.loads((here / "out" / path.name).read_text())
    assert "forward / last" in (here / "out" / "gpu-bench.log").read_text()
    assert record["commit_info"]["dirty"] is None and "running" not in record

    rows = {row["name"].split(" / ", 2)[2]: row for row in record["rows"]}
    assert list(rows) == [
        f"{work} / {name}"
        for name in ("cogview_kernels", "SDPA", "Flex", "last")
        for work in ("forward", "backward")
    ]
    ours, sdpa = rows["forward / cogview_kernels"], rows["forward / SDPA"]
    assert set(sdpa["seconds"]) == {"minimum", "median", "iqr", "rounds"}
    assert 2e-3 <= sdpa["seconds"]["minimum"] <= sdpa["seconds"]["median"] < 1
    assert sdpa["extra_bytes"] == 5 << 20 and sdpa["graph"] is False
    assert {(row["method"], row["reason"], row["failed"]) for row in record["not_measured"]} == {
        ("elsewhere", "it has no kernel for CPU", False),
        ("wrong", "wrong: relative error 0.01", True),
        ("breaks", "ValueError: of no use", True),
        ("dies", "died with signal 6", True),
        ("hangs", "killed: no word for 6 s", True),  # both kinds of work at the price of one
    }
    assert [row["after_stage"] for row in record["drift"]] == ["ours", "rival and dense", "rest"]
    assert record["drift"][0]["first_median"] == ours["seconds"]["median"]
    (control,) = record["controls"]
    assert control["name"].startswith("A/A: attention / tiny") and control["difference"] >= 0

    assert lines[-1] == f"record: {path}"
    assert lines[-2] == "8 measured, 2 cannot run here, 7 failed, 0 not reached"
    (line,) = [line for line in lines if " | forward | " in line]
    for name in ("SDPA", "Flex"):
        factor = rows[f"forward / {name}"]["seconds"]["median"] / ours["seconds"]["median"]
        assert f"{factor:.2f}x ({name})" in line
    assert any("A/A" in line and 'ours again after "rest"' in line for line in lines)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.time() + 60
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def hangs(here: Path) -> bool:
    paths = list(here.glob("results/*.json"))
    running = json.loads(paths[0].read_text()).get("running") if paths else None
    return running is not None and running["name"].endswith("hangs")


def a_worker_lives(here: Path) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            line = (process / "cmdline").read_bytes()
            if b"--end" in line and str(here).encode() in line:
                return True
    return False


def test_a_terminated_run_prints_its_table_and_resumes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminate() -> None:
        wait_for(lambda: hangs(here))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    assert bench() == 1
    printed = capsys.readouterr().out
    assert "stopped: the process was told to end" in printed and "4 not reached" in printed
    assert not a_worker_lives(here)
    first = json.loads(path_of(here).read_text())
    assert methods(first["not_reached"]) == ["hangs"] * 2 + ["last"] * 2

    (here / "mended").touch()
    assert bench("--resume", str(path_of(here))) == 1
    second = json.loads(path_of(here).read_text())
    assert second["rows"][:6] == first["rows"] and second["controls"] == first["controls"]
    assert methods(second["rows"][6:]) == ["hangs"] * 2 + ["last"] * 2
    tried_again = methods(row for row in second["not_measured"] if row["failed"])
    assert tried_again == ["wrong"] * 2 + ["breaks"] * 2 + ["dies"]
    log = (here / "gpu-bench.log").read_text()
    assert log.index("/ backward / last") < log.index("/ forward / wrong")  # last


@pytest.mark.slow
def test_a_hanging_worker_does_not_outlive_a_killed_run(here: Path) -> None:
    program = f"""
from pathlib import Path
from benchmarks import machine
from benchmarks.suite import gpu
machine.RESULTS, gpu.LOG = Path({str(here)!r}, "results"), Path({str(here)!r}, "log")
gpu.main("--device", "cpu", "--suite", "tiny_suite")
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{here}"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    wait_for(lambda: hangs(here))
    assert a_worker_lives(here)
    process.kill()
    process.wait()
    wait_for(lambda: not a_worker_lives(here))


def test_what_the_window_s_end_cuts_off_has_not_failed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(command: Any, seconds: float, log: Path, path: Path, *_: Any, **__: Any) -> Any:
        running = {"running": {"name": "attention / tiny / forward / SDPA"}}
        rates = {"ceilings": {"matmul_flops": {}, "copy_bytes_per_s": 1}}
        path.write_text(json.dumps(json.loads(path.read_text()) | running | rates))
        return -9, "killed: out of time"

    monkeypatch.setattr(machine, "run_process", cut_off)
    assert bench("--budget", "1") == 1
    record = json.loads(path_of(here).read_text())
    assert record["not_measured"] == [] and len(record["not_reached"]) == 17


def test_a_record_of_something_else_is_not_resumed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, commit = here / "record.json", {"id": "7654321", "dirty": None}
    known = {"commit_info": commit, "machine_info": {"device": "another"}, "only": ""}
    path.write_text(json.dumps(known))
    for reason in ("device another", "id 7654321"):
        monkeypatch.setenv("COMMIT", "7654321" if "device" in reason else "1234567")
        known["machine_info"]["device"] = machine.machine_info(torch.device("cpu"))["device"]
        assert bench("--resume", str(path)) == 2
        assert f"the record is of another machine or commit: {reason}" in capsys.readouterr().out
        path.write_text(json.dumps(known))
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
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{here}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, [*lines[-1:], done.stderr]
    assert lines[1].split(maxsplit=4)[:4] == ["120", "s", "0.5", "s"]
    assert lines[18:22] == [
        "ours: 2 entries, 1 s",
        "rival and dense: 4 entries, 2 s",
        "rest: 11 entries, 6 s",
        "17 entries, 1 compilations, 138 s of 540 s",
    ]
