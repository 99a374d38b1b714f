"""Times, memory, ceilings, and what machine they were taken on.

A CUDA call is timed by events. Before each timed call a buffer of several times the L2 cache is
written, so that no call finds its inputs in the cache; the writing also lasts longer than the host
needs to launch the call, so that the device never waits for the host inside the timed region. On a
CPU the clock is the host's, and a buffer is written before each call, too.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cogview_kernels
from benchmarks.machine import output_of, smi

ROOT = Path(__file__).resolve().parents[2]
CPU_FLUSH_BYTES = 128 << 20
FLUSH_S = 1e-2 if not torch.cuda.is_available() else 1e-4  # about what writing it takes
MIN_ROUNDS, MAX_ROUNDS = 5, 100


@dataclasses.dataclass(frozen=True)
class Measurement:
    seconds: list[float]  # one for each timed call
    host_seconds: float | None  # what the host needs to launch it (CUDA)
    extra_bytes: int  # peak above what was allocated before the call


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call on the host's clock, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def measure(run: Callable[[], Any], device: torch.device, budget_s: float) -> Measurement:
    """Times ``run`` for about ``budget_s`` seconds, at least MIN_ROUNDS and at most MAX_ROUNDS
    calls."""
    run()  # warm
    extra = peak_bytes(run, device)
    estimate = elapsed(run, device) + FLUSH_S
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s / estimate)))
    if device.type == "cuda":
        seconds, host = _time_cuda(run, device, rounds)
        return Measurement(seconds, host, extra)
    return Measurement(_time_cpu(run, rounds), None, extra)


def _time_cpu(run: Callable[[], Any], rounds: int) -> list[float]:
    flush = torch.zeros(CPU_FLUSH_BYTES // 4)
    seconds = []
    for _ in range(rounds):
        flush.add_(1)
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _time_cuda(
    run: Callable[[], Any], device: torch.device, rounds: int
) -> tuple[list[float], float]:
    """Device seconds of each call, and the host's of launching one."""

    def launch_seconds() -> float:
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    host = statistics.median(launch_seconds() for _ in range(5))
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * l2, 256 << 20), dtype=torch.uint8, device=device)
    flush.zero_()
    flush_seconds = min(elapsed(flush.zero_, device) for _ in range(3))
    flushes = 1 + int(2 * host / flush_seconds)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        for _ in range(flushes):
            flush.zero_()
        begin.record()
        run()
        end.record()
        # No more than one call ahead: a long queue would hold every call's memory.
        end.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in events], host


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that was allocated during a call beyond what was before it, results included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = run()
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = peak = 0
    for _, change in memory:
        level += change
        peak = max(peak, level)
    return peak


def ceilings(device: torch.device) -> dict[str, Any]:
    """The rates that this machine reaches in the two things that bound a kernel: a large product
    of random square matrices, by dtype, and a large copy, bytes read and written. On a GPU also the
    clocks that it ran them at."""
    cuda = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    matmul = {}
    dtypes = (
        (torch.bfloat16, torch.float16, torch.float32) if cuda else (torch.float32, torch.bfloat16)
    )
    for dtype in dtypes:
        size = 8192 if cuda and dtype != torch.float32 else 2048
        a, b = (
            torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2)
        )
        seconds = _rate_seconds(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        matmul[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    source = torch.randn((1 << 30 if cuda else 1 << 27) // 4, device=device, generator=generator)
    target = torch.empty_like(source)
    seconds = _rate_seconds(lambda: target.copy_(source), device)
    rates: dict[str, Any] = {
        "matmul_flops": matmul,
        "copy_bytes_per_s": 2 * source.numel() * 4 / seconds,
    }
    if cuda:
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(1000):  # longer than the question takes
            a @ b
        rates["clocks"] = clocks()
    return rates


def _rate_seconds(run: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        run()
    times = _time_cuda(run, device, 20)[0] if device.type == "cuda" else _time_cpu(run, 10)
    return statistics.median(times)


def cpu_brand() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def clocks() -> dict[str, str] | None:
    """Of the GPU, now."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw")
    query = f"--query-gpu={','.join(fields)}"
    answer = smi(query)
    return dict(zip(fields, answer.split(", "), strict=False)) if answer else None


def machine_info(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a record is of; nothing that names the host."""
    info: dict[str, Any] = {
        "device": cpu_brand(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpu": {"brand_raw": cpu_brand(), "arch": platform.machine(), "count": os.cpu_count()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": _versions(),
        "cogview_kernels": cogview_kernels.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = smi("--query-gpu=driver_version")
        info |= {
            "device": properties.name,
            "compute_capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": driver,
            "clocks": clocks(),
        }
    return info


def _versions() -> dict[str, str]:
    from importlib import metadata

    names = ("triton", "flash-attn-4", "flash-attn", "xformers", "natten", "liger-kernel")
    found = {}
    for name in (*names, "quack-kernels", "numpy", "pytest-benchmark"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    nvcc = re.search(r"release \S+ (\S+)", output_of("nvcc", "--version") or "")
    if nvcc:
        found["nvcc"] = nvcc.group(1).rstrip(",")
    return found


def commit_info() -> dict[str, Any]:
    """Git's, else ``$COMMIT``: a copy of the sources without their history is measured, too."""
    commit = output_of("git", "rev-parse", "HEAD")
    changes = output_of("git", "status", "--porcelain", "-uno", "--", ":!benchmarks/results")
    return {
        "id": commit or os.environ.get("COMMIT") or "unknown",
        "time": output_of("git", "show", "-s", "--format=%cI"),
        "dirty": bool(changes) if commit else None,  # None: nobody knows
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def record_name(stem: str, machine: dict[str, Any], commit: dict[str, Any], date: str) -> str:
    """``<stem>-<device>-<date>-<commit>.json``"""
    device = re.sub(r"\W+", "-", machine["device"]).strip("-").lower()
    return f"{stem}-{device}-{date[:10]}-{commit['id'][:7]}.json"


def new_path(path: Path) -> Path:
    """Where no record lies: a second one of a day takes nothing from the first."""
    first, number = path, 2
    while path.exists():
        path, number = first.with_stem(f"{first.stem}-{number}"), number + 1
    return path


def save_record(record: dict[str, Any], path: Path) -> None:
    """Whole or not at all; a line for each row, so that a difference of two records can be read."""

    def lines(name: str) -> str:
        return ",\n".join(json.dumps(row) for row in record[name])

    rows = [name for name in ("not_measured", "benchmarks") if name in record]
    head = {name: value for name, value in record.items() if name not in rows}
    text = json.dumps(head, indent=1)[:-2]
    text += "".join(f',\n "{name}": [\n{lines(name)}\n ]' for name in rows) + "\n}\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
