"""Writes docs/kernel_costs.json and the tables of docs/kernel_costs.md: what the kernels compute
and move, counted.

    python -m benchmarks.kernels.costs     # needs the host model; no GPU
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.kernels import attention_costs, norm_costs

ROOT = Path(__file__).resolve().parents[2]
RECORD, PAGE = ROOT / "docs" / "kernel_costs.json", ROOT / "docs" / "kernel_costs.md"
PARTS: dict[str, ModuleType] = {"attention": attention_costs, "norms": norm_costs}


def marks(part: str) -> tuple[str, str]:
    return f"<!-- {part} costs: begin -->", f"<!-- {part} costs: end -->"


def shown(part: str) -> str:
    """The part's tables, as they stand in the page."""
    begin, end = marks(part)
    return PAGE.read_text().split(begin)[1].split(end)[0].strip()


def write(record: dict[str, list[dict[str, Any]]]) -> None:
    rows = {part: ",\n".join(map(json.dumps, record[part])) for part in PARTS}
    parts = ",\n".join(f'"{part}": [\n{text}\n]' for part, text in rows.items())
    RECORD.write_text(f"{{{parts}}}\n")
    page = PAGE.read_text()
    for part, module in PARTS.items():
        begin, end = marks(part)
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{module.table(record[part])}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(page)


def main() -> None:
    record = {
        part: [row for case in module.CASES for row in module.count(case)]
        for part, module in PARTS.items()
    }
    write(record)
    numbers = " and ".join(f"{len(rows)} of {part}" for part, rows in record.items())
    print(f"{PAGE.relative_to(ROOT)}: {numbers}")


if __name__ == "__main__":
    main()
