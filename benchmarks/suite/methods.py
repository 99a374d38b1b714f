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
WhyNot = Callable[[Any, torch.device], str | None]


def anywhere(case: Any, device: torch.device) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Method:
    """One implementation.

    ``computes`` names its function, by whose float64 definition its results are checked:
    three-region or dense causal; PB-relax LayerNorm or plain LayerNorm. ``role`` is what it is in
    the comparison: "ours", "rival" (the best of them is the rival), "dense" (likewise) or "".

    ``prepare(case, layout, device)`` does what depends on shapes and layout alone (block masks,
    indices) and is timed apart; it returns the call that is timed. ``why_not(case, device)`` is a
    sentence where the method cannot run. ``facts(case, layout)`` joins the row of a record.
    ``compile_s`` estimates what compiling it for one more case takes on 16 cores; ``graph``: timed
    as the replay of a CUDA graph.
    """

    name: str
    computes: str
    prepare: Prepare
    why_not: WhyNot = anywhere
    role: str = ""
    compile_s: float = 0.0
    graph: bool = False
    facts: Callable[[Any, Any], dict[str, Any]] = lambda case, layout: {}

    @property
    def compiles(self) -> bool:
        return self.compile_s > 0


def kernels_on(device: torch.device) -> str:
    """The backend that is timed as ours: on a GPU the kernels or an error, never a substitute."""
    return "cuda" if device.type == "cuda" else "auto"


def replayed(method: Method) -> tuple[Method, Method]:
    """The method and its twin, which shares what is prepared; its graphs are CUDA's."""
    name = f"{method.name}, graph replay"
    why_not = first_reason(only_on_cuda, method.why_not)
    return method, dataclasses.replace(method, name=name, why_not=why_not, graph=True)


def first_reason(*reasons: WhyNot) -> WhyNot:
    """The first of these that says something."""

    def why_not(case: Any, device: torch.device) -> str | None:
        return next(filter(None, (reason(case, device) for reason in reasons)), None)

    return why_not


def only_on_cuda(case: Any, device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it has no kernel for {device.type.upper()}"


def installed(module: str, package: str) -> WhyNot:
    def why_not(case: Any, device: torch.device) -> str | None:
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:  # a package around it is missing
            found = False
        return None if found else f"{package} is not installed"

    return why_not


class Choices(InductorChoices):
    """Inductor's choices, and for FlexAttention's backward a second configuration without any side
    above 64: the only one that Inductor has for Hopper takes 128 keys at once, so that nothing
    would be left for a block mask with blocks of 64. Where both fit, torch times both."""

    def get_flex_attention_bwd_configs(self, *args: Any, **options: Any) -> list[Any]:
        configs = super().get_flex_attention_bwd_configs(*args, **options)
        narrow = []
        for config in configs[:1]:
            sides = [f.name for f in dataclasses.fields(config) if f.name.startswith("block_")]
            changes = {side: min(64, getattr(config, side)) for side in sides}
            narrow = [dataclasses.replace(config, **changes, num_warps=4)]
        return configs + [config for config in narrow if config not in configs]

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
    options: dict[str, Any] = {}
    if hasattr(torch._inductor.config, "inductor_choices_class"):
        # Always: a thread of autograd keeps the choices of the first backward it compiles.
        options["inductor_choices_class"] = Choices
    if autotuned:
        options |= torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    return torch.compile(call, fullgraph=True, dynamic=False, options=options)
