"""A case's inputs on a device, methods made ready for them, and the check of their results against
the float64 definition on the same inputs: what is wrong is not timed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cogview_kernels as ck
from benchmarks.suite.cases import AttentionCase, Case, NormCase, StepCase
from benchmarks.suite.measure import elapsed
from benchmarks.suite.methods import Method, Prepare
from benchmarks.suite.steps import reference_losses

CHECKED_ROWS = 96  # of each of three stretches of the sequence


class NotMeasured(Exception):
    """Why an entry has no time. ``failed``: it was wrong or broke, rather than cannot run here."""

    def __init__(self, reason: str, failed: bool = False) -> None:
        super().__init__(reason)
        self.failed = failed


Prepared = tuple[Callable[..., Any], dict[str, Any]]  # the call, and what the record's row says


class Problem:
    """A case's inputs. Methods that were prepared are kept as long as these."""

    def __init__(self, case: Any, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.layout = case.layout(device) if isinstance(case, AttentionCase) else None
        self.kept: dict[tuple[Prepare, str], Prepared] = {}

    def prepared(self, method: Method) -> Prepared:
        key = method.prepare, method.computes
        if key not in self.kept:
            self.kept[key] = self._prepare(method)
        return self.kept[key]

    def _prepare(self, method: Method) -> Prepared:
        prepare = functools.partial(method.prepare, self.case, self.layout, self.device)
        elapsed(prepare, self.device)  # the first time starts what is lazy
        calls: list[Callable[..., Any]] = []
        prepare_seconds = elapsed(lambda: calls.append(prepare()), self.device)
        call = calls[0]
        first_call_seconds = elapsed(lambda: self.first_call(call), self.device)
        errors = self.errors(method, call)
        allowed = {name: self.allowed(name) for name in errors}
        wrong = [f"{name}: {e:.2g}" for name, e in errors.items() if e > allowed[name]]
        if wrong:
            text = f"wrong: relative error against float64, {', '.join(wrong)}"
            raise NotMeasured(text, failed=True)
        facts = {
            "errors": errors,
            "errors_allowed": allowed,
            "prepare_seconds": prepare_seconds,
            "first_call_seconds": first_call_seconds,
        }
        return call, facts | method.facts(self.case, self.layout)

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

    def first_call(self, call: Callable[..., Any]) -> None:
        """What a method does once before it is timed: forward and backward, compiled if need be."""
        self.timed(call, "forward+backward" if "backward" in self.case.works else "forward")()

    # What a forward gives, the inputs that have gradients, and the gradients of the former.
    results: Callable[[Callable[..., Any]], tuple[tuple[Tensor, ...], Any, Any]]
    errors: Callable[[Method, Callable[..., Any]], dict[str, float]]  # relative, of each result

    def timed(self, call: Callable[..., Any], work: str) -> Callable[[], Any]:
        """In a forward what the backward needs is kept, as in training."""

        def forward_backward() -> Any:
            outs, inputs, douts = self.results(call)
            return torch.autograd.grad(outs, inputs, douts)

        if work != "backward":
            return forward_backward if "backward" in work else lambda: self.results(call)[0]
        outs, inputs, douts = self.results(call)
        return lambda: torch.autograd.grad(outs, inputs, douts, retain_graph=True)


class AttentionProblem(Problem):
    def __init__(self, case: AttentionCase, device: torch.device) -> None:
        super().__init__(case, device)
        keys = case.batch, case.kv_heads, case.seqlen, case.head_dim
        queries = case.batch, case.num_heads, case.queries, case.head_dim
        training = case.op == "attention"
        self.qkv = [self.random(*shape).requires_grad_(training) for shape in (queries, keys, keys)]
        self.dout = self.random(*queries)

    def results(self, call: Callable[..., Any]) -> tuple[tuple[Tensor, ...], Any, Any]:
        return (call(*self.qkv),), self.qkv, self.dout

    def errors(self, method: Method, call: Callable[..., Any]) -> dict[str, float]:
        """||x - reference|| / ||reference|| for one sample and one head of keys with its heads of
        queries, three stretches of rows: dout is zero elsewhere, so that dk and dv are theirs. Of
        out and dq the stretch with the largest error: the first rows see few keys and are large."""
        case = self.case
        group, kv_head = case.num_heads // case.kv_heads, case.kv_heads // 2
        heads = slice(kv_head * group, (kv_head + 1) * group)
        parts = [(slice(-1, None), where) for where in (heads, *[slice(kv_head, kv_head + 1)] * 2)]
        stretches = [slice(0, case.queries)]
        if case.queries > 3 * CHECKED_ROWS:
            starts = 0, (case.queries - CHECKED_ROWS) // 2, case.queries - CHECKED_ROWS
            stretches = [slice(start, start + CHECKED_ROWS) for start in starts]

        dout = torch.zeros_like(self.dout)
        for rows in stretches:
            dout[parts[0]][:, :, rows] = self.dout[parts[0]][:, :, rows]
        out = call(*self.qkv)
        grads = torch.autograd.grad(out, self.qkv, dout) if case.op == "attention" else []
        found = [
            x.detach()[part] for x, part in zip((out, *grads), (parts[0], *parts), strict=False)
        ]

        errors = {"out": 0.0, "dq": 0.0}
        sums = [torch.zeros_like(x, dtype=torch.float64) for x in found[2:]]
        layout = definition(method.computes, self.layout, case)
        for rows in stretches:
            keys = slice(0, case.seqlen - case.queries + rows.stop)
            q, k, v = (
                x.detach()[part][:, :, where].double().requires_grad_()
                for x, part, where in zip(self.qkv, parts, (rows, keys, keys), strict=True)
            )
            exact = ck.three_region_attention(q, k, v, layout, backend="reference")
            weight = dout[parts[0]][:, :, rows].double()
            exact_grads = torch.autograd.grad(exact, (q, k, v), weight)
            for name, x, right in zip(errors, found, (exact, *exact_grads), strict=False):
                errors[name] = max(errors[name], relative_error(x[:, :, rows], right.detach()))
            for total, grad in zip(sums, exact_grads[1:], strict=False):
                total[:, :, keys] += grad
        if case.op != "attention":
            return {"out": errors["out"]}
        pairs = zip(("dk", "dv"), found[2:], sums, strict=True)
        return errors | {name: relative_error(x, right) for name, x, right in pairs}


def definition(
    computes: str, layout: ck.ThreeRegionLayout | None, case: AttentionCase
) -> ck.ThreeRegionLayout:
    """The layout of the last sample by which ``computes`` is defined."""
    if computes == "dense causal":
        return ck.ThreeRegionLayout(0, None, case.seqlen, 1)
    assert computes == "three-region" and layout is not None
    assert isinstance(layout.text_len, Tensor) and layout.pivot_idx is not None
    return dataclasses.replace(
        layout, text_len=layout.text_len[-1:], pivot_idx=layout.pivot_idx[-1:]
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Infinity where anything found is not finite."""
    difference = float((found - expected).norm() / expected.norm())
    return difference if math.isfinite(difference) else math.inf


class NormProblem(Problem):
    NAMES = {
        "layer_norm": (("x", "weight", "bias"), ("y",)),
        "sandwich_residual": (
            ("f", "residual", "post_weight", "post_bias", "pre_weight", "pre_bias"),
            ("h", "z"),
        ),
    }
    FUNCTIONS: dict[str, Callable[..., Any]] = {
        "layer_norm": ck.pb_relax_layer_norm,
        "sandwich_residual": ck.sandwich_residual,
    }

    def __init__(self, case: NormCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.names, self.out_names = self.NAMES[case.op]
        self.inputs = [self._draw(name).requires_grad_() for name in self.names]
        self.douts = [self.random(case.rows, case.hidden) for _ in self.out_names]

    def _draw(self, name: str) -> Tensor:
        if "weight" in name:
            return 1 + 0.1 * self.random(self.case.hidden)
        rows = () if "bias" in name else (self.case.rows,)
        return self.random(*rows, self.case.hidden)

    def results(self, call: Callable[..., Any]) -> tuple[tuple[Tensor, ...], Any, Any]:
        outs = call(*self.inputs)
        return outs if isinstance(outs, tuple) else (outs,), self.inputs, self.douts

    def errors(self, method: Method, call: Callable[..., Any]) -> dict[str, float]:
        """Of some rows, the first and the last among them: the gradient of the others is zero."""
        case = self.case
        rows = torch.linspace(0, case.rows - 1, min(case.rows, 4 * CHECKED_ROWS)).long()
        rows = rows.unique().to(self.device)
        outs, _, _ = self.results(call)
        douts = [torch.zeros_like(dout).index_copy_(0, rows, dout[rows]) for dout in self.douts]
        grads = torch.autograd.grad(outs, self.inputs, douts)

        def of_rows(x: Tensor) -> Tensor:
            return x.detach()[rows] if x.ndim == 2 else x.detach()

        leaves = [of_rows(x).double().requires_grad_() for x in self.inputs]
        relax = "row" if method.computes.startswith("PB-relax") else None
        exact = self.FUNCTIONS[case.op](*leaves, relax=relax, backend="reference")
        exact = exact if isinstance(exact, tuple) else (exact,)
        exact_grads = torch.autograd.grad(exact, leaves, [dout[rows].double() for dout in douts])
        names = [*self.out_names, *(f"d{name}" for name in self.names)]
        triples = zip(names, (*outs, *grads), (*exact, *exact_grads), strict=True)
        return {name: relative_error(of_rows(x), right.detach()) for name, x, right in triples}


class StepProblem(Problem):
    def timed(self, call: Callable[..., Any], work: str) -> Callable[[], Any]:
        return call

    def first_call(self, call: Callable[..., Any]) -> None:
        call()
        self.first_losses = call.losses  # type: ignore[attr-defined]

    def errors(self, method: Method, call: Callable[..., Any]) -> dict[str, float]:
        """The first step's losses, token by token, against those of the definitions on the same
        weights and tokens: their mean would hide another attention."""
        expected = reference_losses(self.case, method.computes, self.device)
        return {"losses": relative_error(self.first_losses, expected)}

    def allowed(self, name: str) -> float:
        return 1e-5 if self.case.attention.dtype == "float32" else 2e-3


@functools.lru_cache(maxsize=1)
def problem_of(case: Case, device: torch.device) -> Problem:
    kinds = {AttentionCase: AttentionProblem, NormCase: NormProblem, StepCase: StepProblem}
    return kinds[type(case)](case, device)


def forget() -> None:
    """Frees the inputs of the last case, and what was prepared for them."""
    problem_of.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason_of(error: Exception) -> NotMeasured:
    if isinstance(error, torch.OutOfMemoryError):
        return NotMeasured("out of memory")
    # Of scaled_dot_product_attention, where the backend that was asked for takes no such case.
    if "No available kernel" in str(error) or "No viable backend" in str(error):
        return NotMeasured("torch has no such kernel for this case")
    text = " ".join(str(error).split())[:300]
    return NotMeasured(f"{type(error).__name__}: {text}", failed=True)
