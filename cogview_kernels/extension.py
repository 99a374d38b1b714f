"""The compiled modules: whether they are there, what is in them, and why they cannot be used here.

``_C`` holds the CUDA kernels, ``_host_model`` the same kernels run on the CPU. Both implement the
operators that other modules define with ``define_out_operator``: ``_C`` for CUDA tensors,
``_host_model`` for CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from collections.abc import Iterator
from typing import Any

import torch

_C: Any
try:
    _C = importlib.import_module("cogview_kernels._C")
except ImportError as error:
    _C = None
    _IMPORT_ERROR: ImportError | None = error
else:
    _IMPORT_ERROR = None

_CPU = torch.device("cpu")
HOW_TO_BUILD = (
    "install a CUDA toolkit with nvcc (12.4 or later), then, in a clone of the repository, "
    "`COGVIEW_KERNELS_CUDA=1 pip install --no-cache-dir --force-reinstall --no-deps .`"
)

# Set by `modelled_device`: multiprocessors (None: the device's own, one on the host model), and KiB
# of shared memory that a block of the host model may have.
_modelled: tuple[int | None, int] = (None, 227)


def architectures() -> tuple[str, ...]:
    """The architectures that kernels were built for, such as ``("8.0", "9.0a", "12.0+PTX")``."""
    built: str = _C.cuda_architectures if _C is not None else ""
    return tuple(built.split(",")) if built else ()


def why_not_built() -> str | None:
    """Why this installation has no CUDA kernels, in one sentence; ``None`` if it has them."""
    if _C is None and not isinstance(_IMPORT_ERROR, ModuleNotFoundError):
        return f"the compiled module cannot be loaded ({_IMPORT_ERROR}); rebuild it: {HOW_TO_BUILD}"
    if not architectures():
        return f"the CUDA kernels were not built; {HOW_TO_BUILD}"
    return None


def why_not_usable() -> str | None:
    """Why no CUDA kernel can run in this process, in one sentence; ``None`` if they can."""
    reason = why_not_built()
    if reason is not None:
        return reason
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA"
    problem: str = _C.cuda_problem()
    return f"no CUDA device can be used: {problem}" if problem else None


def why_not_on(device: torch.device) -> str | None:
    """Why no kernel can run on tensors of ``device``; ``None`` if they can."""
    if device.type != "cuda":
        return why_not_built() or f"the tensors lie on {device}, not on a CUDA device"
    return _why_not_on_gpu(device)


@functools.cache  # asked at every call
def _why_not_on_gpu(device: torch.device) -> str | None:
    reason = why_not_usable()
    # torch finds no device for fake tensors, while tracing for another machine.
    if reason is not None or not torch.cuda.is_available():
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    fitting = [entry for entry in architectures() if _runs_on(entry, major, minor)]
    if not fitting:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and "
            f"kernels were built for {', '.join(architectures())}; rebuild with "
            f"TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    only_ptx = not any(_runs_on(entry.removesuffix("+PTX"), major, minor) for entry in fitting)
    if only_ptx and _C.cuda_driver() < _C.cuda_compiler:  # newer PTX than the driver can compile
        return (
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) needs the "
            f"kernels' PTX, and the driver compiles PTX up to CUDA {_cuda(_C.cuda_driver())}, but "
            f"the kernels were built with CUDA {_cuda(_C.cuda_compiler)}; update the driver, or "
            f"rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return None


def _cuda(version: int) -> str:
    """13.0 for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Machine code runs on its major version from its minor version up (and 9.0a on 9.0 alone),
    PTX on everything from its version up."""
    number = architecture.removesuffix("+PTX")
    built = tuple(int(part) for part in number.rstrip("af").split("."))
    if architecture.endswith("+PTX") and number[-1].isdigit() and (major, minor) >= built:
        return True
    if number.endswith("a"):
        return built == (major, minor)
    return built[0] == major and built[1] <= minor


@functools.cache
def why_not_host_model() -> str | None:
    """Why the kernels cannot run on the CPU; ``None`` if they can."""
    try:
        importlib.import_module("cogview_kernels._host_model")
    except ModuleNotFoundError:
        return (
            "the host model was not built; in a clone of the repository, `make build` builds it "
            "(COGVIEW_KERNELS_HOST_MODEL=1 where setup.py is run by hand)"
        )
    except ImportError as error:
        return f"the host model cannot be loaded ({error}); rebuild it with `make build`"
    return None


@torch.compiler.assume_constant_result
def why_no_kernel_on(device: torch.device, backend: str) -> str | None:
    """Why ``backend`` has no kernels for tensors of ``device``; ``None`` if it has them."""
    if backend == "host_model":
        if device != _CPU:
            return f"the host model takes tensors on the CPU, got {device}"
        return why_not_host_model()
    return why_not_on(device)


@torch.compiler.assume_constant_result
def why_no_attention_kernel(
    dtype: torch.dtype, head_dim: int, device: torch.device, backend: str
) -> str | None:
    """Why ``backend`` has no attention kernels for these tensors; ``None`` if it has them."""
    return why_no_kernel_on(device, backend) or _why_no_attention_family(dtype, head_dim, device)


@functools.cache
def _why_no_attention_family(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    name = str(dtype).removeprefix("torch.")
    return _kernels_of(device).three_region_attention_unsupported(name, head_dim, *capability)


@functools.lru_cache(maxsize=256)
def attention_split_rows(k_len: int, num_pivots: int, device: torch.device) -> int:
    """Keys that many queries see, as the backward's workspace counts them."""
    return _kernels_of(device).three_region_attention_split_rows(k_len, num_pivots)


def attention_forward_splits(*shape: int, has_kv_lens: bool, device: torch.device) -> int:
    """Into how many parts the forward splits the keys of few queries; 1: not at all. ``shape``:
    batch, heads, key/value heads, queries, keys, pivots, and keys of a window."""
    return _attention_forward_splits(device, *shape, has_kv_lens, num_sms(device))


@functools.lru_cache(maxsize=256)
def _attention_forward_splits(device: torch.device, *arguments: int) -> int:
    return _kernels_of(device).three_region_attention_forward_splits(*arguments)


def _kernels_of(device: torch.device) -> Any:
    """The module with the kernels for tensors of ``device``."""
    return _C if device.type == "cuda" else importlib.import_module("cogview_kernels._host_model")


def kernel_sources() -> str | None:
    """A digest of the sources that the kernels were compiled from."""
    return _C.kernel_sources if architectures() else None


def num_sms(device: torch.device) -> int:
    """Multiprocessors that kernels on tensors of ``device`` are spread over."""
    if _modelled[0] is not None:
        return _modelled[0]
    return 1 if device == _CPU else _cuda_num_sms(device)


@functools.cache
def _cuda_num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextlib.contextmanager
def modelled_device(num_sms: int, shared_kib: int = 227) -> Iterator[None]:
    """Within it, kernels are launched as on another GPU. For tests and counts.

    Args:
        num_sms: multiprocessors that work is dealt out to, on the host model and on a GPU.
        shared_kib: shared memory that a block of the host model may have: 227 as on sm_90 and
            sm_100, 163 as on sm_80, 99 as on sm_86 and sm_120, 48 as everywhere.
    """
    outer = _modelled
    _model(num_sms, shared_kib)
    try:
        yield
    finally:
        _model(*outer)


def _model(num_sms: int | None, shared_kib: int) -> None:
    global _modelled
    _modelled = num_sms, shared_kib
    if why_not_host_model() is None:
        _kernels_of(_CPU).set_max_shared_bytes(shared_kib * 1024)


def kernel_resources() -> list[dict[str, Any]]:
    """Registers, shared memory and spills of each kernel and architecture, as ptxas reported."""
    return json.loads(_C.kernel_resources) if _C is not None else []


def torch_built_with() -> str | None:
    """The torch whose headers the operators were compiled against."""
    return _C.torch_built_with if architectures() else None
