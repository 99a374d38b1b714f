"""The benchmark suite's clock, memory and ceilings, on the device that they are for."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable

import numpy
import pytest
import torch

from benchmarks import machine
from benchmarks.suite import measure
from benchmarks.suite.cases import StepCase
from benchmarks.suite.steps import STEP_METHODS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
CUDA = torch.device("cuda")
CYCLES = (20_000, 40_000, 80_000, 160_000)  # of kernels that spin: 10 to 90 us
OVERHEAD_S = 3e-6

SecondsOf = Callable[[int], float]  # of a kernel that spins for so many cycles


def overhead(timed: SecondsOf, known: SecondsOf) -> float:
    """The seconds that ``timed`` adds to each call, however long: the difference where the straight
    lines through both meet zero cycles. A clock rate that differs a little has no part in it."""
    at_zero = [
        numpy.polyfit(CYCLES, [seconds_of(cycles) for cycles in CYCLES], 1)[1]
        for seconds_of in (timed, known)
    ]
    return float(at_zero[0] - at_zero[1])


@pytest.mark.parametrize("added", [0.0, OVERHEAD_S, -OVERHEAD_S])
def test_overhead_is_found_with_a_fake_clock(added: float) -> None:
    """Of 1.9 and 1.8 GHz, with 0.1 us of noise and 1 us between two kernels of a queue."""
    noise = random.Random(0)

    def clock(cycles: int, rate: float, constant: float) -> float:
        return cycles / rate + constant + noise.uniform(-1e-7, 1e-7)

    known = functools.partial(clock, rate=1.9e9, constant=1e-6)
    timed = functools.partial(clock, rate=1.8e9, constant=1e-6 + added)
    assert overhead(timed, known) == pytest.approx(added, abs=0.3e-6)


def spin(cycles: int, launches: int = 1) -> None:
    for _ in range(launches):
        torch.cuda._sleep(cycles)


def suite_seconds(cycles: int, added: int = 0) -> float:
    """On the suite's clock."""

    def call() -> None:
        if added:
            spin(added)
        spin(cycles)

    return statistics.median(measure.measure(call, CUDA, 0.2).seconds)


def known_seconds(cycles: int) -> float:
    """One after the other on the host's clock. The device works on the first ones while the host
    launches the others; what the host adds is the same for two numbers of launches."""
    few, many = (
        min(measure.elapsed(functools.partial(spin, cycles, launches), CUDA) for _ in range(5))
        for launches in (50, 250)
    )
    return (many - few) / 200


@needs_gpu
def test_less_than_3_us_are_added_to_a_call(record: Callable[[str, object], None]) -> None:
    found = overhead(suite_seconds, known_seconds)
    record("overhead_us", round(found * 1e6, 2))
    assert abs(found) < OVERHEAD_S
    # 3 us of overhead would be noticed: here is a clock that adds them.
    cycles_per_second = (CYCLES[-1] - CYCLES[0]) / (
        suite_seconds(CYCLES[-1]) - suite_seconds(CYCLES[0])
    )
    slow = functools.partial(suite_seconds, added=int(OVERHEAD_S * cycles_per_second))
    assert overhead(slow, suite_seconds) > 0.8 * OVERHEAD_S


@needs_gpu
def test_a_small_call_waits_for_no_host() -> None:
    """Two kernels, between which the host sleeps: the device, busy with the flush, does not. The
    pause adds less than 3 us."""

    def small(pause: float) -> None:
        spin(0)
        time.sleep(pause)
        spin(0)

    without, with_pause = measure.measure_interleaved(
        [lambda: spin(0, 2), functools.partial(small, 1e-3)], CUDA, 0.1
    )
    assert with_pause.host_seconds is not None and with_pause.host_seconds > 1e-3
    added = statistics.median(with_pause.seconds) - statistics.median(without.seconds)
    assert added < OVERHEAD_S


@needs_gpu
def test_a_large_copy_takes_as_long_as_many_of_them_on_the_host_s_clock() -> None:
    source = torch.randn((1 << 30) // 4, device=CUDA)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    copy()
    many = measure.elapsed(lambda: [copy() for _ in range(50)], CUDA) / 50
    timed = measure.measure(copy, CUDA, 0.1)
    # Back to back they wait for no launch, and the clock rate moves: not closer than this.
    assert statistics.median(timed.seconds) == pytest.approx(many, rel=0.2)
    assert timed.extra_bytes == 0
    assert timed.host_seconds is not None and timed.host_seconds < many


@needs_gpu
def test_the_flush_leaves_no_lines_to_write_back() -> None:
    """Reading a buffer is not slower behind the flush than behind a pause."""
    x = torch.randn((64 << 20) // 4, device=CUDA)
    total = torch.empty((), device=CUDA)
    clock = measure.clock_of(CUDA)

    def seconds() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spin(1_000_000)
        first.record()
        torch.sum(x, 0, out=total)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3

    flushed, paused = [], []
    for _ in range(30):
        flushed.append(clock.seconds(lambda: torch.sum(x, 0, out=total), 0.0))
        clock.flush()
        torch.cuda.synchronize()
        paused.append(seconds())
    assert statistics.median(flushed) == pytest.approx(statistics.median(paused), rel=0.15)


@needs_gpu
def test_a_replay_computes_the_same_forward_and_backward() -> None:
    x = torch.randn(64, 64, device=CUDA, requires_grad=True)
    grads = torch.zeros_like(x)

    def make() -> Callable[[], None]:
        y = (x * x).sum()

        def backward() -> None:
            grads.add_(torch.autograd.grad(y, x, retain_graph=True)[0])

        return backward

    replay = measure.captured(make)
    grads.zero_()
    replay()
    replay()
    torch.testing.assert_close(grads, 4 * x.detach())
    empty, replayed = measure.empty_kernels(CUDA)
    assert 0 < empty["median"] < 2e-5 and 0 < replayed["median"] < 5e-5


@needs_gpu
def test_memory_is_the_peak_beyond_what_was_there() -> None:
    megabyte = torch.zeros(1 << 18, device=CUDA)

    def run() -> torch.Tensor:
        a = megabyte + 1  # 1
        b = a * 2  # 2
        del a
        return b + megabyte  # 2

    assert measure.peak_bytes(run, CUDA) == 2 << 20
    case = StepCase(2, 128, 2, 2, 60, 8, 2, 8, text_len=8, vocab_size=5000)
    method = next(method for method in STEP_METHODS if method.computes == "dense causal")
    step = method.prepare(case, None, CUDA)
    step()  # a step's memory has its gradients
    assert measure.peak_bytes(step, CUDA) > 4 * case.matrix_parameters


@needs_gpu
def test_ceilings_and_the_machine() -> None:
    found = measure.ceilings(CUDA)
    assert found["copy_bytes_per_s"] > 1e11
    rates = found["matmul_flops"]
    assert rates["bfloat16"] > rates["float32"] > 1e12
    info = machine.machine_info(CUDA)
    assert info["device"] == torch.cuda.get_device_name() and info["l2_bytes"] > 1 << 20
    if info["clocks"] and found["clocks"]:  # where nvidia-smi is
        assert found["clocks"]["clocks.sm"].endswith("MHz")
