"""The suite on a machine with a GPU that is bare but for torch, triton and nvcc, in one command:
``python -m benchmarks.suite.gpu`` from the repository's root, with the Python that holds torch.
Builds for the GPU that is here, times the suite's entries in the order of the plan until all are
done or the window ends, and prints a table last.

A worker process times the entries and rewrites the record after each,
``benchmarks/results/suite-<device>-<date>-<commit>.json`` (``$OUT``, where set, gets a copy). An
entry that ends its process or takes much longer than estimated is lost, and a new worker times the
others. ``--resume RECORD`` continues an earlier run. The commit is git's, else ``$COMMIT``.

Exit status: 0 everything that can run there was timed, 1 something failed, was wrong or was not
reached, 2 nothing ran.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib
import itertools
import json
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.machine import ROOT, save_record
from benchmarks.report import records, tables
from benchmarks.suite import measure

LOG = ROOT / "results" / "gpu-bench.log"
COMPILED = ROOT / "build" / "inductor"  # a second run compiles nothing again
WINDOW_S = 540
LATE_S, ENTRY_S = 20, 75  # an entry may take so much longer than thrice its estimate; at most
LAST_S = 2  # with less time left no entry is started
# What --dry-run assumes: the build on 16 cores; start and ceilings; controls after each stage.
BUILD_S, START_S, CONTROLS_S = 100, 20, 3
LISTS = "controls", "host_time", "drift", "clocks", "not_reached", "not_measured", "rows"

Json = dict[str, Any]


class NothingRan(Exception):
    """Why."""


def planned(arguments: argparse.Namespace) -> list[Any]:
    suite = importlib.import_module(arguments.suite)
    return [entry for entry in suite.entries(arguments.device) if arguments.only in entry.id]


def pending(plan: list[Any], record: Json) -> list[Any]:
    """What has no outcome yet, in order; last, what failed in an earlier run."""
    known = {row["name"] for row in (*record["rows"], *record["not_measured"])}
    unknown = [entry for entry in plan if entry.id not in known]
    return sorted(unknown, key=lambda entry: entry.id in record["failed_before"])


def not_measured(entry: Any, reason: str, failed: bool = True) -> Json:
    return {"name": entry.id, **entry.info(), "reason": reason, "failed": failed}


# The worker.


def work(arguments: argparse.Namespace) -> int:
    """Times what is pending, until ``arguments.end``; ``running`` in the record says what it does,
    for the case that it does not return."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    suite = importlib.import_module(arguments.suite)
    plan, device, path = planned(arguments), torch.device(arguments.device), arguments.resume
    record = json.loads(path.read_text())
    # Of ours, the first entry of each operator is timed again after each stage.
    ours = [entry for entry in plan if entry.stage == "ours" and not entry.method.graph]
    first = {entry.case.op: entry for entry in reversed(ours) if entry.case.op != "training_step"}
    watched = [entry for entry in ours if entry in first.values()]

    def begin(name: str, seconds: float) -> bool:
        """Whether there is time for it. If it hangs, this process says where and ends."""
        record["running"] = {"name": name}
        save_record(record, path)
        faulthandler.dump_traceback_later(min(LATE_S + 3 * seconds, ENTRY_S), exit=True)
        return time.time() < arguments.end - LAST_S

    def control(stage: str) -> None:
        """How far our times have drifted since the first time, and the clocks. After the first
        stage, when it is known what of ours runs here, the other controls as well."""
        medians = {row["name"]: row["seconds"]["median"] for row in record["rows"]}
        known = [entry for entry in watched if entry.id in medians]
        for entry in known:
            if begin(f"{entry.id}, again", entry.seconds):
                median = timed_row(suite, entry, device)["seconds"]["median"]
                row = {"after_stage": stage, "name": entry.id, "median": median}
                record["drift"].append({**row, "first_median": medians[entry.id]})
        if device.type == "cuda" and begin("clocks", 3):
            clocks = measure.clocks_under_load(device)
            record["clocks"].append({"time": machine.now(), "after_stage": stage, **clocks})
        for entry in known[:2] if stage == "ours" else []:
            if begin(f"A/A: {entry.id}", entry.seconds):
                call = suite.ready(entry, device).call
                record["controls"].append(measure.a_a_control(entry.id, call, device))
        if stage == "ours" and begin("host time", 3):
            from benchmarks.suite import host_time

            record["host_time"] = host_time.rows(device)

    if not record["ceilings"] and begin("ceilings", 10):
        record["ceilings"] = measure.ceilings(device)
        if device.type == "cuda" and begin("empty kernels", 3):
            record["controls"] = measure.empty_kernels(device)
    for stage, group in itertools.groupby(pending(plan, record), lambda entry: entry.stage):
        for entry in itertools.takewhile(lambda entry: begin(entry.id, entry.seconds), group):
            print(f"{time.strftime('%H:%M:%S')} {entry.id}", file=sys.stderr, flush=True)
            try:
                record["rows"].append(timed_row(suite, entry, device))
            except Exception as error:  # of a peer, or of a method that is wrong
                known = isinstance(error, suite.NotMeasured)
                reason = str(error) if known else f"{type(error).__name__}: {error}"
                failed = getattr(error, "failed", True)
                if failed:
                    traceback.print_exc()
                if not machine.context_lives():  # another process must go on
                    record["running"]["reason"] = f"[CUDA context lost] {reason}"
                    save_record(record, path)
                    return 3
                record["not_measured"].append(not_measured(entry, reason, failed))
        control(stage)
    del record["running"]
    save_record(record, path)
    return 0


def timed_row(suite: Any, entry: Any, device: torch.device) -> Json:
    """An entry's row of the record."""
    start, info = time.perf_counter(), {}

    def make() -> Any:
        ready = suite.ready(entry, device)
        info.update(ready.info)
        return ready.call

    call = measure.captured(make) if entry.method.graph else make()
    timed = measure.measure(call, device, measure.BUDGET_S[device.type])
    # A replay allocates nothing: the graph holds its memory.
    info["extra_bytes"] = None if entry.method.graph else timed.extra_bytes
    info |= {"host_seconds": timed.host_seconds, "seconds": measure.spread(timed.seconds)}
    return {"name": entry.id, **info, "wall_seconds": round(time.perf_counter() - start, 2)}


# The runner.


def run_workers(arguments: argparse.Namespace, plan: list[Any], path: Path, end: float) -> str:
    """One worker after the other until everything has an outcome or the time is up.

    Returns:
        Why it stopped earlier, or nothing.
    """
    command = [sys.executable, "-m", "benchmarks.suite.gpu", "--end", str(end)]
    command += ["--resume", str(path), "--suite", arguments.suite]
    command += ["--device", arguments.device, "--only", arguments.only]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    record = json.loads(path.read_text())
    while pending(plan, record) and (left := end - time.time()) > LAST_S:
        status, killed = machine.run_process(command, left, LOG, path, 2 * ENTRY_S, **cache)
        record = json.loads(path.read_text())
        running = record.pop("running", None)
        if running is None and status:
            return f"the worker cannot start: {killed or f'exit status {status}'}; see {LOG.name}"
        if running is None or time.time() >= end - LAST_S:  # what is cut off has no outcome
            continue
        silent = time.time() - path.stat().st_mtime
        reason = running.get("reason") or killed
        reason = reason or f"its process ended with status {status} after {silent:.0f} s"
        print(f"lost: {running['name']}: {reason}", flush=True)
        if not record["ceilings"]:
            return f"{running['name']}: {reason}"
        # What ends a process in one kind of work is not tried in the others.
        waiting = pending(plan, record)
        lost = [(e.case, e.method) for e in waiting if e.id == running["name"]]
        same = [entry for entry in waiting if (entry.case, entry.method) in lost]
        record["not_measured"] += [not_measured(entry, reason) for entry in same]
        save_record(record, path)
    return ""


def opened(arguments: argparse.Namespace) -> tuple[Json, Path]:
    """The record to go on with, or a new one, and where it lies."""
    commit, date = machine.commit_info(), machine.now()
    if commit["id"] == "unknown":
        raise NothingRan("neither git nor $COMMIT names the commit")
    if arguments.device == "cuda" and (reason := machine.why_nothing_runs()):
        raise NothingRan(reason)
    info = machine.machine_info(torch.device(arguments.device))
    # First calls are shorter where torch's compiled code was kept.
    info["compiled_before"] = any(COMPILED.glob("*"))
    new: Json = {"machine_info": info, "commit_info": commit, "datetime": date}
    if arguments.resume is None:
        # The report is made from whole suites: a part of one lies beside the log.
        folder = LOG.parent if arguments.only else machine.RESULTS
        path = machine.new_path(folder / machine.record_name("suite", info, commit, date))
        return {**new, "only": arguments.only, "ceilings": {}, **{n: [] for n in LISTS}}, path
    record = json.loads(arguments.resume.read_text())
    for part, name in (("commit_info", "id"), ("commit_info", "dirty"), ("machine_info", "device")):
        if record[part][name] != new[part][name]:
            other = f"{name} {record[part][name]}"
            raise NothingRan(f"the record is of another machine or commit: {other}")
    return record, arguments.resume


def bench(arguments: argparse.Namespace, end: float) -> int:
    record, path = opened(arguments)
    arguments.only = record["only"]
    LOG.unlink(missing_ok=True)
    built: Json = {"outcome": "passed"}
    if arguments.device == "cuda":
        built = machine.build(machine.architecture_here(), LOG)
        print(f"build {built['outcome']}, {built['seconds']} s {built.get('reason', '')}")
    record["failed_before"] = [row["name"] for row in record["not_measured"] if row["failed"]]
    record["not_measured"] = [row for row in record["not_measured"] if not row["failed"]]
    record.pop("running", None)
    save_record(record, path)
    plan = planned(arguments)
    try:
        stopped = run_workers(arguments, plan, path, end)
    except KeyboardInterrupt:
        stopped = "the process was told to end"
    record = json.loads(path.read_text())
    record.pop("running", None)
    record["not_reached"] = [entry.id for entry in pending(plan, record)]
    save_record(record, path)
    machine.copy_out(LOG)
    if not record["ceilings"]:
        raise NothingRan(stopped or "no entry was chosen, or no time was left")
    print(report(record, path), f"stopped: {stopped or 'no'}", f"record: {path}", sep="\n")
    failed = built["outcome"] == "failed" or any(row["failed"] for row in record["not_measured"])
    return int(failed or bool(stopped or record["not_reached"]) or not record["rows"])


def main(*words: str) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the table is printed all the same
    parser = argparse.ArgumentParser(description="Build, and time the suite on the GPU here.")
    add = parser.add_argument
    add("--budget", type=float, default=WINDOW_S, help="seconds, the build included")
    add("--only", default="", metavar="TEXT", help="only entries with TEXT in their names")
    add("--resume", type=Path, metavar="RECORD", help="continue this record")
    add("--dry-run", action="store_true", help="list the entries; needs no GPU")
    add("--device", default="cuda", help=argparse.SUPPRESS)
    add("--suite", default="benchmarks.suite.entries", help=argparse.SUPPRESS)  # for tests
    add("--end", type=float, help=argparse.SUPPRESS)  # of a worker
    arguments = parser.parse_args(words or None)
    if arguments.end:
        return work(arguments)
    end = time.time() + arguments.budget
    try:
        return dry_run(arguments) if arguments.dry_run else bench(arguments, end)
    except NothingRan as reason:
        print(f"gpu-bench: nothing ran: {reason}")
        return 2


# What is printed.


def dry_run(arguments: argparse.Namespace) -> int:
    """Every entry with its estimated seconds, and the seconds from the start to its end."""
    plan, total = planned(arguments), float(BUILD_S + START_S)
    print(f"{total:5.0f} s: build, start and ceilings")
    for stage, group in itertools.groupby(plan, lambda entry: entry.stage):
        begin, found = total, list(group)
        for entry in found:
            total += entry.seconds
            print(f"{total:5.0f} s {entry.seconds:6.1f} s {entry.id}")
        print(f"{stage}: {len(found)} entries, {total - begin:.0f} s")
        total += CONTROLS_S
    compiled = {(e.case.op, e.case.name, e.method.name) for e in plan if e.method.compiles}
    counts = f"{len(plan)} entries, {len(compiled)} compilations"
    print(f"{counts}, {total:.0f} s of {WINDOW_S} s")
    return int(total > WINDOW_S)


def report(record: Json, path: Path) -> str:
    """The tables of the fixed cases, as in docs/benchmarks.md; what a terminal may cut off, first.
    Below them ceilings and controls, and how many entries came to what."""
    shown = records.Record(path.name, record)
    cases = [
        tables.case_table(shown, op, "fixed") for op in reversed(records.OPS)
    ]  # attention last
    clocks = (f"{row.get('clocks.sm')} ({row['after_stage']})" for row in record["clocks"])
    pairs = (f"{row['name']} {row['ours'] / row['torchs']:.2f}" for row in record["host_time"])
    failed = sum(row["failed"] for row in record["not_measured"])
    foot = (
        tables.conditions(shown),
        f"SM clock under load after each stage: {', '.join(clocks) or 'unknown'}",
        f"Host time of an eager call, ours / torch's: {', '.join(pairs) or 'unknown'}",
        f"{len(record['rows'])} measured, {len(record['not_measured']) - failed} cannot run here, "
        f"{failed} failed, {len(record['not_reached'])} not reached",
    )
    return "\n\n".join(filter(None, (tables.not_measured(shown), *cases, "\n".join(foot))))


if __name__ == "__main__":
    sys.exit(main())
