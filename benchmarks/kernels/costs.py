"""Writes docs/kernel_costs.json and the tables of docs/kernel_costs.md: what the kernels compute
and move, counted, against what the attention and the norms cannot do without.

    python -m benchmarks.kernels.costs     # needs the host model; no GPU
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cogview_kernels as ck
from benchmarks.kernels.counting import Row, markdown, write
from benchmarks.suite.cases import AttentionCase
from cogview_kernels import extension

NUM_SMS = 132  # of an H200
MMA_PRODUCTS = 16 * 8 * 16
KERNEL = re.compile(r"three_region_attention_(\w+)_kernel")
MOVED = {  # by the names of buffers
    "moved_rows": "q|k|v|out|dout|dq|dk|dv",
    "moved_statistics": "row_max|row_log_sum|delta",
    "moved_far_keys": "far_keys",
}

# More heads and samples repeat the counts.
ATTENTION_CASES = (
    AttentionCase(1088, 64, 4, 192, num_heads=1),
    AttentionCase(4224, 128, 2, 256, num_heads=1),
    AttentionCase(4224, 128, 6, 704, num_heads=1),
    AttentionCase(16448, 128, 2, 512, num_heads=1),
    AttentionCase(4096, 128, 8, 256, num_heads=2, num_kv_heads=1, head_dim=128),
    AttentionCase(4224, 128, 2, 256, num_heads=1, q_len=1),
)


class NormCase(NamedTuple):
    rows: int
    hidden: int
    residual: torch.dtype  # and h, z and the parameters
    f: torch.dtype = torch.float16  # and x, y

    def __str__(self) -> str:
        dtype = str(self.residual).removeprefix("torch.")
        return f"{self.rows} x {self.hidden}, residual {dtype}, parameters {dtype}"


SHAPES = (8192, 2560), (4096, 1024), (512, 16384)
NORM_CASES = [NormCase(*shape, t) for shape, t in product(SHAPES, (torch.float16, torch.float32))]

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


def counted(
    call: Callable[[], Any], num_sms: int = 1, shared_kib: int = 227
) -> tuple[Any, list[Row]]:
    """What a call returns, and its launches as the host model counted them, on a device as
    `extension.modelled_device` describes it."""
    if reason := extension.why_not_host_model():
        raise SystemExit(reason)
    model = importlib.import_module("cogview_kernels._host_model")
    model.take_report()  # of earlier calls
    with extension.modelled_device(num_sms, shared_kib):
        result = call()
    return result, model.take_report()


def bytes_by_kind(launches: Iterable[Row], kinds: dict[str, str]) -> dict[str, int]:
    """Loaded and stored, by kind of buffer: the first one whose pattern fits the name."""
    total = dict.fromkeys(kinds, 0)
    for launch in launches:
        for name, buffer in launch["buffers"].items():
            kind = next(kind for kind, pattern in kinds.items() if re.fullmatch(pattern, name))
            total[kind] += buffer["bytes_loaded"] + buffer["bytes_stored"]
    return total


def describe(case: AttentionCase) -> str:
    queries = f"Sq={case.q_len} " if case.q_len else ""
    heads = f"H={case.num_heads} G={case.kv_heads} " if case.num_heads > 1 else ""
    return (
        f"{queries}S={case.seqlen} w={case.query_window} n={case.key_window_times}, "
        f"{case.num_pivots} pivots, {case.text_len} text, {heads}D={case.head_dim}"
    )


def tile_rows(kernel: str, head_dim: int) -> int:
    """Queries of a block, keys of a block of the dkdv kernel: as the kernels' shapes have them."""
    return 128 if kernel == "forward" or head_dim <= 64 else 64


def query_tiles(case: AttentionCase, kernel: str) -> Iterator[Tensor]:
    """Who sees which key, tile by tile of the kernel's rows: bool ``(queries, keys so far)``."""
    rows, first = tile_rows(kernel, case.head_dim), case.seqlen - case.queries
    for origin in range(first // rows * rows, case.seqlen, rows):
        begin, end = max(origin, first), min(origin + rows, case.seqlen)
        yield case.layout("cpu").dense_mask(1, end - begin, end)[0]


def far_rows(case: AttentionCase) -> int:
    """Rows of the dkdv kernel's tiles of far keys: at most 256 of the text, and the pivots."""
    return -(-case.num_pivots // 64) * 64 + min(-(-case.seqlen // 64) * 64, 256)


def queries_of_key_tiles(case: AttentionCase) -> int:
    """The queries that see any key of a tile, summed over the tiles of the dkdv kernel: text and
    pivots packed, then all keys in order, but for those."""
    rows, pivots = tile_rows("backward_dkdv", case.head_dim), case.layout("cpu").pivot_idx
    assert pivots is not None
    far = torch.cat([torch.arange(min(case.text_len, 256)), pivots[0].long()])
    tile = -(-len(far) // rows) + torch.arange(case.seqlen) // rows
    tile[far] = torch.arange(len(far)) // rows
    seen = (visible.nonzero().unbind(1) for visible in query_tiles(case, "forward"))
    return sum((query * case.seqlen + tile[key]).unique().numel() for query, key in seen)


def needs(case: AttentionCase) -> dict[str, tuple[int, int]]:
    """For each kernel the multiply-adds of visible pairs, and the bytes that its blocks must touch.

    A block of queries touches its rows and statistics, and each key that any of them sees; a block
    of keys touches its rows, and each query that sees any of them. Each once.
    """
    heads, row, statistic = case.num_heads, 2 * case.head_dim, 4
    queries, products = heads * case.queries, heads * case.head_dim * case.pairs
    keys, seen = case.kv_heads * case.seqlen, heads * queries_of_key_tiles(case)
    k_and_v = {
        kernel: heads * 2 * row * sum(int(tile.any(0).sum()) for tile in query_tiles(case, kernel))
        for kernel in ("forward", "backward_dq")
    }
    return {
        # q, out; lse.
        "forward": (2 * products, queries * (2 * row + statistic) + k_and_v["forward"]),
        # dout, out; delta.
        "backward_row": (0, queries * (2 * row + statistic)),
        # k, v, dk, dv; q, dout, lse, delta.
        "backward_dkdv": (4 * products, keys * 4 * row + seen * 2 * (row + statistic)),
        # q, dout, dq; lse, delta.
        "backward_dq": (3 * products, queries * (3 * row + 2 * statistic) + k_and_v["backward_dq"]),
    }


def attention_launches(case: AttentionCase, num_sms: int = 1) -> dict[str, Row]:
    """What the host model counted of forward and backward, by kernel.

    On one multiprocessor every key tile's queries stay with one block, as where heads are many.
    """
    q, k, v = (
        torch.randn(1, heads, rows, case.head_dim).to(case.torch_dtype).requires_grad_()
        for heads, rows in ((case.num_heads, case.queries), *[(case.kv_heads, case.seqlen)] * 2)
    )

    def run() -> None:
        out = ck.three_region_attention(q, k, v, case.layout("cpu"), backend="host_model")
        out.backward(torch.ones_like(out))

    return {KERNEL.findall(launch["kernel"])[0]: launch for launch in counted(run, num_sms)[1]}


def attention_rows(case: AttentionCase) -> list[Row]:
    """A row for each kernel: counts of the host model beside what is needed."""
    rows, launched = [], attention_launches(case)
    for kernel, (useful, must_touch) in needs(case).items():
        launch = launched[kernel]
        row: Row = {"case": describe(case), "kernel": kernel, "blocks": launch["grid"][0]}
        row |= {"products": launch["mma"] * MMA_PRODUCTS, "useful_products": useful}
        row |= {"must_touch": must_touch} | bytes_by_kind([launch], MOVED)
        for of in ("unique", "operator_unique"):
            buffers = launch["buffers"].values()
            row[of] = sum(buffer[f"{of}_loaded"] + buffer[f"{of}_stored"] for buffer in buffers)
        rows.append(row | {name: launch[name] for name in ("shared_accesses", "bank_conflicts")})
    return rows


def norm_launches(
    case: NormCase, num_sms: int = NUM_SMS, shared_kib: int = 227
) -> dict[str, list[Row]]:
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


def norm_rows(case: NormCase) -> list[Row]:
    """A row for each operator, all its launches together."""
    rows = []
    for operator, launched in norm_launches(case).items():
        passes = PASSES[operator]
        itemsize = dict.fromkeys(LIKE_RESIDUAL, case.residual.itemsize)
        size = {name: case.rows * case.hidden * itemsize.get(name, 2) for name in passes}
        moved = bytes_by_kind(launched, {name: name for name in passes} | OTHERS)
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
                "passes": {name: moved[name] / size[name] for name in passes},
                "activations": sum(moved[name] for name in passes),
                **{kind: moved[kind] for kind in OTHERS},
                "bank_conflicts": sum(launch["bank_conflicts"] for launch in launched),
            }
        )
    return rows


# The page.


def moved(row: Row) -> int:
    return sum(row[kind] for kind in MOVED)


def backward(rows: list[Row]) -> Row:
    """The sum of a case's backward kernels."""
    parts = [row for row in rows if row["kernel"].startswith("backward")]
    counts = ("blocks", "products", "useful_products", "must_touch", *MOVED, "bank_conflicts")
    return {"kernel": "backward"} | {name: sum(row[name] for row in parts) for name in counts}


def tables(record: dict[str, list[Row]]) -> dict[str, str]:
    """By mark in the page."""
    attention = []
    for case, group in groupby(record["attention"], lambda row: row["case"]):
        rows = list(group)
        attention += [
            {
                "case": case,
                "kernel": row["kernel"],
                "blocks": row["blocks"],
                "issued / useful": row["products"] / (row["useful_products"] or math.nan),
                "must touch": row["must_touch"],
                "moved / must touch": moved(row) / row["must_touch"],
                "bank conflicts": row["bank_conflicts"],
            }
            for row in (*rows, backward(rows))
        ]
    launch = "{kernel} {blocks} x {threads}, {shared}"
    norms = [
        {
            "case": row["case"],
            "operator": row["operator"],
            "launches": "; ".join(map(launch.format_map, row["launches"])),
            "floor": row["floor"],
            "moved / floor": row["activations"] / row["floor"],
            "others / floor": sum(row[kind] for kind in OTHERS) / row["floor"],
        }
        for row in record["norms"]
    ]
    return {"attention costs": markdown(attention), "norms costs": markdown(norms)}


def main() -> None:
    attention = [row for case in ATTENTION_CASES for row in attention_rows(case)]
    norms = [row for case in NORM_CASES for row in norm_rows(case)]
    record = {"attention": attention, "norms": norms}
    write("kernel_costs", record, tables(record))


if __name__ == "__main__":
    main()
