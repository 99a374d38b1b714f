"""Plots of the sweeps: few series, chosen by what they are (ours, the rival, dense)."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.report.records import Group, Record, Row, groups
from benchmarks.report.tables import common

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
    return dict(zip(STYLES, (ours, group.rival, other, group.dense, floor), strict=True))


@dataclasses.dataclass(frozen=True)
class Plot:
    """``panels`` are (operation, sweep) by title."""

    caption: str
    panels: dict[str, tuple[str, str]]
    x_label: str
    x: Callable[[Row], float]
    y_label: str
    y: Callable[[Row], float]

    def groups(self, record: Record) -> dict[str, dict[float, Group]]:
        """By title and x; panels with two points or more."""
        found: dict[str, dict[float, Group]] = defaultdict(dict)
        for title, (op, sweep) in self.panels.items():
            for group in groups(record.rows, sweep, op):
                if group.work in ("forward", "backward"):
                    found[f"{title}, {group.work}"][self.x(group.ours)] = group
        return {title: dict(sorted(by.items())) for title, by in found.items() if len(by) > 1}


def microseconds_per_token(row: Row) -> float:
    return 1e6 * row.median / (row.case["batch"] * row.case["seqlen"])


SEQLEN = "sequence length (tokens)", lambda row: row.case["seqlen"]
SHARE = "keys attended (% of dense causal)", lambda row: 100 * (row.attended_fraction or 0)
HIDDEN = "hidden size (columns)", lambda row: row.case["hidden"]
PER_TOKEN = "time per token (us)", microseconds_per_token
BANDWIDTH = "bytes that must move (GB/s)", lambda row: row.bytes / row.median / 1e9
LENGTHS = {"attention": ("attention", "seqlen")}
SHARES = {"window varies": ("attention", "window"), "pivots vary": ("attention", "pivots")}
NORMS = {"LayerNorm": ("layer_norm", "hidden"), "sandwich": ("sandwich_residual", "hidden")}
PLOTS = {
    "seqlen": Plot("Attention against sequence length", LENGTHS, *SEQLEN, *PER_TOKEN),
    "keys": Plot("Attention against the share of keys attended", SHARES, *SHARE, *PER_TOKEN),
    "norms": Plot("Bandwidth of the norms against hidden size", NORMS, *HIDDEN, *BANDWIDTH),
}


def draw(plot: Plot, record: Record, path: Path) -> None:
    """A series with fewer than three points has no line; where a method has no time is a gap."""
    panels = plot.groups(record)
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(9.6, 3.1 * rows + 1.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    methods = defaultdict[str, dict[str, None]](dict)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, by_x) in zip(axes.flat, panels.items(), strict=False):
        found = [series(group, record.content["ceilings"]) for group in by_x.values()]
        for name, style in STYLES.items():
            ys = [plot.y(row) if (row := each[name]) else math.nan for each in found]
            methods[name] |= {row.method: None for each in found if (row := each[name])}
            if count := sum(map(math.isfinite, ys)):
                style = style if count >= MIN_POINTS_OF_A_LINE else style | {"linestyle": "none"}
                (line,) = axis.plot([*by_x], ys, markersize=5, **style)
                handles.setdefault(name, line)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(plot.x_label, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks([*by_x], [f"{x:.0f}" for x in by_x])
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if plot.y is not microseconds_per_token:
            axis.set_ylim(bottom=0)
            continue
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    for axis in axes[:, 0]:
        axis.set_ylabel(plot.y_label, fontsize=9)
    labels = [f"{name}: {' / '.join(methods[name])}" for name in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", fontsize=8, frameon=False)
    cases = common(group.ours for by_x in panels.values() for group in by_x.values())
    figure.suptitle(f"{plot.caption}\n{record.machine}\n{cases}", fontsize=9)
    figure.savefig(path, format="png", dpi=110)
