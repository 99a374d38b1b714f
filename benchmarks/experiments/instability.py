"""What Sandwich-LN and PB-relax are for: deep float16 models, trained with and without them.

    python -m benchmarks.experiments.instability --help

The toy experiment of the CogView paper (arXiv 2105.13290, section 2.4), deep and very narrow: a
transformer learns handwritten digits, a token a pixel. Weights, activations and gradients are
float16, Adam's weights float32, the loss scale is dynamic. Variants with and without PB-relax
differ in nothing else: they have the same weights at the start, the same batches and settings.

The model is that of cogview/model.py (tests compare them), written here as separate operations, as
CogView had them: each takes float16 and rounds its result to float16. Matrix products, means and
softmax sum in float32, as on a GPU. LayerNorm has its statistics either in float16, where the
square of a number above 256 is infinite, or in float32, as the fused kernels have.

The losses stand beside what needs no model: how often each level occurs at each position (the
position line), and the same for each digit.

A run that has ended stays in FOLDER and is not repeated at the same commit. The record is written
to benchmarks/results/, its table printed; `make report` puts both into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import ttest_1samp  # type: ignore[import-untyped]
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks import machine
from cogview.config import ModelConfig
from cogview.files import atomic_write
from cogview.model import GPT

ALPHA = 32.0  # of PB-relax attention
HALF_MAX = 65504.0
LEVELS, DIGITS, PIXELS = 17, 10, 64
HELD_OUT = 297  # of 1797 images


@dataclasses.dataclass(frozen=True)
class Variant:
    """``statistics``: dtype of LayerNorm's mean and variance; ``dtype``: of everything else."""

    norm: Literal["pre", "sandwich"]
    relax: bool
    statistics: str = "float16"
    dtype: str = "float16"

    @property
    def name(self) -> str:
        name = {"pre": "Pre-LN", "sandwich": "Sandwich-LN"}[self.norm]
        name += " + PB-relax" if self.relax else ""
        if self.dtype == "float32":
            return f"{name}, all float32"
        return name if self.statistics == "float16" else f"{name}, float32 statistics"


PRE, PRE_RELAXED = Variant("pre", False), Variant("pre", True)
SANDWICH, SANDWICH_RELAXED = Variant("sandwich", False), Variant("sandwich", True)
# The method or the precision: which of them fails?
PRE_STATISTICS = Variant("pre", False, statistics="float32")
PRE_FLOAT32 = Variant("pre", False, statistics="float32", dtype="float32")
COLOURS = {
    PRE: "#D55E00",
    PRE_RELAXED: "#0072B2",
    SANDWICH: "#E69F00",
    SANDWICH_RELAXED: "#009E73",
    PRE_STATISTICS: "#CC79A7",
    PRE_FLOAT32: "#777777",
}
# What is trained at each learning rate, in the order of the runs.
PLAN = {
    0.01: [PRE, PRE_RELAXED, SANDWICH, SANDWICH_RELAXED, PRE_STATISTICS],
    0.1: [PRE_RELAXED, SANDWICH, SANDWICH_RELAXED, PRE_FLOAT32],
    0.003: [PRE, PRE_RELAXED],
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The same for all variants."""

    steps: int = 250
    num_layers: int = 24
    hidden_size: int = 64
    num_heads: int = 4
    batch_size: int = 4
    warmup_steps: int = 20
    final_learning_rate: float = 0.1  # share; falls linearly over the second half of the steps
    weight_decay: float = 0.04
    clip_grad_norm: float = 1.0
    initial_loss_scale: float = 2.0**16
    loss_scale_window: int = 50  # steps without overflow after which the scale doubles
    give_up_after: int = 50  # skipped steps in a row, as in cogview/train.py
    window: int = 10  # steps that one number of a curve stands for


# The operations. ``seen`` collects, by kind, a number for each call.

Seen = dict[str, list[Tensor]]


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return (wide(a) @ wide(b)).to(a.dtype)


def mean(x: Tensor) -> Tensor:
    return wide(x).mean(-1, keepdim=True).to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, variant: Variant, seen: Seen
) -> Tensor:
    peak = x.detach().abs().amax(-1, keepdim=True)
    seen.setdefault("norm_input", []).append(peak.amax())
    if variant.relax:
        x = x / (torch.where(peak == 0, 8.0, peak) / 8)
    if variant.statistics == "float32":
        return F.layer_norm(wide(x), weight.shape, wide(weight), wide(bias), eps).to(x.dtype)
    centred = x - mean(x)
    variance = mean(centred * centred)
    seen.setdefault("infinite_variances", []).append((~variance.isfinite()).float().mean())
    return centred / (variance + eps).sqrt() * weight + bias


def causal_attention(q: Tensor, k: Tensor, v: Tensor, relax: bool, seen: Seen) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v``; relaxed, ``softmax((q / (a sqrt(D)) k^T - max) a) v``."""
    alpha = ALPHA if relax else 1.0
    scores = matmul(q / (alpha * math.sqrt(q.shape[-1])), k.transpose(-1, -2))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    seen.setdefault("score", []).append(wide(scores.detach().abs().amax()) * alpha)
    if relax:
        peak = scores.detach().masked_fill(later, -math.inf).amax(-1, keepdim=True)
        # Those of later keys may be above the peak; far below it the weight is zero anyway.
        scores = (scores - peak).clamp(-HALF_MAX / alpha, 0) * alpha
    weights = wide(scores.masked_fill(later, -math.inf)).softmax(-1).to(q.dtype)
    return matmul(weights, v)


def logits(
    weights: dict[str, Tensor], tokens: Tensor, config: ModelConfig, variant: Variant, seen: Seen
) -> Tensor:
    """The scores of GPT(config) with these weights: (B, S) to (B, S, vocabulary)."""
    batch, length = tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return layer_norm(x, weight, bias, config.layernorm_eps, variant, seen)

    def linear(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.linear(wide(x), wide(weight), wide(bias)).to(x.dtype)

    embeddings = weights["word_embeddings.weight"]
    h = F.embedding(tokens, wide(embeddings)).to(embeddings.dtype)
    h = h + weights["transformer.position_embeddings.weight"][:length]
    for index in range(config.num_layers):
        layer = f"transformer.layers.{index}"
        z = norm(h, f"{layer}.input_layernorm")
        qkv = linear(z, f"{layer}.attention.query_key_value")
        q, k, v = qkv.view(batch, length, 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
        f = causal_attention(q, k, v, variant.relax, seen).transpose(1, 2).flatten(2)
        f = linear(f, f"{layer}.attention.dense")
        h = h + (norm(f, f"{layer}.third_layernorm") if config.norm == "sandwich" else f)
        z = norm(h, f"{layer}.post_attention_layernorm")
        f = F.gelu(linear(z, f"{layer}.mlp.dense_h_to_4h"), approximate="tanh")
        f = linear(f, f"{layer}.mlp.dense_4h_to_h")
        h = h + (norm(f, f"{layer}.fourth_layernorm") if config.norm == "sandwich" else f)
    return matmul(norm(h, "transformer.final_layernorm"), embeddings.T)


# The data, and what needs no model.


def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits as tokens, to train on and held out, int64 (N, 65): which digit, then 8x8
    pixels of 17 levels."""
    images, labels = load_digits(return_X_y=True)
    tokens = torch.cat([LEVELS + torch.tensor(labels)[:, None], torch.tensor(images).long()], dim=1)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    return tokens[order[HELD_OUT:]], tokens[order[:HELD_OUT]]


def frequency_loss(train: Tensor, tokens: Tensor, by_digit: bool) -> float:
    """Nats per pixel of ``tokens`` from how often each level occurs at each position in ``train``
    (``by_digit``: in images of the same digit), a tenth added to each count."""
    positions = torch.arange(PIXELS)
    counts = torch.zeros(DIGITS, PIXELS, LEVELS, dtype=torch.float64)
    ones = torch.ones(len(train), PIXELS, dtype=torch.float64)
    counts.index_put_((train[:, :1] - LEVELS, positions, train[:, 1:]), ones, accumulate=True)
    if not by_digit:
        counts = counts.sum(0, keepdim=True).expand_as(counts)
    shares = (counts + 0.1) / (counts + 0.1).sum(-1, keepdim=True)
    return -shares[tokens[:, :1] - LEVELS, positions, tokens[:, 1:]].log().mean().item()


def baselines() -> dict[str, dict[str, float]]:
    train, held_out = digits()
    return {
        name: {
            "train": round(frequency_loss(train, train, by_digit), 4),
            "held out": round(frequency_loss(train, held_out, by_digit), 4),
        }
        for name, by_digit in (("position", False), ("position and digit", True))
    }


# Training.


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Linear warm-up; from half of the steps on, a line down to ``final_learning_rate``."""
    fallen = max(0.0, step / settings.steps - 0.5) / 0.5
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return warm * (1 - fallen * (1 - settings.final_learning_rate))


def train(
    variant: Variant, rate: float, seed: int, settings: Settings, device: torch.device
) -> dict[str, Any]:
    """One run, until its last step or until no step succeeds any more.

    Returns:
        ``held_out_loss`` at the end, in nats per pixel. ``skipped``: steps whose gradients were not
        finite. ``curves``, a number for each window of steps (None: not finite): ``loss`` (mean),
        ``loss_scale`` (the last), ``norm_input`` and ``score`` (largest magnitudes),
        ``infinite_variances`` (share of LayerNorm's rows), ``zero_gradients`` (share).
    """
    started = time.perf_counter()
    data, held_out = (part.to(device) for part in digits())
    config = ModelConfig(
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_heads=settings.num_heads,
        max_positions=PIXELS,
        dropout=0.0,
        norm=variant.norm,
        attention="dense",
    )
    torch.manual_seed(seed)
    master = dict(GPT(config, LEVELS + DIGITS).to(device).named_parameters())
    optimizer = torch.optim.AdamW(
        master.values(), betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=settings.initial_loss_scale,
        growth_interval=settings.loss_scale_window,
        enabled=variant.dtype == "float16",
    )

    def loss_of(weights: dict[str, Tensor], tokens: Tensor, seen: Seen) -> Tensor:
        scores = logits(weights, tokens[:, :-1], config, variant, seen).float()
        return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())

    def copies() -> dict[str, Tensor]:
        dtype = getattr(torch, variant.dtype)
        return {name: weight.detach().to(dtype) for name, weight in master.items()}

    generator = torch.Generator().manual_seed(seed)
    steps: list[dict[str, float]] = []
    skipped: list[int] = []
    for step in range(settings.steps):
        batch = torch.randint(len(data), (settings.batch_size,), generator=generator)
        weights = {name: weight.requires_grad_() for name, weight in copies().items()}
        seen: Seen = {}
        loss = loss_of(weights, data[batch.to(device)], seen)
        gradients = torch.autograd.grad(scaler.scale(loss), list(weights.values()))
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        for weight, gradient in zip(master.values(), gradients, strict=True):
            weight.grad = gradient.float()
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_factor(step, settings)
        steps.append(
            {
                "loss": loss.item(),
                "loss_scale": scaler.get_scale(),
                "norm_input": _largest(seen["norm_input"]),
                "score": _largest(seen["score"]),
                "infinite_variances": _mean(seen.get("infinite_variances")),
                "zero_gradients": (flat == 0).float().mean().item(),
            }
        )
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(master.values(), settings.clip_grad_norm)
        if norm.isfinite():  # as the scaler decides; in float32 there is none
            scaler.step(optimizer)
        else:
            skipped.append(step)
        scaler.update()
        if skipped_in_a_row(skipped, step) == settings.give_up_after:
            break
    with torch.no_grad():
        parts = [loss_of(copies(), part, {}).item() * len(part) for part in held_out.split(100)]
    return {
        "variant": dataclasses.asdict(variant),
        "learning_rate": rate,
        "seed": seed,
        "steps": len(steps),
        "held_out_loss": _number(sum(parts) / len(held_out)),
        "skipped": skipped,
        "curves": curves(steps, settings.window),
        "seconds": round(time.perf_counter() - started, 1),
    }


def skipped_in_a_row(skipped: Sequence[int], last: int) -> int:
    """How many of the steps up to ``last`` were skipped, without a good one between them."""
    return next((n for n, step in enumerate(reversed(skipped)) if step != last - n), len(skipped))


def curves(steps: list[dict[str, float]], window: int) -> dict[str, list[float | None]]:
    """By kind, a number for each window of steps."""
    reduce: dict[str, Callable[[list[float]], float]] = {
        "norm_input": max,
        "score": max,
        "loss_scale": lambda scales: scales[-1],
    }
    windows = [steps[start : start + window] for start in range(0, len(steps), window)]
    return {
        kind: [
            _number(reduce.get(kind, statistics.fmean)([step[kind] for step in part]))
            for part in windows
        ]
        for kind in steps[0]
    }


def _largest(values: list[Tensor]) -> float:
    """Infinite where one is not finite."""
    return torch.stack(values).nan_to_num(math.inf, math.inf).max().item()


def _mean(values: list[Tensor] | None) -> float:
    return torch.stack(values).mean().item() if values else 0.0


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


# The runs, their table, their picture.


def run_once(
    variant: Variant, rate: float, seed: int, settings: Settings, device: str, folder: Path
) -> dict[str, Any]:
    """The run from its file in the folder, if the same commit, settings and device made it; else
    anew."""
    path = folder / (re.sub(r"\W+", "-", f"{variant.name} {rate:g} {seed}").lower() + ".json")
    key = {
        "commit": machine.commit_info(),
        "settings": dataclasses.asdict(settings),
        "device": machine.machine_info(torch.device(device))["device"],
        "torch": torch.__version__,
    }
    kept = json.loads(path.read_text()) if path.exists() else {"key": None}
    if kept["key"] != key:
        torch.set_num_threads(1)  # the tensors are small
        kept = {"key": key, "run": train(variant, rate, seed, settings, torch.device(device))}
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(kept))
    run: dict[str, Any] = kept["run"]
    return run


def collect(
    seeds: Sequence[int],
    rates: Sequence[float],
    settings: Settings,
    device: str,
    jobs: int,
    folder: Path,
) -> dict[str, Any]:
    """The plan's runs at these learning rates with each seed, as a record."""
    started, commit = time.perf_counter(), machine.commit_info()
    plan = [(v, rate, seed) for rate in rates for seed in seeds for v in PLAN[rate]]
    runs, lines = [], baselines()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_once, *run, settings, device, folder) for run in plan]
        for (variant, rate, seed), future in zip(plan, futures, strict=True):
            runs.append(future.result())
            minutes, what = (time.perf_counter() - started) / 60, outcome(runs[-1], lines)
            print(
                f"{minutes:5.1f} min  rate {rate:g}, seed {seed}, {variant.name}: {what}",
                flush=True,
            )
    return {
        "machine_info": machine.machine_info(torch.device(device)) | {"threads": 1},
        "commit_info": commit,
        "datetime": machine.now(),
        "settings": dataclasses.asdict(settings),
        "baselines": lines,
        "runs": runs,
    }


def outcome(run: dict[str, Any], lines: dict[str, dict[str, float]]) -> str:
    """What was seen of a run, in words."""
    streak = skipped_in_a_row(run["skipped"], run["steps"] - 1)
    if streak >= 10:
        scale = math.log2(run["curves"]["loss_scale"][-1])
        return f"stopped: {streak} steps skipped in a row, the loss scale fell to 2^{scale:.0f}"
    loss = run["held_out_loss"]
    if loss is None:
        return "the held-out loss is not finite"
    return ("below" if loss < lines["position"]["held out"] else "above") + " the position line"


# One with, one without; what differs in nothing else.
COMPARISONS = {
    "PB-relax, in Pre-LN with float16 statistics": (PRE_RELAXED, PRE),
    "PB-relax, in Sandwich-LN with float16 statistics": (SANDWICH_RELAXED, SANDWICH),
    "float32 statistics instead of float16, in Pre-LN": (PRE_STATISTICS, PRE),
    "float16 instead of float32, in Pre-LN with float32 statistics": (PRE_STATISTICS, PRE_FLOAT32),
    "Sandwich-LN instead of Pre-LN, both with PB-relax": (SANDWICH_RELAXED, PRE_RELAXED),
}


def table(record: dict[str, Any]) -> str:
    """A row for each learning rate and variant; then what one change does, seed by seed."""
    settings, lines, info = record["settings"], record["baselines"], record["machine_info"]
    cells: dict[tuple[float, Variant], list[dict[str, Any]]] = {}
    for run in sorted(record["runs"], key=lambda run: run["learning_rate"]):
        cells.setdefault((run["learning_rate"], Variant(**run["variant"])), []).append(run)
    rates = list(dict.fromkeys(rate for rate, _ in cells))
    rows = [
        "| learning rate | variant | held-out loss | outcome | skipped steps | largest input of a "
        "LayerNorm | rows whose variance is infinite | gradients that are zero | largest score |",
        "|---:|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for (rate, variant), runs in cells.items():
        losses = [_or_inf(run["held_out_loss"]) for run in runs]
        outcomes = Counter(outcome(run, lines) for run in runs)
        row = [
            f"{rate:g}",
            variant.name,
            f"{statistics.fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
            "; ".join(f"{count} of {len(runs)} {what}" for what, count in outcomes.items()),
            f"{statistics.fmean(len(run['skipped']) for run in runs):.0f}",
            f"{max(_or_inf(x) for run in runs for x in run['curves']['norm_input']):,.0f}",
            f"{_late(runs, 'infinite_variances'):.0%}" if variant.statistics == "float16" else "",
            f"{_late(runs, 'zero_gradients'):.1%}",
            f"{max(_or_inf(x) for run in runs for x in run['curves']['score']):,.0f}",
        ]
        rows.append(f"| {' | '.join(row)} |")
    rates_head = " | ".join(f"at {rate:g}" for rate in rates)
    rows += [
        "",
        f"| change of the held-out loss by | {rates_head} |",
        "|---|" + "---:|" * len(rates),
    ]
    for change, (new, old) in COMPARISONS.items():
        differences = [
            _difference(cells.get((rate, new)), cells.get((rate, old))) for rate in rates
        ]
        rows.append(f"| {change} | {' | '.join(differences)} |")
    seeds = len({run["seed"] for run in record["runs"]})
    rows += [
        "",
        f"{settings['num_layers']} layers, hidden size {settings['hidden_size']}, "
        f"{settings['num_heads']} heads; {settings['steps']} steps of {settings['batch_size']} "
        f"images of 64 pixels; AdamW, {settings['warmup_steps']} steps of warm-up, gradients clipped "
        f"at {settings['clip_grad_norm']:g}, a loss scale that begins at "
        f"2^{math.log2(settings['initial_loss_scale']):.0f}; {seeds} seeds. Losses are nats per pixel "
        f"on {HELD_OUT} images that no run trains on: mean (smallest to largest). On these the "
        f"position line, how often each level occurs at each position, is at "
        f"{lines['position']['held out']:.3f}; the same for each digit "
        f"{lines['position and digit']['held out']:.3f}. Largest: of all seeds and steps (without "
        f"PB-relax, float16 holds scores up to 65504). Shares: of the second half of the steps. "
        f"Changes: mean and 95 % t-interval of the differences seed by seed. {info['device']}, "
        f"float16 rounded after each operation, sums in float32.",
    ]
    return "\n".join(rows)


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _late(runs: list[dict[str, Any]], kind: str) -> float:
    """The mean over seeds and over the second half of the steps."""
    curves = [run["curves"][kind] for run in runs]
    return statistics.fmean(x for curve in curves for x in curve[len(curve) // 2 :])


def _difference(new: list[dict[str, Any]] | None, old: list[dict[str, Any]] | None) -> str:
    losses = [
        {run["seed"]: _or_inf(run["held_out_loss"]) for run in runs or []} for runs in (new, old)
    ]
    pairs = [losses[0][seed] - losses[1][seed] for seed in losses[0] if seed in losses[1]]
    if len(pairs) < 2:
        return ""
    interval = ttest_1samp(pairs, 0).confidence_interval()
    return f"{statistics.fmean(pairs):+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


HOW_TO_READ = (
    "A line is a run; a number stands for ten steps (above their mean, below their largest). A line "
    "has a gap where a loss is not finite. Above, the losses are of the batches that are trained on."
)


def draw(record: dict[str, Any], path: Path) -> None:
    """The loss and the largest input of a norm by step; a column for each learning rate."""
    rates = sorted({run["learning_rate"] for run in record["runs"]})
    figure = Figure(figsize=(5 * len(rates), 8), layout="constrained")
    panels = figure.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False)
    for column, rate in zip(panels.T, rates, strict=True):
        for run in (run for run in record["runs"] if run["learning_rate"] == rate):
            variant, window = Variant(**run["variant"]), record["settings"]["window"]
            for axis, kind in zip(column, ("loss", "norm_input"), strict=True):
                values = [math.nan if x is None else x for x in run["curves"][kind]]
                steps = [window * (index + 0.5) for index in range(len(values))]
                axis.plot(steps, values, color=COLOURS[variant], linewidth=0.9, alpha=0.85)
        column[0].set_title(f"learning rate {rate:g}")
        column[1].set_xlabel("step")
        for axis, marks in zip(
            column,
            (
                {name: line["train"] for name, line in record["baselines"].items()},
                {"float16 ends: 65504": HALF_MAX, "its square overflows: 256": 256.0},
            ),
            strict=True,
        ):
            for text, height in marks.items():
                axis.axhline(height, color="black", linestyle=":", linewidth=1.2)
                if rate == rates[0]:
                    axis.annotate(text, (0, height), (2, 2), textcoords="offset points", fontsize=8)
    panels[0, 0].set(ylabel="training loss (nats per pixel)", ylim=(1.35, 2.85))
    panels[1, 0].set(ylabel="largest input of a LayerNorm", yscale="log")
    used = {Variant(**run["variant"]) for run in record["runs"]}
    handles = [
        Line2D([], [], color=colour, label=variant.name)
        for variant, colour in COLOURS.items()
        if variant in used
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", choices=PLAN, default=[*PLAN])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "instability")
    args = parser.parse_args()
    record = collect(args.seeds, args.rates, Settings(), args.device, args.jobs, args.out)
    info, commit = record["machine_info"], record["commit_info"]
    name = machine.record_name("instability", info, commit, record["datetime"])
    machine.save_record(record, machine.RESULTS / name)
    print(f"\n{table(record)}\n\nrecord: {machine.RESULTS / name}")


if __name__ == "__main__":
    main()
