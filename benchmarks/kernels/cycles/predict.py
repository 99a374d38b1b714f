"""What the model says of one launch: its time, its tiles, and what lies around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.kernels.cycles import machine, sass
from benchmarks.kernels.cycles.launches import SAMPLED_SMS, Kernel, Launch, sampled_blocks
from benchmarks.kernels.table import ctas_per_sm

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
        events, of_block = walker.walk(
            launch.params, launch.ranges, launch.threads, block, launch.blocks, launch.grid_y
        )
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
    """Of the most frequent path through a tile with all products, and of the slowest among those
    that one tile in a hundred takes."""
    is_tensor = static[:, 0] == sass.PIPE_NAMES.index("tensor")
    paths: dict[tuple[int, ...], list[Block]] = {}
    for tile in tiles:
        paths.setdefault(tuple(len(warp) for warp in tile), []).append(tile)
    frequent = sorted((path for path in paths.values() if len(path) * 100 >= len(tiles)), key=len)
    products = [min(int(is_tensor[warp & 0xFFFF].sum()) for warp in path[0]) for path in frequent]
    times = [steady(path[0]) for path in frequent]
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


def rounded(value: Any) -> Any:
    """Floats to four digits, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
