"""What an eager call costs on the host, beside torch's own call of the same kind.

With a GPU: the time to enqueue calls, kernels included. Without: tiny tensors on the CPU, and the
host model's operators, which check their arguments and launch nothing. Both sides of a pair are
timed in turns, and the fastest round of each counts, so that other processes do not.

Usage: python -m benchmarks.suite.host_time
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import cogview_kernels as ck
from benchmarks.suite.measure import synchronize
from cogview_kernels import extension

BATCH, HEADS, SEQLEN, HEAD_DIM, HIDDEN = 1, 2, 4, 32, 64
TEXT_LEN, NUM_PIVOTS = 1, 2
CALLS, ROUNDS = 20, 60


class Pair(NamedTuple):
    """Two calls of the same kind."""

    name: str
    ours: Callable[[], Any]
    torchs: Callable[[], Any]


class HostTime(NamedTuple):
    """Seconds of the host for one call."""

    name: str
    ours: float
    torchs: float

    @property
    def ratio(self) -> float:
        return self.ours / self.torchs


def why_not(device: torch.device) -> str | None:
    """Why nothing can be timed here."""
    backend = "host_model" if device.type == "cpu" else "cuda"
    return extension.why_no_kernel_on(device, backend)


def host_times(device: torch.device, rounds: int = ROUNDS) -> list[HostTime]:
    with _no_launches(device):
        return [_time(pair, device, rounds) for pair in _pairs(device)]


@contextmanager
def _no_launches(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        yield
        return
    host_model = importlib.import_module("cogview_kernels._host_model")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    host_model.set_launches(False)
    try:
        yield
    finally:
        host_model.set_launches(True)
        torch.set_num_threads(num_threads)


def _time(pair: Pair, device: torch.device, rounds: int) -> HostTime:
    # On the CPU all of a call runs in this thread, whose own clock leaves other processes out.
    now = time.thread_time if device.type == "cpu" else time.perf_counter
    best = [float("inf")] * 2
    for _ in range(rounds):
        for side, call in enumerate((pair.ours, pair.torchs)):
            synchronize(device)
            begin = now()
            for _ in range(CALLS):
                call()
            best[side] = min(best[side], (now() - begin) / CALLS)
    return HostTime(pair.name, *best)


def _pairs(device: torch.device) -> Iterator[Pair]:
    backend = "host_model" if device.type == "cpu" else "cuda"

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    q, k, v = (random(BATCH, HEADS, SEQLEN, HEAD_DIM) for _ in range(3))
    pivots = ck.sample_pivots(TEXT_LEN, SEQLEN, NUM_PIVOTS, device=device)
    shared = ck.ThreeRegionLayout(TEXT_LEN, pivots)

    def attention(layout: ck.ThreeRegionLayout) -> Tensor:
        return ck.three_region_attention(q, k, v, layout, backend=backend)

    def fresh() -> ck.ThreeRegionLayout:
        return ck.ThreeRegionLayout(TEXT_LEN, pivots)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    dout = random(*q.shape).detach()
    yield from _both("attention", lambda: attention(shared), sdpa, (q, k, v), dout)
    yield from _both(
        "attention, a layout for each call", lambda: attention(fresh()), sdpa, (q, k, v), dout
    )

    x, residual = random(BATCH, SEQLEN, HIDDEN), random(BATCH, SEQLEN, HIDDEN)
    parameters = [torch.nn.Parameter(random(HIDDEN).detach()) for _ in range(4)]
    weight, bias, pre_weight, pre_bias = parameters
    dy = random(*x.shape).detach()

    def torchs_sandwich() -> tuple[Tensor, Tensor]:
        h = residual + F.layer_norm(x, (HIDDEN,), weight, bias)
        return h, F.layer_norm(h, (HIDDEN,), pre_weight, pre_bias)

    yield from _both(
        "norm",
        lambda: ck.pb_relax_layer_norm(x, weight, bias, backend=backend),
        lambda: F.layer_norm(x, (HIDDEN,), weight, bias),
        (x, weight, bias),
        dy,
    )
    yield from _both(
        "sandwich",
        lambda: ck.sandwich_residual(
            x, residual, weight, bias, pre_weight, pre_bias, backend=backend
        ),
        torchs_sandwich,
        (x, residual, *parameters),
        (dy, dy),
    )


def _both(
    name: str,
    ours: Callable[[], Any],
    torchs: Callable[[], Any],
    inputs: tuple[Tensor, ...],
    gradients: Any,
) -> Iterator[Pair]:
    """The pair without gradients, and with the backward."""

    def without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(call)

    def with_backward(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(), inputs, gradients)

    yield Pair(f"{name}, forward", without_gradients(ours), without_gradients(torchs))
    yield Pair(f"{name}, forward+backward", with_backward(ours), with_backward(torchs))


def table(times: list[HostTime]) -> str:
    lines = ["us on the host for one eager call", f"{'':50}{'ours':>8}{'torch':>8}{'ratio':>8}"]
    for row in times:
        lines.append(f"{row.name:50}{row.ours * 1e6:8.1f}{row.torchs * 1e6:8.1f}{row.ratio:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    _device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _reason = why_not(_device)
    print(table(host_times(_device)) if _reason is None else f"nothing to time: {_reason}")
