"""The suite: every method on every case, checked against the float64 definition on the same inputs
before it is timed. bench_suite.py runs it under pytest-benchmark, gpu_bench.py on a bare machine
with a GPU; both write the same record.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cogview_kernels as ck
from benchmarks.suite.attention import ATTENTION_METHODS, RIVAL
from benchmarks.suite.cases import AttentionCase, Case, NormCase, StepCase, cases_of, describe
from benchmarks.suite.measure import elapsed, measure
from benchmarks.suite.methods import Method
from benchmarks.suite.norms import LAYER_NORM_METHODS, SANDWICH_METHODS
from benchmarks.suite.steps import STEP_METHODS, reference_losses

METHODS: dict[str, tuple[Method, ...]] = {
    "attention": ATTENTION_METHODS,
    "decode": ATTENTION_METHODS,
    "layer_norm": LAYER_NORM_METHODS,
    "sandwich_residual": SANDWICH_METHODS,
    "training_step": STEP_METHODS,
}
BUDGET_S = {"cuda": 0.25, "cpu": 0.7}  # of timed calls, for each entry
CHECKED_ROWS = 96  # of each of three stretches of the sequence


class NotMeasured(Exception):
    """Why an entry has no time. ``failed``: it was wrong or broke, rather than cannot run here."""

    def __init__(self, reason: str, failed: bool = False) -> None:
        super().__init__(reason)
        self.failed = failed


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a record."""

    case: Case
    work: str
    method: Method
    sweeps: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.case.op} / {self.case.name} / {self.work} / {self.method.name}"

    def info(self) -> dict[str, Any]:
        """What is known before it has run."""
        case, work = self.case, self.work
        info = {
            "op": case.op,
            "work": work,
            "case": describe(case),
            "case_name": case.name,
            "sweeps": list(self.sweeps),
            "method": self.method.name,
            "computes": self.method.computes,
            "flops": case.flops(work),
            "bytes": case.bytes(work),
        }
        if isinstance(case, AttentionCase):
            info["attended_fraction"] = case.attended_fraction
        if isinstance(case, StepCase):
            info["tokens"] = case.tokens
        return info


def importance(entry: Entry) -> tuple[int, ...]:
    """What comes first where time is short: on the fixed cases ours, then the peers that run at
    once, then whole training steps; then what must be compiled, the main rival and the norms first,
    the training steps next, the others one after the other. Then the sweeps, likewise."""
    stage, step = "fixed" not in entry.sweeps, entry.case.op == "training_step"
    if not entry.method.compiles:
        ours = entry.method.name == "cogview_kernels"
        return stage, 2 if step else 0 if ours else 1
    if isinstance(entry.case, AttentionCase) and entry.method.name != RIVAL:
        return stage, 5, METHODS[entry.case.op].index(entry.method)
    return stage, 4 if step else 3, METHODS[entry.case.op].index(entry.method)


def entries(device_type: str) -> list[Entry]:
    """Of a kind of device, in order of importance; those that share inputs stand together."""
    found = [
        Entry(planned.case, work, method, planned.sweeps)
        for planned in cases_of(device_type)
        for method in METHODS[planned.case.op]
        for work in planned.case.works
        # A sweep tells forward from backward; the sum is the fixed cases'.
        if "fixed" in planned.sweeps or work != "forward+backward"
    ]
    return sorted(found, key=importance)


def run(entry: Entry, device: torch.device, budget_s: float | None = None) -> dict[str, Any]:
    """Checks and times an entry.

    Returns:
        ``seconds``, one for each timed call, and ``info``, the record's ``extra_info``.

    Raises:
        NotMeasured: the method cannot run here, breaks, or does not compute what it says.
    """
    method = entry.method
    reason = method.why_not(entry.case, device)
    if reason is not None:
        raise NotMeasured(reason)
    try:
        problem = problem_of(entry.case, device)
        prepared = problem.prepared(method)
        check(prepared)
        call = problem.timed(prepared.call, entry.work)
        timed = measure(call, device, BUDGET_S[device.type] if budget_s is None else budget_s)
    except NotMeasured:
        raise
    except Exception as error:  # whatever a peer raises; the other entries go on
        forget()
        raise reason_of(error) from error
    return {
        "seconds": timed.seconds,
        "info": entry.info()
        | {
            "errors": prepared.errors,
            "errors_allowed": prepared.allowed,
            "extra_bytes": timed.extra_bytes,
            "prepare_seconds": prepared.prepare_seconds,
            "first_call_seconds": prepared.first_call_seconds,
            "host_seconds": timed.host_seconds,
        },
    }


def reason_of(error: Exception) -> NotMeasured:
    if isinstance(error, torch.OutOfMemoryError):
        return NotMeasured("out of memory")
    # Of scaled_dot_product_attention, where the backend that was asked for takes no such case.
    if "No available kernel" in str(error) or "No viable backend" in str(error):
        return NotMeasured("torch has no such kernel for this case")
    text = " ".join(str(error).split())[:300]
    return NotMeasured(f"{type(error).__name__}: {text}", failed=True)


def check(prepared: Prepared) -> None:
    wrong = [
        f"{name}: {error:.2g} (allowed {prepared.allowed[name]:.2g})"
        for name, error in prepared.errors.items()
        if not error <= prepared.allowed[name]
    ]
    if wrong:
        raise NotMeasured(f"wrong: relative error against float64, {', '.join(wrong)}", failed=True)


@functools.lru_cache(maxsize=1)
def problem_of(case: Case, device: torch.device) -> Problem:
    """Inputs, and what has been prepared for them: entries of one case come one after the other."""
    if isinstance(case, AttentionCase):
        return AttentionProblem(case, device)
    if isinstance(case, NormCase):
        return NormProblem(case, device)
    return StepProblem(case, device)


def forget() -> None:
    """Frees the inputs of the last case."""
    problem_of.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclasses.dataclass
class Prepared:
    """A method that is ready for a case's inputs, and was checked on them."""

    call: Callable[..., Any]
    prepare_seconds: float
    first_call_seconds: float
    errors: dict[str, float]
    allowed: dict[str, float]


class Problem:
    """A case's inputs on a device."""

    def __init__(self, case: Any, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.ready: tuple[Method, Prepared] | None = None

    def prepared(self, method: Method) -> Prepared:
        """Of the method, kept until another is asked for."""
        if self.ready is None or self.ready[0] is not method:
            self.ready = None
            self.ready = method, self._prepare(method)
        return self.ready[1]

    def _prepare(self, method: Method) -> Prepared:
        layout = self.layout()
        call = None

        def prepare() -> None:
            nonlocal call
            call = method.prepare(self.case, layout, self.device)

        elapsed(prepare, self.device)
        prepare_seconds = min(elapsed(prepare, self.device) for _ in range(2))
        assert call is not None
        first_call_seconds = elapsed(self.first_call(method, call), self.device)
        errors = self.errors(method, call)
        return Prepared(call, prepare_seconds, first_call_seconds, errors, self.allowed(errors))

    def random(self, *shape: int) -> Tensor:
        """Normal, in the case's dtype."""
        drawn = torch.randn(shape, device=self.device, generator=self.generator)
        return drawn.to(self.case.torch_dtype)

    def layout(self) -> ck.ThreeRegionLayout | None:
        return None

    def allowed(self, errors: dict[str, float]) -> dict[str, float]:
        """Relative errors of results in the case's dtype: some roundings, of which a good method
        makes less than half; in float32 those of a long sum. Parameters' gradients are sums over
        all rows, which some sum in the dtype itself."""
        eps = torch.finfo(self.case.torch_dtype).eps

        def roundings(name: str) -> float:
            if name in ("out", "y", "h", "z"):
                return 1.5
            return 4 if name.endswith(("weight", "bias")) else 2

        return {name: roundings(name) * eps + 1e-5 for name in errors}

    def first_call(self, method: Method, call: Callable[..., Any]) -> Callable[[], Any]:
        """What a method does once before it is timed: forward and backward, compiled if need be."""
        whole = "forward+backward"
        return self.timed(call, whole if whole in self.case.works else "forward")

    def errors(self, method: Method, call: Callable[..., Any]) -> dict[str, float]:
        raise NotImplementedError

    def timed(self, call: Callable[..., Any], work: str) -> Callable[[], Any]:
        raise NotImplementedError

    def works(
        self, forward: Callable[[], Any], inputs: tuple[Tensor, ...], douts: Any
    ) -> dict[str, Callable[[], Callable[[], Any]]]:
        """How each kind of work is made ready to be timed."""

        def backward() -> Callable[[], Any]:
            outs = forward()
            return lambda: torch.autograd.grad(outs, inputs, douts, retain_graph=True)

        return {
            "forward": lambda: forward,  # as in training: what the backward needs is kept
            "backward": backward,
            "forward+backward": lambda: lambda: torch.autograd.grad(forward(), inputs, douts),
        }


class AttentionProblem(Problem):
    def __init__(self, case: AttentionCase, device: torch.device) -> None:
        super().__init__(case, device)
        keys = case.batch, case.kv_heads, case.seqlen, case.head_dim
        queries = case.batch, case.num_heads, case.queries, case.head_dim
        training = case.op == "attention"
        self.q, self.k, self.v = (
            self.random(*shape).requires_grad_(training) for shape in (queries, keys, keys)
        )
        self.dout = self.random(*queries)

    def layout(self) -> ck.ThreeRegionLayout:
        layout: ck.ThreeRegionLayout = self.case.layout(self.device)
        return layout

    def timed(self, call: Callable[..., Any], work: str) -> Callable[[], Any]:
        def forward() -> Any:
            return call(self.q, self.k, self.v)

        return self.works(forward, (self.q, self.k, self.v), self.dout)[work]()

    def errors(self, method: Method, call: Callable[..., Any]) -> dict[str, float]:
        """||x - reference|| / ||reference|| for one sample and one head of keys with its heads of
        queries, three stretches of rows: dout is zero elsewhere, so that dk and dv are theirs. Of
        out and dq the stretch with the largest error: the first rows see few keys and are large."""
        case = self.case
        group = case.num_heads // case.kv_heads
        sample, kv_head = case.batch - 1, case.kv_heads // 2
        heads, kv_heads = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
        count = min(CHECKED_ROWS, case.queries)
        starts = sorted({0, (case.queries - count) // 2, case.queries - count})
        training = case.op == "attention"

        dout = torch.zeros_like(self.dout)
        for start in starts:
            rows = slice(start, start + count)
            dout[sample, heads, rows] = self.dout[sample, heads, rows]
        out = call(self.q, self.k, self.v)
        found = (
            [out, *torch.autograd.grad(out, (self.q, self.k, self.v), dout)] if training else [out]
        )

        shapes = [x.shape for x in (self.q, self.q, self.k, self.v)]
        expected = [torch.zeros(shape[-3:], dtype=torch.float64) for shape in shapes]
        layout = definition(method.computes, self.layout(), case, sample)
        checked = torch.zeros(case.queries, dtype=torch.bool)
        for start in starts:
            rows = slice(start, start + count)
            fresh = ~checked[rows]  # stretches of a short sequence overlap
            checked[rows] = True
            keys = slice(0, case.seqlen - case.queries + start + count)
            q, k, v = (
                x.detach()[sample : sample + 1, part, where].double().requires_grad_()
                for x, part, where in (
                    (self.q, heads, rows),
                    (self.k, kv_heads, keys),
                    (self.v, kv_heads, keys),
                )
            )
            exact = ck.three_region_attention(q, k, v, layout, backend="reference")
            weight = self.dout[sample, heads, rows].double() * fresh.to(self.device)[:, None]
            grads = torch.autograd.grad(exact, (q, k, v), weight[None])
            where = heads, rows
            expected[0][where] = exact[0].detach().cpu()
            expected[1][where] += grads[0][0].cpu()
            for index in (1, 2):
                expected[1 + index][kv_heads, keys] += grads[index][0].cpu()
        names = "out", "dq", "dk", "dv"
        parts = [[(heads, slice(start, start + count)) for start in starts]] * 2
        parts += [[(kv_heads, slice(None))]] * 2
        return {
            name: max(relative_error(x.detach()[sample].cpu()[at], reference[at]) for at in where)
            for name, x, reference, where in zip(names, found, expected, parts, strict=False)
        }


def definition(
    computes: str, layout: ck.ThreeRegionLayout, case: AttentionCase, sample: int
) -> ck.ThreeRegionLayout:
    """The layout of one sample by which ``computes`` is defined."""
    if computes == "three-region":
        assert isinstance(layout.text_len, Tensor) and layout.pivot_idx is not None
        return dataclasses.replace(
            layout,
            text_len=layout.text_len[sample : sample + 1],
            pivot_idx=layout.pivot_idx[sample : sample + 1],
        )
    window, times = {
        "dense causal": (case.seqlen, 1),
        "local window": (case.query_window, case.key_window_times),
    }[computes]
    return ck.ThreeRegionLayout(0, None, window, times)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """NaN where anything found is not finite."""
    found = found.double()
    difference = (found - expected).norm() / expected.norm()
    return float(difference) if found.isfinite().all() else math.nan


class NormProblem(Problem):
    NAMES = {
        "layer_norm": (("x", "weight", "bias"), ("y",)),
        "sandwich_residual": (
            ("f", "residual", "post_weight", "post_bias", "pre_weight", "pre_bias"),
            ("h", "z"),
        ),
    }

    def __init__(self, case: NormCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.inputs = tuple(self._draw(name).requires_grad_() for name in self.NAMES[case.op][0])
        self.douts = [self.random(case.rows, case.hidden) for _ in self.NAMES[case.op][1]]

    def _draw(self, name: str) -> Tensor:
        if "weight" in name:
            return 1 + 0.1 * self.random(self.case.hidden)
        return (
            self.random(self.case.hidden)
            if "bias" in name
            else self.random(self.case.rows, self.case.hidden)
        )

    def timed(self, call: Callable[..., Any], work: str) -> Callable[[], Any]:
        return self.works(lambda: call(*self.inputs), self.inputs, self.douts)[work]()

    def errors(self, method: Method, call: Callable[..., Any]) -> dict[str, float]:
        """Of some rows, the first and the last among them: the gradient of the others is zero."""
        case = self.case
        names, out_names = self.NAMES[case.op]
        rows = torch.linspace(0, case.rows - 1, min(case.rows, 4 * CHECKED_ROWS)).long()
        rows = rows.unique().to(self.device)

        def results(outs: Any) -> tuple[Tensor, ...]:
            return outs if isinstance(outs, tuple) else (outs,)

        outs = results(call(*self.inputs))
        douts = [torch.zeros_like(dout).index_copy_(0, rows, dout[rows]) for dout in self.douts]
        grads = torch.autograd.grad(outs, self.inputs, douts)

        relax = "row" if method.computes.startswith("PB-relax") else None
        exact_inputs = [
            (x.detach()[rows] if x.ndim == 2 else x.detach()).double().requires_grad_()
            for x in self.inputs
        ]
        functions: dict[str, Callable[..., Any]] = {
            "layer_norm": ck.pb_relax_layer_norm,
            "sandwich_residual": ck.sandwich_residual,
        }
        call = functools.partial(functions[case.op], relax=relax, backend="reference")
        exact = results(call(*exact_inputs))
        exact_grads = torch.autograd.grad(
            exact, exact_inputs, [dout[rows].double() for dout in douts]
        )
        found = [out.detach()[rows] for out in outs]
        found += [grad[rows] if grad.ndim == 2 else grad for grad in grads]
        expected = [*(x.detach() for x in exact), *exact_grads]
        all_names = [*out_names, *(f"d{name}" for name in names)]
        return {
            name: relative_error(x, reference)
            for name, x, reference in zip(all_names, found, expected, strict=False)
        }


class StepProblem(Problem):
    def timed(self, call: Callable[..., Any], work: str) -> Callable[[], Any]:
        return call

    def first_call(self, method: Method, call: Callable[..., Any]) -> Callable[[], Any]:
        def first() -> None:
            call()
            self.first_losses = call.losses  # type: ignore[attr-defined]

        return first

    def errors(self, method: Method, call: Callable[..., Any]) -> dict[str, float]:
        """The first step's losses, token by token, against those of the definitions on the same
        weights and tokens: their mean would hide another attention."""
        expected = reference_losses(self.case, method.computes, self.device)
        return {"losses": relative_error(self.first_losses, expected)}

    def allowed(self, errors: dict[str, float]) -> dict[str, float]:
        return {"losses": 1e-5 if self.case.dtype == "float32" else 2e-3}
