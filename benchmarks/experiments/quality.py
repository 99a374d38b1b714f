"""The same performance?  One small CogView, trained with dense and with three-region attention.

Two tasks on scenes of four handwritten digits:

    captions    the caption names the four digits
    repeats     the lower half is a copy of the upper half; the caption names no digit, and no
                window reaches from a digit back to the one that it repeats

Variants, which start from the same weights of a seed and read the same batches: dense; three_region
(text, pivots and window: about a quarter of the keys); no_pivots (text and window); and, on the
second task, more_pivots (about half of the keys).

First, runs with a seed of their own choose the learning rates of dense and of three-region (no
pivots takes the latter's) by the held-out loss of the first task. Then each seed trains all
variants on both tasks. A network that sees 20 neighbouring codes shows what texture alone allows.
A finished run is kept as a file in `--out`: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
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
from scipy import stats

from benchmarks.machine import RESULTS, commit_info, machine_info, now, record_name, save_record
from benchmarks.report.tables import table as markdown
from cogview.config import Config, ModelConfig, load_config
from cogview.data.tokens import TokenDataset
from cogview.demo.digits import CANVAS_SIZE, compose_scenes, is_held_out, make_scenes
from cogview.demo.reader import DigitReader
from cogview.files import atomic_write
from cogview.image_tokenizer import ImageTokenizer
from cogview.image_training import ImageTokenizerTrainer
from cogview.loop import choose_device, read_metrics
from cogview.model import GPT
from cogview.run import Run as RunFolder
from cogview.sample import draw_images
from cogview.sequence import Batch
from cogview.text_tokenizer import TextTokenizer
from cogview.train import Trainer, make_batch


class Task(NamedTuple):
    title: str
    query_window: int
    key_window_times: int
    num_pivots: int
    given: float  # share of the image that is not counted, and is given when the rest is drawn


TASKS = {
    "captions": Task("The caption names the digits", 7, 3, 6, given=0.0),
    "repeats": Task("The lower half repeats the upper half", 4, 2, 30, given=0.5),
}
VARIANTS = {
    "dense": ("dense causal", ("model.attention=dense",)),
    "three_region": ("three-region", ()),
    "no_pivots": ("three-region, no pivots", ("model.num_pivots=0",)),
    "more_pivots": ("three-region, 90 pivots", ("model.num_pivots=90",)),  # second task alone
}
NEIGHBOURS = "20 neighbours"  # the network without text and attention
SETTINGS = (  # on top of the preset `digits`
    *("image_tokenizer.image_size=56", "image_tokenizer.codebook_size=16"),
    *("model.num_layers=2", "model.max_positions=204"),
    *("training.steps=1300", "training.batch_size=6", "training.precision=bfloat16"),
    *("training.eval_every=100", "training.eval_examples=64", "training.save_every=1000000"),
    *("training.warmup_steps=25", "sampling.temperature=0.3"),
)
UNNAMED = "any any any any"  # as many words as the names of four digits
TEXT_LEN = 7  # four words and three command tokens


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What all runs share."""

    settings: tuple[str, ...] = SETTINGS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    repeats_seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
    sweep_seed: int = 100
    sweep_steps: int = 1000
    num_train: int = 8000
    num_test: int = 512
    neighbour_steps: int = 3000

    def config(self, run: Run) -> Config:
        layout = TASKS[run.task]._asdict().items()
        own = [f"model.{name}={value}" for name, value in layout if isinstance(value, int)]
        own += [f"seed={run.seed}", f"training.learning_rate={run.rate or 1e-3}"]
        if not run.draws:
            own.append(f"training.steps={self.sweep_steps}")
        variant = VARIANTS[run.model][1] if run.model in VARIANTS else ()
        return load_config("digits", [*self.settings, *own, *variant])


class Run(NamedTuple):
    task: str
    model: str  # a variant, or the neighbours
    seed: int = 0
    rate: float = 0.0
    draws: bool = True  # draws the held-out captions; the sweep does not

    def file(self, folder: Path) -> Path:
        return folder / f"{'-'.join(map(str, self))}.json"


def scenes_of(task: str, split: str, num: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images, digits and captions. Test scenes show combinations of digits, and handwriting, that
    no training scene shows; digits stand in the middle of their cells."""
    if task == "captions":
        scenes = make_scenes(split, num, seed=0, jitter=0)
        fillers = ("a", "an", "and", "above")
        words = ([w for w in caption.split() if w not in fillers] for caption in scenes.captions)
        return scenes.images, scenes.labels, [" ".join(names) for names in words]
    rng = np.random.default_rng([split == "test"])
    pairs = np.array([(a, b, a, b) for a in range(10) for b in range(10)])
    held_out = np.array([is_held_out(digits) for digits in pairs])
    digits = rng.choice(pairs[held_out == (split == "test")], num)
    scenes = compose_scenes(split, digits, rng, jitter=0)
    upper = scenes.images[:, :, : CANVAS_SIZE // 2]
    return torch.cat([upper, upper], 2), scenes.labels, [UNNAMED] * num


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


digit_reader = functools.cache(DigitReader)


def digits_right(images: torch.Tensor, labels: torch.Tensor, given: float = 0.0) -> float:
    """Share of digits that a classifier reads as they should be, after the given ones."""
    read = digit_reader().read(resized(images.cpu(), CANVAS_SIZE))
    return (read == labels)[:, round(4 * given) :].float().mean().item()


def make_data(experiment: Experiment, folder: Path) -> dict[str, float]:
    """Makes the tokenizers and tokens of all runs; what share of digits is read right from real
    test scenes (`real`) and from what the image tokenizer makes of them (`reconstructed`)."""
    config = experiment.config(Run("captions", "three_region"))
    done, files = folder / "data.json", RunFolder(folder, config)
    if done.is_file():
        return json.loads(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": experiment.num_train, "test": experiment.num_test}
    parts = {(t, split): scenes_of(t, split, num) for t in TASKS for split, num in sizes.items()}
    texts = TextTokenizer.train(
        [caption for task in TASKS for caption in parts[task, "train"][2]],
        files.text_tokenizer_path,
        **dataclasses.asdict(config.text_tokenizer),
    )
    size = config.image_tokenizer.image_size
    train, test = (resized(parts["captions", split][0], size) for split in ("train", "test"))
    trainer = ImageTokenizerTrainer(config, files.image_training, train, test, progress=False)
    trainer.run()
    images = trainer.model
    images.save(files.image_tokenizer_path)
    for (task, split), (scenes, labels, captions) in parts.items():
        tokens = TokenDataset.encode(
            folder / f"{task}-{split}",
            captions,
            resized(scenes, size),
            texts,
            images,
            progress=False,
        )
        if (np.diff(tokens.text_offsets) != TEXT_LEN - 3).any():
            raise ValueError("captions: expected a piece for each of four words")
        if (task, split) == ("captions", "test"):
            decoded = images.decode(torch.tensor(tokens.codes))
            real, reconstructed = (digits_right(x, labels) for x in (scenes, decoded))
    _save(done, {"real": real, "reconstructed": reconstructed})
    return {"real": real, "reconstructed": reconstructed}


def model_with_waves(config: ModelConfig, vocab_size: int) -> GPT:
    """The positions of codes start as sines and cosines of their row and column, so that finding
    neighbours takes fewer steps; alike for all variants."""
    model = GPT(config, vocab_size)
    side = math.isqrt(config.max_positions - TEXT_LEN)
    row_and_column = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    frequencies = torch.arange(1, config.hidden_size // 8 + 1) * math.pi / side
    angles = (row_and_column[:, :, None] * frequencies).flatten(1)
    waves = torch.cat([angles.sin(), angles.cos()], 1) * 2 * config.init_std
    with torch.no_grad():  # a code is predicted at the position before its own
        codes = model.transformer.position_embeddings.weight[TEXT_LEN - 1 :][: len(waves)]
        codes.zero_()[:, : waves.shape[1]] = waves
    return model


@torch.no_grad()
def measure(model: GPT, config: Config, data: TokenDataset, given: float) -> dict[str, float]:
    """Held-out `loss` after the given share of the image, in nats per code; `keys` that a query
    attends to on average, and those of dense causal attention (`causal_keys`)."""
    device, size = model.word_embeddings.weight.device, 32
    generator = torch.Generator(device).manual_seed(config.seed)
    losses, keys = [], []
    for start in range(0, len(data), size):
        batch = make_batch(config, data, np.arange(start, min(start + size, len(data)))).to(device)
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        count, length = inputs.shape
        layouts = model.sample_layouts(batch.text_len, length, generator)
        logits = model.logits(model(inputs, batch.positions[:, :-1], layouts))
        image = targets < config.vocabulary.codebook_size
        loss = F.cross_entropy(logits[image].float(), targets[image], reduction="none")
        losses.append(loss.view(count, -1)[:, round(given * config.num_codes) :])
        for layout in layouts:
            regions = layout.regions(count, length, length) if layout else ()
            seen = sum(int(region.count_nonzero()) for region in regions)
            keys.append(seen / inputs.numel() if layout else (length + 1) / 2)
    mean = torch.cat(losses).mean().item()
    return {"loss": mean, "keys": statistics.fmean(keys), "causal_keys": (length + 1) / 2}


def train_and_draw(experiment: Experiment, run: Run, folder: Path) -> dict[str, Any]:
    """Trains a variant, measures it, draws the held-out captions and reads the digits."""
    config, given = experiment.config(run), TASKS[run.task].given
    train, test = (TokenDataset.load(folder / f"{run.task}-{s}") for s in ("train", "test"))
    digest = hashlib.sha256()  # of the weights at the start and of all batches

    def observe(batch: Batch) -> None:
        digest.update(batch.tokens.cpu().numpy().tobytes())

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(config, scratch, train, test, None, False, model_with_waves, observe)
        for tensor in trainer.model.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        trainer.run()
        model, name = trainer.model, "held_out_image_loss"
        curve = [(m["step"], m[name]) for m in read_metrics(trainer.metrics_path) if name in m]
    result = {"digest": digest.hexdigest(), "curve": curve} | measure(model, config, test, given)
    if run.draws:
        texts = [test[i][0].tolist() for i in range(len(test))]
        beginnings = test.codes.reshape(len(test), -1)[:, : round(given * config.num_codes)]
        codes = draw_images(model, config, texts, run.seed, beginnings.tolist(), progress=False)
        images = ImageTokenizer.load(RunFolder(folder, config).image_tokenizer_path).decode(codes)
        labels = scenes_of(run.task, "test", experiment.num_test)[1]
        result["digits_right"] = digits_right(images, labels, given)
    return result


def train_neighbours(experiment: Experiment, run: Run, folder: Path) -> dict[str, Any]:
    """Predicts a code from its 20 nearest earlier codes and its position. The lowest held-out
    losses in training count, not the last ones."""
    torch.manual_seed(run.seed)
    train, test = (TokenDataset.load(folder / f"{run.task}-{s}") for s in ("train", "test"))
    around = [(y, x) for y in range(-3, 1) for x in range(-3, 4) if (y, x) < (0, 0)]
    nearest = sorted(around, key=lambda at: at[0] ** 2 + at[1] ** 2)[:20]
    words = train.codebook_size + 1  # for each neighbour: the codes, and none

    def examples(data: TokenDataset) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.from_numpy(data.codes.astype(np.int64))
        _, height, width = codes.shape
        padded = F.pad(codes, (3, 3, 3, 0), value=words - 1)
        seen = [
            padded[:, 3 + y : 3 + y + height, 3 + x : 3 + x + width] + i * words
            for i, (y, x) in enumerate(nearest)
        ]
        position = 20 * words + torch.arange(height * width).view(1, height, width)
        return torch.stack([*seen, position.expand_as(codes)], -1).view(-1, 21), codes.view(-1)

    model = torch.nn.Sequential(
        torch.nn.EmbeddingBag(20 * words + train.codes[0].size, 256, mode="sum"),
        *(torch.nn.GELU(), torch.nn.Dropout(0.2), torch.nn.Linear(256, 256)),
        *(torch.nn.GELU(), torch.nn.Dropout(0.2), torch.nn.Linear(256, words - 1)),
    )
    torch.nn.init.normal_(model[0].weight, std=0.05)  # type: ignore[arg-type]
    optimizer, steps = torch.optim.AdamW(model.parameters()), experiment.neighbour_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    (seen, codes), (test_seen, test_codes) = examples(train), examples(test)
    given = round(TASKS[run.task].given * test.codes[0].size)
    best = {"loss": math.inf, "whole_loss": math.inf}
    for step in range(1, steps + 1):
        index = torch.randint(len(codes), (1024,))
        optimizer.zero_grad()
        F.cross_entropy(model.train()(seen[index]), codes[index]).backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            with torch.no_grad():
                logits = torch.cat([model.eval()(part) for part in test_seen.split(4096)])
            losses = F.cross_entropy(logits, test_codes, reduction="none").view(len(test), -1)
            now_at = {"loss": losses[:, given:].mean().item(), "whole_loss": losses.mean().item()}
            best = {name: min(best[name], value) for name, value in now_at.items()}
    return best


def run_one(experiment: Experiment, run: Run, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    started, neighbours = time.process_time(), run.model == NEIGHBOURS
    result = (train_neighbours if neighbours else train_and_draw)(experiment, run, folder)
    result |= run._asdict() | {"commit": commit_info()["id"]}
    result["core_seconds"] = time.process_time() - started
    _save(run.file(folder), result)
    return result


def _save(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def sweep(experiment: Experiment) -> list[Run]:
    return [
        Run("captions", variant, experiment.sweep_seed, rate, draws=False)
        for rate in experiment.rates
        for variant in ("dense", "three_region")
    ]


def compared(experiment: Experiment, results: Sequence[dict[str, Any]]) -> list[Run]:
    """The runs that follow the sweep's results, at the rates with the lowest held-out losses; seed
    by seed, so that a part of the experiment compares all variants on both tasks."""
    best = {one["model"]: one["rate"] for one in sorted(results, key=lambda one: -one["loss"])}
    best["no_pivots"] = best["more_pivots"] = best["three_region"]
    return [Run(task, NEIGHBOURS) for task in TASKS] + [
        Run(task, variant, seed, best[variant])
        for seed in experiment.seeds
        for task in TASKS
        for variant in VARIANTS
        if task == "captions"
        and variant != "more_pivots"
        or task == "repeats"
        and seed in experiment.repeats_seeds
    ]


def check_alike(runs: Sequence[dict[str, Any]]) -> None:
    """Raises RuntimeError where variants had other weights at the start or read other batches."""
    digests: dict[tuple[str, int], str] = {}
    for one in runs:
        key = one["task"], one["seed"]
        if one["model"] in VARIANTS and digests.setdefault(key, one["digest"]) != one["digest"]:
            raise RuntimeError(f"{key}: {one['model']} had other weights or read other batches")


def run_all(experiment: Experiment, jobs: int, out: Path) -> Iterator[dict[str, Any]]:
    """Runs what is not finished yet, `jobs` at a time; yields the record each time that another run
    is in it. Other settings, another commit or device are other runs."""
    config = experiment.config(Run("captions", "three_region"))
    record: dict[str, Any] = {
        "machine_info": machine_info(choose_device(config.device)),
        "commit_info": commit_info(),
        "datetime": now(),
        "experiment": dataclasses.asdict(experiment),
        "config": dataclasses.asdict(config),
        "jobs": jobs,
    }
    same = [record[name] for name in ("commit_info", "experiment", "config")]
    same += [TASKS, VARIANTS, record["machine_info"]["device"], torch.__version__]
    folder = out / hashlib.sha256(json.dumps(same).encode()).hexdigest()[:8]
    record |= {"read": make_data(experiment, folder), "sweep": [], "runs": [], "not_run": []}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for part in ("sweep", "runs"):
            wanted = sweep(experiment) if part == "sweep" else compared(experiment, record["sweep"])
            files = {run: run.file(folder) for run in wanted}
            done = {run: json.loads(f.read_text()) for run, f in files.items() if f.is_file()}
            started = {
                pool.submit(run_one, experiment, r, folder): r for r in wanted if r not in done
            }
            for finished in itertools.chain([None], as_completed(started)):
                if finished is not None:
                    done[started[finished]] = finished.result()
                record[part] = [done[run] for run in wanted if run in done]
                check_alike(record["runs"])
                yield record | {"not_run": [run for run in wanted if run not in done]}


# The record as a table and a plot.

HOW_TO_READ = """\
Differences are paired: same seed, same weights at the start, same batches; in brackets their
two-sided 95% t-interval over the seeds that both ran. A difference to dense is **non-inferior** if
its interval ends before the margin (0.005 nats of loss, one point of digits right), **inferior** if
all of it lies beyond the margin, else **not decided**. A difference to no pivots is **better** or
**worse** if its interval excludes zero, else **not decided**. The 20 neighbours are a network that
sees neither text nor far codes; it counts with the lowest held-out loss of its training, the others
with their last one."""
PAIRS = (
    *(("three_region", "dense"), ("no_pivots", "dense"), ("more_pivots", "dense")),
    *(("three_region", "no_pivots"), ("more_pivots", "no_pivots")),
)
QUANTITIES = {  # key of a run, sign of an improvement, margin, unit, decimals
    "loss": ("loss", -1, 0.005, 1, 4),
    "digits right (%)": ("digits_right", 1, 0.01, 100, 1),
}
STYLES = {  # Okabe and Ito's colours
    **{"dense": ("#000000", "o"), "three_region": ("#0072B2", "s")},
    **{"no_pivots": ("#D55E00", "D"), "more_pivots": ("#56B4E9", "^")},
}


def of(record: dict[str, Any], task: str, model: str) -> list[dict[str, Any]]:
    runs = [one for one in record["runs"] if (one["task"], one["model"]) == (task, model)]
    return sorted(runs, key=lambda one: one["seed"])


def difference(
    record: dict[str, Any], task: str, pair: tuple[str, str], quantity: str
) -> tuple[float, float, str]:
    """Mean of `pair[0] - pair[1]` over the seeds of both, half its 95% interval, the verdict."""
    key, better, margin, *_ = QUANTITIES[quantity]
    first, second = ({one["seed"]: one[key] for one in of(record, task, v)} for v in pair)
    values = [first[seed] - second[seed] for seed in first if seed in second]
    if len(values) < 2:
        return statistics.fmean(values or [math.nan]), math.nan, "not decided"
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    against_dense = pair[1] == "dense"
    good, bad = ("non-inferior", "inferior") if against_dense else ("better", "worse")
    limit = -margin if against_dense else 0.0
    if better * mean - half > limit:
        return mean, half, good
    return mean, half, bad if better * mean + half < limit else "not decided"


def table(record: dict[str, Any]) -> str:
    """What each variant reached, the differences with their verdicts, and the settings."""
    config, experiment, machine = record["config"], record["experiment"], record["machine_info"]
    image, model, training = (config[name] for name in ("image_tokenizer", "model", "training"))
    tried = sorted((VARIANTS[o["model"]][0], o["rate"], o["loss"]) for o in record["sweep"])
    minutes = sum(one["core_seconds"] for one in record["sweep"] + record["runs"]) / 60
    notes = (
        f"{image['image_size'] // 2 ** image['num_downsamples']} rows of codes, "
        f"{image['codebook_size']} different codes; {model['num_layers']} layers of width "
        f"{model['hidden_size']}; {training['steps']} steps of {training['batch_size']} scenes in "
        f"{training['precision']}. Loss: nats per code of {experiment['num_test']} held-out "
        "scenes; no training scene shows their handwriting or their combinations of digits. Mean ± "
        "standard deviation over seeds. The captions of these scenes are drawn at temperature "
        f"{config['sampling']['temperature']}; a classifier reads the drawings. It reads "
        f"{record['read']['real']:.1%} of real digits, {record['read']['reconstructed']:.1%} of "
        "what the image tokenizer makes of them; chance is 10%. In the second task the lower half "
        "alone counts, and is drawn below the true upper half. Learning rates were chosen on the "
        f"first task, with seed {experiment['sweep_seed']}, by the loss after "
        f"{experiment['sweep_steps']} steps: "
        + ", ".join(f"{label} {rate:g}: {loss:.4f}" for label, rate, loss in tried)
        + f". {machine['device']}, torch {machine['torch']}; {minutes:.0f} core-minutes."
    )
    if record["not_run"]:
        notes += f" Not run: {', '.join(f'{r[0]} {r[1]} {r[2]}' for r in record['not_run'])}."
    notes += f" {record['note']}" if "note" in record else ""
    return "\n\n".join([*(_task_table(record, task) for task in TASKS), notes])


def _task_table(record: dict[str, Any], task: str) -> str:
    if not of(record, task, "dense") or not of(record, task, "three_region"):
        return f"**{TASKS[task].title}**\n\nNot run."
    reached, differences = [], []
    for variant, (label, _) in VARIANTS.items():
        if runs := of(record, task, variant):
            rate, keys, causal = (runs[0][name] for name in ("rate", "keys", "causal_keys"))
            cells = {"variant": label, "seeds": str(len(runs)), "learning rate": f"{rate:g}"}
            cells["keys a query attends to"] = f"{keys:.1f} ({keys / causal:.0%})"
            for name, (key, _, _, unit, decimals) in QUANTITIES.items():
                values = [unit * one[key] for one in runs]
                spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
                cells[name] = f"{statistics.fmean(values):.{decimals}f}{spread}"
            reached.append(cells)
    texture = statistics.fmean([one["loss"] for one in of(record, task, NEIGHBOURS)] or [math.nan])
    label = "20 neighbours, no text, no attention"
    reached.append(dict.fromkeys(reached[0], "") | {"variant": label, "loss": f"{texture:.4f}"})
    for pair in (pair for pair in PAIRS if of(record, task, pair[0])):
        cells = {"difference": " − ".join(VARIANTS[variant][0] for variant in pair)}
        for name, (_, _, _, unit, decimals) in QUANTITIES.items():
            mean, half, verdict = difference(record, task, pair, name)
            at = [f"{unit * x:+.{decimals}f}" for x in (mean, mean - half, mean + half)]
            cells[name] = f"{at[0]} ({at[1]} to {at[2]}), {verdict}" if half == half else verdict
        differences.append(cells)
    dense = of(record, task, "dense")
    below = sum(one["loss"] < texture for one in dense)
    gains = (c[len(c) * 3 // 4 - 1][1] - c[-1][1] for c in (one["curve"] for one in dense))
    pair = "three_region", "no_pivots"
    words = [difference(record, task, pair, name)[2] for name in QUANTITIES]
    end = (
        f"{below} of {len(dense)} dense runs end below the 20 neighbours; the last quarter of "
        f"their steps lowered the loss by {statistics.fmean(gains):.4f}. Three-region with pivots "
        f"instead of none: loss {words[0]}, digits right {words[1]}."
    )
    return "\n\n".join([f"**{TASKS[task].title}**", markdown(reached), markdown(differences), end])


def draw(record: dict[str, Any], path: Path) -> None:
    """For each task: the loss of every seed over steps, and what every seed reached."""
    figure = Figure(figsize=(12, 11), layout="constrained")
    FigureCanvasAgg(figure)
    for (curves, *ends), (task, about) in zip(figure.subplots(3, 2).T, TASKS.items(), strict=True):
        late: list[float] = []
        variants = [variant for variant in STYLES if of(record, task, variant)]
        for place, variant in enumerate(variants):
            runs, label = of(record, task, variant), VARIANTS[variant][0]
            colour, marker = STYLES[variant]
            for number, one in enumerate(runs):
                steps, losses = zip(*one["curve"], strict=True)
                curves.plot(steps, losses, color=colour, lw=1, label=None if number else label)
                late += losses[len(losses) // 4 :]
            for axis, (key, _, _, unit, _) in zip(ends, QUANTITIES.values(), strict=True):
                values = [unit * one[key] for one in runs]
                places = place + 0.1 * (np.arange(len(values)) - (len(values) - 1) / 2)
                axis.plot(places, values, marker, color=colour, ms=5)
                axis.hlines(statistics.fmean(values), place - 0.35, place + 0.35, colour)
        if late:
            room = 0.05 * (max(late) - min(late))
            curves.set_ylim(min(late) - room, max(late) + room)
        of_curves = f"loss of the first {record['config']['training']['eval_examples']} scenes"
        curves.set(title=about.title, xlabel="step", ylabel=f"{of_curves}, whole images")
        levels = {"20 neighbours": [one["loss"] for one in of(record, task, NEIGHBOURS)]}
        levels["read from reconstructed scenes"] = [100 * record["read"]["reconstructed"]]
        for axis, name, (label, level) in zip(ends, QUANTITIES, levels.items(), strict=True):
            for value in level:
                axis.axhline(value, color="grey", ls="--", label=label)
                axis.legend()
            axis.margins(y=0.2)
            labels = [VARIANTS[variant][0].replace(", ", "\n") for variant in variants]
            axis.set_xticks(range(len(variants)), labels)
            axis.set(xlim=(-0.5, len(variants) - 0.5), ylabel=f"{name}: every seed, and their mean")
    # The last task has all variants.
    figure.legend(*curves.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    arguments = parser.parse_args()
    experiment = Experiment((*SETTINGS, f"device={arguments.device}"))
    for record in run_all(experiment, arguments.jobs, arguments.out):
        parts = (record[name] for name in ("machine_info", "commit_info", "datetime"))
        path = RESULTS / record_name("quality", *parts)
        save_record(record, path)
        print(f"{path.name}: {len(record['not_run'])} runs of this part to go", flush=True)
    print(table(record))


if __name__ == "__main__":
    main()
