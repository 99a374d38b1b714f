"""Writes docs/kernel_costs.json and the tables of docs/kernel_costs.md: what the kernels compute
and move, counted.

    python -m benchmarks.kernels.costs     # needs the host model; no GPU
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from types import ModuleType

from benchmarks.kernels import attention_costs, norm_costs
from benchmarks.kernels.counting import Row, markdown, write

NAME = "kernel_costs"
PARTS: dict[str, ModuleType] = {"attention": attention_costs, "norms": norm_costs}


def ratio(row: Row, over: Iterable[str], under: str) -> float:
    return sum(row[name] for name in over) / (row[under] or math.nan)


def tables(record: dict[str, list[Row]]) -> dict[str, str]:
    """By mark in the page: a table for each case of a part."""
    found = {}
    for part, module in PARTS.items():
        texts = []
        for case, group in groupby(record[part], lambda row: row["case"]):
            rows = [
                row | {name: ratio(row, *of) for name, of in module.RATIOS.items()}
                for row in module.shown(list(group))
            ]
            texts.append(f"#### {case}\n\n{markdown(rows)}")
        found[f"{part} costs"] = "\n\n".join(texts)
    return found


def main() -> None:
    record = {
        part: [row for case in module.CASES for row in module.count(case)]
        for part, module in PARTS.items()
    }
    write(NAME, record, tables(record))


if __name__ == "__main__":
    main()
