"""The suite on a machine with a GPU that is bare but for torch, triton and nvcc, in one command:
``python -m benchmarks.suite.gpu`` from the repository's root, with the Python that holds torch.
Builds for the GPU that is here, times the suite's entries in the order of the plan until all are
done or the window ends, and prints a table last.

A worker process times the entries and rewrites the record after each,
``benchmarks/results/suite-<device>-<date>-<commit>.json`` (``$OUT``, where set, gets a copy). An
entry that ends its process or takes longer than ENTRY_S is lost, and a new worker times the others.
``--resume RECORD`` continues an earlier run. The commit is git's, else ``$COMMIT``.

Exit status: 0 everything that can run there was timed, 1 something failed, was wrong or was not
reached, 2 nothing ran.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import json
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.machine import ROOT, save_record
from benchmarks.report import records, tables

LOG = ROOT / "results" / "gpu-bench.log"
COMPILED = ROOT / "build" / "inductor"  # a second run compiles nothing again
WINDOW_S = 540
ENTRY_S = 75  # of an entry at most, compilation included; of a worker's start, too
LAST_S = 2  # with less time left no entry is started
# What --dry-run assumes besides the entries: the build on 16 cores; start, ceilings and controls.
BUILD_ESTIMATE_S, START_ESTIMATE_S, DRIFT_ESTIMATE_S = 100, 20, 3
TABLE_CHARS = 7000  # a remote runner may show no more than the end of what was printed


def planned(arguments: argparse.Namespace) -> list[Any]:
    suite = importlib.import_module(arguments.suite)
    return [entry for entry in suite.entries(arguments.device) if arguments.only in entry.id]


def pending(plan: list[Any], record: dict[str, Any]) -> list[Any]:
    """What has no outcome yet, in order; last, what failed in an earlier run."""
    known = {row["name"] for row in (*record["rows"], *record["not_measured"])}
    unknown = [entry for entry in plan if entry.id not in known]
    return sorted(unknown, key=lambda entry: entry.id in record["failed_before"])


def watched(plan: list[Any]) -> list[Any]:
    """Of ours, the entries that are timed again after each stage: the first of each operator."""
    ours = [entry for entry in plan if entry.stage == "ours" and not entry.method.graph]
    first = {entry.case.op: entry for entry in reversed(ours) if entry.case.op != "training_step"}
    return [entry for entry in ours if entry in first.values()]


# The worker.


def work(arguments: argparse.Namespace) -> int:
    """Times what is pending, until ``arguments.end``; ``running`` in the record says what it does,
    for the case that it does not return."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    import torch

    suite = importlib.import_module(arguments.suite)
    plan, device, path = planned(arguments), torch.device(arguments.device), arguments.resume
    record = json.loads(path.read_text())

    def begin(name: str) -> bool:
        record["running"] = {"name": name}
        save_record(record, path)
        return time.time() < arguments.end - LAST_S

    if not record["ceilings"] and begin("ceilings and controls"):
        record |= ceilings_and_controls(suite, watched(plan)[:2], device)
    for stage, group in itertools.groupby(pending(plan, record), lambda entry: entry.stage):
        for entry in itertools.takewhile(lambda entry: begin(entry.id), group):
            print(f"{time.strftime('%H:%M:%S')} {entry.id}", file=sys.stderr, flush=True)
            try:
                record["rows"].append(timed_row(suite, entry, device))
            except Exception as error:  # of a peer, or of a method that is wrong
                known = isinstance(error, suite.NotMeasured)
                reason = str(error) if known else f"{type(error).__name__}: {error}"
                if not machine.context_lives():  # another process must go on
                    record["running"]["reason"] = f"[CUDA context lost] {reason}"
                    save_record(record, path)
                    return 3
                failed = not known or error.failed  # type: ignore[attr-defined]
                if failed:
                    traceback.print_exc()
                record["not_measured"].append(missing(entry, reason, failed))
        time_again(suite, stage, watched(plan), record, device, begin)
    del record["running"]
    save_record(record, path)
    return 0


def timed_row(suite: Any, entry: Any, device: Any) -> dict[str, Any]:
    """An entry's row of the record."""
    from benchmarks.suite import measure

    start = time.perf_counter()
    ready: Any = None

    def make() -> Any:
        nonlocal ready
        ready = suite.ready(entry, device)
        return ready.call

    call = measure.captured(make) if entry.method.graph else make()
    timed = measure.measure(call, device, measure.BUDGET_S[device.type])
    return {
        "name": entry.id,
        **ready.info,
        "graph": entry.method.graph,
        "extra_bytes": None if entry.method.graph else timed.extra_bytes,
        "host_seconds": timed.host_seconds,
        "seconds": measure.spread(timed.seconds),
        "wall_seconds": round(time.perf_counter() - start, 2),
    }


def missing(entry: Any, reason: str, failed: bool) -> dict[str, Any]:
    return {"name": entry.id, **entry.info(), "reason": reason, "failed": failed}


def ceilings_and_controls(suite: Any, entries: list[Any], device: Any) -> dict[str, Any]:
    from benchmarks.suite import measure

    found: dict[str, Any] = {"ceilings": measure.ceilings(device), "controls": []}
    if device.type == "cuda":
        from benchmarks.suite import host_time

        found["controls"] = measure.empty_kernels(device)
        if host_time.why_not(device) is None:
            found["host_time"] = [row._asdict() for row in host_time.host_times(device)]
    for entry in entries:
        call = suite.ready(entry, device).call
        found["controls"].append(measure.a_a_control(entry.id, call, device))
    return found


def time_again(
    suite: Any, stage: str, entries: list[Any], record: dict[str, Any], device: Any, begin: Any
) -> None:
    """How far our times and the clocks under load have drifted since they were first taken."""
    from benchmarks.suite import measure

    first = {row["name"]: row["seconds"]["median"] for row in record["rows"]}
    for entry in entries:
        if entry.id in first and begin(f"{entry.id}, again"):
            median = timed_row(suite, entry, device)["seconds"]["median"]
            row = {"after_stage": stage, "name": entry.id, "median": median}
            record["drift"].append({**row, "first_median": first[entry.id]})
    if device.type == "cuda" and begin("clocks"):
        clocks = measure.clocks_under_load(device)
        record["clocks"].append({"time": machine.now(), "after_stage": stage, **clocks})


# The runner.


def run_workers(arguments: argparse.Namespace, plan: list[Any], path: Path, end: float) -> str:
    """One worker after the other until everything has an outcome or the time is up.

    Returns:
        Why it stopped earlier, or nothing.
    """
    words = ["--suite", arguments.suite, "--device", arguments.device, "--only", arguments.only]
    command = [sys.executable, "-m", "benchmarks.suite.gpu", "--end", str(end)]
    command += ["--resume", str(path), *words]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    while True:
        status, killed = machine.run_process(
            command, end - time.time(), LOG, path, ENTRY_S, **cache
        )
        record = json.loads(path.read_text())
        running = record.pop("running", None)
        if running is None and status:
            return f"the worker cannot start: {killed or f'exit status {status}'}; see {LOG.name}"
        if running is None or time.time() >= end - LAST_S:  # what is cut off has no outcome
            return ""
        reason = running.get("reason") or killed or f"its process ended with status {status}"
        if not record["ceilings"]:
            return f"{running['name']}: {reason}"
        waiting = pending(plan, record)
        for lost in [entry for entry in waiting if entry.id == running["name"]]:
            # What hung would hang in the other kinds of work of this call, too.
            hung = [e for e in waiting if (e.case, e.method) == (lost.case, lost.method)]
            same_call = hung if "no word" in reason else [lost]
            record["not_measured"] += [missing(entry, reason, True) for entry in same_call]
        save_record(record, path)


def bench(arguments: argparse.Namespace, end: float) -> int:
    path, commit = arguments.resume, machine.commit_info()
    record = json.loads(path.read_text()) if path else None
    arguments.only = record["only"] if record else arguments.only
    reason = machine.why_nothing_runs() if arguments.device == "cuda" else None
    if commit["id"] == "unknown":
        reason = "neither git nor $COMMIT names the commit"
    if record and any(record["commit_info"][key] != commit[key] for key in ("id", "dirty")):
        reason = f"the record is of another commit, {record['commit_info']['id']}"
    if reason is None:
        import torch

        here = machine.machine_info(torch.device(arguments.device))
        if record and record["machine_info"]["device"] != here["device"]:
            reason = f"the record is of another device, {record['machine_info']['device']}"
    if reason is not None:
        print(f"gpu-bench: nothing ran: {reason}")
        return 2
    LOG.unlink(missing_ok=True)
    built = {"outcome": "passed", "seconds": 0}
    if arguments.device == "cuda":
        built = machine.build(machine.architecture_here(), LOG)
        print(f"build {built['outcome']}, {built['seconds']} s {built.get('reason', '')}")
    if record is None:
        lists = "controls", "host_time", "drift", "clocks", "not_reached", "not_measured", "rows"
        # First calls are shorter where torch's compiled code was kept.
        info = {"machine_info": {**here, "compiled_before": any(COMPILED.glob("*"))}}
        info |= {"commit_info": commit, "datetime": machine.now(), "ceilings": {}}
        info |= {"only": arguments.only}
        record = {**info, **{name: [] for name in lists}}
        name = machine.record_name("suite", here, commit, record["datetime"])
        # The report is made from whole suites: a part of one lies beside the log.
        path = machine.new_path((LOG.parent if arguments.only else machine.RESULTS) / name)
    failed = [row["name"] for row in record["not_measured"] if row["failed"]]
    kept = [row for row in record["not_measured"] if not row["failed"]]
    save_record({**record, "failed_before": failed, "not_measured": kept}, path)
    plan = planned(arguments)
    try:
        stopped = run_workers(arguments, plan, path, end)
    except Terminated:
        stopped = "the process was told to end"
    record = json.loads(path.read_text())
    record["not_reached"] = [entry.id for entry in pending(plan, record)]
    save_record(record, path)
    machine.save_log(LOG)
    if not record["ceilings"]:
        print(f"gpu-bench: nothing ran: {stopped}")
        return 2
    text, well = summary(record)
    print(f"{table(record)}\n{text}")
    print(f"stopped: {stopped}\nrecord: {path}" if stopped else f"record: {path}")
    return 0 if well and not stopped and built["outcome"] == "passed" else 1


class Terminated(Exception):
    """SIGTERM: the table is printed all the same."""


def terminate(*_: Any) -> None:
    raise Terminated


def main(*words: str) -> int:
    begin = time.time()
    signal.signal(signal.SIGTERM, terminate)
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
    return dry_run(arguments) if arguments.dry_run else bench(arguments, begin + arguments.budget)


# What is printed.


def dry_run(arguments: argparse.Namespace) -> int:
    """Every entry with its estimated seconds, and the seconds from the start to its end."""
    plan, stages = planned(arguments), []
    total = float(BUILD_ESTIMATE_S + START_ESTIMATE_S)
    print(f"{total:5.0f} s: build, start, ceilings and controls")
    for stage, group in itertools.groupby(plan, lambda entry: entry.stage):
        seconds = []
        for entry in group:
            seconds.append(entry.seconds)
            print(f"{total + sum(seconds):5.0f} s {entry.seconds:6.1f} s {entry.id}")
        total += sum(seconds) + DRIFT_ESTIMATE_S
        stages.append(f"{stage}: {len(seconds)} entries, {sum(seconds):.0f} s")
    compiled = {(entry.case, entry.method) for entry in plan if entry.method.compiles}
    counts = f"{len(plan)} entries, {len(compiled)} compilations"
    print("\n".join([*stages, f"{counts}, {total:.0f} s of {WINDOW_S} s"]))
    return int(total > WINDOW_S)


def summary(record: dict[str, Any]) -> tuple[str, bool]:
    """Ceilings and controls, how many entries came to what, what failed; whether all is well."""
    lines = [tables.conditions(records.Record("", record))]
    for row in record["clocks"]:
        lines.append(f"SM clock under load after {row['after_stage']}: {row.get('clocks.sm')}")
    if record["host_time"]:
        pairs = (f"{row['name']} {row['ours'] / row['torchs']:.2f}" for row in record["host_time"])
        lines.append(f"Host time of an eager call, ours / torch's: {', '.join(pairs)}")
    failed = [row for row in record["not_measured"] if row["failed"]]
    lines += [f"failed: {row['name']}: {row['reason'][:100]}" for row in failed[:5]]
    reached, elsewhere = len(record["not_reached"]), len(record["not_measured"]) - len(failed)
    counts = f"{len(record['rows'])} measured, {elsewhere} cannot run here, {len(failed)} failed"
    well = bool(record["rows"]) and not failed and not reached
    return "\n".join([*lines, f"{counts}, {reached} not reached"]), well


def table(record: dict[str, Any]) -> str:
    """The fixed cases, a line for each kind of work. Of a peer: its time, also as a multiple of
    ours; of a dense one its own TFLOP/s."""
    heads = f"{'':22} {'us':>9} {'iqr':>4} {'host us':>7} {'floor':>5} {'MiB':>6}"
    lines = [f"{heads}  {'best rival':32} {'best dense, own TFLOP/s':32} computes the same"]

    def against(row: Any, ours: Any) -> str:
        if row is None:
            return "-"
        own = f" {row.own_tflops:.0f}" if row.role == "dense" else ""
        return f"{row.median * 1e6:.1f} {row.median / ours.median:.2f}x{own} {row.method[:16]}"

    seen, cases = records.Record("", record), set()
    for group in itertools.chain(*(records.groups(seen.rows, "fixed", op) for op in records.OPS)):
        ours = group.ours
        if ours.case_name not in cases:
            lines.append(f"{ours.op} {ours.case_name}")
            cases.add(ours.case_name)
        share = (ours.floor(record["ceilings"]) or 0) / ours.median
        cells = f"{group.work:22} {ours.median * 1e6:9.1f} {ours.iqr / ours.median:4.0%}"
        cells += f" {(ours.host_seconds or 0) * 1e6:7.1f} {share:5.0%}"
        cells += f" {(ours.extra_bytes or 0) / 2**20:6.1f}"
        rival, dense = (against(row, ours) for row in (group.rival, group.dense))
        lines.append(f"{cells}  {rival:32} {dense:32} {against(group.peer(same=True), ours)}")
    text = "\n".join(lines)
    return text if len(text) <= TABLE_CHARS else text[:TABLE_CHARS] + "\n... see the record"


if __name__ == "__main__":
    sys.exit(main())
