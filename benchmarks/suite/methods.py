"""What a method of computing something is, ours or a peer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config

# A backward is timed alone, many times on the graph of one forward, which must outlive it.
torch._functorch.config.donated_buffer = False

Prepare = Callable[[Any, Any, torch.device], Callable[..., Any]]


def anywhere(case: Any, device: torch.device) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Method:
    """One implementation.

    ``computes`` names its function, by whose float64 definition its results are checked:
    three-region, dense causal or local window (three-region without text and pivots); PB-relax
    LayerNorm or plain LayerNorm.

    ``prepare(case, layout, device)`` does what depends on shapes and layout alone (block masks,
    indices) and is timed apart; it returns the call that is timed. ``why_not(case, device)`` is a
    sentence where the method cannot run.
    """

    name: str
    computes: str
    prepare: Prepare
    why_not: Callable[[Any, torch.device], str | None] = anywhere
    compiles: bool = False  # torch.compile: the first call takes long


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """Compiled for one set of shapes, with a code object of its own: torch counts recompilations by
    code object, and a suite has more cases than the limit. ``fullgraph``: an error in place of a
    slow path."""

    def call(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    call.__code__ = call.__code__.replace()
    return torch.compile(call, fullgraph=True, dynamic=False, mode=mode)
