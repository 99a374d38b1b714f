"""The work and traffic of the kernels stay close to the minimum."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from helpers import region_of

from benchmarks.kernels import attention_costs, norm_costs
from benchmarks.kernels import costs as kernel_costs
from cogview_kernels import extension

ROOT = Path(__file__).resolve().parents[1]
STALE = "differs from docs/kernel_costs.json: run `make kernel-costs` and commit what it writes"


COMMITTED = json.loads(kernel_costs.RECORD.read_text())
BY_CASE = {
    case: list(rows) for case, rows in groupby(COMMITTED["attention"], lambda row: row["case"])
}
NORMS = {(row["case"], row["operator"]): row for row in COMMITTED["norms"]}

# Issued over useful products, and moved over necessary bytes.
BOUNDS = {
    "forward": (1.25, 1.15),
    "backward_row": (0, 1.0),
    "backward_dkdv": (1.2, 1.05),
    "backward_dq": (1.1, 1.05),
    "backward": (1.15, 1.05),
}
# The last is relative to the definition's five products: scores and dout v^T are computed twice.
BACKWARD_OF_FIVE = 1.6

# Compilers may merge two loads of the same value, and only rows use special load instructions.
TOLERANCE = {"moved_far_keys": 0.05, "shared_accesses": 0.05, "bank_conflicts": 0.1}

cases = pytest.mark.parametrize("case", attention_costs.CASES, ids=str)


@pytest.fixture
def host_model() -> None:
    reason = extension.why_not_host_model()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("part", kernel_costs.PARTS)
def test_the_page_shows_the_record(part: str) -> None:
    assert kernel_costs.shown(part) == kernel_costs.PARTS[part].table(COMMITTED[part]).strip()


@cases
def test_committed_counts_are_within_bounds(case: Any) -> None:
    rows = BY_CASE[str(case)]
    for row in [*rows, attention_costs.backward(rows)]:
        products, moved = BOUNDS[row["kernel"]]
        # One query leaves most of a tile empty; only its bytes matter.
        if case.queries > 1:
            assert row["products"] <= products * row["useful_products"], row
        assert attention_costs.moved(row) <= moved * row["must_touch"], row
    if case.queries > 1:
        total = attention_costs.backward(rows)
        assert total["products"] <= BACKWARD_OF_FIVE * total["useful_products"] * 5 / 7


@cases
def test_committed_counts_are_plausible(case: Any) -> None:
    """No kernel computes or touches less than the minimum, and tiles are as high as
    ``must_touch`` assumes."""
    rows = {row["kernel"]: row for row in BY_CASE[str(case)]}
    for row in rows.values():
        assert row["products"] >= row["useful_products"]
        assert attention_costs.moved(row) >= row["must_touch"]
    for kernel in ("forward", "backward_dq"):
        height = attention_costs.tile_rows(kernel, case.head_dim)
        tiles = sum(1 for _ in attention_costs.query_tiles(case, height))
        assert rows[kernel]["blocks"] == case.num_heads * tiles
    height = attention_costs.tile_rows("backward_dkdv", case.head_dim)
    tiles = -(-case.seqlen // height) + -(-case.num_pivots // height)
    assert rows["backward_dkdv"]["blocks"] == case.num_kv_heads * tiles


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case.queries * case.num_heads > 5000))
        for case in attention_costs.CASES
    ],
    ids=str,
)
def test_counts_equal_the_committed_ones(case: Any, host_model: None) -> None:
    rows = attention_costs.count(case)
    for row, committed in zip(rows, BY_CASE[str(case)], strict=True):
        for name, value in committed.items():
            tolerance = value * TOLERANCE.get(name, 0)
            assert row[name] == value or abs(row[name] - value) <= tolerance, f"{name} {STALE}"

    # Bank conflicts occur where a dkdv block looks up its keys, not in the main loops: one query
    # gives as many as all queries.
    conflicts = {row["kernel"]: row["bank_conflicts"] for row in rows}
    one_query = {
        attention_costs.short_name(launch): launch["bank_conflicts"]
        for launch in attention_costs.launches(dataclasses.replace(case, q_len=1))
    }
    assert conflicts["backward_dkdv"] == one_query["backward_dkdv"]
    assert conflicts["forward"] == conflicts["backward_dq"] == 0


@pytest.mark.parametrize("q_len", [0, 150])
def test_needs_by_hand(q_len: int) -> None:
    """Pairs and rows counted one by one from the definition."""
    case = attention_costs.Case(
        300, 48, 2, 40, text_len=20, num_heads=4, num_kv_heads=2, q_len=q_len
    )
    pivots = case.layout().pivot_idx[0].tolist()
    seen_by = {
        i: {j for j in range(300) if region_of(i, j, 20, pivots, 48, 2)}
        for i in range(300 - case.queries, 300)
    }
    pairs = 4 * sum(map(len, seen_by.values()))
    keys = 4 * sum(
        len(set().union(*(seen_by[i] for i in range(begin, begin + 128) if i in seen_by)))
        for begin in (0, 128, 256)
    )
    others = [set(range(begin, begin + 128)) - set(pivots) for begin in (0, 128, 256)]
    queries = 4 * sum(
        any(key in seen for key in tile)
        for tile in (set(pivots), *others)
        for seen in seen_by.values()
    )
    row = 2 * 64
    assert attention_costs.needs(case) == {
        "forward": (2 * 64 * pairs, 4 * case.queries * (2 * row + 4) + keys * 2 * row),
        "backward_row": (0, 4 * case.queries * (2 * row + 4)),
        "backward_dkdv": (4 * 64 * pairs, 2 * 300 * 4 * row + queries * (2 * row + 8)),
        "backward_dq": (3 * 64 * pairs, 4 * case.queries * (3 * row + 8) + keys * 2 * row),
    }


# The widest rows: rows that do not fit a block of the sandwich run as two norms; rows that do not
# fit a block of one norm are read two or three times.
BY_TWO_NORMS = "512 x 16384"


@pytest.mark.parametrize("case", norm_costs.CASES, ids=str)
def test_committed_norms_move_each_activation_once(case: Any) -> None:
    rows = [row for (name, _), row in NORMS.items() if name == str(case)]
    assert [row["operator"] for row in rows] == list(norm_costs.PASSES)
    for row in rows:
        assert row["bank_conflicts"] == 0, row
        if str(case).startswith(BY_TWO_NORMS):
            assert row["activations"] >= row["floor"]
            continue
        assert row["passes"] == norm_costs.PASSES[row["operator"]]
        assert row["activations"] == row["floor"]
        assert not any("wide" in launch["kernel"] for launch in row["launches"])


@pytest.mark.parametrize(
    ("case", "bound"),
    [(norm_costs.CASES[0], 0.05), (norm_costs.CASES[1], 0.06)],
    ids=str,
)
def test_committed_norms_move_little_beside_activations(case: Any, bound: float) -> None:
    for operator in norm_costs.PASSES:
        row = NORMS[str(case), operator]
        assert row["parameters"] + row["partial_sums"] < bound * row["floor"], row


@pytest.mark.parametrize("case", norm_costs.CASES[:2], ids=str)
def test_norm_counts_equal_the_committed_ones(case: Any, host_model: None) -> None:
    """Counts a tenth of the rows: activations and statistics scale with the rows; parameters and
    partial sums scale with the blocks, whose number and size stay."""
    fewer = dataclasses.replace(case, rows=6 * norm_costs.NUM_SMS)
    for row in norm_costs.count(fewer):
        committed = NORMS[str(case), row["operator"]]
        for name in ("launches", "passes", "parameters", "partial_sums", "bank_conflicts"):
            assert row[name] == committed[name], f"{name} {STALE}"
        for name in ("floor", "activations", "statistics"):
            assert row[name] * case.rows == committed[name] * fewer.rows, f"{name} {STALE}"


def test_floors_by_hand() -> None:
    """Bytes of 8192 x 2560 activations, from the formulas in docs/kernel_costs.md."""
    matrix = 8192 * 2560 * 2
    floors = {
        "plain forward": (2, 2),
        "plain forward, relax tensor": (3, 3),
        "plain backward": (3, 3),
        "sandwich forward": (4, 7),
        "sandwich forward, relax tensor": (6, 10),
        "sandwich forward, no final norm": (3, 5),
        "sandwich backward": (6, 10),
        "sandwich backward, no final norm": (3, 4),
    }
    for case, which in zip(norm_costs.CASES[:2], (0, 1), strict=True):
        for operator, halves in floors.items():
            assert NORMS[str(case), operator]["floor"] == halves[which] * matrix
