"""``make gpu-bench`` on the CPU: entries that run, are wrong, raise, die or hang; the end of the
time budget; resuming from an earlier record."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import test_report

from benchmarks.suite import entries as suite
from benchmarks.suite import gpu as gpu_bench
from benchmarks.suite import measure

ROOT = Path(__file__).resolve().parents[1]

# A suite with one small case: the portable path, and methods that fail in every way.
SUITE = """
import os, time
import cogview_kernels as ck
from benchmarks.suite import measure
from benchmarks.suite import entries as suite
from benchmarks.suite.cases import AttentionCase
from benchmarks.suite.methods import Method
from benchmarks.suite.entries import NotMeasured, check, problem_of, run

measure.ceilings = lambda device: {"matmul_flops": {"float32": 1e9}, "copy_bytes_per_s": 1e9}
measure.CPU_FLUSH_BYTES = 1 << 10
suite.BUDGET_S = {"cpu": 0.001}

def method(name, how, why_not=lambda case, device: None):
    def prepare(case, layout, device):
        def attention(q, k, v):
            return how(ck.three_region_attention(q, k, v, layout))
        return attention
    return Method(name, "three-region", prepare, why_not)

def breaks(out):
    raise ValueError("of no use")

METHODS = (
    method("cogview_kernels", lambda out: out),
    method("SDPA, somehow", lambda out: out * 1),
    method("elsewhere", breaks, lambda case, device: "it has no kernel for CPU"),
    method("wrong", lambda out: out * 1.01),
    method("breaks", breaks),
    method("dies", lambda out: os.abort()),
    method("hangs", lambda out: time.sleep(60)),
    method("last", lambda out: out + 0),
)

def entries(device_type):
    case = AttentionCase(
        64, 16, 2, 8, num_heads=2, head_dim=16, text_len=4, dtype="float32"
    )
    return [
        suite.Entry(case, work, method, ("fixed",))
        for method in METHODS
        for work in ("forward", "backward")
    ]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the suite, the results and $OUT, for this process and its worker."""
    (tmp_path / "tiny_suite.py").write_text(SUITE)
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COMMIT", "1234567")
    monkeypatch.setattr(measure, "output_of", lambda *command: None)  # as without git
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu_bench, "LOG", tmp_path / "gpu-bench.log")
    monkeypatch.setattr(gpu_bench, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_bench, "COMPILED", tmp_path / "compiled")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    words = ["gpu_bench.py", "--device", "cpu", "--suite", "tiny_suite", *arguments]
    monkeypatch.setattr(sys, "argv", words)
    return gpu_bench.main()


def records(here: Path) -> list[dict[str, Any]]:
    """Oldest first, without the partial file of a writer that was killed."""
    paths = sorted(here.glob("results/*.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in paths]


def test_outcomes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_bench, "ENTRY_S", 4)
    assert run(monkeypatch) == 1
    printed = capsys.readouterr().out

    (record,) = records(here)
    name = next((here / "results").iterdir()).name
    assert name.startswith("suite-") and name.endswith("-1234567.json")
    assert name == Path(printed.split()[-1]).name
    assert record == json.loads((here / "out" / name).read_text())
    assert (here / "out" / "gpu-bench.log").exists()
    rows = {row["name"].split(" / ", 2)[2]: row for row in record["benchmarks"]}
    methods = ("cogview_kernels", "SDPA, somehow", "last")
    assert list(rows) == [f"{work} / {m}" for m in methods for work in ("forward", "backward")]
    details = rows["forward / last"]["extra_info"]
    assert (details["op"], details["computes"], details["sweeps"]) == (
        "attention",
        "three-region",
        ["fixed"],
    )
    assert 0 < details["errors"]["dq"] < details["errors_allowed"]["dq"]

    reasons: dict[str, set[str]] = {}
    for missing in record["not_measured"]:
        reasons.setdefault(missing["method"], set()).add(missing["reason"])
    assert reasons.pop("wrong").pop().startswith("wrong: relative error against float64, out: 0.01")
    assert reasons == {
        "elsewhere": {"it has no kernel for CPU"},
        "breaks": {"ValueError: of no use"},
        "dies": {"its process died with signal 6"},
        "hangs": {"killed: no answer in 4 s"},
    }
    failed = Counter(missing["method"] for missing in record["not_measured"] if missing["failed"])
    assert failed == {"wrong": 2, "breaks": 2, "dies": 2, "hangs": 2}
    assert printed.splitlines()[-2] == "6 measured, 2 cannot run here, 8 failed, 0 not reached"
    assert "wrong: relative error" in printed
    assert record["clocks"][0]["before"] == "the first" and record["not_reached"] == []

    compare = [
        sys.executable,
        "-m",
        "pytest_benchmark",
        "compare",
        str(here / "results" / name),
    ]
    done = subprocess.run(compare, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0 and done.stdout.count("/ last") == 2, done.stdout + done.stderr


def started_run(here: Path) -> subprocess.Popen[str]:
    """A run in another process, in the middle of an entry."""
    words = ["gpu_bench.py", "--device", "cpu", "--suite", "tiny_suite"]
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'benchmarks')!r}]; import gpu_bench\n"
        "from pathlib import Path\n"
        f"here = Path({str(here)!r})\n"
        "gpu_bench.LOG, gpu_bench.RESULTS = here / 'gpu-bench.log', here / 'results'\n"
        "import measure; measure.output_of = lambda *command: None\n"
        f"gpu_bench.SAVE_S, sys.argv = 0, {words!r}\n"
        "sys.exit(gpu_bench.main())"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    begin = time.time()
    while not ((here / "results").is_dir() and any(here.glob("results/*.json"))):
        assert process.poll() is None and time.time() < begin + 60
        time.sleep(0.05)
    return process


def workers(here: Path) -> list[str]:
    """The command lines of this test's workers that are alive."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if "--work" in command and f"OUT={here / 'out'}".encode() in variables:
            found.append(command)
    return found


def wait_for_no_worker(here: Path) -> None:
    end = time.time() + 10
    while workers(here):
        assert time.time() < end, workers(here)
        time.sleep(0.05)


def test_sigterm_prints_the_table(here: Path) -> None:
    process = started_run(here)
    assert workers(here)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped: it was told to end" in printed and "not reached" in printed
    (record,) = records(here)
    assert record["not_reached"]
    wait_for_no_worker(here)


@pytest.mark.slow
def test_a_hanging_worker_does_not_outlive_a_killed_run(here: Path) -> None:
    process = started_run(here)
    end = time.time() + 60
    while "/ hangs" not in (here / "gpu-bench.log").read_text():
        assert time.time() < end
        time.sleep(0.05)
    assert workers(here)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for_no_worker(here)


def test_a_run_resumes_where_the_last_one_ended(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is killed in the middle of an entry; the second runs out of time."""
    process = started_run(here)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for_no_worker(here)
    (first,) = records(here)
    assert first["benchmarks"] or first["not_measured"]

    path = next(here.glob("results/*.json"))
    args = ["--resume", str(path), "--only", "forward"]
    assert run(monkeypatch, *args, "--budget", "7") == 1  # the budget ends while one hangs
    (second,) = records(here)
    count = len(first["benchmarks"])
    assert second["benchmarks"][:count] == first["benchmarks"]
    assert {row["extra_info"]["method"] for row in second["benchmarks"]} >= {"cogview_kernels"}
    assert [name.split(" / ")[-1] for name in second["not_reached"][-2:]] == ["hangs", "last"]
    assert not any("hangs" in missing["name"] for missing in second["not_measured"])
    assert f"{len(second['not_reached'])} not reached" in capsys.readouterr().out

    monkeypatch.setenv("COMMIT", "7654321")
    assert run(monkeypatch, *args) == 2
    assert "is of another commit" in capsys.readouterr().out
    monkeypatch.delenv("COMMIT")
    assert run(monkeypatch) == 2
    assert "neither git nor $COMMIT names the commit" in capsys.readouterr().out


def test_the_table_fits_the_output_that_is_shown() -> None:
    record = test_report.made_up(test_report.H200)
    text = gpu_bench.table(record)
    lines = text.splitlines()
    assert len(text) <= gpu_bench.TABLE_CHARS + 100 and max(map(len, lines)) <= 120
    ops = [entry.split()[0] for entry in lines if "TFLOP/s" in entry]
    assert ops[:5] == ["attention", "decode", "layer_norm", "sandwich_residual", "training_step"]

    case = "B4 H40 S4224 D64 w128 n2 P256 T64 bfloat16"
    times = {
        row["extra_info"]["method"]: statistics.median(row["stats"]["data"])
        for row in record["benchmarks"]
        if (row["extra_info"]["case_name"], row["extra_info"]["work"]) == (case, "backward")
    }
    ours = times["cogview_kernels"]
    found = lines[lines.index(case) + 2].split()
    assert found[:2] == ["backward", f"{ours * 1e6:.0f}"]
    cuts = times["SDPA cuDNN"], times["FlexAttention, gathered pivots, autotuned"]
    assert (found[-5], found[-3]) == tuple(f"{seconds / ours:.2f}x" for seconds in cuts)
    assert lines[-1].endswith("more lines: see the record")


BLOCKED = ("pytest", "pytest_benchmark", "hypothesis", "matplotlib", "omegaconf", "sentencepiece")
BLOCKED += ("PIL", "sklearn", "tqdm", "pybind11", "yaml")


def test_dry_run_lists_every_entry_on_a_bare_machine() -> None:
    """No method that can run on a CPU fails there."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))  # cannot be imported
from benchmarks.suite import gpu as gpu_bench
sys.argv = ["gpu_bench.py", "--dry-run"]
sys.exit(gpu_bench.main())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, [line for line in lines if "fails" in line] or done.stderr
    expected = [entry.id for entry in suite.entries("cuda")]
    assert [line[30:].rpartition(" [")[0] for line in lines[: len(expected)]] == expected
    assert lines[-1].split() == [str(len(expected)), "entries"]
    runs = {line[:-7].rpartition(" / ")[2] for line in lines if line.endswith(" [runs]")}
    assert {"cogview_kernels", "CogView's formulation"} <= runs
    prepared = {line.rpartition(" / ")[2] for line in lines if line.endswith(" [is prepared]")}
    assert {"SDPA flash [is prepared]", "FlexAttention, gathered pivots [is prepared]"} <= prepared
