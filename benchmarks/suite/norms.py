"""LayerNorm and the sandwich's step, ours and its peers'.

A norm is called as ``norm(x, weight, bias)``, the sandwich as ``sandwich(f, residual, post_weight,
post_bias, pre_weight, pre_bias)``. A peer has no sandwich: its own is two of its norms and an
addition, compiled into one where it is compiled. Peers without PB-relax leave out its maximum and
are compared all the same: they move the same bytes.
"""

from __future__ import annotations

import functools
import importlib
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
from benchmarks.suite.methods import (
    Method,
    WhyNot,
    anywhere,
    compiled,
    first_reason,
    installed,
    kernels_on,
    only_on_cuda,
    replayed,
)
from cogview_kernels import extension

EPS = 1e-5
RELAXED = "PyTorch PB-relax"
PB_RELAX, PLAIN = "PB-relax LayerNorm", "plain LayerNorm"

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
Sandwich = Callable[..., tuple[Tensor, Tensor]]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def pb_relax_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As CogView has it, the maximum by row: ``x / c`` is rounded, and a row of zeros is NaN."""
    c = x.detach().abs().amax(-1, keepdim=True) / 8
    return F.layer_norm(x / c, x.shape[-1:], weight, bias, EPS)


def ours(case: NormCase, layout: None, device: torch.device) -> Norm:
    return functools.partial(ck.pb_relax_layer_norm, eps=EPS, backend=kernels_on(device))


def our_sandwich(case: NormCase, layout: None, device: torch.device) -> Sandwich:
    return functools.partial(ck.sandwich_residual, eps=EPS, backend=kernels_on(device))


def liger() -> Norm:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return lambda x, weight, bias: functional.liger_layer_norm(x, weight, bias, EPS)


def quack() -> Norm:
    """Takes float32 parameters alone: who uses it keeps them so, hence they are cast once for all
    calls. It has no autograd of its own for LayerNorm."""
    module = importlib.import_module("quack.rmsnorm")

    class QuackLayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            weight32, bias32 = as_float32(weight), as_float32(bias)
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

    def as_float32(parameter: Tensor) -> Tensor:
        if id(parameter) not in casts:
            casts[id(parameter)] = parameter, parameter.float()
        return casts[id(parameter)][1]

    return lambda x, weight, bias: QuackLayerNorm.apply(x, weight, bias)


def sandwich_of(norm: Norm) -> Sandwich:
    """Two norms of a kind and an addition."""

    def sandwich(f: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + norm(f, *parameters[:2])
        return h, norm(h, *parameters[2:])

    return sandwich


def no_kernel(case: Any, device: torch.device) -> str | None:
    return extension.why_no_kernel_on(device, "cuda") if device.type == "cuda" else None


def no_compiler(case: Any, device: torch.device) -> str | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton, which is not installed"
    compilers = os.environ.get("CXX", "c++"), "g++", "clang++"
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return "torch.compile needs a C++ compiler, and none is installed"
    return None


def no_quack_backward(case: NormCase, device: torch.device) -> str | None:
    if hasattr(importlib.import_module("quack.rmsnorm"), "layernorm_bwd"):
        return None
    return "this quack-kernels has no backward of LayerNorm; 0.6.2 has"


NO_LIGER = first_reason(installed("liger_kernel", "liger-kernel"), only_on_cuda)
NO_QUACK = first_reason(installed("quack", "quack-kernels"), only_on_cuda, no_quack_backward)


def peers(whole: Callable[[Norm], Callable[..., Any]]) -> tuple[Method, ...]:
    """``whole`` makes of a norm what is timed: itself or the sandwich."""

    def method(
        name: str,
        computes: str,
        norm: Callable[[], Norm],
        why_not: WhyNot = anywhere,
        compile_s: float = 0.0,
    ) -> Method:
        def prepare(*_: Any) -> Callable[..., Any]:
            return compiled(whole(norm())) if compile_s else whole(norm())

        role = "rival" if computes == PB_RELAX else ""
        return Method(name, computes, prepare, why_not, role, compile_s)

    relaxed, plain = (lambda: pb_relax_layer_norm), (lambda: layer_norm)
    return (
        method(RELAXED, PB_RELAX, relaxed),
        *replayed(method(f"{RELAXED}, compiled", PB_RELAX, relaxed, no_compiler, 3.0)),
        *replayed(method("F.layer_norm", PLAIN, plain)),
        *replayed(method("F.layer_norm, compiled", PLAIN, plain, no_compiler, 3.0)),
        method("liger-kernel", PLAIN, liger, NO_LIGER),
        method("quack-kernels", PLAIN, quack, NO_QUACK),
    )


LAYER_NORM_METHODS: tuple[Method, ...] = (
    *replayed(Method("cogview_kernels", PB_RELAX, ours, no_kernel, "ours")),
    *peers(lambda norm: norm),
)
SANDWICH_METHODS: tuple[Method, ...] = (
    *replayed(Method("cogview_kernels", PB_RELAX, our_sandwich, no_kernel, "ours")),
    *peers(sandwich_of),
)
