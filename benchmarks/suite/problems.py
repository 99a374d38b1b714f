"""A case's inputs on a device, methods made ready for them, and the check of their results against
the float64 definition on the same inputs: what is wrong is not timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cogview_kernels as ck
from benchmarks.suite.cases import AttentionCase, Case, NormCase, StepCase
from benchmarks.suite.methods import Method, Prepare
from benchmarks.suite.steps import reference_losses

RESULTS = "out", "dq", "dk", "dv"
CHECKED_ROWS = 96  # of each of three stretches of the sequence

Call = Callable[..., Any]
Prepared = tuple[Call, dict[str, Any]]  # what is timed, and what the record's row says


class NotMeasured(Exception):
    """Why an entry has no time. ``failed``: it was wrong or broke, rather than cannot run here."""

    def __init__(self, reason: str, failed: bool = False) -> None:
        super().__init__(reason)
        self.failed = failed


class Problem:
    """A case's inputs. Methods that were prepared, or why they cannot be, are kept as long."""

    inputs: list[Tensor]
    douts: list[Tensor]  # gradients of what a forward gives
    errors: Callable[[str, Call], dict[str, float]]  # relative, of what ``computes`` names
    layout: ck.ThreeRegionLayout | None = None

    def __init__(self, case: Any, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.kept: dict[tuple[Prepare, str], Prepared] = {}
        self.refused: dict[tuple[Prepare, str], tuple[str, bool]] = {}

    def prepared(self, method: Method) -> Prepared:
        """Raises NotMeasured where a method cannot run here, breaks or is wrong."""
        key = method.prepare, method.computes
        if key in self.refused:
            raise NotMeasured(*self.refused[key])
        if key not in self.kept:
            try:
                self.kept[key] = self._prepare(method)
            except Exception as error:  # whatever a peer raises; the other methods go on
                reason = reason_of(error)
                self.refused[key] = str(reason), reason.failed
                raise reason from error
        return self.kept[key]

    def _prepare(self, method: Method) -> Prepared:
        if not method.installed:
            raise NotMeasured(f"{method.module} is not installed")
        call = method.prepare(self.case, self.layout, self.device)
        errors = self.errors(method.computes, call)
        allowed = {name: self.allowed(name) for name in errors}
        if wrong := [f"{name}: {e:.2g}" for name, e in errors.items() if e > allowed[name]]:
            text = f"wrong: relative error against float64, {', '.join(wrong)}"
            raise NotMeasured(text, failed=True)
        facts = method.facts(self.case, self.layout)
        return call, {"errors": errors, "errors_allowed": allowed, **facts}

    def random(self, *shape: int) -> Tensor:
        """Normal, in the case's dtype."""
        drawn = torch.randn(shape, device=self.device, generator=self.generator)
        return drawn.to(self.case.torch_dtype)

    def allowed(self, name: str) -> float:
        """Relative error of a result in the case's dtype: some roundings, of which a good method
        makes less than half; in float32 those of a long sum. Parameters' gradients are sums over
        all rows, which some sum in the dtype itself."""
        roundings = 1.5 if name in ("out", "y", "h", "z") else 2
        roundings = 4 if name.endswith(("weight", "bias")) else roundings
        return roundings * torch.finfo(self.case.torch_dtype).eps + 1e-5

    def timed(self, call: Call, work: str) -> Callable[[], Any]:
        """In a forward what the backward needs is kept, as in training."""

        def backward(outs: Any, retain_graph: bool = False) -> Any:
            return torch.autograd.grad(outs, self.inputs, self.douts, retain_graph)

        if work == "backward":
            return functools.partial(backward, self.outs(call), retain_graph=True)
        if work == "forward+backward":
            return lambda: backward(self.outs(call))
        return lambda: self.outs(call)

    def outs(self, call: Call) -> tuple[Tensor, ...]:
        outs = call(*self.inputs)
        return outs if isinstance(outs, tuple) else (outs,)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Infinity where anything found is not finite."""
    difference = float((found - expected).norm() / expected.norm())
    return difference if math.isfinite(difference) else math.inf


def outs_and_gradients(outs: Any, inputs: Any, douts: Any) -> list[Tensor]:
    grads = torch.autograd.grad(outs, inputs, douts) if inputs[0].requires_grad else ()
    return [x.detach() for x in (*outs, *grads)]


class AttentionProblem(Problem):
    def __init__(self, case: AttentionCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.layout = case.layout(device)
        queries = case.batch, case.num_heads, case.queries, case.head_dim
        keys = case.batch, case.kv_heads, case.seqlen, case.head_dim
        training, shapes = case.op == "attention", (queries, keys, keys)
        self.inputs = [self.random(*shape).requires_grad_(training) for shape in shapes]
        self.douts = [self.random(*queries)]

    def errors(self, computes: str, call: Call) -> dict[str, float]:
        """||x - exact|| / ||exact|| for the last sample, one head of keys and its heads of queries,
        and three stretches of rows: dout is zero elsewhere. Of out and dq the stretch with the
        largest error: the first rows see few keys and are large."""
        case = self.case
        rows = torch.arange(case.queries, device=self.device)
        if case.queries > 3 * CHECKED_ROWS:
            starts = 0, (case.queries - CHECKED_ROWS) // 2, case.queries - CHECKED_ROWS
            rows = torch.cat([rows[start:][:CHECKED_ROWS] for start in starts])
        group, kv_head = case.num_heads // case.kv_heads, case.kv_heads // 2
        of_queries = slice(-1, None), slice(kv_head * group, (kv_head + 1) * group), rows
        of_keys = slice(-1, None), slice(kv_head, kv_head + 1)
        places = of_queries, of_queries, of_keys, of_keys
        dout = torch.zeros_like(self.douts[0])
        dout[of_queries] = self.douts[0][of_queries]
        found = outs_and_gradients(self.outs(call), self.inputs, [dout])
        q, k, v = (
            x.detach()[place].double().requires_grad_(x.requires_grad)
            for x, place in zip(self.inputs, places[1:], strict=True)
        )
        if computes == "dense causal":
            position = rows[:, None] + case.seqlen - case.queries
            mask = torch.arange(case.seqlen, device=self.device) <= position
        else:
            assert computes == "three-region" and self.layout is not None
            mask = self.layout.dense_mask(case.batch, case.queries, case.seqlen)[-1, rows]
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        expected = outs_and_gradients([exact], (q, k, v), [dout[of_queries].double()])
        errors = {}
        for name, place, x, right in zip(RESULTS, places, found, expected, strict=False):
            stretches = 3 if place is of_queries else 1
            pairs = zip(x[place].chunk(stretches, 2), right.chunk(stretches, 2), strict=True)
            errors[name] = max(relative_error(*pair) for pair in pairs)
        return errors


class NormProblem(Problem):
    OF_OPS: dict[str, tuple[Call, tuple[str, ...], tuple[str, ...]]] = {
        "layer_norm": (ck.pb_relax_layer_norm, ("x", "weight", "bias"), ("y",)),
        "sandwich_residual": (
            ck.sandwich_residual,
            ("f", "residual", "post_weight", "post_bias", "pre_weight", "pre_bias"),
            ("h", "z"),
        ),
    }

    def __init__(self, case: NormCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.function, self.names, self.out_names = self.OF_OPS[case.op]
        self.douts = [self.random(case.rows, case.hidden) for _ in self.out_names]
        self.inputs = []
        for name in self.names:
            parameter = name.endswith(("weight", "bias"))
            x = self.random(case.hidden) if parameter else self.random(case.rows, case.hidden)
            self.inputs.append((1 + 0.1 * x if "weight" in name else x).requires_grad_())

    def errors(self, computes: str, call: Call) -> dict[str, float]:
        inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        relax = "row" if computes.startswith("PB-relax") else None
        exact = self.function(*inputs, relax=relax, backend="reference")
        exact = exact if isinstance(exact, tuple) else (exact,)
        expected = outs_and_gradients(exact, inputs, [dout.double() for dout in self.douts])
        found = outs_and_gradients(self.outs(call), self.inputs, self.douts)
        names = [*self.out_names, *(f"d{name}" for name in self.names)]
        return dict(zip(names, map(relative_error, found, expected), strict=True))


class StepProblem(Problem):
    def timed(self, call: Call, work: str) -> Callable[[], Any]:
        return call

    def errors(self, computes: str, call: Any) -> dict[str, float]:
        """The first step's losses, token by token, against those of the definitions on the same
        weights and tokens: their mean would hide another attention."""
        call()
        expected = reference_losses(self.case, computes, self.device)
        return {"losses": relative_error(call.losses, expected)}

    def allowed(self, name: str) -> float:
        return 1e-5 if self.case.attention.dtype == "float32" else 2e-3


@functools.lru_cache(maxsize=1)
def problem_of(case: Case, device: torch.device) -> Problem:
    kinds = {AttentionCase: AttentionProblem, NormCase: NormProblem, StepCase: StepProblem}
    return kinds[type(case)](case, device)


def reason_of(error: Exception) -> NotMeasured:
    if isinstance(error, NotMeasured):
        return NotMeasured(str(error), error.failed)
    if isinstance(error, torch.OutOfMemoryError):
        return NotMeasured("out of memory")
    # Of scaled_dot_product_attention, where the backend that was asked for takes no such case.
    if "No available kernel" in str(error) or "No viable backend" in str(error):
        return NotMeasured("torch has no such kernel for this case")
    text = " ".join(str(error).split())[:300]
    return NotMeasured(f"{type(error).__name__}: {text}", failed=True)
