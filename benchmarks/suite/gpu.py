"""The suite on a machine with a GPU that is bare but for torch, triton and nvcc, in one command:
``python -m benchmarks.suite.gpu`` from the repository's root, with the Python that holds torch.
Builds for the GPU that is here, runs the suite's entries in order of importance until all are done
or the time is up, and prints a table last.

The record, ``benchmarks/results/suite-<device>-<date>-<commit>.json``, is rewritten as entries come
in, so that what was measured outlives a hang or a kill; ``$OUT``, where set, gets a copy. An entry
that takes its process down or takes longer than ENTRY_S is lost, and the others go on.
``--resume RECORD`` goes on where an earlier run ended. The commit is git's, else ``$COMMIT``.

Exit status: 0 all was measured that can run here, 1 something failed, was wrong or not reached,
2 nothing ran.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import importlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import (
    ROOT,
    architecture_here,
    build,
    context_lives,
    environment,
    places,
    save_log,
    why_nothing_runs,
)
from benchmarks.report import pages as report

RESULTS = ROOT / "benchmarks" / "results"
LOG = ROOT / "results" / "gpu-bench.log"
COMPILED = ROOT / "build" / "inductor"  # kept: a second run compiles nothing anew
BUDGET_S = 540
START_S = 90  # of a worker: imports, the device's context
ENTRY_S = 75  # of an entry, compilation included
SLOW_S = 60  # what takes longer on one case lets the others go first on the next
LAST_S = 2  # with less time left no entry is begun
SAVE_S = 2  # a kill loses no more than this
LOOK_S = 20  # between two looks at the clocks
TABLE_CHARS = 7000  # a remote runner may show no more than the end of what was printed


class Lost(Exception):
    """A worker that cannot be started, and why."""


class Worker:
    """A process that runs entries, one after the other; a new one where the last was lost."""

    def __init__(self, suite: str, device: str) -> None:
        self.command = [sys.executable, "-m", "benchmarks.suite.gpu", "--work"]
        self.command += ["--suite", suite, "--device", device]
        self.process: subprocess.Popen[str] | None = None

    def start(self, seconds: float) -> dict[str, Any]:
        """The machine, as the process sees it."""
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
        LOG.parent.mkdir(exist_ok=True)
        with LOG.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment(**variables),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        answer = self._answer(seconds)
        if "machine" not in answer:
            raise Lost(f"the worker does not start: {answer['reason']}; see {LOG.name}")
        machine: dict[str, Any] = answer["machine"]
        return machine

    def ask(self, question: str, end: float) -> dict[str, Any]:
        """The answer; where there is none by ``end`` or in ENTRY_S, the reason."""
        if self.process is None or self.process.poll() is not None:
            try:
                self.start(min(START_S, end - time.time()))
            except Lost:  # the device may still be busy with the one that was killed
                self.start(min(START_S, end - time.time()))
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self._answer(min(ENTRY_S, end - time.time()))

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        pipe, end, text = self.process.stdout.fileno(), time.time() + seconds, b""
        answer: dict[str, Any] = {}
        while not answer:
            if not select.select([pipe], [], [], max(end - time.time(), 0))[0]:
                answer = {"reason": f"killed: no answer in {seconds:.0f} s", "timed_out": True}
            elif chunk := os.read(pipe, 1 << 16):
                text += chunk
                answer = json.loads(text) if text.endswith(b"\n") else {}
            else:
                answer = {"reason": f"its process {self._end()}", "lost": True}
        if "timed_out" in answer or "lost" in answer:
            self.stop()
            answer["failed"] = True
        return answer

    def _end(self) -> str:
        assert self.process is not None
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "hung at its end"
        return f"died with signal {-status}" if status < 0 else f"ended with status {status}"

    def stop(self) -> None:
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)  # a process that a hung device holds is left behind
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
            self.process = None


def work(suite_name: str, device_type: str) -> None:
    """The worker: answers the name of an entry with what its run gave, one line of JSON each."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive its parent
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    import torch

    from benchmarks.suite import measure

    suite = importlib.import_module(suite_name)
    device = torch.device(device_type)
    entries = {entry.id: entry for entry in suite.entries(device_type)}
    answer(machine=measure.machine_info(device))
    for line in sys.stdin:
        question = line.rstrip("\n")
        print(f"{time.strftime('%H:%M:%S')} {question}", file=sys.stderr, flush=True)
        try:
            if question == "ceilings":
                answer(ceilings=measure.ceilings(device))
            else:
                answer(**suite.run(entries[question], device))
        except Exception as error:
            cannot_run_here = isinstance(error, suite.NotMeasured) and not error.failed
            if not cannot_run_here:
                traceback.print_exc()
            known = isinstance(error, suite.NotMeasured)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            if not context_lives():  # it cannot be mended in this process
                answer(reason=f"[CUDA context lost] {reason}", lost=True)
                return
            answer(reason=reason, failed=not cannot_run_here)


def stats(seconds: list[float]) -> dict[str, Any]:
    """As pytest-benchmark has them."""
    ordered = sorted(seconds)
    mean, median = statistics.mean(ordered), statistics.median(ordered)
    deviation = statistics.stdev(ordered) if len(ordered) > 1 else 0.0
    q1, _, q3 = statistics.quantiles(ordered * 2 if len(ordered) == 1 else ordered, n=4)
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    inside = [value for value in ordered if low <= value <= high]
    far = sum(abs(value - mean) > deviation for value in ordered)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": len(ordered),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": len(ordered) - len(inside),
        "stddev_outliers": far,
        "outliers": f"{far};{len(ordered) - len(inside)}",
        "ld15iqr": inside[0],
        "hd15iqr": inside[-1],
        "ops": 1 / mean,
        "total": sum(ordered),
        "data": seconds,
        "iterations": 1,
    }


def row(entry: Any, result: dict[str, Any]) -> dict[str, Any]:
    """Of a record, as pytest-benchmark writes them."""
    return {
        "group": f"{entry.case.op} {entry.work} {entry.case.name}",
        "name": entry.id,
        "fullname": entry.id,
        "params": None,
        "param": None,
        "options": {},
        # No clock resolves more digits.
        "stats": stats([float(f"{seconds:.5g}") for seconds in result["seconds"]]),
        "extra_info": result["info"],
    }


def group_of(entry: Any) -> str:
    return f"{entry.sweeps[0]} {entry.case.op}"


def selected(entries: list[Any], only: str, groups: list[str]) -> list[Any]:
    """Those with ``only`` in their names and any of ``groups``: operators or sweeps."""
    return [
        entry
        for entry in entries
        if only in entry.id and (not groups or {entry.case.op, *entry.sweeps} & set(groups))
    ]


def why_not(arguments: argparse.Namespace) -> str | None:
    """Why nothing runs; a record that does not say of what it is would be of no use."""
    if arguments.device == "cuda" and (reason := why_nothing_runs()):
        return reason
    from benchmarks.suite import measure

    commit = measure.commit_info()
    if commit["id"] == "unknown":
        return "neither git nor $COMMIT names the commit"
    if arguments.resume is not None:
        earlier = json.loads(arguments.resume.read_text())["commit_info"]
        if (earlier["id"], earlier["dirty"]) != (commit["id"], commit["dirty"]):
            return f"{arguments.resume.name} is of another commit, {earlier['id']}"
    return None


def record_of(
    machine: dict[str, Any], resumed: Path | None, compiled_before: bool, whole: bool
) -> tuple[dict[str, Any], Path]:
    """The record that is resumed, or a new one; and where it lies. What was selected lies in
    results/, beside the log: the report is made from whole suites."""
    from benchmarks.suite import measure

    if resumed is not None:
        record = json.loads(resumed.read_text())
        if record["machine_info"]["device"] != machine["device"]:
            raise Lost(f"{resumed.name} is of another device, {record['machine_info']['device']}")
        return record, resumed
    commit, date = measure.commit_info(), measure.now()
    record = {
        "machine_info": {**machine, "compiled_before": compiled_before},  # first calls are shorter
        "commit_info": commit,
        "datetime": date,
        "version": "",
        "ceilings": {},
        "clocks": [],
        "not_reached": [],
        "not_measured": [],
        "benchmarks": [],
    }
    name = measure.record_name("suite", machine, commit, date)
    return record, measure.new_path((RESULTS if whole else LOG.parent) / name)


def save(record: dict[str, Any], path: Path) -> None:
    from benchmarks.suite import measure

    for place in places(path):
        measure.save_record(record, place)


def run_all(
    plan: list[Any], worker: Worker, record: dict[str, Any], path: Path, end: float
) -> None:
    """What is not on record yet, in order. Behind the others of its stage comes what failed in an
    earlier run, and each method that has compiled for long: its other cases would take as long."""
    failed = {missing["name"] for missing in record["not_measured"] if missing["failed"]}
    known = {found["name"] for found in record["benchmarks"]}
    pending = [entry for entry in plan if entry.id not in known]
    put_off(pending, lambda entry: entry.id in failed)
    slow: set[str] = set()
    if not record["ceilings"]:  # without them a time says little
        answer = worker.ask("ceilings", end)
        if "ceilings" not in answer:
            raise Lost(f"the ceilings cannot be measured: {answer['reason']}")
        record["ceilings"] = answer["ceilings"]
    looked = look(record, "the first")
    saved = 0.0
    try:
        while pending and time.time() < end - LAST_S:
            entry = pending[0]
            if time.time() > looked + LOOK_S:
                looked = look(record, entry.id)
                print(
                    f"{end - time.time():4.0f} s left, {len(pending)} entries: {entry.id}",
                    flush=True,
                )
            begin = time.time()
            answer = worker.ask(entry.id, end)
            if "reason" in answer and time.time() >= end:
                break  # cut off: it is not its fault
            done = [entry]
            if "timed_out" in answer:  # so would the other kinds of work on this case
                done = [other for other in pending if same_call(other, entry)]
            pending = [other for other in pending if other not in done]
            note(record, done, answer)
            if entry.method.compiles and time.time() - begin > SLOW_S:
                slow.add(entry.method.name)
                put_off(pending, lambda entry: entry.method.name in slow)
            if time.time() > saved + SAVE_S:
                record["not_reached"] = [other.id for other in pending]
                save(record, path)
                saved = time.time()
    finally:
        look(record, "the end")
        record["not_reached"] = [entry.id for entry in pending]
        save(record, path)


def look(record: dict[str, Any], before: str) -> float:
    """At the clocks, while the device rests for a moment between two entries; when it was."""
    from benchmarks.suite import measure

    clocks = measure.clocks() or {}
    record["clocks"].append({"time": measure.now(), "before": before, **clocks})
    return time.time()


def put_off(entries: list[Any], wait: Callable[[Any], bool]) -> None:
    entries.sort(key=lambda entry: ("fixed" not in entry.sweeps, wait(entry)))


def same_call(one: Any, other: Any) -> bool:
    return (one.case, one.method.name) == (other.case, other.method.name)


def note(record: dict[str, Any], entries: list[Any], answer: dict[str, Any]) -> None:
    """What came of the entries, in place of what came of them in an earlier run."""
    names = {entry.id for entry in entries}
    missing = [other for other in record["not_measured"] if other["name"] not in names]
    for entry in entries:
        if "seconds" in answer:
            record["benchmarks"].append(row(entry, answer))
        else:
            why = {"reason": answer["reason"], "failed": answer["failed"]}
            missing.append({"name": entry.id, **entry.info(), **why})
    record["not_measured"] = missing


def table(record: dict[str, Any]) -> str:
    """A line for each case and kind of work, fixed cases first, as many as fit."""
    seen = report.Record("", record, "")
    lines: list[str] = []
    for fixed in (True, False):
        for op in report.OPS:
            above = ""
            for case, work, group in report.groups(seen, op):
                if report.in_sweep(group, "fixed") != fixed:
                    continue
                peers = peers_of(group, seen)
                if not above:
                    heads = "".join(f"  {head:18}" for head in peers)
                    lines += ["", f"{op:16} {HEADS}{heads}".rstrip()]
                if above != case:
                    lines.append(case)
                    above = case
                lines.append(line(work, group, peers, seen))
    size = 0
    for count, text in enumerate(lines):
        size += len(text) + 1
        if size > TABLE_CHARS:
            return "\n".join(
                [*lines[:count], f"... {len(lines) - count} more lines: see the record"]
            )
    return "\n".join(lines)


HEADS = f"{'us':>9} {'TFLOP/s':>7} {'GB/s':>6} {'floor':>5} {'memory':>9}"


def peers_of(group: list[report.Row], record: report.Record) -> dict[str, report.Row | None]:
    if report.info(group[0])["op"] in ("attention", "decode"):
        return {
            "dense SDPA": report.best_dense(group),
            "Flex, gathered": report.named("FlexAttention", "gathered")(group),
            "CogView's": report.named("CogView's formulation")(group),
        }
    return {
        "same function": report.best_same(group, record),
        "another function": report.best_other(group, record),
    }


def line(
    work: str,
    group: list[report.Row],
    peers: dict[str, report.Row | None],
    record: report.Record,
) -> str:
    ours = report.ours_of(group)

    def number(of: Callable[[report.Row], float | None], width: int, unit: float = 1) -> str:
        value = None if ours is None else of(ours)
        return f"{'-' if value is None else report.digits(value / unit):>{width}}"

    floor = None if ours is None else report.fraction_of_floor(ours, record.ceilings)
    memory = None if ours is None else report.info(ours)["extra_bytes"]
    cells = [
        f"{work:16}",
        number(report.median, 9, 1e-6),
        number(report.tflops, 7),
        number(report.gigabytes_per_second, 6),
        f"{'-' if floor is None else report.percent(floor):>5}",
        f"{'-' if memory is None else report.bytes_text(memory):>9}",
    ]
    for peer in peers.values():
        text = "-" if peer is None else report.digits(report.median(peer) / 1e-6)
        if peer is not None and (factor := report.ratio(peer, ours)) is not None:
            text += f" {report.times(factor)}"
        cells.append(f" {text:18}")
    return " ".join(cells).rstrip()


def summary(record: dict[str, Any]) -> tuple[str, bool]:
    """How many entries came to what, and what failed; whether all is well."""
    failed = [missing for missing in record["not_measured"] if missing["failed"]]
    not_here = len(record["not_measured"]) - len(failed)
    measured, not_reached = len(record["benchmarks"]), len(record["not_reached"])
    lines = [f"failed: {missing['name']}: {missing['reason'][:100]}" for missing in failed[:5]]
    counts = f"{measured} measured, {not_here} cannot run here, {len(failed)} failed"
    lines.append(f"{counts}, {not_reached} not reached")
    return "\n".join(lines), bool(measured) and not failed and not not_reached


def bench(arguments: argparse.Namespace, begin: float) -> int:
    reason = why_not(arguments)
    if reason is not None:
        print(f"gpu-bench: nothing ran, as {reason}")
        return 2
    LOG.unlink(missing_ok=True)
    built = True
    if arguments.device == "cuda":
        outcome = build(architecture_here(), LOG)
        built = outcome["outcome"] == "passed"
        print(f"build {outcome['outcome']}, {outcome['seconds']} s {outcome.get('reason', '')}")
    suite = importlib.import_module(arguments.suite)
    plan = selected(suite.entries(arguments.device), arguments.only, arguments.groups)
    worker = Worker(arguments.suite, arguments.device)
    compiled_before = any(COMPILED.glob("*"))
    stopped = None
    try:
        machine = worker.start(START_S)
        whole = not (arguments.only or arguments.groups)
        record, path = record_of(machine, arguments.resume, compiled_before, whole)
    except Lost as error:
        worker.stop()
        save_log(LOG)
        print(f"gpu-bench: nothing ran, as {error}")
        return 2
    try:
        run_all(plan, worker, record, path, begin + arguments.budget)
    except Lost as error:
        stopped = f"stopped: {error}"
    finally:
        worker.stop()
        save_log(LOG)
    counts, well = summary(record)
    print("\n".join(filter(None, (table(record), "", counts, stopped, f"record: {path}"))))
    return 0 if built and well and not stopped else 1


def shrunk(case: Any) -> Any:
    """Of the same kind, for a CPU to run in no time."""
    if case.op == "training_step":
        return dataclasses.replace(
            case,
            num_layers=1,
            hidden_size=32,
            num_heads=2,
            batch=2,
            image_len=50,
            query_window=8,
            num_pivots=8,
            text_len=6,
            vocab_size=40,
            dtype="float32",
        )
    if case.op in ("layer_norm", "sandwich_residual"):
        return dataclasses.replace(case, rows=8, hidden=64, dtype="float32")
    return dataclasses.replace(
        case,
        seqlen=200,
        query_window=16,
        key_window_times=2,
        num_pivots=min(case.num_pivots, 12),
        batch=2,
        num_heads=4,
        num_kv_heads=2 if case.num_kv_heads else 0,
        text_len=9,
        dtype="float32",
    )


def dry_run(arguments: argparse.Namespace) -> int:
    """Every entry in order, and how far its method comes on a CPU, uncompiled, on a small case."""
    import torch

    suite = importlib.import_module(arguments.suite)
    cpu = torch.device("cpu")
    torch.compiler.set_stance("force_eager")

    @functools.cache
    def comes_to(case: Any, method: Any) -> str:
        try:
            if method.why_not(case, cpu) is None:
                suite.check(suite.problem_of(case, cpu).prepared(method))
                return "runs"
            method.prepare(case, case.layout(cpu) if hasattr(case, "layout") else None, cpu)
            return "is prepared"
        except ImportError as error:
            return f"not installed: {error.name}"
        except Exception as error:
            return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    plan = selected(suite.entries(arguments.device), arguments.only, arguments.groups)
    outcomes = [comes_to(shrunk(entry.case), entry.method) for entry in plan]
    for number, (entry, outcome) in enumerate(zip(plan, outcomes, strict=True), 1):
        print(f"{number:4} {group_of(entry):24} {entry.id} [{outcome}]")
    for what in (map(group_of, plan), outcomes):
        print()
        for name, count in Counter(what).items():
            print(f"{count:5} {name}")
    print(f"{len(plan):5} entries")
    return int(any(outcome.startswith("fails") for outcome in outcomes))


def handle_sigterm(*_: Any) -> None:
    """The table comes all the same."""
    raise Lost("it was told to end")


def main() -> int:
    begin = time.time()
    signal.signal(signal.SIGTERM, handle_sigterm)
    parser = argparse.ArgumentParser(
        description="Build, and time the suite on the GPU that is here."
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds, build included")
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="entries with it in their names"
    )
    parser.add_argument(
        "--groups", nargs="+", default=[], help="operators or sweeps, such as decode, fixed"
    )
    parser.add_argument("--resume", type=Path, metavar="RECORD", help="go on where it ended")
    parser.add_argument("--dry-run", action="store_true", help="list the entries; needs no GPU")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument(
        "--suite", default="benchmarks.suite.entries", help=argparse.SUPPRESS
    )  # the tests' own
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # a worker
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.suite, arguments.device)
        return 0
    return dry_run(arguments) if arguments.dry_run else bench(arguments, begin)


if __name__ == "__main__":
    sys.exit(main())
