"""Predicts the share of copy bandwidth that the norms reach on one H200.

    python -m benchmarks.kernels.cycles.norms                               # all; prints
    python -m benchmarks.kernels.cycles.norms backward --shapes 8192x2560 --parameters float32

`make kernel-times` records them beside the attention (times.py). Kernels that read a row more than
once (too wide for a block, or relax "tensor") are charged DRAM for each time, L2 or not.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels.cycles import machine, sass
from benchmarks.kernels.cycles.launches import (
    NORMS,
    SAMPLED_SMS,
    Kernel,
    Launch,
    digest,
    machine_code,
    record,
    sampled_blocks,
    short,
)
from benchmarks.kernels.cycles.predict import rounded
from benchmarks.kernels.table import ctas_per_sm
from cogview.files import atomic_write
from cogview_kernels.norm import operators

SHAPES = (
    (8192, 2560),
    (8192, 1024),
    (4224, 2560),
    (17408, 2560),
    (65536, 768),
    (8192, 8192),
    (512, 2560),
)
# Activations that each operator cannot do without, each once.
ACTIVATIONS = {"forward": 2, "backward": 3, "sandwich_forward": 4, "sandwich_backward": 6}
VECTOR_COLUMNS = 256  # of a warp: eight of each lane
LAUNCH_US = 2.0  # from the call of the first launch to its first instruction
GAP_US = 1.0  # from the end of a launch to the first instruction of the next one in its stream
# The same where the next one already waits on its multiprocessor (griddepcontrol.wait).
PROGRAMMATIC_GAP_US = 0.5

Block = list[machine.Events]


@dataclasses.dataclass(frozen=True)
class Case:
    operator: str
    rows: int
    hidden: int
    dtype: str = "bfloat16"
    parameters: str = "bfloat16"
    dropout: bool = False  # the sandwich's

    def __str__(self) -> str:
        text = f"{self.operator} {self.rows}x{self.hidden} {self.dtype}"
        text += "" if self.parameters == self.dtype else f", parameters {self.parameters}"
        return text + (", dropout" if self.dropout else "")

    @property
    def columns_bytes(self) -> int:
        """Of all activations, for one column of a row."""
        return ACTIVATIONS[self.operator] * getattr(torch, self.dtype).itemsize

    @property
    def floor(self) -> int:
        """Bytes."""
        return self.rows * self.hidden * self.columns_bytes


def recorded(case: Case) -> list[Launch]:
    """What one call launches. All rows of an input share the memory of one."""
    generator = torch.Generator().manual_seed(0)
    dtype, parameters = getattr(torch, case.dtype), getattr(torch, case.parameters)

    def rows() -> Tensor:
        one = torch.randn(1, case.hidden, generator=generator).to(dtype)
        return one.expand(case.rows, case.hidden)

    w, b, w2, b2 = torch.randn(4, case.hidden, generator=generator).to(parameters).unbind()
    statistics = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(case.rows, 1)
    seed = torch.tensor([1]) if case.dropout else None
    dropout = 6554 if case.dropout else 0  # of 65536

    def call() -> Any:
        x = rows()
        match case.operator:
            case "forward":
                return operators._norm(x, w, b, 1e-5, 1)
            case "backward":
                return operators._norm_backward(rows(), x, w, statistics, parameters)
            case "sandwich_forward":
                of_norms = w, b, w2, b2, seed, dropout, 1e-5, 1
                return operators._sandwich(x, rows(), True, *of_norms)
            case _:
                saved = x, rows(), w, w2, statistics, statistics, seed, dropout
                return operators._sandwich_backward(rows(), rows(), *saved, parameters, parameters)

    return record(call)


class Timed:
    """A launch on the model. Only sampled blocks are walked."""

    def __init__(self, launch: Launch, case: Case) -> None:
        self.kernel: Kernel = machine_code(launch.kernel)
        self.launch = launch
        self.slots, _ = ctas_per_sm(
            "sm_90a",
            launch.threads,
            self.kernel.registers,
            self.kernel.static_shared + launch.dynamic_shared,
        )
        shape = case.rows, case.hidden
        starts = {t.data_ptr() for t in launch.tensors if t.shape == shape}
        streamed = [one for one in launch.ranges if one[0] in starts]
        walker = machine.Walker(self.kernel.code)
        sampled = sampled_blocks(launch.blocks)
        self.num_sms = min(SAMPLED_SMS, len(sampled))
        self.blocks: list[Block] = []
        for block in sampled:
            events, _ = walker.walk(
                launch.params,
                launch.ranges,
                launch.threads,
                block,
                launch.blocks,
                launch.grid_y,
                streamed,
            )
            self.blocks.append(events)
        self.streamed = sum(map(_streamed, itertools.chain(*self.blocks)))  # bytes
        wait = [i for i, line in enumerate(self.kernel.code) if line.opcode == "ACQBULK"]
        self.programmatic = bool(wait)
        if wait:  # what stands before ran while the launch before it did
            self.blocks = [[_behind(warp, wait[0]) for warp in block] for block in self.blocks]

    @property
    def issued(self) -> int:
        return sum(len(warp) for block in self.blocks for warp in block)

    @property
    def streams(self) -> bool:
        return self.streamed > 0

    def passed_again(self) -> int:
        """Instructions of the code that the first warp passes more than once: its loops."""
        times = np.bincount(self.blocks[0][0] & 0xFFFF)
        return int((times > 1).sum())

    def us(self, moved: float | None) -> float:
        """``moved``: the bytes of activations that all blocks move, if that is known."""
        # The sampled blocks may have more or fewer rows than others.
        share = len(self.blocks) / self.launch.blocks
        if moved is not None and self.streams:
            share = self.streamed / moved
        # All blocks begin by loading parameters, which then come from DRAM for all at once. What
        # another launch has just written lies in L2.
        latency = machine.DRAM_LATENCY if self.streams else machine.L2_LATENCY
        rates = machine.streaming(share, latency)
        static = machine.statics(self.kernel.code, 0)
        ends = [
            machine.simulate(
                static, self.blocks, self.slots, policy, self.num_sms, machine.Machine(**rates)
            )[:, 1].max()
            for policy in machine.POLICIES
        ]
        return float(np.mean(ends)) / machine.CLOCK_GHZ / 1e3


def _streamed(warp: machine.Events) -> int:
    return int(((warp >> 18 & 31) + 1)[(warp >> 23 & 1) == 1].sum()) * 32


def _behind(warp: machine.Events, wait: int) -> machine.Events:
    found = np.flatnonzero((warp & 0xFFFF) == wait)
    return warp[found[0] + 1 :] if len(found) else warp


def measure(case: Case, launches: Sequence[Launch]) -> dict[str, Any]:
    parts, us = [], 0.0
    for i, (timed, kernel_us) in enumerate(simulated(case, launches)):
        gap = PROGRAMMATIC_GAP_US if timed.programmatic else GAP_US
        us += (LAUNCH_US if i == 0 else gap) + kernel_us
        parts.append({"kernel": short(timed.launch.kernel), "us": kernel_us})
        parts[-1] |= {"blocks": timed.launch.blocks, "threads": timed.launch.threads}
        parts[-1] |= {"registers": timed.kernel.registers, "blocks_per_sm": timed.slots}
    row: dict[str, Any] = {"us": us, "floor_mb": case.floor / 1e6}
    row["share"] = case.floor / us / machine.DRAM_TBS / 1e6
    row |= loop(case)
    row["loop_us"] = row["cycles_per_row"] * case.rows / machine.NUM_SMS / machine.CLOCK_GHZ / 1e3
    row["loop_share"] = case.floor / row["loop_us"] / machine.DRAM_TBS / 1e6
    bytes_of_vector = VECTOR_COLUMNS * case.columns_bytes
    row["slots"] = bytes_of_vector / machine.DRAM_BYTES * 4  # four partitions issue
    return row | {"launches": parts}


def simulated(case: Case, launches: Sequence[Launch]) -> list[tuple[Timed, float]]:
    """Each launch and its time on the GPU, in microseconds."""
    timed = [Timed(launch, case) for launch in launches]
    alone = sum(one.streams for one in timed) == 1  # then it moves what the operator must
    return [(one, one.us(case.floor if alone else None)) for one in timed]


def loop(case: Case) -> dict[str, float]:
    """What a row costs where rows never end: the difference of two launches, the second with twice
    as many rows for each multiprocessor."""
    few = rows_of_loop(case.hidden)
    cycles, issued, again = [], [], 0
    for rows in (few, 2 * few):
        more = dataclasses.replace(case, rows=rows * machine.NUM_SMS)
        found = [(one, us) for one, us in simulated(more, recorded(more)) if one.streams]
        cycles.append(sum(us for _, us in found) * 1e3 * machine.CLOCK_GHZ)
        issued.append(sum(one.issued / one.num_sms for one, _ in found))
        again = max(one.passed_again() for one, _ in found)
    vectors = few * case.hidden / VECTOR_COLUMNS
    return {
        "cycles_per_row": (cycles[1] - cycles[0]) / few,
        "instructions": (issued[1] - issued[0]) / vectors,
        "code_kb": again * sass.BYTES / 1024,
    }


def rows_of_loop(hidden: int) -> int:
    """For a multiprocessor: enough for several rounds, and a multiple of most numbers of rows that
    a block works on at once."""
    return 480 if hidden <= 1024 else 240 if hidden <= 4096 else 48


def rows(
    chosen: Sequence[str] = tuple(ACTIVATIONS),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    **options: Any,
) -> list[dict[str, Any]]:
    """Of each operator and shape; prints each."""
    found = []
    for operator in chosen:
        for num_rows, hidden in shapes:
            begin = time.perf_counter()
            case = Case(operator, num_rows, hidden, **options)
            row = dataclasses.asdict(case) | kept(case)
            found.append(row)
            print(f"{case}: {line(row)}  ({time.perf_counter() - begin:.0f} s)", flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    parts = ", ".join(f"{part['kernel']} {part['us']:.1f}" for part in row["launches"])
    return (
        f"{100 * row['share']:.0f} % ({100 * row['loop_share']:.0f}) of copy bandwidth, "
        f"{row['us']:.1f} us ({row['loop_us']:.1f}), "
        f"{row['instructions']:.0f} instructions a vector of {row['slots']:.0f} slots, "
        f"{row['code_kb']:.0f} KB of code; {parts} us"
    )


def kept(case: Case) -> dict[str, Any]:
    """What ``measure`` says, from an earlier run if nothing changed since."""
    launches = recorded(case)
    geometry = [(one.kernel, one.blocks, one.threads, one.dynamic_shared) for one in launches]
    content = hashlib.sha256(f"{case} {geometry} {digest(families=[NORMS])}".encode())
    content.update(str(machine.DRAM_LATENCY).encode())
    for name in ("sass.py", "machine.py", "norms.py", "launches.py", "walk.cpp", "schedule.cpp"):
        content.update(Path(__file__).with_name(name).read_bytes())
    file = machine.CACHE / "rows" / f"{content.hexdigest()[:16]}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(rounded(measure(case, launches))))
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


def tables(
    found: Sequence[dict[str, Any]],
    before: Sequence[dict[str, Any]],
    calibration: Sequence[dict[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the page's tables: both editions side by side, and the calibration."""
    keys = [field.name for field in dataclasses.fields(Case)]
    earlier = {tuple(row[key] for key in keys): row for row in before}
    lines = []
    for row in found:
        first = earlier[tuple(row[key] for key in keys)]
        line: dict[str, Any] = {"operator": row["operator"].replace("_", " ")}
        line["rows x hidden"] = f"{row['rows']} x {row['hidden']}"
        line["MB"] = round(row["floor_mb"])
        for name, of in (("before", first), ("now", row)):
            line[f"us {name}"] = f"{of['us']:.1f}"
            line[f"share {name} (loop)"] = f"{of['share']:.0%} ({of['loop_share']:.0%})"
            line[f"instructions {name}"] = round(of["instructions"])
        lines.append(line | {"slots": round(row["slots"])})
    known = [
        {name: row[name] for name in ("kernel", "GPU", "rows x hidden")}
        | {"published, us": f"{row['published']:g}", "predicted, us": f"{row['predicted']:.1f}"}
        | {"share published": f"{row['published_share']:.0%}"}
        | {"share predicted": f"{row['predicted_share']:.0%}"}
        | {"predicted / published": f"{row['predicted'] / row['published']:.2f}"}
        for row in calibration
    ]
    return {"norms": lines, "norm_calibration": known}


def shape(text: str) -> tuple[int, int]:
    num_rows, hidden = map(int, text.split("x"))
    return num_rows, hidden


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("operators", nargs="*", help=", ".join(ACTIVATIONS))
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="ROWSxHIDDEN")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parameters", help="their dtype, if not that of the rows")
    parser.add_argument("--dropout", action="store_true", help="in the sandwich")
    parser.add_argument("--dram-latency", type=float, default=machine.DRAM_LATENCY, help="cycles")
    chosen = parser.parse_args(arguments)
    machine.DRAM_LATENCY = chosen.dram_latency
    options = {"dtype": chosen.dtype, "parameters": chosen.parameters or chosen.dtype}
    rows(chosen.operators or tuple(ACTIVATIONS), chosen.shapes, dropout=chosen.dropout, **options)


if __name__ == "__main__":
    main()
