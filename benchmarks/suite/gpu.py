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
import contextlib
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
ENTRY_S = 75  # of an entry at most, compilation included
LAST_S = 2  # with less time left no entry is started
# What --dry-run assumes besides the entries: the build on 16 cores; start, ceilings and controls.
BUILD_ESTIMATE_S, START_ESTIMATE_S, DRIFT_ESTIMATE_S = 100, 20, 3
TABLE_CHARS = 7000  # a remote runner may show no more than the end of what was printed
LISTS = "controls", "host_time", "drift", "clocks", "not_reached", "not_measured", "rows"

Json = dict[str, Any]


def planned(arguments: argparse.Namespace) -> list[Any]:
    suite = importlib.import_module(arguments.suite)
    return [entry for entry in suite.entries(arguments.device) if arguments.only in entry.id]


def pending(plan: list[Any], record: Json) -> list[Any]:
    """What has no outcome yet, in order; last, what failed in an earlier run."""
    known = {row["name"] for row in (*record["rows"], *record["not_measured"])}
    unknown = [entry for entry in plan if entry.id not in known]
    return sorted(unknown, key=lambda entry: entry.id in record["failed_before"])


def missing(entry: Any, reason: str, failed: bool) -> Json:
    return {"name": entry.id, **entry.info(), "reason": reason, "failed": failed}


# The worker.


def work(arguments: argparse.Namespace) -> int:
    """Times what is pending, until ``arguments.end``; ``running`` in the record says what it does,
    for the case that it does not return."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    import torch

    from benchmarks.suite import measure

    suite = importlib.import_module(arguments.suite)
    plan, device, path = planned(arguments), torch.device(arguments.device), arguments.resume
    record = json.loads(path.read_text())
    # Of ours, the first entry of each operator is timed again after each stage.
    ours = [entry for entry in plan if entry.stage == "ours" and not entry.method.graph]
    first = {entry.case.op: entry for entry in reversed(ours) if entry.case.op != "training_step"}
    watched = [entry for entry in ours if entry in first.values()]

    def begin(name: str) -> bool:
        record["running"] = {"name": name}
        save_record(record, path)
        return time.time() < arguments.end - LAST_S

    def time_again(stage: str) -> None:
        """How far our times and the clocks have drifted since the first time."""
        first = {row["name"]: row["seconds"]["median"] for row in record["rows"]}
        for entry in watched:
            if entry.id in first and begin(f"{entry.id}, again"):
                with contextlib.suppress(suite.NotMeasured):
                    median = timed_row(suite, entry, device)["seconds"]["median"]
                    row = {"after_stage": stage, "name": entry.id, "median": median}
                    record["drift"].append({**row, "first_median": first[entry.id]})
        if device.type == "cuda" and begin("clocks"):
            clocks = measure.clocks_under_load(device)
            record["clocks"].append({"time": machine.now(), "after_stage": stage, **clocks})

    if not record["ceilings"] and begin("ceilings and controls"):
        record["ceilings"] = measure.ceilings(device)
        if device.type == "cuda":
            from benchmarks.suite import host_time

            record["controls"] = measure.empty_kernels(device)
            record["host_time"] = host_time.rows(device)
        for entry in watched[:2]:
            with contextlib.suppress(suite.NotMeasured):  # its own turn will say why
                call = suite.ready(entry, device).call
                record["controls"].append(measure.a_a_control(entry.id, call, device))
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
        time_again(stage)
    del record["running"]
    save_record(record, path)
    return 0


def timed_row(suite: Any, entry: Any, device: Any) -> Json:
    """An entry's row of the record."""
    from benchmarks.suite import measure

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
    words = ["--suite", arguments.suite, "--device", arguments.device, "--only", arguments.only]
    command = [sys.executable, "-m", "benchmarks.suite.gpu", "--end", str(end)]
    command += ["--resume", str(path), *words]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    while True:
        left = end - time.time()
        status, killed = machine.run_process(command, left, LOG, path, ENTRY_S, **cache)
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
    record = json.loads(path.read_text()) if path else {}
    reason = machine.why_nothing_runs() if arguments.device == "cuda" else None
    if commit["id"] == "unknown":
        reason = "neither git nor $COMMIT names the commit"
    if reason is None:
        import torch

        here = machine.machine_info(torch.device(arguments.device))
        # First calls are shorter where torch's compiled code was kept.
        here["compiled_before"] = any(COMPILED.glob("*"))
        new: Json = {"machine_info": here, "commit_info": commit, "datetime": machine.now()}
        record = record or {**new, "only": arguments.only, "ceilings": {}, **{n: [] for n in LISTS}}
        arguments.only = record["only"]
        for key in ("commit_info id", "commit_info dirty", "machine_info device"):
            part, name = key.split()
            if record[part][name] != new[part][name]:
                reason = f"the record is of another machine or commit: {name} {record[part][name]}"
    if reason is not None:
        print(f"gpu-bench: nothing ran: {reason}")
        return 2
    LOG.unlink(missing_ok=True)
    built: Json = {"outcome": "passed"}
    if arguments.device == "cuda":
        built = machine.build(machine.architecture_here(), LOG)
        print(f"build {built['outcome']}, {built['seconds']} s {built.get('reason', '')}")
    if path is None:
        # The report is made from whole suites: a part of one lies beside the log.
        folder = LOG.parent if arguments.only else machine.RESULTS
        name = machine.record_name("suite", here, commit, record["datetime"])
        path = machine.new_path(folder / name)
    record["failed_before"] = [row["name"] for row in record["not_measured"] if row["failed"]]
    record["not_measured"] = [row for row in record["not_measured"] if not row["failed"]]
    save_record(record, path)
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
    failed = [row for row in record["not_measured"] if row["failed"]]
    print("\n".join([table(record), foot(record, failed)]))
    print(f"stopped: {stopped}\nrecord: {path}" if stopped else f"record: {path}")
    well = built["outcome"] == "passed" and record["rows"] and not record["not_reached"]
    return 0 if well and not failed and not stopped else 1


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
    compiled = {(e.case.op, e.case.name, e.method.name) for e in plan if e.method.compiles}
    counts = f"{len(plan)} entries, {len(compiled)} compilations"
    print("\n".join([*stages, f"{counts}, {total:.0f} s of {WINDOW_S} s"]))
    return int(total > WINDOW_S)


def table(record: Json) -> str:
    """The fixed cases, a line for each kind of work, as in the report."""
    lines: list[str] = []
    for op in records.OPS:
        for group in records.groups(records.Record("", record).rows, "fixed", op):
            cells = tables.line(group, record["ceilings"])
            heads = " | ".join(cells)
            lines += [*([heads] if heads not in lines else []), " | ".join(cells.values())]
    text = "\n".join(lines).replace("FlexAttention", "Flex")
    return text if len(text) <= TABLE_CHARS else text[:TABLE_CHARS] + "\n... see the record"


def foot(record: Json, failed: list[Json]) -> str:
    """Ceilings and controls, how many entries came to what, and what failed."""
    lines = [tables.conditions(records.Record("", record))]
    clocks = (f"{row.get('clocks.sm')} ({row['after_stage']})" for row in record["clocks"])
    lines.append(f"SM clock under load after each stage: {', '.join(clocks) or 'unknown'}")
    pairs = (f"{row['name']} {row['ours'] / row['torchs']:.2f}" for row in record["host_time"])
    lines.append(f"Host time of an eager call, ours / torch's: {', '.join(pairs) or 'unknown'}")
    lines += [f"failed: {row['name']}: {row['reason'][:100]}" for row in failed[:5]]
    not_here, not_reached = len(record["not_measured"]) - len(failed), len(record["not_reached"])
    counts = f"{len(record['rows'])} measured, {not_here} cannot run here, {len(failed)} failed"
    return "\n".join([*lines, f"{counts}, {not_reached} not reached"])


if __name__ == "__main__":
    sys.exit(main())
