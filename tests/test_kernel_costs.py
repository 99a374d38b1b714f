"""The work and traffic of the kernels stay close to the minimum."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby

import pytest
import torch
from helpers import region_of

from benchmarks.kernels import costs
from benchmarks.kernels.counting import DOCS, between
from benchmarks.suite.cases import AttentionCase
from cogview_kernels import extension
from cogview_kernels.norm import operators

STALE = "differs from docs/kernel_costs.json: run `make kernel-costs` and commit what it writes"
COMMITTED = json.loads((DOCS / "kernel_costs.json").read_text())
BY_CASE = {
    case: list(rows) for case, rows in groupby(COMMITTED["attention"], lambda row: row["case"])
}
DECODE = {case: list(rows) for case, rows in groupby(COMMITTED["decode"], lambda row: row["case"])}
NORMS = {(row["case"], row["operator"]): row for row in COMMITTED["norms"]}

# Issued over useful products, and moved over necessary bytes.
BOUNDS = {
    "forward": (1.15, 1.05),
    "backward_row": (0, 1.0),
    "backward_dkdv": (1.2, 1.05),
    "backward_dq": (1.1, 1.05),
    "backward": (1.15, 1.05),
}
DECODE_BOUND = 1.15  # moved over necessary bytes
# Compilers may merge two loads of the same value, and only rows use special load instructions.
TOLERANCE = {"moved_far_keys": 0.05, "shared_accesses": 0.05, "bank_conflicts": 0.1}

needs_host_model = pytest.mark.skipif(
    extension.why_not_host_model() is not None, reason=str(extension.why_not_host_model())
)


def test_the_page_shows_the_record() -> None:
    page = (DOCS / "kernel_costs.md").read_text()
    for mark, table in costs.tables(COMMITTED).items():
        assert between(page, mark) == table


@pytest.mark.parametrize("case", costs.ATTENTION_CASES, ids=costs.describe)
def test_committed_counts_are_within_bounds(case: AttentionCase) -> None:
    """And not below the minimum; tiles are as high as ``must_touch`` assumes."""
    rows = BY_CASE[costs.describe(case)]
    for row in [*rows, costs.backward(rows)]:
        products, moved = BOUNDS[row["kernel"]]
        assert row["must_touch"] <= costs.moved(row) <= moved * row["must_touch"], row
        assert row["products"] >= row["useful_products"]
        assert row["products"] <= products * row["useful_products"], row
    blocks = {row["kernel"]: row["blocks"] for row in rows}
    for kernel in ("forward", "backward_dq"):
        height = costs.tile_rows(kernel, case.head_dim)
        first = (case.seqlen - case.queries) // height
        assert blocks[kernel] == case.num_heads * (-(-case.seqlen // height) - first)
    height = costs.tile_rows("backward_dkdv", case.head_dim)
    tiles = -(-case.seqlen // height) + -(-costs.far_rows(case) // height)
    assert blocks["backward_dkdv"] == case.kv_heads * tiles


@needs_host_model
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case.pairs > 2e6))
        for case in costs.ATTENTION_CASES
    ],
    ids=costs.describe,
)
def test_counts_equal_the_committed_ones(case: AttentionCase) -> None:
    rows = costs.attention_rows(case)
    for row, committed in zip(rows, BY_CASE[costs.describe(case)], strict=True):
        assert row.keys() == committed.keys()
        for name, value in committed.items():
            tolerance = value * TOLERANCE.get(name, 0)
            assert row[name] == value or abs(row[name] - value) <= tolerance, f"{name} {STALE}"
    # Bank conflicts occur where a dkdv block looks up its keys, not in the main loops: one query
    # gives as many as all queries.
    conflicts = {row["kernel"]: row["bank_conflicts"] for row in rows}
    one_query = costs.attention_launches(dataclasses.replace(case, q_len=1))
    assert conflicts["backward_dkdv"] == one_query["backward_dkdv"]["bank_conflicts"]
    assert conflicts["forward"] == conflicts["backward_dq"] == 0


@pytest.mark.parametrize("case", costs.DECODE_CASES, ids=costs.describe)
def test_decoding_moves_what_it_must(case: AttentionCase) -> None:
    """However long the cache: the list has the text, the pivots and two blocks at most."""
    row = 2 * case.head_dim
    longest = case.text_len + case.num_pivots + 2 * case.query_window + case.queries - 1
    floor = case.num_heads * case.queries * (2 * row + 4) + case.kv_heads * 2 * row * longest
    rows = DECODE[costs.describe(case)]
    assert [row["multiprocessors"] for row in rows] == [1, costs.NUM_SMS]
    for counts in rows:
        assert counts["must_touch"] <= costs.moved(counts) <= DECODE_BOUND * counts["must_touch"]
        assert costs.moved(counts) <= DECODE_BOUND * floor
    assert rows[0]["moved_partial"] == 0 and rows[0]["blocks"] == case.kv_heads
    # At the end alone, where warps exchange their sums.
    assert rows[0]["bank_conflicts"] <= 2 * case.head_dim


@needs_host_model
@pytest.mark.parametrize("case", costs.DECODE_CASES[::2], ids=costs.describe)
def test_decode_counts_equal_the_committed_ones(case: AttentionCase) -> None:
    for row, committed in zip(costs.decode_rows(case), DECODE[costs.describe(case)], strict=True):
        assert row.keys() == committed.keys()
        for name, value in committed.items():
            tolerance = value * TOLERANCE.get(name, 0)
            assert row[name] == value or abs(row[name] - value) <= tolerance, f"{name} {STALE}"


def test_decode_needs_by_hand() -> None:
    case = AttentionCase(
        300, 48, 2, 40, num_heads=4, num_kv_heads=2, head_dim=64, text_len=20, q_len=30
    )
    pivot_idx = case.layout("cpu").pivot_idx
    assert pivot_idx is not None
    pivots = pivot_idx[0].tolist()
    seen = {j for j in range(300) for i in range(270, 300) if region_of(i, j, 20, pivots, 48, 2)}
    assert costs.decode_needs(case) == 4 * 30 * (2 * 128 + 4) + 2 * 2 * 128 * len(seen)


@pytest.mark.parametrize("q_len", [0, 150])
def test_needs_by_hand(q_len: int) -> None:
    """Pairs and rows counted one by one from the definition."""
    case = AttentionCase(
        300, 48, 2, 40, num_heads=4, num_kv_heads=2, head_dim=64, text_len=20, q_len=q_len
    )
    pivot_idx = case.layout("cpu").pivot_idx
    assert pivot_idx is not None
    pivots = pivot_idx[0].tolist()
    seen_by = {
        i: {j for j in range(300) if region_of(i, j, 20, pivots, 48, 2)}
        for i in range(300 - case.queries, 300)
    }
    pairs = 4 * sum(map(len, seen_by.values()))
    tiles = [range(begin, begin + 128) for begin in (0, 128, 256)]
    far = {*range(20), *pivots}
    keys = 4 * sum(len(set().union(*(seen_by.get(i, ()) for i in tile))) for tile in tiles)
    queries = 4 * sum(
        any(key in seen for key in tile)
        for tile in (far, *(set(tile) - far for tile in tiles))
        for seen in seen_by.values()
    )
    row = 2 * 64
    assert costs.needs(case) == {
        "forward": (2 * 64 * pairs, 4 * case.queries * (2 * row + 4) + keys * 2 * row),
        "backward_row": (0, 4 * case.queries * (2 * row + 4)),
        "backward_dkdv": (4 * 64 * pairs, 2 * 300 * 4 * row + queries * (2 * row + 8)),
        "backward_dq": (3 * 64 * pairs, 4 * case.queries * (3 * row + 8) + keys * 2 * row),
    }


@pytest.mark.parametrize("case", costs.NORM_CASES, ids=str)
def test_committed_norms_move_each_activation_once(case: costs.NormCase) -> None:
    """But for the widest rows: those that do not fit a block of the sandwich run as two norms,
    those that do not fit a block of one norm are read two or three times."""
    # In tensors of two bytes an element, by the bytes of an element of the residual stream.
    floors = {2: (2, 3, 3, 4, 6, 3, 6, 3), 4: (2, 3, 3, 7, 10, 5, 10, 4)}[case.residual.itemsize]
    for operator, tensors in zip(costs.PASSES, floors, strict=True):
        row = NORMS[str(case), operator]
        assert row["floor"] == tensors * case.rows * case.hidden * 2
        assert row["activations"] >= row["floor"], row
        # Only where the warps of a backward exchange the sums of a row: cycles, against those in
        # which shared memory could take or give the activations once.
        assert row["bank_conflicts"] <= (0.15 if "backward" in operator else 0) * row["floor"] / 128
        if case.hidden < 16384:
            assert row["passes"] == costs.PASSES[operator]
            assert row["activations"] == row["floor"]
        if case.rows == 8192:  # with fewer rows the blocks' own bytes weigh more
            assert row["parameters"] + row["partial_sums"] < 0.05 * row["floor"], row


@needs_host_model
@pytest.mark.parametrize("residual", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [8192, 4096, 512])
def test_what_the_blocks_of_a_backward_move_for_themselves(
    rows: int, residual: torch.dtype
) -> None:
    """Parameters and partial sums against the floor; columns do not matter, so there are few."""
    launched = costs.norm_launches(costs.NormCase(rows, 8, residual))
    for operator, floor in costs.PASSES.items():
        if "backward" not in operator:
            continue
        sizes = dict.fromkeys(costs.LIKE_RESIDUAL, residual.itemsize)
        row_bytes = sum(times * sizes.get(name, 2) for name, times in floor.items())
        moved = costs.bytes_by_kind(launched[operator], costs.OTHERS)
        own = (moved["parameters"] + moved["partial_sums"]) / 8
        blocks = launched[operator][0]["grid"][0]
        busiest = -(-rows // blocks)
        assert busiest == -(-rows // costs.NUM_SMS) or blocks >= 0.9 * costs.NUM_SMS - 1
        assert own < (0.05 if rows == 8192 else 3.4 / busiest) * rows * row_bytes


@needs_host_model
@pytest.mark.parametrize("case", costs.NORM_CASES[:2], ids=str)
def test_norm_counts_equal_the_committed_ones(
    case: costs.NormCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts fewer rows: activations, statistics and conflicts scale with the rows; parameters and
    partial sums scale with the blocks, whose number and size stay."""
    fewer = case._replace(rows=6 * costs.NUM_SMS)
    num_blocks = operators._num_summing_blocks
    monkeypatch.setattr(
        operators, "_num_summing_blocks", lambda _, *others: num_blocks(case.rows, *others)
    )
    for row in costs.norm_rows(fewer):
        committed = NORMS[str(case), row["operator"]]
        for name in ("launches", "passes", "parameters", "partial_sums"):
            assert row[name] == committed[name], f"{name} {STALE}"
        for name in ("floor", "activations", "statistics", "bank_conflicts"):
            assert row[name] * case.rows == committed[name] * fewer.rows, f"{name} {STALE}"
