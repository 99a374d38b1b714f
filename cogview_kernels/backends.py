"""Names of the backends, and what is said when one cannot run."""

from __future__ import annotations

import warnings

BACKENDS = ("auto", "cuda", "portable", "reference", "host_model")


class KernelUnavailable(RuntimeError):
    """The asked-for backend cannot run here; the message says why and what can."""


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn the first time that ``message`` comes up in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"cogview_kernels: {message}", stacklevel=3)
