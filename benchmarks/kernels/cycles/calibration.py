"""Compares the model with FlashAttention-2's published rates on an H100.

    git clone https://github.com/Dao-AILab/flash-attention   # or the commit that the record names
    git -C flash-attention submodule update --init csrc/cutlass
    python -m benchmarks.kernels.cycles.calibration flash-attention flash-attention/csrc/cutlass

Writes docs/kernel_times_calibration.json; takes nvcc a few minutes. Published: the curves of
FlashAttention-2 in figures 5 and 6 of Shah et al., "FlashAttention-3" (arXiv 2407.08608): bfloat16,
no mask, 16384 tokens in all, hidden size 2048, H100 SXM. The clock under load is not published; the
model's is assumed for both.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.cycles import machine
from benchmarks.kernels.cycles.launches import kernel_of, kernels_of
from benchmarks.kernels.cycles.times import CALIBRATION
from benchmarks.kernels.table import ctas_per_sm

SOURCE = Path(__file__).with_name("flash_attention.cu")
TOKENS, HIDDEN, TILE = 16384, 2048, 128  # queries, or keys in the backward, of a block

# Kernel, head_dim, length, TFLOP/s.
PUBLISHED = (
    ("forward", 64, 512, 282),
    ("forward", 64, 1024, 306),
    ("forward", 64, 2048, 318),
    ("forward", 64, 4096, 321),
    ("forward", 64, 8192, 322),
    ("forward", 128, 8192, 370),
    ("backward", 64, 8192, 291),
)
# Threads and bytes of shared memory, as the traits of flash_attention.cu make them.
LAUNCHES = {("forward", 64): (128, 48), ("forward", 128): (128, 64), ("backward", 64): (256, 144)}
PRODUCTS = {"forward": 2, "backward": 5}
MOST_EVENTS = 6_000_000  # to be simulated; a launch of long blocks is cut short


def compile_all(flash: Path, cutlass: Path) -> tuple[Path, ctypes.CDLL]:
    folder = machine.CACHE / "flash_attention"
    # Headers of torch, for dropout, and for the host one of CUDA; nothing of them is used.
    for name in ("stubs/ATen/cuda/PhiloxCudaState.h", "stubs/ATen/cuda/detail/UnpackRaw.cuh"):
        _empty(folder / name)
    _empty(folder / "host" / "cuda.h")
    include = [f"-I{flash}/csrc/flash_attn/src", f"-I{cutlass}/include", f"-I{folder}/stubs"]
    cubin, library = folder / "kernels.cubin", folder / "params.so"
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O3"]
    command += ["--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", *include]
    if not cubin.is_file():
        subprocess.run([*command, "-cubin", SOURCE, "-o", f"{cubin}.new"], check=True)
        Path(f"{cubin}.new").replace(cubin)
    host = [*shlex.split(os.environ.get("CXX") or "c++"), "-x", "c++", "-std=c++17", "-shared"]
    host += ["-fPIC", *include, f"-I{folder}/host", str(SOURCE), "-o", str(library)]
    subprocess.run(host, check=True)
    return cubin, ctypes.CDLL(str(library))


def _empty(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")


def predicted(cubin: Path, library: ctypes.CDLL, which: str, head_dim: int, length: int) -> float:
    """TFLOP/s."""
    wanted = f"flash_{which}" + (f"<{head_dim}>" if which == "forward" else "")
    (name,) = [name for name in kernels_of(cubin) if wanted in name]
    kernel = kernel_of(cubin, name)
    halves = [torch.randn(length, head_dim).bfloat16() for _ in range(8)]
    floats = [torch.full((length,), 8.0), torch.zeros(length), torch.zeros(length, head_dim)]
    tensors = [*halves, *floats]
    pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    params = ctypes.create_string_buffer(4096)
    size = library.flash_params(pointers, length, head_dim, ctypes.c_float(head_dim**-0.5), params)
    ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
    threads, kilobytes = LAUNCHES[which, head_dim]
    events, _ = machine.Walker(kernel.code).walk(
        params.raw[:size], ranges, threads, 0, length // TILE
    )
    slots, _ = ctas_per_sm("sm_90a", threads, kernel.registers, kilobytes * 1024)
    # All blocks of the launch take the same path; one multiprocessor has its share of them.
    share = TOKENS // TILE * (HIDDEN // head_dim) / machine.NUM_SMS
    blocks = max(min(round(share), MOST_EVENTS // sum(map(len, events))), 4 * slots)
    static = machine.statics(kernel.code, machine.LATENCY["load"])
    cycles = np.mean(
        [
            machine.simulate(static, [events] * blocks, slots, policy)[:, 1].max()
            for policy in machine.POLICIES
        ]
    )
    flops = 2 * PRODUCTS[which] * TILE * length * head_dim * blocks * machine.NUM_SMS
    return float(flops / cycles * machine.CLOCK_GHZ / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("flash_attention", type=Path)
    parser.add_argument("cutlass", type=Path)
    parser.add_argument("--commit", help="of flash-attention, where its folder is no repository")
    chosen = parser.parse_args()
    commit = chosen.commit or subprocess.check_output(
        ["git", "-C", chosen.flash_attention, "rev-parse", "HEAD"], text=True
    )
    compiled = compile_all(chosen.flash_attention, chosen.cutlass)
    rows: list[dict[str, Any]] = []
    for which, head_dim, length, published in PUBLISHED:
        rate = predicted(*compiled, which, head_dim, length)
        rows.append({"kernel": which, "head_dim": head_dim, "length": length})
        rows[-1] |= {"published": published, "predicted": round(rate, 1)}
        print(rows[-1], flush=True)
    facts = {"source": "https://github.com/Dao-AILab/flash-attention", "commit": commit.strip()}
    norms = json.loads(CALIBRATION.read_text())["norms"]  # compared by hand (docs/kernel_times.md)
    CALIBRATION.write_text(json.dumps(facts | {"rows": rows, "norms": norms}, indent=1) + "\n")


if __name__ == "__main__":
    main()
