"""The report shows what the records contain."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_docs import blocks_of

from benchmarks.report import __main__ as report
from benchmarks.report import plots, records, tables

ROOT = Path(__file__).resolve().parents[1]
Raw = dict[str, Any]

# Methods: name, role, what it computes, time relative to ours.
ATTENTION = [
    ("cogview_kernels", "ours", "three-region", 1.0),
    ("FlexAttention, gathered pivots, 128x128", "rival", "three-region", 1.7),
    ("FlexAttention, gathered pivots, 64x64", "rival", "three-region", 1.3),
    ("CogView's formulation", "", "three-region", 4.0),
    ("SDPA cuDNN", "dense", "dense causal", 0.9),
    ("SDPA flash", "dense", "dense causal", 1.6),
]
NORMS = [
    ("cogview_kernels", "ours", "PB-relax LayerNorm", 1.0),
    ("cogview_kernels, graph replay", "ours", "PB-relax LayerNorm", 0.5),
    ("PyTorch PB-relax, compiled", "", "PB-relax LayerNorm", 1.4),
    ("F.layer_norm", "", "plain LayerNorm", 0.7),
    ("F.layer_norm, graph replay", "", "plain LayerNorm", 0.6),
]
STEPS = [
    ("cogview_kernels", "ours", "three-region", 1.0),
    ("dense SDPA", "dense", "dense causal", 1.2),
]
H200 = {"device": "NVIDIA H200", "device_type": "cuda", "threads": 8, "torch": "2.11.0"}
EPYC = {"device": "AMD EPYC", "device_type": "cpu", "threads": 2, "torch": "2.13.0+cpu"}


def attention(seqlen: int, n: int, pivots: int, batch: int = 1, q_len: int = 0) -> Raw:
    return {
        **{"seqlen": seqlen, "query_window": 128, "key_window_times": n, "num_pivots": pivots},
        **{"batch": batch, "num_heads": 4, "q_len": q_len, "dtype": "float32"},
    }


def row(op: str, work: str, case: Raw, sweep: str, method: tuple[Any, ...], base: float) -> Raw:
    name, role, computes, factor = method
    median = base * factor
    case_name = " ".join(map(str, case.values()))
    facts: Raw = {"op": op, "work": work, "case": case, "case_name": case_name, "sweeps": [sweep]}
    facts |= {"method": name, "role": role, "computes": computes, "extra_bytes": 1 << 20}
    facts |= {"flops": int(1e11 * base) if op != "layer_norm" else 0, "bytes": int(1e10 * base)}
    if op in ("attention", "decode"):
        facts["attended_fraction"] = 0.25
    times = {"minimum": 0.9 * median, "median": median, "iqr": 0.03 * median, "rounds": 9}
    return {"name": f"{op} / {case_name} / {work} / {name}", **facts, "seconds": times}


def made_up(machine: Raw) -> Raw:
    """A record as ``make gpu-bench`` writes it."""
    found = []
    fixed = [attention(1088, 4, 192, 16), attention(4224, 2, 256), attention(16448, 2, 512)]
    for case in fixed:
        for i, work in enumerate(("forward", "backward", "forward+backward")):
            base = 1e-6 * case["seqlen"] * (1 + i)
            found += [row("attention", work, case, "fixed", each, base) for each in ATTENTION]
    found += [
        row("decode", "forward", attention(4224, 2, 256, 16, 1), "fixed", each, 1e-5)
        for each in ATTENTION
    ]
    step = {"num_layers": 4, "text_len": 64, "image_len": 1024, "batch": 1, "dtype": "float32"}
    found += [row("training_step", "step", step, "fixed", each, 0.3) for each in STEPS]
    for log2 in range(10, 15):
        for work in ("forward", "backward"):
            case, base = attention(1 << log2, 2, 256), 2e-8 * 2**log2
            for name, role, computes, factor in ATTENTION:
                grows = 2 ** (log2 - 11) if role == "dense" else 1
                if (log2, name) != (13, "CogView's formulation"):  # a gap
                    method = name, role, computes, factor * grows
                    found.append(row("attention", work, case, "seqlen", method, base))
    for sweep, n, pivots in [*(("window", n, 256) for n in (1, 2, 4, 8, 16)),
                             *(("pivots", 2, n) for n in (0, 64, 256, 1024, 2048))]:
        for work in ("forward", "backward"):
            case = attention(4224, n, pivots)
            for each in ATTENTION:
                made = row("attention", work, case, sweep, each, 1e-3 * (1 + n / 4 + pivots / 512))
                share = (128 * n + pivots / 2) / 4224
                found.append(made | {"attended_fraction": min(1, share)})
    for hidden in (512, 2560, 8192):
        for op in ("layer_norm", "sandwich_residual"):
            for work in ("forward", "backward"):
                case = {"rows": (1 << 22) // hidden, "hidden": hidden, "dtype": "float32"}
                sweep = "fixed" if hidden == 2560 else "hidden"
                found += [row(op, work, case, sweep, each, 4e-3) for each in NORMS]
    return {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-25T04:00:00+00:00",
        "ceilings": {"matmul_flops": {"float32": 2e11}, "copy_bytes_per_s": 3.1e10},
        "controls": [{"name": "empty kernel", "median": 2.1e-6},
                     {"name": "A/A: decode", "median": 1e-3, "other_median": 1.004e-3}],
        "drift": [{"after_stage": "rest", "name": "x", "median": 1.01e-3, "first_median": 1e-3}],
        "not_measured": [{**found[0], "method": "FA3", "reason": "not installed", "failed": False}],
        "not_reached": ["a", "b"],
        "rows": found,
    }
