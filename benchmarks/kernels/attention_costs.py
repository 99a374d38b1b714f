"""What the attention's kernels compute and move, counted, against what the attention cannot do
without: the first part of kernel_costs.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import cogview_kernels as ck
from benchmarks.kernels.counting import host_model
from cogview_kernels import extension

MMA_PRODUCTS = 16 * 8 * 16
ELEMENT_BYTES, STATISTIC_BYTES = 2, 4
STATISTICS = ("row_max", "row_log_sum", "delta")


@dataclasses.dataclass(frozen=True)
class Case:
    """One sample in bfloat16: heads and samples beyond these repeat the counts."""

    seqlen: int
    query_window: int
    key_window_times: int
    num_pivots: int
    text_len: int = 64
    head_dim: int = 64
    num_heads: int = 1
    num_kv_heads: int = 1
    q_len: int = 0  # the last queries; 0: all of them

    @property
    def queries(self) -> int:
        return self.q_len or self.seqlen

    def layout(self) -> ck.ThreeRegionLayout:
        generator = torch.Generator().manual_seed(0)
        pivot_idx = ck.sample_pivots(self.text_len, self.seqlen, self.num_pivots, generator)
        return ck.ThreeRegionLayout(
            self.text_len, pivot_idx, self.query_window, self.key_window_times
        )

    def __str__(self) -> str:
        queries = f"Sq={self.q_len} " if self.q_len else ""
        heads = f"H={self.num_heads} G={self.num_kv_heads} " if self.num_heads > 1 else ""
        return (
            f"{queries}S={self.seqlen} w={self.query_window} n={self.key_window_times}, "
            f"{self.num_pivots} pivots, {self.text_len} text, {heads}D={self.head_dim}"
        )


CASES = (
    Case(1088, 64, 4, 192),
    Case(4224, 128, 2, 256),
    Case(4224, 128, 6, 704),
    Case(16448, 128, 2, 512),
    Case(4096, 128, 8, 256, head_dim=128, num_heads=2),
    Case(4224, 128, 2, 256, q_len=1),
)


def tile_rows(kernel: str, head_dim: int) -> int:
    """Queries of a block, keys of a block of the dkdv kernel: as the kernels' shapes have them."""
    return 128 if head_dim <= (96 if kernel == "forward" else 64) else 64


def query_tiles(case: Case, rows: int) -> Iterator[Tensor]:
    """Who sees which key, by tiles of ``rows`` positions: bool ``(queries, keys so far)``."""
    layout, first = case.layout(), case.seqlen - case.queries
    for origin in range(first // rows * rows, case.seqlen, rows):
        begin, end = max(origin, first), min(origin + rows, case.seqlen)
        yield layout.dense_mask(1, end - begin, end)[0]


def queries_of_key_tiles(case: Case, rows: int) -> int:
    """The queries that see any key of a tile, summed over tiles: the pivots packed, then all keys
    in order, but for the pivots."""
    pivots = case.layout().pivot_idx
    assert pivots is not None
    pivot_tiles = -(-case.num_pivots // rows)
    tile = pivot_tiles + torch.arange(case.seqlen) // rows
    tile[pivots[0].long()] = torch.arange(case.num_pivots) // rows
    count = 0
    for visible in query_tiles(case, 128):
        seen = torch.zeros(visible.shape[0], int(tile.max()) + 1)
        seen.index_add_(1, tile[: visible.shape[1]], visible.float())
        count += int(seen.count_nonzero())
    return count


def needs(case: Case) -> dict[str, tuple[int, int]]:
    """For each kernel the multiply-adds of visible pairs, and the bytes that its blocks must touch.

    A block of queries touches its rows and statistics, and each key that any of them sees; a block
    of keys touches its rows, and each query that sees any of them. Each once.
    """
    row, heads = ELEMENT_BYTES * case.head_dim, case.num_heads
    pairs = heads * sum(int(visible.count_nonzero()) for visible in query_tiles(case, 128))

    def keys_of_query_tiles(kernel: str) -> int:
        tiles = query_tiles(case, tile_rows(kernel, case.head_dim))
        return heads * sum(int(visible.any(0).count_nonzero()) for visible in tiles)

    seen = heads * queries_of_key_tiles(case, tile_rows("backward_dkdv", case.head_dim))
    return {
        # q and out, lse; k and v.
        "forward": (
            2 * case.head_dim * pairs,
            heads * case.queries * (2 * row + STATISTIC_BYTES)
            + keys_of_query_tiles("forward") * 2 * row,
        ),
        # dout and out, delta.
        "backward_row": (0, heads * case.queries * (2 * row + STATISTIC_BYTES)),
        # k, v, dk and dv; q and dout, lse and delta.
        "backward_dkdv": (
            4 * case.head_dim * pairs,
            case.num_kv_heads * case.seqlen * 4 * row + seen * (2 * row + 2 * STATISTIC_BYTES),
        ),
        # q, dout and dq, lse and delta; k and v.
        "backward_dq": (
            3 * case.head_dim * pairs,
            heads * case.queries * (3 * row + 2 * STATISTIC_BYTES)
            + keys_of_query_tiles("backward_dq") * 2 * row,
        ),
    }


def launches(case: Case) -> list[dict[str, Any]]:
    """What the host model counted, of forward and backward."""
    model = host_model()
    generator = torch.Generator().manual_seed(0)

    def heads(number: int, rows: int) -> Tensor:
        shape = 1, number, rows, case.head_dim
        return torch.randn(shape, generator=generator).bfloat16().requires_grad_()

    q = heads(case.num_heads, case.queries)
    k, v = (heads(case.num_kv_heads, case.seqlen) for _ in range(2))
    model.take_report()
    # One multiprocessor: every key tile's queries stay with one block, as where heads are many.
    with mock.patch.object(extension, "host_model_num_sms", 1):
        out = ck.three_region_attention(q, k, v, case.layout(), backend="host_model")
        out.backward(heads(case.num_heads, case.queries).detach())
    return model.take_report()


def short_name(launch: dict[str, Any]) -> str:
    stem = launch["kernel"].partition("<")[0].removesuffix("_kernel")
    return stem.rpartition("::")[2].removeprefix("three_region_attention_")


def count(case: Case) -> list[dict[str, Any]]:
    """A row for each kernel: counts of the host model beside what is needed."""
    needed, rows = needs(case), []
    for launch in launches(case):
        kernel = short_name(launch)
        if kernel == "far_keys":  # once for all heads
            continue
        buffers = launch["buffers"]
        bytes_of = {name: t["bytes_loaded"] + t["bytes_stored"] for name, t in buffers.items()}
        far_keys = bytes_of.pop("far_keys", 0)
        statistics = sum(bytes_of.pop(name, 0) for name in STATISTICS)
        products, must_touch = needed[kernel]
        rows.append(
            {
                "case": str(case),
                "kernel": kernel,
                "blocks": launch["grid"][0],
                "products": launch["mma"] * MMA_PRODUCTS,
                "useful_products": products,
                "must_touch": must_touch,
                "moved_rows": sum(bytes_of.values()),
                "moved_statistics": statistics,
                "moved_far_keys": far_keys,
                "unique": sum(t["unique_loaded"] + t["unique_stored"] for t in buffers.values()),
                "operator_unique": sum(
                    t["operator_unique_loaded"] + t["operator_unique_stored"]
                    for t in buffers.values()
                ),
                "shared_accesses": launch["shared_accesses"],
                "bank_conflicts": launch["bank_conflicts"],
            }
        )
    return rows


def moved(row: dict[str, Any]) -> int:
    return sum(row[f"moved_{what}"] for what in ("rows", "statistics", "far_keys"))


def backward(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of a case's backward kernels."""
    parts = [row for row in rows if row["kernel"].startswith("backward")]
    total = {
        name: value if isinstance(value, str) else sum(row[name] for row in parts)
        for name, value in parts[-1].items()
    }
    # Unique over the whole operator: what one kernel leaves in the cache serves the next.
    return total | {"kernel": "backward", "unique": parts[-1]["operator_unique"]}


def table(facts: list[dict[str, Any]]) -> str:
    lines = []
    for case, group in groupby(facts, lambda row: row["case"]):
        rows = list(group)
        rows.append(backward(rows))
        lines += ["", f"#### {case}", ""]
        lines.append(
            "| kernel | products | issued / useful | must touch | rows | statistics | far keys | "
            "moved / must | unique | shared accesses | bank conflicts |"
        )
        lines.append("|---|" + "---:|" * 10)
        for row in rows:
            products = row["useful_products"]
            cells = [
                row["kernel"],
                f"{row['products']:,}",
                f"{row['products'] / products:.3f}" if products else "",
                f"{row['must_touch']:,}",
                *(f"{row[f'moved_{what}']:,}" for what in ("rows", "statistics", "far_keys")),
                f"{moved(row) / row['must_touch']:.3f}",
                *(f"{row[name]:,}" for name in ("unique", "shared_accesses", "bank_conflicts")),
            ]
            if row["kernel"] == "backward":
                cells[2] += f" ({row['products'] / (products * 5 / 7):.3f} of five)"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines[1:])
