"""The suite under pytest-benchmark: ``make bench``, ``make bench FILTER="decode and SDPA"``.

The methods of a group (a case and a kind of work) are timed in turns when the group's first test
runs. pytest-benchmark keeps the record and compares: its clock plays the measured times back.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from benchmarks.suite import entries as suite
from benchmarks.suite import measure
from benchmarks.suite.conftest import CPU, NOT_MEASURED

OUTCOMES: dict[str, Any] = {}  # of each entry: its measurement and what else is known, or why not
PLAYED: deque[float] = deque()  # what the clock shows: 0 and the seconds of a call, in turns


def measure_group(entries: list[Any]) -> None:
    ready = {}
    for entry in entries:
        try:
            ready[entry.id] = suite.ready(entry, CPU)
        except suite.NotMeasured as reason:
            OUTCOMES[entry.id] = reason
    calls = [each.call for each in ready.values()]
    timed = measure.measure_interleaved(calls, CPU, measure.BUDGET_S["cpu"]) if calls else []
    for (name, each), measurement in zip(ready.items(), timed, strict=True):
        OUTCOMES[name] = measurement, each.info


@pytest.mark.benchmark(timer=PLAYED.popleft)
@pytest.mark.parametrize("entry", suite.entries("cpu"), ids=lambda entry: entry.id)
def test_suite(benchmark: Any, entry: suite.Entry, request: Any) -> None:
    if entry.id not in OUTCOMES:
        selected = [item.callspec.params["entry"] for item in request.session.items]
        measure_group([other for other in selected if other.group == entry.group])
    outcome = OUTCOMES[entry.id]
    if isinstance(outcome, suite.NotMeasured):
        why = {"reason": str(outcome), "failed": outcome.failed}
        NOT_MEASURED.append({"name": entry.id, **entry.info(), **why})
        (pytest.fail if outcome.failed else pytest.skip)(str(outcome))
    measurement, info = outcome
    benchmark.group = entry.group
    benchmark.extra_info.update(info, extra_bytes=measurement.extra_bytes)
    PLAYED.extend(shown for seconds in measurement.seconds for shown in (0.0, seconds))
    benchmark.pedantic(lambda: None, rounds=len(measurement.seconds))
