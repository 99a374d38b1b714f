"""The committed facts of the compiled kernels are sound, and the built module still matches."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_layer_norm_kernels import variants

from benchmarks.kernels import table
from benchmarks.kernels.counting import DOCS, Row, between
from cogview_kernels import extension

STALE = "differs from docs/kernels.json: run `make kernel-table` and commit what it writes"

# Kernels whose reads are narrower than 16 bytes: columns of sums, the pivots. Other kernels also
# write full rows, except those that write one number per row or per tensor.
NARROW_LOADS = ("_partial_sums_kernel", "_reduce_kernel", "_far_keys_kernel")
NARROW_STORES = (*NARROW_LOADS, "_backward_row_kernel", "_peak_kernel")
# Rows this wide do not fit a small SM with float32 gradients; the launcher picks another kernel.
FOUR_VECTORS = re.compile(r"pb_relax_layer_norm_backward_kernel<\w+, \w+, 4, false>")
SMALL = ("sm_86", "sm_120")
TENSOR_CORES = (
    "attention_forward_kernel",
    "_decode_kernel",
    "_backward_dq_kernel",
    "_backward_dkdv_kernel",
)


SOURCES = DOCS.parent / "csrc" / "pb_relax_layer_norm"
COMMITTED = json.loads((DOCS / "kernels.json").read_text())
ROWS = {(row["kernel"], row["architecture"]): row for row in COMMITTED["kernels"]}
KERNELS = {kernel for kernel, _ in ROWS}
LAUNCHES: table.Launches = {}
for (_kernel, _architecture), _row in ROWS.items():
    _launches = LAUNCHES.setdefault(table.limits(_architecture)[0], {})
    _launches[_kernel] = _row["threads"], _row["dynamic_shared"]


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
        # 48 KiB and the system's 1 KiB: 3 x 49 = 147 of 164.
        ("sm_80", 128, 64, 48 * 1024, (3, "shared")),
        # One byte is a unit of 128: 1152 a CTA fit 88 times, and 16 CTAs are the most.
        ("sm_86", 32, 16, 1, (16, "CTAs")),
        # 100 KiB hold one CTA of 99 KiB, and none with a byte more.
        ("sm_120", 128, 64, 99 * 1024, (1, "shared")),
        ("sm_120", 128, 64, 99 * 1024 + 1, (0, "shared")),
    ],
)
def test_ctas_per_sm_by_hand(
    architecture: str, threads: int, registers: int, shared_bytes: int, expected: tuple[int, str]
) -> None:
    assert table.ctas_per_sm(architecture, threads, registers, shared_bytes) == expected


@pytest.mark.parametrize(
    ("column", "instructions"),
    [
        ("loads_16", ("LDG.E.128.CONSTANT R4", "@!P0 LDG.E.ENL2.256 R4")),
        ("stores_16", ("@P1 STG.E.128 [R4]",)),
        ("narrow", ("LDG.E.U16 R128", "STG.E [R4]", "LDGSTS.E [R4]")),
        ("cp_async_16", ("LDGSTS.E.BYPASS.128.ZFILL [R4]",)),
        ("ldmatrix", ("LDSM.16.MT88.4 R4",)),
        ("shared_loads_16", ("LDS.128 R4",)),
        ("shared_stores_16", ("STS.128 [R4]",)),
        ("mma", ("HMMA.16816.F32.BF16 R4", "HGMMA.64x64x16.F32 R4")),
        ("local", ("STL.64 [R4]", "LDL R4")),
        ("grid_control", ("ACQBULK", "PREEXIT")),
        (None, ("LDGDEPBAR", "LDS.U.64 R4", "STS [R4], R128", "FFMA R4")),
    ],
)
def test_column_of_an_instruction(column: str | None, instructions: tuple[str, ...]) -> None:
    for instruction in instructions:
        fact = table.FACT.match(f"        /*01f0*/                   {instruction} ;  /* 0x0080 */")
        assert (fact and fact.lastgroup) == column, instruction


def test_the_page_shows_the_record() -> None:
    page = (DOCS / "kernels.md").read_text()
    assert between(page, "kernels") == table.tables(COMMITTED)


def accesses_of_a_row(kernel: str) -> tuple[int, int] | None:
    """How many 16-byte vectors of a row one thread copies to shared memory and stores at once; None
    where the kernel does not keep rows there."""
    match = re.fullmatch(r"(pb_relax\w+ward|sandwich\w+)_kernel<(\w+), (\w+)(.*)>", kernel)
    if match is None:
        return None
    name, *types, rest = match.groups()
    x, y = (2 if dtype == "float" else 1 for dtype in types)
    vectors = int((re.findall(r"\d", rest) or ["1"])[0])
    copied, stored = {
        "pb_relax_layer_norm_forward": (4 * (x + (y if "true" in rest else 0)), y),
        "pb_relax_layer_norm_backward": (x + y, x),
        "sandwich_residual_forward": (4 * (x + y), 2 * y),
        "sandwich_residual_backward": (x + 3 * y, x + y),
    }[name]
    return vectors * copied, vectors * stored


def is_added_up_by_tensor_cores(kernel: str) -> bool:
    """16-bit rows of the norms' forward."""
    return re.match(r"(pb_relax|sandwich)\w+_forward(_wide)?_kernel<(Half|BF)", kernel) is not None


def assert_sound(rows: list[Row]) -> None:
    for row in rows:
        name = f"{row['kernel']} on {row['architecture']}"
        kernel = row["kernel"].partition("<")[0]
        assert row["local"] == 0, f"{name}: spills, or an array in local memory"
        if not (FOUR_VECTORS.fullmatch(row["kernel"]) and row["architecture"] in SMALL):
            assert row["ctas_per_sm"] >= 1, f"{name}: does not fit on an SM"
        if not kernel.endswith(NARROW_LOADS):
            assert row["loads_16"] + row["cp_async_16"] > 0, f"{name}: no load of sixteen bytes"
        if not kernel.endswith(NARROW_STORES):
            assert row["stores_16"] > 0, f"{name}: no store of sixteen bytes"
        multiplies = kernel.endswith(TENSOR_CORES)
        assert (row["ldmatrix"] > 0) == multiplies, f"{name}: {row['ldmatrix']} ldmatrix"
        multiplies |= is_added_up_by_tensor_cores(row["kernel"])
        assert (row["mma"] > 0) == multiplies, f"{name}: {row['mma']} mma"
        # A backward says when the sums of its partial sums may start, but for rows too wide for a
        # block; they wait for its end.
        overlaps = accesses_of_a_row(row["kernel"]) is not None and "_backward_" in kernel
        overlaps |= kernel.endswith("_partial_sums_kernel")
        overlaps &= int(re.sub(r"\D", "", row["architecture"])) >= 90
        assert (row["grid_control"] > 0) == overlaps, f"{name}: {row['grid_control']} grid_control"
        # Aligned rows; the same code holds the path for unaligned ones.
        copied, stored = accesses_of_a_row(row["kernel"]) or (0, 0)
        for column, least in (
            ("cp_async_16", copied),
            ("shared_loads_16", stored),
            ("stores_16", stored),
        ):
            assert row[column] >= least, f"{name}: {column}, rows move in smaller pieces"


def test_committed_kernels_are_sound() -> None:
    """All architectures have the same kernels, with the instructions that the sources ask for."""
    assert_sound(COMMITTED["kernels"])
    architectures = {f"sm_{name.replace('.', '')}" for name in table.ARCHITECTURES}
    assert set(ROWS) == {(kernel, other) for kernel in KERNELS for other in architectures}
    assert max(row["static_shared"] for row in ROWS.values()) <= 3072, "kMaxArrayBytes, launch.h"
    assert {
        kernel for kernel in KERNELS if kernel.startswith(("pb_relax", "sandwich"))
    } == variants()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("architecture", ["80", "90a", "120"])
def test_partial_sums_wait_before_they_read(architecture: str, tmp_path: Path) -> None:
    """The wait stands before all that touches global memory and before each way out. With the
    recorded nvcc, all loads of a thread stand before the first sum."""
    if (program := table.cuobjdump()) is None:
        pytest.skip("no cuobjdump (the dev extra has it)")
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    version = nvcc.partition("release ")[2].partition("\n")[0]
    source, binary = SOURCES / "pb_relax_layer_norm_partial_sums.cu", tmp_path / "sums.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", target, "-std=c++17", "-O3", "-cubin", str(source), "-o", str(binary)]
    subprocess.run(command, check=True)
    dump = subprocess.run([program, "-sass", str(binary)], capture_output=True, text=True)
    functions = dump.stdout.split("Function : ")[1:]
    assert len(functions) == 2
    for code in functions:
        found = re.findall(r"\b(ACQBULK|EXIT|LDG\S*|LD|STG|FADD)\b", code)
        assert (found[0] == "ACQBULK") == (architecture != "80")
        assert not any("CONSTANT" in name for name in found), "loads that may be moved"
        if version in COMMITTED["nvcc"]:
            found = [name for name in found if name not in ("ACQBULK", "EXIT")]
            assert all("LDG" in name for name in found[:12]) and found[12] == "FADD"
            assert not any("LD" in name for name in found[12:])


def test_launches_of_the_host_model() -> None:
    """Blocks have the committed number of threads and bytes of shared memory."""
    if reason := extension.why_not_host_model():
        pytest.skip(reason)
    assert table.launches() == LAUNCHES, STALE


def test_built_kernels_are_the_committed_ones() -> None:
    """With the recorded nvcc every figure is equal; with another, the important ones are."""
    if not extension.kernel_resources():
        pytest.skip("no kernels were built, or with DEBUG=1")
    if table.cuobjdump() is None or shutil.which("c++filt") is None:
        pytest.skip("no cuobjdump (the dev extra has it) or no c++filt")
    built = table.record([table.MODULE], LAUNCHES)
    known = {architecture for _, architecture in ROWS}
    rows = [row for row in built["kernels"] if row["architecture"] in known]
    assert {row["kernel"] for row in rows} <= KERNELS, STALE
    for architecture in {row["architecture"] for row in rows}:
        assert len(KERNELS) == sum(row["architecture"] == architecture for row in rows), STALE
    for row in rows:
        committed = ROWS[row["kernel"], row["architecture"]]
        assert row["ctas_per_sm"] >= committed["ctas_per_sm"], f"{row} {STALE}"
        assert row == committed or built["nvcc"] != COMMITTED["nvcc"], f"{row} {STALE}"
    assert_sound(rows)
