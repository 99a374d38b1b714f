"""What the attention's kernels compute and move, counted, against what it cannot do without."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

import cogview_kernels as ck
from benchmarks.kernels import counting
from benchmarks.kernels.counting import Row
from benchmarks.suite.cases import AttentionCase

MMA_PRODUCTS = 16 * 8 * 16
KERNEL = re.compile(r"three_region_attention_(\w+)_kernel")
MOVED = {  # by the names of buffers
    "moved_rows": "q|k|v|out|dout|dq|dk|dv",
    "moved_statistics": "row_max|row_log_sum|delta",
    "moved_far_keys": "far_keys",
}
RATIOS = {
    "issued / useful": (("products",), "useful_products"),
    "moved / must touch": (MOVED, "must_touch"),
}

# More heads and samples repeat the counts.
CASES = (
    AttentionCase(1088, 64, 4, 192, num_heads=1),
    AttentionCase(4224, 128, 2, 256, num_heads=1),
    AttentionCase(4224, 128, 6, 704, num_heads=1),
    AttentionCase(16448, 128, 2, 512, num_heads=1),
    AttentionCase(4096, 128, 8, 256, num_heads=2, num_kv_heads=1, head_dim=128),
    AttentionCase(4224, 128, 2, 256, num_heads=1, q_len=1),
)


def describe(case: AttentionCase) -> str:
    queries = f"Sq={case.q_len} " if case.q_len else ""
    heads = f"H={case.num_heads} G={case.kv_heads} " if case.num_heads > 1 else ""
    return (
        f"{queries}S={case.seqlen} w={case.query_window} n={case.key_window_times}, "
        f"{case.num_pivots} pivots, {case.text_len} text, {heads}D={case.head_dim}"
    )


def tile_rows(kernel: str, head_dim: int) -> int:
    """Queries of a block, keys of a block of the dkdv kernel: as the kernels' shapes have them."""
    return 128 if kernel == "forward" or head_dim <= 64 else 64


def query_tiles(case: AttentionCase, kernel: str) -> Iterator[Tensor]:
    """Who sees which key, tile by tile of the kernel's rows: bool ``(queries, keys so far)``."""
    rows, first = tile_rows(kernel, case.head_dim), case.seqlen - case.queries
    for origin in range(first // rows * rows, case.seqlen, rows):
        begin, end = max(origin, first), min(origin + rows, case.seqlen)
        yield case.layout("cpu").dense_mask(1, end - begin, end)[0]


def queries_of_key_tiles(case: AttentionCase) -> int:
    """The queries that see any key of a tile, summed over the tiles of the dkdv kernel: the pivots
    packed, then all keys in order, but for the pivots."""
    rows, pivots = tile_rows("backward_dkdv", case.head_dim), case.layout("cpu").pivot_idx
    assert pivots is not None
    tile = -(-case.num_pivots // rows) + torch.arange(case.seqlen) // rows
    tile[pivots[0].long()] = torch.arange(case.num_pivots) // rows
    seen = (visible.nonzero().unbind(1) for visible in query_tiles(case, "forward"))
    return sum((query * case.seqlen + tile[key]).unique().numel() for query, key in seen)


def needs(case: AttentionCase) -> dict[str, tuple[int, int]]:
    """For each kernel the multiply-adds of visible pairs, and the bytes that its blocks must touch.

    A block of queries touches its rows and statistics, and each key that any of them sees; a block
    of keys touches its rows, and each query that sees any of them. Each once.
    """
    heads, row, statistic = case.num_heads, 2 * case.head_dim, 4
    queries, products = heads * case.queries, heads * case.head_dim * case.pairs
    keys, seen = case.kv_heads * case.seqlen, heads * queries_of_key_tiles(case)
    k_and_v = {
        kernel: heads * 2 * row * sum(int(tile.any(0).sum()) for tile in query_tiles(case, kernel))
        for kernel in ("forward", "backward_dq")
    }
    return {
        # q, out; lse.
        "forward": (2 * products, queries * (2 * row + statistic) + k_and_v["forward"]),
        # dout, out; delta.
        "backward_row": (0, queries * (2 * row + statistic)),
        # k, v, dk, dv; q, dout, lse, delta.
        "backward_dkdv": (4 * products, keys * 4 * row + seen * 2 * (row + statistic)),
        # q, dout, dq; lse, delta.
        "backward_dq": (3 * products, queries * (3 * row + 2 * statistic) + k_and_v["backward_dq"]),
    }


def launches(case: AttentionCase, num_sms: int = 1) -> dict[str, Row]:
    """What the host model counted of forward and backward, by kernel.

    On one multiprocessor every key tile's queries stay with one block, as where heads are many.
    """
    q, k, v = (
        torch.randn(1, heads, rows, case.head_dim).to(case.torch_dtype).requires_grad_()
        for heads, rows in ((case.num_heads, case.queries), *[(case.kv_heads, case.seqlen)] * 2)
    )

    def run() -> None:
        out = ck.three_region_attention(q, k, v, case.layout("cpu"), backend="host_model")
        out.backward(torch.ones_like(out))

    _, found = counting.counted(run, num_sms)
    return {KERNEL.findall(launch["kernel"])[0]: launch for launch in found}


def count(case: AttentionCase) -> list[Row]:
    """A row for each kernel: counts of the host model beside what is needed."""
    rows, launched = [], launches(case)
    for kernel, (useful, must_touch) in needs(case).items():
        launch = launched[kernel]
        row: Row = {"case": describe(case), "kernel": kernel, "blocks": launch["grid"][0]}
        row |= {"products": launch["mma"] * MMA_PRODUCTS, "useful_products": useful}
        row |= {"must_touch": must_touch} | counting.moved([launch], MOVED)
        for of in ("unique", "operator_unique"):
            buffers = launch["buffers"].values()
            row[of] = sum(buffer[f"{of}_loaded"] + buffer[f"{of}_stored"] for buffer in buffers)
        rows.append(row | {name: launch[name] for name in ("shared_accesses", "bank_conflicts")})
    return rows


def moved(row: Row) -> int:
    return sum(row[what] for what in MOVED)


def backward(rows: list[Row]) -> Row:
    """The sum of a case's backward kernels."""
    parts = [row for row in rows if row["kernel"].startswith("backward")]
    numbers = [name for name, value in parts[0].items() if isinstance(value, int)]
    total = parts[-1] | {name: sum(row[name] for row in parts) for name in numbers}
    # Unique over the whole operator: what one kernel leaves in the cache serves the next.
    last = parts[-1]["operator_unique"]
    return total | {"kernel": "backward", "unique": last, "operator_unique": last}


def shown(rows: list[Row]) -> list[Row]:
    """A case's rows in the page."""
    return [*rows, backward(rows)]
