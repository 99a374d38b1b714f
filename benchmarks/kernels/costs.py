"""Writes docs/kernel_costs.json and the tables of docs/kernel_costs.md: what the kernels compute
and move, counted.

    python -m benchmarks.kernels.costs     # needs the host model; no GPU
"""

from __future__ import annotations

from itertools import groupby
from types import ModuleType

from benchmarks.kernels import attention_costs, norm_costs
from benchmarks.kernels.counting import Row, markdown, write

NAME = "kernel_costs"
PARTS: dict[str, ModuleType] = {"attention": attention_costs, "norms": norm_costs}


def tables(record: dict[str, list[Row]]) -> dict[str, str]:
    """By mark in the page: a table for each case of a part."""
    found = {}
    for part, module in PARTS.items():
        cases = groupby(record[part], lambda row: row["case"])
        parts = [f"#### {case}\n\n{markdown(module.shown(list(rows)))}" for case, rows in cases]
        found[f"{part} costs"] = "\n\n".join(parts)
    return found


if __name__ == "__main__":
    record = {part: [*map(m.count, m.CASES)] for part, m in PARTS.items()}
    flat = {part: [row for rows in by_case for row in rows] for part, by_case in record.items()}
    write(NAME, flat, tables(flat))
