"""What the attention's kernels compute and move stays close to what they must."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import region_of

from cogview_kernels import extension

ROOT = Path(__file__).resolve().parents[1]
STALE = "differs from docs/kernel_costs.json: run `make kernel-costs` and commit what it writes"


def load_kernel_costs() -> ModuleType:
    path = ROOT / "benchmarks" / "kernel_costs.py"
    spec = importlib.util.spec_from_file_location("kernel_costs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


kernel_costs = load_kernel_costs()
COMMITTED = json.loads(kernel_costs.RECORD.read_text())
BY_CASE = {case: list(rows) for case, rows in groupby(COMMITTED, lambda row: row["case"])}

# Issued over useful products, moved bytes over those that must be touched.
BOUNDS = {
    "forward": (1.25, 1.15),
    "backward_row": (0, 1.0),
    "backward_dkdv": (1.2, 1.05),
    "backward_dq": (1.1, 1.05),
    "backward": (1.15, 1.05),
}
# The last, against the five products of the definition: scores and dout v^T are computed twice.
BACKWARD_OF_FIVE = 1.6

# A compiler may join two loads of the same number, and what is not a row is loaded by plain code.
TOLERANCE = {"moved_far_keys": 0.05, "shared_accesses": 0.05, "bank_conflicts": 0.1}

cases = pytest.mark.parametrize("case", kernel_costs.CASES, ids=str)


@pytest.fixture
def host_model() -> None:
    reason = extension.why_not_host_model()
    if reason is not None:
        pytest.skip(reason)


def test_the_page_shows_the_record() -> None:
    text = kernel_costs.PAGE.read_text()
    shown = text.split(kernel_costs.BEGIN)[1].split(kernel_costs.END)[0]
    assert shown.strip() == kernel_costs.table(COMMITTED).strip()


@cases
def test_committed_counts_are_within_bounds(case: Any) -> None:
    rows = BY_CASE[str(case)]
    for row in [*rows, kernel_costs.backward(rows)]:
        products, moved = BOUNDS[row["kernel"]]
        # One query leaves most of a tile of products empty: what it costs is its bytes.
        if case.queries > 1:
            assert row["products"] <= products * row["useful_products"], row
        assert kernel_costs.moved(row) <= moved * row["must_touch"], row
    if case.queries > 1:
        total = kernel_costs.backward(rows)
        assert total["products"] <= BACKWARD_OF_FIVE * total["useful_products"] * 5 / 7


@cases
def test_committed_counts_are_plausible(case: Any) -> None:
    """No kernel computes less than is useful or touches less than it must, and tiles are as high
    as ``must_touch`` supposes."""
    rows = {row["kernel"]: row for row in BY_CASE[str(case)]}
    for row in rows.values():
        assert row["products"] >= row["useful_products"]
        assert kernel_costs.moved(row) >= row["must_touch"]
    for kernel in ("forward", "backward_dq"):
        height = kernel_costs.tile_rows(kernel, case.head_dim)
        tiles = sum(1 for _ in kernel_costs.query_tiles(case, height))
        assert rows[kernel]["blocks"] == case.num_heads * tiles
    height = kernel_costs.tile_rows("backward_dkdv", case.head_dim)
    tiles = -(-case.seqlen // height) + -(-case.num_pivots // height)
    assert rows["backward_dkdv"]["blocks"] == case.num_kv_heads * tiles


@cases
def test_counts_are_those_committed(case: Any, host_model: None) -> None:
    rows = kernel_costs.count(case)
    for row, committed in zip(rows, BY_CASE[str(case)], strict=True):
        for name, value in committed.items():
            tolerance = value * TOLERANCE.get(name, 0)
            assert row[name] == value or abs(row[name] - value) <= tolerance, f"{name} {STALE}"

    # Bank conflicts are where a dkdv block looks its keys up, not in the main loops: as many where
    # one query is left to loop over as where all are.
    conflicts = {row["kernel"]: row["bank_conflicts"] for row in rows}
    one_query = {
        kernel_costs.short_name(launch): launch["bank_conflicts"]
        for launch in kernel_costs.launches(dataclasses.replace(case, q_len=1))
    }
    assert conflicts["backward_dkdv"] == one_query["backward_dkdv"]
    assert conflicts["forward"] == conflicts["backward_dq"] == 0


@pytest.mark.parametrize("q_len", [0, 150])
def test_needs_by_hand(q_len: int) -> None:
    """Pairs and rows counted one by one from the definition."""
    case = kernel_costs.Case(300, 48, 2, 40, text_len=20, num_heads=4, num_kv_heads=2, q_len=q_len)
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
    assert kernel_costs.needs(case) == {
        "forward": (2 * 64 * pairs, 4 * case.queries * (2 * row + 4) + keys * 2 * row),
        "backward_row": (0, 4 * case.queries * (2 * row + 4)),
        "backward_dkdv": (4 * 64 * pairs, 2 * 300 * 4 * row + queries * (2 * row + 8)),
        "backward_dq": (3 * 64 * pairs, 4 * case.queries * (3 * row + 8) + keys * 2 * row),
    }
