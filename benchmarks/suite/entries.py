"""The plan of the suite: which methods are timed on which cases, in which order, and what each
costs of a GPU's window; and how one of them is made ready to be timed, checked against the float64
definition first.

The fixed cases have all their methods. A sweep has ours and what decides: the rival and the best
dense kernels, where they depend on what is swept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
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
from benchmarks.suite.norms import LAYER_NORM_METHODS, SANDWICH_METHODS
from benchmarks.suite.problems import NotMeasured, forget, problem_of, reason_of
from benchmarks.suite.steps import STEP_METHODS

__all__ = ["METHODS", "Entry", "NotMeasured", "Ready", "entries", "forget", "ready"]

METHODS: dict[str, tuple[Method, ...]] = {
    "attention": ATTENTION_METHODS,
    "decode": DECODE_METHODS,
    "layer_norm": LAYER_NORM_METHODS,
    "sandwich_residual": SANDWICH_METHODS,
    "training_step": STEP_METHODS,
}
STAGES = "ours", "rival and dense", "norms", "rest"

# Estimates for an H200 and 16 cores; a record has what they were (``first_call_seconds``).
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
        role, op = self.method.role, self.case.op
        if "fixed" not in self.sweeps:
            return "rest"
        if role == "ours":
            return "ours"
        if isinstance(self.case, NormCase):
            return "norms"
        slow = self.method.name == AUTOTUNED or op == "training_step"
        return "rival and dense" if role and not slow else "rest"

    def info(self) -> dict[str, Any]:
        """What is known before it has run."""
        case, work, method = self.case, self.work, self.method
        shape = dataclasses.asdict(case)
        shape |= shape.pop("attention", {})
        info = {
            "op": case.op,
            "work": work,
            "case": shape,
            "case_name": case.name,
            "sweeps": list(self.sweeps),
            "stage": self.stage,
            "method": method.name,
            "role": method.role,
            "graph": method.graph,
            "computes": method.computes,
            "flops": case.flops(work),
            "bytes": case.bytes(work),
        }
        if isinstance(case, AttentionCase):
            info["attended_fraction"] = case.attended_fraction
        if isinstance(case, StepCase):
            info["tokens"] = case.tokens
        return info


def entries(device_type: str) -> list[Entry]:
    """Of a kind of device; those that share inputs stand together, on a GPU stage after stage."""
    sweeps: dict[tuple[Case, str, Method], tuple[str, ...]] = {}
    for sweep, case, chosen in _cuda_plan() if device_type == "cuda" else _cpu_plan():
        for method in METHODS[case.op]:
            if not chosen(method) or (method.graph and device_type != "cuda"):
                continue
            for work in case.works:
                # A sweep tells forward from backward; the sum is for what decides the fixed cases.
                if work == "forward+backward" and not (sweep == "fixed" and method.role):
                    continue
                key = case, work, method
                sweeps[key] = (*sweeps.get(key, ()), sweep)
    found = [Entry(*key, names) for key, names in sweeps.items()]
    if device_type != "cuda":
        return found
    return list(_with_seconds(sorted(found, key=lambda entry: STAGES.index(entry.stage))))


Chosen = Callable[[Method], bool]
Plan = Iterator[tuple[str, Case, Chosen]]


def among(*names: str) -> Chosen:
    return lambda method: method.name in names


def but(*names: str) -> Chosen:
    return lambda method: method.name not in names


OURS = among("cogview_kernels")
OURS_AND_DENSE = among("cogview_kernels", "SDPA flash", "SDPA cuDNN")
OURS_AND_RIVAL = among("cogview_kernels", OF_SWEEPS)
ALL_FOUR = among("cogview_kernels", "SDPA flash", "SDPA cuDNN", OF_SWEEPS)
NORMS = among("cogview_kernels", "PyTorch PB-relax, compiled", "F.layer_norm")
TORCH_NORMS = "PyTorch PB-relax", "F.layer_norm"
TORCH = "SDPA", "dense SDPA", "CogView's formulation", *TORCH_NORMS
ON_CPU = among("cogview_kernels", *TORCH, *(f"{name}, compiled" for name in TORCH_NORMS))


def _cuda_plan() -> Plan:
    talk = AttentionCase(4224, 128, 2, 256, batch=4)
    vary = functools.partial(dataclasses.replace, talk)
    # A to D: CogView's 32x32 codes, its talk, its paper, a long sequence. Compiling for FA4 and
    # autotuning take long: not for A, which blocks of 128x128 suit least, and FA4 for one of them.
    yield "fixed", AttentionCase(1088, 64, 4, 192, batch=16), but("SDPA", ON_FA4, AUTOTUNED)
    yield "fixed", talk, but("SDPA")
    yield "fixed", AttentionCase(4224, 128, 6, 704, batch=4), but("SDPA", ON_FA4)
    yield "fixed", AttentionCase(16448, 128, 2, 512), but("SDPA", ON_FA4)
    for case in (
        AttentionCase(4224, 128, 2, 256, batch=16, q_len=1),  # a token of the talk's
        NormCase("layer_norm", 8192, 2560),
        NormCase("sandwich_residual", 8192, 2560),
        StepCase(12, AttentionCase(1088, 64, 4, 192, batch=4)),
        StepCase(12, AttentionCase(4160, 128, 2, 256)),
    ):
        yield "fixed", case, but("SDPA")
    for log2 in range(10, 17):
        batch = max(1, 16384 >> log2)
        chosen = ALL_FOUR if log2 in (10, 13, 16) else OURS_AND_DENSE
        yield "seqlen", AttentionCase(1 << log2, 128, 2, 256, batch=batch), chosen
    # Dense attention does not depend on windows and pivots; the rival is compiled for B already.
    for times in (1, 2, 4, 8):
        yield "window", vary(key_window_times=times), OURS_AND_RIVAL if times == 2 else OURS
    for pivots in (0, 64, 256, 1024, 2048):
        yield "pivots", vary(num_pivots=pivots), OURS_AND_RIVAL if pivots == 256 else OURS
    for dim in (32, 64, 96, 128):
        yield "head_dim", vary(num_heads=2560 // dim, head_dim=dim), OURS_AND_DENSE
    for dtype in ("bfloat16", "float16"):
        yield "dtype", vary(dtype=dtype), OURS_AND_DENSE
    grouped = AttentionCase(32768, 128, 8, 512, num_heads=32, num_kv_heads=8, head_dim=128)
    yield "llm", grouped, OURS_AND_DENSE
    for op in ("layer_norm", "sandwich_residual"):
        for hidden in (1024, 4096, 16384):
            yield "hidden", NormCase(op, (1 << 24) // hidden, hidden), NORMS
    for seqlen in (1088, 16448, 65600):
        yield "seqlen", AttentionCase(seqlen, 128, 2, 256, batch=16, q_len=1), OURS_AND_DENSE


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
    ):
        yield "fixed", case, ON_CPU
    yield "fixed", small(4224, 128, 2, 256, q_len=1), among("cogview_kernels", *TORCH, OF_SWEEPS)
    for log2 in range(10, 15):
        yield "seqlen", small(1 << log2, 128, 2, 256), ON_CPU
    for op in ("layer_norm", "sandwich_residual"):
        for hidden in (512, 8192):
            yield "hidden", NormCase(op, (1 << 22) // hidden, hidden, "float32"), NORMS
    for seqlen in (1088, 16448):
        yield "seqlen", small(seqlen, 128, 2, 256, q_len=1), ON_CPU


def _with_seconds(plan: list[Entry]) -> Iterator[Entry]:
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


_refused: dict[Any, tuple[str, bool]] = {}


def ready(entry: Entry, device: torch.device) -> Ready:
    """Prepares and compiles an entry's method and checks its results. Entries of one case can be
    ready at once.

    Raises:
        NotMeasured: the method cannot run here, breaks, or does not compute what it says.
    """
    reason = entry.method.why_not(entry.case, device)
    if reason is not None:
        raise NotMeasured(reason)
    key = entry.case, entry.method.prepare, entry.method.computes, device
    if key in _refused:  # as before, on another kind of work: it is not prepared and compiled again
        raise NotMeasured(*_refused[key])
    try:
        problem = problem_of(entry.case, device)
        call, facts = problem.prepared(entry.method)
        return Ready(problem.timed(call, entry.work), entry.info() | facts)
    except Exception as error:  # whatever a peer raises; the other entries go on
        refusal = error if isinstance(error, NotMeasured) else reason_of(error)
        _refused[key] = str(refusal), refusal.failed
        forget()
        raise refusal from error
