"""Copies the results of `make demo` to the documentation: pictures, record and README's table.

    python docs/publish_demo.py results/demo

It writes docs/demo/ and docs/mask.png, and renders the table in README.md from
docs/demo/metrics.json alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import cogview_kernels as ck
from cogview.config import Config, load_config

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"
FILES = ("samples.png", "reconstructions.png", "curves.png")


REGIONS = (  # name and colour
    ("local window", (0.17, 0.35, 0.60)),
    ("text", (0.93, 0.60, 0.15)),
    ("random pivots", (0.75, 0.18, 0.30)),
)


def draw_mask(config: Config, target: Path) -> None:
    """Draws which keys each query attends to, with a colour for each region."""
    seqlen, text_len = config.model.max_positions, config.max_text_len
    pivots = ck.sample_pivots(
        text_len, seqlen, config.model.num_pivots, torch.Generator().manual_seed(config.seed)
    )
    layout = ck.ThreeRegionLayout(
        text_len, pivots, config.model.query_window, config.model.key_window_times
    )
    picture = torch.full((seqlen, seqlen, 3), 0.96)
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    regions = layout.regions(1, seqlen, seqlen)
    for i, ((name, colour), region) in enumerate(zip(REGIONS, regions, strict=True)):
        picture[region[0]] = torch.tensor(colour)
        place = 0.97, 0.95 - 0.08 * i  # in the empty half: no query sees a later key
        axes.text(*place, name, color=colour, transform=axes.transAxes, ha="right", fontsize=16)
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.set_xlabel("key position (tokens)", fontsize=14)
    axes.set_ylabel("query position (tokens)", fontsize=14)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def table(metrics: dict[str, Any]) -> str:
    lines = ["| scenes | digits right | captions all right |", "|---|---:|---:|"]
    for name, scores in metrics["accuracy"].items():
        digits, captions = scores["digit_accuracy"], scores["whole_caption_accuracy"]
        lines.append(f"| {name} | {digits:.1%} | {captions:.1%} |")
    lines.append("| chance | 10.0% | 0.01% |")
    attention, seconds = metrics["attention"], sum(metrics["seconds"].values())
    sentences = (
        f"{metrics['num_drawings']} held-out captions, digits centred; attention to",
        f"{attention['attended_fraction']:.0%} of the causal keys;",
        f"{metrics['parameters'] / 1e6:.1f} M parameters; {seconds:.0f} s on",
        f"{metrics['device']}, torch {metrics['torch']}, commit {metrics['commit']},",
        f"{metrics['date']}; record: `docs/demo/metrics.json`.",
    )
    lines += ["", " ".join(sentences)]
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.json").is_file():
        raise SystemExit("usage: python docs/publish_demo.py FOLDER (the output of `make demo`)")
    run, target = Path(sys.argv[1]), ROOT / "docs" / "demo"
    target.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(run / name, target / name)
    metrics = json.loads((run / "metrics.json").read_text())
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    metrics["commit"] = head.stdout.strip()
    (target / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw_mask(load_config(run / "config.yaml"), ROOT / "docs" / "mask.png")
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table(metrics)}\n{END}{after}")


if __name__ == "__main__":
    main()
