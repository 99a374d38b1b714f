"""The suite under pytest-benchmark: ``make bench``, ``make bench FILTER="decode and SDPA"``.

pytest-benchmark keeps the record and compares; the times are those of measure.py, which knows
about caches and devices: the clock that pytest-benchmark is given plays them back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.suite import entries as suite

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Playback:
    """A clock on which the n-th call of ``play`` lasts as long as the n-th measured call."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.calls = 0
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def rewind(self) -> None:
        self.time = 0.0

    def play(self) -> None:
        self.time = self.seconds[self.calls]
        self.calls += 1


CLOCK = Playback()


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize("entry", suite.entries(DEVICE.type), ids=lambda entry: entry.id)
def test_suite(benchmark: Any, entry: suite.Entry, not_measured: list[dict[str, Any]]) -> None:
    try:
        result = suite.run(entry, DEVICE)
    except suite.NotMeasured as reason:
        why = {"reason": str(reason), "failed": reason.failed}
        not_measured.append({"name": entry.id, **entry.info(), **why})
        (pytest.fail if reason.failed else pytest.skip)(str(reason))
    benchmark.group = f"{entry.case.op} {entry.work} {entry.case.name}"
    benchmark.extra_info.update(result["info"])
    CLOCK.seconds, CLOCK.calls = result["seconds"], 0
    benchmark.pedantic(CLOCK.play, setup=CLOCK.rewind, rounds=len(CLOCK.seconds))
