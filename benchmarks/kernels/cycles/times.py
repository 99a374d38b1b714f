"""Predicts the times of the attention's kernels on one H200 from their machine code. `make
kernel-times` writes docs/kernel_times.json and the tables of docs/kernel_times.md.

    python -m benchmarks.kernels.cycles.times                           # all; needs nvcc, no GPU
    python -m benchmarks.kernels.cycles.times forward --cases AB --head-dims 64 --dtypes bfloat16

With arguments it prints what it found and writes nothing. The host model records the launches of a
call; walk.cpp runs every 33rd block of each on the machine code that the compiler made of the same
source, and schedule.cpp runs the ways that its warps took on four multiprocessors.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.kernels.counting import DOCS, markdown, write
from benchmarks.kernels.cycles import machine, sass
from benchmarks.kernels.cycles.launches import (
    CASES,
    SAMPLED_SMS,
    Kernel,
    Launch,
    compiled,
    digest,
    machine_code,
    recorded,
    sampled_blocks,
    short,
    source_of,
)
from benchmarks.kernels.table import ctas_per_sm
from cogview.files import atomic_write

CALIBRATION = DOCS / "kernel_times_calibration.json"
CALL = "case", "head_dim", "dtype"
SHOWN_CASE = "B"  # of the table of tiles
PIPES = "issue", "tensor", "special", "integer", "float", "shared"
HEAD_DIMS, DTYPES = (64, 128), ("bfloat16", "float16")
KERNELS = {
    "forward": "forward",
    "backward_row": "row",
    "backward_dkdv": "dkdv",
    "backward_partial": "partial",
    "backward_dq": "dq",
    "far_keys": "far_keys",
}
Block = list[machine.Events]  # the events of each warp


class Phases(NamedTuple):
    prologue: Block
    tiles: list[Block]
    epilogue: Block


def main_barrier(code: Sequence[sass.Instruction], blocks: Sequence[Block]) -> int | None:
    """The barrier that begins a pass of the loop with products: the one passed most often."""
    is_tensor = np.array([line.pipe == "tensor" for line in code])
    is_barrier = np.array([line.pipe == "barrier" for line in code])
    passed = np.concatenate([events for block in blocks for events in block]) & 0xFFFF
    times = np.bincount(passed, minlength=len(code))
    best = int(np.argmax(times * is_barrier))
    return best if (times * is_barrier)[best] and (times * is_tensor).any() else None


def cut(kernel: Kernel, block: Block, barrier: int) -> Phases | None:
    """What a block does up to the first tile's barrier, from barrier to barrier, and behind the
    last product; None for a block without products. The first copies belong to the prologue."""
    is_tensor = np.array([line.pipe == "tensor" for line in kernel.code])
    parts = []
    for events in block:
        index = events & 0xFFFF
        starts, products = np.flatnonzero(index == barrier), np.flatnonzero(is_tensor[index])
        last = max([*starts[-1:], *products[-1:]], default=-1)
        parts.append(np.split(events, [*starts, last + 1]))
    if len(parts[0]) < 3 or len({len(part) for part in parts}) != 1:
        return None
    columns = [list(column) for column in zip(*parts, strict=True)]
    return Phases(columns[0], columns[1:-1], columns[-1])


def walked(kernel: Kernel, launch: Launch) -> tuple[list[Block], float]:
    """The sampled blocks of a launch, and the bytes that all its blocks move."""
    walker = machine.Walker(kernel.code)
    blocks, moved = [], 0
    for block in sampled_blocks(launch.blocks):
        events, of_block = walker.walk(launch.params, launch.ranges, launch.threads, block)
        blocks.append(events)
        moved += of_block
    return blocks, moved * launch.blocks / len(blocks)


def measure(kernel: Kernel, launch: Launch) -> dict[str, Any]:
    """What the model says of a launch. Cycles are those of a multiprocessor, which works on
    ``blocks_per_sm`` blocks at once, divided among these."""
    slots, _ = ctas_per_sm(
        "sm_90a", launch.threads, kernel.registers, kernel.static_shared + launch.dynamic_shared
    )
    blocks, moved = walked(kernel, launch)
    return predict(kernel, blocks, slots, launch.blocks, moved)


def predict(
    kernel: Kernel, blocks: list[Block], slots: int, num_blocks: int, moved: float
) -> dict[str, Any]:
    has_products = any(line.pipe == "tensor" for line in kernel.code)
    latency = machine.LATENCY["load"] if has_products else machine.STREAMED_LOAD
    static = machine.statics(kernel.code, latency)

    def cycles(of: Sequence[Block], num_sms: int = 1, **changes: float) -> float:
        """The mean of the policies."""
        ends = [
            machine.simulate(static, of, slots, policy, num_sms, machine.Machine(**changes))[:, 1]
            for policy in machine.POLICIES
        ]
        return float(np.mean([end.max() for end in ends]))

    us = cycles(blocks, min(SAMPLED_SMS, len(blocks))) / machine.CLOCK_GHZ / 1e3
    if not has_products:
        us = max(us, moved / machine.DRAM_TBS / 1e6)
    row: dict[str, Any] = {
        "us": us,
        "blocks": num_blocks,
        "blocks_per_sm": slots,
        "registers": kernel.registers,
        "issued_per_warp": np.mean([len(warp) for block in blocks for warp in block]),
        "moved_mb": moved / 1e6,
    }
    barrier = main_barrier(kernel.code, blocks)
    phases = [
        found for block in blocks if barrier is not None and (found := cut(kernel, block, barrier))
    ]
    if phases:
        tiles = [tile for found in phases for tile in found.tiles]
        row["tiles_per_block"] = len(tiles) / len(blocks)

        def steady(tile: Block) -> float:
            """Cycles of a tile where all tiles are like it."""
            again = [[np.tile(warp, times) for warp in tile] for times in (12, 4)]
            many, few = (cycles([block] * slots, launch=0.0) for block in again)
            return (many - few) / 8 / slots

        row |= tile_facts(static, tiles, steady)
        for name in ("prologue", "epilogue"):
            parts = [getattr(found, name) for found in phases[: 8 * slots]]
            row[name] = {
                "issued": np.mean([len(warp) for part in parts for warp in part]),
                "cycles": cycles(parts, launch=0.0) / len(parts),
            }
    return row


def tile_facts(
    static: np.ndarray, tiles: Sequence[Block], steady: Callable[[Block], float]
) -> dict[str, Any]:
    """Of the most frequent way through a tile with all products, and of the slowest way, among
    those that one tile in a hundred takes."""
    is_tensor = static[:, 0] == sass.PIPE_NAMES.index("tensor")
    ways: dict[tuple[int, ...], list[Block]] = {}
    for tile in tiles:
        ways.setdefault(tuple(len(warp) for warp in tile), []).append(tile)
    frequent = sorted((way for way in ways.values() if len(way) * 100 >= len(tiles)), key=len)
    products = [min(int(is_tensor[warp & 0xFFFF].sum()) for warp in way[0]) for way in frequent]
    times = [steady(way[0]) for way in frequent]
    plain = max(range(len(frequent)), key=lambda i: (products[i], len(frequent[i])))
    slowest = max(range(len(frequent)), key=lambda i: times[i])
    found: dict[str, Any] = {}
    for name, i in (("plain", plain), ("masked", slowest)):
        tile = frequent[i][0]
        found[name] = {"issued": np.mean([len(warp) for warp in tile]), "cycles": times[i]}
        found[name] |= {"share": len(frequent[i]) / len(tiles)} | pipe_cycles(static, tile)
    return found


def pipe_cycles(static: np.ndarray, tile: Block) -> dict[str, float]:
    """How long a tile of a block keeps a partition's issue slot, its pipes, and shared memory."""
    rates = machine.Machine()
    events = np.concatenate(tile)
    busy = events[(events >> 17 & 1) == 0]
    number = Counter(sass.PIPE_NAMES[pipe] for pipe in static[busy & 0xFFFF, 0].tolist())
    of_partition = {
        "issue": len(events),
        "tensor": number["tensor"] * rates.tensor,
        "special": number["special"] * rates.special,
        "integer": number["integer"] * rates.pair,
        "float": (number["float"] + number["heavy"]) * rates.pair / 2,
    }
    found = {name: cycles / 4 for name, cycles in of_partition.items()}
    return found | {"shared": float((busy >> 24).sum())}


def rows(
    which: str, cases: str, head_dims: Sequence[int], dtypes: Sequence[str], verbose: bool = True
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for head_dim in head_dims:
        for dtype in dtypes:
            for letter in cases:
                case = dataclasses.replace(CASES[letter], dtype=dtype)
                heads = case.num_heads * case.head_dim // head_dim
                case = dataclasses.replace(case, head_dim=head_dim, num_heads=heads)
                for launch in recorded(case):
                    name = short(launch.kernel)
                    if which and which not in name:
                        continue
                    begin = time.perf_counter()
                    row = {"case": letter, "head_dim": head_dim, "dtype": dtype, "kernel": name}
                    row |= kept(row, launch)
                    found.append(row)
                    if verbose:
                        seconds = time.perf_counter() - begin
                        print(f"{_line(row)}  ({seconds:.0f} s)", flush=True)
    return found


def kept(row: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """What ``measure`` says, from an earlier run if nothing changed since."""
    content = hashlib.sha256("".join([*map(str, row.values()), file_digest()]).encode())
    content.update(compiled(source_of(launch.kernel)).read_bytes())
    file = machine.CACHE / "rows" / f"{content.hexdigest()[:16]}.json"
    if not file.is_file():
        measured = json.dumps(_rounded(measure(machine_code(launch.kernel), launch)))
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            partial.write_text(measured)
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


@functools.cache
def file_digest() -> str:
    """Of the tool itself."""
    files = sorted(path for path in Path(__file__).parent.iterdir() if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _line(row: dict[str, Any]) -> str:
    text = f"{row['case']} D{row['head_dim']} {row['dtype']} {row['kernel']}: {row['us']:.1f} us"
    for name in ("plain", "masked", "prologue", "epilogue"):
        if name in row:
            part = row[name]
            text += f", {name} {part['cycles']:.0f} cycles ({part['issued']:.0f} issued)"
    return text


def record() -> dict[str, Any]:
    return {
        "sources": digest(),
        "clock_ghz": machine.CLOCK_GHZ,
        "num_sms": machine.NUM_SMS,
        "rows": rows("", "ABCD", HEAD_DIMS, DTYPES),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def tables(facts: dict[str, Any], calibration: dict[str, Any]) -> dict[str, str]:
    """Of the page: times, tiles, calibration."""
    launches, tiles = [], []
    for call, group in itertools.groupby(facts["rows"], operator.itemgetter(*CALL)):
        found = {row["kernel"]: row for row in group}
        us = {shown: found[kernel]["us"] for kernel, shown in KERNELS.items() if kernel in found}
        line = dict(zip(CALL, map(str, call), strict=True))
        line |= {shown: _us(us[shown]) if shown in us else "" for shown in KERNELS.values()}
        total = sum(us.get(KERNELS[name], 0.0) for name in KERNELS if name.startswith("backward"))
        launches.append(line | {"backward": _us(total)})
        for kernel, row in found.items():
            if call[0] == SHOWN_CASE and "plain" in row:
                tile = {"kernel": KERNELS[kernel], "D": str(call[1]), "dtype": call[2]}
                tile |= {"registers": row["registers"], "blocks per SM": row["blocks_per_sm"]}
                tile |= {pipe: round(row["plain"][pipe]) for pipe in PIPES}
                parts = {"plain tile": "plain", "masked tile": "masked"}
                parts |= {"prologue": "prologue", "epilogue": "epilogue"}
                tiles.append(tile | {n: round(row[p]["cycles"]) for n, p in parts.items()})
    known = [
        {"kernel": row["kernel"], "D": str(row["head_dim"]), "keys": row["length"]}
        | {"published": row["published"], "predicted": round(row["predicted"])}
        | {"predicted / published": f"{row['predicted'] / row['published']:.2f}"}
        for row in calibration["rows"]
    ]
    return {"times": markdown(launches), "tiles": markdown(tiles), "calibration": markdown(known)}


def _us(time: float) -> str:
    return f"{time:.0f}" if time >= 10 else f"{time:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("kernel", nargs="?", help="part of a name: forward, dq, dkdv, row")
    parser.add_argument("--cases", default="ABCD")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    chosen = parser.parse_args()
    if chosen == parser.parse_args([]):
        facts = record()
        write("kernel_times", facts, tables(facts, json.loads(CALIBRATION.read_text())))
    else:
        rows(chosen.kernel or "", chosen.cases, chosen.head_dims, chosen.dtypes)


if __name__ == "__main__":
    main()
