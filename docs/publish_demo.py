"""Puts the results of `make demo` into the documentation: pictures, record, and README's table.

    python docs/publish_demo.py results/demo

Writes docs/demo/ and docs/overview.png, and fills README.md from docs/demo/metrics.json alone.
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
from cogview.config import load_config

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"
FILES = ("samples.png", "reconstructions.png", "curves.png")


def draw_overview(run: Path, target: Path) -> None:
    """The regions of the demo's attention beside what its model drew."""
    config = load_config(run / "config.yaml")
    seqlen, text_len = config.model.max_positions, config.max_text_len
    pivots = ck.sample_pivots(
        text_len, seqlen, config.model.num_pivots, torch.Generator().manual_seed(config.seed)
    )
    layout = ck.ThreeRegionLayout(
        text_len, pivots, config.model.query_window, config.model.key_window_times
    )
    window, text, pivot = (region[0] for region in layout.regions(1, seqlen, seqlen))
    picture = torch.full((seqlen, seqlen, 3), 0.96)
    for region, colour in (
        (window, (0.17, 0.35, 0.60)),
        (text, (0.93, 0.60, 0.15)),
        (pivot, (0.75, 0.18, 0.30)),
    ):
        picture[region] = torch.tensor(colour)

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 6.2), width_ratios=(1, 1.05), layout="constrained"
    )
    left.imshow(picture.numpy(), interpolation="nearest")
    left.set_xlabel("key position (tokens)")
    left.set_ylabel("query position (tokens)")
    left.set_title("Who looks where: window (blue), pivots (red), text (orange)")
    right.imshow(plt.imread(run / "samples.png"))
    right.axis("off")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def table(metrics: dict[str, Any]) -> str:
    lines = ["| scenes | digits right | captions all right |", "|---|---:|---:|"]
    for name, scores in metrics["accuracy"].items():
        digits, captions = scores["digit_accuracy"], scores["whole_caption_accuracy"]
        lines.append(f"| {name} | {digits:.1%} | {captions:.1%} |")
    lines.append("| chance | 10.0% | 0.01% |")
    attention, seconds = metrics["attention"], sum(metrics["seconds"].values())
    sentences = (
        f"{metrics['num_drawings']} held-out captions of four digits, read back by a classifier",
        "that was trained on other handwriting. A query attends to",
        f"{attention['attended_fraction']:.0%} of its causal keys, and to at most",
        f"{attention['longest_list_fraction']:.0%} of the sequence.",
        f"{metrics['parameters'] / 1e6:.1f} M parameters, {seconds:.0f} s in all on",
        f"{metrics['device']}, torch {metrics['torch']}, commit {metrics['commit']},",
        f"{metrics['date']}; record: `docs/demo/metrics.json`, pictures beside it.",
    )
    lines += ["", " ".join(sentences)]
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.json").is_file():
        raise SystemExit("usage: python docs/publish_demo.py FOLDER, one that `make demo` wrote")
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
    draw_overview(run, ROOT / "docs" / "overview.png")
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table(metrics)}\n{END}{after}")


if __name__ == "__main__":
    main()
