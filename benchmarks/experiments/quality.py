"""The same performance?  One small CogView, trained dense and three-region on the same batches.

    dense            every earlier position
    three_region     text, pivots and window: at most a quarter of the keys
    without_pivots   text and window
    without_text     pivots and window: text is seen where the window still holds it

Every variant starts from the same weights of a seed and reads the same scenes of handwritten digits
in the same order. What is compared: the losses on training and held-out scenes, and how many digits
of held-out captions a classifier reads back from the drawings.

A finished run is kept as a file in `--out`, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import cogview.train
import cogview_kernels as ck
from benchmarks.suite.measure import commit_info, machine_info, now, record_name
from cogview.config import Config, RunFolder, load_config
from cogview.digits import CANVAS_SIZE, make_scenes
from cogview.evaluate import DigitReader, caption_accuracy
from cogview.files import atomic_write
from cogview.image_tokenizer import ImageTokenizer, train_image_tokenizer
from cogview.model import GPT
from cogview.sample import draw_images
from cogview.sequence import Batch
from cogview.text_tokenizer import TextTokenizer
from cogview.tokens import TokenDataset
from cogview.train import Trainer, choose_device, read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results"
CURVE_POINTS = 60

# Of the demonstration's preset: its scenes as 24x24 codes, few of them different, so that more of
# the loss is what the caption says. So fine a code is mostly what its neighbours are: a lower
# temperature draws blank paper.
SETTINGS = (
    "image_tokenizer.image_size=96",
    "image_tokenizer.codebook_size=8",
    "image_training.steps=200",
    "model.max_positions=592",
    "model.query_window=24",  # one row of codes
    "model.key_window_times=2",
    "model.num_pivots=40",
    "training.precision=bfloat16",
    "training.eval_every=160",
    "training.eval_examples=128",
    "training.save_every=1000000",
    "sampling.temperature=0.6",
)


class WithoutText(GPT):
    """The text's region is taken away; pivots stand behind the text as before."""

    def sample_layouts(self, *args: Any, **kwargs: Any) -> list[ck.ThreeRegionLayout | None]:
        layouts = super().sample_layouts(*args, **kwargs)
        return [layout and dataclasses.replace(layout, text_len=0) for layout in layouts]


class Variant(NamedTuple):
    label: str
    settings: dict[str, Any]  # of the model
    model: type[GPT] = GPT


VARIANTS = {
    "dense": Variant("dense causal", {"attention": "dense"}),
    "three_region": Variant("three-region", {}),
    "without_pivots": Variant("three-region without pivots", {"num_pivots": 0}),
    "without_text": Variant("three-region without text", {}, WithoutText),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What all runs share."""

    config: Config  # of the three-region variant, with the first seed
    num_train: int = 8000
    num_test: int = 128

    def of(self, variant: str, seed: int) -> Config:
        model = dataclasses.replace(self.config.model, **VARIANTS[variant].settings)
        return dataclasses.replace(self.config, model=model, seed=seed)

    def folder(self, out: Path) -> Path:
        """Other settings, another commit or machine: other runs."""
        machine = machine_info(choose_device(self.config.device))
        what = dataclasses.asdict(self), commit_info(), machine["device"], machine["torch"]
        return out / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


class Data(NamedTuple):
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    train: TokenDataset
    test: TokenDataset
    captions: list[str]
    labels: torch.Tensor


class ObservedTrainer(Trainer):
    """Also keeps a digest of every batch that it trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches = hashlib.sha256()

    def _batch(self, data: TokenDataset, indices: np.ndarray) -> Batch:
        batch = super()._batch(data, indices)
        if data is self.train_data:
            self.batches.update(batch.tokens.cpu().numpy().tobytes())
        return batch


def enlarged(images: torch.Tensor, size: int) -> torch.Tensor:
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)


def load_data(experiment: Experiment, folder: Path) -> Data:
    run = RunFolder(folder)
    scenes = make_scenes("test", experiment.num_test, experiment.config.seed)
    return Data(
        TextTokenizer.load(run.text_tokenizer),
        ImageTokenizer.load(run.image_tokenizer),
        TokenDataset.load(folder / "train.npz"),
        TokenDataset.load(folder / "test.npz"),
        scenes.captions,
        scenes.labels,
    )


def make_data(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Tokenizers and tokens of all runs.

    Returns:
        how well real scenes, and those that went through the image tokenizer, are read back: what
        drawings can reach.
    """
    done = folder / "data.json"
    if done.is_file():
        return json.loads(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    config, run = experiment.config, RunFolder(folder)
    train = make_scenes("train", experiment.num_train, config.seed)
    test = make_scenes("test", experiment.num_test, config.seed)
    images, test_images = (
        enlarged(scenes.images, config.image_tokenizer.image_size) for scenes in (train, test)
    )
    text_tokenizer = TextTokenizer.train(
        train.captions, run.text_tokenizer, **dataclasses.asdict(config.text_tokenizer)
    )
    image_tokenizer, _ = train_image_tokenizer(
        config.image_tokenizer,
        images,
        **dataclasses.asdict(config.image_training),
        seed=config.seed,
        device=choose_device(config.device),
        progress=False,
    )
    image_tokenizer.save(run.image_tokenizer)
    parts = {"train": (train.captions, images), "test": (test.captions, test_images)}
    for name, (captions, pictures) in parts.items():
        tokens = TokenDataset.tokenize(
            captions, pictures, text_tokenizer, image_tokenizer, progress=False
        )
        tokens.save(folder / f"{name}.npz")
    decoded = image_tokenizer.decode(torch.from_numpy(tokens.codes))
    accuracy = {
        "real": read_back(test_images, test.labels, config.seed),
        "reconstructed": read_back(decoded, test.labels, config.seed),
    }
    _save(done, accuracy)
    return accuracy


def read_back(images: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, float]:
    size = (CANVAS_SIZE, CANVAS_SIZE)
    scenes = F.interpolate(images.cpu(), size=size, mode="bilinear", antialias=True)
    return caption_accuracy(digit_reader(seed).read(scenes), labels)


@functools.cache
def digit_reader(seed: int) -> DigitReader:
    return DigitReader(seed=seed)


def make_trainer(
    variant: str, config: Config, folder: str | os.PathLike[str], data: Data
) -> ObservedTrainer:
    with mock.patch.object(cogview.train, "GPT", VARIANTS[variant].model):
        return ObservedTrainer(config, folder, data.train, data.test, progress=False)


def keys_attended(trainer: Trainer, count: int = 16) -> dict[str, float]:
    """Keys that a query attends to, counted over the first held-out scenes and all layers.

    Returns:
        the mean over queries (`mean`); its parts `window`, `text` and `pivots` where there are
        regions; the mean of dense causal attention (`causal`); and `sequence`, its length.
    """
    data, config, model = trainer.held_out_data, trainer.config, trainer.model
    batch = trainer._batch(data, np.arange(min(count, len(data))))
    size, length = batch.tokens.shape[0], batch.tokens.shape[1] - 1  # the last is a target alone
    generator = torch.Generator(trainer.device).manual_seed(config.seed)
    causal = {"sequence": length, "causal": (length + 1) / 2, "mean": (length + 1) / 2}
    parts = torch.zeros(3, dtype=torch.int64)
    for layout in model.sample_layouts(batch.text_len, length, generator):
        if layout is None:
            return causal
        regions = layout.regions(size, length, length)
        parts += torch.stack([region.count_nonzero().cpu() for region in regions])
    window, text, pivots = (parts / (size * length * config.model.num_layers)).tolist()
    return causal | {
        "mean": window + text + pivots,
        "window": window,
        "text": text,
        "pivots": pivots,
    }


def weights_digest(model: GPT) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def run_one(
    experiment: Experiment, variant: str, seed: int, folder: Path, threads: int
) -> dict[str, Any]:
    """Trains one variant from one seed, draws the held-out captions and reads them back."""
    torch.set_num_threads(threads)
    data, config = load_data(experiment, folder), experiment.of(variant, seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(variant, config, scratch, data)
        result = {
            "variant": variant,
            "seed": seed,
            "keys": keys_attended(trainer),
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "initial_weights": weights_digest(trainer.model),
        }
        model = trainer.run()
        rows = read_metrics(trainer.metrics_path)
    texts = [data.text_tokenizer.encode(caption) for caption in data.captions]
    codes = draw_images(model, config, texts, seed=seed, progress=False)
    drawings = data.image_tokenizer.decode(codes)
    result |= {
        "batches": trainer.batches.hexdigest(),
        "training": smoothed(rows),
        "held_out": [
            {"step": row["step"], "image_loss": row["held_out_image_loss"]}
            for row in rows
            if "held_out_image_loss" in row
        ],
        "accuracy": read_back(drawings, data.labels, experiment.config.seed),
    }
    _save(folder / f"{variant}-{seed}.json", result)
    return result


def smoothed(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Means over stretches of steps; each stands at its last step."""
    size = math.ceil(len(rows) / CURVE_POINTS)
    stretches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [
        {
            "step": stretch[-1]["step"],
            "image_loss": statistics.fmean(row["image_loss"] for row in stretch),
        }
        for stretch in stretches
    ]


def run(
    experiment: Experiment, variants: Sequence[str], seeds: Sequence[int], jobs: int, out: Path
) -> Iterator[dict[str, Any]]:
    """Runs what is not finished yet, `jobs` at a time.

    Yields:
        the record, each time that another run is in it; the last one holds all.

    Raises:
        RuntimeError: variants of one seed started from different weights or read different batches.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    record: dict[str, Any] = {
        "machine_info": machine_info(choose_device(experiment.config.device)),
        "commit_info": commit_info(),
        "datetime": now(),
        "settings": dataclasses.asdict(experiment),
        "jobs": jobs,
        "threads_per_job": threads,
    }
    folder = experiment.folder(out)
    record["can_be_read"] = make_data(experiment, folder)
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = []
        for seed in seeds:  # so that a part of the experiment compares all variants
            for variant in variants:
                finished = folder / f"{variant}-{seed}.json"
                if finished.is_file():
                    runs[variant, seed] = json.loads(finished.read_text())
                else:
                    waiting.append(pool.submit(run_one, experiment, variant, seed, folder, threads))
        if runs:
            yield record | _ordered(runs, variants, seeds)
        for future in as_completed(waiting):
            result = future.result()
            runs[result["variant"], result["seed"]] = result
            yield record | _ordered(runs, variants, seeds)


def _ordered(
    runs: dict[tuple[str, int], dict[str, Any]], variants: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    wanted = [(variant, seed) for variant in variants for seed in seeds]
    for seed in seeds:
        for name in ("initial_weights", "batches"):
            seen = {runs[key][name] for key in wanted if key in runs and key[1] == seed}
            if len(seen) > 1:
                raise RuntimeError(f"seed {seed}: the variants differ in their {name}")
    return {
        "runs": [runs[key] for key in wanted if key in runs],
        "not_run": [list(key) for key in wanted if key not in runs],
    }


QUANTITIES = {
    "held-out image loss": (lambda run: run["held_out"][-1]["image_loss"], "{:.4f}", "{:+.4f}"),
    "digits right": (lambda run: run["accuracy"]["digit_accuracy"], "{:.1%}", "{:+.1%}"),
    "captions right": (lambda run: run["accuracy"]["whole_caption_accuracy"], "{:.1%}", "{:+.1%}"),
}
DIFFERENCES = (
    ("three_region", "dense"),
    ("without_pivots", "three_region"),
    ("without_text", "three_region"),
)


def paired_difference(
    record: dict[str, Any], variant: str, other: str, quantity: str
) -> tuple[float, float | None, int]:
    """Mean of `variant - other` over the seeds that ran both, its standard error (none of a single
    seed), and how many seeds those are."""
    value = QUANTITIES[quantity][0]
    by_seed: dict[str, dict[int, float]] = {variant: {}, other: {}}
    for one in record["runs"]:
        if one["variant"] in by_seed:
            by_seed[one["variant"]][one["seed"]] = value(one)
    both = by_seed[variant].keys() & by_seed[other].keys()
    differences = [by_seed[variant][seed] - by_seed[other][seed] for seed in both]
    if not differences:
        return math.nan, None, 0
    error = statistics.stdev(differences) / math.sqrt(len(both)) if len(both) > 1 else None
    return statistics.fmean(differences), error, len(both)


def table(record: dict[str, Any]) -> str:
    """What came of the variants, and their differences, seed by seed."""
    lines = [
        "| variant | keys a query attends to | fewer than dense | held-out image loss "
        "| digits right | captions right | seeds |",
        "|---|" + "---:|" * 6,
    ]
    for name, runs in _by_variant(record).items():
        keys = runs[0]["keys"]
        cells = [
            VARIANTS[name].label,
            f"{keys['mean']:.1f}",
            f"{keys['causal'] / keys['mean']:.2f}x",
        ]
        for value, form, _ in QUANTITIES.values():
            cells.append(_with_spread([value(one) for one in runs], form))
        cells.append(str(len(runs)))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"| difference, by seed | {' | '.join(QUANTITIES)} | seeds |",
        "|---|" + "---:|" * 4,
    ]
    for variant, other in DIFFERENCES:
        cells = [f"{VARIANTS[variant].label} − {VARIANTS[other].label}"]
        for quantity, (_, form, signed) in QUANTITIES.items():
            mean, error, seeds = paired_difference(record, variant, other, quantity)
            cells.append(
                signed.format(mean) + ("" if error is None else f" ± {form.format(error)}")
            )
        if seeds:
            lines.append(f"| {' | '.join(cells)} | {seeds} |")
    lines += ["", _settings(record)]
    if record["not_run"]:
        missing = ", ".join(f"{variant} with seed {seed}" for variant, seed in record["not_run"])
        lines += ["", f"Not run: {missing}."]
    return "\n".join(lines)


def _settings(record: dict[str, Any]) -> str:
    config, first, machine = record["settings"]["config"], record["runs"][0], record["machine_info"]
    model, training, image = config["model"], config["training"], config["image_tokenizer"]
    side = image["image_size"] // 2 ** image["num_downsamples"]
    real, reconstructed = (
        f"{record['can_be_read'][name]['digit_accuracy']:.1%}" for name in ("real", "reconstructed")
    )
    return (
        f"Means over seeds ± their standard deviation; differences ± their standard error. Scenes "
        f"of four handwritten digits as {side}x{side} codes, {first['keys']['sequence']} tokens "
        f"with the caption; {model['num_layers']} layers of width {model['hidden_size']}, "
        f"{first['parameters']:,} parameters; window {model['key_window_times']} x "
        f"{model['query_window']}, {model['num_pivots']} pivots; {training['steps']} steps of "
        f"{training['batch_size']} scenes in {training['precision']}; loss in nats per code. The "
        f"variants without pivots or text attend to nothing in their place. "
        f"{record['settings']['num_test']} captions, of combinations of digits that no training "
        f"scene shows, are drawn at temperature {config['sampling']['temperature']} and read by a "
        f"classifier. It reads {real} of the digits of real scenes, {reconstructed} of what the "
        f"image tokenizer makes of them; chance is 10%. By their digests, weights at the start and "
        f"batches of a seed are the same for all variants. Trained on {machine['device']}, torch "
        f"{machine['torch']}."
    )


def _by_variant(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    grouped = {name: [one for one in record["runs"] if one["variant"] == name] for name in VARIANTS}
    return {name: runs for name, runs in grouped.items() if runs}


def _with_spread(values: Sequence[float], form: str) -> str:
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + spread


COLOURS = {  # Okabe and Ito's, told apart by the colour-blind
    "dense": "#000000",
    "three_region": "#0072B2",
    "without_pivots": "#E69F00",
    "without_text": "#D55E00",
}


def draw(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Losses over steps (mean and standard deviation over seeds), and each seed's accuracies."""
    grouped = _by_variant(record)
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    training, held_out, digits, captions = figure.subplots(2, 2).ravel()
    for axis, curve, title in (
        (training, "training", "training scenes"),
        (held_out, "held_out", "held-out scenes"),
    ):
        settled = []
        for name, runs in grouped.items():
            steps = [point["step"] for point in runs[0][curve]]
            losses = np.array([[point["image_loss"] for point in one[curve]] for one in runs])
            mean, spread = losses.mean(0), losses.std(0, ddof=min(1, len(runs) - 1))
            axis.plot(steps, mean, color=COLOURS[name], label=VARIANTS[name].label, linewidth=1.4)
            axis.fill_between(steps, mean - spread, mean + spread, color=COLOURS[name], alpha=0.2)
            settled.append(losses[:, len(steps) // 10 :])  # the first steps would flatten the rest
        low, high = min(x.min() for x in settled), max(x.max() for x in settled)
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axis.set_title(f"image loss on {title}", fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylabel("image loss (nats per code)")
        axis.grid(alpha=0.3)
    training.legend(fontsize=9)
    for axis, name, title in (
        (digits, "digit_accuracy", "digits drawn right, in the right place"),
        (captions, "whole_caption_accuracy", "captions with all four digits right"),
    ):
        for place, (variant, runs) in enumerate(grouped.items()):
            values = [100 * one["accuracy"][name] for one in runs]
            offsets = place + 0.08 * (np.arange(len(values)) - (len(values) - 1) / 2)
            axis.plot(offsets, values, "o", color=COLOURS[variant], markersize=6)
            axis.hlines(statistics.fmean(values), place - 0.3, place + 0.3, COLOURS[variant])
        ceiling = 100 * record["can_be_read"]["reconstructed"][name]
        axis.axhline(ceiling, color="grey", linestyle="--", linewidth=1)
        axis.annotate(
            "read from reconstructions",
            (0, ceiling),
            (0, -11),
            fontsize=8,
            color="grey",
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
        )
        labels = [VARIANTS[variant].label for variant in grouped]
        axis.set_xticks(range(len(labels)), [textwrap.fill(label, 16) for label in labels])
        axis.set_ylim(0, 102)
        axis.set_title(title, fontsize=11)
        axis.set_ylabel("held-out captions (%)" if axis is captions else "digits (%)")
        axis.grid(alpha=0.3, axis="y")
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _save(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    arguments = parser.parse_args()
    config = load_config("digits", [*SETTINGS, f"device={arguments.device}"])
    config.training.steps = arguments.steps or config.training.steps
    path = None
    for record in run(
        Experiment(config), arguments.variants, arguments.seeds, arguments.jobs, arguments.out
    ):
        name = record_name(
            "quality", *(record[k] for k in ("machine_info", "commit_info", "datetime"))
        )
        path = RECORDS / name
        _save(path, record)
        print(f"{len(record['runs'])} runs finished, {len(record['not_run'])} to go", flush=True)
    print(f"\n{table(record)}\n\nrecord: {path}")


if __name__ == "__main__":
    main()
