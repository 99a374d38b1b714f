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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.suite import gpu

ROOT = Path(__file__).resolve().parents[1]

# A suite without torch's kernels: the runner's outcomes do not depend on what is timed.
SUITE = """
import dataclasses, os, time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from benchmarks.suite import measure

measure.ceilings = lambda device: {"matmul_flops": {"float32": 1e12}, "copy_bytes_per_s": 1e12}
measure.CPU_FLUSH_BYTES = 1 << 10
measure.BUDGET_S = {"cpu": 0.001}
measure.peak_bytes = lambda call, device: 5 << 20

class NotMeasured(Exception):
    def __init__(self, reason, failed=False):
        super().__init__(reason)
        self.failed = failed

def breaks():
    raise ValueError("of no use")

def is_wrong():
    raise NotMeasured("wrong: relative error 0.01", failed=True)

def has_no_kernel():
    raise NotMeasured("it has no kernel for CPU")

@dataclasses.dataclass(frozen=True)
class Method:
    name: str
    compiles: bool
    graph: bool = False

@dataclasses.dataclass(frozen=True)
class Case:
    op: str = "attention"
    name: str = "tiny"

@dataclasses.dataclass(frozen=True)
class Entry:
    work: str
    name: str
    call: Any
    stage: str
    role: str = ""
    seconds = 0.5
    case = Case()

    @property
    def method(self):
        return Method(self.name, self.name == "SDPA")

    @property
    def id(self):
        return f"attention / tiny / {self.work} / {self.name}"

    @property
    def group(self):
        return f"attention / tiny / {self.work}"

    def info(self):
        computes = "dense causal" if self.role == "dense" else "three-region"
        case = dict(dtype="float32", seqlen=8, key_window_times=1, batch=1)
        return dict(op="attention", work=self.work, case=case, case_name="tiny", sweeps=["fixed"],
                    stage=self.stage, method=self.name, role=self.role, computes=computes,
                    flops=1000, bytes=1000, attended_fraction=0.5)

METHODS = (
    ("cogview_kernels", lambda: time.sleep(1e-3), "ours", "ours"),
    ("SDPA", lambda: time.sleep(2e-3), "rival and dense", "dense"),
    ("Flex", lambda: time.sleep(3e-3), "rival and dense", "rival"),
    ("elsewhere", has_no_kernel, "rest"),
    ("wrong", is_wrong, "rest"),
    ("breaks", breaks, "rest"),
    ("dies", os.abort, "rest"),
    ("hangs", lambda: Path(__file__).with_name("mended").exists() or time.sleep(60), "rest"),
    ("last", lambda: 0, "rest"),
)

def entries(device_type):
    works = "forward", "backward"
    entries = [Entry(work, *rest) for rest in METHODS for work in works]
    return [entry for entry in entries if entry.id != "attention / tiny / backward / dies"]

def ready(entry, device):
    entry.call()
    return SimpleNamespace(call=entry.call, info=entry.info())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the suite, the results and $OUT, for this process and its workers."""
    (tmp_path / "tiny_suite.py").write_text(SUITE)
    for name, value in (
        ("OUT", str(tmp_path / "out")),
        ("PYTHONPATH", str(tmp_path)),
        ("OMP_NUM_THREADS", "1"),
        ("COMMIT", "1234567"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(machine, "output_of", lambda *command: None)  # as without git
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "LOG", tmp_path / "gpu-bench.log")
    monkeypatch.setattr(gpu, "ENTRY_S", 5)
    return tmp_path


def bench(*words: str) -> int:
    return gpu.main("--device", "cpu", "--suite", "tiny_suite", *words)


def record_of(here: Path) -> dict[str, Any]:
    (path,) = here.glob("results/*.json")
    return json.loads(path.read_text())


def test_outcomes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 1
    printed = capsys.readouterr().out
    record = record_of(here)
    (path,) = here.glob("results/*.json")
    assert path.name.startswith("suite-") and path.name.endswith("-1234567.json")
    assert record == json.loads((here / "out" / path.name).read_text())
    assert "forward / last" in (here / "out" / "gpu-bench.log").read_text()
    assert record["commit_info"]["dirty"] is None and "running" not in record

    rows = {row["name"].split(" / ", 2)[2]: row for row in record["rows"]}
    methods = ("cogview_kernels", "SDPA", "Flex", "last")
    assert list(rows) == [
        f"{work} / {name}" for name in methods for work in ("forward", "backward")
    ]
    sdpa = rows["forward / SDPA"]
    assert set(sdpa["seconds"]) == {"minimum", "median", "iqr", "rounds"}
    assert 2e-3 <= sdpa["seconds"]["minimum"] <= sdpa["seconds"]["median"] < 1
    assert sdpa["extra_bytes"] == 5 << 20 and sdpa["graph"] is False

    reasons = {(row["method"], row["reason"], row["failed"]) for row in record["not_measured"]}
    assert reasons == {
        ("elsewhere", "it has no kernel for CPU", False),
        ("wrong", "wrong: relative error 0.01", True),
        ("breaks", "ValueError: of no use", True),
        ("dies", "died with signal 6", True),
        ("hangs", "killed: no word for 5 s", True),  # both kinds of work at the price of one
    }
    assert len(record["not_measured"]) == 9 and record["not_reached"] == []
    assert [row["after_stage"] for row in record["drift"]] == ["ours", "rival and dense", "rest"]
    assert (
        record["drift"][0]["first_median"] == rows["forward / cogview_kernels"]["seconds"]["median"]
    )
    (control,) = record["controls"]
    assert control["name"].startswith("A/A: attention / tiny") and control["difference"] >= 0

    lines = printed.splitlines()
    assert lines[-2] == "8 measured, 2 cannot run here, 7 failed, 0 not reached"
    assert (
        lines[-1] == f"record: {path}" and "failed: attention / tiny / forward / wrong" in printed
    )
    ours = rows["forward / cogview_kernels"]["seconds"]["median"]
    (line,) = [line for line in lines if line.startswith("forward ")]
    assert line.split()[1] == f"{ours * 1e6:.1f}" and line.split()[5] == "5.0"  # MiB
    for name in ("SDPA", "Flex"):
        assert f"{rows[f'forward / {name}']['seconds']['median'] / ours:.2f}x" in line
    assert len(line) < 160


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.time() + 30
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

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate).start()
    assert bench() == 1
    signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr().out
    assert "stopped: the process was told to end" in printed and "4 not reached" in printed
    assert not a_worker_lives(here)
    first = record_of(here)
    assert [name.split(" / ")[-1] for name in first["not_reached"]] == ["hangs"] * 2 + ["last"] * 2

    (here / "mended").touch()
    (path,) = here.glob("results/*.json")
    assert bench("--resume", str(path)) == 1
    signal.signal(signal.SIGTERM, before)
    second = record_of(here)
    assert second["rows"][:6] == first["rows"] and second["controls"] == first["controls"]
    assert [row["method"] for row in second["rows"][6:]] == ["hangs"] * 2 + ["last"] * 2
    tried_again = [row["method"] for row in second["not_measured"] if row["failed"]]
    assert tried_again == ["wrong"] * 2 + ["breaks"] * 2 + ["dies"]


@pytest.mark.slow
def test_a_hanging_worker_does_not_outlive_a_killed_run(here: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from benchmarks import machine
from benchmarks.suite import gpu
here = Path({str(here)!r})
machine.RESULTS, gpu.LOG = here / "results", here / "log"
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
    def cut_off(
        command: list[str], seconds: float, log: Path, path: Path, *_: Any, **__: Any
    ) -> Any:
        record = json.loads(path.read_text())
        record["ceilings"] = {"matmul_flops": {}, "copy_bytes_per_s": 1}
        record["running"] = {"name": "attention / tiny / forward / SDPA"}
        path.write_text(json.dumps(record))
        return -9, "killed: out of time"

    monkeypatch.setattr(machine, "run_process", cut_off)
    assert bench("--budget", "1") == 1
    record = record_of(here)
    assert record["not_measured"] == [] and len(record["not_reached"]) == 17


def test_a_record_of_something_else_is_not_resumed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = here / "record.json"
    commit = {"id": "7654321", "dirty": None}
    known = {"commit_info": commit, "machine_info": {"device": "another"}, "only": ""}
    path.write_text(json.dumps(known))
    for reason in ("of another commit, 7654321", "of another device, another"):
        assert bench("--resume", str(path)) == 2
        assert reason in capsys.readouterr().out
        monkeypatch.setenv("COMMIT", "7654321")
    monkeypatch.delenv("COMMIT")
    assert bench() == 2 and "neither git nor $COMMIT" in capsys.readouterr().out


def test_dry_run_on_a_bare_machine(here: Path) -> None:
    """Order, estimated seconds and their sum, without the packages that only tests need."""
    blocked = (
        "pytest pytest_benchmark hypothesis matplotlib omegaconf sentencepiece PIL sklearn tqdm"
    )
    program = f"""
import sys
sys.modules.update(dict.fromkeys({blocked.split()}))  # cannot be imported
from benchmarks.suite import gpu
sys.exit(gpu.main("--dry-run", *sys.argv[1:]))
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{here}"}
    for words, status in ((["--suite", "tiny_suite"], 0), ([], None)):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment
        )
        assert done.returncode == status or status is None, done.stderr
        lines = done.stdout.splitlines()
        assert lines[-1].endswith(f" of {gpu.WINDOW_S} s"), done.stderr
        if status == 0:
            assert lines[-1] == "17 entries, 1 compilations, 138 s of 540 s"
            assert lines[1].split() == ["120", "s", "0.5", "s", *lines[1].split()[4:]]
            assert lines[-4:-1] == [
                "ours: 2 entries, 1 s",
                "rival and dense: 4 entries, 2 s",
                "rest: 11 entries, 6 s",
            ]
