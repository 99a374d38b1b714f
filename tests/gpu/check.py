"""Everything that needs a GPU, in one command: ``python tests/gpu/check.py`` from the repository's
root, with the Python that has torch. Builds for the GPU of the machine, runs the groups below, each
in a process of its own, and prints a table last.

The record, ``benchmarks/results/gpu-check-<device>-<date>-<commit>.json``, is rewritten after each
test, so that results outlive a hang or a kill; ``$OUT``, where set, gets a copy. A test that ends
its process, or reports nothing for STALL_S seconds, counts as failed, and its group continues with
the next test. The commit is git's, else ``$COMMIT``.

Exit status: 0 all passed, 1 something failed, 2 nothing ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import (
    MESSAGE_CHARS,
    RESULTS,
    ROOT,
    architecture_here,
    build,
    commit_info,
    context_lives,
    machine_info,
    now,
    record_name,
    run_process,
    save_log,
    save_record,
    why_nothing_runs,
)

LOG = ROOT / "results" / "gpu-check.log"
BUDGET_S = 460
STALL_S = 90
VERIFY_S = 60


@dataclasses.dataclass(frozen=True)
class Group:
    name: str
    pytest_args: tuple[str, ...]
    budget_s: int


CALLS = ("tests/test_pb_relax_layer_norm.py", "tests/test_sandwich_residual.py")
# The most informative groups come first. A group may take budget_s seconds, all of them BUDGET_S.
GROUPS = (
    Group("primitives", ("tests/gpu/test_primitives.py",), 60),
    Group("attention", ("tests/test_attention_kernels.py", "-k", "cuda"), 120),
    Group("attention, large", ("tests/gpu/test_attention.py",), 90),
    Group("layer norm", ("tests/test_layer_norm_kernels.py", "-k", "cuda"), 100),
    Group("layer norm, large", ("tests/gpu/test_layer_norm.py",), 80),
    Group("layer norm, calls", (*CALLS, "-k", "cuda"), 80),
    Group("streams and graphs", ("tests/gpu/test_streams.py",), 150),
    Group("wiring", ("tests/test_backends.py", "-k", "cuda or takes_cpu_tensors"), 90),
    Group("timing", ("tests/gpu/test_measure.py",), 40),
    Group("sanitizer", ("tests/gpu/test_sanitizer.py",), 120),
)


class Recorder:
    """The pytest plugin of one group: leaves out recorded tests, and records the others."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.record = path, json.loads(path.read_text())
        self.group = self.record["groups"][name]

    def pytest_configure(self, config: pytest.Config) -> None:
        import hypothesis

        # A failing example is reported as drawn: shrinking it would take the other tests' time.
        phases = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate")]
        current = hypothesis.settings()
        hypothesis.settings.register_profile(
            "gpu-check", current, phases=phases, max_examples=6 * current.max_examples
        )
        hypothesis.settings.load_profile("gpu-check")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = {test["id"] for test in self.group["tests"]}
        items[:] = [item for item in items if item.nodeid not in known]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.group["error"] = f"{report.nodeid}: {report.longrepr}"[-MESSAGE_CHARS:]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.group["running"] = nodeid
        save_record(self.record, self.path)

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
        save_record(self.record, self.path)
        test = self.group["tests"][-1]
        if test["outcome"] == "failed" and not context_lives():
            test["reason"] = f"[CUDA context lost] {test['reason']}"
            save_record(self.record, self.path)
            os._exit(3)  # this process cannot get a new context

    def pytest_sessionfinish(self) -> None:
        self.group["finished"] = True
        save_record(self.record, self.path)


def run_group(group: Group, path: Path, deadline: float) -> None:
    """Run all tests of a group. Each test that ends its process costs a new one."""
    record = json.loads(path.read_text())
    empty: dict[str, Any] = {
        "seconds": 0.0,
        "finished": False,
        "running": None,
        "error": None,
        "tests": [],
    }
    record["groups"][group.name] = empty
    save_record(record, path)
    begin = time.time()
    end = min(deadline, begin + group.budget_s)
    done = -1
    while True:
        command = [sys.executable, str(Path(__file__)), "--record", str(path)]
        command += ["--run", group.name, "--", *group.pytest_args]
        _, lost = run_process(command, max(end - time.time(), 1), LOG, path, STALL_S)
        record = json.loads(path.read_text())
        this = record["groups"][group.name]
        this["seconds"] = round(time.time() - begin, 1)
        if this["running"] is not None:
            test = {"id": this["running"], "outcome": "failed", "seconds": None}
            test["reason"] = lost or "its process ended"
            known = [test["id"] for test in this["tests"]]
            if this["running"] in known:  # it reported an outcome, then hung in its teardown
                del this["tests"][known.index(this["running"]) :]
            this["tests"].append(test)
            this["running"] = None
        progress, done = len(this["tests"]) > done, len(this["tests"])
        if not this["finished"] and (time.time() >= end or not progress):
            tail = LOG.read_text()[-400:].strip().splitlines()
            this["error"] = lost or f"not finished; {LOG.name} ends: {tail[-1] if tail else ''}"
        save_record(record, path)
        if this["finished"] or this["error"]:
            return


def run_build(path: Path, architecture: str) -> bool:
    """Build the kernels, then the host model too; whether the kernels were built."""
    record = json.loads(path.read_text())
    tests: list[dict[str, Any]] = []
    record["groups"]["build"] = {"seconds": 0.0, "finished": True, "error": None, "tests": tests}
    for name in ("kernels", "host model"):
        tests.append({"id": name, **build(architecture, LOG, name == "host model")})
        record["groups"]["build"]["seconds"] = round(sum(test["seconds"] for test in tests), 1)
        save_record(record, path)
    return tests[0]["outcome"] == "passed"


def table(record: dict[str, Any]) -> tuple[str, bool]:
    """One row for each group and one line for its first failure; whether all groups passed. A group
    without a passed test did not."""
    rows = [f"{'group':20} {'passed':>6} {'failed':>6} {'skipped':>7} {'seconds':>7}  worst error"]
    passed = True
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
        passed = passed and not failures and not group["error"] and count["passed"] > 0
    return "\n".join(rows), passed


def check(groups: tuple[Group, ...], path: Path | None, architecture: str | None) -> bool:
    """Build for ``architecture``, unless ``None``; run the groups; print the table. The record goes
    to ``path``, else to RESULTS."""
    begin = time.time()
    LOG.unlink(missing_ok=True)
    import torch

    info = machine_info(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    commit, date = commit_info(), now()
    path = path or RESULTS / record_name("gpu-check", info, commit, date)
    record = {"machine_info": info, "commit_info": commit, "datetime": date, "groups": {}}
    save_record(record, path)
    built = architecture is None or run_build(path, architecture)
    for group in groups:
        if (built or group.name == "primitives") and time.time() < begin + BUDGET_S:
            print(f"{group.name} ...", flush=True)
            run_group(group, path, begin + BUDGET_S)
    record = json.loads(path.read_text())
    text, passed = table(record)
    missing = [group.name for group in groups if group.name not in record["groups"]]
    passed = passed and not missing
    if passed and architecture is not None:
        # These sources are vouched for on this GPU: users' first calls need no check of their own.
        command = [sys.executable, "-m", "cogview_kernels", "verify", "--record"]
        status, lost = run_process(command, VERIFY_S, LOG)
        passed = status == 0
        text += f"\nself-check: {'recorded' if passed else lost or 'failed'}"
    save_log(LOG)
    print(f"\n{text}\nrecord: {path}")
    if missing:
        print(f"not run: {', '.join(missing)}")
    return passed


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
    return 0 if check(GROUPS, None, architecture_here()) else 1


if __name__ == "__main__":
    sys.exit(main())
