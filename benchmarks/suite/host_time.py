"""What an eager call costs on the host, beside torch's own call of the same kind.

With a GPU: the time to enqueue calls, kernels included. Without: tiny tensors on the CPU, and the
host model's operators, which check their arguments and launch nothing. Both calls are timed in
turns; the fastest round of each counts, so that other processes do not.

Usage: python -m benchmarks.suite.host_time
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import cogview_kernels as ck
from benchmarks.suite.measure import synchronize
from cogview_kernels import extension

CALLS, ROUNDS = 20, 60
BACKENDS = {"cpu": "host_model", "cuda": "cuda"}


class HostTime(NamedTuple):
    """Seconds of the host for one call."""

    name: str
    ours: float
    torchs: float


def why_not(device: torch.device) -> str | None:
    """Why nothing can be timed here."""
    return extension.why_no_kernel_on(device, BACKENDS[device.type])


def host_times(device: torch.device, rounds: int = ROUNDS) -> list[HostTime]:
    # On the CPU all of a call runs in this thread, whose own clock leaves other processes out.
    now = time.thread_time if device.type == "cpu" else time.perf_counter
    found = []
    with no_launches(device):
        for name, *calls in pairs(device):
            best = [float("inf")] * 2
            for _ in range(rounds):
                for side, call in enumerate(calls):
                    synchronize(device)
                    begin = now()
                    for _ in range(CALLS):
                        call()
                    best[side] = min(best[side], (now() - begin) / CALLS)
            found.append(HostTime(name, *best))
    return found


@contextlib.contextmanager
def no_launches(device: torch.device) -> Iterator[None]:
    """On the CPU one thread, and operators of the host model that launch nothing."""
    num_threads = torch.get_num_threads()
    model = None
    if device.type == "cpu":
        model = importlib.import_module("cogview_kernels._host_model")
        torch.set_num_threads(1)
        model.set_launches(False)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        if model is not None:
            model.set_launches(True)


def pairs(device: torch.device) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Our call and torch's, without gradients and with the backward."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    backend = BACKENDS[device.type]
    q, k, v = (random(1, 2, 4, 32) for _ in range(3))
    pivots = ck.sample_pivots(1, 4, 2, device=device)
    layout = ck.ThreeRegionLayout(1, pivots)
    x, residual, (a, b, c, d) = random(1, 4, 64), random(1, 4, 64), (random(64) for _ in range(4))

    def attention(layout: ck.ThreeRegionLayout) -> Tensor:
        return ck.three_region_attention(q, k, v, layout, backend=backend)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def norm() -> Tensor:
        return ck.pb_relax_layer_norm(x, a, b, backend=backend)

    def sandwich() -> tuple[Tensor, Tensor]:
        return ck.sandwich_residual(x, residual, a, b, c, d, backend=backend)

    def two_norms() -> tuple[Tensor, Tensor]:
        h = residual + F.layer_norm(x, (64,), a, b)
        return h, F.layer_norm(h, (64,), c, d)

    def with_backward(call: Callable[[], Any], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
        outs = call()
        douts = [torch.ones_like(out) for out in (outs if isinstance(outs, tuple) else (outs,))]
        return lambda: torch.autograd.grad(call(), inputs, douts)

    qkv, every_call = (q, k, v), "attention, a layout for each call"
    calls: tuple[tuple[str, Callable[[], Any], Callable[[], Any], tuple[Tensor, ...]], ...] = (
        ("attention", lambda: attention(layout), sdpa, qkv),
        (every_call, lambda: attention(ck.ThreeRegionLayout(1, pivots)), sdpa, qkv),
        ("norm", norm, lambda: F.layer_norm(x, (64,), a, b), (x, a, b)),
        ("sandwich", sandwich, two_norms, (x, residual, a, b, c, d)),
    )
    for name, ours, torchs, inputs in calls:
        yield f"{name}, forward", torch.no_grad()(ours), torch.no_grad()(torchs)
        both = with_backward(ours, inputs), with_backward(torchs, inputs)
        yield f"{name}, forward+backward", *both


def rows(device: torch.device) -> list[dict[str, Any]]:
    """For a record; empty where nothing can be timed."""
    return [] if why_not(device) else [row._asdict() for row in host_times(device)]


def table(times: list[HostTime]) -> str:
    lines = ["us on the host for one eager call", f"{'':50}{'ours':>8}{'torch':>8}{'ratio':>8}"]
    for name, ours, torchs in times:
        lines.append(f"{name:50}{ours * 1e6:8.1f}{torchs * 1e6:8.1f}{ours / torchs:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    _device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(why_not(_device) or table(host_times(_device)))
