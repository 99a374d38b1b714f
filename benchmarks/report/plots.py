"""The plot of attention against the sequence length: few series, chosen by what they are."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.report.records import Group, Record, Row, groups

OP, SWEEP = "attention", "seqlen"
MIN_POINTS_OF_A_LINE = 3
# Okabe and Ito's colours, which colour-blind people tell apart; markers and dashes differ too.
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "#0072B2", "marker": "o", "linewidth": 2.2},
    "best rival": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "other that computes the same": {"color": "#009E73", "marker": "^", "linestyle": ":"},
    "computes another function": {"color": "#000000", "marker": "D", "linestyle": "-."},
    "floor": {"color": "#888888", "marker": "_", "linestyle": (0, (1, 2))},
}


def series(group: Group, ceilings: dict[str, Any]) -> dict[str, Row | None]:
    ours, seconds = group.ours, group.ours.floor(ceilings) or math.nan
    floor = dataclasses.replace(ours, median=seconds, method="measured ceilings")
    other = group.best(lambda row: not row.role and row.computes == ours.computes)
    return dict(zip(STYLES, (ours, group.rival, other, group.other, floor), strict=True))


def microseconds_per_token(row: Row | None) -> float:
    return 1e6 * row.median / (row.case["batch"] * row.case[SWEEP]) if row else math.nan


def can_draw(record: Record) -> bool:
    found = groups(record.rows, SWEEP, OP)
    return len({group.ours.case[SWEEP] for group in found}) >= MIN_POINTS_OF_A_LINE


def draw(record: Record, path: Path) -> None:
    """A series with fewer than three points has no line; where a method has no time is a gap."""
    figure = Figure(figsize=(9.6, 5), layout="constrained")
    swept = sorted(groups(record.rows, SWEEP, OP), key=lambda group: group.ours.case[SWEEP])
    handles: dict[str, Any] = {}
    methods = defaultdict[str, dict[str, None]](dict)
    for axis, work in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        of_work = [group for group in swept if group.work == work]
        lengths = [group.ours.case[SWEEP] for group in of_work]
        found = [series(group, record.content["ceilings"]) for group in of_work]
        for name, style in STYLES.items():
            ys = [microseconds_per_token(each[name]) for each in found]
            methods[name] |= {row.method: None for each in found if (row := each[name])}
            if count := sum(map(math.isfinite, ys)):
                style = style if count >= MIN_POINTS_OF_A_LINE else style | {"linestyle": "none"}
                (line,) = axis.plot(lengths, ys, markersize=5, **style)
                handles.setdefault(name, line)
        axis.set_title(work, fontsize=10)
        axis.set_xlabel("sequence length (tokens)", fontsize=9)
        axis.set_ylabel("time per token (us)", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, map(str, lengths))
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    labels = [f"{name}: {' / '.join(methods[name])}" for name in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", fontsize=8, frameon=False)
    first, *others = [group.ours.case for group in swept]
    common = ", ".join(
        f"{name} {value}"
        for name, value in first.items()
        if value and all(case[name] == value for case in others)
    )
    title = f"Attention against sequence length\n{record.machine}\n{common}"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, format="png", dpi=110)
