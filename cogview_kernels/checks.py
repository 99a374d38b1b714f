"""Checks of arguments, with errors that name the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import Parameter

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def describe(value: Any) -> str:
    """What came, for an error message."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if not minimum <= value < 2**63:
        raise ValueError(f"{name}: expected at least {minimum} and an int64, got {value}")


def check_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {describe(value)}")
    if not abs(value) <= _LARGEST_FLOAT32:
        raise ValueError(f"{name}: expected a number that is finite in float32, got {value}")
    return float(value)


def check_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {describe(value)}"
        )
    return value


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` has the dtype and lies on the device of ``other``."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype} as {other_name}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} as {other_name}, got {value.device}"
        )


def check_last_dim_contiguous(name: str, value: Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension, got strides {value.stride()} for shape "
            f"{tuple(value.shape)}; call .contiguous()"
        )


def check_no_tangent(**tensors: Tensor | None) -> None:
    """An operator without a forward-mode derivative would pass for a constant, unnoticed."""
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not torch.compiler.is_compiling():
            while torch._C._functorch.is_batchedtensor(tensor):  # cannot be unpacked itself
                tensor = torch._C._functorch.get_unwrapped(tensor)
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name}: expected no tangent, as forward-mode differentiation is not implemented "
                "here; backend='reference' has it"
            )


def needs_gradient(tensor: Tensor) -> bool:
    """Whether autograd follows the tensor, under ``torch.func.vmap`` too."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_batchedtensor(tensor):  # says False itself
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def values_readable(value: Any) -> bool:
    """Whether values can be checked without a device synchronisation: not a tensor, or a real
    (not traced, fake or batched) tensor on the CPU."""
    if not isinstance(value, Tensor):
        return True
    if torch.compiler.is_compiling() or not value.is_cpu:
        return False
    if torch._C._get_dispatch_mode(_FAKE) is not None:  # all that is computed then is fake
        return False
    kind = type(value)
    return (kind is Tensor or kind is Parameter) and not is_functorch_wrapped_tensor(value)


def check_no_nan(name: str, tensor: Tensor) -> None:
    """Where values are readable."""
    # NaN is not equal to itself; ``equal`` allocates nothing and takes less time than ``isnan``.
    if values_readable(tensor) and not tensor.equal(tensor):
        raise ValueError(f"{name}: expected numbers, got NaN")
