"""How an operator is defined: its schema, and what computes it eagerly, traced, under vmap and on
the CPU.

A call takes one of two ways, which compute the same bits:

* In plain eager mode Python runs the launch itself, in a ``torch.autograd.Function`` where a
  gradient is wanted. This skips most of what a custom operator costs on the host.
* Everywhere else (torch.compile, export, torch.func, modes, tensor subclasses) it is the custom
  operator ``torch.ops.cogview_kernels.<name>``, which they know how to handle.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import Parameter

NAMESPACE = "cogview_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class Backward(NamedTuple):
    """How an operator is differentiated."""

    # The first so many outputs are what a call is made for; the others are for the backward alone.
    num_results: int
    # (ctx, outputs, *inputs): keeps what the gradients need.
    save: Callable[..., None]
    # (ctx, wanted, *gradients of the results) -> the gradients by the names of the inputs.
    # ``wanted`` names the inputs that need one.
    gradients: Callable[..., dict[str, Tensor | None]]


def define_out_operator(schema: str) -> Any:
    """An operator of the compiled modules, which writes into tensors that Python allocates; the
    callable that runs it."""
    LIBRARY.define(schema)
    return getattr(torch.ops.cogview_kernels, schema.partition("(")[0]).default


def define_operator(
    name: str,
    schema: str,
    allocate: Callable[..., Any],
    launch: Callable[..., Any],
    *,
    vmap: Callable[[Any], Any],
    backward: Backward | None = None,
    device: str | None = None,
    cpu_kernel: Callable[..., Any] | None = None,
) -> Operator:
    """Define ``torch.ops.cogview_kernels.<name>`` and its short way in eager mode.

    Args:
        schema: the arguments and results, without the name.
        allocate: empty results for the arguments; what tracing sees.
        launch: the results for the arguments.
        vmap: makes the rule for ``torch.vmap`` from the operator.
        backward: ``None`` where nothing differentiates the operator.
        device: the kind of device that ``launch`` runs on; ``None``: any.
        cpu_kernel: computes the same on the CPU, for programs that were exported from a GPU.
    """
    custom_op = torch.library.custom_op(
        f"{NAMESPACE}::{name}", launch, mutates_args=(), device_types=device, schema=schema
    )
    custom_op.register_fake(allocate)
    custom_op.register_vmap(vmap(custom_op))
    if cpu_kernel is not None:
        custom_op.register_kernel("cpu")(cpu_kernel)
    overload = getattr(torch.ops.cogview_kernels, name).default
    if backward is None:
        return Operator(launch, device, overload)

    names = [argument.name for argument in overload._schema.arguments]

    @functools.cache
    def wanted(needs_input_grad: tuple[bool, ...]) -> frozenset[str]:
        return frozenset(itertools.compress(names, needs_input_grad))

    num_results = backward.num_results

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        backward.save(ctx, output, *inputs)
        if num_results < len(output):
            ctx.mark_non_differentiable(*output[num_results:])

    def gradients(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        of_inputs = backward.gradients(ctx, wanted(ctx.needs_input_grad), *of_outputs[:num_results])
        return tuple([of_inputs.get(name) for name in names])

    custom_op.register_autograd(gradients, setup_context=save)

    def forward(ctx: Any, *inputs: Any) -> Any:
        outputs = launch(*inputs)
        backward.save(ctx, outputs, *inputs)
        return outputs[:num_results]

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function = type(f"{name}_eager", (torch.autograd.Function,), members)
    return Operator(launch, device, overload, function, num_results)


class Operator:
    """A defined operator; a call takes the short way where it can."""

    def __init__(
        self,
        launch: Callable[..., Any],
        device: str | None,
        overload: Any,
        function: type[torch.autograd.Function] | None = None,
        num_results: int | None = None,
    ) -> None:
        self._launch = launch
        self._runs_on = _RUNS_ON[device]
        self._overload = overload
        self._num_results = num_results
        # Function.apply without what it does for torch.func, of which nothing is active then.
        # Without a backward, the overload: its error names it if it is differentiated.
        self._with_gradient = (
            overload if function is None else super(torch.autograd.Function, function).apply  # type: ignore[misc]
        )

    def __call__(self, *args: Any) -> Any:
        """The results for the arguments: one, or a tuple."""
        outputs = self._way(args)(*args)
        if self._num_results is None:
            return outputs
        return outputs[0] if self._num_results == 1 else outputs[: self._num_results]

    def _way(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        if not in_plain_eager_mode() or not self._runs_on(args[0]):
            return self._overload
        requires_grad = False
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                if is_functorch_wrapped_tensor(arg):  # it left a transform of torch.func
                    return self._overload
                requires_grad = requires_grad or arg.requires_grad
            elif kind not in _NUMBERS and isinstance(arg, Tensor):
                return self._overload
        return self._with_gradient if requires_grad and torch.is_grad_enabled() else self._launch


_NUMBERS = (int, float, type(None))
_RUNS_ON: dict[str | None, Callable[[Tensor], bool]] = {
    "cpu": operator.attrgetter("is_cpu"),
    "cuda": operator.attrgetter("is_cuda"),
    None: lambda tensor: not tensor.is_meta,
}


def in_plain_eager_mode() -> bool:
    """Whether nothing but the computation itself would see a call: no tracer, no transform of
    torch.func and no mode is active."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is of no subclass."""
    return type(tensor) is Tensor or type(tensor) is Parameter
