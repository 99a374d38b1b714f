"""What Sandwich-LN and PB-relax are for: deep float16 models, trained with and without them.

    python -m benchmarks.experiments.instability --help

A transformer, deep and narrow as in the CogView paper's toy experiment (arXiv 2105.13290, section
2.4), learns handwritten digits, a token a pixel. Weights, activations and gradients are float16,
Adam's weights float32, the loss scale is dynamic. Variants differ in nothing that is not named.

The model is that of cogview/model.py (a test compares them), written here as separate operations,
as CogView had them: each rounds its result to float16. Matrix products, means and softmax sum in
float32, as on a GPU. LayerNorm's statistics are float16, where the square of a number above 256 is
infinite, or float32, as in the fused kernels. A run that has ended is kept in ``--out`` and not
repeated at the same commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import multiprocessing
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import ttest_1samp
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
        name += ", float32 statistics" if self.statistics != self.dtype else ""
        return name + (", all float32" if self.dtype == "float32" else "")


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
# Losses that are subtracted, seed by seed.
COMPARISONS = {
    "PB-relax, in Pre-LN": (PRE_RELAXED, PRE),
    "PB-relax, in Sandwich-LN": (SANDWICH_RELAXED, SANDWICH),
    "float32 statistics, in Pre-LN": (PRE_STATISTICS, PRE),
    "Sandwich-LN for Pre-LN, both with PB-relax": (SANDWICH_RELAXED, PRE_RELAXED),
    "Sandwich-LN + PB-relax for Pre-LN all float32": (SANDWICH_RELAXED, PRE_FLOAT32),
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


Run = dict[str, Any]
Weights = dict[str, Tensor]
Seen = defaultdict[str, list[Tensor]]  # by kind as in CURVES, a number for each operation


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return (wide(a) @ wide(b)).to(a.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, variant: Variant, seen: Seen
) -> Tensor:
    peak = x.detach().abs().amax(-1, keepdim=True)
    seen["norm_input"].append(peak.amax())
    if variant.relax:
        x = x / (torch.where(peak == 0, 8.0, peak) / 8)
    if variant.statistics == "float32":
        seen["infinite_variances"].append(torch.zeros(()))
        return F.layer_norm(wide(x), weight.shape, wide(weight), wide(bias), eps).to(x.dtype)
    centred = x - wide(x).mean(-1, keepdim=True).to(x.dtype)
    variance = wide(centred * centred).mean(-1, keepdim=True).to(x.dtype)
    seen["infinite_variances"].append((~variance.isfinite()).float().mean())
    return centred / (variance + eps).sqrt() * weight + bias


def causal_attention(q: Tensor, k: Tensor, v: Tensor, relax: bool, seen: Seen) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v``; relaxed, ``softmax((q / (a sqrt(D)) k^T - max) a) v``."""
    alpha = ALPHA if relax else 1.0
    scores = matmul(q / (alpha * math.sqrt(q.shape[-1])), k.transpose(-1, -2))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    seen["score"].append(wide(scores.detach().abs().amax()) * alpha)
    if relax:
        peak = scores.detach().masked_fill(later, -math.inf).amax(-1, keepdim=True)
        scores = (scores - peak) * alpha
    weights = wide(scores.masked_fill(later, -math.inf)).softmax(-1).to(q.dtype)
    return matmul(weights, v)


def logits(
    weights: Weights, tokens: Tensor, config: ModelConfig, variant: Variant, seen: Seen
) -> Tensor:
    """The scores of GPT(config) with these weights: (B, S) to (B, S, vocabulary)."""
    batch, length = tokens.shape

    def parameters(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, *parameters(name), config.layernorm_eps, variant, seen)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(wide(x), *map(wide, parameters(name))).to(x.dtype)

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


def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits as tokens, to train on and held out, int64 (N, 65): which digit, then 8x8
    pixels of 17 levels."""
    images, labels = load_digits(return_X_y=True)
    tokens = torch.cat([LEVELS + torch.tensor(labels)[:, None], torch.tensor(images).long()], dim=1)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    return tokens[order[HELD_OUT:]], tokens[order[:HELD_OUT]]


def frequency_loss(train: Tensor, tokens: Tensor, by_digit: bool) -> float:
    """What needs no model: nats per pixel of ``tokens``, from how often each level occurs at each
    position in ``train`` (``by_digit``: of the same digit), a tenth added to each count."""
    positions = torch.arange(PIXELS)
    counts = torch.zeros(DIGITS, PIXELS, LEVELS, dtype=torch.float64)
    ones = torch.ones(len(train), PIXELS, dtype=torch.float64)
    counts.index_put_((train[:, :1] - LEVELS, positions, train[:, 1:]), ones, accumulate=True)
    if not by_digit:
        counts = counts.sum(0, keepdim=True).expand_as(counts)
    shares = (counts + 0.1) / (counts + 0.1).sum(-1, keepdim=True)
    loss = -shares[tokens[:, :1] - LEVELS, positions, tokens[:, 1:]].log().mean()
    return round(loss.item(), 4)


# Recorded of each step: how the numbers of its operations become one, and then those of a window.
CURVES: dict[str, Callable[[list[float]], Any]] = {
    "loss": np.mean,
    "loss_scale": lambda scales: scales[-1],
    "norm_input": np.max,  # largest magnitude that enters a LayerNorm
    "score": np.max,
    "infinite_variances": np.mean,  # share of LayerNorm's rows
    "zero_gradients": np.mean,  # share of the weights
}


def train(variant: Variant, rate: float, seed: int, settings: Settings, device: str) -> Run:
    """One run, until its last step or until no step succeeds any more. ``skipped``: steps whose
    gradients were not finite; ``curves``: as in CURVES; None: not finite."""
    started = time.perf_counter()
    data, held_out = (part.to(device) for part in digits())
    shape = {name: getattr(settings, name) for name in ("num_layers", "hidden_size", "num_heads")}
    config = ModelConfig(
        **shape, max_positions=PIXELS, dropout=0.0, norm=variant.norm, attention="dense"
    )
    torch.manual_seed(seed)
    master = dict(GPT(config, LEVELS + DIGITS).to(device).named_parameters())
    decay, window = settings.weight_decay, settings.loss_scale_window
    optimizer = torch.optim.AdamW(master.values(), betas=(0.9, 0.95), weight_decay=decay)
    half, scale = variant.dtype == "float16", settings.initial_loss_scale
    scaler = torch.amp.GradScaler(device, scale, growth_interval=window, enabled=half)

    def copies() -> Weights:
        dtype = torch.float16 if half else torch.float32
        return {name: weight.detach().to(dtype) for name, weight in master.items()}

    def loss_of(weights: Weights, tokens: Tensor, seen: Seen) -> Tensor:
        scores = logits(weights, tokens[:, :-1], config, variant, seen).float()
        return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())

    generator = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {kind: [] for kind in CURVES}
    skipped: list[int] = []
    for step in range(settings.steps):
        batch = torch.randint(len(data), (settings.batch_size,), generator=generator)
        weights = {name: weight.requires_grad_() for name, weight in copies().items()}
        seen = Seen(list)
        loss = loss_of(weights, data[batch.to(device)], seen)
        gradients = torch.autograd.grad(scaler.scale(loss), list(weights.values()))
        zeros = torch.cat([gradient.flatten() for gradient in gradients]) == 0
        seen |= {"loss": [loss], "loss_scale": [torch.tensor(scaler.get_scale())]}
        seen |= {"zero_gradients": [zeros.float().mean()]}
        for kind, reduce in CURVES.items():
            curves[kind].append(reduce([value.item() for value in seen[kind]]))
        for weight, gradient in zip(master.values(), gradients, strict=True):
            weight.grad = gradient.float()
        fallen = max(0.0, 2 * step / settings.steps - 1) * (1 - settings.final_learning_rate)
        warm = min(1.0, (step + 1) / settings.warmup_steps)
        optimizer.param_groups[0]["lr"] = rate * warm * (1 - fallen)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(master.values(), settings.clip_grad_norm)
        if norm.isfinite():  # as the scaler decides; in float32 there is none
            scaler.step(optimizer)
        else:
            skipped.append(step)
        scaler.update()
        if skipped_at_the_end(skipped, step + 1) == settings.give_up_after:
            break
    with torch.no_grad():
        held_out_loss = loss_of(copies(), held_out, Seen(list)).item()
    starts = range(0, step + 1, settings.window)
    return {
        "variant": dataclasses.asdict(variant),
        "learning_rate": rate,
        "seed": seed,
        "steps": step + 1,
        "held_out_loss": _number(held_out_loss),
        "skipped": skipped,
        "curves": {
            kind: [_number(CURVES[kind](curve[at : at + settings.window])) for at in starts]
            for kind, curve in curves.items()
        },
        "seconds": round(time.perf_counter() - started, 1),
    }


def skipped_at_the_end(skipped: list[int], steps: int) -> int:
    """How many of the last of so many steps were skipped, without a good one between them."""
    return next((n for n, at in enumerate(reversed(skipped)) if at != steps - 1 - n), len(skipped))


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def run_once(
    variant: Variant, rate: float, seed: int, settings: Settings, device: str, folder: Path
) -> Run:
    """The run from its file in the folder, if there is one, else anew."""
    what = {"variant": dataclasses.asdict(variant), "rate": rate, "seed": seed, "device": device}
    what |= {"settings": dataclasses.asdict(settings), "torch": torch.__version__}
    what |= {"commit": machine.commit_info()}
    path = folder / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        torch.set_num_threads(1)  # the tensors are small
        run = train(variant, rate, seed, settings, device)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(run))
    kept: Run = json.loads(path.read_text())
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "instability")
    args = parser.parse_args()
    settings, images = Settings(), dict(zip(("train", "held out"), digits(), strict=True))
    info, commit = machine.machine_info(torch.device(args.device)), machine.commit_info()
    plan = [(v, rate, seed) for rate in PLAN for seed in args.seeds for v in PLAN[rate]]
    record: dict[str, Any] = {
        "machine_info": info | {"threads": 1},
        "commit_info": commit,
        "datetime": machine.now(),
        "settings": dataclasses.asdict(settings),
        "baselines": {
            name: {part: frequency_loss(images["train"], x, by) for part, x in images.items()}
            for name, by in (("position", False), ("position and digit", True))
        },
        "runs": [],
    }
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_once, *run, settings, args.device, args.out) for run in plan]
        for (variant, rate, seed), future in zip(plan, futures, strict=True):
            record["runs"].append(run := future.result())
            what = outcome(run, record["baselines"]["position"]["held out"])
            print(f"learning rate {rate:g}, seed {seed}, {variant.name}: {what}", flush=True)
    name = machine.record_name("instability", info, commit, record["datetime"])
    machine.save_record(record, path := machine.RESULTS / name)
    print(f"\n{table(record)}\n\nrecord: {path}")


def outcome(run: Run, position_line: float) -> str:
    """What was seen of a run, in words."""
    skipped = skipped_at_the_end(run["skipped"], run["steps"])
    if skipped >= 10:
        scale = math.log2(run["curves"]["loss_scale"][-1])
        return f"stopped: {skipped} steps skipped in a row, the loss scale fell to 2^{scale:.0f}"
    loss = run["held_out_loss"]
    above = "with a loss that is not finite" if loss is None else "above the position line"
    return "below the position line" if (loss or math.inf) < position_line else above


def table(record: dict[str, Any]) -> str:
    """A row for each learning rate and variant; then what one change does, seed by seed."""
    settings, lines = record["settings"], record["baselines"]
    line, by_digit = lines["position"]["held out"], lines["position and digit"]["held out"]
    cells: defaultdict[tuple[float, Variant], list[Run]] = defaultdict(list)
    for run in sorted(record["runs"], key=lambda run: (run["learning_rate"], run["seed"])):
        cells[run["learning_rate"], Variant(**run["variant"])].append(run)
    rates = list(dict.fromkeys(rate for rate, _ in cells))
    rows = [
        "| learning rate | variant | held-out loss | outcome | skipped steps | largest input of a "
        "LayerNorm | rows whose variance is infinite | gradients that are zero | largest score |",
        "|---:|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for (rate, variant), runs in cells.items():
        losses, outcomes = _losses(runs), Counter(outcome(run, line) for run in runs)
        variances = f"{_of(runs, 'infinite_variances', 0.5).mean():.0%}"
        row = [
            f"{rate:g}",
            variant.name,
            _span(losses, np.nanmin(losses), np.nanmax(losses), ".3f"),
            "; ".join(f"{count} of {len(runs)} {what}" for what, count in outcomes.items()),
            f"{np.mean([len(run['skipped']) for run in runs]):.0f}",
            f"{_of(runs, 'norm_input').max():,.0f}".replace("nan", "not finite"),
            variances if variant.statistics == "float16" else "",
            f"{_of(runs, 'zero_gradients', 0.5).mean():.1%}",
            f"{_of(runs, 'score').max():,.0f}".replace("nan", "not finite"),
        ]
        rows.append(f"| {' | '.join(row)} |")
    rows += ["", f"| change of the loss by | {' | '.join(f'at {rate:g}' for rate in rates)} |"]
    rows += ["|---|" + "---:|" * len(rates)]
    for change, (new, old) in COMPARISONS.items():
        texts = [_change(cells[rate, new], cells[rate, old]) for rate in rates]
        rows.append(f"| {change} | {' | '.join(texts)} |")
    plain = [runs for (_, v), runs in cells.items() if not v.relax and v.dtype == "float16"]
    score = _of(sum(plain, []), "score").max()
    none = "none overflowed, so that these runs do not need it"
    attention = none if score <= HALF_MAX else "scores overflowed"
    rows += [
        "",
        f"{settings['num_layers']} layers of width {settings['hidden_size']}, {settings['steps']} "
        f"steps of {settings['batch_size']} images; AdamW, {settings['warmup_steps']} steps of "
        f"warm-up. Losses: nats per pixel of {HELD_OUT} held-out images, mean over seeds (smallest "
        f"to largest). How often each level occurs at each position alone gives them {line:.3f} "
        f"(the position line), the same for each digit {by_digit:.3f}. Largest: of all seeds and "
        f"steps. Shares: of the second half of the steps. Changes: the mean of the differences, "
        f"seed by seed (95 % t-interval). PB-relax in attention: without it, the largest score was "
        f"{score:,.0f}; float16 ends at 65,504: {attention}. {record['machine_info']['device']}.",
    ]
    return "\n".join(rows)


def _losses(runs: list[Run]) -> np.ndarray:
    """NaN where a loss is not finite."""
    return np.array([run["held_out_loss"] for run in runs], dtype=float)


def _of(runs: list[Run], kind: str, start: float = 0.0) -> np.ndarray:
    """The numbers of all curves, from this share of their steps on; NaN where not finite."""
    curves = [np.array(run["curves"][kind], dtype=float) for run in runs]
    return np.concatenate([curve[int(start * len(curve)) :] for curve in curves])


def _span(values: np.ndarray, low: float, high: float, form: str) -> str:
    """The mean and the range."""
    finite = int(np.isfinite(values).sum())
    text = f"{np.nanmean(values):{form}} ({low:{form}} to {high:{form}})"
    return text if finite == len(values) else f"{text}, of {finite} that are finite"


def _change(new: list[Run], old: list[Run]) -> str:
    differences = _losses(new) - _losses(old) if new and old else np.array([])
    if np.isfinite(differences).sum() < 2:
        return ""
    interval = ttest_1samp(differences, 0, nan_policy="omit").confidence_interval()
    return _span(differences, interval.low, interval.high, "+.3f")


HOW_TO_READ = (
    "Each line is a run, each number of it ten steps: the mean loss of the batches trained on, and "
    "the largest input of a LayerNorm. A line has a gap where a number is not finite; a cross ends "
    "a run that was stopped."
)


def draw(record: dict[str, Any], path: Path) -> None:
    """The loss and the largest input of a norm by step; a column for each learning rate."""
    rates = sorted({run["learning_rate"] for run in record["runs"]})
    lines = {line["train"]: f"{name}\nalone" for name, line in record["baselines"].items()}
    limits = {HALF_MAX: "65504:\nfloat16 ends", 256.0: "256: the\nsquare\noverflows"}
    figure = Figure(figsize=(4.7 * len(rates), 8), layout="constrained")
    panels = figure.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False)
    for column, rate in zip(panels.T, rates, strict=True):
        for axis, kind, marks in zip(column, ("loss", "norm_input"), (lines, limits), strict=True):
            for run in (run for run in record["runs"] if run["learning_rate"] == rate):
                values = np.array(run["curves"][kind], dtype=float)
                steps = record["settings"]["window"] * (np.arange(len(values)) + 0.5)
                colour = COLOURS[Variant(**run["variant"])]
                axis.plot(steps, values, color=colour, linewidth=0.9)
                if run["steps"] < record["settings"]["steps"]:
                    last = np.flatnonzero(np.isfinite(values))[-1:]
                    axis.plot(steps[last], values[last], "x", color=colour, markersize=9, mew=2)
            for height, text in marks.items():
                axis.axhline(height, color="black", linestyle=":", linewidth=1.2)
                if rate == rates[-1]:
                    axis.text(1.02, height, text, transform=axis.get_yaxis_transform(), va="center")
        column[0].set_title(f"learning rate {rate:g}")
        column[1].set_xlabel("step")
    panels[0, 0].set(ylabel="training loss (nats per pixel)", ylim=(1.35, 2.4))
    panels[1, 0].set(ylabel="largest input of a LayerNorm", yscale="log")
    used = {Variant(**run["variant"]) for run in record["runs"]}
    handles = [Line2D([], [], color=COLOURS[v], label=v.name) for v in COLOURS if v in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


if __name__ == "__main__":
    main()
