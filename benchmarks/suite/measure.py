"""Times, memory, ceilings and controls.

A CUDA call is timed between two events. Before it, a buffer of several times the L2 cache is
written and another one read: no call finds its inputs in the cache, and none waits for the cache to
write the flush's own lines back. The flush lasts longer than the host needs to launch the call, so
that the device never waits for the host between the events. On a CPU the clock is the host's.

Calls that are compared are timed in turns: what slows the machine for a while slows all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.machine import clocks

Call = Callable[[], Any]

BUDGET_S = {"cuda": 0.25, "cpu": 0.7}  # of timed calls, for each method
CPU_FLUSH_BYTES = 64 << 20
MIN_ROUNDS, MAX_ROUNDS = 5, 100


@dataclasses.dataclass(frozen=True)
class Measurement:
    seconds: list[float]  # one for each timed call
    host_seconds: float | None  # what the host needs to launch it (CUDA)
    extra_bytes: int  # peak above what was allocated before the call


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(call: Call, device: torch.device) -> float:
    """Seconds of one call on the host's clock, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


class Clock:
    """Times single calls with flushed caches."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        size = CPU_FLUSH_BYTES
        if self.on_gpu:
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 << 20)
        self.written, self.read = (torch.zeros(size // 4, device=device) for _ in range(2))
        self.sum = torch.zeros((), device=device)
        self.flush_seconds = min(elapsed(self.flush, device) for _ in range(3))

    def flush(self, times: int = 1) -> None:
        for _ in range(times):
            self.written.zero_()
            torch.sum(self.read, 0, out=self.sum)  # replaces the written lines by clean ones

    def host_seconds(self, call: Call) -> float:
        """What the host needs to launch a call, while the device has nothing else to do."""
        seconds = []
        for _ in range(5 if self.on_gpu else 0):
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds or [0.0])

    def seconds(self, call: Call, host_seconds: float) -> float:
        if not self.on_gpu:
            self.flush()
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush(1 + int(2 * host_seconds / self.flush_seconds))
        first.record()
        call()
        last.record()
        last.synchronize()  # no queue: it would hold the memory of many calls
        return first.elapsed_time(last) * 1e-3


clock_of = functools.cache(Clock)


def measure(call: Call, device: torch.device, budget_s: float) -> Measurement:
    return measure_interleaved([call], device, budget_s)[0]


def measure_interleaved(
    calls: Sequence[Call], device: torch.device, budget_s: float
) -> list[Measurement]:
    """Times the calls in turns, on average for about ``budget_s`` seconds each: at least MIN_ROUNDS
    and at most MAX_ROUNDS rounds."""
    clock = clock_of(device)
    for call in calls:
        call()  # warm
    extra = [peak_bytes(call, device) for call in calls]
    estimate = sum(elapsed(call, device) + clock.flush_seconds for call in calls)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s * len(calls) / estimate)))
    hosts = [clock.host_seconds(call) for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    for first in range(rounds):
        for index in range(len(calls)):
            at = (first + index) % len(calls)  # no call is always behind the same other
            seconds[at].append(clock.seconds(calls[at], hosts[at]))
    rows = zip(seconds, (host or None for host in hosts), extra, strict=True)
    return [Measurement(*row) for row in rows]


def captured(make: Callable[[], Call]) -> Call:
    """The replay of a CUDA graph that holds the call that ``make`` returns. ``make`` runs on the
    graph's stream, because a backward runs on the stream of its forward."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):
            call()
        with torch.cuda.graph(graph, stream=stream):
            call()
    torch.cuda.synchronize()
    held = graph, call  # the graph has only the addresses of the call's inputs
    return lambda: held[0].replay()


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most that was allocated during a call beyond what was before it, results included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """What a record keeps of the times, in the digits that a clock resolves."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    values = {"minimum": min(seconds), "median": median, "iqr": high - low}
    return {name: float(f"{v:.5g}") for name, v in values.items()} | {"rounds": len(seconds)}


def ceilings(device: torch.device) -> dict[str, Any]:
    """The rates that bound a kernel on this machine: of a large product of random square matrices,
    by dtype, and of a large copy, bytes read and written; with the clocks of a GPU under load."""
    cuda = device.type == "cuda"

    def rate(work: float, call: Call) -> float:
        return work / statistics.median(measure(call, device, 0.2).seconds)

    matmul = {}
    for name in ("bfloat16", "float16", "float32")[:: 1 if cuda else 2]:
        size = 8192 if cuda and name != "float32" else 2048
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        matmul[name] = rate(2 * size**3, functools.partial(torch.mm, a, b))
    source = torch.randn((1 << 30 if cuda else 1 << 27) // 4, device=device)
    copy = rate(2 * source.nbytes, functools.partial(torch.empty_like(source).copy_, source))
    found = {"matmul_flops": matmul, "copy_bytes_per_s": copy}
    return found | ({"clocks": clocks_under_load(device)} if cuda else {})


def clocks_under_load(device: torch.device) -> dict[str, str]:
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(1000):  # longer than the question takes
        a @ a
    return clocks()


def empty_kernels(device: torch.device) -> list[dict[str, Any]]:
    """What a kernel that does nothing takes on this clock; every time contains about as much."""

    def empty() -> None:
        torch.cuda._sleep(0)

    def control(name: str, call: Call) -> dict[str, Any]:
        return {"name": name, **spread(measure(call, device, 0.1).seconds)}

    replay = captured(lambda: empty)
    return [control("empty kernel", empty), control("empty kernel, graph replay", replay)]


def a_a_control(name: str, call: Call, device: torch.device) -> dict[str, Any]:
    """One call timed as if it were two methods: a smaller difference than this means nothing."""
    timed = measure_interleaved([call, call], device, 2 * BUDGET_S[device.type])
    one, other = (spread(measurement.seconds) for measurement in timed)
    medians = one["median"], other["median"]
    difference = max(medians) / min(medians) - 1
    return {"name": f"A/A: {name}", **one, "other_median": medians[1], "difference": difference}
