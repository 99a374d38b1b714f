"""The suite under pytest-benchmark: ``make bench``, ``make bench FILTER="decode and SDPA"``.

The methods of a group (a case and a kind of work) are timed in turns when the group's first test
runs. pytest-benchmark keeps the record and compares: its clock plays the measured times back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.suite import entries as suite
from benchmarks.suite import measure

DEVICE = torch.device("cpu")
OUTCOMES: dict[str, Any] = {}  # of each entry: its measurement and what else is known, or why not


class Playback:
    """A clock that shows 0 and the seconds of a measured call in turns."""

    times: Iterator[float] = iter(())

    def play(self, seconds: list[float]) -> None:
        self.times = itertools.chain.from_iterable((0.0, second) for second in seconds)

    def now(self) -> float:
        return next(self.times)


CLOCK = Playback()


def measure_group(entries: list[Any]) -> None:
    ready = {}
    for entry in entries:
        try:
            ready[entry.id] = suite.ready(entry, DEVICE)
        except suite.NotMeasured as reason:
            OUTCOMES[entry.id] = reason
    calls = [each.call for each in ready.values()]
    timed = measure.measure_interleaved(calls, DEVICE, measure.BUDGET_S["cpu"]) if calls else []
    for (name, each), measurement in zip(ready.items(), timed, strict=True):
        OUTCOMES[name] = measurement, each.info


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize("entry", suite.entries(DEVICE.type), ids=lambda entry: entry.id)
def test_suite(
    benchmark: Any, entry: suite.Entry, request: Any, not_measured: list[dict[str, Any]]
) -> None:
    if entry.id not in OUTCOMES:
        selected = [item.callspec.params["entry"] for item in request.session.items]
        measure_group([other for other in selected if other.group == entry.group])
    outcome = OUTCOMES[entry.id]
    if isinstance(outcome, suite.NotMeasured):
        why = {"reason": str(outcome), "failed": outcome.failed}
        not_measured.append({"name": entry.id, **entry.info(), **why})
        (pytest.fail if outcome.failed else pytest.skip)(str(outcome))
    measurement, info = outcome
    benchmark.group = entry.group
    benchmark.extra_info.update(info, extra_bytes=measurement.extra_bytes, host_seconds=None)
    CLOCK.play(measurement.seconds)
    benchmark.pedantic(lambda: None, rounds=len(measurement.seconds))
