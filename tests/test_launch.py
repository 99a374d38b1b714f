"""Launches, the choice of a family of kernels, and csrc/driver.h on a CUDA runtime that fails where
a test says so."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE = ROOT / "tests" / "fake_cuda"
KB = 1024


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]!r} is not on the PATH")
    library = tmp_path_factory.mktemp("launch") / "launches.so"
    flags = ["-std=c++17", "-Wall", "-Werror", "-O1", "-fPIC", "-fvisibility=hidden", "-shared"]
    includes = [f"-I{FAKE}", f"-I{ROOT / 'csrc'}"]
    sources = [FAKE / "launches.cpp", ROOT / "csrc" / "three_region_attention" / "dispatch.cpp"]
    command = [*compiler, *flags, *includes, *map(str, sources), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def cuda(compiled: Path, tmp_path: Path) -> ctypes.CDLL:
    """A copy of its own, which remembers nothing of earlier tests."""
    library = ctypes.CDLL(shutil.copy(compiled, tmp_path))
    library.problem.restype = library.unsupported.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize(
    "function", ["cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute"]
)
@pytest.mark.parametrize("error", [1, 35])
def test_a_failed_call_leaves_no_error(cuda: ctypes.CDLL, function: str, error: int) -> None:
    """Whatever fails is returned, and the next caller finds neither its error nor a wrong limit."""
    cuda.fail(function.encode(), error)
    assert cuda.launch(100 * KB) == error
    assert cuda.get_last_error() == 0 and cuda.calls(b"cudaLaunchKernelExC") == 0
    cuda.fail(function.encode(), 0)
    assert cuda.launch(100 * KB) == 0


def test_a_failed_launch_leaves_no_error(cuda: ctypes.CDLL) -> None:
    cuda.fail(b"cudaLaunchKernelExC", 9)
    assert cuda.launch(0) == cuda.launch(100 * KB) == 9
    assert cuda.get_last_error() == 0
    cuda.fail(b"cudaLaunchKernelExC", 0)
    assert cuda.launch(0) == cuda.launch(100 * KB) == 0
    assert cuda.kernel_sum() == 2 * 42


def test_an_error_of_others_stays_theirs(cuda: ctypes.CDLL) -> None:
    cuda.set_last_error(77, False)
    assert cuda.launch(100 * KB) == 0
    assert cuda.get_last_error() == 77


def test_an_error_that_ends_the_context_is_returned_by_every_call(cuda: ctypes.CDLL) -> None:
    cuda.set_last_error(0, True)
    cuda.fail(b"cudaLaunchKernelExC", 700)
    assert cuda.launch(0) == cuda.launch(0) == cuda.get_last_error() == 700


def test_limits_are_set_once_for_each_kernel_and_device(cuda: ctypes.CDLL) -> None:
    """To what the device allows, less the kernel's arrays and the reserve."""
    for _ in range(3):
        for device in (0, 1, 127):
            cuda.set_device(device)
            most = (227 - device) * KB - 4 * KB
            assert cuda.launch(KB) == cuda.launch(most) == 0
            assert cuda.limit_of_kernel() == most
            assert cuda.launch(most + 1) == 9
            assert cuda.launch_other(most) == 0
    assert cuda.calls(b"cudaFuncSetAttribute") == 3 * 2
    assert cuda.calls(b"cudaDeviceGetAttribute") == 3


def test_a_kernel_without_shared_memory_has_no_limit(cuda: ctypes.CDLL) -> None:
    assert cuda.launch(0) == 0
    assert cuda.calls(b"cudaFuncSetAttribute") == cuda.calls(b"cudaGetDevice") == 0


def test_a_device_number_that_is_not_remembered(cuda: ctypes.CDLL) -> None:
    cuda.set_device(128)
    assert cuda.launch(50 * KB) == cuda.launch(95 * KB) == 0
    cuda.set_device(0)
    assert cuda.launch(223 * KB) == 0


def test_threads_launch_at_once(cuda: ctypes.CDLL) -> None:
    def launches(device: int) -> set[int]:
        cuda.set_device(device)
        return {cuda.launch(100 * KB) for _ in range(100)}

    with ThreadPoolExecutor(8) as pool:
        assert set().union(*pool.map(launches, [0, 1] * 8)) == {0}
    assert cuda.kernel_sum() == 16 * 100 * 42


def test_too_many_blocks(cuda: ctypes.CDLL) -> None:
    assert cuda.launch_blocks(ctypes.c_int64(2**31)) == 9
    assert cuda.launch_blocks(ctypes.c_int64(2**32 + 3)) == 9
    assert cuda.launch_blocks(ctypes.c_int64(3)) == 0


# Launches that may start while the kernel before them is still running


def test_early_where_the_code_waits(cuda: ctypes.CDLL) -> None:
    """On devices whose code was compiled for 9.0 or later, and nowhere else; each is asked once."""
    for device, architecture in enumerate((80, 89, 90, 120)):
        cuda.set_compiled_for(device, architecture)
    early = 0
    for _ in range(2):
        for device in range(4):
            cuda.set_device(device)
            assert cuda.launch_early() == cuda.launch(0) == 0
            early += device >= 2
            assert cuda.early_launches() == early
    assert cuda.kernel_sum() == 16 * 42
    assert cuda.calls(b"cudaFuncGetAttributes") == 4


def test_drivers_that_cannot_capture_an_early_launch(cuda: ctypes.CDLL) -> None:
    cuda.set_compiled_for(0, 90)
    cuda.set_machine(12020, 1)
    assert cuda.launch_early() == 0
    assert cuda.early_launches() == 0 and cuda.kernel_sum() == 42


@pytest.mark.parametrize(
    "function", ["cudaGetDevice", "cudaFuncGetAttributes", "cudaDriverGetVersion"]
)
def test_a_device_that_cannot_be_asked_about_early_launches(
    cuda: ctypes.CDLL, function: str
) -> None:
    cuda.set_compiled_for(0, 90)
    cuda.fail(function.encode(), 35)
    assert cuda.launch_early() == 35
    assert cuda.get_last_error() == 0 and cuda.calls(b"cudaLaunchKernelExC") == 0
    cuda.fail(function.encode(), 0)
    assert cuda.launch_early() == 0 and cuda.early_launches() == 1
    cuda.fail(b"cudaLaunchKernelExC", 9)
    assert cuda.launch_early() == 9 and cuda.get_last_error() == 0


# The choice of a family of attention kernels


def test_each_device_has_its_own_family(cuda: ctypes.CDLL) -> None:
    """Of the current device, at each launch."""
    cuda.set_capability(0, 9, 0)
    cuda.set_capability(1, 7, 5)
    assert cuda.unsupported(0) == b""
    assert cuda.unsupported(1) == b"the kernels need compute capability 8.0 or later, got 7.5"
    for device, status in ((0, 0), (1, 1), (0, 0)):
        cuda.set_device(device)
        assert cuda.forward() == status
    assert cuda.forwards() == 2
    assert cuda.get_last_error() == 0


def test_a_device_that_cannot_be_asked_has_no_family(cuda: ctypes.CDLL) -> None:
    cuda.set_capability(0, 9, 0)
    cuda.fail(b"cudaDeviceGetAttribute", 101)
    assert cuda.unsupported(0) == b"the kernels need compute capability 8.0 or later, got 0.0"
    assert cuda.forward() == 1 and cuda.forwards() == 0
    assert cuda.get_last_error() == 0
    cuda.fail(b"cudaDeviceGetAttribute", 0)
    cuda.fail(b"cudaGetDevice", 35)
    cuda.forward()
    assert cuda.get_last_error() == 0
    cuda.fail(b"cudaGetDevice", 0)
    assert cuda.forward() == 0


# The driver; the stand-in's kernels were built with CUDA 13.0


@pytest.mark.parametrize("driver", [13000, 13010, 14000])
def test_driver_that_fits(cuda: ctypes.CDLL, driver: int) -> None:
    cuda.set_machine(driver, 1)
    assert cuda.problem() == b""
    assert cuda.driver_version() == driver


@pytest.mark.parametrize(
    "driver, num_devices, error, text",
    [
        (0, 1, 35, "there is no NVIDIA driver; install one that supports CUDA 13"),
        (
            12040,
            1,
            35,
            "the driver supports CUDA up to 12.4, and the kernels were built with CUDA 13.0; "
            "update the driver to one for CUDA 13, or rebuild the kernels with a CUDA 12 toolkit",
        ),
        (13000, 0, 0, "no CUDA device is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (13000, 0, 100, "no CUDA device is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (13000, 0, 35, "the driver (CUDA 13.0) is too old for CUDA 13.0, which"),
        (13000, 0, 803, "the driver's kernel module and its library differ in version; restart"),
        (13000, 0, 804, "forward compatibility package does not support this GPU"),
        (13000, 0, 999, "the error's text (cudaErrorName)"),
    ],
)
def test_driver_problem(
    cuda: ctypes.CDLL, driver: int, num_devices: int, error: int, text: str
) -> None:
    cuda.set_machine(driver, num_devices)
    cuda.fail(b"cudaGetDeviceCount", error)
    assert text in cuda.problem().decode()
    assert cuda.get_last_error() == 0


def test_driver_whose_version_is_unknown(cuda: ctypes.CDLL) -> None:
    cuda.fail(b"cudaDriverGetVersion", 36)
    assert cuda.problem().startswith(b"there is no NVIDIA driver")
    assert cuda.get_last_error() == 0
