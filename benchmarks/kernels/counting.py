"""Where counts are kept: a record and a page in docs/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cogview.files import atomic_write

DOCS = Path(__file__).resolve().parents[2] / "docs"
Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """A table of the rows' texts, counts and ratios (NaN: there is none)."""
    forms = {int: "{:,}", float: "{:.3f}", str: "{}"}
    shown = [name for name, value in rows[0].items() if type(value) in forms]
    lines = [[name.replace("_", " ") for name in shown]]
    lines.append(["---" if isinstance(rows[0][name], str) else "---:" for name in shown])
    lines += ([forms[type(row[name])].format(row[name]) for name in shown] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |".replace(" nan ", "  ") for cells in lines)


def between(page: str, mark: str) -> str:
    return page.split(f"<!-- {mark}: begin -->\n")[1].split(f"\n<!-- {mark}: end -->")[0]


def write(name: str, record: dict[str, Any], tables: dict[str, str]) -> None:
    """docs/NAME.json, a line for each row, and in docs/NAME.md the tables between their marks."""
    page = (DOCS / f"{name}.md").read_text()
    for mark, table in tables.items():
        page = page.replace(between(page, mark), table)
    parts = []
    for key, part in record.items():
        lines = "[\n" + ",\n".join(map(json.dumps, part)) + "\n]"
        parts.append(f'"{key}": {lines if isinstance(part, list) else json.dumps(part)}')
    text = "{" + ",\n".join(parts) + "}\n"
    for file, content in ((f"{name}.json", text), (f"{name}.md", page)):
        with atomic_write(DOCS / file) as partial:
            partial.write_text(content)
