"""When the compiled kernels are taken for unusable, shown with a stand-in for the module."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

import cogview_kernels as ck
from cogview_kernels import backends, extension

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SimpleNamespace]]:
    """A machine with one GPU, whose kernels were built with CUDA 13.0 for 8.0 and 9.0's PTX."""

    def make(
        problem: str = "", capability: tuple[int, int] = (8, 6), driver: int = 13000
    ) -> SimpleNamespace:
        module = SimpleNamespace(questions=0)

        def cuda_problem() -> str:
            module.questions += 1
            return problem

        module.cuda_architectures, module.cuda_compiler = "8.0,9.0+PTX", 13000
        module.cuda_driver, module.cuda_problem = lambda: driver, cuda_problem
        monkeypatch.setattr(extension, "_C", module)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        extension._why_not_on_gpu.cache_clear()
        return module

    monkeypatch.setattr(backends, "_warned", set())
    yield make
    extension._why_not_on_gpu.cache_clear()


def usable(backend: str) -> bool:
    return backends.kernels_usable("f", backend, extension.why_no_kernel_on(GPU, backend))


def test_old_driver(machine: Callable[..., SimpleNamespace]) -> None:
    """``auto`` falls back with one warning, ``cuda`` is an error; the driver is asked once."""
    module = machine("the driver supports CUDA up to 12.4")
    with pytest.warns(UserWarning, match="f: using backend='portable': .*up to 12.4"):
        assert not usable("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not usable("auto")
    with pytest.raises(backends.KernelUnavailable, match="^backend='cuda': .*up to 12.4"):
        usable("cuda")
    assert module.questions == 1


def test_driver_that_fits(machine: Callable[..., SimpleNamespace]) -> None:
    """Machine code runs with an older driver of the same major version."""
    for driver in (13000, 13010):
        machine(driver=driver).cuda_compiler = 13010
        assert extension.why_not_on(GPU) is None
        assert usable("cuda")


@pytest.mark.parametrize(
    "capability, driver, reason",
    [
        ((9, 0), 12080, None),  # machine code
        ((10, 0), 13000, None),
        ((10, 0), 13010, None),
        ((10, 0), 12080, "compiles PTX up to CUDA 12.8, but the kernels were built with CUDA 13.0"),
        ((7, 5), 13000, "has compute capability 7.5, and kernels were built for 8.0, 9.0\\+PTX"),
    ],
)
def test_what_a_gpu_runs(
    machine: Callable[..., SimpleNamespace],
    capability: tuple[int, int],
    driver: int,
    reason: str | None,
) -> None:
    machine(capability=capability, driver=driver)
    if reason is None:
        assert extension.why_not_on(GPU) is None
    else:
        with pytest.raises(backends.KernelUnavailable, match=reason):
            usable("cuda")


def test_each_gpu_is_asked_for_itself(
    machine: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    old = torch.device("cuda", 1)
    capabilities = {GPU: (8, 0), old: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert extension.why_not_on(GPU) is None
    assert "7.5" in str(extension.why_not_on(old))
    assert extension.why_not_on(GPU) is None


def test_a_modelled_device_ends_with_its_block() -> None:
    """Also after an error, and one within another; then the device's own is back."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with extension.modelled_device(132, shared_kib=163):
        with pytest.raises(KeyError), extension.modelled_device(7):
            assert extension.num_sms(cpu) == extension.num_sms(gpu) == 7
            raise KeyError
        assert extension.num_sms(cpu) == extension.num_sms(gpu) == 132
    assert extension.num_sms(cpu) == 1


def test_a_modelled_device_limits_a_block_s_shared_memory() -> None:
    if reason := extension.why_not_host_model():
        pytest.skip(reason)
    model = importlib.import_module("cogview_kernels._host_model")

    def shared() -> int:
        model.take_report()
        row = torch.randn(1, 16384)
        ck.pb_relax_layer_norm(row, None, None, backend="host_model")
        (launch,) = model.take_report()
        return launch["dynamic_shared"]

    assert shared() > 99 * 1024
    with extension.modelled_device(1, shared_kib=99):
        assert shared() < 99 * 1024
    assert shared() > 99 * 1024
