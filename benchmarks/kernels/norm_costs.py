"""What the kernels of the norms and of the sandwich move, counted, against the activations that
they must."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cogview_kernels as ck
from benchmarks.kernels.counting import Row, counted, moved

NUM_SMS = 132  # of an H200


class Case(NamedTuple):
    rows: int
    hidden: int
    residual: torch.dtype  # and h, z and the parameters
    f: torch.dtype = torch.float16  # and x, y

    def __str__(self) -> str:
        dtype = str(self.residual).removeprefix("torch.")
        return f"{self.rows} x {self.hidden}, residual {dtype}, parameters {dtype}"


SHAPES = (8192, 2560), (4096, 1024), (512, 16384)
CASES = tuple(Case(*shape, t) for shape, t in product(SHAPES, (torch.float16, torch.float32)))

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
LIKE_RESIDUAL = ("residual", "h", "z", "dh", "dz", "dresidual")  # in dtype
OTHERS = {
    "parameters": ".*(weight|bias)",  # and their gradients
    "partial_sums": "partial",
    "statistics": ".*statistics",
    "peaks": ".*",
}
RATIOS = {"moved / floor": (("activations",), "floor"), "others / floor": (OTHERS, "floor")}


def launches(
    case: Case, num_sms: int = NUM_SMS, shared_kib: int = 227
) -> dict[str, list[dict[str, Any]]]:
    """What the host model counted of each operator."""

    def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype).requires_grad_()

    f, residual = (leaf(dtype, case.rows, case.hidden) for dtype in (case.f, case.residual))
    post, pre = ([leaf(case.residual, case.hidden) for _ in range(2)] for _ in range(2))
    plain: Any = partial(ck.pb_relax_layer_norm, backend="host_model")
    fused: Any = partial(ck.sandwich_residual, f, residual, *post, backend="host_model")
    forwards = {
        "plain forward": partial(plain, f, *post),
        "plain forward, relax tensor": partial(plain, f, *post, relax="tensor"),
        "sandwich forward": partial(fused, *pre),
        "sandwich forward, relax tensor": partial(fused, *pre, relax="tensor"),
        "sandwich forward, no final norm": partial(fused, None, None, final_norm=False),
    }
    found = {}
    for name, forward in forwards.items():
        results, found[name] = counted(forward, num_sms, shared_kib)
        name = name.replace("forward", "backward")
        if name in PASSES:
            outputs = [y for y in results if y is not None] if "sandwich" in name else [results]
            backward = partial(torch.autograd.backward, outputs, [*map(torch.ones_like, outputs)])
            _, found[name] = counted(backward, num_sms, shared_kib)
    return {name: found[name] for name in PASSES}


def count(case: Case) -> list[Row]:
    """A row for each operator, all its launches together."""
    rows = []
    for operator, launched in launches(case).items():
        passes = PASSES[operator]
        itemsize = dict.fromkeys(LIKE_RESIDUAL, case.residual.itemsize)
        size = {name: case.rows * case.hidden * itemsize.get(name, 2) for name in passes}
        by_kind = moved(launched, {name: name for name in passes} | OTHERS)
        blocks = [
            {
                "kernel": launch["kernel"].partition("<")[0].removesuffix("_kernel"),
                "blocks": launch["grid"][0] * launch["grid"][1],
                "threads": launch["threads"],
                "shared": launch["static_shared"] + launch["dynamic_shared"],
            }
            for launch in launched
        ]
        rows.append(
            {
                "case": str(case),
                "operator": operator,
                "launches": blocks,
                "floor": sum(passes[name] * size[name] for name in passes),
                "passes": {name: by_kind[name] / size[name] for name in passes},
                "activations": sum(by_kind[name] for name in passes),
                **{kind: by_kind[kind] for kind in OTHERS},
                "bank_conflicts": sum(launch["bank_conflicts"] for launch in launched),
            }
        )
    return rows


def shown(rows: list[Row]) -> list[Row]:
    """Launches as text: blocks x threads, bytes of shared memory."""
    text = "{kernel} {blocks} x {threads}, {shared}"
    return [row | {"launches": "; ".join(map(text.format_map, row["launches"]))} for row in rows]
