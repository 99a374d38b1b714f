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


def percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.095 else f"{fraction:.1%}"


def times(row: Row, ours: Row) -> str:
    """A peer's time as a multiple of ours."""
    factor = row.median / ours.median
    return f"{factor:.2f}x" if factor < 10 else f"{factor:.0f}x"


def table(lines: Sequence[dict[str, str]], left: int = 1) -> str:
    """Cells by the heads of their columns, of which the first ``left`` are text. Columns where no
    line has anything are left out."""
    heads = [head for head in dict.fromkeys(chain(*lines)) if any(line.get(head) for line in lines)]
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    shown = [heads, rule, *([line.get(head, "") for head in heads] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


LETTERS = {(1088, 4): "A", (4224, 2): "B", (4224, 6): "C", (16448, 2): "D"}


def label(row: Row) -> str:
    """A fixed case in short: ``A, 16x1088`` has batch and length, ``layer norm, 8192x2560`` rows
    and columns."""
    case, op = row.case, row.op.replace("_", " ")
    if "hidden" in case:
        return f"{op}, {case['rows']}x{case['hidden']}"
    seqlen = case["seqlen"] if "seqlen" in case else case["text_len"] + case["image_len"]
    letter = LETTERS.get((seqlen, case["key_window_times"])) if op == "attention" else None
    return f"{letter or op}, {case['batch']}x{seqlen}"


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
    """In bold where the peer is faster."""
    if row is None:
        return ""
    mark = "**" * (row.median < ours.median)
    return f"{time_text(row.median)}, {mark}{times(row, ours)}{mark} ({row.method})"


def line(group: Group, ceilings: dict[str, Any]) -> dict[str, str]:
    ours, rival, dense = group.ours, group.rival, group.dense
    floor, fraction, predicted = (
        ours.floor(ceilings),
        ours.attended_fraction,
        ours.predicted_seconds,
    )
    is_dense = dense is not None and dense.role == "dense"
    beside = [row for row in (ours, rival, dense) if row]
    return {
        "case": label(ours),
        "work": group.work,
        "keys": percent(fraction) if fraction else "",
        "median": time_text(ours.median),
        "minimum": time_text(ours.minimum),
        "spread": percent(ours.iqr / ours.median),
        "predicted": time_text(predicted) if predicted else "",
        "of the floor": percent(floor / ours.median) if floor else "",
        "TFLOP/s": digits(ours.tflops) if ours.flops else "",
        "GB/s": digits(ours.bytes / ours.median / 1e9),
        "best rival": against(rival, ours),
        "best dense †" if is_dense else "fastest plain LayerNorm †": against(dense, ours),
        "its own TFLOP/s": digits(dense.own_tflops) if dense and is_dense else "",
        "fastest that computes the same": against(group.peer(same=True), ours),
        "extra memory": "; ".join(bytes_text(row.extra_bytes or 0) for row in beside),
        "host": "; ".join(time_text(row.host_seconds) for row in beside if row.host_seconds),
    }


def fixed_table(record: Record, op: str) -> str:
    """The fixed cases of an operation, a line for each kind of work; empty where there are none."""
    found = groups(record.rows, "fixed", op)
    if not found:
        return ""
    names = {label(group.ours): group.ours.case_name for group in found}
    legend = "; ".join(f"{short}: {name}" for short, name in names.items())
    shown = table([line(group, record.content["ceilings"]) for group in found], left=2)
    return f"{shown}\n\n<sub>{legend}.</sub> {record.source}"


def conditions(record: Record) -> str:
    """The ceilings; an empty kernel's time; how far two timings of one call lay apart; how far ours
    had drifted where it was timed again."""
    content, parts = record.content, []
    for dtype, rate in content["ceilings"]["matmul_flops"].items():
        parts.append(f"matrix product in {dtype} {digits(rate / 1e12)} TFLOP/s")
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
    """Which methods have no times, where and why."""
    where: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for entry in record.content.get("not_measured", []):
        reason = " ".join(entry["reason"].replace("|", "\\|").replace("<", "&lt;").split())
        failed = "failed: " * entry.get("failed", False)
        where[entry["method"], failed + reason][entry["op"].replace("_", " ")] += 1
    if unreached := len(record.content.get("not_reached", [])):
        where["not reached", "there was no time"]["rows"] = unreached
    lines = []
    for (method, reason), counts in where.items():
        rows = ", ".join(f"{op} {count}" for op, count in counts.items())
        lines.append({"not measured": method, "rows": rows, "reason": reason})
    return f"{table(lines, left=3)}\n\n{record.source}" if lines else ""


# The README.

PEERS: dict[str, Callable[[Group], Row | None]] = {
    "rival": lambda group: group.rival,
    "best dense, plain LayerNorm †": lambda group: group.dense,
    "fastest of the same": lambda group: group.peer(same=True),
}


def readme_groups(record: Record) -> dict[str, list[Group]]:
    """Attention, decode and norms: of each fixed case the forward, and the work with a backward."""
    found: dict[str, list[Group]] = defaultdict(list)
    for op in ("attention", "decode", "layer_norm", "sandwich_residual"):
        of_op = groups(record.rows, "fixed", op)
        both = any(group.work == "forward+backward" for group in of_op)
        for group in of_op:
            if group.work in ("forward", "forward+backward" if both else "backward"):
                found[label(group.ours)].append(group)
    return found


def readme_table(record: Record) -> str:
    """A line for each case; in the cells the forward, then the work with a backward."""
    lines, names = [], defaultdict[str, dict[str, None]](dict)
    for case, found in readme_groups(record).items():
        cells = {"case": case, OURS: " / ".join(time_text(group.ours.median) for group in found)}
        for head, chosen in PEERS.items():
            peers = [chosen(group) for group in found]
            pairs = zip(peers, found, strict=True)
            factors = [times(peer, group.ours) if peer else "-" for peer, group in pairs]
            cells[head] = " / ".join(factors) if any(peers) else ""
            names[head].update({peer.method: None for peer in peers if peer})
        lines.append(cells)
    if not lines:
        return f"None of the fixed cases has been measured on {record.device}.\n\n{record.source}"
    notes = [f"{head}: {', '.join(methods)}." for head, methods in names.items() if methods]
    notes += [] if record.on_cuda else [f"On a CPU {OURS} is the portable path."]
    return f"{table(lines)}\n\n<sub>{' '.join(notes)}</sub> {record.source}"


def losses(record: Record) -> str:
    """Where a method is faster than ours, whatever it computes: the fastest of each line."""
    lost: dict[str, list[str]] = defaultdict(list)
    for case, found in readme_groups(record).items():
        for group in found:
            winner = group.best(lambda row: row.role != "ours")
            if winner and winner.median < group.ours.median:
                lost[winner.method].append(f"{case} {group.work} ({times(winner, group.ours)})")
    parts = "; ".join(f"to {method} on {', '.join(where)}" for method, where in lost.items())
    if lost:
        return f"**Ours loses on {record.device}** {parts}."
    return f"On {record.device} no method is faster than ours in these cases."
