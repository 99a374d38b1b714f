"""What the kernels of the norms and of the sandwich move, counted, against the activations that
they must: the second part of kernel_costs.py."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import cogview_kernels as ck
from benchmarks.kernels.counting import host_model
from cogview_kernels import extension


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of a norm, on as many multiprocessors as an H200 has."""

    rows: int
    hidden: int
    residual: torch.dtype = torch.float16  # and h and z; x, y and f are float16
    parameters: torch.dtype = torch.float16

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.residual, self.parameters)]
        return f"{self.rows} x {self.hidden}, residual {names[0]}, parameters {names[1]}"


AUTOCAST = (torch.float32, torch.float32)
CASES = (
    Case(8192, 2560),
    Case(8192, 2560, *AUTOCAST),
    Case(4096, 1024),
    Case(4096, 1024, *AUTOCAST),
    Case(512, 16384),
    Case(512, 16384, *AUTOCAST),
)
NUM_SMS = 132
LIKE_RESIDUAL = ("residual", "h", "z", "dh", "dz", "dresidual")  # in dtype; others are float16
BESIDE = ("parameters", "partial_sums", "statistics", "peaks")  # the activations

# How often each operator must load or store its activations.
PASSES = {
    "plain forward": {"x": 1, "y": 1},
    "plain forward, relax tensor": {"x": 2, "y": 1},
    "plain backward": {"dy": 1, "x": 1, "dx": 1},
    "sandwich forward": {"f": 1, "residual": 1, "h": 1, "z": 1},
    "sandwich forward, relax tensor": {"f": 2, "residual": 1, "h": 2, "z": 1},
    "sandwich forward, no final norm": {"f": 1, "residual": 1, "h": 1},
    "sandwich backward": {"dh": 1, "dz": 1, "f": 1, "h": 1, "df": 1, "dresidual": 1},
    "sandwich backward, no final norm": {"dh": 1, "f": 1, "df": 1},
}


def launches(case: Case) -> dict[str, list[dict[str, Any]]]:
    """What the host model counted of each operator."""
    model = host_model()
    generator = torch.Generator().manual_seed(0)

    def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    f, residual = (leaf(t, case.rows, case.hidden) for t in (torch.float16, case.residual))
    post = [leaf(case.parameters, case.hidden) for _ in range(2)]
    pre = [leaf(case.parameters, case.hidden) for _ in range(2)]
    found: dict[str, list[dict[str, Any]]] = {}

    def forward(name: str, function: Any, *tensors: Tensor | None, **options: Any) -> list[Tensor]:
        results = function(*tensors, backend="host_model", **options)
        found[name] = model.take_report()
        if isinstance(results, Tensor):
            return [results]
        return [result for result in results if result is not None]

    def backward(name: str, results: list[Tensor]) -> None:
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
        found[name] = model.take_report()

    model.take_report()
    with mock.patch.object(extension, "host_model_num_sms", NUM_SMS):
        plain, sandwich = ck.pb_relax_layer_norm, ck.sandwich_residual
        norms = (f, residual, *post, *pre)
        forward("plain forward, relax tensor", plain, f, *post, relax="tensor")
        backward("plain backward", forward("plain forward", plain, f, *post))
        forward("sandwich forward, relax tensor", sandwich, *norms, relax="tensor")
        backward("sandwich backward", forward("sandwich forward", sandwich, *norms))
        one = (f, residual, *post, None, None)
        name = "sandwich forward, no final norm"
        h = forward(name, sandwich, *one, final_norm=False)
        backward("sandwich backward, no final norm", h)
    return {name: found[name] for name in PASSES}


def kind(buffer: str) -> str:
    """What a buffer of the norms' operators holds, but for activations."""
    if buffer.endswith(("weight", "bias")):  # and their gradients
        return "parameters"
    if buffer.endswith("statistics"):
        return "statistics"
    return {"partial": "partial_sums"}.get(buffer, "peaks")


def count(case: Case) -> list[dict[str, Any]]:
    """A row for each operator, all its launches together."""
    rows = []
    for operator, launched in launches(case).items():
        passes = PASSES[operator]
        size = {
            name: case.rows * case.hidden * (case.residual.itemsize if name in LIKE_RESIDUAL else 2)
            for name in passes
        }
        moved = Counter[str]()
        for launch in launched:
            for name, t in launch["buffers"].items():
                what = name if name in passes else kind(name)
                moved[what] += t["bytes_loaded"] + t["bytes_stored"]
        rows.append(
            {
                "case": str(case),
                "operator": operator,
                "launches": [
                    {
                        "kernel": launch["kernel"].partition("<")[0].removesuffix("_kernel"),
                        "blocks": launch["grid"][0] * launch["grid"][1],
                        "threads": launch["threads"],
                        "shared": launch["static_shared"] + launch["dynamic_shared"],
                    }
                    for launch in launched
                ],
                "floor": sum(passes[name] * size[name] for name in passes),
                "passes": {name: moved[name] / size[name] for name in passes},
                "activations": sum(moved[name] for name in passes),
                **{what: moved[what] for what in BESIDE},
                "bank_conflicts": sum(launch["bank_conflicts"] for launch in launched),
            }
        )
    return rows


def table(facts: list[dict[str, Any]]) -> str:
    lines = []
    for case, rows in groupby(facts, lambda row: row["case"]):
        lines += ["", f"#### {case}", ""]
        lines.append(
            "| operator | launches: blocks x threads, KiB | floor | moved / floor | parameters | "
            "partial sums | statistics, peaks | these / floor | bank conflicts |"
        )
        lines.append("|---|---|" + "---:|" * 7)
        for row in rows:
            launched = "; ".join(
                f"{launch['kernel'].removeprefix('pb_relax_layer_norm_')} "
                f"{launch['blocks']} x {launch['threads']}, {launch['shared'] / 1024:.1f}"
                for launch in row["launches"]
            )
            share = sum(row[what] for what in BESIDE) / row["floor"]
            cells = [
                row["operator"],
                launched,
                f"{row['floor']:,}",
                f"{row['activations'] / row['floor']:.3f}",
                f"{row['parameters']:,}",
                f"{row['partial_sums']:,}",
                f"{row['statistics'] + row['peaks']:,}",
                f"{share:.1%}",
                f"{row['bank_conflicts']:,}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines[1:])
