"""Everything that needs a GPU, in one command: ``python tests/gpu/check.py`` from the repository's
root, with the Python that holds torch. Builds for the GPU that is here, runs the groups below, each
in a process of its own, and prints a table last.

The record, ``benchmarks/results/gpu-check-<device>-<date>-<commit>.json``, is rewritten after each
test, so that what was learned outlives a hang or a kill; ``$OUT``, where set, gets a copy. A test
that takes its process down, or says nothing for STALL_S, counts as failed, and its group goes on
with the tests behind it. The commit is git's, else ``$COMMIT``.

Exit status: 0 all passed, 1 something failed, 2 nothing ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "results" / "gpu-check.log"
BUDGET_S = 460
STALL_S = 90
MESSAGE_CHARS = 3000


@dataclasses.dataclass(frozen=True)
class Group:
    name: str
    pytest_args: tuple[str, ...]
    budget_s: int


CALLS = ("tests/test_pb_relax_layer_norm.py", "tests/test_sandwich_residual.py")
# What tells most comes first.
GROUPS = (
    Group("primitives", ("tests/gpu/test_primitives.py",), 60),
    Group("attention", ("tests/test_attention_kernels.py", "-k", "cuda"), 120),
    Group("attention, large", ("tests/gpu/test_attention.py",), 90),
    Group("layer norm", ("tests/test_layer_norm_kernels.py", "-k", "cuda"), 100),
    Group("layer norm, large", ("tests/gpu/test_layer_norm.py",), 80),
    Group("layer norm, calls", (*CALLS, "-k", "cuda"), 80),
    Group("streams and graphs", ("tests/gpu/test_streams.py",), 90),
    Group("wiring", ("tests/test_backends.py", "-k", "cuda or takes_cpu_tensors"), 90),
    Group("sanitizer", ("tests/gpu/test_sanitizer.py",), 120),
)


def save(record: dict[str, Any], path: Path) -> None:
    """Whole or not at all, here and under $OUT."""
    text = json.dumps(record, indent=1)
    for folder in filter(None, (str(path.parent), os.environ.get("OUT"))):
        target = Path(folder) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(target)


class Recorder:
    """The pytest plugin of one group: leaves out what is on record, records the rest."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.record = path, json.loads(path.read_text())
        self.group = self.record["groups"][name]

    def pytest_configure(self, config: pytest.Config) -> None:
        import hypothesis

        # A failing example as it is drawn: shrinking it would take the time of the other tests.
        phases = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate")]
        current = hypothesis.settings()
        hypothesis.settings.register_profile("gpu-check", current, phases=phases)
        hypothesis.settings.load_profile("gpu-check")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = {test["id"] for test in self.group["tests"]}
        items[:] = [item for item in items if item.nodeid not in known]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.group["error"] = f"{report.nodeid}: {report.longrepr}"[-MESSAGE_CHARS:]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.group["running"] = nodeid
        save(self.record, self.path)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tests = self.group["tests"]
        if not tests or tests[-1]["id"] != report.nodeid:
            tests.append({"id": report.nodeid, "outcome": "passed", "seconds": 0.0})
        test = tests[-1]
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        test |= {str(key): value for key, value in report.user_properties}
        if report.outcome != "passed":
            test["outcome"] = report.outcome
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else None
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr)
            test["reason"] = (reason or (crash.message if crash else text))[:MESSAGE_CHARS]
            if report.outcome == "failed":
                test["text"] = text[-MESSAGE_CHARS:]

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.group["running"] = None
        save(self.record, self.path)
        test = self.group["tests"][-1]
        if test["outcome"] == "failed" and not context_lives():
            test["reason"] = f"[CUDA context lost] {test['reason']}"
            save(self.record, self.path)
            os._exit(3)  # the context cannot be mended in this process

    def pytest_sessionfinish(self) -> None:
        self.group["finished"] = True
        save(self.record, self.path)


def context_lives() -> bool:
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_process(
    command: list[str], seconds: float, watch: Path | None = None, **variables: str
) -> tuple[int, str | None]:
    """Run to the log; the exit status, and why it was killed or died, if it did not exit."""
    LOG.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    begin = time.time()
    with LOG.open("a") as log:
        print(f"\n$ {' '.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        killed = None
        while process.poll() is None and killed is None:
            time.sleep(0.1)
            last_word = max(begin, watch.stat().st_mtime if watch else time.time())
            if time.time() - begin > seconds:
                killed = f"killed: out of time after {seconds:.0f} s"
            elif time.time() - last_word > STALL_S:
                killed = f"killed: no word for {STALL_S} s"
        if killed is not None:
            os.killpg(process.pid, 9)
            return process.wait(), killed
    status = process.returncode
    return status, f"died with signal {-status}" if status < 0 else None


def run_group(group: Group, path: Path, deadline: float) -> None:
    """All tests of a group, in as many processes as they take down."""
    record = json.loads(path.read_text())
    empty: dict[str, Any] = {
        "seconds": 0.0,
        "finished": False,
        "running": None,
        "error": None,
        "tests": [],
    }
    record["groups"][group.name] = empty
    save(record, path)
    begin = time.time()
    end = min(deadline, begin + group.budget_s)
    done = -1
    while True:
        command = [sys.executable, str(Path(__file__)), "--record", str(path)]
        command += ["--run", group.name, "--", *group.pytest_args]
        _, lost = run_process(command, max(end - time.time(), 1), path)
        record = json.loads(path.read_text())
        this = record["groups"][group.name]
        this["seconds"] = round(time.time() - begin, 1)
        if this["running"] is not None:
            test = {"id": this["running"], "outcome": "failed", "seconds": None}
            test["reason"] = lost or "its process ended"
            known = [test["id"] for test in this["tests"]]
            if this["running"] in known:  # it had reported, and then hung in its teardown
                del this["tests"][known.index(this["running"]) :]
            this["tests"].append(test)
            this["running"] = None
        progress, done = len(this["tests"]) > done, len(this["tests"])
        if not this["finished"] and (time.time() >= end or not progress):
            tail = LOG.read_text()[-400:].strip().splitlines()
            this["error"] = lost or f"not finished; {LOG.name} ends: {tail[-1] if tail else ''}"
        save(record, path)
        if this["finished"] or this["error"]:
            return


def run_build(path: Path, architecture: str) -> bool:
    """The kernels, then the host model beside them; whether the kernels are there."""
    record = json.loads(path.read_text())
    tests: list[dict[str, Any]] = []
    record["groups"]["build"] = {"seconds": 0.0, "finished": True, "error": None, "tests": tests}
    for name, with_host_model in (("kernels", "0"), ("host model", "1")):
        begin = time.time()
        status, killed = run_process(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            150,
            COGVIEW_KERNELS_CUDA="1",
            COGVIEW_KERNELS_HOST_MODEL=with_host_model,
            TORCH_CUDA_ARCH_LIST=architecture,
            MAX_JOBS=str(os.cpu_count()),
        )
        test = {"id": name, "outcome": "passed", "seconds": round(time.time() - begin, 1)}
        if status != 0:
            lines = LOG.read_text()[-MESSAGE_CHARS:].strip().splitlines()
            errors = [line for line in lines if re.search("error|^cogview_kernels:", line)] or lines
            test |= {"outcome": "failed", "reason": killed or errors[0], "text": "\n".join(lines)}
        tests.append(test)
        record["groups"]["build"]["seconds"] = round(sum(test["seconds"] for test in tests), 1)
        save(record, path)
    return tests[0]["outcome"] == "passed"


def table(record: dict[str, Any]) -> tuple[str, bool]:
    """One row for each group and one line for its first failure; whether all is well. A group in
    which nothing passed is not well."""
    rows = [f"{'group':20} {'passed':>6} {'failed':>6} {'skipped':>7} {'seconds':>7}  worst error"]
    well = True
    for name, group in record["groups"].items():
        tests = group["tests"]
        count = {
            outcome: sum(test["outcome"] == outcome for test in tests)
            for outcome in ("passed", "failed", "skipped")
        }
        ratios = [test["error_ratio"] for test in tests if "error_ratio" in test]
        worst = f"{max(ratios):.2f} of allowed" if ratios else "-"
        row = f"{name:20} {count['passed']:6} {count['failed']:6} {count['skipped']:7}"
        rows.append(f"{row} {group['seconds']:7.1f}  {worst}")
        failures = [test for test in tests if test["outcome"] == "failed"]
        if failures:
            reason = " ".join(failures[0]["reason"].split())[:150]
            rows.append(f"    {failures[0]['id'].split('::')[-1]}: {reason}")
        if group["error"]:
            rows.append(f"    stopped: {' '.join(group['error'].split())[-150:]}")
        if not count["passed"] and not failures:
            reasons = sorted({str(test.get("reason")) for test in tests}) or ["no tests"]
            rows.append(f"    nothing passed: {reasons[0][:150]}")
        well = well and not failures and not group["error"] and count["passed"] > 0
    return "\n".join(rows), well


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def why_nothing_runs() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device that it can use"
    return None


def describe() -> dict[str, Any]:
    """The machine and what stands on it."""
    import torch

    commit = output_of("git", "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT")
    changed = output_of("git", "status", "--porcelain", "-uno")
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    query = f"--query-gpu={','.join(fields)}"
    answer = output_of("nvidia-smi", "--id=0", query, "--format=csv,noheader")
    nvcc = re.search(r"release \S+ (\S+)", output_of("nvcc", "--version") or "")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return {
        "commit": (commit or "unknown") + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if capability else None,
        "compute_capability": capability,
        "nvidia_smi": dict(zip(fields, answer.split(", "), strict=False)) if answer else None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvcc": nvcc.group(1) if nvcc else None,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def check(groups: tuple[Group, ...], path: Path, architecture: str | None) -> bool:
    """Build for ``architecture``, unless ``None``; run the groups; print the table."""
    begin = time.time()
    LOG.unlink(missing_ok=True)
    save({**describe(), "groups": {}}, path)
    built = architecture is None or run_build(path, architecture)
    for group in groups:
        if (built or group.name == "primitives") and time.time() < begin + BUDGET_S:
            print(f"{group.name} ...", flush=True)
            run_group(group, path, begin + BUDGET_S)
    record = json.loads(path.read_text())
    if os.environ.get("OUT") and LOG.exists():
        shutil.copy(LOG, os.environ["OUT"])
    text, well = table(record)
    print(f"\n{text}\nrecord: {path}")
    missing = [group.name for group in groups if group.name not in record["groups"]]
    if missing:
        print(f"not run: {', '.join(missing)}")
    return well and not missing


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, and run everything that needs a GPU.")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one group, in this process
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("pytest_args", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        options = ["-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=short"]
        plugin = Recorder(arguments.record, arguments.run)
        return int(pytest.main([*options, *arguments.pytest_args], plugins=[plugin]))
    reason = why_nothing_runs()
    if reason is not None:
        print(f"gpu-check: nothing ran, as {reason}")
        return 2
    description = describe()
    major, minor = description["compute_capability"]
    device = re.sub(r"\W+", "-", description["device"]).strip("-").lower()
    name = f"gpu-check-{device}-{description['date'][:10]}-{description['commit']}.json"
    path = ROOT / "benchmarks" / "results" / name.replace("+", "-")
    return 0 if check(GROUPS, path, f"{major}.{minor}" + ("a" if major == 9 else "")) else 1


if __name__ == "__main__":
    sys.exit(main())
