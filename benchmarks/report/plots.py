"""Plots of the sweeps: few series, chosen by what they are (ours, the rival, dense)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.report.records import OURS, Group, Record, Row, groups
from benchmarks.report.tables import common

MIN_POINTS_OF_A_LINE = 3
# Okabe and Ito's colours, which colour-blind people tell apart; markers and dashes differ too.
SERIES: tuple[tuple[str, Callable[[Group], Row | None], dict[str, Any]], ...] = (
    (OURS, lambda group: group.ours, {"color": "#0072B2", "marker": "o", "linewidth": 2.2}),
    ("best rival", lambda group: group.rival, {"color": "#D55E00", "marker": "s", "ls": "--"}),
    ("other peer", lambda group: group.other, {"color": "#009E73", "marker": "^", "ls": ":"}),
    ("fastest †", lambda group: group.dense, {"color": "#000000", "marker": "D", "ls": "-."}),
)
FLOOR = {"color": "#888888", "marker": "_", "ls": (0, (1, 2))}


@dataclasses.dataclass(frozen=True)
class Plot:
    """``panels`` are (operation, sweep) by title; ``y`` is of a row and a time."""

    caption: str
    panels: dict[str, tuple[str, str]]
    x_label: str
    x: Callable[[Row], float]
    y_label: str
    y: Callable[[Row, float], float]

    def groups(self, record: Record) -> dict[str, dict[float, Group]]:
        """By title and x; panels with two points or more."""
        found = {}
        for title, (op, sweep) in self.panels.items():
            for work in ("forward", "backward"):
                of_work = [g for g in groups(record.rows, sweep, op) if g.work == work]
                by_x = {self.x(group.ours): group for group in of_work}
                found[f"{title}, {work}".lstrip(", ")] = dict(sorted(by_x.items()))
        return {title: by_x for title, by_x in found.items() if len(by_x) > 1}


def microseconds_per_token(row: Row, seconds: float) -> float:
    return 1e6 * seconds / (row.case["batch"] * row.case["seqlen"])


PLOTS = {
    "seqlen": Plot(
        "Time of attention per token against sequence length",
        {"": ("attention", "seqlen")},
        *("sequence length (tokens)", lambda row: row.case["seqlen"]),
        *("time per token (us)", microseconds_per_token),
    ),
    "keys": Plot(
        "Time of attention per token against the share of keys attended",
        {"window varies": ("attention", "window"), "pivots vary": ("attention", "pivots")},
        *("keys attended (% of dense causal)", lambda row: 100 * (row.attended_fraction or 0)),
        *("time per token (us)", microseconds_per_token),
    ),
    "norms": Plot(
        "Bandwidth of the norms against hidden size",
        {"LayerNorm": ("layer_norm", "hidden"), "sandwich": ("sandwich_residual", "hidden")},
        *("hidden size (columns)", lambda row: row.case["hidden"]),
        *("bytes that must move (GB/s)", lambda row, seconds: row.bytes / seconds / 1e9),
    ),
}


def draw(plot: Plot, record: Record, path: Path) -> None:
    """A series with fewer than three points has no line; where a method has no time is a gap."""
    panels = plot.groups(record)
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(9.6, 3.1 * rows + 1.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    methods: dict[str, dict[str, None]] = {}
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, by_x) in zip(axes.flat, panels.items(), strict=False):
        lines = []
        for name, chosen, style in SERIES:
            found = {x: chosen(group) for x, group in by_x.items()}
            methods.setdefault(name, {}).update({row.method: None for row in found.values() if row})
            ys = [plot.y(row, row.median) if row else math.nan for row in found.values()]
            lines.append((name, ys, style))
        floors = [
            (group.ours, group.ours.floor(record.content["ceilings"])) for group in by_x.values()
        ]
        floor = [plot.y(row, floor) if floor else math.nan for row, floor in floors]
        for name, ys, style in [*lines, ("floor", floor, FLOOR)]:
            if count := sum(map(math.isfinite, ys)):
                style = style if count >= MIN_POINTS_OF_A_LINE else style | {"ls": "none"}
                (handles[name],) = axis.plot([*by_x], ys, markersize=5, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(plot.x_label, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks([*by_x], [f"{x:.0f}" for x in by_x], fontsize=8)
        axis.grid(alpha=0.3)
        if "GB/s" in plot.y_label:
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
    for axis in axes[:, 0]:
        axis.set_ylabel(plot.y_label, fontsize=9)
    named = {name: f"{name}: {' / '.join(methods[name])}" for name in handles if name in methods}
    labels = [named[name] if name in named and name != OURS else name for name in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", fontsize=8, frameon=False)
    cases = common(group.ours for by_x in panels.values() for group in by_x.values())
    figure.suptitle(f"{plot.caption}\n{record.machine}\n{cases}", fontsize=9)
    figure.savefig(path, format="png", dpi=110)
