"""The host model, which counts."""

from __future__ import annotations

import importlib
from typing import Any

from cogview_kernels import extension


def host_model() -> Any:
    reason = extension.why_not_host_model()
    if reason is not None:
        raise SystemExit(reason)
    return importlib.import_module("cogview_kernels._host_model")
