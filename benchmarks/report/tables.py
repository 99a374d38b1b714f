"""Tables and sentences in Markdown, from records."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from benchmarks.report.records import OURS, Group, Record, Row, groups


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{float(f'{value:.3g}'):,g}"


def with_unit(value: float, units: dict[str, float]) -> str:
    unit = next((unit for unit, scale in units.items() if value >= scale), [*units][-1])
    return f"{digits(value / units[unit])} {unit}"


def time_text(seconds: float) -> str:
    return with_unit(seconds, {"s": 1, "ms": 1e-3, "us": 1e-6})


def bytes_text(number: float) -> str:
    return with_unit(number, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10})


def rate_text(flops_per_s: float) -> str:
    return with_unit(flops_per_s, {"TFLOP/s": 1e12, "GFLOP/s": 1e9, "MFLOP/s": 1e6})


def percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.095 else f"{fraction:.1%}"


def times(row: Row, ours: Row) -> str:
    """A peer's time as a multiple of ours, in bold where the peer is faster."""
    factor = row.median / ours.median
    text = f"{factor:.2f}x" if factor < 10 else f"{factor:.0f}x"
    return f"**{text}**" if factor < 1 else text


def table(lines: Sequence[dict[str, str]], left: int = 1) -> str:
    """Cells by the heads of their columns, of which the first ``left`` are text. Columns where no
    line has anything are left out."""
    heads = [head for head in lines[0] if any(line[head] for line in lines)]
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    shown = [heads, rule, *([line[head] for head in heads] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


LETTERS = {(1088, 4): "A", (4224, 2): "B", (4224, 6): "C", (16448, 2): "D"}


def label(row: Row) -> str:
    """A fixed case in short: ``A, 16x1088`` has batch and length, ``layer norm, 8192x2560`` rows
    and columns."""
    case, op = row.case.get("attention", row.case), row.op.replace("_", " ")
    if "hidden" in case:
        return f"{op}, {case['rows']}x{case['hidden']}"
    letter = LETTERS.get((case["seqlen"], case["key_window_times"]))
    return f"{letter if letter and op == 'attention' else op}, {case['batch']}x{case['seqlen']}"


def common(rows: Iterable[Row]) -> str:
    """What the cases have in common."""
    first, *others = [row.case for row in rows]
    return ", ".join(
        f"{name} {value}"
        for name, value in first.items()
        if value and name != "op" and all(case.get(name) == value for case in others)
    )


# docs/benchmarks.md.


def against(row: Row | None, ours: Row) -> str:
    return f"{time_text(row.median)}, {times(row, ours)} ({row.method})" if row else ""


def side_by_side(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    return " / ".join(text(value) if value is not None else "?" for value in values) * any(values)


def line(group: Group, ceilings: dict[str, Any]) -> dict[str, str]:
    ours, rival, dense, floor = group.ours, group.rival, group.dense, group.ours.floor(ceilings)
    dense_head = "fastest plain LayerNorm †" if "hidden" in ours.case else "best dense †"
    own = dense and dense.role == "dense" and dense.attended_fraction and dense.own_tflops
    beside = [row for row in (ours, rival, dense) if row]
    cells = {
        "case": label(ours),
        "work": group.work,
        "keys": ours.attended_fraction and percent(ours.attended_fraction),
        "median": time_text(ours.median),
        "minimum": time_text(ours.minimum),
        "spread": percent(ours.iqr / ours.median),
        "predicted": ours.predicted_seconds and time_text(ours.predicted_seconds),
        "of the floor": floor and percent(floor / ours.median),
        "useful rate": ours.flops and rate_text(ours.flops / ours.median),
        "GB/s": digits(ours.bytes / ours.median / 1e9),
        "best rival": against(rival, ours),
        dense_head: against(dense, ours),
        "its own rate": own and rate_text(1e12 * own),
        "fastest that computes the same": against(group.peer(same=True), ours),
        "extra memory": side_by_side([row.extra_bytes for row in beside], bytes_text),
        "host": side_by_side([row.host_seconds for row in beside], time_text),
    }
    return {head: cell or "" for head, cell in cells.items()}


def fixed_table(record: Record, op: str) -> str:
    """The fixed cases of an operation, a line for each kind of work; empty where there are none."""
    found = groups(record.rows, "fixed", op)
    if not found:
        return ""
    names = {label(group.ours): group.ours.case_name for group in found}
    legend = "; ".join(f"{short}: {name}" for short, name in names.items())
    shown = table([line(group, record.content["ceilings"]) for group in found], left=2)
    title = f"### {op.replace('_', ' ').capitalize()}"
    return f"{title}\n\n{shown}\n\n<sub>{legend}.</sub> {record.source}"


def conditions(record: Record) -> str:
    """The ceilings; an empty kernel's time; how far two timings of one call lay apart; how far ours
    had drifted where it was timed again."""
    content, parts = record.content, []
    for dtype, rate in content["ceilings"]["matmul_flops"].items():
        parts.append(f"matrix product in {dtype} {rate_text(rate)}")
    parts.append(f"copy {digits(content['ceilings']['copy_bytes_per_s'] / 1e9)} GB/s")
    for name, value in (content["ceilings"].get("clocks") or {}).items():
        parts.append(f"{name} under load {value}")
    for control in content.get("controls", []):
        other = control.get("other_median")
        found = other and f"{percent(abs(other / control['median'] - 1))} apart"
        parts.append(f"{control['name']} {found or time_text(control['median'])}")
    stages: dict[str, list[float]] = defaultdict(list)
    for drift in content.get("drift", []):
        stages[drift["after_stage"]].append(drift["median"] / drift["first_median"] - 1)
    for stage, drifts in stages.items():
        parts.append(f'ours again after "{stage}" {min(drifts):+.1%} to {max(drifts):+.1%}')
    return f"Ceilings and controls, measured in the run: {'; '.join(parts)}."


def not_measured(record: Record) -> str:
    """Which methods have no times, for how many rows and why."""
    counts = Counter[tuple[str, str]]()
    for entry in record.content.get("not_measured", []):
        reason = " ".join(entry["reason"].replace("|", "\\|").replace("<", "&lt;").split())
        counts[entry["method"], "failed: " * entry.get("failed", False) + reason] += 1
    counts["not reached", "no time was left"] = len(record.content.get("not_reached", []))
    lines = [
        {"not measured": method, "rows": str(count), "reason": reason}
        for (method, reason), count in counts.items()
        if count
    ]
    return f"{table(lines, left=3)}\n\n{record.source}" if lines else ""


# The README.


def readme_groups(record: Record) -> list[Group]:
    """Forward and backward of attention, decode and norms."""
    ops = ("attention", "decode", "layer_norm", "sandwich_residual")
    found = chain(*(groups(record.rows, "fixed", op) for op in ops))
    return [group for group in found if group.work in ("forward", "backward")]


def readme_table(record: Record) -> str:
    """A row for each case; in its cells forward and backward, one below the other."""
    found: dict[str, dict[str, list[str]]] = {}
    names = defaultdict[str, dict[str, None]](dict)
    for group in readme_groups(record):
        cells = found.setdefault(label(group.ours), defaultdict(list))
        cells["work"].append(group.work)
        cells[OURS].append(time_text(group.ours.median))
        peers = {"rival": group.rival, "dense, plain LayerNorm †": group.dense}
        for head, peer in peers.items():
            cells[head].append(times(peer, group.ours) if peer else "-")
            names[head] |= {peer.method: None} if peer else {}
    if not found:
        return f"None of the fixed cases has been measured on {record.device}.\n\n{record.source}"
    lines = [
        {"case": case} | {head: "<br>".join(texts) for head, texts in cells.items()}
        for case, cells in found.items()
    ]
    notes = [f"{head}: {'; '.join(methods)}." for head, methods in names.items() if methods]
    notes += [] if record.on_cuda else [f"On a CPU {OURS} is the portable path."]
    sources = f"<sub>{' '.join(notes)}</sub> {record.source}"
    return f"{table(lines, left=2)}\n\n{sources}\n\n{losses(record)}"


def losses(record: Record) -> str:
    """Where a method is faster than ours, whatever it computes: the fastest of each line."""
    lost = defaultdict[str, list[str]](list)
    for group in readme_groups(record):
        winner = group.best(lambda row: row.role != "ours")
        if winner and winner.median < group.ours.median:
            lost[winner.method].append(f"{label(winner).partition(',')[0]} {group.work}")
    parts = "; ".join(f"to {method} on {', '.join(where)}" for method, where in lost.items())
    nothing = f"On {record.device} no method is faster than ours in these cases."
    return f"**Ours loses on {record.device}** {parts}." if lost else nothing
