"""Predicts the times of the kernels on one H200 from their machine code. `make kernel-times` writes
docs/kernel_times.json and the tables of docs/kernel_times.md.

    python -m benchmarks.kernels.cycles.times                           # all; needs nvcc, no GPU
    python -m benchmarks.kernels.cycles.times forward --cases AB --head-dims 64 --dtypes bfloat16
    python -m benchmarks.kernels.cycles.times norms backward --shapes 8192x2560   # norms.py

With arguments it prints what it found and writes nothing. The host model records the launches of a
call; walk.cpp runs every 33rd block of each on the machine code that the compiler made of the same
source, and schedule.cpp runs the instructions of its warps on a model of four multiprocessors.
This file is of the attention; norms.py is of the norms.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels.counting import DOCS, markdown, write
from benchmarks.kernels.cycles import machine, norms
from benchmarks.kernels.cycles.launches import (
    CASES,
    Launch,
    compiled,
    digest,
    machine_code,
    recorded,
    short,
    source_of,
)
from benchmarks.kernels.cycles.predict import measure, rounded
from cogview.files import atomic_write

CALIBRATION = DOCS / "kernel_times_calibration.json"
NORMS_BEFORE = DOCS / "kernel_times_norms_before.json"  # of the norms' first edition
CALL = "case", "head_dim", "dtype"
SHOWN_CASE = "B"  # of the table of tiles
PIPES = "issue", "tensor", "special", "integer", "float", "shared"
HEAD_DIMS, DTYPES = (64, 128), ("bfloat16", "float16")
KERNELS = {
    "forward": "forward",
    "backward_row": "row",
    "backward_dkdv": "dkdv",
    "backward_partial": "partial",
    "backward_dq": "dq",
    "far_keys": "far_keys",
}


def rows(
    which: str, cases: str, head_dims: Sequence[int], dtypes: Sequence[str]
) -> list[dict[str, Any]]:
    """Of the launches whose kernel's name contains ``which``; prints each."""
    found: list[dict[str, Any]] = []
    for head_dim in head_dims:
        for dtype in dtypes:
            for letter in cases:
                case = dataclasses.replace(CASES[letter], dtype=dtype)
                heads = case.num_heads * case.head_dim // head_dim
                case = dataclasses.replace(case, head_dim=head_dim, num_heads=heads)
                times_launched: Counter[str] = Counter()
                for launch in recorded(case):
                    name = short(launch.kernel)
                    times_launched[name] += 1
                    if times_launched[name] > 1:  # row: of dout, then of v
                        name += f"_{times_launched[name]}"
                    if which and which not in name:
                        continue
                    begin = time.perf_counter()
                    row = {"case": letter, "head_dim": head_dim, "dtype": dtype, "kernel": name}
                    row |= {"name": case.name} | kept(row, launch)
                    found.append(row)
                    seconds = time.perf_counter() - begin
                    print(f"{_line(row)}  ({seconds:.0f} s)", flush=True)
    return found


def kept(row: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """What ``measure`` says, from an earlier run if nothing changed since."""
    content = hashlib.sha256("".join([*map(str, row.values()), file_digest()]).encode())
    content.update(compiled(source_of(launch.kernel)).read_bytes())
    file = machine.CACHE / "rows" / f"{content.hexdigest()[:16]}.json"
    # What the host decides can change the grid of the same machine code.
    if not file.is_file() or json.loads(file.read_text())["blocks"] != launch.blocks:
        measured = json.dumps(rounded(measure(machine_code(launch.kernel), launch)))
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            partial.write_text(measured)
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


@functools.cache
def file_digest() -> str:
    """Of what a measured launch depends on in this folder."""
    names = ("sass.py", "machine.py", "predict.py", "launches.py", "walk.cpp", "schedule.cpp")
    files = [Path(__file__).with_name(name) for name in names]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _line(row: dict[str, Any]) -> str:
    text = f"{row['case']} D{row['head_dim']} {row['dtype']} {row['kernel']}: {row['us']:.1f} us"
    for name in ("plain", "masked", "prologue", "epilogue"):
        if name in row:
            part = row[name]
            text += f", {name} {part['cycles']:.0f} cycles ({part['issued']:.0f} issued)"
    return text


def record() -> dict[str, Any]:
    return {
        "model": {
            "sources": digest(),
            "clock_ghz": machine.CLOCK_GHZ,
            "num_sms": machine.NUM_SMS,
        },
        "rows": rows("", "ABCD", HEAD_DIMS, DTYPES),
        "norms": norms.rows(),
    }


def tables(
    facts: dict[str, Any], calibration: dict[str, Any], before: dict[str, Any]
) -> dict[str, str]:
    """Of the page: the attention's times, tiles and calibration, the norms' times and calibration;
    ``before``: the record of the norms' first edition."""
    launches, tiles = [], []
    for call, group in itertools.groupby(facts["rows"], operator.itemgetter(*CALL)):
        found = {row["kernel"]: row for row in group}
        us: Counter[str] = Counter()
        for kernel, row in found.items():
            us[KERNELS[kernel.removesuffix("_2")]] += row["us"]
        line = {"problem": call[0], "D": str(call[1]), "dtype": call[2]}
        line |= {shown: _us(us[shown]) if shown in us else "" for shown in KERNELS.values()}
        total = sum(us.get(KERNELS[name], 0.0) for name in KERNELS if name.startswith("backward"))
        launches.append(line | {"backward": _us(total)})
        for kernel, row in found.items():
            if call[0] == SHOWN_CASE and "plain" in row:
                tile = {"kernel": KERNELS[kernel], "D": str(call[1]), "dtype": call[2]}
                tile |= {"registers": row["registers"], "blocks per SM": row["blocks_per_sm"]}
                tile |= {pipe: round(row["plain"][pipe]) for pipe in PIPES}
                parts = {"plain tile": "plain", "masked tile": "masked"}
                parts |= {"prologue": "prologue", "epilogue": "epilogue"}
                tiles.append(tile | {n: round(row[p]["cycles"]) for n, p in parts.items()})
    known = [
        {"kernel": row["kernel"], "D": str(row["head_dim"]), "keys": row["length"]}
        | {"published": row["published"], "predicted": round(row["predicted"])}
        | {"predicted / published": f"{row['predicted'] / row['published']:.2f}"}
        for row in calibration["rows"]
    ]
    found = {"times": launches, "tiles": tiles, "calibration": known}
    found |= norms.tables(facts["norms"], before["rows"], calibration["norms"])
    return {mark: markdown(lines) for mark, lines in found.items()}


def _us(time: float) -> str:
    return f"{time:.0f}" if time >= 10 else f"{time:.1f}"


def main() -> None:
    if sys.argv[1:2] == ["norms"]:
        return norms.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("kernel", nargs="?", help="part of a name: forward, dq, dkdv, row")
    parser.add_argument("--cases", default="ABCD")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    chosen = parser.parse_args()
    if chosen == parser.parse_args([]):
        facts = record()
        kept_records = (json.loads(file.read_text()) for file in (CALIBRATION, NORMS_BEFORE))
        write("kernel_times", facts, tables(facts, *kept_records))
    else:
        rows(chosen.kernel or "", chosen.cases, chosen.head_dims, chosen.dtypes)


if __name__ == "__main__":
    main()
