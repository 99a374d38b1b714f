"""A multiprocessor of compute capability 9.0: its constants, and walk.cpp and schedule.cpp for
callers in Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from benchmarks.kernels.cycles import sass

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / "build" / "kernel_times"
SOURCES = [Path(__file__).with_name(name) for name in ("walk.cpp", "schedule.cpp")]

NUM_SMS = 132  # H100 SXM and H200
CLOCK_GHZ = 1.75  # assumed under load; the H200 may boost to 1.98
DRAM_TBS = 4.3  # of 4.8: what a copy reaches
POLICIES = (0, 1)  # loose round robin; greedy, then the oldest. The hardware's is not known.

Events = np.ndarray  # of uint32: the steps of one warp (walk.cpp)


@dataclass(frozen=True)
class Machine:
    """Cycles, unless it says otherwise. Set before the calibration (docs/kernel_times.md), most
    from published microbenchmarks of Hopper; none was fitted to a measured time."""

    # ptxas puts this stall between m16n8k16 products that depend on nothing: 1024 dense FLOP a
    # cycle and partition would be 4; mma.sync reaches 62-65 % of wgmma on Hopper.
    tensor: float = 6.0
    special: float = 8.0  # 4 lanes a cycle: 16 a multiprocessor (CUDA programming guide)
    pair: float = 2.0  # 16 lanes a cycle: integer, and each half of the 32 float lanes
    special_queue: float = 16.0  # instructions wait behind the pipe, not in the warp
    shared_queue: float = 24.0
    copy_fill: float = 8.0  # 512 bytes of one LDGSTS at 64 bytes a cycle from L2
    copy_latency: float = 600.0  # L2, some of it DRAM; tiles take as long from 200 to 2000
    barrier: float = 12.0
    jump: float = 8.0
    launch: float = 300.0  # from the end of a block to the start of the next in its place
    stagger: float = 400.0  # between the first blocks of a multiprocessor
    # Of kernels that stream (STREAMING); attention kernels are simulated without these queues.
    dram_bytes: float = 0.0  # a cycle, for all simulated multiprocessors together
    l2_bytes: float = 64.0  # a cycle, to one multiprocessor and as many from it
    dram_latency: float = 0.0
    l2_latency: float = 0.0


# From issue to result, of instructions that set a scoreboard.
LATENCY = {"tensor": 34, "special": 22, "load": 60, "store": 20}
LATENCY_OF = {"LDSM": 33, "LDS": 29, "LDL": 29, "STS": 29, "STL": 29, "SHFL": 25, "ATOMG": 600}
STREAMED_LOAD = 600  # of kernels without products, which read everything once

# Bytes that DRAM moves for one of all multiprocessors in a cycle, read and written.
DRAM_BYTES = DRAM_TBS * 1e3 / CLOCK_GHZ / NUM_SMS
# Without a queue a load from DRAM takes some 480 to 600 cycles on Hopper, from L2 some 270 (Luo et
# al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499). Under
# load there are queues that a simulation of a few multiprocessors does not have: 800 is assumed.
# From 500 to 1200 it changes a norm's share by one point.
DRAM_LATENCY, L2_LATENCY = 800.0, 270.0


def streaming(share: float, l2_latency: float = L2_LATENCY) -> dict[str, float]:
    """Changes of Machine for a simulation that has this share of what a launch moves from and to
    DRAM, and so of DRAM's bandwidth. What one multiprocessor does not take, the others do."""
    rates = {"dram_bytes": DRAM_BYTES * NUM_SMS * share, "dram_latency": DRAM_LATENCY}
    return rates | {"l2_latency": l2_latency}


class _Machine(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_double) for field in fields(Machine)]


@functools.cache
def _library() -> ctypes.CDLL:
    content = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    target = CACHE / f"machine-{content[:16]}.so"
    if not target.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [
            *shlex.split(os.environ.get("CXX") or "c++"),
            "-std=c++20",
            "-O3",
            "-march=native",
        ]
        command += ["-shared", "-fPIC", *map(str, SOURCES), "-o", f"{target}.new"]
        subprocess.run(command, check=True)
        os.replace(f"{target}.new", target)
    library = ctypes.CDLL(str(target))
    library.last_error.restype = ctypes.c_char_p
    library.load_kernel.restype = ctypes.c_void_p
    library.walk_block.restype = ctypes.c_int64
    return library


class Walker:
    """The code of a kernel, to be run with parameters."""

    PARAMS_AT = 0x210  # in the constant bank, on compute capability 9.0

    def __init__(self, code: Sequence[sass.Instruction], params_at: int = PARAMS_AT) -> None:
        self._params_at = params_at
        self._library = _library()
        text = "\n".join(f"{line.guard}\t{line.opcode}\t{line.operands}" for line in code)
        self._kernel = self._library.load_kernel(text.encode())
        if not self._kernel:
            raise ValueError(self._library.last_error().decode())

    def __del__(self) -> None:
        self._library.free_kernel(ctypes.c_void_p(getattr(self, "_kernel", None)))

    def walk(
        self,
        params: bytes,
        ranges: Sequence[tuple[int, int]],
        threads: int,
        block: int,
        num_blocks: int,
        grid_y: int = 1,
        streamed: Collection[tuple[int, int]] = (),
        threads_x: int = 0,
    ) -> tuple[list[Events], int]:
        """Runs one block of a launch on the memory of this process, where only ``ranges`` may be
        touched; of these, ``streamed`` come from DRAM. ``threads_x``: of a block of two dimensions.
        The events of its warps, and the bytes that it moved from and to global memory."""
        bounds = np.array(ranges, dtype=np.uint64).ravel()
        flags = bytes(one in streamed for one in ranges)
        grid_x = num_blocks // grid_y
        sizes = np.zeros(threads // 32, dtype=np.int64)
        events, moved = ctypes.POINTER(ctypes.c_uint32)(), ctypes.c_int64()
        total = self._library.walk_block(
            ctypes.c_void_p(self._kernel),
            params,
            len(params),
            self._params_at,
            bounds.ctypes.data_as(ctypes.c_void_p),
            flags,
            len(ranges),
            threads,
            threads_x or threads,
            block % grid_x,
            block // grid_x,
            grid_x,
            grid_y,
            sizes.ctypes.data_as(ctypes.c_void_p),
            ctypes.byref(events),
            ctypes.byref(moved),
        )
        if total < 0:
            raise RuntimeError(self._library.last_error().decode())
        together = np.ctypeslib.as_array(events, shape=(total,)).copy()
        return np.split(together, np.cumsum(sizes)[:-1]), moved.value


def statics(code: Sequence[sass.Instruction], load_latency: int) -> np.ndarray:
    """Of each instruction what schedule.cpp knows: pipe, control word, latency."""
    rows = []
    for line in code:
        name = line.opcode.partition(".")[0]
        latency = LATENCY_OF.get(name, LATENCY.get(line.pipe, 8 if name[0] == "U" else 20))
        latency = load_latency if line.pipe == "load" else latency
        rows.append(
            (
                sass.PIPE_NAMES.index(line.pipe),
                line.control.stall,
                line.control.write,
                line.control.read,
                line.control.wait,
                latency,
                line.pending,
            )
        )
    return np.array(rows, dtype=np.int32)


def simulate(
    static: np.ndarray,
    blocks: Sequence[Sequence[Events]],
    slots: int,
    policy: int,
    num_sms: int = 1,
    machine: Machine = Machine(),
) -> np.ndarray:
    """Runs blocks in order, ``slots`` at once on each multiprocessor: when each began and ended."""
    warps = [events for block in blocks for events in block]
    events = np.ascontiguousarray(np.concatenate(warps), dtype=np.uint32)
    ends = np.cumsum([len(warp) for warp in warps]).astype(np.int64)
    times = np.zeros((len(blocks), 2))
    _library().simulate(
        np.ascontiguousarray(static).ctypes.data_as(ctypes.c_void_p),
        events.ctypes.data_as(ctypes.c_void_p),
        ends.ctypes.data_as(ctypes.c_void_p),
        len(blocks),
        len(blocks[0]),
        num_sms,
        slots,
        policy,
        ctypes.byref(_Machine(*astuple(machine))),
        times.ctypes.data_as(ctypes.c_void_p),
    )
    return times
