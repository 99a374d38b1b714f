"""The LayerNorm kernels against the definition: their own source on the CPU (``host_model``) and,
where there is one, on a GPU (``cuda``)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_kernels import backend_or_skip
from torch import Tensor

import cogview_kernels as ck
from cogview_kernels import extension
from cogview_kernels.extension import modelled_device
from cogview_kernels.norm import function as norm
from cogview_kernels.norm import operators, portable, reference

CSRC = Path(__file__).resolve().parents[1] / "csrc"
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
# Of f and residual: those that the kernels are compiled for.
PAIRS = [*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.float32) for dtype in HALVES)]
RELAX = (None, "row", "tensor")
PARAMETERS = ("post_weight", "post_bias", "pre_weight", "pre_bias")
OF_A_ROW = ("y", "dx", "h", "z", "df", "dresidual")  # results that know of their own row alone
FLOAT32 = torch.finfo(torch.float32)
KB = 1024
SHARED_KB = (227, 163, 99, 48)  # of sm_90, sm_80, sm_86, and what every GPU has
EDGES = [2**n + step for n in (8, 9, 10) for step in (-1, 0, 1)]
EDGES += [2560, 4096, 4104, 5120, 8192, 8200, 12288, 16384, 16385, 17000]


@pytest.fixture(params=[backend_or_skip("host_model"), backend_or_skip("cuda")], scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Problems


@dataclasses.dataclass
class Problem:
    """One call, of ``pb_relax_layer_norm`` where there is an ``x``, else of ``sandwich_residual``,
    with the gradients that come back to it: of ``y``, or of ``h`` and ``z``."""

    tensors: dict[str, Tensor]  # x, weight, bias; or f, residual and those of PARAMETERS
    upstream: dict[str, Tensor]
    relax: str | None = "row"
    eps: float = 1e-5
    dropout: int = 0  # of 65536
    seed: int = 0x0123456789ABCDEF

    @property
    def rows(self) -> Tensor:
        return next(iter(self.tensors.values()))

    def dropped(self) -> Tensor:
        seed = torch.tensor([self.seed], device=self.rows.device)
        return portable.dropout_mask(seed, self.dropout, self.rows.shape)

    def run(self, backend: str) -> dict[str, Tensor]:
        """The kernels' results and gradients, where the problem lies."""
        device = "cuda" if backend == "cuda" else "cpu"
        leaves = ((name, t.detach().to(device)) for name, t in self.tensors.items())
        tensors = {name: t.requires_grad_() for name, t in leaves}
        seed = torch.tensor([self.seed], device=device)
        if "x" in tensors:
            x, weight, bias = (tensors.get(name) for name in ("x", "weight", "bias"))
            y = ck.pb_relax_layer_norm(x, weight, bias, self.eps, self.relax, backend)  # type: ignore[arg-type]
            outputs = {"y": y}
        else:
            parameters = [tensors.get(name) for name in PARAMETERS]
            with mock.patch.object(norm, "_draw_seed", lambda device, generator: seed):
                both = ck.sandwich_residual(
                    tensors["f"],
                    tensors["residual"],
                    *parameters,
                    self.eps,
                    self.relax,
                    backend,
                    dropout_p=self.dropout / 65536,
                    final_norm="z" in self.upstream,  # type: ignore[call-overload]
                )
            outputs = dict(zip(self.upstream, both, strict=False))
        upstream = [self.upstream[name].to(device) for name in outputs]
        gradients = torch.autograd.grad(list(outputs.values()), list(tensors.values()), upstream)
        results = {**outputs, **dict(zip((f"d{name}" for name in tensors), gradients, strict=True))}
        return {name: result.detach().to(self.rows.device) for name, result in results.items()}

    def matrices(self) -> dict[str, Tensor]:
        return {n: t for n, t in {**self.tensors, **self.upstream}.items() if t.ndim == 2}

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        parts = ({n: change(t) for n, t in part.items()} for part in (self.tensors, self.upstream))
        return dataclasses.replace(self, **dict(zip(("tensors", "upstream"), parts, strict=True)))

    def change(self, name: str, tensor: Tensor) -> Problem:
        part = "tensors" if name in self.tensors else "upstream"
        return dataclasses.replace(self, **{part: {**getattr(self, part), name: tensor}})


Norm = Callable[[Tensor, "Tensor | None", "Tensor | None", float, "str | None"], Tensor]


def by_definition(x: Tensor, weight: Any, bias: Any, eps: float, relax: str | None) -> Tensor:
    return reference.pb_relax_layer_norm(x, weight, bias, eps, relax)


def by_torch(x: Tensor, weight: Any, bias: Any, eps: float, relax: str | None) -> Tensor:
    """As one writes it, in the dtype of ``x``."""
    if relax is not None and x.numel() > 0:
        magnitude = x.detach().abs()
        peak = magnitude.amax(-1, keepdim=True) if relax == "row" else magnitude.amax()
        x = x / torch.where(peak == 0, 1.0, peak / 8).to(x.dtype)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def composed(
    problem: Problem, norm: Norm, h: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients with ``norm`` for each norm, and, of each result's norm, the gradient
    that comes to it. The second norm's input is the ``h`` that is given."""
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    eps, relax = problem.eps, problem.relax
    results: dict[str, Tensor] = {}
    coming = dict(problem.upstream)

    def differentiate(name: str, y: Tensor, wanted: dict[str, Tensor]) -> None:
        results[name] = y.detach()
        some = torch.autograd.grad(y, list(wanted.values()), coming[name].to(y.dtype))
        results.update(zip((f"d{n}" for n in wanted), some, strict=True))

    if "x" in leaves:
        y = norm(leaves["x"], leaves.get("weight"), leaves.get("bias"), eps, relax)
        differentiate("y", y, leaves)
        return results, coming
    if "z" in coming:
        assert h is not None
        h = h.to(leaves["residual"].dtype).requires_grad_()
        pre = {name: t for name, t in leaves.items() if name.startswith("pre")}
        z = norm(h, pre.get("pre_weight"), pre.get("pre_bias"), eps, relax)
        differentiate("z", z, {"h": h, **pre})
        coming["h"] = coming["h"] + results.pop("dh")
    post = {name: t for name, t in leaves.items() if not name.startswith("pre")}
    f = post["f"]
    if problem.dropout:
        f = torch.where(problem.dropped(), 0.0, f / (1 - problem.dropout / 65536 or 1.0))
    y = norm(f, post.get("post_weight"), post.get("post_bias"), eps, relax)
    differentiate("h", post["residual"] + y, post)
    return results, coming


def parts(x: Tensor, weight: Tensor | None, eps: float, relax: str | None) -> tuple[Tensor, ...]:
    """``xhat``, ``rstd``, the largest ``|x| rstd`` of each row, the weight; all float64."""
    x64 = x.double()
    magnitude = x64.abs()
    c = x64.new_ones(())
    if relax is not None and x.numel() > 0:
        c = (magnitude.amax(-1, keepdim=True) if relax == "row" else magnitude.amax()) / 8
        c = torch.where(c == 0, 1.0, c)
    centred = x64 / c - (x64 / c).mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat, rstd = centred * rstd, rstd / c
    condition = magnitude.amax(-1, keepdim=True) * rstd
    weight = x64.new_ones(x.shape[-1]) if weight is None else weight.double()
    return xhat, rstd, condition, weight


def terms_of_norm(
    x: Tensor, weight: Tensor | None, dy: Tensor, eps: float, relax: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What float32 rounds on the way to y, dx, dweight and dbias, in units of its eps: sums of N
    columns or rows as a random walk over N of their largest term, and x - mean, which cancels."""
    xhat, rstd, condition, weight = parts(x, weight, eps, relax)
    rows, hidden = x.shape
    walk, dy = math.sqrt(hidden), dy.double().abs()
    g = (dy * weight.abs()).amax(-1, keepdim=True)
    of_y = weight.abs() * (4 * condition + walk * xhat.abs())
    of_dx = rstd * g * (walk + 8 * condition) * (1 + xhat.abs())
    steps = 4 + math.sqrt(rows)
    of_dweight = (dy * (steps * xhat.abs() + 4 * condition)).sum(0)
    return of_y, of_dx, of_dweight, steps * dy.sum(0)


def allowed_roundings(
    problem: Problem, h: Tensor | None, coming: dict[str, Tensor]
) -> dict[str, Tensor]:
    """For each result, in units of float32's eps."""
    tensors, eps, relax = problem.tensors, problem.eps, problem.relax
    if "x" in tensors:
        names = ("y", "dx", "dweight", "dbias")
        terms = terms_of_norm(tensors["x"], tensors.get("weight"), coming["y"], eps, relax)
        roundings = dict(zip(names, terms, strict=True))
        roundings["y"] += abs(tensors.get("bias", tensors["x"].new_zeros(()))).double()
        return roundings
    kept_scale = 1 / (1 - problem.dropout / 65536 or 1.0)
    f = tensors["f"].double()
    if problem.dropout:
        f = torch.where(problem.dropped(), 0.0, f * kept_scale)
    terms = terms_of_norm(f, tensors.get("post_weight"), coming["h"], eps, relax)
    roundings = dict(zip(("h", "df", "dpost_weight", "dpost_bias"), terms, strict=True))
    roundings["df"] = roundings["df"] * kept_scale
    roundings["h"] += tensors["residual"].double().abs()
    roundings["h"] += abs(tensors.get("post_bias", f.new_zeros(()))).double()
    roundings["dresidual"] = coming["h"].double().abs()
    if h is not None:
        terms = terms_of_norm(h, tensors.get("pre_weight"), coming["z"], eps, relax)
        of_z, of_dh, roundings["dpre_weight"], roundings["dpre_bias"] = terms
        roundings["z"] = of_z + abs(tensors.get("pre_bias", f.new_zeros(()))).double()
        roundings["dresidual"] = roundings["dresidual"] + of_dh
        # f's norm is given what was rounded there; where two launches serve, in its dtype.
        unit = torch.finfo(tensors["residual"].dtype).eps / 2 / FLOAT32.eps
        of_dresidual = roundings["dresidual"] + unit * coming["h"].double().abs()
        weight = tensors.get("post_weight", f.new_ones(f.shape[1])).double().abs()
        xhat, rstd, condition, _ = parts(f, None, eps, relax)
        largest = (of_dresidual * weight).amax(-1, keepdim=True)
        roundings["df"] = roundings["df"] + kept_scale * rstd * largest * (1 + xhat.abs())
        roundings["dpost_bias"] = roundings["dpost_bias"] + of_dresidual.sum(0)
        of_columns = (of_dresidual * xhat.abs()).sum(0)
        roundings["dpost_weight"] = roundings["dpost_weight"] + of_columns
    return roundings


def excess_of(problem: Problem, actual: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each result in units of what is allowed, which is ``2 err(same-dtype
    torch) + atol``; the truth is the reference in float64, and torch's error that of the same row
    or, of a parameter's gradient, of all of it. ``atol`` is one rounding of the result and what
    ``allowed_roundings`` says. Infinite where there is a NaN, or a number that is not finite, and
    should be none, or the other way round."""
    h = actual.get("h") if "z" in problem.upstream else None
    truth, coming = composed(problem.map(lambda t: t.double()), by_definition, h)
    of_torch, _ = composed(problem, by_torch, h)
    roundings = allowed_roundings(problem, h, coming)
    assert set(actual) == set(truth) == set(of_torch)
    # Where the gradient of the residual is not representable, that of f need not be right.
    representable = problem.rows.new_ones(problem.rows.shape[0], dtype=torch.bool)
    if "z" in problem.upstream:
        dresidual = truth["dresidual"]
        representable = ~(dresidual.abs() > torch.finfo(actual["dresidual"].dtype).max).any(-1)
    worst = {}
    for name, expected in truth.items():
        value, other = actual[name], of_torch[name].double()
        assert value.shape == expected.shape and value.dtype == of_torch[name].dtype, name
        if name == "df":
            value, expected, other = (t[representable] for t in (value, expected, other))
        elif name.startswith("dpost") and not representable.all():
            continue
        if value.numel() == 0:
            worst[name] = 0.0
            continue
        finfo = torch.finfo(value.dtype)
        error = (other - expected).abs()
        error = error.amax(-1, keepdim=True) if value.ndim == 2 else error.amax()
        error = error.nan_to_num(0.0, 0.0)  # where torch overflows, nothing is forgiven
        rounded = roundings[name][representable] if name == "df" else roundings[name]
        # Denormal numbers are rounded to their smallest, of the result and of x / c.
        smallest = finfo.tiny * finfo.eps + FLOAT32.tiny * FLOAT32.eps * 64 / problem.eps**0.5
        atol = finfo.eps * expected.abs() + smallest + FLOAT32.eps * rounded
        bound = 2 * error + atol
        largest = expected.abs()
        wrong = value.isnan() != expected.isnan()
        wrong &= ~(largest > finfo.max - bound)  # infinite terms of a sum may cancel
        wrong |= (largest > finfo.max + bound) & value.isfinite()
        wrong |= (largest < finfo.max - bound) & ~value.isfinite()
        ratio = ((value.double() - expected).abs() / bound).masked_fill(~value.isfinite(), 0.0)
        worst[name] = math.inf if wrong.any() else ratio.nan_to_num(0.0).max().item()
    return worst


def assert_accurate(problem: Problem, actual: dict[str, Tensor]) -> None:
    for name, ratio in excess_of(problem, actual).items():
        assert ratio <= 1, f"{name}: error {ratio:.3g} of what is allowed"


def check(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Run the kernels and hold every result against the definition."""
    results = problem.run(backend)
    assert_accurate(problem, results)
    return results


# Contents


def fill(kind: str, shape: tuple[int, int], dtype: torch.dtype, generator: Any) -> Tensor:
    """Rows that break a LayerNorm which is careless with range or cancellation."""
    finfo = torch.finfo(dtype)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    sign = normal.sign()
    column = torch.randint(shape[1], (), generator=generator)
    if kind == "normal":
        values = 3 * normal
    elif kind == "large":
        values = normal.clamp(-4, 4) * (finfo.max / 4)
    elif kind == "largest":
        values = torch.full(shape, finfo.max, dtype=torch.float64)
    elif kind == "signs":
        values = sign * finfo.max
    elif kind == "denormal":
        values = (10 * normal).round() * finfo.tiny * finfo.eps
    elif kind == "small":
        values = normal * finfo.tiny * 4
    elif kind == "small constant":
        values = torch.full(shape, 1.3 * finfo.tiny, dtype=torch.float64)
    elif kind == "zeros":
        values = torch.zeros(shape, dtype=torch.float64)
    elif kind == "constant":
        values = torch.full(shape, -3.3, dtype=torch.float64)
    elif kind == "offset":
        values = 1000 + normal
    elif kind == "outlier":
        values = 1e-3 * normal
        values[:, column] = finfo.max
    elif kind == "lonely":
        values = torch.zeros(shape, dtype=torch.float64)
        values[:, column] = 1.0
    else:
        values = normal
        values[:, column] = float(kind)
    return values.to(dtype)


TAME = ("normal", "normal", "zeros", "constant", "offset", "lonely")
HARD = (*TAME, "large", "largest", "signs", "denormal", "small", "small constant", "outlier")
POISON = ("nan", "inf", "-inf")


def rows_of(
    kinds: tuple[str, ...], rows: int, hidden: int, dtype: torch.dtype, generator: Any
) -> Tensor:
    chosen = torch.randint(len(kinds), (rows,), generator=generator).tolist()
    if rows == 0:
        return torch.zeros(0, hidden, dtype=dtype)
    return torch.cat([fill(kinds[k], (1, hidden), dtype, generator) for k in chosen])


LAYOUTS = ("contiguous", "padded", "odd rows", "odd address")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers at other places, with NaN around them."""
    before, behind = {"padded": (8, 8), "odd rows": (0, 3), "odd address": (1, 7)}.get(
        layout, (0, 0)
    )
    if tensor.ndim == 1:
        return F.pad(tensor, (before, 0), value=math.nan)[before:]
    around = F.pad(tensor, (before, behind), value=math.nan)
    return around[:, before : before + tensor.shape[1]]


def make_norm(
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype | None = None,
    given: tuple[bool, ...] = (True, True),
    kinds: tuple[str, ...] = ("normal",),
    scale: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {"x": rows_of(kinds, rows, hidden, dtype, generator)}
    for name, is_given in zip(("weight", "bias"), given, strict=True):
        if is_given:
            tensors[name] = normal(hidden).to(dtype).to(parameter_dtype or dtype)
    return Problem(tensors, {"y": (scale * normal(rows, hidden)).to(dtype)}, **options)


def make_sandwich(
    rows: int,
    hidden: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    parameter_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
    given: tuple[bool, ...] = (True,) * 4,
    kinds: tuple[str, ...] = ("normal",),
    residual_kinds: tuple[str, ...] = ("normal",),
    scale: float = 1.0,
    final_norm: bool = True,
    seed: int = 0,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    f_dtype, h_dtype = dtypes

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "f": rows_of(kinds, rows, hidden, f_dtype, generator),
        "residual": rows_of(residual_kinds, rows, hidden, h_dtype, generator),
    }
    for n, (name, is_given) in enumerate(zip(PARAMETERS, given, strict=True)):
        dtype = dtypes[n // 2]
        if is_given and (final_norm or n < 2):
            tensors[name] = normal(hidden).to(dtype).to(parameter_dtypes[n // 2] or dtype)
    upstream = {name: (scale * normal(rows, hidden)).to(h_dtype) for name in ("h", "z")}
    if not final_norm:
        del upstream["z"]
    return Problem(tensors, upstream, **options)


@st.composite
def shapes(draw: st.DrawFn, max_elements: int) -> tuple[int, int]:
    hidden = draw(st.one_of(st.integers(1, 600), st.sampled_from(EDGES)))
    most = max(2, min(40, max_elements // hidden))
    return draw(st.one_of(st.integers(1, most), st.integers(0, 2))), hidden


@st.composite
def problems(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], max_elements: int = 20000
) -> Problem:
    """Of the norm for one dtype, of the sandwich for two."""
    rows, hidden = draw(shapes(max_elements))
    smallest = min(dtypes, key=lambda dtype: torch.finfo(dtype).max)
    scales = st.integers(-20, 6) if smallest == torch.float16 else st.integers(-60, 60)
    options: dict[str, Any] = {
        "scale": draw(st.one_of(st.just(1.0), scales.map(lambda n: 2.0**n))),
        "seed": draw(st.integers(0, 2**20)),
        "relax": draw(st.sampled_from(RELAX)),
        "eps": draw(st.sampled_from([1e-12, 1e-5, 0.1])),
        "kinds": draw(
            st.sampled_from([("normal",), HARD, HARD, *((k,) for k in HARD), (*TAME, *POISON)])
        ),
    }
    kinds = st.sampled_from([None, torch.float32])
    if len(dtypes) == 1:
        given = draw(st.tuples(*[st.booleans()] * 2))
        problem = make_norm(rows, hidden, dtypes[0], draw(kinds), given, **options)
    else:
        problem = make_sandwich(
            rows,
            hidden,
            dtypes,  # type: ignore[arg-type]
            draw(st.tuples(kinds, kinds)),
            draw(st.tuples(*[st.booleans()] * 4)),
            residual_kinds=draw(st.sampled_from([("normal",), TAME, (*TAME, *POISON)])),
            final_norm=draw(st.sampled_from([True, True, True, False])),
            **options,
        )
        problem.dropout = draw(st.sampled_from([0, 0, 1, 6554, 32768, 65535, 65536]))
        problem.seed = draw(st.sampled_from([0, 1, 2**63 - 2, 0x0123456789ABCDEF]))
    layouts = st.sampled_from([*["contiguous"] * 4, *LAYOUTS])
    return problem.map(lambda tensor: laid_out(tensor, draw(layouts)))


machines = st.tuples(st.sampled_from([1, 2, 3, 7, 40]), st.sampled_from(SHARED_KB))

# The definition


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=60)
def test_norm_equals_the_definition(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(problems((dtype,)))
    with modelled_device(*data.draw(machines)):
        check(problem, backend)


@pytest.mark.parametrize("dtypes", PAIRS)
@given(data=st.data())
@settings(max_examples=60)
def test_sandwich_equals_the_definition(
    backend: str, dtypes: tuple[torch.dtype, ...], data: st.DataObject
) -> None:
    problem = data.draw(problems(dtypes))
    with modelled_device(*data.draw(machines)):
        check(problem, backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), *PAIRS])
@given(data=st.data())
@settings(max_examples=20 * settings().max_examples)
def test_equals_the_definition_sweep(
    backend: str, dtypes: tuple[torch.dtype, ...], data: st.DataObject
) -> None:
    problem = data.draw(problems(dtypes, 60000))
    with modelled_device(*data.draw(machines)):
        check(problem, backend)


# Of two kinds: a NaN in one row is the peak of the tensor, and so of the others too.
@pytest.mark.parametrize("kind", [*HARD, *POISON, "nan+normal", "inf+normal"])
@pytest.mark.parametrize("relax", RELAX)
def test_each_kind_of_row(backend: str, kind: str, relax: str | None) -> None:
    for dtypes in PAIRS:
        for hidden in (7, 300):
            options: dict[str, Any] = {"kinds": tuple(kind.split("+")), "relax": relax}
            options["given"] = [hidden != 7] * 4
            with modelled_device(2):
                check(make_sandwich(5, hidden, dtypes, dropout=6554, **options), backend)
                if dtypes[0] == dtypes[1]:
                    options["given"] = options["given"][:2]
                    check(make_norm(5, hidden, dtypes[0], **options), backend)


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("final_norm", [True, False])
def test_many_rounds(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], final_norm: bool
) -> None:
    """One block has rows for several rounds, some of one warp each, some of several."""
    for hidden, rows, relax in (
        (300, 70, "row"),
        (700, 40, None),
        (4096, 7, "row"),
        (17000, 2, None),
    ):
        options: dict[str, Any] = {"relax": relax, "eps": 0.1, "kinds": HARD}
        check(make_norm(rows, hidden, dtypes[0], torch.float32, **options), backend)
        options |= {"dropout": 6554, "final_norm": final_norm}
        check(make_sandwich(rows, hidden, dtypes, **options), backend)


@pytest.mark.parametrize("hidden", [3, 40])
def test_more_blocks_than_a_thread_sums_at_once(backend: str, hidden: int) -> None:
    with modelled_device(300):
        for rows in (15, 191, 193, 300):
            check(make_norm(rows, hidden, torch.float32, kinds=HARD), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_peak_after_many_rounds(backend: str, dtype: torch.dtype) -> None:
    """The largest number of a tensor stands in a row that a block reaches in its third round."""
    problem = make_norm(150, 300, dtype, relax="tensor", eps=0.1)
    x = problem.tensors["x"].clone()
    x[149] *= 64
    check(problem.change("x", x), backend)


@pytest.mark.parametrize("hidden", [1, 9, 8200, 17000])
@pytest.mark.parametrize("final_norm", [True, False])
def test_no_rows(backend: str, hidden: int, final_norm: bool) -> None:
    problem = make_sandwich(0, hidden, (torch.float16, torch.float32), final_norm=final_norm)
    for some in (problem, make_norm(0, hidden, torch.float16)):
        results = check(some, backend)
        assert not any(result.any() for result in results.values())


NORM = make_norm(7, 300, torch.float16, torch.float32, kinds=HARD, seed=1)
SANDWICH = make_sandwich(7, 300, (torch.float16, torch.float32), dropout=6554)


@pytest.mark.parametrize(
    ("problem", "name"),
    [(NORM, name) for name in ("y", "dx", "dweight", "dbias")]
    + [(SANDWICH, name) for name in ("h", "z", "df", "dresidual")]
    + [(SANDWICH, f"d{name}") for name in PARAMETERS],
)
def test_a_wrong_result_is_caught(problem: Problem, name: str) -> None:
    """The bounds see zeros, one percent, a lost row or column, and a NaN too many."""
    results = problem.run("portable")
    assert_accurate(problem, results)
    right = results[name]
    lost, late, poisoned = right.clone(), right.clone(), right.clone()
    lost[..., -1] = 0
    if right.ndim == 2:
        late[0] = right[1]
    poisoned.view(-1)[0] = math.nan
    wrongs = [torch.zeros_like(right), 0.99 * right, lost, poisoned]
    for wrong in [*wrongs, late] if right.ndim == 2 else wrongs:
        # Of z, the results that follow from a wrong h are the right ones.
        excess = excess_of(problem, {**results, name: wrong})[name]
        assert excess > 1, f"error {excess:.3g} of what is allowed"


# Every kernel, and every way to deal out rows


SPELLED = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
MIXED = [f"{SPELLED[one]}, {SPELLED[two]}" for one, two in PAIRS]
EQUAL = [f"{SPELLED[dtype]}, {SPELLED[dtype]}" for dtype in DTYPES]
# What each kernel is compiled for.
VARIANTS = {
    "pb_relax_layer_norm_forward_kernel": [
        *(f"{types}, true" for types in MIXED),  # with a residual
        *(f"{types}, false" for types in EQUAL),
    ],
    "pb_relax_layer_norm_forward_wide_kernel": MIXED,
    "pb_relax_layer_norm_peak_kernel": list(SPELLED.values()),
    "pb_relax_layer_norm_backward_kernel": [
        *(f"{types}, {number}, false" for types in MIXED for number in (2, 4)),
        *(f"{types}, 2, true" for types in EQUAL),
    ],
    "pb_relax_layer_norm_backward_wide_kernel": MIXED,
    "pb_relax_layer_norm_partial_sums_kernel": ["1", "4"],  # columns of a thread
    "sandwich_residual_forward_kernel": MIXED,
    "sandwich_residual_backward_kernel": [
        *(f"{types}, false" for types in MIXED),
        *(f"{types}, true" for types in EQUAL[1:]),  # of 16 bits
    ],
}


def variants() -> set[str]:
    """The kernels of the sources with what they are instantiated for."""
    found = set()
    for path in (*CSRC.glob("pb_relax_layer_norm/*.cu"), *CSRC.glob("sandwich_residual/*.cu")):
        found |= set(re.findall(r"^ .*\b(\w+_kernel)\(const ", path.read_text(), re.MULTILINE))
    assert found == set(VARIANTS)
    return {
        f"{kernel}<{one}>" if one else kernel
        for kernel, arguments in VARIANTS.items()
        for one in arguments or [""]
    }


def launches(problem: Problem) -> list[dict[str, Any]]:
    """What the host model launched for it."""
    from cogview_kernels import _host_model

    _host_model.take_report()
    check(problem, "host_model")
    return list(_host_model.take_report())


@pytest.fixture
def host_model() -> None:
    reason = extension.why_not_host_model()
    if reason is not None:
        pytest.skip(reason)


def test_every_kernel_and_variant(host_model: None) -> None:
    assert len(variants()) == 8 + 5 + 3 + 13 + 5 + 2 + 5 + 7
    ran: set[str] = set()
    for dtypes in PAIRS:
        for hidden, shared_kb in ((202, 227), (200, 227), (8200, 227), (8208, 163), (23048, 227)):
            for final_norm in (True, False):
                for relax, dropout in (("row", 0), ("row", 6554), ("tensor", 6554)):
                    options: dict[str, Any] = {"final_norm": final_norm, "dropout": dropout}
                    with modelled_device(2, shared_kb):
                        problem = make_sandwich(3, hidden, dtypes, relax=relax, **options)
                        ran |= {launch["kernel"] for launch in launches(problem)}
                        if dtypes[0] == dtypes[1]:
                            problem = make_norm(3, hidden, dtypes[0], relax=relax)
                            ran |= {launch["kernel"] for launch in launches(problem)}
    assert ran == variants()


# Of the kernels whose rows are owned by groups of warps: how many inputs of the types of f or x, of
# h or y; weights and biases.
GROUPS = {
    "pb_relax_layer_norm_forward_kernel": (1, 0, 2),
    "sandwich_residual_forward_kernel": (1, 1, 4),
}
ENOUGH_WARPS, MOST_WARPS, MOST_BARRIERS, RESERVED = 12, 20, 15, 2 * KB


def warps_of_a_row(row: int, parameters: int, hidden: int, shared: int) -> tuple[int, int, int]:
    """Warps to a row, rows and stages of a block, as plan_by_warps says: the fewest warps of which
    there are enough, with two stages where they are. 0 rows where none fits."""
    best = 0, 0, 0
    for warps in (1, 2, 4, 8, 16):
        for stages in (2, 1):
            rows = max(0, shared - parameters) // (row * stages)
            if rows == 0:
                continue
            rows = min(rows, MOST_WARPS // warps, MOST_BARRIERS if warps > 1 else rows)
            if warps > 1 and 32 * warps > math.ceil(hidden / 8):
                continue
            if warps * rows > best[0] * best[1]:
                best = warps, rows, stages
            if warps * rows >= ENOUGH_WARPS:
                return best
    return best


def test_plans_of_groups(host_model: None) -> None:
    """How many warps own a row, and where rows lie: with one stage or two, and the launches where
    no plan fits."""
    found: dict[str, set[tuple[bool, bool, int]]] = {kernel: set() for kernel in GROUPS}
    fallbacks = set()
    for dtype in (torch.float16, torch.float32):
        for hidden in (5, 200, 300, 1024, 2048, 4096, 5120, 8192, 8200, 16384):
            for shared_kb in SHARED_KB:
                for problem in (
                    make_sandwich(7, hidden, (dtype, dtype)),
                    make_norm(7, hidden, dtype),
                ):
                    with modelled_device(2, shared_kb):
                        ran = launches(problem)
                    for launch in ran:
                        kernel = launch["kernel"].partition("<")[0]
                        is_sandwich = launch["operator"].startswith("sandwich")
                        if "forward" not in kernel:
                            continue
                        if kernel not in GROUPS or is_sandwich != kernel.startswith("sandwich"):
                            fallbacks.add((is_sandwich, kernel))
                            continue
                        of_f, of_h, parameters = GROUPS[kernel]
                        vectors = math.ceil(hidden / 256) * 32  # of whole warps
                        row = vectors * 8 * dtype.itemsize * (of_f + of_h)
                        rest = vectors * 32 * parameters
                        plan = warps_of_a_row(row, rest, hidden, shared_kb * KB - RESERVED)
                        warps, rows, stages = plan
                        assert launch["threads"] == 32 * warps * rows, (kernel, hidden, plan)
                        assert launch["dynamic_shared"] == rest + row * rows * stages
                        assert launch["grid"] == (2, 1)
                        found[kernel].add((warps > 1, rows > 1, stages))
    for kernel, plans in found.items():
        assert plans >= {(False, True, 2), (False, True, 1), (True, True, 1)}, (kernel, plans)
    assert (True, False, 1) in found["pb_relax_layer_norm_forward_kernel"]
    assert fallbacks == {
        (False, "pb_relax_layer_norm_forward_wide_kernel"),
        (True, "pb_relax_layer_norm_forward_kernel"),
        (True, "pb_relax_layer_norm_forward_wide_kernel"),
    }


# Of the backward kernels: inputs of the types of f or x, of h or y; statistics of a row; weights.
BACKWARD = {
    "pb_relax_layer_norm_backward_kernel": (1, 1, 1, 1),
    "sandwich_residual_backward_kernel": (1, 3, 2, 2),
}


def test_plans_of_backward(host_model: None) -> None:
    """The fewest warps that hold a row's column sums; as many groups of them as a block's threads
    and memory hold, and as there are rows; several only with two stages, where ColumnSums adds them
    up."""
    found: dict[str, set[tuple[bool, bool, int]]] = {kernel: set() for kernel in BACKWARD}
    rows, blocks = 23, 2
    for dtype in (torch.float16, torch.float32):
        for hidden in (5, 200, 768, 2560, 5120, 6152, 8192, 8200, 16384):
            for shared_kb in SHARED_KB:
                for problem in (
                    make_sandwich(rows, hidden, (dtype, dtype)),
                    make_norm(rows, hidden, dtype),
                ):
                    with modelled_device(blocks, shared_kb):
                        ran = launches(problem)
                    for launch in ran:
                        kernel = launch["kernel"].partition("<")[0]
                        if kernel not in BACKWARD or kernel[:4] != launch["operator"][:4]:
                            continue
                        of_f, of_h, statistics, weights = BACKWARD[kernel]
                        vectors = 2 if hidden <= 8192 else 4
                        warps = math.ceil(hidden / (256 * vectors))
                        pieces = (of_f + of_h) * (dtype.itemsize // 2)
                        stage = warps * (vectors * pieces * 512 + 16 * statistics + 16)
                        rest = warps * vectors * 1024 * weights
                        few = of_h == 3 and dtype.itemsize == 2 and hidden <= 6144
                        most = min((12 if few else 16) // warps, math.ceil(rows / blocks))
                        most = min(most, MOST_BARRIERS) if warps > 1 else most
                        room = (shared_kb * KB - RESERVED - rest) // stage
                        stages = 2 if room >= 2 else 1
                        groups = min(most, room // stages)
                        assert launch["threads"] == 32 * warps * groups, (kernel, hidden)
                        assert launch["dynamic_shared"] == rest + groups * stages * stage
                        assert launch["grid"] == (blocks, 1)
                        assert groups == 1 or stages == 2
                        found[kernel].add((warps > 1, groups > 1, stages))
    for kernel, plans in found.items():
        some = {(False, True, 2), (True, True, 2), (True, False, 2), (True, False, 1)}
        assert plans >= some, (kernel, plans)


@pytest.mark.parametrize("shared_kb", SHARED_KB[:3])
def test_memory_is_left_for_the_system(host_model: None, shared_kb: int) -> None:
    """Beside a launch's shared memory, its own arrays included, 1 KB stays free. The widest rows of
    each kernel, which docs/architecture.md lists, come close to the limit."""
    text = (CSRC.parent / "docs" / "architecture.md").read_text()
    table = text.partition("| | 227 KB | 163 KB | 99 KB |")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| ((?:plain|sandwich) \w+), .*?\| ([\d /|]+) \|$", table, re.M))
    assert len(rows) == 4
    f16, f32 = torch.float16, torch.float32
    for case, cells in rows.items():
        widest = [int(n) for n in cells.split("|")[SHARED_KB.index(shared_kb)].split("/")]
        pairs = [(f16, f16), (f16, f32), (f32, f32)]
        for hidden, dtypes in zip(widest, pairs if len(widest) == 3 else pairs[::2], strict=True):
            kind, way = case.split()
            name = f"pb_relax_layer_norm_{way}_kernel"
            if kind == "sandwich":
                name = f"sandwich_residual_{way}_kernel"
            for is_widest in (True, False):
                columns = hidden if is_widest else hidden + 8
                problem = make_norm(2, columns, dtypes[0])
                if kind == "sandwich":
                    problem = make_sandwich(2, columns, dtypes)
                with modelled_device(2, shared_kb):
                    found = launches(problem)
                found = [launch for launch in found if launch["kernel"].startswith(f"{name}<")]
                assert bool(found) == is_widest, (case, hidden, dtypes)
                for launch in found:
                    total = launch["dynamic_shared"] + launch["static_shared"]
                    assert total + KB <= shared_kb * KB, (case, hidden, dtypes)


# Properties


def same(one: dict[str, Tensor], two: dict[str, Tensor], names: Any = None) -> list[str]:
    """The results that differ in a bit."""
    return [
        name
        for name in names or one
        if name in one and not torch.equal(bits(one[name]), bits(two[name]))
    ]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("dtypes", PAIRS)
def test_reruns_and_multiprocessors(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The same bits again, and of all but the parameters' gradients however rows are dealt out;
    where a row is still held by the same threads, in however much memory."""
    for hidden, relax in zip((64, 300, 700, 8200, 17000), (*RELAX, None, "row"), strict=True):
        rows = 23 if hidden < 1000 else 5
        options: dict[str, Any] = {"relax": relax, "kinds": HARD}
        sandwich = make_sandwich(rows, hidden, dtypes, dropout=6554, **options)
        for problem in (make_norm(rows, hidden, dtypes[0], torch.float32, **options), sandwich):
            with modelled_device(3):
                first, second = problem.run(backend), problem.run(backend)
            assert not same(first, second), hidden
            for num_sms in (1, 40):
                with modelled_device(num_sms):
                    assert not same(problem.run(backend), first, OF_A_ROW), (hidden, num_sms)
            if hidden <= 300:
                with modelled_device(3, 99):
                    assert not same(problem.run(backend), first, OF_A_ROW), hidden


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_rows_know_nothing_of_their_mates(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], value: float
) -> None:
    for hidden, num_sms, relax in ((5, 1, "row"), (300, 3, None), (700, 1, None), (8200, 1, "row")):
        options: dict[str, Any] = {"relax": relax}
        norm = make_norm(6, hidden, dtypes[0], torch.float32, **options)
        for problem in (norm, make_sandwich(6, hidden, dtypes, dropout=6554, **options)):
            with modelled_device(num_sms):
                if hidden > 1000 and not math.isnan(value):
                    continue
                before = problem.run(backend)
                for name, tensor in problem.matrices().items():
                    poisoned = tensor.clone()
                    poisoned[3, hidden // 2] = value
                    after = problem.change(name, poisoned).run(backend)
                    others = [
                        {n: r[[0, 1, 2, 4, 5]] for n, r in results.items() if n in OF_A_ROW}
                        for results in (before, after)
                    ]
                    assert not same(*others), (hidden, name)


@pytest.mark.parametrize("dtypes", PAIRS)
def test_places_do_not_matter(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Rows far apart, at odd addresses, with NaN around them; parameters at odd addresses; the same
    row again and again: not a bit changes."""
    for hidden, relax in ((40, None), (301, "row"), (3, "tensor"), (8200, "row")):
        options: dict[str, Any] = {"relax": relax, "kinds": HARD}
        sandwich = make_sandwich(4, hidden, dtypes, dropout=6554, **options)
        for problem in (make_norm(4, hidden, dtypes[0], torch.float32, **options), sandwich):
            expected = problem.run(backend)
            for layout in LAYOUTS[1:]:
                moved = problem.map(lambda t, layout=layout: laid_out(t, layout))
                assert not same(moved.run(backend), expected), (hidden, layout)
                if layout != "odd address" if hidden > 1000 else layout == "odd rows":
                    continue
                for name, tensor in {**problem.tensors, **problem.upstream}.items():
                    one = problem.change(name, laid_out(tensor, layout))
                    assert not same(one.run(backend), expected), (hidden, layout, name)
            once = problem.map(lambda t: t[:1].expand(4, -1) if t.ndim == 2 else t)
            copied = once.map(lambda t: t.contiguous())
            assert not same(once.run(backend), copied.run(backend)), hidden


@pytest.mark.parametrize("dtypes", PAIRS)
def test_strides_in_many_rounds(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Every group goes from row to row several times, in each matrix by its own stride."""
    for problem in (make_norm(40, 520, dtypes[0]), make_sandwich(40, 520, dtypes)):
        apart = {name: 8 * n for n, name in enumerate(problem.matrices(), 1)}
        moved = problem
        for name, tensor in problem.matrices().items():
            moved = moved.change(name, F.pad(tensor, (0, apart[name]), value=math.nan)[:, :520])
        with modelled_device(1):
            assert not same(moved.run(backend), problem.run(backend))


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("hidden", [24, 300, 8200, 17000])
def test_what_is_dropped_does_not_matter(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], hidden: int
) -> None:
    """The same elements forward and backward, and those of the definition."""
    for relax in RELAX if hidden < 1000 else ("tensor",):
        for final_norm in (True, False):
            problem = make_sandwich(
                5 if hidden < 1000 else 3,
                hidden,
                dtypes,
                dropout=19661,
                relax=relax,
                final_norm=final_norm,
                seed=3,
            )
            with modelled_device(2):
                expected = problem.run(backend)
                dropped = problem.dropped()
                assert not expected["df"][dropped].any() and expected["df"][~dropped].any()
                for value in (math.nan, -math.inf, 6e4):
                    f = problem.tensors["f"].masked_fill(dropped, value)
                    assert not same(problem.change("f", f).run(backend), expected)


# Numbers at the edge


@pytest.mark.parametrize("dtypes", PAIRS)
def test_loss_scales_change_exponents_alone(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Gradients are linear in what comes back: a power of two scales them, to the bit where none
    of them is denormal or infinite."""
    for hidden in (24, 300, 8200):
        norm = make_norm(6, hidden, dtypes[0], torch.float32)
        for problem in (norm, make_sandwich(6, hidden, dtypes, dropout=6554)):
            expected = problem.run(backend)
            narrow = torch.float16 in dtypes
            for exponent in (-2, 3) if narrow else (-60, -7, 9, 60):
                upstream = {name: t * 2.0**exponent for name, t in problem.upstream.items()}
                scaled = dataclasses.replace(problem, upstream=upstream).run(backend)
                for name in expected:
                    if not name.startswith("d"):
                        continue
                    right = expected[name].double() * 2.0**exponent
                    finfo = torch.finfo(expected[name].dtype)
                    exact = (right.abs() > 2 * finfo.tiny) & (right.abs() <= finfo.max)
                    exact &= expected[name].abs() > 2 * finfo.tiny
                    difference = (scaled[name].double() - right).abs()
                    # What goes on in sixteen bits from norm to norm may lose a denormal bit.
                    allowed = 0 if not narrow else 2e-3 * right.abs().max()
                    assert (difference[exact] <= allowed).all(), (hidden, exponent, name)


@pytest.mark.parametrize("exponent", [*range(-24, 5, 4)])
@pytest.mark.parametrize("hidden", [40, 520])
def test_gradients_at_any_loss_scale(backend: str, exponent: int, hidden: int) -> None:
    for dtypes in PAIRS:
        options: dict[str, Any] = {"scale": 2.0**exponent, "kinds": HARD}
        check(make_norm(9, hidden, dtypes[0], **options), backend)
        check(make_sandwich(9, hidden, dtypes, dropout=6554, **options), backend)


@pytest.mark.thinned
@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("hidden", [1, 8, 300, 8200, 17000])
def test_nothing_overflows(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], relax: str | None, hidden: int
) -> None:
    """The largest numbers of the dtype in every place of the input: all results are finite."""
    kinds = ("large", "largest", "signs", "outlier")
    options: dict[str, Any] = {"relax": relax, "kinds": kinds, "given": (False,) * 4}
    norm = make_norm(4, hidden, dtypes[0], **{**options, "given": (False, False)})
    for problem in (norm, make_sandwich(4, hidden, dtypes, dropout=6554, **options)):
        results = check(problem, backend)
        assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("hidden", [48, 301, 1024, 8200, 17001])
@pytest.mark.parametrize("relax", RELAX)
def test_a_large_offset_costs_nothing(backend: str, hidden: int, relax: str | None) -> None:
    """Whole numbers around 2^20, whose differences are exact: results are as good as those of the
    differences alone."""
    whole = torch.randint(-8, 9, (5, hidden), generator=torch.Generator().manual_seed(0))
    norm = make_norm(5, hidden, torch.float32, relax=relax, eps=1e-12)
    # The residual adds nothing to what f's norm is not: h is what comes out of it.
    sandwich = make_sandwich(5, hidden, (torch.float32,) * 2, relax=relax, eps=1e-12)
    sandwich.tensors["residual"].zero_()
    for problem, name in ((norm, "x"), (sandwich, "f")):
        problem.tensors[name] = 2.0**20 + whole
        with modelled_device(2):
            actual = problem.run(backend)
        truth, _ = composed(problem.map(lambda t: t.double()), by_definition, actual.get("h"))
        for result, expected in truth.items():
            error = (actual[result].double() - expected).abs().max().item()
            atol = 64 * FLOAT32.eps * expected.abs().max().item() + 1e-9
            assert error <= atol, (result, error, atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [300, 4096])
@pytest.mark.parametrize("relax", RELAX)
def test_the_first_mean_is_nearly_the_mean(
    host_model: None, dtype: torch.dtype, hidden: int, relax: str | None
) -> None:
    """Of the statistics that the backward takes from the forward: whatever a row's numbers, the
    scale is exact, the shift is a rounding error, and the two means are the row's."""
    kinds = (
        "offset",
        "constant",
        "normal",
        "large",
        "small constant",
        "denormal",
        "small",
        "zeros",
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([fill(kind, (2, hidden), dtype, generator) for kind in kinds])
    with modelled_device(1, 99):  # several warps to a row of 4096
        _, statistics = operators._norm(x, None, None, 1e-5, RELAX.index(relax))
    rough_mean, shift, _, scale = statistics.double().unbind(-1)
    assert torch.equal(scale.log2(), scale.log2().round())
    scaled = x.double() * scale[:, None]
    largest = scaled.abs().amax(-1)
    assert (shift.abs() <= 2**-18 * largest + FLOAT32.tiny).all()
    error = (rough_mean + shift - scaled.mean(-1)).abs()
    assert (error <= 4 * FLOAT32.eps * largest + FLOAT32.tiny).all()
