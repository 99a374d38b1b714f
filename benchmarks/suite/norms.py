"""LayerNorm and the sandwich's step, ours and its peers'.

A norm is called as ``norm(x, weight, bias)``, the sandwich as ``sandwich(f, residual, post_weight,
post_bias, pre_weight, pre_bias)``. A peer has no sandwich: its own is two of its norms and an
addition, compiled into one where it is compiled. Peers without PB-relax leave out its maximum and
are compared all the same: they move the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cogview_kernels as ck
from benchmarks.suite.cases import NormCase
from benchmarks.suite.methods import Method, Prepare, compiled
from cogview_kernels import extension

EPS = 1e-5
PB_RELAX, PLAIN = "PB-relax LayerNorm", "plain LayerNorm"

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
Sandwich = Callable[..., tuple[Tensor, Tensor]]


def kernels_on(device: torch.device) -> str:
    """The backend that is timed as ours: on a GPU the kernels or an error, never a substitute."""
    return "cuda" if device.type == "cuda" else "auto"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def pb_relax_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As CogView has it, the maximum by row: ``x / c`` is rounded, and a row of zeros is NaN."""
    c = x.detach().abs().amax(-1, keepdim=True) / 8
    return F.layer_norm(x / c, x.shape[-1:], weight, bias, EPS)


def ours(backend: str | None, relax: str | None = "row") -> Prepare:
    def prepare(case: NormCase, layout: None, device: torch.device) -> Norm:
        return functools.partial(
            ck.pb_relax_layer_norm, eps=EPS, relax=relax, backend=backend or kernels_on(device)
        )

    return prepare


def our_sandwich(backend: str | None) -> Prepare:
    def prepare(case: NormCase, layout: None, device: torch.device) -> Sandwich:
        return functools.partial(
            ck.sandwich_residual, eps=EPS, backend=backend or kernels_on(device)
        )

    return prepare


def torch_norm(norm: Norm) -> Prepare:
    return lambda case, layout, device: norm


def liger(case: NormCase, layout: None, device: torch.device) -> Norm:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return lambda x, weight, bias: functional.liger_layer_norm(x, weight, bias, EPS)


def apex(case: NormCase, layout: None, device: torch.device) -> Norm:
    module = importlib.import_module("apex.normalization.fused_layer_norm")
    return lambda x, *parameters: module.fused_layer_norm_affine(x, *parameters, x.shape[-1:], EPS)


def quack(case: NormCase, layout: None, device: torch.device) -> Norm:
    """Takes float32 parameters alone: who uses it keeps them so, hence they are cast once for all
    calls. It has no autograd of its own for LayerNorm."""
    module = importlib.import_module("quack.rmsnorm")

    class QuackLayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            weight32, bias32 = as_float32(weight, bias)
            y, rstd, mean = module.layernorm_fwd(
                x, weight32, bias32, EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(x, weight32, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, weight32, rstd, mean = ctx.saved_tensors
            dx, dweight, dbias = module.layernorm_bwd(x, weight32, dy, rstd, mean, has_bias=True)
            return dx, dweight, dbias

    casts: dict[int, tuple[Tensor, Tensor]] = {}

    def as_float32(*parameters: Tensor) -> list[Tensor]:
        for p in parameters:
            if id(p) not in casts:
                casts[id(p)] = p, p.float()
        return [casts[id(p)][1] for p in parameters]

    return lambda x, weight, bias: QuackLayerNorm.apply(x, weight, bias)


def sandwich_of(prepare_norm: Prepare) -> Prepare:
    """Two norms of a kind and an addition."""

    def prepare(case: NormCase, layout: None, device: torch.device) -> Sandwich:
        norm = prepare_norm(case, layout, device)

        def sandwich(
            f: Tensor,
            residual: Tensor,
            post_weight: Tensor,
            post_bias: Tensor,
            pre_weight: Tensor,
            pre_bias: Tensor,
        ) -> tuple[Tensor, Tensor]:
            h = residual + norm(f, post_weight, post_bias)
            return h, norm(h, pre_weight, pre_bias)

        return sandwich

    return prepare


def then_compiled(prepare: Prepare) -> Prepare:
    return lambda case, layout, device: compiled(prepare(case, layout, device))


def no_kernel(case: Any, device: torch.device) -> str | None:
    return extension.why_no_kernel_on(device, "cuda") if device.type == "cuda" else None


def same_as_ours(case: Any, device: torch.device) -> str | None:
    """Of "portable"."""
    return None if device.type == "cuda" else "what cogview_kernels runs on the CPU"


def no_compiler(case: Any, device: torch.device) -> str | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton, which is not installed"
    compilers = os.environ.get("CXX", "c++"), "g++", "clang++"
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return "torch.compile needs a C++ compiler, and none is installed"
    return None


def no_package(name: str, module: str) -> Callable[[NormCase, torch.device], str | None]:
    def why_not(case: NormCase, device: torch.device) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{name} is not installed"
        return None if device.type == "cuda" else f"{name} runs on GPUs only"

    return why_not


def no_apex(case: NormCase, device: torch.device) -> str | None:
    # Apex can be installed without its extensions.
    module = "apex" if importlib.util.find_spec("apex") is None else "fused_layer_norm_cuda"
    return no_package("Apex with its fused_layer_norm_cuda", module)(case, device)


def no_quack(case: NormCase, device: torch.device) -> str | None:
    reason = no_package("quack-kernels", "quack")(case, device)
    if reason is None and not hasattr(importlib.import_module("quack.rmsnorm"), "layernorm_bwd"):
        return "this quack-kernels has no backward of LayerNorm; 0.6.2 has"
    return reason


def sandwiches(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    return tuple(
        dataclasses.replace(method, prepare=sandwich_of(method.prepare)) for method in methods
    )


def and_compiled(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    """The methods, and each of them compiled."""
    again = (
        Method(f"{m.name}, compiled", m.computes, then_compiled(m.prepare), no_compiler, True)
        for m in methods
    )
    return (*methods, *again)


_TORCH = (
    Method("PyTorch PB-relax", PB_RELAX, torch_norm(pb_relax_layer_norm)),
    Method("F.layer_norm", PLAIN, torch_norm(layer_norm)),
)
_PACKAGES = (
    Method("liger-kernel", PLAIN, liger, no_package("liger-kernel", "liger_kernel")),
    Method("quack-kernels", PLAIN, quack, no_quack),
    Method("Apex", PLAIN, apex, no_apex),
)

LAYER_NORM_METHODS: tuple[Method, ...] = (
    Method("cogview_kernels", PB_RELAX, ours(None), no_kernel),
    Method("portable", PB_RELAX, ours("portable"), same_as_ours),
    Method("cogview_kernels, relax=None", PLAIN, ours(None, relax=None), no_kernel),
    *and_compiled(_TORCH),
    *_PACKAGES,
)
SANDWICH_METHODS: tuple[Method, ...] = (
    Method("cogview_kernels", PB_RELAX, our_sandwich(None), no_kernel),
    Method("portable", PB_RELAX, our_sandwich("portable"), same_as_ours),
    Method("cogview_kernels, two norms", PB_RELAX, sandwich_of(ours(None)), no_kernel),
    *and_compiled(sandwiches(_TORCH)),
    *sandwiches(_PACKAGES),
)
