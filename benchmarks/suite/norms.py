"""LayerNorm and the sandwich's step, ours and its peers'.

A norm is called as ``norm(x, weight, bias)``, the sandwich as ``sandwich(f, residual, post_weight,
post_bias, pre_weight, pre_bias)``. A peer has no sandwich: its own is two of its norms and an
addition, compiled into one where it is compiled. Peers without PB-relax leave out its maximum and
are compared all the same: they move the same bytes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cogview_kernels as ck
from benchmarks.suite.methods import Method, compiled, kernels_on, with_replay

EPS = 1e-5
PB_RELAX, PLAIN = "PB-relax LayerNorm", "plain LayerNorm"
RELAXED, RELAXED_COMPILED = "PyTorch PB-relax", "PyTorch PB-relax, compiled"

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
Sandwich = Callable[..., tuple[Tensor, Tensor]]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def pb_relax_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As CogView has it, the maximum by row: ``x / c`` is rounded, and a row of zeros is NaN."""
    c = x.detach().abs().amax(-1, keepdim=True) / 8
    return layer_norm(x / c, weight, bias)


def liger() -> Norm:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return lambda x, weight, bias: functional.liger_layer_norm(x, weight, bias, EPS)


def sandwich_of(norm: Norm) -> Sandwich:
    """Two norms of a kind and an addition."""

    def sandwich(f: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + norm(f, *parameters[:2])
        return h, norm(h, *parameters[2:])

    return sandwich


def methods(
    function: Callable[..., Any], whole: Callable[[Norm], Callable[..., Any]]
) -> tuple[Method, ...]:
    """Ours, and the peers': ``whole`` makes of a norm what is timed, itself or the sandwich."""

    def ours(case: Any, layout: None, device: torch.device) -> Callable[..., Any]:
        return functools.partial(function, eps=EPS, backend=kernels_on(device))

    def peer(
        name: str, computes: str, norm: Callable[[], Norm], compile_s: float = 0.0, **where: Any
    ) -> Method:
        def prepare(*_: Any) -> Callable[..., Any]:
            return compiled(whole(norm())) if compile_s else whole(norm())

        role = "rival" if computes == PB_RELAX else ""
        return Method(name, computes, prepare, role, compile_s, **where)

    relaxed, plain = (lambda: pb_relax_layer_norm), (lambda: layer_norm)
    return (
        *with_replay(Method("cogview_kernels", PB_RELAX, ours, "ours")),
        peer(RELAXED, PB_RELAX, relaxed),
        *with_replay(peer(RELAXED_COMPILED, PB_RELAX, relaxed, 3.0)),
        *with_replay(peer("F.layer_norm", PLAIN, plain)),
        *with_replay(peer("F.layer_norm, compiled", PLAIN, plain, 3.0)),
        peer("liger-kernel", PLAIN, liger, only_on="cuda", module="liger_kernel"),
    )


LAYER_NORM_METHODS = methods(ck.pb_relax_layer_norm, lambda norm: norm)
SANDWICH_METHODS = methods(ck.sandwich_residual, sandwich_of)
