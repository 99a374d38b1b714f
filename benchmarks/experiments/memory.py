"""What a step of training takes of each GPU, by plan: predicted by `cogview plan`, without a GPU.

    python -m benchmarks.experiments.memory

A plan that was made is kept in ``--out`` and not repeated at the same commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.report.tables import table as markdown
from cogview.config import load_config
from cogview.files import atomic_write
from cogview.plan import plan


@dataclasses.dataclass(frozen=True)
class Case:
    preset: str
    gpus: int
    parallel: str
    micro_batch_size: int
    checkpointing: bool


# With ddp, the memory is the same for any number of GPUs.
CASES = (
    Case("cogview-4b", 1, "ddp", 1, True),
    *(
        Case("cogview-4b", gpus, parallel, size, checkpointing)
        for gpus, parallel, size in (
            (8, "ddp", 8),
            (64, "ddp", 32),
            (8, "fsdp", 8),
            (64, "fsdp", 8),
            (64, "fsdp", 32),
        )
        for checkpointing in (True, False)
    ),
    *(Case("medium", 1, "ddp", 16, checkpointing) for checkpointing in (True, False)),
    Case("small", 1, "ddp", 64, False),
)

Row = dict[str, Any]  # of a case, and of a `Plan` in bytes


def measure(case: Case) -> Row:
    begin = time.perf_counter()
    changes = {
        "training.parallel": case.parallel,
        "training.micro_batch_size": case.micro_batch_size,
        "model.activation_checkpointing": case.checkpointing,
    }
    config = load_config(case.preset, [f"{name}={value}" for name, value in changes.items()])
    result = plan(config, case.gpus)
    seconds = round(time.perf_counter() - begin, 1)
    return dataclasses.asdict(case) | dataclasses.asdict(result) | {"seconds": seconds}


def measure_once(case: Case, folder: Path) -> Row:
    """The row from its file in the folder, if there is one, else anew."""
    name = "-".join(map(str, dataclasses.astuple(case)))
    path = folder / f"{name}-{machine.commit_info()['id'][:7]}-{torch.__version__}.json"
    if not path.exists():
        row = measure(case)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(row))
    kept: Row = json.loads(path.read_text())
    return kept


def measure_all(cases: Sequence[Case], folder: Path) -> dict[str, Any]:
    """The record."""
    info = machine.machine_info(torch.device("cpu"))
    record = {"machine_info": info, "commit_info": machine.commit_info(), "datetime": machine.now()}
    rows = []
    for case in cases:
        rows.append(row := measure_once(case, folder))
        peak = sum(row["memory"].values()) / 2**30
        print(f"{case}: {peak:.2f} GiB, after {row['seconds']} s", flush=True)
    return record | {"rows": rows}


def table(record: dict[str, Any]) -> str:
    """A row for each case, in GiB."""
    columns = {
        "weights, gradients, optimizer": ("parameters", "gradients", "optimizer"),
        "gathered, to reduce": ("gathered weights", "gradients to reduce"),
        "activations": ("activations", "temporary"),
    }
    shown = []
    for row in record["rows"]:
        memory = row["memory"]
        of_column = {title: sum(memory[kind] for kind in kinds) for title, kinds in columns.items()}
        assert sum(of_column.values()) == sum(memory.values())
        sizes = of_column | {
            "at the peak": sum(memory.values()),
            "arrives per step": row["gathered"] + row["reduced"],
        }
        shown.append(
            {
                "preset": row["preset"],
                "parallel": row["parallel"] if row["gpus"] > 1 else "",
                "GPUs": str(row["gpus"]),
                "micro batch": str(row["micro_batch_size"]),
                "activation checkpointing": "yes" if row["checkpointing"] else "no",
                **{title: f"{size / 2**30:,.1f}" if size else "" for title, size in sizes.items()},
            }
        )
    return (
        f"{markdown(shown, left=2)}\n\nGiB on each GPU. **Predicted**, by torch's memory tracker "
        "under fake tensors on a CPU: no GPU has run it. Activations include what the backward "
        "pass needs for a moment. What arrives, from other GPUs, is of all passes of a step."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "memory")
    record = measure_all(CASES, parser.parse_args().out)
    name = machine.record_name(
        "memory", record["machine_info"], record["commit_info"], record["datetime"]
    )
    machine.save_record(record, path := machine.RESULTS / name)
    print(f"\n{table(record)}\n\nrecord: {path}")


if __name__ == "__main__":
    main()
