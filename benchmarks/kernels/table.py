"""Writes docs/kernels.json and the tables of docs/kernels.md: what the compiler made of kernels.

    python -m benchmarks.kernels.table     # needs nvcc, c++filt and the dev extra; no GPU

Reads the built module with cuobjdump. Architectures that it was not built for are compiled into
build/kernel_table first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, files
from itertools import groupby, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import cogview_kernels as ck
from benchmarks.kernels.counting import host_model
from cogview_kernels import extension

ROOT = Path(__file__).resolve().parents[2]
RECORD, PAGE = ROOT / "docs" / "kernels.json", ROOT / "docs" / "kernels.md"
CACHE = ROOT / "build" / "kernel_table"
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"

ARCHITECTURES = ("8.0", "8.6", "9.0a", "10.0", "12.0")

# Of the norms: too wide for shared memory, 4 vectors to a thread of the backward, 1, 2.
NORM_WIDTHS = (32768, 10240, 768, 2560)

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


def shared_kib(architecture: str) -> int:
    """Of an SM; architecture as "9.0a" or "sm_90a"."""
    return SM_LIMITS[re.sub(r"sm_|\.|[af]$", "", architecture)][0]


def ctas_per_sm(
    architecture: str, threads: int, registers: int, shared_bytes: int
) -> tuple[int, str]:
    """How many CTAs fit on an SM at once, and what keeps the next one out.

    The arithmetic of cuda_occupancy.h: registers are dealt to warps in units, within the quarter
    of the SM that a warp lives in; each CTA takes 1 KiB of shared memory for the system.
    """
    shared_kib, max_warps, max_ctas = SM_LIMITS[architecture.removeprefix("sm_").rstrip("af")]
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


# Mnemonics of SASS, one column each.
INSTRUCTIONS = {
    "loads_16": r"LDG\b.*\.(128|256)",
    "stores_16": r"STG\b.*\.(128|256)",
    "cp_async_16": r"LDGSTS\b.*\.128",
    "shared_loads_16": r"LDS\b.*\.128",
    "shared_stores_16": r"STS\b.*\.128",
    "narrow": r"(LDG|STG|LDGSTS)\b(?!.*\.(128|256))",  # global accesses of less than 16 bytes
    "ldmatrix": r"LDSM\b",
    "mma": r"\w*MMA\b",
    "local": r"(LDL|STL)\b",  # registers spilled, or arrays that did not become registers
}
MNEMONIC = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")


def columns_of(mnemonic: str) -> set[str]:
    return {name for name, pattern in INSTRUCTIONS.items() if re.match(pattern, mnemonic)}


def cuobjdump() -> str | None:
    """The program of the nvidia-cuda-cuobjdump wheel, else of a toolkit on the PATH."""
    try:
        found = [file for file in files("nvidia-cuda-cuobjdump") or () if file.stem == "cuobjdump"]
    except PackageNotFoundError:
        found = []
    return str(found[0].locate()) if found else shutil.which("cuobjdump")


def module() -> Path:
    return Path(extension._C.__file__)


def disassemble(path: Path) -> dict[str, Any]:
    """{"nvcc": its version, "kernels": a row per kernel and architecture, in the module's order}.

    Takes seconds, so what was found is kept for the module's next reading.
    """
    content = hashlib.sha256(path.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    cache = CACHE / f"{content[:16]}.json"
    if cache.is_file():
        return json.loads(cache.read_text())

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    architecture = mangled = ""
    for line in _dump("-res-usage", path):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r" Function (\w+):", line):
            mangled = match.group(1)
        elif match := re.match(r"  REG:(\d+) .*SHARED:(\d+)", line):
            registers, shared = (int(number) for number in match.groups())
            if shared and int(re.sub(r"\D", "", architecture)) >= 90:  # counted along there
                shared -= SHARED_RESERVED
            rows[mangled, architecture] = {"registers": registers, "static_shared": shared}

    nvcc = ""
    maximum = False  # the next value is the launch bound of the section's kernel
    for line in _dump("-elf", path):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\.nv\.info\.(\w+)", line):
            mangled = match.group(1)
        elif match := re.search(r"Cuda compilation tools, release (.*)", line):
            nvcc = match.group(1)
        elif "EIATTR_MAX_THREADS" in line:
            maximum = True
        elif maximum and (match := re.match(r"\s+Value:\s+(\w+) (\w+) (\w+)", line)):
            x, y, z = (int(number, 16) for number in match.groups())
            rows[mangled, architecture]["threads"] = x * y * z
            maximum = False

    counts: Counter[tuple[str, str, str]] = Counter()
    for line in _dump("-sass", path):
        if match := re.match(r"\tcode for (\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\t\tFunction : (\w+)", line):
            mangled = match.group(1)
        elif match := MNEMONIC.match(line):
            counts[mangled, architecture, match.group(1)] += 1
    for row in rows.values():
        row |= dict.fromkeys(INSTRUCTIONS, 0)
    for (mangled, architecture, mnemonic), count in counts.items():
        for column in columns_of(mnemonic):
            rows[mangled, architecture][column] += count

    names = _demangle([mangled for mangled, _ in rows])
    found = {
        "nvcc": nvcc,
        "kernels": [
            {"kernel": name, "architecture": architecture, **row}
            for name, ((_, architecture), row) in zip(names, rows.items(), strict=True)
        ],
    }
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(found))
    return found


def _dump(what: str, path: Path) -> list[str]:
    program = cuobjdump()
    if program is None:
        raise SystemExit("cuobjdump is not installed: pip install -e '.[dev]'")
    return subprocess.run(
        [program, what, str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def _demangle(names: list[str]) -> list[str]:
    words = "\n".join(names)
    plain = subprocess.run(["c++filt"], input=words, capture_output=True, text=True, check=True)
    return [source_name(name) for name in plain.stdout.splitlines()]


def source_name(name: str) -> str:
    """A kernel and its template arguments as the source writes them, whoever printed the name;
    a kernel of a family with the family's namespace."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = name.replace("cogview::", "").replace(" >", ">").partition("(")[0]
    name, bracket, arguments = name.partition("<")
    name += bracket + re.sub(r"\w+::", "", arguments)
    return name.replace("__half", "Half").replace("__nv_bfloat16", "BFloat16")


Launches = dict[int, dict[str, tuple[int, int]]]


def launches() -> Launches:
    """Threads and bytes of dynamic shared memory of each kernel's launch, as the host model saw,
    for each size of an SM's shared memory in KiB: the norms take what they find."""
    model = host_model()
    sizes = sorted({shared_kib(architecture) for architecture in ARCHITECTURES})
    found: Launches = {}

    def seen() -> dict[str, tuple[int, int]]:
        return {
            source_name(launch["kernel"]): (launch["threads"], launch["dynamic_shared"])
            for launch in model.take_report()
        }

    model.take_report()
    launch_attention()
    attention = seen()
    for kib in sizes:
        model.set_max_shared_bytes(kib * 1024 - SHARED_RESERVED)
        launch_norms()
        found[kib] = attention | seen()
    # A kernel for which a block has no room stands there with the launch of a larger one.
    return {kib: found[sizes[-1]] | found[kib] for kib in sizes}


def launch_attention() -> None:
    layout = ck.ThreeRegionLayout(4, torch.tensor([[5, 9]], dtype=torch.int32), 8, 1)
    # So many multiprocessors that the keys which many queries see are dealt out to several blocks.
    with mock.patch.object(extension, "host_model_num_sms", 132):
        for dtype, head_dim in product((torch.float16, torch.bfloat16), (32, 64, 96, 128)):
            q, k, v = torch.randn(3, 1, 1, 65, head_dim, dtype=dtype).requires_grad_().unbind()
            out = ck.three_region_attention(q, k, v, layout, backend="host_model")
            out.sum().backward()


def launch_norms() -> None:
    """Each kernel at the widths of NORM_WIDTHS that it takes, the last one in the end; with rows
    enough to fill a block."""
    dtypes = torch.float32, torch.float16, torch.bfloat16

    def leaf(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    for hidden, f_dtype, h_dtype in product(NORM_WIDTHS, dtypes, dtypes):
        if h_dtype not in (f_dtype, torch.float32):
            continue
        rows = -(-16384 // hidden)
        f, residual = leaf(f_dtype, rows, hidden), leaf(h_dtype, rows, hidden)
        post, pre = leaf(f_dtype, hidden), leaf(h_dtype, hidden)
        half, _ = ck.sandwich_residual(
            f, residual, post, None, None, None, final_norm=False, backend="host_model"
        )
        h, z = ck.sandwich_residual(f, residual, post, None, pre, None, backend="host_model")
        torch.autograd.backward([half, h, z], [torch.ones_like(h)] * 3)
    # These are launched by the sandwich too, with a residual: what stands in the table is without.
    for hidden, dtype, relax in product(NORM_WIDTHS, dtypes, ("tensor", "row")):
        x, weight = leaf(dtype, -(-16384 // hidden), hidden), leaf(dtype, hidden)
        y = ck.pb_relax_layer_norm(x, weight, None, relax=relax, backend="host_model")
        y.backward(torch.ones_like(y))


def missing_architectures() -> Path | None:
    """A module with those of ARCHITECTURES that the built module lacks; None if it has them all."""
    built = [name.removesuffix("+PTX").rstrip("af") for name in extension.architectures()]
    missing = [name for name in ARCHITECTURES if name.rstrip("af") not in built]
    if not missing:
        return None
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += [f"--build-lib={CACHE}/lib", f"--build-temp={CACHE}/temp"]
    wish = {"COGVIEW_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": " ".join(missing)}
    wish |= {"COGVIEW_KERNELS_HOST_MODEL": "0", "DEBUG": "0"}
    subprocess.run(command, cwd=ROOT, env=os.environ | wish, check=True)
    return CACHE / "lib" / "cogview_kernels" / module().name


def record(modules: list[Path], launched: Launches) -> dict[str, Any]:
    """Facts of all kernels of the modules, in the page's order."""
    found = [disassemble(path) for path in modules]
    (nvcc,) = {part["nvcc"] for part in found}
    rows = [row for part in found for row in part["kernels"]]
    for row in rows:
        bound = row["threads"]
        launch = launched[shared_kib(row["architecture"])][row["kernel"]]
        row["threads"], row["dynamic_shared"] = launch
        assert row["threads"] <= bound, f"{row['kernel']}: more threads than its launch bound"
        shared = row["static_shared"] + row["dynamic_shared"]
        row["ctas_per_sm"], row["limit"] = ctas_per_sm(
            row["architecture"], row["threads"], row["registers"], shared
        )
    return {"nvcc": nvcc, "kernels": sorted(rows, key=_order)}


def _order(row: dict[str, Any]) -> list[tuple[int, str]]:
    """Names by letter, the numbers in them by value."""
    words = re.findall(r"\d+|\D+", f"{row['kernel']} {row['architecture']}")
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


HEADINGS = {
    "threads": "threads",
    "registers": "regs",
    "static_shared": "static smem",
    "dynamic_shared": "dynamic smem",
    "ctas_per_sm": "CTAs/SM",
    "limit": "limited by",
    "loads_16": "loads 16 B",
    "stores_16": "stores 16 B",
    "cp_async_16": "cp.async 16 B",
    "shared_loads_16": "shared loads 16 B",
    "shared_stores_16": "shared stores 16 B",
    "narrow": "narrow",
    "ldmatrix": "ldmatrix",
    "mma": "mma",
    "local": "local",
}


def tables(facts: dict[str, Any]) -> str:
    """A table per kernel, with a row per instantiation and architecture."""
    lines = [f"nvcc {facts['nvcc']}."]
    for kernel, rows in groupby(facts["kernels"], lambda row: row["kernel"].partition("<")[0]):
        lines += ["", f"### {kernel}", ""]
        lines.append(f"| instantiation | arch | {' | '.join(HEADINGS.values())} |")
        lines.append("|---|---|" + "---:|" * len(HEADINGS))
        previous = None
        for row in rows:
            arguments = row["kernel"].partition("<")[2].removesuffix(">")
            shown = f"`{arguments}`" if arguments and arguments != previous else ""
            previous = arguments
            values = " | ".join(str(row[column]) for column in HEADINGS)
            lines.append(f"| {shown} | {row['architecture']} | {values} |")
    return "\n".join(lines)


def main() -> None:
    reason = extension.why_not_built()
    if reason is not None:
        raise SystemExit(reason)
    modules = [path for path in (module(), missing_architectures()) if path is not None]
    facts = record(modules, launches())
    rows = ",\n".join(json.dumps(row) for row in facts["kernels"])
    RECORD.write_text(f'{{"nvcc": "{facts["nvcc"]}", "kernels": [\n{rows}\n]}}\n')
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(facts)}\n{END}{rest.split(END)[1]}")
    print(f"{PAGE.relative_to(ROOT)}: {len(facts['kernels'])} rows")


if __name__ == "__main__":
    main()
