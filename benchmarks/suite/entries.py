"""The plan of the suite: which methods are timed on which cases, in which order, and what each
costs of a GPU's window; and how one of them is made ready to be timed, checked first.

The fixed cases have all their methods. A sweep has ours and what decides: the rival and the best
dense kernels, where they depend on what is swept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.attention import (
    ATTENTION_METHODS,
    AUTOTUNED,
    DECODE_METHODS,
    OF_SWEEPS,
    ON_FA4,
)
from benchmarks.suite.cases import AttentionCase, Case, NormCase, StepCase
from benchmarks.suite.methods import Method
from benchmarks.suite.norms import LAYER_NORM_METHODS, RELAXED_COMPILED, SANDWICH_METHODS
from benchmarks.suite.problems import NotMeasured, problem_of
from benchmarks.suite.steps import STEP_METHODS

__all__ = ["METHODS", "Entry", "NotMeasured", "Ready", "entries", "ready"]

METHODS: dict[str, tuple[Method, ...]] = {
    "attention": ATTENTION_METHODS,
    "decode": DECODE_METHODS,
    "layer_norm": LAYER_NORM_METHODS,
    "sandwich_residual": SANDWICH_METHODS,
    "training_step": STEP_METHODS,
}
STAGES = "ours", "rival and dense", "norms", "rest"

# Estimates for an H200 and 16 cores; a record has what they were (``wall_seconds``).
FLOPS_PER_S, BYTES_PER_S = 2e14, 2e12
ROUNDS, TIMED_S = (5, 100), 0.25  # timed calls of an entry; their time, unless they are few
FLUSH_S, AROUND_S = 2e-4, 0.05  # before each of them; warming, memory, the host's time
CHECKED_S = 0.2  # a method's first entry on a case: inputs, results in float64
STEP_S = 5.0  # likewise: a model of a billion parameters and its losses in float64
FIRST_COMPILATION_S = 10.0  # what torch.compile imports and starts


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a record. ``seconds``: estimated, of a GPU's window, compilation included."""

    case: Case
    work: str
    method: Method
    sweeps: tuple[str, ...]
    seconds: float = 0.0

    @property
    def group(self) -> str:
        return f"{self.case.op} / {self.case.name} / {self.work}"

    @property
    def id(self) -> str:
        return f"{self.group} / {self.method.name}"

    @property
    def stage(self) -> str:
        """Behind the norms comes what takes long or decides little: autotuning, CogView's
        formulation, the peers' training steps, the sweeps."""
        role = self.method.role
        if "fixed" not in self.sweeps:
            return "rest"
        if role == "ours":
            return "ours"
        if isinstance(self.case, NormCase):
            return "norms"
        slow = self.method.name == AUTOTUNED or isinstance(self.case, StepCase)
        return "rival and dense" if role and not slow else "rest"

    def info(self) -> dict[str, Any]:
        """What is known before it has run."""
        case, work, method = self.case, self.work, self.method
        shape = dataclasses.asdict(case)
        shape |= shape.pop("attention", {})
        info: dict[str, Any] = {"op": case.op, "work": work, "case": shape}
        info |= {"case_name": case.name, "sweeps": list(self.sweeps), "stage": self.stage}
        info |= {name: getattr(method, name) for name in ("role", "computes", "graph")}
        info |= {"method": method.name, "flops": case.flops(work), "bytes": case.bytes(work)}
        if isinstance(case, AttentionCase):
            info["attended_fraction"] = case.attended_fraction
            if method.role == "ours":
                info["predicted_seconds"] = predicted_seconds(case, work)
        return info


@functools.cache
def _predicted() -> dict[tuple[str, str], float]:
    """Seconds of the launches of forward and backward, by the names of cases."""
    record = Path(__file__).resolve().parents[2] / "docs" / "kernel_times.json"
    found: dict[tuple[str, str], float] = defaultdict(float)
    for row in json.loads(record.read_text())["rows"] if record.is_file() else []:
        work = "backward" if row["kernel"].startswith("backward") else "forward"
        found[row["name"], work] += row["us"] / 1e6
    return dict(found)


def predicted_seconds(case: AttentionCase, work: str) -> float | None:
    """On one H200, by the cycle model of `make kernel-times`; None for cases that it leaves out."""
    found = [_predicted().get((case.name, part)) for part in work.split("+")]
    return None if None in found else sum(seconds or 0.0 for seconds in found)


def entries(device_type: str) -> list[Entry]:
    """Of a kind of device; those that share inputs stand together, on a GPU stage after stage."""
    sweeps: dict[tuple[Case, str, Method], tuple[str, ...]] = {}
    for sweep, case, names in _cuda_plan() if device_type == "cuda" else _cpu_plan():
        for method in METHODS[case.op]:
            if method.name not in names or method.only_on not in ("", device_type):
                continue
            for work in case.works:
                # A sweep tells forward from backward; the sum is for what decides the fixed cases.
                if work != "forward+backward" or (sweep == "fixed" and method.role):
                    key = case, work, method
                    sweeps[key] = (*sweeps.get(key, ()), sweep)
    found = [Entry(*key, names) for key, names in sweeps.items()]
    if device_type != "cuda":
        return found
    return list(_with_seconds(sorted(found, key=lambda entry: STAGES.index(entry.stage))))


Plan = Iterator[tuple[str, Case, set[str]]]  # sweep, case, names of methods

ALL = {method.name for methods in METHODS.values() for method in methods}
OURS = {"cogview_kernels"}
DENSE = OURS | {"SDPA", "SDPA flash", "SDPA cuDNN"}
NORMS = OURS | {RELAXED_COMPILED, "F.layer_norm"}


def _cuda_plan() -> Plan:
    talk = AttentionCase(4224, 128, 2, 256, batch=4)
    # A to D: CogView's 32x32 codes, its talk, its paper, a long sequence. Compiling for FA4 and
    # autotuning take long: not for A, which blocks of 128x128 suit least, and FA4 for one of them.
    yield "fixed", AttentionCase(1088, 64, 4, 192, batch=16), ALL - {ON_FA4, AUTOTUNED}
    yield "fixed", talk, ALL
    yield "fixed", AttentionCase(4224, 128, 6, 704, batch=4), ALL - {ON_FA4}
    yield "fixed", AttentionCase(16448, 128, 2, 512), ALL - {ON_FA4}
    for case in (
        AttentionCase(4224, 128, 2, 256, batch=16, q_len=1),  # a token of the talk's
        NormCase("layer_norm", 8192, 2560),
        NormCase("sandwich_residual", 8192, 2560),
        StepCase(12, AttentionCase(1088, 64, 4, 192, batch=4)),
        StepCase(12, AttentionCase(4160, 128, 2, 256)),
    ):
        yield "fixed", case, ALL
    for log2 in range(10, 17):
        names = DENSE | {OF_SWEEPS} if log2 in (10, 13, 16) else DENSE
        yield "seqlen", AttentionCase(1 << log2, 128, 2, 256, batch=max(1, 16384 >> log2)), names
    # Dense attention does not depend on windows and pivots; the rival is compiled for B already.
    for times in (1, 2, 4, 8):
        yield "window", dataclasses.replace(talk, key_window_times=times), OURS
    for pivots in (0, 64, 256, 1024, 2048):
        yield "pivots", dataclasses.replace(talk, num_pivots=pivots), OURS
    yield from (("window", talk, {OF_SWEEPS}), ("pivots", talk, {OF_SWEEPS}))
    for dim in (32, 96, 128):
        yield "head_dim", dataclasses.replace(talk, num_heads=2560 // dim, head_dim=dim), DENSE
    grouped = AttentionCase(32768, 128, 8, 512, num_heads=32, num_kv_heads=8, head_dim=128)
    yield "llm", grouped, DENSE
    for op in ("layer_norm", "sandwich_residual"):
        for hidden in (1024, 4096, 16384):
            yield "hidden", NormCase(op, (1 << 24) // hidden, hidden), NORMS
    for seqlen in (1088, 16448, 65600):
        yield "seqlen", AttentionCase(seqlen, 128, 2, 256, batch=16, q_len=1), DENSE


def _cpu_plan() -> Plan:
    small = functools.partial(AttentionCase, num_heads=4, dtype="float32")
    for case in (
        small(1088, 64, 4, 192),
        small(4224, 128, 2, 256),
        small(4224, 128, 6, 704),
        small(16448, 128, 2, 512),
        NormCase("layer_norm", 2048, 2560, "float32"),
        NormCase("sandwich_residual", 2048, 2560, "float32"),
        StepCase(4, small(1088, 64, 4, 192), 8192),
        StepCase(4, small(4160, 128, 2, 256), 8192),
        small(4224, 128, 2, 256, q_len=1),
    ):
        yield "fixed", case, ALL
    for log2 in range(10, 15):
        yield "seqlen", small(1 << log2, 128, 2, 256), ALL
    for op in ("layer_norm", "sandwich_residual"):
        for hidden in (512, 8192):
            yield "hidden", NormCase(op, (1 << 22) // hidden, hidden, "float32"), NORMS
    for seqlen in (1088, 16448):
        yield "seqlen", small(seqlen, 128, 2, 256, q_len=1), DENSE


def _with_seconds(plan: Iterable[Entry]) -> Iterator[Entry]:
    """What several entries of a method on a case share is paid by the first."""
    known: set[Any] = set()
    for entry in plan:
        case, method = entry.case, entry.method
        flops = float(case.flops(entry.work))
        if isinstance(case, AttentionCase) and method.computes == "dense causal":
            flops /= case.attended_fraction
        call = FLUSH_S + max(flops / FLOPS_PER_S, case.bytes(entry.work) / BYTES_PER_S)
        seconds = AROUND_S + (10 + max(ROUNDS[0], min(ROUNDS[1], TIMED_S / call))) * call
        if (case, method.prepare) not in known:
            seconds += STEP_S if isinstance(case, StepCase) else CHECKED_S
            seconds += method.compile_s
            seconds += FIRST_COMPILATION_S if method.compiles and True not in known else 0
            known |= {(case, method.prepare), method.compiles or None}
        yield dataclasses.replace(entry, seconds=seconds)


@dataclasses.dataclass(frozen=True)
class Ready:
    """``call``: what is to be timed; ``info``: the record's row without its times."""

    call: Callable[[], Any]
    info: dict[str, Any]


def ready(entry: Entry, device: torch.device) -> Ready:
    """Prepares, compiles and checks an entry's method; those of one case can be ready at once.

    Raises:
        NotMeasured: the method cannot run here, breaks, or does not compute what it says.
    """
    problem = problem_of(entry.case, device)
    call, facts = problem.prepared(entry.method)
    return Ready(problem.timed(call, entry.work), entry.info() | facts)
