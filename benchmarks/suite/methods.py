"""What a method of computing something is, ours or a peer's."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch._inductor.choices import InductorChoices

# A backward is timed alone, many times on the graph of one forward, which must outlive it.
torch._functorch.config.donated_buffer = False

Prepare = Callable[[Any, Any, torch.device], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Method:
    """One implementation, by whose function (``computes``) its results are checked."""

    name: str
    computes: str  # three-region, dense causal; PB-relax LayerNorm, plain LayerNorm
    # Called with (case, layout, device); does outside of the clock what depends on shapes and
    # layout alone (block masks, indices), and returns what is timed.
    prepare: Prepare
    role: str = ""  # "ours", "rival" (the best of them is the rival), "dense"
    compile_s: float = 0.0  # estimated, for one more case on 16 cores
    only_on: str = ""  # the one type of device on which it is timed
    module: str = ""  # what must be installed
    graph: bool = False  # timed as the replay of a CUDA graph
    facts: Callable[[Any, Any], dict[str, Any]] = lambda case, layout: {}  # for the record's row

    @property
    def compiles(self) -> bool:
        return self.compile_s > 0

    @property
    def installed(self) -> bool:
        try:
            return not self.module or importlib.util.find_spec(self.module) is not None
        except ImportError:  # the package around a submodule is missing
            return False


def kernels_on(device: torch.device) -> str:
    """The backend that is timed as ours: on a GPU the kernels or an error, never a substitute."""
    return "cuda" if device.type == "cuda" else "auto"


def with_replay(method: Method) -> tuple[Method, ...]:
    """The method and, on a GPU, its twin, which shares what is prepared."""
    if method.only_on == "cpu":
        return (method,)
    name = f"{method.name}, graph replay"
    return method, dataclasses.replace(method, name=name, only_on="cuda", graph=True)


class Choices(InductorChoices):
    """Inductor's, and for FlexAttention's backward a second configuration without any side above
    64: the only one that Inductor has for Hopper takes 128 keys at once, which no block mask with
    blocks of 64 allows. Where both fit, torch times both."""

    def get_flex_attention_bwd_configs(self, *args: Any, **options: Any) -> list[Any]:
        configs = super().get_flex_attention_bwd_configs(*args, **options)
        sides = {
            name: min(64, value) for name, value in vars(configs[0]).items() if "block" in name
        }
        narrow = dataclasses.replace(configs[0], **sides, num_warps=4)
        return configs if narrow in configs else [*configs, narrow]

    def uuid(self) -> str:
        """For Inductor's cache."""
        return "narrow FlexAttention backward"


def compiled(function: Callable[..., Any], autotuned: bool = False) -> Callable[..., Any]:
    """Compiled for one set of shapes, with a code object of its own: torch counts recompilations by
    code object, and a suite has more cases than the limit. ``fullgraph``: an error in place of a
    slow path."""

    def call(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    call.__code__ = call.__code__.replace()
    # Always: a thread of autograd keeps the choices of the first backward it compiles.
    options: dict[str, Any] = {"inductor_choices_class": Choices}
    if autotuned:
        options |= torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    return torch.compile(call, fullgraph=True, dynamic=False, options=options)
