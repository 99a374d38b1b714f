"""Writes docs/kernels.json and the tables of docs/kernels.md: what the compiler made of kernels.

    python -m benchmarks.kernels.table     # needs nvcc, c++filt and the dev extra; no GPU

Reads the built module with cuobjdump. Architectures that it was not built for are compiled into
build/kernel_table first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import costs
from benchmarks.kernels.costs import NormCase
from benchmarks.kernels.counting import DOCS, Row, markdown, write
from benchmarks.suite.cases import AttentionCase
from cogview.files import atomic_write
from cogview_kernels import extension

Launches = dict[int, dict[str, tuple[int, int]]]  # threads and bytes of dynamic shared memory
CACHE = DOCS.parent / "build" / "kernel_table"
ARCHITECTURES = ("8.0", "8.6", "9.0a", "10.0", "12.0")

# Of the norms: odd, too wide for shared memory, 4 vectors to a thread of the backward, 1, 2.
NORM_WIDTHS = (2561, 32768, 10240, 768, 2560)

# Per SM: KiB of shared memory, warps, CTAs ("Technical Specifications per Compute Capability" in
# the CUDA C++ Programming Guide). Register file and allocation units are the same for all.
SM_LIMITS = {
    "80": (164, 64, 32),
    "86": (100, 48, 16),
    "89": (100, 48, 24),
    "90": (228, 64, 32),
    "100": (228, 64, 32),
    "120": (100, 48, 24),
}
SM_REGISTERS, SM_PARTITIONS = 65536, 4
REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 256, 128, 1024  # per warp; per CTA; per CTA

# Mnemonics of SASS: the first pattern that fits is the column.
INSTRUCTIONS = {
    "loads_16": r"LDG\b\S*\.(?:128|256)",
    "stores_16": r"STG\b\S*\.(?:128|256)",
    "cp_async_16": r"LDGSTS\b\S*\.128",
    "shared_loads_16": r"LDS\b\S*\.128",
    "shared_stores_16": r"STS\b\S*\.128",
    "narrow": r"(?:LDG|STG|LDGSTS)\b",  # other global accesses: of less than 16 bytes
    "ldmatrix": r"LDSM\b",
    "mma": r"\w*MMA\b",
    "local": r"(?:LDL|STL)\b",  # registers spilled, or arrays that did not become registers
    "grid_control": r"(?:ACQBULK|PREEXIT)\b",  # griddepcontrol.wait, .launch_dependents
}
# What cuobjdump prints, line by line: a fact belongs to the architecture and kernel before it.
FACT = re.compile(
    r"^(?:arch = (?P<architecture>\w+)"
    r"|(?:\s+Function (?:: )?|\.nv\.info\.)(?P<kernel>\w+)"
    r"|\s+Tool Version: .*release (?P<nvcc>.*)"
    r"|\s+REG:(?P<registers>\d+) .*SHARED:(?P<shared>\d+)"
    r"|\s+Attribute:\s+EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+(?P<bound>\w+ \w+ \w+)"
    r"|\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(?:"
    + "|".join(f"(?P<{column}>{form})" for column, form in INSTRUCTIONS.items())
    + "))",
    re.MULTILINE,
)


def limits(architecture: str) -> tuple[int, int, int]:
    """Of an SM; architecture as "9.0a" or "sm_90a"."""
    return SM_LIMITS[re.sub(r"sm_|\.|[af]$", "", architecture)]


def ctas_per_sm(
    architecture: str, threads: int, registers: int, shared_bytes: int
) -> tuple[int, str]:
    """How many CTAs fit on an SM at once, and what keeps the next one out.

    The arithmetic of cuda_occupancy.h: registers are dealt to warps in units, within the quarter
    of the SM that a warp lives in; each CTA takes 1 KiB of shared memory for the system.
    """
    shared_kib, max_warps, max_ctas = limits(architecture)
    warps = -(-threads // 32)
    registers_per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    shared = -(-(shared_bytes + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    room = {
        "CTAs": max_ctas,
        "threads": max_warps // warps,
        "registers": SM_REGISTERS // SM_PARTITIONS // registers_per_warp * SM_PARTITIONS // warps,
        "shared": shared_kib * 1024 // shared,
    }
    limit = min(room, key=lambda name: room[name])
    return room[limit], limit


def cuobjdump() -> str | None:
    """The program of the nvidia-cuda-cuobjdump wheel, else of a toolkit on the PATH."""
    wheels = distributions(name="nvidia-cuda-cuobjdump")
    found = [file for wheel in wheels for file in wheel.files or () if file.stem == "cuobjdump"]
    return str(found[0].locate()) if found else shutil.which("cuobjdump")


MODULE = Path(extension._C.__file__ if extension._C is not None else "")


def disassemble(path: Path) -> dict[str, Any]:
    """{"nvcc": its version, "kernels": a row per kernel and architecture, in the module's order};
    "threads" is the launch bound.

    Takes a minute, so what was found is kept for the module's next reading.
    """
    content = hashlib.sha256(path.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    cache = CACHE / f"{content[:16]}.json"
    if cache.is_file():
        return json.loads(cache.read_text())
    program = cuobjdump()
    if program is None:
        raise SystemExit("cuobjdump is not installed: pip install -e '.[dev]'")
    rows: dict[tuple[str, str], Row] = {}
    architecture = kernel = nvcc = ""
    for what in ("-res-usage", "-elf", "-sass"):
        for fact in FACT.finditer(_output([program, what, str(path)])):
            match fact.lastgroup:
                case "architecture":
                    architecture = fact["architecture"]
                case "kernel":
                    kernel = fact["kernel"]
                case "nvcc":
                    nvcc = fact["nvcc"]
                case "shared":
                    system = SHARED_RESERVED if int(re.sub(r"\D", "", architecture)) >= 90 else 0
                    row = rows[kernel, architecture] = {"registers": int(fact["registers"])}
                    row["static_shared"] = max(0, int(fact["shared"]) - system)
                    row |= {"threads": 0} | dict.fromkeys(INSTRUCTIONS, 0)
                case "bound":
                    bound = math.prod(int(number, 16) for number in fact["bound"].split())
                    rows[kernel, architecture]["threads"] = bound
                case str(instruction):
                    rows[kernel, architecture][instruction] += 1

    names = _output(["c++filt"], "\n".join(kernel for kernel, _ in rows)).splitlines()
    kernels = [
        {"kernel": source_name(name), "architecture": architecture, **row}
        for name, ((_, architecture), row) in zip(names, rows.items(), strict=True)
    ]
    found = {"nvcc": nvcc, "kernels": kernels}
    with atomic_write(cache) as partial:
        partial.write_text(json.dumps(found))
    return found


def _output(command: list[str], given: str = "") -> str:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def source_name(name: str) -> str:
    """A kernel and its template arguments as the source writes them, whoever printed the name;
    a kernel of a family with the family's namespace."""
    name = re.sub(r"^void |\(anonymous namespace\)::|cogview::", "", name).replace(" >", ">")
    name, bracket, arguments = name.partition("(")[0].partition("<")
    name += bracket + re.sub(r"\w+::", "", arguments)
    return name.replace("__half", "Half").replace("__nv_bfloat16", "BFloat16")


def launches() -> Launches:
    """Of each kernel, as the host model saw them, for each size of an SM's shared memory in KiB:
    the norms take what they find."""
    sizes = sorted({limits(architecture)[0] for architecture in ARCHITECTURES})
    # So many multiprocessors that the keys which many queries see are dealt out to several blocks,
    # and so is the list of a single query.
    attention = [
        launch
        for dtype, dim in product(("float16", "bfloat16"), (32, 64, 96, 128))
        for seqlen, window, queries in ((65, 8, 0), (600, 600, 1))
        for launch in costs.attention_launches(
            AttentionCase(seqlen, window, 1, 2, 1, 1, 0, dim, 4, queries, dtype), 132
        ).values()
    ]
    cases = [
        NormCase(-(-16384 // hidden), hidden, residual, f)  # rows enough to fill a block
        for hidden, f in product(NORM_WIDTHS, (torch.float32, torch.float16, torch.bfloat16))
        for residual in dict.fromkeys((f, torch.float32))
    ]
    found: Launches = {}
    for kib in sizes:
        norms = [item for case in cases for item in costs.norm_launches(case, 1, kib - 1).items()]
        # The plain norm last: the sandwich launches its kernels too, with a residual.
        norms.sort(key=lambda item: item[0].startswith("plain"))
        found[kib] = {
            source_name(launch["kernel"]): (launch["threads"], launch["dynamic_shared"])
            for launch in (*attention, *(one for _, launched in norms for one in launched))
        }
    # A kernel for which a block has no room stands there with the launch of a larger one.
    return {kib: found[sizes[-1]] | found[kib] for kib in sizes}


def missing_architectures() -> list[Path]:
    """A module with those of ARCHITECTURES that the built module lacks, if there are any."""
    built = [name.removesuffix("+PTX").rstrip("af") for name in extension.architectures()]
    missing = " ".join(name for name in ARCHITECTURES if name.rstrip("af") not in built)
    if not missing:
        return []
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += [f"--build-lib={CACHE}/lib", f"--build-temp={CACHE}/temp"]
    wish = {"COGVIEW_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": missing}
    wish |= {"COGVIEW_KERNELS_HOST_MODEL": "0", "DEBUG": "0"}
    subprocess.run(command, cwd=DOCS.parent, env=os.environ | wish, check=True)
    return [CACHE / "lib" / "cogview_kernels" / MODULE.name]


def record(modules: list[Path], launched: Launches) -> dict[str, Any]:
    """Facts of all kernels of the modules, in the page's order."""
    found = [disassemble(path) for path in modules]
    (nvcc,) = {part["nvcc"] for part in found}
    rows = [row for part in found for row in part["kernels"]]
    for row in rows:
        bound = row["threads"]
        launch = launched[limits(row["architecture"])[0]][row["kernel"]]
        row["threads"], row["dynamic_shared"] = launch
        assert row["threads"] <= bound, f"{row['kernel']}: more threads than its launch bound"
        shared = row["static_shared"] + row["dynamic_shared"]
        row["ctas_per_sm"], row["limit"] = ctas_per_sm(
            row["architecture"], row["threads"], row["registers"], shared
        )
    return {"nvcc": nvcc, "kernels": sorted(rows, key=_order)}


def _order(row: Row) -> tuple[Any, ...]:
    """The template's arguments by length, so that 128 comes after 32."""
    name, architecture = row["kernel"], re.sub(r"\D", "", row["architecture"])
    return name.partition("<")[0], len(name), name, int(architecture)


# Columns of the page: of the record's row, what a reader decides by.
SHOWN = ["threads", "registers", "dynamic_shared", "ctas_per_sm", "limit"]
SHOWN += [name for name in INSTRUCTIONS if name != "grid_control"]


def tables(facts: dict[str, Any]) -> str:
    """A table per kernel with a row per instantiation; as many values as architectures where they
    differ."""
    parts = [f"nvcc {facts['nvcc']}. Compute capabilities: {', '.join(ARCHITECTURES)}."]
    for kernel, of_kernel in groupby(facts["kernels"], lambda row: row["kernel"].partition("<")[0]):
        lines = []
        for name, group in groupby(of_kernel, lambda row: row["kernel"]):
            rows = list(group)
            line = {"instantiation": f"`{name.removeprefix(kernel)}`"}
            for column in SHOWN:
                values = [str(row[column]) for row in rows]
                text = values[0] if len(set(values)) == 1 else ", ".join(values)
                line[column] = text
            lines.append(line)
        parts += [f"### {kernel}", markdown(lines)]
    return "\n\n".join(parts)


def main() -> None:
    if reason := extension.why_not_built():
        raise SystemExit(reason)
    facts = record([MODULE, *missing_architectures()], launches())
    write("kernels", facts, {"kernels": tables(facts)})


if __name__ == "__main__":
    main()
