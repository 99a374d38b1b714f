"""The committed facts of the compiled kernels are sound, and the built module still matches."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import table as kernel_table
from cogview_kernels import extension

ROOT = Path(__file__).resolve().parents[1]

STALE = "differs from docs/kernels.json: run `make kernel-table` and commit what it writes"

# Kernels whose reads are narrower than 16 bytes: columns of sums, the pivots. Other kernels also
# write full rows, except those that write one number per row or per tensor.
NARROW_LOADS = ("_partial_sums_kernel", "_reduce_kernel", "_far_keys_kernel")
NARROW_STORES = (*NARROW_LOADS, "_backward_row_kernel", "_peak_kernel")
# Rows this wide do not fit a small SM with float32 gradients; the launcher picks another kernel.
FOUR_VECTORS = re.compile(r"pb_relax_layer_norm_backward_kernel<\w+, \w+, 4>")
SMALL = re.compile("sm_(86|89|120)")
TENSOR_CORES = ("attention_forward_kernel", "_backward_dq_kernel", "_backward_dkdv_kernel")


COMMITTED = json.loads(kernel_table.RECORD.read_text())
LAUNCHES: dict[int, dict[str, tuple[int, int]]] = {}
for _row in COMMITTED["kernels"]:
    _launches = LAUNCHES.setdefault(kernel_table.shared_kib(_row["architecture"]), {})
    _launches[_row["kernel"]] = _row["threads"], _row["dynamic_shared"]
KERNELS = {row["kernel"] for row in COMMITTED["kernels"]}


def by_name(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["kernel"], row["architecture"]): row for row in rows}


@pytest.fixture(scope="module")
def ptxas() -> dict[tuple[str, str], dict[str, Any]]:
    """What ptxas reported for the built kernels, on the committed architectures."""
    if not extension.kernel_resources():
        pytest.skip("built without kernels, or with DEBUG=1")
    known = {row["architecture"] for row in COMMITTED["kernels"]}
    rows = [row for row in extension.kernel_resources() if row["architecture"] in known]
    if not rows:
        pytest.skip(f"the kernels were built for none of {', '.join(sorted(known))}")
    return by_name([row | {"kernel": kernel_table.source_name(row["kernel"])} for row in rows])


@pytest.fixture(scope="module")
def built(ptxas: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Facts read from the built module's machine code, in the format of the committed record."""
    if kernel_table.cuobjdump() is None or shutil.which("c++filt") is None:
        pytest.skip("no cuobjdump (the dev extra has it) or no c++filt")
    kernels = {row["kernel"] for row in kernel_table.disassemble(kernel_table.module())["kernels"]}
    assert kernels <= KERNELS, STALE
    facts = kernel_table.record([kernel_table.module()], LAUNCHES)
    facts["kernels"] = [
        row for row in facts["kernels"] if (row["kernel"], row["architecture"]) in ptxas
    ]
    return facts


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_bytes", "expected"),
    [
        # 168 registers x 32 = 5376 a warp, 3 in a quarter of 16384, 12 in all, 4 a CTA.
        ("sm_90a", 128, 168, 0, (3, "registers")),
        # 33 are 40 (1056 -> 1280 in units of 256): 12 a quarter, 48 warps, 8 a CTA.
        ("sm_80", 256, 33, 0, (6, "registers")),
        # The same where an SM has 48 warps: the first limit wins a tie.
        ("sm_86", 256, 33, 0, (6, "threads")),
        # 104 registers: 3328 a warp, 4 in a quarter, 16 warps (the whole would hold 19), 3 a CTA.
        ("sm_100", 96, 104, 0, (5, "registers")),
        # 48 KiB and the system's 1 KiB: 4 x 49 = 196 of 228, 3 x 49 = 147 of 164, 2 of 100.
        ("sm_90a", 128, 64, 48 * 1024, (4, "shared")),
        ("sm_80", 128, 64, 48 * 1024, (3, "shared")),
        ("sm_120", 128, 64, 48 * 1024, (2, "shared")),
        # One byte is a unit of 128: 1152 a CTA fit 88 times, and 24 or 16 CTAs are the most.
        ("sm_89", 32, 16, 1, (24, "CTAs")),
        ("sm_86", 32, 16, 1, (16, "CTAs")),
        # 100 KiB hold no CTA of 99 KiB and a byte, and one of 99 KiB.
        ("sm_120", 128, 64, 99 * 1024, (1, "shared")),
        ("sm_120", 128, 64, 99 * 1024 + 1, (0, "shared")),
    ],
)
def test_ctas_per_sm_by_hand(
    architecture: str, threads: int, registers: int, shared_bytes: int, expected: tuple[int, str]
) -> None:
    assert kernel_table.ctas_per_sm(architecture, threads, registers, shared_bytes) == expected


@pytest.mark.parametrize(
    ("mnemonic", "columns"),
    [
        ("LDG.E.128.CONSTANT", {"loads_16"}),
        ("LDG.E.ENL2.256", {"loads_16"}),
        ("LDG.E.U16", {"narrow"}),
        ("STG.E.128", {"stores_16"}),
        ("STG.E", {"narrow"}),
        ("LDGSTS.E.BYPASS.128.ZFILL", {"cp_async_16"}),
        ("LDGSTS.E", {"narrow"}),
        ("LDGDEPBAR", set()),
        ("LDSM.16.MT88.4", {"ldmatrix"}),
        ("LDS.128", {"shared_loads_16"}),
        ("LDS.U.64", set()),
        ("STS.128", {"shared_stores_16"}),
        ("STS", set()),
        ("HMMA.16816.F32.BF16", {"mma"}),
        ("HGMMA.64x64x16.F32", {"mma"}),
        ("FFMA", set()),
        ("STL.64", {"local"}),
    ],
)
def test_columns_of_an_instruction(mnemonic: str, columns: set[str]) -> None:
    assert kernel_table.columns_of(mnemonic) == columns


def test_the_page_shows_the_record() -> None:
    text = kernel_table.PAGE.read_text()
    shown = text.split(kernel_table.BEGIN)[1].split(kernel_table.END)[0]
    assert shown.strip() == kernel_table.tables(COMMITTED)


def assert_sound(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        name = f"{row['kernel']} on {row['architecture']}"
        kernel = row["kernel"].partition("<")[0]
        assert row["local"] == 0, f"{name}: spills, or an array in local memory"
        if not (FOUR_VECTORS.fullmatch(row["kernel"]) and SMALL.fullmatch(row["architecture"])):
            assert row["ctas_per_sm"] >= 1, f"{name}: does not fit on an SM"
        if not kernel.endswith(NARROW_LOADS):
            assert row["loads_16"] + row["cp_async_16"] > 0, f"{name}: no load of sixteen bytes"
        if not kernel.endswith(NARROW_STORES):
            assert row["stores_16"] > 0, f"{name}: no store of sixteen bytes"
        for column in ("mma", "ldmatrix"):
            expected = kernel.endswith(TENSOR_CORES)
            assert (row[column] > 0) == expected, f"{name}: {row[column]} {column}"


def accesses_of_a_row(kernel: str) -> tuple[int, int] | None:
    """How many 16-byte vectors of a row one thread copies to shared memory and stores; None where
    the kernel does not keep rows there."""
    match = re.fullmatch(r"(\w+)_kernel<(\w+), (\w+), (\d)>", kernel)
    if match is None or "three_region" in kernel:
        return None
    name, *types, vectors = match.groups()
    x, y = (2 if dtype == "float" else 1 for dtype in types)
    copied, stored = {
        "pb_relax_layer_norm_forward": (x, y),
        "pb_relax_layer_norm_backward": (x + y, x),
        "sandwich_residual_forward": (x + y, 2 * y),
        "sandwich_residual_backward": (x + 3 * y, x + y),
    }[name]
    return int(vectors) * copied, int(vectors) * stored


def assert_rows_move_in_sixteen_bytes(rows: list[dict[str, Any]]) -> None:
    """For aligned rows; the same code holds the path for unaligned ones."""
    for row in rows:
        accesses = accesses_of_a_row(row["kernel"])
        if accesses is None:
            continue
        name = f"{row['kernel']} on {row['architecture']}"
        copied, stored = accesses
        assert row["cp_async_16"] >= copied, f"{name}: rows arrive in smaller pieces"
        assert row["shared_loads_16"] >= copied, f"{name}: rows are taken up in smaller pieces"
        assert row["stores_16"] >= stored, f"{name}: rows are stored in smaller pieces"


def test_committed_kernels_are_sound() -> None:
    """All architectures have the same kernels, with the instructions that the sources ask for."""
    assert_sound(COMMITTED["kernels"])
    assert_rows_move_in_sixteen_bytes(COMMITTED["kernels"])
    rows = by_name(COMMITTED["kernels"])
    architectures = {f"sm_{name.replace('.', '')}" for name in kernel_table.ARCHITECTURES}
    assert set(rows) == {(kernel, other) for kernel, _ in rows for other in architectures}
    assert max(row["static_shared"] for row in rows.values()) <= 2048, "kMaxArrayBytes, launch.h"


def test_every_row_kernel_of_the_norms_is_committed() -> None:
    """One for each pair of dtypes and number of vectors per thread."""
    pairs = [("float", "float")]
    pairs += [(x, y) for x in ("Half", "BFloat16") for y in (x, "float")]
    kernels = {
        f"{name}_kernel<{x}, {y}, {vectors}>"
        for name, up_to in {
            "pb_relax_layer_norm_forward": 2,
            "pb_relax_layer_norm_backward": 4,
            "sandwich_residual_forward": 2,
            "sandwich_residual_backward": 2,
        }.items()
        for x, y in pairs
        for vectors in (1, 2, 4)
        if vectors <= up_to
    }
    assert kernels == {kernel for kernel in KERNELS if accesses_of_a_row(kernel) is not None}


def test_built_kernels_are_the_committed_ones(
    ptxas: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """Needs no disassembler: names, spills, shared memory, CTAs per SM."""
    built_for = {architecture for _, architecture in ptxas}
    committed = by_name(COMMITTED["kernels"])
    assert set(ptxas) == {key for key in committed if key[1] in built_for}, STALE
    for key, row in ptxas.items():
        expected = committed[key]
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, key
        assert row["static_smem_bytes"] == expected["static_shared"], f"{key} {STALE}"
        shared = expected["static_shared"] + expected["dynamic_shared"]
        ctas, _ = kernel_table.ctas_per_sm(key[1], expected["threads"], row["registers"], shared)
        assert ctas >= expected["ctas_per_sm"], f"{key}: {ctas} CTAs on an SM; {STALE}"


def test_launches_of_the_host_model() -> None:
    """Blocks have the committed number of threads and bytes of shared memory."""
    reason = extension.why_not_host_model()
    if reason is not None:
        pytest.skip(reason)
    assert kernel_table.launches() == LAUNCHES, STALE


def test_built_machine_code(
    built: dict[str, Any], ptxas: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """With the recorded nvcc every figure is equal; with another, the important ones are."""
    found = by_name(built["kernels"])
    for key, row in ptxas.items():
        assert found[key]["registers"] == row["registers"], key
        assert found[key]["static_shared"] == row["static_smem_bytes"], key
    assert_sound(built["kernels"])
    assert_rows_move_in_sixteen_bytes(built["kernels"])
    if built["nvcc"] == COMMITTED["nvcc"]:
        committed = by_name(COMMITTED["kernels"])
        for key, row in found.items():
            assert row == committed.get(key), f"{key} {STALE}"
