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
_not_measured: list[dict[str, Any]] = []
_controls: list[dict[str, Any]] = []


@pytest.fixture
def not_measured() -> list[dict[str, Any]]:
    return _not_measured


def add_control() -> None:
    """The first entry timed as if it were two methods, at the start and once more at the end."""
    entry = suite.entries("cpu")[0]
    _controls.append(measure.a_a_control(entry.id, suite.ready(entry, CPU).call, CPU))


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


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # it names the host
    machine_info.update(machine.machine_info(CPU))


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    commit_info.clear()
    commit_info.update(machine.commit_info())


def pytest_benchmark_update_json(
    config: Any, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Keeps a complete run on a quiet machine as a record; the file that ``--benchmark-json`` names
    is written in any case."""
    for row in output_json["benchmarks"]:
        row["params"] = None  # an Entry, which JSON does not know; its name says the same
    add_control()
    first, last = _controls
    name = first["name"].removeprefix("A/A: ")
    drift = {"after_stage": "all", "name": name, "median": last["median"]}
    output_json["controls"], output_json["not_measured"] = _controls, _not_measured
    output_json["drift"] = [{**drift, "first_median": first["median"]}]
    output_json["ceilings"] = measure.ceilings(CPU)
    output_json["host_time"] = host_time.rows(CPU)
    if len(benchmarks) + len(_not_measured) < len(suite.entries("cpu")):
        return
    if reason := why_refused(_controls):
        print(f"\nno record is kept: {reason}; repeat the run on a quiet machine")
        return
    info = output_json["machine_info"], output_json["commit_info"], output_json["datetime"]
    path = machine.new_path(machine.RESULTS / machine.record_name("suite", *info))
    machine.save_record(output_json, path)
    print(f"\nrecord: {path}")
