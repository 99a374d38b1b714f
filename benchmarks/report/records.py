"""Records in benchmarks/results/: what they hold, and what follows from it.

Needs the standard library alone, like tables.py: machines with a GPU may have little else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = "benchmarks/results"
OURS = "cogview_kernels"
REPLAY = ", graph replay"  # the end of the names of methods that replay a CUDA graph
OPS = ("attention", "decode", "layer_norm", "sandwich_residual", "training_step")


@dataclasses.dataclass(frozen=True)
class Row:
    """A method's times, in seconds, for one case and kind of work."""

    op: str
    work: str
    case: dict[str, Any]
    case_name: str
    sweeps: list[str]
    method: str
    role: str  # ours, rival, dense, or "" for other peers
    computes: str
    flops: int
    bytes: int
    minimum: float
    median: float
    iqr: float
    attended_fraction: float | None = None  # of the keys of dense causal attention
    extra_bytes: int | None = None
    host_seconds: float | None = None
    predicted_seconds: float | None = None

    @property
    def own_tflops(self) -> float:
        """Of a dense attention: TFLOP/s of all the products that it computes."""
        return self.flops / (self.attended_fraction or 1) / self.median / 1e12

    def floor(self, ceilings: dict[str, Any]) -> float | None:
        """Seconds that no method can be faster than: the useful products or the necessary bytes at
        the measured ceilings, whichever take longer. None where a ceiling is missing."""
        shape = self.case.get("attention", self.case)  # a training step's is its attention's
        rate = ceilings["matmul_flops"].get(shape["dtype"])
        if self.flops and not rate:
            return None
        products = self.flops / rate if self.flops else 0.0
        return max(products, self.bytes / ceilings["copy_bytes_per_s"])


def row_of(raw: dict[str, Any]) -> Row:
    """Times are ``seconds`` in a record of ``make gpu-bench``, ``stats`` in pytest-benchmark's."""
    timed = raw.get("seconds") or raw["stats"]
    facts = timed | raw | raw.get("extra_info", {})
    facts["minimum"] = timed.get("minimum") or timed["min"]
    names = {field.name for field in dataclasses.fields(Row)}
    return Row(**{name: value for name, value in facts.items() if name in names})


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows of one case and kind of work: eager calls, or the replays of CUDA graphs."""

    work: str
    ours: Row
    rows: list[Row]

    def best(self, chosen: Callable[[Row], bool]) -> Row | None:
        return min(filter(chosen, self.rows), key=lambda row: row.median, default=None)

    def peer(self, same: bool) -> Row | None:
        """The fastest that is not ours and computes the same as ours, or something else."""
        computed = self.ours.computes
        return self.best(lambda row: row.role != "ours" and (row.computes == computed) == same)

    @property
    def rival(self) -> Row | None:
        return self.best(lambda row: row.role == "rival")

    @property
    def dense(self) -> Row | None:
        """The fastest dense attention; of norms, which have none, the fastest plain LayerNorm."""
        return self.best(lambda row: row.role == "dense") or self.peer(same=False)


def groups(rows: Iterable[Row], sweep: str, op: str) -> list[Group]:
    """Those that have a time of ours, case by case, in the record's order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if sweep in row.sweeps and row.op == op:
            work = row.work + REPLAY * row.method.endswith(REPLAY)
            found.setdefault((row.case_name, work), []).append(row)
    cases = list(dict.fromkeys(case for case, _ in found))
    return [
        Group(work, row, found[case, work])
        for case, work in sorted(found, key=lambda key: cases.index(key[0]))
        for row in found[case, work]
        if row.method in (OURS, OURS + REPLAY)
    ]


@dataclasses.dataclass(frozen=True)
class Record:
    path: str  # from the repository's root
    content: dict[str, Any]

    @property
    def device(self) -> str:
        return self.content["machine_info"]["device"]

    @property
    def on_cuda(self) -> bool:
        return self.content["machine_info"]["device_type"] == "cuda"

    @property
    def rows(self) -> list[Row]:
        raw = self.content["rows" if "rows" in self.content else "benchmarks"]
        try:
            return [row_of(each) for each in raw]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: not a record of this suite ({error})") from error

    @property
    def machine(self) -> str:
        """Device, threads of a CPU, versions."""
        machine = self.content["machine_info"]
        versions = {"torch": machine["torch"], **machine.get("versions", {})}
        count = machine["threads"]
        threads = [] if self.on_cuda else [f"{count} thread{'s' * (count > 1)}"]
        known = [name for name in ("torch", "triton", "cuda") if name in versions]
        return ", ".join([self.device, *threads, *(f"{name} {versions[name]}" for name in known)])

    @property
    def source(self) -> str:
        """What stands under a table: where its numbers come from."""
        commit = self.content["commit_info"]
        states = {True: " with uncommitted changes", None: " (working-tree state unknown)"}
        changed = states.get(commit.get("dirty", False), "")
        return (
            f"<sub>{self.machine}; commit {commit['id'][:7]}{changed}, "
            f"{self.content['datetime'][:10]}; record: `{self.path}`</sub>"
        )


def newest(root: Path, kind: str) -> list[Record]:
    """The newest record of each device, CUDA devices first.

    Raises:
        ValueError: it is not known at which commit a record was made.
    """
    found: dict[str, Record] = {}
    for path in sorted((root / RESULTS).glob(f"{kind}-*.json")):
        record = Record(path.relative_to(root).as_posix(), json.loads(path.read_text()))
        if record.content.get("commit_info", {}).get("id", "unknown") == "unknown":
            raise ValueError(f"{record.path}: commit unknown")
        other = found.setdefault(record.device, record)
        found[record.device] = max(other, record, key=lambda each: each.content["datetime"])
    return sorted(found.values(), key=lambda record: (not record.on_cuda, record.device))
