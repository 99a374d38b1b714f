"""The names of the backends, and the error or warning when one cannot run."""

from __future__ import annotations

import sys
import warnings

import torch

BACKENDS = ("auto", "cuda", "portable", "reference", "host_model")


class KernelUnavailable(RuntimeError):
    """The requested backend cannot run here; the message says why, and what can."""


_warned: set[str] = set()


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing
def warn_once(message: str) -> None:
    """Warn the first time that ``message`` comes up in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"cogview_kernels: {message}", stacklevel=_stacklevel_of_the_caller())


def _stacklevel_of_the_caller() -> int:
    """For a warning of the calling function: the first line outside this package and torch, whose
    frames may lie between."""
    inside = ("cogview_kernels", "torch")
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    return level


def kernels_wanted(backend: str, device: torch.device) -> bool:
    """Whether a call should take the kernels if they can run."""
    return backend in ("cuda", "host_model") or (backend == "auto" and device.type == "cuda")


def kernels_usable(function: str, backend: str, unsupported: str | None) -> bool:
    """Whether the kernels that were wanted can run; ``unsupported``: why they cannot.

    Where they cannot, ``auto`` warns, and a backend that was asked for by name is an error.
    """
    if unsupported is None:
        return True
    if backend != "auto":
        raise KernelUnavailable(
            f"backend={backend!r}: {unsupported}; backend='portable' computes the same function"
        )
    warn_once(f"{function}: using backend='portable': {unsupported}")
    return False
