"""Records in benchmarks/results/: what they hold, and what follows from it.

Needs the standard library alone: ``make gpu-bench`` prints its table on machines that have torch
and little else.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = "benchmarks/results"
OURS = "cogview_kernels"
REPLAY = ", graph replay"  # how the names of methods end that replay a CUDA graph


@dataclasses.dataclass(frozen=True)
class Row:
    """A method's times in one case and kind of work. Times in seconds."""

    op: str
    work: str
    case: dict[str, Any]
    case_name: str
    sweeps: list[str]
    method: str
    role: str  # ours, rival, dense, or none of them
    computes: str
    flops: int
    bytes: int
    minimum: float
    median: float
    iqr: float
    attended_fraction: float | None = None  # of the keys of dense causal attention
    tokens: int | None = None
    extra_bytes: int | None = None
    host_seconds: float | None = None
    predicted_seconds: float | None = None

    @property
    def replay(self) -> bool:
        return self.method.endswith(REPLAY)

    @property
    def tflops(self) -> float | None:
        """Useful TFLOP/s: the three-region products, whatever the method computes beyond them."""
        return self.flops / self.median / 1e12 if self.flops else None

    @property
    def own_tflops(self) -> float | None:
        """Of a dense method: TFLOP/s of all pairs that it computes."""
        if self.tflops is None or self.attended_fraction is None:
            return None
        return self.tflops / self.attended_fraction

    @property
    def bytes_per_s(self) -> float | None:
        """The bytes that must move, whatever the method moves beyond them."""
        return self.bytes / self.median if self.bytes else None

    def floor(self, ceilings: dict[str, Any]) -> float | None:
        """Seconds that no method can be faster than: the useful products or the necessary bytes at
        the measured ceilings, whichever take longer. None where a ceiling is missing."""
        rate = ceilings["matmul_flops"].get(self.case["dtype"])
        if not (self.flops or self.bytes) or (self.flops and not rate):
            return None
        products = self.flops / rate if self.flops else 0.0
        return max(products, self.bytes / ceilings["copy_bytes_per_s"])


NEEDED = [field.name for field in dataclasses.fields(Row) if field.default is dataclasses.MISSING]


def row_of(raw: dict[str, Any], path: str) -> Row:
    """From a record's row, whose ``seconds`` are ours or pytest-benchmark's ``stats``."""
    seconds = raw.get("seconds") or raw.get("stats") or {}
    facts = {**raw, **raw.get("extra_info", {})}
    facts |= {"minimum": seconds.get("minimum", seconds.get("min")), "median": seconds["median"]}
    facts["iqr"] = seconds["iqr"]
    for name in NEEDED:
        if facts.get(name) is None:
            raise ValueError(f"{path}: {raw.get('name')}: expected `{name}`, got none")
    names = (field.name for field in dataclasses.fields(Row))
    return Row(**{name: facts[name] for name in names if name in facts})


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows of one case and one kind of work, either eager calls or graph replays."""

    work: str
    rows: list[Row]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def ours(self) -> Row | None:
        names = (OURS, OURS + REPLAY)
        return next((row for row in self.rows if row.method in names), None)

    def best(self, chosen: Callable[[Row], bool]) -> Row | None:
        return min(filter(chosen, self.rows), key=lambda row: row.median, default=None)

    @property
    def rival(self) -> Row | None:
        return self.best(lambda row: row.role == "rival")

    @property
    def same(self) -> Row | None:
        """The fastest that computes what ours does and is not ours."""
        computed = self.ours.computes if self.ours else None
        return self.best(lambda row: row.role != "ours" and row.computes == computed)

    @property
    def dense(self) -> Row | None:
        """The fastest dense attention; of the norms, the fastest of those that compute a plain
        LayerNorm."""
        if any(row.role == "dense" for row in self.rows):
            return self.best(lambda row: row.role == "dense")
        computed = self.ours.computes if self.ours else None
        return self.best(lambda row: row.role != "ours" and row.computes != computed)

    @property
    def winner(self) -> Row | None:
        """Who is faster than ours: the fastest, whatever it computes."""
        found = self.best(lambda row: row.role != "ours")
        return found if found and self.ours and found.median < self.ours.median else None


OPS = {
    "attention": "Attention",
    "decode": "Decode: one token against a cache",
    "layer_norm": "PB-relax LayerNorm",
    "sandwich_residual": "Sandwich residual: from one sub-layer to the next",
    "training_step": "Training step of the model",
}
WORKS = ("forward", "backward", "forward+backward", "step")


def groups(rows: Iterable[Row], sweep: str, op: str) -> list[Group]:
    """Of a sweep and an operation: case by case in the record's order, by kind of work, the replays
    behind the eager calls."""
    found: dict[tuple[str, str, bool], list[Row]] = defaultdict(list)
    for row in rows:
        if sweep in row.sweeps and row.op == op:
            found[row.case_name, row.work, row.replay].append(row)
    cases = list(dict.fromkeys(case for case, _, _ in found))
    return [
        Group(work + REPLAY * replay, found[case, work, replay])
        for case in cases
        for work in WORKS
        for replay in (False, True)
        if (case, work, replay) in found
    ]


@dataclasses.dataclass(frozen=True)
class Record:
    """Of one device."""

    path: str  # from the repository's root
    content: dict[str, Any]

    @property
    def device(self) -> str:
        return self.content["machine_info"]["device"]

    @property
    def slug(self) -> str:
        return "-".join(re.findall("[a-z0-9]+", self.device.lower()))

    @property
    def on_cuda(self) -> bool:
        return self.content["machine_info"]["device_type"] == "cuda"

    @property
    def ceilings(self) -> dict[str, Any]:
        return self.content["ceilings"]

    @property
    def rows(self) -> list[Row]:
        raw = self.content["rows" if "rows" in self.content else "benchmarks"]
        return [row_of(each, self.path) for each in raw]

    @property
    def machine(self) -> str:
        """Device, threads of a CPU, versions."""
        machine = self.content["machine_info"]
        threads = machine.get("threads")
        many = [f"{threads} thread" + "s" * (threads > 1)] if threads and not self.on_cuda else []
        versions = {"torch": machine["torch"], **machine.get("versions", {})}
        known = [f"{name} {versions[name]}" for name in ("torch", "triton", "cuda", "nvcc")
                 if versions.get(name)]
        return ", ".join([self.device, *many, *known])

    @property
    def source(self) -> str:
        """What stands under a table: where its numbers come from."""
        commit = self.content["commit_info"]
        dirty = commit.get("dirty", False)
        changed = " (working-tree state unknown)" if dirty is None else ""
        changed = " with uncommitted changes" if dirty else changed
        return (
            f"<sub>{self.machine}; commit {commit['id'][:7]}{changed}, "
            f"{self.content['datetime'][:10]}; record: `{self.path}`</sub>"
        )


NEEDED_OF_RECORD = ("machine_info.device", "machine_info.device_type", "machine_info.torch")
NEEDED_OF_RECORD += ("commit_info.id", "datetime")
NEEDED_OF_SUITE = ("ceilings.matmul_flops", "ceilings.copy_bytes_per_s")


def read(path: Path, root: Path, needed: Sequence[str]) -> Record:
    record = Record(path.relative_to(root).as_posix(), json.loads(path.read_bytes()))
    for name in needed:
        value: Any = record.content
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value in (None, "", "unknown"):
            raise ValueError(f"{record.path}: expected `{name}`, got none")
    return record


def newest(root: Path, kind: str) -> list[Record]:
    """The newest record of each device, CUDA devices first.

    Raises:
        ValueError: a record lacks its commit, its ceilings or its machine; the message names both.
    """
    needed = NEEDED_OF_RECORD + (NEEDED_OF_SUITE if kind == "suite" else ())
    found: dict[str, Record] = {}
    for path in sorted((root / RESULTS).glob(f"{kind}-*.json")):
        record = read(path, root, needed)
        other = found.get(record.slug)
        if other is None or other.content["datetime"] <= record.content["datetime"]:
            found[record.slug] = record
    return sorted(found.values(), key=lambda record: (not record.on_cuda, record.device))
