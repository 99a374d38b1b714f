"""The same performance?  One small CogView, trained with dense and with three-region attention.

Two tasks on scenes of four handwritten digits:

    captions    the caption names the four digits
    repeats     the lower half is a copy of the upper half; the caption names no digit, and no
                window reaches from a digit back to the one that it repeats

Three variants, which start from the same weights of a seed and read the same batches:

    dense           every earlier position
    three_region    text, pivots and window: about a quarter of the keys
    no_pivots       text and window

First, runs with a seed of their own choose the learning rates of dense and of three-region (no
pivots takes the latter's) by the held-out loss. Then every seed trains all variants on both tasks.
A network that sees 20 neighbouring codes and nothing else says which loss texture alone allows.

A finished run is kept as a file in `--out`: the same command goes on where it was stopped.
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
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats  # type: ignore[import-untyped]

from benchmarks.machine import RESULTS, commit_info, machine_info, now, record_name, save_record
from cogview.config import Config, ModelConfig, RunFolder, load_config
from cogview.digits import CANVAS_SIZE, compose_scenes, is_held_out, make_scenes
from cogview.evaluate import DigitReader
from cogview.files import atomic_write
from cogview.image_tokenizer import ImageTokenizer, train_image_tokenizer
from cogview.model import GPT
from cogview.sample import draw_images
from cogview.sequence import Batch
from cogview.text_tokenizer import TextTokenizer
from cogview.tokens import TokenDataset
from cogview.train import Trainer, choose_device, make_batch, read_metrics

SETTINGS = (
    "image_tokenizer.image_size=56",
    "image_tokenizer.codebook_size=16",
    "model.num_layers=2",
    "model.max_positions=204",
    "training.steps=1400",
    "training.batch_size=6",
    "training.precision=bfloat16",
    "training.eval_every=200",
    "training.eval_examples=64",
    "training.save_every=1000000",
)


class Task(NamedTuple):
    title: str
    settings: tuple[str, ...]  # of the layout
    given: float  # share of the image that is not counted, and is given when the rest is drawn


TASKS = {
    "captions": Task(
        "the caption names the digits",
        ("model.query_window=7", "model.key_window_times=3", "model.num_pivots=6"),
        0.0,
    ),
    "repeats": Task(
        "the lower half repeats the upper half",
        ("model.query_window=4", "model.key_window_times=2", "model.num_pivots=30"),
        0.5,
    ),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # label, settings of the model
    "dense": ("dense causal", {"attention": "dense"}),
    "three_region": ("three-region", {}),
    "no_pivots": ("three-region, no pivots", {"num_pivots": 0}),
}
UNNAMED = "any any any any"  # as many words as the names of four digits
TEXT_LEN = 7  # four words and three command tokens


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What all runs share."""

    settings: tuple[str, ...] = SETTINGS  # on top of the preset `digits`
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 16e-3)
    sweep_seed: int = 100
    num_train: int = 8000
    num_test: int = 512
    neighbour_steps: int = 4000  # of the network of 20 neighbours

    def config(self, task: str, variant: str = "three_region", seed: int = 0) -> Config:
        config = load_config("digits", [*self.settings, *TASKS[task].settings])
        config.model = dataclasses.replace(config.model, **VARIANTS[variant][1])
        config.seed = seed
        return config

    def folder(self, out: Path) -> Path:
        """Other settings, another commit or machine: other runs."""
        device = machine_info(choose_device(self.config("captions").device))["device"]
        what = dataclasses.asdict(self), TASKS, commit_info(), device, torch.__version__
        return out / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


class Run(NamedTuple):
    task: str
    model: str  # a variant, or "neighbours"
    seed: int
    rate: float = 0.0
    draws: bool = True  # draws the held-out captions

    def path(self, folder: Path) -> Path:
        return folder / f"{self.task}-{self.model}-{self.seed}-{self.rate}.json"


# Data.


class Data(NamedTuple):
    image_tokenizer: ImageTokenizer
    train: TokenDataset
    test: TokenDataset
    labels: torch.Tensor  # of the test scenes


def scenes_of(
    task: str, split: str, num: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images of this size, digits and captions; test scenes show combinations of digits that no
    training scene shows. Digits stand within a pixel
    of the middle of their cells."""
    if task == "captions":
        scenes = make_scenes(split, num, seed=0, jitter=1)
        fillers = ("a", "an", "and", "above")
        names = [[w for w in text.split() if w not in fillers] for text in scenes.captions]
        captions = [" ".join(words) for words in names]
    else:
        rng = np.random.default_rng([split == "test"])
        pairs = np.array([(a, b, a, b) for a in range(10) for b in range(10)])
        held_out = np.array([is_held_out(digits) for digits in pairs])
        digits = rng.choice(pairs[held_out == (split == "test")], num)
        scenes = compose_scenes(split, digits, rng, jitter=1)
        upper = scenes.images[:, :, : CANVAS_SIZE // 2]
        scenes, captions = scenes._replace(images=torch.cat([upper, upper], 2)), [UNNAMED] * num
    return _resized(scenes.images, size), scenes.labels, captions


def _resized(images: torch.Tensor, size: int) -> torch.Tensor:
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)


def make_data(experiment: Experiment, folder: Path) -> dict[str, float]:
    """Tokenizers and tokens of all runs.

    Returns:
        the share of digits read right from real test scenes (`real`) and from what the image
        tokenizer makes of them (`reconstructed`): what drawings can reach.
    """
    done = folder / "data.json"
    if done.is_file():
        return json.loads(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    config, files = experiment.config("captions"), RunFolder(folder)
    size = config.image_tokenizer.image_size
    scenes = {
        (task, split): scenes_of(task, split, num, size)
        for task in TASKS
        for split, num in (("train", experiment.num_train), ("test", experiment.num_test))
    }
    texts = [text for task in TASKS for text in scenes[task, "train"][2]]
    text_tokenizer = TextTokenizer.train(
        texts, files.text_tokenizer, **dataclasses.asdict(config.text_tokenizer)
    )
    image_tokenizer, _ = train_image_tokenizer(
        config.image_tokenizer,
        scenes["captions", "train"][0],
        **dataclasses.asdict(config.image_training),
        device=choose_device(config.device),
        progress=False,
    )
    image_tokenizer.save(files.image_tokenizer)
    for (task, split), (images, _, captions) in scenes.items():
        tokens = TokenDataset.tokenize(
            captions, images, text_tokenizer, image_tokenizer, progress=False
        )
        assert tokens.text_offsets[-1] == len(tokens) * (TEXT_LEN - 3)
        tokens.save(folder / f"{task}-{split}.npz")
    images, labels, _ = scenes["captions", "test"]
    codes = TokenDataset.load(folder / "captions-test.npz").codes
    decoded = image_tokenizer.decode(torch.from_numpy(codes))
    shares = {
        "real": right(images, labels).mean().item(),
        "reconstructed": right(decoded, labels).mean().item(),
    }
    _save(done, shares)
    return shares


def load_data(experiment: Experiment, task: str, folder: Path) -> Data:
    return Data(
        ImageTokenizer.load(RunFolder(folder).image_tokenizer),
        TokenDataset.load(folder / f"{task}-train.npz"),
        TokenDataset.load(folder / f"{task}-test.npz"),
        scenes_of(task, "test", experiment.num_test, CANVAS_SIZE)[1],
    )


def right(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, 4), 1 where a classifier reads the right digit in the right place."""
    return (digit_reader().read(_resized(images.cpu(), CANVAS_SIZE)) == labels).float()


@functools.cache
def digit_reader() -> DigitReader:
    return DigitReader()


# Runs.


def model_with_waves(config: ModelConfig, vocab_size: int) -> GPT:
    """The positions of codes start as sines and cosines of their row and column, so that finding
    the neighbours takes fewer steps. The same for all variants."""
    model = GPT(config, vocab_size)
    table = model.transformer.position_embeddings.weight
    side = math.isqrt(config.max_positions - TEXT_LEN)
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    frequencies = torch.arange(1, config.hidden_size // 8 + 1) * math.pi / side
    angles = torch.cat([at[:, None] * frequencies for at in (rows, columns)], 1)
    waves = torch.cat([angles.sin(), angles.cos(), torch.zeros(side**2, angles.shape[1] * 2)], 1)
    with torch.no_grad():  # the first code is seen from the position before it
        table[TEXT_LEN - 1 : TEXT_LEN - 1 + side**2] = 2 * config.init_std * waves
    return model


@torch.no_grad()
def held_out_loss(model: GPT, config: Config, data: TokenDataset, given: float) -> float:
    """Loss in nats per code, over the codes that follow the `given` share of each image."""
    device = model.word_embeddings.weight.device
    generator = torch.Generator(device).manual_seed(config.seed)
    losses = []
    for indices in torch.arange(len(data)).split(32):
        batch = make_batch(config, data, indices.numpy()).to(device)
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        layouts = model.sample_layouts(batch.text_len, inputs.shape[1], generator)
        logits = model.logits(model(inputs, batch.positions[:, :-1], layouts))
        image = targets < config.vocabulary.codebook_size
        loss = F.cross_entropy(logits[image].float(), targets[image], reduction="none")
        losses.append(loss.view(len(indices), -1)[:, round(given * config.num_codes) :])
    return torch.cat(losses).mean().item()


def keys_attended(model: GPT, config: Config, data: TokenDataset) -> dict[str, float]:
    """Keys that a query attends to: the mean over queries, layers and 16 scenes (`mean`), and that
    of dense causal attention (`causal`)."""
    batch = make_batch(config, data, np.arange(min(16, len(data))))
    size, length = batch.tokens.shape[0], batch.tokens.shape[1] - 1  # the last is a target alone
    layouts = model.sample_layouts(batch.text_len, length, torch.Generator().manual_seed(0))
    causal = (length + 1) / 2
    counts = [
        sum(int(region.count_nonzero()) for region in layout.regions(size, length, length))
        for layout in layouts
        if layout is not None
    ]
    mean = statistics.fmean(counts) / (size * length) if counts else causal
    return {"mean": mean, "causal": causal}


def train_and_draw(experiment: Experiment, run: Run, folder: Path, threads: int) -> dict[str, Any]:
    """Trains a variant, measures its held-out loss, draws the held-out captions and reads them."""
    torch.set_num_threads(threads)
    started, cpu = time.perf_counter(), time.process_time()
    data, config = load_data(experiment, run.task, folder), experiment.config(*run[:3])
    config.training.learning_rate = run.rate
    given, batches = TASKS[run.task].given, hashlib.sha256()

    def digest(batch: Batch) -> None:
        batches.update(batch.tokens.cpu().numpy().tobytes())

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            config,
            scratch,
            data.train,
            data.test,
            progress=False,
            make_model=model_with_waves,
            on_batch=digest,
        )
        weights = hashlib.sha256()
        for _, tensor in sorted(trainer.model.state_dict().items()):
            weights.update(tensor.cpu().numpy().tobytes())
        model = trainer.run()
        rows = read_metrics(trainer.metrics_path)
    result: dict[str, Any] = run._asdict() | {
        "keys": keys_attended(model.cpu(), config, data.test),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_and_batches": [weights.hexdigest(), batches.hexdigest()],
        "curve": [
            (row["step"], row["held_out_image_loss"]) for row in rows if "held_out_loss" in row
        ],
    }
    model.to(trainer.device)
    result["loss"] = held_out_loss(model, config, data.test, given)
    if run.draws:
        kept = round(given * config.num_codes)
        drawn_right = right(
            data.image_tokenizer.decode(
                draw_images(
                    model,
                    config,
                    [data.test[i][0].tolist() for i in range(len(data.test))],
                    seed=run.seed,
                    beginnings=data.test.codes.reshape(len(data.test), -1)[:, :kept].tolist(),
                    progress=False,
                )
            ),
            data.labels,
        )
        result["digits_right"] = drawn_right[:, round(4 * given) :].mean().item()
    result |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    _save(run.path(folder), result)
    return result


def train_neighbours(
    experiment: Experiment, run: Run, folder: Path, threads: int
) -> dict[str, Any]:
    """Predicts a code from its 20 nearest earlier codes and its position: neither text nor
    attention. Its best held-out loss counts, not its last."""
    torch.set_num_threads(threads)
    torch.manual_seed(run.seed)
    cpu, data = time.process_time(), load_data(experiment, run.task, folder)
    size, outside = data.train.codes[0].size, data.train.codebook_size
    square = [(y, x) for y in range(-3, 1) for x in range(-3, 4) if (y, x) < (0, 0)]
    nearest = sorted(square, key=lambda offset: offset[0] ** 2 + offset[1] ** 2)[:20]

    def examples(data: TokenDataset) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.from_numpy(data.codes.astype(np.int64))
        height, width = codes.shape[1:]
        padded = F.pad(codes, (3, 3, 3, 0), value=outside)
        seen = [padded[:, 3 + y : 3 + y + height, 3 + x : 3 + x + width] for y, x in nearest]
        return torch.stack(seen, -1).view(-1, 20), codes.view(-1)

    def inputs(seen: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        parts = [F.one_hot(seen, outside + 1).flatten(1), F.one_hot(position, size)]
        return torch.cat(parts, 1).float()

    model = torch.nn.Sequential(
        torch.nn.Linear(20 * (outside + 1) + size, 256),
        torch.nn.GELU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(256, 256),
        torch.nn.GELU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(256, outside),
    )
    optimizer, steps = torch.optim.AdamW(model.parameters()), experiment.neighbour_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    (seen, codes), (test_seen, test_codes) = examples(data.train), examples(data.test)
    best = {"loss": math.inf}
    for step in range(steps):
        index = torch.randint(len(codes), (1024,))
        optimizer.zero_grad()
        F.cross_entropy(model.train()(inputs(seen[index], index % size)), codes[index]).backward()
        optimizer.step()
        schedule.step()
        if step % (steps // 10) == steps // 10 - 1:
            model.eval()
            with torch.no_grad():
                losses = [
                    F.cross_entropy(
                        model(inputs(test_seen[i], i % size)), test_codes[i], reduction="none"
                    )
                    for i in torch.arange(len(test_codes)).split(4096)
                ]
            each = torch.cat(losses).view(-1, size)
            loss = each[:, round(TASKS[run.task].given * size) :].mean().item()
            best = min(
                best,
                {"loss": loss, "whole_loss": each.mean().item(), "step": step + 1},
                key=lambda one: one["loss"],
            )
    result = run._asdict() | best | {"cpu_seconds": time.process_time() - cpu}
    _save(run.path(folder), result)
    return result


def run_one(experiment: Experiment, run: Run, folder: Path, threads: int) -> dict[str, Any]:
    work = train_neighbours if run.model == "neighbours" else train_and_draw
    return work(experiment, run, folder, threads)


def sweep(experiment: Experiment) -> list[Run]:
    return [
        Run("captions", variant, experiment.sweep_seed, rate, draws=False)
        for rate in experiment.rates
        for variant in ("dense", "three_region")
    ]


def chosen_rates(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each variant's rate with the lowest held-out loss; no pivots takes three-region's."""
    rates = {}
    for variant in ("dense", "three_region"):
        of_variant = [one for one in results if one["model"] == variant]
        rates[variant] = min(of_variant, key=lambda one: one["loss"])["rate"]
    return rates | {"no_pivots": rates["three_region"]}


def comparison(experiment: Experiment, rates: dict[str, float]) -> list[Run]:
    """Seed by seed, so that a part of the experiment compares all variants on both tasks."""
    runs = [Run(task, "neighbours", 0) for task in TASKS]
    return runs + [
        Run(task, variant, seed, rates[variant])
        for seed in experiment.seeds
        for task in TASKS
        for variant in VARIANTS
    ]


def check_alike(results: Sequence[dict[str, Any]]) -> None:
    """All variants of a task and seed must start alike and read the same batches."""
    seen: dict[tuple[str, int], list[str]] = {}
    for one in results:
        if "weights_and_batches" in one:
            key = one["task"], one["seed"]
            if seen.setdefault(key, one["weights_and_batches"]) != one["weights_and_batches"]:
                raise RuntimeError(f"{key}: {one['model']} differs in its weights or batches")


def run_all(experiment: Experiment, jobs: int, out: Path) -> Iterator[dict[str, Any]]:
    """Runs what is not finished yet, `jobs` at a time.

    Yields:
        the record, each time that another run is in it; the last one holds all.

    Raises:
        RuntimeError: variants of one task and seed had other weights or read other batches.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    folder = experiment.folder(out)
    record: dict[str, Any] = {
        "machine_info": machine_info(choose_device(experiment.config("captions").device)),
        "commit_info": commit_info(),
        "datetime": now(),
        "experiment": dataclasses.asdict(experiment),
        "config": dataclasses.asdict(experiment.config("captions")),
        "tasks": {name: task._asdict() for name, task in TASKS.items()},
        "jobs": jobs,
        "threads_per_job": threads,
        "can_be_read": make_data(experiment, folder),
        "rates": {},
        "sweep": [],
        "runs": [],
    }
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:

        def finish(name: str, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
            ready = [json.loads(p.read_text()) for run in runs if (p := run.path(folder)).is_file()]
            waiting = [
                pool.submit(run_one, experiment, run, folder, threads)
                for run in runs
                if not run.path(folder).is_file()
            ]
            for result in [*ready, *(future.result() for future in as_completed(waiting))]:
                record[name].append(result)
                check_alike(record[name])
                record["not_run"] = [run._asdict() for run in runs][len(record[name]) :]
                yield record

        yield from finish("sweep", sweep(experiment))
        record["rates"] = chosen_rates(record["sweep"])
        yield from finish("runs", comparison(experiment, record["rates"]))


# The record as a table and a picture.

QUANTITIES = {  # what is compared: key in a run, the better direction, the margin, how it is shown
    "held-out loss": ("loss", -1, 0.005, 1, "{:.4f}", "{:+.4f}"),
    "digits right": ("digits_right", 1, 0.01, 100, "{:.1f}%", "{:+.1f}"),
}
COMPARISONS = (("three_region", "dense"), ("no_pivots", "dense"), ("three_region", "no_pivots"))
NEIGHBOURS = "20 neighbouring codes, no text, no attention"
HOW_TO_READ = """\
Differences are paired: the same seed, the same weights at the start, the same batches. Each has its
two-sided 95% t-interval over the seeds. Against dense, a variant is **non-inferior** where the
whole interval is better than the margin (0.005 nats worse, one point of digits worse),
**inferior** where the whole interval is worse than it, and else **not decided**. Three-region is
**better** or **worse** than without pivots where the interval excludes zero. A loss says something
about attention only where it is below that of the 20 neighbours."""


def of(record: dict[str, Any], task: str, model: str) -> list[dict[str, Any]]:
    found = [one for one in record["runs"] if (one["task"], one["model"]) == (task, model)]
    return sorted(found, key=lambda one: one["seed"])


class Difference(NamedTuple):
    mean: float
    low: float  # of the 95% interval; not a number with fewer than two seeds
    high: float
    seeds: int
    verdict: str


def difference(record: dict[str, Any], task: str, pair: tuple[str, str], name: str) -> Difference:
    """`pair[0] - pair[1]` over the seeds that ran both."""
    key, better, margin, *_ = QUANTITIES[name]
    first, second = ({one["seed"]: one[key] for one in of(record, task, m)} for m in pair)
    values = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if len(values) < 2:
        mean = values[0] if values else math.nan
        return Difference(mean, math.nan, math.nan, len(values), "not decided")
    mean, half = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half *= float(stats.t.ppf(0.975, len(values) - 1))
    worst, best = sorted((better * (mean - half), better * (mean + half)))
    if pair[1] == "dense":
        words, limit = ("non-inferior", "inferior"), -margin
    else:
        words, limit = ("better", "worse"), 0.0
    verdict = words[0] if worst > limit else words[1] if best < limit else "not decided"
    return Difference(mean, mean - half, mean + half, len(values), verdict)


def table(record: dict[str, Any]) -> str:
    parts = []
    for task, (title, *_) in TASKS.items():
        lines = [
            f"**{title[0].upper()}{title[1:]}**",
            "",
            "| variant | learning rate | keys a query attends to | held-out loss | digits right "
            "| seeds |",
            "|---|" + "---:|" * 5,
        ]
        for variant, (label, _) in VARIANTS.items():
            if runs := of(record, task, variant):
                keys = runs[0]["keys"]
                cells = [
                    label,
                    f"{record['rates'][variant]:g}",
                    f"{keys['mean']:.1f} ({keys['mean'] / keys['causal']:.0%})",
                    *(
                        _spread([scale * one[key] for one in runs], form)
                        for key, _, _, scale, form, _ in QUANTITIES.values()
                    ),
                    str(len(runs)),
                ]
                lines.append(f"| {' | '.join(cells)} |")
        for one in of(record, task, "neighbours"):
            lines.append(f"| {NEIGHBOURS} | | | {one['loss']:.4f} | | 1 |")
        lines += [
            "",
            "| difference | held-out loss | | digits right, in points | | seeds |",
            "|---|---:|---|---:|---|---:|",
        ]
        for pair in COMPARISONS:
            cells = [f"{VARIANTS[pair[0]][0]} − {VARIANTS[pair[1]][0]}"]
            for name, (_, _, _, scale, _, form) in QUANTITIES.items():
                found = difference(record, task, pair, name)
                mean, low, high = (form.format(scale * value) for value in found[:3])
                cells += [f"{mean} ({low} to {high})", found.verdict]
            if found.seeds:
                lines.append(f"| {' | '.join(cells)} | {found.seeds} |")
        parts += ["\n".join([*lines, "", _what_came_out(record, task)])]
    return "\n\n".join([*parts, _settings(record)])


def _what_came_out(record: dict[str, Any], task: str) -> str:
    sentences = []
    dense, neighbours = of(record, task, "dense"), of(record, task, "neighbours")
    if dense and neighbours:
        loss, texture = statistics.fmean(one["loss"] for one in dense), neighbours[0]["loss"]
        curves = [dict(map(tuple, one["curve"])) for one in dense]
        steps = sorted(curves[0])
        at = steps[len(steps) * 3 // 4 - 1]
        falls = statistics.fmean(curve[at] - curve[steps[-1]] for curve in curves)
        word = "below" if loss < texture else "above"
        sentences.append(
            f"Dense ends {abs(loss - texture):.4f} nats {word} the 20 neighbours"
            + ("" if loss < texture else ": it is undertrained")
            + f"; its loss still fell by {falls:.4f} over the last {steps[-1] - at} steps."
        )
    found = [difference(record, task, ("three_region", "no_pivots"), name) for name in QUANTITIES]
    if found[0].seeds:
        said = {
            "better": "help",
            "worse": "harm",
            "not decided": "make no difference that shows in",
        }
        sentences.append(
            "Pivots "
            + " and ".join(
                f"{said[one.verdict]} the {name}"
                for one, name in zip(found, QUANTITIES, strict=True)
            )
            + "."
        )
    return " ".join(sentences)


def _settings(record: dict[str, Any]) -> str:
    config, experiment, machine = record["config"], record["experiment"], record["machine_info"]
    model, training = config["model"], config["training"]
    side = (
        config["image_tokenizer"]["image_size"] // 2 ** config["image_tokenizer"]["num_downsamples"]
    )
    first = next((one for one in record["runs"] if one["model"] != "neighbours"), None)
    sequence = f"{2 * first['keys']['causal'] - 1:.0f} tokens with the caption" if first else ""
    tried = ", ".join(
        f"{VARIANTS[one['model']][0]} {one['rate']:g}: {one['loss']:.4f}"
        for one in sorted(record["sweep"], key=lambda one: (one["model"], one["rate"]))
    )
    seconds = sum(one["cpu_seconds"] for one in [*record["sweep"], *record["runs"]])
    text = (
        f"Loss in nats per code and digits right, mean ± standard deviation over seeds, on "
        f"{experiment['num_test']} held-out scenes, of combinations of digits that no training "
        f"scene shows; in the second task of the lower half, drawn below the true upper half. "
        f"Scenes as {side}x{side} codes, {config['image_tokenizer']['codebook_size']} different "
        f"ones, {sequence}; {model['num_layers']} layers of width {model['hidden_size']}; "
        f"{training['steps']} steps of {training['batch_size']} scenes in {training['precision']}, "
        f"drawn at temperature {config['sampling']['temperature']}. A classifier reads the "
        f"drawings; it reads {record['can_be_read']['real']:.1%} of real digits and "
        f"{record['can_be_read']['reconstructed']:.1%} of what the image tokenizer makes of them; "
        f"chance is 10%. Learning rates were chosen on the first task with a seed of their own, by "
        f"the held-out loss ({tried}). {machine['device']}, torch {machine['torch']}, "
        f"{record['jobs']} runs side by side, {seconds / 60:.0f} core-minutes."
    )
    missing = [f"{one['task']} {one['model']} with seed {one['seed']}" for one in record["not_run"]]
    return text + (f" Not run: {', '.join(missing)}." if missing else "")


def _spread(values: Sequence[float], form: str) -> str:
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + spread


STYLES = {  # Okabe and Ito's colours, told apart by the colour-blind
    "dense": ("#000000", "o"),
    "three_region": ("#0072B2", "s"),
    "no_pivots": ("#D55E00", "^"),
}


def draw(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """For each task: the held-out loss of every seed over steps, and every seed's digits right."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(TASKS), squeeze=False)
    for (losses, digits), (task, (title, *_)) in zip(grid.T, TASKS.items(), strict=True):
        end: list[float] = []
        for variant, (label, _) in VARIANTS.items():
            colour, marker = STYLES[variant]
            for number, one in enumerate(runs := of(record, task, variant)):
                steps, values = zip(*one["curve"], strict=True)
                losses.plot(steps, values, color=colour, lw=1, label=None if number else label)
                end += values[len(values) // 4 :]
            shares = [100 * one["digits_right"] for one in runs]
            place = list(VARIANTS).index(variant)
            offsets = place + 0.08 * (np.arange(len(runs)) - (len(runs) - 1) / 2)
            digits.plot(offsets, shares, marker, color=colour, ms=6)
            if shares:
                digits.hlines(statistics.fmean(shares), place - 0.3, place + 0.3, colour)
        for one in of(record, task, "neighbours"):
            end.append(one["whole_loss"])
            losses.axhline(end[-1], color="grey", ls="--", lw=1.2, label="20 neighbours alone")
        if end:
            room = 0.06 * (max(end) - min(end))
            losses.set_ylim(min(end) - room, max(end) + room)
        losses.set(title=title, xlabel="step", ylabel="held-out loss, whole image (nats per code)")
        losses.legend(fontsize=9)
        share = record["can_be_read"]["reconstructed"]
        for level, name in ((100 * share, "read from reconstructions"), (10.0, "chance")):
            digits.axhline(level, color="grey", ls="--", lw=1)
            digits.annotate(
                name, (2.45, level - 1.5), ha="right", va="top", fontsize=8, color="grey"
            )
        digits.set_xticks(range(len(VARIANTS)), [label for label, _ in VARIANTS.values()])
        digits.set(xlim=(-0.5, 2.5), ylim=(0, 102), ylabel="digits right (%), each seed and mean")
        for axis in (losses, digits):
            axis.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _save(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(Experiment.seeds))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    arguments = parser.parse_args()
    settings = (*SETTINGS, f"device={arguments.device}")
    experiment = Experiment(settings, tuple(arguments.seeds))
    for record in run_all(experiment, arguments.jobs, arguments.out):
        parts = (record[name] for name in ("machine_info", "commit_info", "datetime"))
        path = RESULTS / record_name("quality", *parts)
        save_record(record, path)
        print(f"{path.name}: {len(record['not_run'])} runs of this part to go", flush=True)
    print(f"\n{table(record)}")


if __name__ == "__main__":
    main()
