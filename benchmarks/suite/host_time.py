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
HIDDEN = 64


class HostTime(NamedTuple):
    """Seconds of the host for one call."""

    name: str
    ours: float
    torchs: float

    @property
    def ratio(self) -> float:
        return self.ours / self.torchs


def backend_of(device: torch.device) -> str:
    return "host_model" if device.type == "cpu" else "cuda"


def why_not(device: torch.device) -> str | None:
    """Why nothing can be timed here."""
    return extension.why_no_kernel_on(device, backend_of(device))


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


def pairs(device: torch.device) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Our call and torch's, without gradients and with the backward."""
    backend = backend_of(device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    q, k, v = qkv = [random(1, 2, 4, 32) for _ in range(3)]
    pivots = ck.sample_pivots(1, 4, 2, device=device)
    layout = ck.ThreeRegionLayout(1, pivots)
    x, residual = rows = [random(1, 4, HIDDEN) for _ in range(2)]
    weight, bias, pre_weight, pre_bias = parameters = [random(HIDDEN) for _ in range(4)]

    def attention(layout: ck.ThreeRegionLayout) -> Tensor:
        return ck.three_region_attention(q, k, v, layout, backend=backend)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def norm() -> Tensor:
        return ck.pb_relax_layer_norm(x, weight, bias, backend=backend)

    def layer_norm() -> Tensor:
        return F.layer_norm(x, (HIDDEN,), weight, bias)

    def sandwich() -> Any:
        return ck.sandwich_residual(x, residual, *parameters, backend=backend)

    def two_layer_norms() -> tuple[Tensor, Tensor]:
        h = residual + F.layer_norm(x, (HIDDEN,), weight, bias)
        return h, F.layer_norm(h, (HIDDEN,), pre_weight, pre_bias)

    def fresh() -> Tensor:
        return attention(ck.ThreeRegionLayout(1, pivots))

    def grad(call: Callable[[], Any], inputs: list[Tensor], douts: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(), inputs, douts)

    dout, dy = torch.ones_like(q), torch.ones_like(x)
    for name, ours, torchs, inputs, douts in (
        ("attention", lambda: attention(layout), sdpa, qkv, dout),
        ("attention, a layout for each call", fresh, sdpa, qkv, dout),
        ("norm", norm, layer_norm, [x, weight, bias], dy),
        ("sandwich", sandwich, two_layer_norms, [*rows, *parameters], (dy, dy)),
    ):
        yield f"{name}, forward", torch.no_grad()(ours), torch.no_grad()(torchs)
        grads = grad(ours, inputs, douts), grad(torchs, inputs, douts)
        yield f"{name}, forward+backward", *grads


def table(times: list[HostTime]) -> str:
    lines = ["us on the host for one eager call", f"{'':50}{'ours':>8}{'torch':>8}{'ratio':>8}"]
    for row in times:
        lines.append(f"{row.name:50}{row.ours * 1e6:8.1f}{row.torchs * 1e6:8.1f}{row.ratio:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    _device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(why_not(_device) or table(host_times(_device)))
