"""The benchmark suite's clock, memory and ceilings, on the device that they are for."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks.suite import entries as suite
from benchmarks.suite import measure
from benchmarks.suite.cases import StepCase

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
CUDA = torch.device("cuda")
BYTES = 1 << 30


def test_a_large_copy_takes_as_long_as_many_of_them_on_the_host_s_clock() -> None:
    source = torch.randn(BYTES // 4, device=CUDA)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    many = measure.elapsed(lambda: [copy() for _ in range(50)], CUDA) / 50
    timed = measure.measure(copy, CUDA, 0.1)
    # Back to back they wait for no launch, and the clock rate moves: not closer than this.
    assert statistics.median(timed.seconds) == pytest.approx(many, rel=0.2)
    assert timed.extra_bytes == 0
    assert timed.host_seconds is not None and timed.host_seconds < many


def test_a_small_call_waits_for_no_host() -> None:
    """Two launches, between which the host sleeps: the device, busy with the flush, does not."""
    x = torch.randn(1024, device=CUDA)

    def small() -> None:
        x.add_(1)
        time.sleep(1e-3)
        x.add_(1)

    timed = measure.measure(small, CUDA, 0.05)
    assert timed.host_seconds is not None and timed.host_seconds > 1e-3
    assert statistics.median(timed.seconds) < 0.25e-3


def test_memory_is_the_peak_beyond_what_was_there() -> None:
    megabyte = torch.zeros(1 << 18, device=CUDA)

    def run() -> torch.Tensor:
        a = megabyte + 1  # 1
        b = a * 2  # 2
        del a
        return b + megabyte  # 2

    assert measure.peak_bytes(run, CUDA) == 2 << 20


def test_a_training_step_s_memory_has_its_gradients() -> None:
    case = StepCase(2, 128, 2, 2, 60, 8, 2, 8, text_len=8, vocab_size=5000)
    method = next(m for m in suite.STEP_METHODS if m.name == "dense SDPA, F.layer_norm")
    result = suite.run(suite.Entry(case, "step", method, ()), CUDA, 0.05)
    assert result["info"]["extra_bytes"] > 4 * case.matrix_parameters
    suite.forget()


def test_ceilings_and_the_machine() -> None:
    found = measure.ceilings(CUDA)
    assert found["copy_bytes_per_s"] > 1e11
    rates = found["matmul_flops"]
    assert rates["bfloat16"] > rates["float32"] > 1e12
    info = measure.machine_info(CUDA)
    assert info["device"] == torch.cuda.get_device_name() and info["l2_bytes"] > 1 << 20
    at_rest, under_load = info["clocks"], found["clocks"]
    if at_rest and under_load:  # where nvidia-smi is
        assert under_load["clocks.sm"].endswith("MHz")
