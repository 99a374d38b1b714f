"""Writes the tables of README.md and docs/benchmarks.md from the records, and from nothing else.

python benchmarks/report.py            # insert the newest record of each device
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def table(record: dict[str, Any], source: str) -> str:
    """One row per case and kind of work: medians of both methods, and their ratio."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for benchmark in record["benchmarks"]:
        info = benchmark["extra_info"]
        key = tuple(
            info[name]
            for name in (
                "seqlen",
                "query_window",
                "key_window_times",
                "num_pivots",
                "text_len",
                "work",
            )
        )
        row = rows.setdefault(key, {"attended": info["attended_fraction"]})
        row[info["method"]] = statistics.median(benchmark["stats"]["data"]) * 1e3
    machine, commit = record["machine_info"], record["commit_info"]["id"][:9]
    lines = [
        "| sequence | window | pivots + text | keys attended | work | three-region | dense causal "
        "SDPA | ratio |",
        "|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for (seqlen, window, times, pivots, text, work), row in sorted(rows.items()):
        ours, dense = row["three-region"], row["dense"]
        lines.append(
            f"| {seqlen} | {times} x {window} | {pivots} + {text} | {row['attended']:.0%} | {work} "
            f"| {ours:.1f} ms | {dense:.1f} ms | {dense / ours:.1f}x |"
        )
    lines += [
        "",
        f"Medians of {record['benchmarks'][0]['stats']['rounds']} runs, batch 1, 4 heads of "
        f"dimension 64, float32, on {machine['device']} with {machine['threads']} threads, torch "
        f"{machine['torch']}, commit {commit}, {record['datetime'][:10]}; record: `{source}`.",
    ]
    return "\n".join(lines)


def insert(path: Path, text: str) -> None:
    before, rest = path.read_text().split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in RECORDS.glob("*.json"):
        record = json.loads(path.read_text())
        device = record["machine_info"]["device"]
        if device not in newest or newest[device][1]["datetime"] < record["datetime"]:
            newest[device] = (path, record)
    if not newest:
        raise SystemExit(f"{RECORDS}: no records; run `make bench` first")
    text = "\n\n".join(
        table(record, path.relative_to(ROOT).as_posix()) for path, record in newest.values()
    )
    for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        insert(page, text)
    print(text)


if __name__ == "__main__":
    main()
