"""How a codebook is trained: the four rules of the image tokenizer, side by side.

    python -m benchmarks.experiments.quantizers --help

For each rule the image tokenizer of the preset `digits`, with 32 codes, learns scenes of
handwritten digits that stand up to two pixels beside the middle of their quarters. The runs of a
seed start from the same encoder and decoder, and read the same images in the same order; they
differ in `image_tokenizer.quantizer` alone. The learning rate falls to 0 at the last step, so that
each number of steps is a run of its own. A run that has ended is kept in ``--out`` and not repeated
at the same commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import machine
from benchmarks.report.tables import table as markdown
from cogview.config import QUANTIZERS, load_config
from cogview.demo.digits import make_scenes
from cogview.files import atomic_write
from cogview.image_training import ImageTokenizerTrainer
from cogview.loop import read_metrics

NAMES = dict(
    zip(QUANTIZERS, ("moving average", "straight-through", "Gumbel", "fixed"), strict=True)
)
COLOURS = dict(zip(QUANTIZERS, ("#009E73", "#0072B2", "#D55E00", "#777777"), strict=True))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The same for all rules. ``settings``: on top of the preset `digits`."""

    steps: tuple[int, ...] = (300, 1200)
    seeds: tuple[int, ...] = (0, 1, 2)
    measurements: int = 24  # of the held-out images, in a run
    num_train: int = 8000
    num_held_out: int = 128
    settings: tuple[str, ...] = (
        "image_tokenizer.codebook_size=32",
        "image_training.pictures_every=0",
        "device=cpu",
    )


Run = dict[str, Any]


def train(rule: str, steps: int, seed: int, experiment: Experiment) -> Run:
    """One run. ``curve``: a row for each measurement; ``revived``: codes, over all steps."""
    torch.set_num_threads(1)  # runs stand side by side
    own = (f"image_tokenizer.quantizer={rule}", f"seed={seed}", f"image_training.steps={steps}")
    often = f"image_training.eval_every={max(1, steps // experiment.measurements)}"
    seldom = f"image_training.save_every={steps}"
    all_of_them = f"image_training.eval_examples={experiment.num_held_out}"
    config = load_config("digits", [*experiment.settings, *own, often, seldom, all_of_them])
    images = make_scenes("train", experiment.num_train, seed=0).images
    held_out = make_scenes("test", experiment.num_held_out, seed=0).images
    with tempfile.TemporaryDirectory() as folder:
        trainer = ImageTokenizerTrainer(config, folder, images, held_out, progress=False)
        trainer.run()
        rows = read_metrics(trainer.metrics_path)
    measured = {
        "loss": "held_out_reconstruction_loss",
        "codes_used": "held_out_codes_used",
        "perplexity": "held_out_perplexity",
    }
    curve = [
        {"step": row["step"]} | {name: float(f"{row[of]:.5g}") for name, of in measured.items()}
        for row in rows
        if measured["loss"] in row
    ]
    return {
        "rule": rule,
        "steps": steps,
        "seed": seed,
        "curve": curve,
        "revived": sum(int(row["codes_revived"]) for row in rows),
        "codebook_size": config.image_tokenizer.codebook_size,
        "batch_size": config.image_training.batch_size,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }


def run_once(rule: str, steps: int, seed: int, experiment: Experiment, folder: Path) -> Run:
    """The run from its file in the folder, if there is one, else anew."""
    what = {"rule": rule, "steps": steps, "seed": seed, "torch": torch.__version__}
    what |= {"experiment": dataclasses.asdict(experiment), "commit": machine.commit_info()}
    path = folder / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        run = train(rule, steps, seed, experiment)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(run))
    kept: Run = json.loads(path.read_text())
    return kept


def run_all(experiment: Experiment, jobs: int, folder: Path) -> dict[str, Any]:
    """The record."""
    plan = [
        (rule, steps, seed)
        for steps in experiment.steps
        for seed in experiment.seeds
        for rule in QUANTIZERS
    ]
    record: dict[str, Any] = {
        "machine_info": machine.machine_info(torch.device("cpu")) | {"threads": 1},
        "commit_info": machine.commit_info(),
        "datetime": machine.now(),
        "experiment": dataclasses.asdict(experiment),
        "runs": [],
    }
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_once, *one, experiment, folder) for one in plan]
        for (rule, steps, seed), future in zip(plan, futures, strict=True):
            record["runs"].append(run := future.result())
            loss = run["curve"][-1]["loss"]
            print(f"{steps} steps, seed {seed}, {NAMES[rule]}: loss {loss:.4f}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Experiment()
    parser.add_argument("--steps", type=int, nargs="+", default=usual.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=usual.seeds)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "quantizers")
    args = parser.parse_args()
    experiment = Experiment(steps=tuple(args.steps), seeds=tuple(args.seeds))
    record = run_all(experiment, args.jobs, args.out)
    name = machine.record_name(
        "quantizers", record["machine_info"], record["commit_info"], record["datetime"]
    )
    machine.save_record(record, path := machine.RESULTS / name)
    print(f"\n{table(record)}\n\nrecord: {path}")


def table(record: dict[str, Any]) -> str:
    """A row for each number of steps and each rule."""
    experiment, first = record["experiment"], record["runs"][0]
    rows, size = [], first["codebook_size"]
    for steps, rule in _groups(record):
        runs = _of(record, steps, rule)
        last = [run["curve"][-1] for run in runs]
        rows.append(
            {
                "rule": NAMES[rule],
                "steps": f"{steps:,}",
                "held-out loss": _span([end["loss"] for end in last], ".4f"),
                f"codes used, of {size}": _span([end["codes_used"] for end in last], ".0f"),
                "perplexity": _span([end["perplexity"] for end in last], ".1f"),
                "codes revived": _span([run["revived"] for run in runs], ".0f"),
                "time": f"{np.mean([run['seconds'] for run in runs]):.0f} s",
            }
        )
    note = (
        f"Mean squared error of the normalised pixels of {experiment['num_held_out']} held-out "
        f"scenes, codes that they use, and the exponential of the codes' entropy, at the last step "
        f"of {first['batch_size']} images; mean over {len(experiment['seeds'])} seeds (smallest to "
        "largest). Revived: codes restarted over the whole training, which the moving average "
        "alone does. All rules have the same learning rate. Time: of the training, on one thread."
    )
    return f"{markdown(rows)}\n\n{note}"


def _groups(record: dict[str, Any]) -> Iterable[tuple[int, str]]:
    return dict.fromkeys((run["steps"], run["rule"]) for run in record["runs"])


def _of(record: dict[str, Any], steps: int, rule: str) -> list[Run]:
    return [run for run in record["runs"] if (run["steps"], run["rule"]) == (steps, rule)]


def _span(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    text = f"{np.mean(values):{form}}"
    return text if low == high else f"{text} ({low:{form}} to {high:{form}})"


HOW_TO_READ = (
    "Each line is a run: above, the held-out reconstruction loss by step; below, how many codes "
    "the held-out images use, weighted by how often (perplexity). A column is a number of steps."
)


def draw(record: dict[str, Any], path: Path) -> None:
    """Loss and perplexity by step; a column for each number of steps."""
    columns = list(dict.fromkeys(steps for steps, _ in _groups(record)))
    figure = Figure(figsize=(4.7 * len(columns), 7), layout="constrained")
    panels = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
    for column, steps in zip(panels.T, columns, strict=True):
        for run in (run for run in record["runs"] if run["steps"] == steps):
            at = [row["step"] for row in run["curve"]]
            for axis, name in zip(column, ("loss", "perplexity"), strict=True):
                values = [row[name] for row in run["curve"]]
                axis.plot(at, values, color=COLOURS[run["rule"]], linewidth=1)
        column[0].set_title(f"{steps:,} steps")
        column[1].set_xlabel("step")
    panels[0, 0].set(ylabel="held-out reconstruction loss", yscale="log")
    size = record["runs"][0]["codebook_size"]
    panels[1, 0].set(ylabel=f"perplexity (of {size} codes)", ylim=(0, size))
    used = dict.fromkeys(run["rule"] for run in record["runs"])
    handles = [Line2D([], [], color=COLOURS[rule], label=NAMES[rule]) for rule in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


if __name__ == "__main__":
    main()
