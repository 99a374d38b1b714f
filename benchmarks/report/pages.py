"""Makes the tables and plots of README.md and docs/benchmarks.md from the records in
benchmarks/results/, and from nothing else.

    python -m benchmarks.report.pages          # write them, from each device's newest records
    python -m benchmarks.report.pages --check  # exit status 1 and the place, if a page differs

Beside the pages stand the numbers themselves: what a row of a record says about time, floor and
peers (``median`` to ``ratio``), which need the standard library alone.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"
PLOTS = "docs/benchmarks"
OURS = "cogview_kernels"
Row = dict[str, Any]  # of a record's "benchmarks"


# What a row says.


def median(row: Row) -> float:
    """Seconds a call."""
    return statistics.median(row["stats"]["data"])


def spread(row: Row) -> tuple[float, float]:
    """Seconds at the 10th and the 90th percentile."""
    data = row["stats"]["data"]
    if len(data) == 1:
        return data[0], data[0]
    tenths = statistics.quantiles(data, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def floor_parts(row: Row, ceilings: dict[str, Any]) -> dict[str, float] | None:
    """Seconds that the useful products and the necessary bytes take at the measured ceilings, or
    None where a ceiling or a count is missing."""
    info = row["extra_info"]
    flops, moved = info.get("flops"), info.get("bytes")
    rate = ceilings["matmul_flops"].get(info["case"]["dtype"])
    if not (flops or moved) or (flops and not rate):
        return None
    return {
        "arithmetic": flops / rate if flops else 0.0,
        "memory": moved / ceilings["copy_bytes_per_s"] if moved else 0.0,
    }


def floor_seconds(row: Row, ceilings: dict[str, Any]) -> float | None:
    """What no method can be faster than: arithmetic or memory, whichever takes longer."""
    parts = floor_parts(row, ceilings)
    return None if parts is None else max(parts.values())


def fraction_of_floor(row: Row, ceilings: dict[str, Any]) -> float | None:
    """1 at the floor, 0.5 at twice its time."""
    floor = floor_seconds(row, ceilings)
    return None if floor is None else floor / median(row)


def tflops(row: Row) -> float | None:
    """Useful TFLOP/s: the three-region work, whatever the method computes beyond it."""
    flops = row["extra_info"].get("flops")
    return flops / median(row) / 1e12 if flops else None


def gigabytes_per_second(row: Row) -> float | None:
    """The bytes that must move, whatever the method moves beyond them."""
    moved = row["extra_info"].get("bytes")
    return moved / median(row) / 1e9 if moved else None


def tokens_per_second(row: Row) -> float | None:
    tokens = row["extra_info"].get("tokens")
    return tokens / median(row) if tokens else None


def ratio(row: Row, ours: Row | None) -> float | None:
    """Time over our time: above 1 is slower than ours."""
    return None if ours is None else median(row) / median(ours)


# Numbers as text.


def digits(value: float) -> str:
    """Three significant digits, and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    exponent = math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{value:,.{max(0, 2 - exponent)}f}"


def unit_of_time(seconds: float) -> tuple[str, float]:
    return ("s", 1) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)


def time_text(seconds: float) -> str:
    unit, scale = unit_of_time(seconds)
    return f"{digits(seconds / scale)} {unit}"


def spread_text(row: Row) -> str:
    unit, scale = unit_of_time(median(row))
    low, high = (digits(seconds / scale) for seconds in spread(row))
    return f"{digits(median(row) / scale)} {unit} ({low}-{high})"


def bytes_text(number: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= scale:
            return f"{digits(number / scale)} {unit}"
    return f"{digits(number / 2**10)} KiB"


def percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.095 else f"{fraction:.1%}"


def times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first ``left`` columns are text. Columns where no row has anything are left
    out."""
    rows = list(rows)
    kept = [i for i in range(len(heads)) if i < left or any(row[i] for row in rows)]
    rule = ["---" if i < left else "---:" for i in kept]
    lines = [[heads[i] for i in kept], rule, *([row[i] for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Records.


@dataclass(frozen=True)
class Record:
    """The newest record of a device."""

    path: str  # from the repository's root
    content: dict[str, Any]
    digest: str  # of the file: plots carry it

    @property
    def device(self) -> str:
        return self.content["machine_info"]["device"]

    @property
    def slug(self) -> str:
        return "-".join(re.findall("[a-z0-9]+", self.device.lower()))

    @property
    def ceilings(self) -> dict[str, Any]:
        return self.content["ceilings"]

    @property
    def rows(self) -> list[Row]:
        return self.content["benchmarks"]

    @functools.cached_property
    def functions(self) -> dict[str, str]:
        """What ours computes, for each operation; others may compute another function."""
        details = [row["extra_info"] for row in self.rows] + self.content.get("not_measured", [])
        return {entry["op"]: entry["computes"] for entry in details if entry["method"] == OURS}

    @property
    def on_cuda(self) -> bool:
        return self.content["machine_info"]["device_type"] == "cuda"

    @property
    def flops_unit(self) -> str:
        return "TFLOP/s" if self.on_cuda else "GFLOP/s"

    @property
    def flops_scale(self) -> float:
        return 1e12 if self.on_cuda else 1e9

    @property
    def source(self) -> str:
        """What stands under each table: where its numbers come from."""
        machine, commit = self.content["machine_info"], self.content["commit_info"]
        versions = {"torch": machine["torch"], **machine.get("versions", {})}
        what = [self.device]
        if not self.on_cuda and machine.get("threads"):
            what.append(f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}")
        what += [
            f"{name} {versions[name]}" for name in ("torch", "triton", "cuda") if name in versions
        ]
        changed = " with uncommitted changes" if commit.get("dirty") else ""
        if commit.get("dirty", False) is None:
            changed = " (whether with changes, nobody knows)"
        return (
            f"<sub>{', '.join(what)}; commit {commit['id'][:7]}{changed}, "
            f"{self.content['datetime'][:10]}; record: `{self.path}`</sub>"
        )


NEEDED = (
    "machine_info.device",
    "machine_info.device_type",
    "machine_info.torch",
    "commit_info.id",
    "datetime",
)
NEEDED_OF_SUITE = ("ceilings.matmul_flops", "ceilings.copy_bytes_per_s", "benchmarks")


def read(path: Path, root: Path, needed: Sequence[str]) -> Record:
    content = json.loads(path.read_bytes())
    for name in needed:
        value = content
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value in (None, "", "unknown"):
            raise ValueError(f"{path.relative_to(root)}: expected `{name}`, got none")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Record(path.relative_to(root).as_posix(), content, digest)


def newest(root: Path, kind: str) -> list[Record]:
    """The newest record of each device, CUDA devices first.

    Raises:
        ValueError: a record lacks its commit, its ceilings or its machine; the message names both.
    """
    needed = NEEDED + (NEEDED_OF_SUITE if kind == "suite" else ())
    found: dict[str, Record] = {}
    for path in sorted((root / RESULTS).glob(f"{kind}-*.json")):
        record = read(path, root, needed)
        other = found.get(record.slug)
        if other is None or other.content["datetime"] <= record.content["datetime"]:
            found[record.slug] = record
    return sorted(found.values(), key=lambda record: (not record.on_cuda, record.device))


# Rows of a record: a group has one case and one kind of work.

OPS = {
    "attention": "Attention",
    "decode": "Decode: one token against a cache",
    "layer_norm": "PB-relax LayerNorm",
    "sandwich_residual": "Sandwich residual: from one sub-layer to the next",
    "training_step": "Training step of the model",
}
WORKS = ("forward", "backward", "forward+backward", "step")

# The sweeps that have one variable, and how it follows from the case. Other cases are shown whole.
SWEEPS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "seqlen": ("sequence length (tokens)", lambda case: case["seqlen"]),
    "window": ("window (keys)", lambda case: case["query_window"] * case["key_window_times"]),
    "pivots": ("pivots", lambda case: case["num_pivots"]),
    "head_dim": ("head dimension", lambda case: case["head_dim"]),
    "dtype": ("dtype", lambda case: case["dtype"]),
    "hidden": ("columns", lambda case: case["hidden"]),
}
FIELDS_OF = {"window": ("query_window", "key_window_times")}  # of the case; others: their name


def info(row: Row) -> dict[str, Any]:
    return row["extra_info"]


def ours_of(group: Iterable[Row]) -> Row | None:
    return next((row for row in group if info(row)["method"] == OURS), None)


def computes_another(row: Row, record: Record) -> bool:
    return info(row)["computes"] != record.functions.get(info(row)["op"], info(row)["computes"])


def groups(record: Record, op: str) -> Iterator[tuple[str, str, list[Row]]]:
    """The case's name, the work and the rows of it: ours first, then who computes the same by
    time, then who computes something else."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in record.rows:
        if info(row)["op"] == op:
            found[info(row)["case_name"], info(row)["work"]].append(row)
    cases = list(dict.fromkeys(case for case, _ in found))
    for case in cases:
        for work in WORKS:
            if (case, work) in found:
                order = [
                    (info(row)["method"] != OURS, computes_another(row, record), median(row), i)
                    for i, row in enumerate(found[case, work])
                ]
                yield case, work, [found[case, work][key[-1]] for key in sorted(order)]


def in_sweep(group: list[Row], sweep: str) -> bool:
    return sweep in info(group[0])["sweeps"]


def shown_whole(group: list[Row]) -> bool:
    return any(sweep not in SWEEPS for sweep in info(group[0])["sweeps"])


def sweep_groups(record: Record, op: str, sweep: str) -> dict[str, dict[Any, list[Row]]]:
    """For each kind of work the groups of a sweep by its variable, where there are two or more."""
    found: dict[str, dict[Any, list[Row]]] = defaultdict(dict)
    for _, work, group in groups(record, op):
        if in_sweep(group, sweep):
            found[work][SWEEPS[sweep][1](info(group[0])["case"])] = group
    return {work: dict(sorted(by.items())) for work, by in found.items() if len(by) > 1}


def best_dense(group: list[Row]) -> Row | None:
    """The fastest of torch's dense attentions, or of the training steps with one."""
    dense = [
        row
        for row in group
        if "SDPA" in info(row)["method"] and info(row)["computes"].startswith("dense")
    ]
    return min(dense, key=median, default=None)


def best_same(group: list[Row], record: Record) -> Row | None:
    """The fastest of those that compute what ours does and are not ours."""
    same = [
        row
        for row in group
        if not info(row)["method"].startswith((OURS, "portable"))
        and not computes_another(row, record)
    ]
    return min(same, key=median, default=None)


def best_other(group: list[Row], record: Record) -> Row | None:
    """The fastest of those that compute another function and are not ours."""
    others = [
        row
        for row in group
        if computes_another(row, record) and not info(row)["method"].startswith(OURS)
    ]
    return min(others, key=median, default=None)


def named(*parts: str) -> Callable[[list[Row]], Row | None]:
    """The fastest of the methods whose names have these parts."""

    def find(group: list[Row]) -> Row | None:
        found = [row for row in group if all(part in info(row)["method"] for part in parts)]
        return min(found, key=median, default=None)

    return find


# Tables.


def group_table(group: list[Row], record: Record) -> str:
    """All methods of a case and a kind of work."""
    ours = ours_of(group)

    def cells(row: Row) -> list[str]:
        details = info(row)

        def text(value: float | None, how: Callable[[float], str]) -> str:
            return "" if value is None else how(value)

        mark = " †" if computes_another(row, record) else ""
        once = [text(details.get(name), time_text) for name in ONCE]
        error = max(details.get("errors", {}).values(), default=None)
        return [
            shown_name(details["method"]) + mark,
            details["computes"],
            spread_text(row),
            text(ratio(row, ours), times),
            text(tokens_per_second(row), digits),
            text(useful_rate(row, record), digits),
            text(gigabytes_per_second(row), digits),
            text(fraction_of_floor(row, record.ceilings), percent),
            text(details.get("extra_bytes"), bytes_text),
            *once,
            text(error, lambda value: f"{value:.1e}"),
        ]

    heads = (
        *("method", "computes", "median (p10-p90)", "time / ours", "tokens/s"),
        *(record.flops_unit, "GB/s"),
        *("of the floor", "extra memory", "prepare", "first call", "launch", "error"),
    )
    return table(heads, map(cells, group), left=2)


def shown_name(method: str) -> str:
    return f"**{method}**" if method == OURS else method


ONCE = ("prepare_seconds", "first_call_seconds", "host_seconds")


def group_title(work: str, group: list[Row], record: Record) -> str:
    details = info(group[0])
    parts = [f"**{work}**"]
    if details.get("attended_fraction") is not None and details["op"] == "attention":
        parts.append(f"{percent(details['attended_fraction'])} of dense causal attention's keys")
    floor = floor_parts(group[0], record.ceilings)
    if floor:
        bound = max(floor, key=lambda part: floor[part])
        parts.append(f"floor {time_text(floor[bound])} ({bound})")
    return ", ".join(parts)


def sweep_table(by: dict[Any, list[Row]], sweep: str, record: Record) -> str:
    """A row for each method, a column for each value: time, and time over ours."""
    methods = dict.fromkeys(info(row)["method"] for group in by.values() for row in group)
    details = [info(group[0]) for group in by.values()]
    lines = [
        [name, *(str(entry["case"][name]) for entry in details)]
        for name, of_case in details[0]["case"].items()
        if name not in FIELDS_OF.get(sweep, (sweep,))
        and any(entry["case"][name] != of_case for entry in details)
    ]
    if details[0].get("attended_fraction") is not None:
        lines.append(["keys attended", *(percent(entry["attended_fraction"]) for entry in details)])
    for method in methods:
        rows = {
            value: next((row for row in group if info(row)["method"] == method), None)
            for value, group in by.items()
        }
        another = any(row is not None and computes_another(row, record) for row in rows.values())
        cells = [shown_name(method) + (" †" if another else "")]
        for value, row in rows.items():
            if row is None:
                cells.append("")
                continue
            against = ratio(row, ours_of(by[value])) if method != OURS else None
            cells.append(time_text(median(row)) + (f", {times(against)}" if against else ""))
        lines.append(cells)
    ours = [ours_of(group) for group in by.values()]

    def of_ours(what: str, value: Value, how: Callable[[float], str]) -> None:
        numbers = [None if row is None else value(row) for row in ours]
        if any(number is not None for number in numbers):
            texts = ("" if number is None else how(number) for number in numbers)
            lines.append([f"{OURS}: {what}", *texts])

    of_ours("of the floor", lambda row: fraction_of_floor(row, record.ceilings), percent)
    of_ours(record.flops_unit, lambda row: useful_rate(row, record), digits)
    of_ours("GB/s", gigabytes_per_second, digits)
    of_ours("extra memory", lambda row: info(row).get("extra_bytes"), bytes_text)
    return table([SWEEPS[sweep][0], *map(str, by)], lines)


def useful_rate(row: Row, record: Record) -> float | None:
    """In the unit of the record."""
    rate = tflops(row)
    return None if rate is None else 1e12 * rate / record.flops_scale


def overview(found: list[tuple[str, str, list[Row]]], record: Record) -> str:
    """The cases that are shown whole, a line for each kind of work: ours beside the best others."""

    def against(row: Row | None, ours: Row) -> str:
        if row is None:
            return ""
        factor = times(median(row) / median(ours))
        return f"{time_text(median(row))}, {factor} ({info(row)['method']})"

    lines = []
    for case, work, group in found:
        ours = ours_of(group)
        if ours is None or not shown_whole(group):
            continue
        floor = fraction_of_floor(ours, record.ceilings)
        lines.append(
            (
                case,
                work,
                time_text(median(ours)),
                "" if floor is None else percent(floor),
                against(best_same(group, record), ours),
                against(best_other(group, record), ours),
            )
        )
    heads = ("case", "work", OURS, "of the floor", "fastest peer", "fastest †")
    return table(heads, lines, left=2) if lines else ""


def common(groups_of_sweep: Iterable[list[Row]]) -> str:
    """What all cases of a sweep have in common."""
    cases = [info(group[0])["case"] for group in groups_of_sweep]
    same = {name: value for name, value in cases[0].items() if name != "op" and value}
    for case in cases[1:]:
        same = {name: value for name, value in same.items() if case.get(name) == value}
    return ", ".join(f"{name} {value}" for name, value in same.items())


def machine_table(record: Record) -> str:
    machine = record.content["machine_info"]
    lines = [
        (f"matrix product, {dtype}", f"{digits(rate / record.flops_scale)} {record.flops_unit}")
        for dtype, rate in record.ceilings["matmul_flops"].items()
    ]
    lines.append(
        ("copy, read and written", f"{digits(record.ceilings['copy_bytes_per_s'] / 1e9)} GB/s")
    )
    if machine.get("multiprocessors"):
        lines.append(("multiprocessors", str(machine["multiprocessors"])))
    if machine.get("l2_bytes"):
        lines.append(("L2 cache", bytes_text(machine["l2_bytes"])))
    if machine.get("driver"):
        lines.append(("driver", str(machine["driver"])))
    for when, clocks in (("at rest", machine), ("under load", record.ceilings)):
        for name, value in (clocks.get("clocks") or {}).items():
            lines.append((f"{name}, {when}", str(value)))
    versions = {"Python": machine.get("python"), "torch": machine["torch"]}
    for name, value in (versions | machine.get("versions", {})).items():
        if value:
            lines.append((name, str(value)))
    return table(("ceilings, measured in the run, and the machine", ""), lines)


def not_measured(record: Record) -> str:
    """Which rows are missing and why, folded away."""
    missing = record.content.get("not_measured", [])
    if not missing:
        return unreached(record)
    planned = Counter(
        (entry["op"], entry["method"]) for entry in [*map(info, record.rows), *missing]
    )
    where: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in missing:
        where[entry["method"], entry["reason"]].append(entry)

    def places(method: str, entries: list[dict[str, Any]]) -> Iterator[str]:
        for op, count in Counter(entry["op"] for entry in entries).items():
            name = op.replace("_", " ")
            if count == planned[op, method]:
                yield f"{name}: all"
                continue
            cases: dict[str, list[str]] = defaultdict(list)
            for entry in entries:
                if entry["op"] == op:
                    cases[entry["case_name"]].append(entry["work"])
            few = "; ".join(f"{case} ({', '.join(works)})" for case, works in cases.items())
            yield f"{name}: {few if len(cases) <= 4 else f'{count} rows'}"

    lines = [
        (
            method,
            "; ".join(places(method, entries)),
            " ".join(reason.replace("|", "\\|").replace("<", "&lt;").split()),
        )
        for (method, reason), entries in where.items()
    ]
    return "\n".join(
        [
            f"<details><summary>Not measured here: {len(missing)} rows, and why</summary>\n",
            table(("method", "where", "reason"), lines, left=3),
            f"\n{record.source}\n</details>",
        ]
    ) + (f"\n\n{unreached(record)}" if unreached(record) else "")


def unreached(record: Record) -> str:
    count = len(record.content.get("not_reached", []))
    return f"Not reached in the time that there was: {count} rows." if count else ""


# Plots: what is drawn, and what of.


@dataclass(frozen=True)
class Plot:
    name: str  # of the file, behind the device
    caption: str
    draw: Callable[[], Any]  # the matplotlib figure


Value = Callable[[Row], "float | None"]


def curves(
    by: dict[Any, list[Row]],
    value: Value,
    label: Callable[[str], str],
    band: Callable[[Row], tuple[float, float]] | None = None,
    floor: Value | None = None,
) -> dict[str, list[tuple[float, ...]]]:
    """For each method's label points ``(x, y)``, or ``(x, y, low, high)`` with a band; NaN where
    others have a point. And the floor."""
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    gap = (math.nan,) * (3 if band else 1)
    methods = dict.fromkeys(info(row)["method"] for group in by.values() for row in group)
    for x, group in by.items():
        rows = {info(row)["method"]: row for row in group}
        for method in methods:
            y = value(rows[method]) if method in rows else None
            here = (y, *(band(rows[method]) if band else ())) if y else gap
            found[label(method)].append((x, *here))
        ours = ours_of(group)
        if floor is not None and ours is not None and (y := floor(ours)):
            found[FLOOR].append((x, y))
    return {
        name: line for name, line in found.items() if not all(math.isnan(y) for _, y, *_ in line)
    }


FLOOR = "floor"


def plots(record: Record) -> list[Plot]:
    """The plots that this record has the rows for."""
    ceilings = record.ceilings
    methods = list(dict.fromkeys(info(row)["method"] for row in record.rows))
    others = {info(row)["method"] for row in record.rows if computes_another(row, record)}

    def label(method: str) -> str:
        return f"{method} †" if method in others else method

    def styles() -> dict[str, Any]:
        from benchmarks.report import plots as report_plots

        return {label(name): style for name, style in report_plots.styles(methods).items()}

    def lines(panels: Any, y_label: str, title: str, level: Any = None) -> Any:
        from benchmarks.report import plots as report_plots

        return report_plots.lines(panels, y_label, title, styles(), level)

    def panels(
        op: str, sweep: str, value: Value, band: Any = None, floor: Value | None = None
    ) -> dict[str, Any]:
        """Titles and curves, one for each kind of work; the x axis is the sweep's."""
        return {
            work: (SWEEPS[sweep][0], curves(by, value, label, band, floor))
            for work, by in sweep_groups(record, op, sweep).items()
        }

    def floor_per_token(row: Row) -> float | None:
        seconds = floor_seconds(row, ceilings)
        return None if seconds is None else seconds / queries(row) * 1e6

    found = []
    title = f"{record.device} († computes another function): "
    against_seqlen = panels(
        "attention", "seqlen", microseconds_per_token, microseconds_spread, floor_per_token
    )
    if against_seqlen:
        draw = partial(lines, against_seqlen, "time per token (us)", title + "attention")
        caption = "Time of attention per token against sequence length"
        found.append(Plot("seqlen", caption, draw))
    decode = panels("decode", "seqlen", microseconds, spread_in_microseconds)
    if decode:
        draw = partial(lines, decode, "time of a call (us)", title + "decode")
        caption = "Time of a call, a token for each sequence, against the length of the cache"
        found.append(Plot("decode", caption, draw))
    memory = panels("attention", "seqlen", kibibytes_per_token)
    if any(points for _, points in memory.values()):
        draw = partial(lines, memory, "extra memory per token (KiB)", title + "attention")
        caption = "Memory of attention beyond its inputs, per token, against sequence length"
        found.append(Plot("memory", caption, draw))
    regions = {
        f"{sweep}, {work}": panel
        for sweep in ("window", "pivots")
        for work, panel in panels(
            "attention", sweep, microseconds_per_token, microseconds_spread, floor_per_token
        ).items()
    }
    if regions:
        draw = partial(lines, regions, "time per token (us)", title + "attention")
        caption = "Time of attention per token against the number of keys in the window, of pivots"
        found.append(Plot("regions", caption, draw))
    norms = {
        f"{op}, {work}": panel
        for op in ("layer_norm", "sandwich_residual")
        for work, panel in panels(op, "hidden", gigabytes_per_second).items()
    }
    if norms:
        level = ceilings["copy_bytes_per_s"] / 1e9, "copy, measured"
        draw = partial(lines, norms, "GB/s that must move", title + "norms", level)
        caption = "Bandwidth of the norms against the number of columns, beside that of a copy"
        found.append(Plot("norms", caption, draw))
    points = [
        (what, label(method), dtype, intensity, rate)
        for what, method, dtype, intensity, rate in roofline_points(record)
    ]
    if points:
        unit = record.flops_unit, record.flops_scale

        def roofline() -> Any:
            from benchmarks.report import plots as report_plots

            return report_plots.roofline(points, ceilings, unit, title + "useful work", styles())

        caption = f"Useful {record.flops_unit} against FLOP a byte, beside the measured ceilings"
        found.append(Plot("roofline", caption, roofline))
    return found


def queries(row: Row) -> int:
    case = info(row)["case"]
    return case["batch"] * (case["q_len"] or case["seqlen"])


def microseconds(row: Row) -> float:
    return median(row) * 1e6


def spread_in_microseconds(row: Row) -> tuple[float, float]:
    low, high = (seconds * 1e6 for seconds in spread(row))
    return low, high


def microseconds_per_token(row: Row) -> float:
    return median(row) / queries(row) * 1e6


def microseconds_spread(row: Row) -> tuple[float, float]:
    low, high = (seconds / queries(row) * 1e6 for seconds in spread(row))
    return low, high


def kibibytes_per_token(row: Row) -> float | None:
    extra = info(row).get("extra_bytes")
    return None if extra is None else extra / queries(row) / 2**10


def roofline_points(record: Record) -> list[tuple[str, str, str, float, float]]:
    """(operation and work, method, dtype, FLOP a byte, TFLOP/s) of the cases that are shown whole:
    ours, the fastest that computes the same, the fastest dense attention of torch."""
    points = []
    for op in OPS:
        for _, work, group in groups(record, op):
            details = info(group[0])
            floor = floor_parts(group[0], record.ceilings)
            if not (shown_whole(group) and floor and all(floor.values())):
                continue
            for row in (ours_of(group), best_same(group, record), best_dense(group)):
                if row is not None:
                    intensity = details["flops"] / details["bytes"]
                    what = op if work == "step" else f"{op} {work}"
                    rate = tflops(row)
                    assert rate is not None
                    points.append(
                        (what, info(row)["method"], details["case"]["dtype"], intensity, rate)
                    )
    return points


# Pages.

README, PAGE = "README.md", "docs/benchmarks.md"
EXPERIMENTS = {"quality": "the same performance?", "instability": "why the norm is a sandwich"}
COUNTED = "docs/kernel_costs.json"
NO_GPU = "No GPU figures have been measured yet."

# What stands beside ours in the README.
RIVALS: dict[str, Callable[[list[Row]], Row | None]] = {
    "dense causal SDPA": best_dense,
    "FlexAttention, gathered pivots": named("FlexAttention", "gathered"),
    "CogView's formulation": named("CogView's formulation"),
}
README_WORKS = ("forward", "forward+backward")


def link(plot: Plot, record: Record, page: str) -> str:
    folder = PLOTS if page == README else Path(PLOTS).name
    return f"![{plot.caption}, on {record.device}]({folder}/{record.slug}-{plot.name}.png)"


def summary_table(record: Record) -> str:
    """The fixed cases, ours beside the rivals."""
    lines, shown = [], []
    for _, work, group in groups(record, "attention"):
        ours, case = ours_of(group), info(group[0])["case"]
        if work not in README_WORKS or ours is None or not in_sweep(group, "fixed"):
            continue
        shown.append(group)
        others = [rival(group) for rival in RIVALS.values()]
        lines.append(
            [
                f"{case['batch']}x{case['seqlen']}",
                percent(info(group[0])["attended_fraction"]),
                work,
                time_text(median(ours)),
                *(times(median(row) / median(ours)) if row else "" for row in others),
            ]
        )
    if not lines:
        return f"None of the fixed cases has been measured on {record.device}.\n\n{record.source}"
    heads = ["batch x length", "keys attended", "work", OURS, *RIVALS]
    note = "" if record.on_cuda else f" On a CPU {OURS} is the portable path."
    return f"{table(heads, lines, left=3)}\n\n<sub>{common(shown)}.{note}</sub> {record.source}"


def summary(records: Sequence[Record], experiments: dict[str, list[Record]]) -> str:
    """The README's part."""
    parts = beginning(records)
    for record in records:
        parts.append(summary_table(record))
        parts += [link(plot, record, README) for plot in plots(record) if plot.name == "seqlen"]
    for name, found in experiments.items():
        title = EXPERIMENTS[name]
        if found:
            parts.append(f"Experiment: [{title}]({PAGE}#{anchor(title)})")
    return "\n\n".join(parts)


def anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def device_part(record: Record) -> str:
    """Everything that a record holds."""
    parts = [f"## {record.device}", machine_table(record), record.source]
    pictures = {plot.name: link(plot, record, PAGE) for plot in plots(record)}
    if "roofline" in pictures:
        parts.append(pictures["roofline"])
    drawn = {
        "attention": ("seqlen", "memory", "regions"),
        "decode": ("decode",),
        "layer_norm": ("norms",),
    }
    for op, title in OPS.items():
        found = list(groups(record, op))
        if not found:
            continue
        parts.append(f"### {title}")
        parts += [pictures[name] for name in drawn.get(op, ()) if name in pictures]
        if overview(found, record):
            parts += [overview(found, record), record.source]
        whole: dict[str, list[str]] = defaultdict(list)
        for case, work, group in found:
            if shown_whole(group):
                whole[case] += [group_title(work, group, record), group_table(group, record)]
                whole[case].append(record.source)
        for case, tables in whole.items():
            parts += [f"<details><summary>All methods: {case}</summary>", *tables, "</details>"]
        for sweep, (variable, _) in SWEEPS.items():
            for work, by in sweep_groups(record, op, sweep).items():
                parts.append(f"<details><summary>{work} against {variable}: {common(by.values())}")
                parts[-1] += "</summary>"
                parts += [sweep_table(by, sweep, record), record.source, "</details>"]
    missing = not_measured(record)
    return "\n\n".join([*parts, missing] if missing else parts)


def beginning(records: Sequence[Record]) -> list[str]:
    if not records:
        return [f"{NO_GPU} No record yet: `make bench` makes one."]
    return [] if any(record.on_cuda for record in records) else [NO_GPU]


def devices(records: Sequence[Record]) -> str:
    parts = beginning(records)
    return "\n\n".join([*parts, *map(device_part, records)])


def experiment_part(name: str, records: Sequence[Record]) -> str:
    if not records:
        return f"No record yet: `make {name}` makes one."
    module = importlib.import_module(f"benchmarks.experiments.{name}")
    parts = []
    for record in records:
        picture = experiment_picture(name, record, records)
        parts.append(module.table(record.content).strip())
        parts.append(f"![{EXPERIMENTS[name].capitalize()}]({Path(picture).name})")
        parts += [module.HOW_TO_READ] if hasattr(module, "HOW_TO_READ") else []
        parts.append(record.source)
    return "\n\n".join(parts)


def experiment_picture(name: str, record: Record, records: Sequence[Record]) -> str:
    """From the repository's root; the first device's has the plain name."""
    return f"docs/{name}.png" if record is records[0] else f"docs/{name}-{record.slug}.png"


def counted(root: Path) -> str:
    """What the host model counted, in short."""
    from benchmarks.kernels import attention_costs

    record = json.loads((root / COUNTED).read_text())
    lines = []
    for case, rows in by_case(record["attention"]).items():
        forward = next(row for row in rows if row["kernel"] == "forward")
        for row in (forward, attention_costs.backward(rows)):
            products = row["products"] / row["useful_products"]
            moved = attention_costs.moved(row) / row["must_touch"]
            lines.append((case, row["kernel"], f"{products:.2f}", f"{moved:.2f}"))
    heads = ("attention", "kernels", "products issued / useful", "bytes moved / needed")
    parts = [table(heads, lines, left=2)]
    norms = by_case(record["norms"])
    operators = [row["operator"] for row in next(iter(norms.values()))]
    lines = []
    for i, operator in enumerate(operators):
        cells = (f"{rows[i]['activations'] / rows[i]['floor']:.2f}" for rows in norms.values())
        lines.append((operator, *cells))
    parts.append(table(("activations moved / needed", *norms), lines))
    return "\n\n".join(f"{part}\n\n<sub>record: `{COUNTED}`</sub>" for part in parts)


def by_case(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["case"]].append(row)
    return found


@dataclass(frozen=True)
class Report:
    """What the records give."""

    blocks: dict[tuple[str, str], str]  # of a page and a mark
    pictures: dict[str, tuple[str, Callable[[Path], None]]]  # path: digest, drawing


def report(root: Path) -> Report:
    from benchmarks.report import plots as report_plots

    records = newest(root, "suite")
    experiments = {name: newest(root, name) for name in EXPERIMENTS}
    blocks = {
        (README, "measured"): summary(records, experiments),
        (PAGE, "measured"): devices(records),
        (PAGE, "counted"): counted(root),
    }
    pictures: dict[str, tuple[str, Callable[[Path], None]]] = {}
    for record in records:
        for plot in plots(record):
            path = f"{PLOTS}/{record.slug}-{plot.name}.png"
            digest = digest_of(record, report_plots.lines)
            pictures[path] = digest, partial(save_figure, plot)
    for name, found in experiments.items():
        blocks[PAGE, name] = experiment_part(name, found)
        for record in found:
            draw = importlib.import_module(f"benchmarks.experiments.{name}").draw
            path = experiment_picture(name, record, found)
            pictures[path] = digest_of(record, draw), partial(draw, record.content)
    return Report(blocks, pictures)


def digest_of(record: Record, draw: Callable[..., Any]) -> str:
    """Of a picture: the record, and the module that draws it."""
    source = Path(inspect.getsourcefile(draw) or "").read_bytes()
    return hashlib.sha256(record.digest.encode() + source).hexdigest()[:16]


def save_figure(plot: Plot, path: Path) -> None:
    plot.draw().savefig(path, format="png", dpi=110)


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def block(text: str, name: str) -> str:
    begin, end = marks(name)
    return text.split(begin)[1].split(end)[0].strip()


def inserted(text: str, name: str, content: str) -> str:
    begin, end = marks(name)
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def differences(root: Path, made: Report) -> Iterator[str]:
    """Where pages and pictures say something else than the records."""
    for (page, name), expected in made.blocks.items():
        shown = block((root / page).read_text(), name).splitlines()
        wanted = expected.splitlines()
        for i in range(max(len(shown), len(wanted))):
            pair = [lines[i] if i < len(lines) else "(nothing)" for lines in (shown, wanted)]
            if pair[0] != pair[1]:
                yield f"{page}, `{name}`, line {i + 1}: {pair[0]}\n  the records give: {pair[1]}"
                break
    for path, (digest, _) in made.pictures.items():
        if digest_of_picture(root / path) != digest:
            yield f"{path}: not drawn from the newest record, or not by this code"
    for leftover in left_over(root, made):
        yield f"{leftover.relative_to(root)}: no record gives it"


def left_over(root: Path, made: Report) -> list[Path]:
    drawn = [*(root / PLOTS).glob("*.png")]
    drawn += [path for name in EXPERIMENTS for path in (root / "docs").glob(f"{name}*.png")]
    return [
        path for path in sorted(drawn) if path.relative_to(root).as_posix() not in made.pictures
    ]


def digest_of_picture(path: Path) -> str | None:
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("record")


def draw_picture(path: Path, digest: str, draw: Callable[[Path], None]) -> None:
    """Draws, and notes in the file of what."""
    from PIL import Image, PngImagePlugin

    from cogview.files import atomic_write

    noted = PngImagePlugin.PngInfo()
    noted.add_text("record", digest)
    with atomic_write(path) as temporary:
        draw(temporary)
        with Image.open(temporary) as image:
            image.load()
            image.save(temporary, format="PNG", pnginfo=noted, optimize=True)


def write(root: Path, made: Report) -> None:
    for page in dict.fromkeys(page for page, _ in made.blocks):
        text = (root / page).read_text()
        for (where, name), content in made.blocks.items():
            if where == page:
                text = inserted(text, name, content)
        (root / page).write_text(text)
    for path, (digest, draw) in made.pictures.items():
        if digest_of_picture(root / path) != digest:
            draw_picture(root / path, digest, draw)
    for leftover in left_over(root, made):
        leftover.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether pages differ")
    arguments = parser.parse_args()
    made = report(ROOT)
    if arguments.check:
        found = list(differences(ROOT, made))
        sys.exit("\n".join([*found, "run `make report`"]) if found else 0)
    write(ROOT, made)
    print(made.blocks[README, "measured"])


if __name__ == "__main__":
    main()
