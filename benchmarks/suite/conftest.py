"""What pytest-benchmark's record says beyond its times: see suite.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.suite import entries as suite
from benchmarks.suite import host_time, measure

RESULTS = Path(__file__).parents[1] / "results"
_not_measured: list[dict[str, Any]] = []


@pytest.fixture
def not_measured() -> list[dict[str, Any]]:
    return _not_measured


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # it names the host
    machine_info.update(measure.machine_info(_device()))


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    commit_info.clear()
    commit_info.update(measure.commit_info())


def pytest_benchmark_update_json(
    config: Any, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """A whole run is kept as a record; a part of one only as what ``--benchmark-json`` names."""
    for row in output_json["benchmarks"]:
        row["params"] = None  # an Entry, which JSON does not know; its name says the same
    output_json["ceilings"] = measure.ceilings(_device())
    output_json["not_measured"] = _not_measured
    if host_time.why_not(_device()) is None:
        times = host_time.host_times(_device())
        output_json["host_time"] = [row._asdict() for row in times]
        print(f"\n{host_time.table(times)}")
    if len(benchmarks) + len(_not_measured) == len(suite.entries(_device().type)):
        machine, commit = output_json["machine_info"], output_json["commit_info"]
        name = measure.record_name("suite", machine, commit, output_json["datetime"])
        path = measure.new_path(RESULTS / name)
        measure.save_record(output_json, path)
        print(f"\nrecord: {path}")
