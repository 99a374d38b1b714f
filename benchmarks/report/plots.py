"""The plots of report.py: numbers come in, matplotlib figures go out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

Style = dict[str, Any]
Curves = Mapping[str, Sequence[tuple[float, ...]]]

OTHERS = "#8A8A8A"

# Okabe and Ito's colours, which colour-blind people tell apart, by how a method's name begins.
# Relatives share a colour and differ in dashes; markers differ in any case.
FAMILIES = {
    "cogview_kernels": "#0072B2",
    "portable": "#56B4E9",
    "FlexAttention, gathered": "#D55E00",
    "FlexAttention on FlashAttention-4, gathered": "#D55E00",
    "FlexAttention": "#E69F00",
    "window + pivots": "#CC79A7",
    "CogView": "#009E73",
    "PyTorch PB-relax": "#009E73",
    "SDPA, dense mask": OTHERS,
    "SDPA": "#000000",
    "F.layer_norm": "#000000",
    "dense SDPA": "#000000",
    "FlashAttention": "#8C6D1F",
    "liger": "#E69F00",
    "quack": "#CC79A7",
}
UNMARKED = {"color": "#555555", "linewidth": 1, "linestyle": (0, (1, 1))}  # the floor
MARKERS = "osD^vP*X<>phd"
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """Colour, marker and dashes of each method of a record: the same in all of its plots."""
    found: dict[str, Style] = {}
    relatives: dict[str, int] = {}
    for number, method in enumerate(methods):
        family = max((name for name in FAMILIES if method.startswith(name)), key=len, default="")
        colour = FAMILIES.get(family, OTHERS)
        index = relatives.setdefault(colour, 0)
        relatives[colour] += 1
        found[method] = {
            "color": colour,
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": DASHES[index % len(DASHES)],
            "linewidth": 2.4 if method == "cogview_kernels" else 1.3,
            "zorder": 3 if method == "cogview_kernels" else 2,
        }
    return found


def lines(
    panels: Mapping[str, tuple[str, Curves]],
    y_label: str,
    title: str,
    styles: Mapping[str, Style],
    level: tuple[float, str] | None = None,
) -> Figure:
    """A panel for each title: its x label, and a line for each method. Points ``(x, y, low, high)``
    have a band. Axes are logarithmic; with a ``level`` to reach, y is linear and begins at 0."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawn = [method for method in styles if any(method in curves for _, curves in panels.values())]
    points = [point for _, curves in panels.values() for line in curves.values() for point in line]
    ys = [y for _, *values in points for y in values if not math.isnan(y)]
    size = 9.6, (3.5 if columns < 3 else 3) * rows + 0.22 * math.ceil(len(drawn) / 4) + 0.4
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, (x_label, curves)) in zip(axes, panels.items(), strict=False):
        for method, line in curves.items():
            x, y, *band = zip(*line, strict=True)
            axis.plot(x, y, markersize=4, **styles.get(method, UNMARKED))
            if band:
                axis.fill_between(x, *band, color=styles[method]["color"], alpha=0.15, linewidth=0)
        xs = sorted({x for line in curves.values() for x, *_ in line})
        if 0 in xs:
            axis.set_xscale("symlog", linthresh=xs[1])
        else:
            axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(xs))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        if level is None:
            few = max(ys) < 100 * min(ys)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(0, 1.1 * max(*ys, level[0]))
            axis.axhline(level[0], color="black", linewidth=1, linestyle=(0, (6, 3)))
            where = xs[0], level[0]
            axis.annotate(level[1], where, (0, 3), textcoords="offset points", fontsize=8)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel(x_label, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[::columns]:
        axis.set_ylabel(y_label, fontsize=9)
    if any("floor" in curves for _, curves in panels.values()):
        drawn.append("floor")
    handles = [
        Line2D([], [], label=name, markersize=4, **styles.get(name, UNMARKED)) for name in drawn
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}"


def roofline(
    points: Sequence[tuple[str, str, str, float, float]],
    ceilings: Mapping[str, Any],
    unit: tuple[str, float],
    title: str,
    styles: Mapping[str, Style],
) -> Figure:
    """Points ``(work, method, dtype, FLOP a byte, TFLOP/s)``: colour by method, marker by work."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    name, scale = unit
    copy, rates = ceilings["copy_bytes_per_s"], ceilings["matmul_flops"]
    works = list(dict.fromkeys(work for work, *_ in points))
    methods = [method for method in styles if any(method == point[1] for point in points)]
    intensities = [point[3] for point in points]
    x = np.geomspace(min(intensities) / 3, max(intensities) * 3, 400)
    for dtype in dict.fromkeys(dtype for _, _, dtype, *_ in points):
        roof = np.minimum(rates[dtype], x * copy) / scale
        axis.plot(x, roof, color="black", linewidth=1.2)
        axis.annotate(
            f"matrix product, {dtype}: {roof[-1]:.3g} {name}",
            (x[-1], roof[-1]),
            (0, 3),
            textcoords="offset points",
            horizontalalignment="right",
            fontsize=8,
        )
    axis.annotate(
        f"copy: {copy / 1e9:.4g} GB/s",
        (x[0], x[0] * copy / scale),
        (4, -2),
        textcoords="offset points",
        verticalalignment="top",
        fontsize=8,
    )
    for work, method, _, intensity, rate in points:
        axis.plot(
            intensity,
            1e12 * rate / scale,
            MARKERS[works.index(work) % len(MARKERS)],
            color=styles[method]["color"],
            markersize=6,
            alpha=0.85,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=styles[method]["zorder"],
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("useful FLOP a byte that must move", fontsize=9)
    axis.set_ylabel(f"useful {name}", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3, which="both")
    by_method = [
        Line2D([], [], color=styles[name]["color"], linestyle="", marker="o", label=name)
        for name in methods
    ]
    by_work = [
        Line2D(
            [],
            [],
            color="dimgrey",
            linestyle="",
            marker=MARKERS[i % len(MARKERS)],
            label=work.replace("_", " "),
        )
        for i, work in enumerate(works)
    ]
    figure.legend(handles=by_method, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axis.legend(handles=by_work, loc="lower right", fontsize=8)
    axis.set_title(title, fontsize=11)
    return figure
