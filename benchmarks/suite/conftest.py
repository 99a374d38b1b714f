"""What the record of ``make bench`` holds beyond pytest-benchmark's times; when it is kept."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.suite import entries as suite
from benchmarks.suite import host_time, measure

CPU = torch.device("cpu")
ALLOWED = 0.1  # difference between two timings of one call
NOT_MEASURED: list[dict[str, Any]] = []
CONTROLS: list[dict[str, Any]] = []


def add_control() -> None:
    """The first entry timed as if it were two methods, at the start and once more at the end."""
    entry = suite.entries("cpu")[0]
    CONTROLS.append(measure.a_a_control(entry.id, suite.ready(entry, CPU).call, CPU))


control_at_the_start = pytest.fixture(scope="session", autouse=True)(add_control)


def why_refused(controls: list[dict[str, Any]]) -> str | None:
    """Why the times cannot be compared with each other. Medians are compared where calls took
    turns, minima between the start and the end."""
    # Otherwise glibc returns some freed tensors to the system, and whether a call pays for the
    # page faults of new ones depends on the calls before it.
    if "mmap_max=0" not in os.environ.get("GLIBC_TUNABLES", ""):
        return "the allocator does not keep freed memory (`make bench` sets GLIBC_TUNABLES)"
    minima = [row["minimum"] for row in controls]
    for how, difference in (
        ("as two methods", max(row["difference"] for row in controls)),
        ("at the start and at the end", max(minima) / min(minima) - 1),
    ):
        if difference > ALLOWED:
            return f"the same call, timed {how}, differs by {difference:.0%}"
    return None


def pytest_benchmark_update_json(
    config: Any, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Keeps a complete run on a quiet machine as a record; the file that ``--benchmark-json`` names
    is written in any case."""
    for row in output_json["benchmarks"]:
        row["params"] = None  # an Entry, which JSON does not know; its name says the same
    add_control()
    first, last = CONTROLS
    name = first["name"].removeprefix("A/A: ")
    drift = {"after_stage": "all", "name": name, "median": last["median"]}
    output_json |= {
        "machine_info": machine.machine_info(CPU),  # pytest-benchmark's names the host
        "commit_info": machine.commit_info(),
        "controls": CONTROLS,
        "drift": [{**drift, "first_median": first["median"]}],
        "not_measured": NOT_MEASURED,
        "ceilings": measure.ceilings(CPU),
        "host_time": host_time.rows(CPU),
    }
    if len(benchmarks) + len(NOT_MEASURED) < len(suite.entries("cpu")):
        return
    if reason := why_refused(CONTROLS):
        print(f"\nno record is kept: {reason}; repeat the run on a quiet machine")
        return
    info = output_json["machine_info"], output_json["commit_info"], output_json["datetime"]
    path = machine.new_path(machine.RESULTS / machine.record_name("suite", *info))
    machine.save_record(output_json, path)
    print(f"\nrecord: {path}")
