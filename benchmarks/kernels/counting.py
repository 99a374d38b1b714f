"""The host model, which counts, and where counts are kept: a record and a page in docs/."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cogview.files import atomic_write
from cogview_kernels import extension

DOCS = Path(__file__).resolve().parents[2] / "docs"
Row = dict[str, Any]


def counted(
    call: Callable[[], Any], num_sms: int = 1, shared_kib: int = 227
) -> tuple[Any, list[Row]]:
    """What a call returns, and its launches as the host model counted them, on a device as
    `extension.modelled_device` describes it."""
    if reason := extension.why_not_host_model():
        raise SystemExit(reason)
    model = importlib.import_module("cogview_kernels._host_model")
    model.take_report()  # of earlier calls
    with extension.modelled_device(num_sms, shared_kib):
        result = call()
    return result, model.take_report()


def moved(launches: Iterable[Row], kinds: dict[str, str]) -> dict[str, int]:
    """Bytes loaded and stored, by kind of buffer: the first one whose pattern fits the name."""
    total = dict.fromkeys(kinds, 0)
    for launch in launches:
        for name, buffer in launch["buffers"].items():
            kind = next(kind for kind, pattern in kinds.items() if re.fullmatch(pattern, name))
            total[kind] += buffer["bytes_loaded"] + buffer["bytes_stored"]
    return total


def markdown(rows: list[Row]) -> str:
    """A table of the rows' texts, counts and ratios (NaN: there is none)."""
    forms = {int: "{:,}", float: "{:.3f}", str: "{}"}
    shown = [name for name, value in rows[0].items() if type(value) in forms and name != "case"]
    lines = [[name.replace("_", " ") for name in shown]]
    lines.append(["---" if isinstance(rows[0][name], str) else "---:" for name in shown])
    lines += ([forms[type(row[name])].format(row[name]) for name in shown] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |".replace(" nan ", "  ") for cells in lines)


def write(name: str, record: dict[str, Any], tables: dict[str, str]) -> None:
    """docs/NAME.json, a line for each row, and in docs/NAME.md the tables between their marks."""
    page = (DOCS / f"{name}.md").read_text()
    for mark, table in tables.items():
        page = page.replace(between(page, mark), f"\n{table}\n")
    parts = []
    for key, part in record.items():
        lines = "[\n" + ",\n".join(map(json.dumps, part)) + "\n]"
        parts.append(f'"{key}": {lines if isinstance(part, list) else json.dumps(part)}')
    text = "{" + ",\n".join(parts) + "}\n"
    for file, content in ((f"{name}.json", text), (f"{name}.md", page)):
        with atomic_write(DOCS / file) as partial:
            partial.write_text(content)


def between(page: str, mark: str) -> str:
    return page.split(f"<!-- {mark}: begin -->")[1].split(f"<!-- {mark}: end -->")[0]
