"""The table of memory by plan, from its record."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from benchmarks.experiments import memory
from benchmarks.experiments.memory import Case

CASES = Case("digits", 1, "ddp", 2, True), Case("digits", 2, "fsdp", 2, False)


def test_the_table_adds_up(tmp_path: Path) -> None:
    record = memory.measure_all(CASES, tmp_path)
    with mock.patch.object(memory, "measure", side_effect=AssertionError):
        again = memory.measure_all(CASES, tmp_path)  # nothing is run twice
    assert again["rows"] == record["rows"]
    lines = [line.split(" | ") for line in memory.table(record).splitlines() if "| digits" in line]
    assert [line[1:5] for line in lines] == [["", "1", "2", "yes"], ["fsdp", "2", "2", "no"]]
    # Four numbers of four bytes for each parameter; half of them on each of two GPUs.
    states = [
        sum(row["memory"][kind] for kind in ("parameters", "gradients", "optimizer"))
        for row in record["rows"]
    ]
    assert 0.49 < states[1] / states[0] < 0.51
    assert record["rows"][0]["reduced"] == 0 < record["rows"][1]["reduced"]
