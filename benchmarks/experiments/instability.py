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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.suite import measure
from cogview.config import ModelConfig
from cogview.files import atomic_write
from cogview.model import GPT

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results"
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
        name = ("Sandwich-LN" if self.norm == "sandwich" else "Pre-LN") + (
            " + PB-relax" if self.relax else ""
        )
        if self.dtype == "float32":
            return f"{name}, all float32"
        return name if self.statistics == "float16" else f"{name}, float32 statistics"


VARIANTS = (
    Variant("pre", relax=False),
    Variant("pre", relax=True),
    Variant("sandwich", relax=False),
    Variant("sandwich", relax=True),
    # The method or the precision: which of them fails?
    Variant("pre", relax=False, statistics="float32"),
    Variant("pre", relax=False, statistics="float32", dtype="float32"),
)
# In the order of the runs: a stopped experiment lacks the last. At the lowest all variants train.
PLAN = tuple(
    [(rate, variant) for rate in (0.01, 0.1) for variant in VARIANTS]
    + [(0.003, variant) for variant in VARIANTS[:4]]
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The same for all variants."""

    steps: int = 300
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


# The operations.


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return (wide(a) @ wide(b)).to(a.dtype)


def mean(x: Tensor) -> Tensor:
    return wide(x).mean(-1, keepdim=True).to(x.dtype)


class Watch:
    """What the operations of one forward saw, by kind: a number for each call."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def see(self, kind: str, value: Tensor) -> None:
        self.seen.setdefault(kind, []).append(value.detach().float())

    def largest(self, kind: str) -> float:
        """Infinite where one is not finite, zero where nothing was seen."""
        values = torch.stack(self.seen.get(kind, [torch.zeros(())]))
        return values.nan_to_num(math.inf, math.inf).max().item()


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relax: bool,
    statistics: str,
    watch: Watch | None = None,
) -> Tensor:
    if watch:
        watch.see("norm input", x.detach().abs().amax())
    if relax:
        peak = x.detach().abs().amax(-1, keepdim=True)
        x = x / (torch.where(peak == 0, 8.0, peak) / 8)
    if statistics == "float32":
        return F.layer_norm(wide(x), weight.shape, wide(weight), wide(bias), eps).to(x.dtype)
    centred = x - mean(x)
    variance = mean(centred.square())
    if watch:
        watch.see("infinite variances", (~variance.isfinite()).float().mean())
    return centred / (variance + eps).sqrt() * weight + bias


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, relax: bool, watch: Watch | None = None
) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v``; relaxed, ``softmax((q / (a sqrt(D)) k^T - max) a) v``."""
    alpha = ALPHA if relax else 1.0
    scores = matmul(q / (alpha * math.sqrt(q.shape[-1])), k.transpose(-1, -2))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    if watch:
        watch.see("score", wide(scores.detach().abs().amax()) * alpha)
    if relax:
        peak = scores.detach().masked_fill(later, -math.inf).amax(-1, keepdim=True)
        # Those of later keys may be above the peak; far below it the weight is zero anyway.
        scores = (scores - peak).clamp(-HALF_MAX / alpha, 0) * alpha
    weights = wide(scores.masked_fill(later, -math.inf)).softmax(-1).to(q.dtype)
    return matmul(weights, v)


def logits(
    weights: dict[str, Tensor],
    tokens: Tensor,
    config: ModelConfig,
    variant: Variant,
    watch: Watch | None = None,
) -> Tensor:
    """The scores of GPT(config) with these weights: (B, S) to (B, S, vocabulary)."""
    batch, length = tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        parameters = weights[f"{name}.weight"], weights[f"{name}.bias"]
        eps = config.layernorm_eps
        return layer_norm(x, *parameters, eps, variant.relax, variant.statistics, watch)

    def project(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.linear(wide(x), wide(weight), wide(bias)).to(x.dtype)

    embeddings = weights["word_embeddings.weight"]
    h = F.embedding(tokens, wide(embeddings)).to(embeddings.dtype)
    h = h + weights["transformer.position_embeddings.weight"][:length]
    for index in range(config.num_layers):
        layer = f"transformer.layers.{index}"
        z = norm(h, f"{layer}.input_layernorm")
        qkv = project(z, f"{layer}.attention.query_key_value")
        q, k, v = qkv.view(batch, length, 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
        f = causal_attention(q, k, v, variant.relax, watch).transpose(1, 2).flatten(2)
        f = project(f, f"{layer}.attention.dense")
        h = h + (norm(f, f"{layer}.third_layernorm") if config.norm == "sandwich" else f)
        z = norm(h, f"{layer}.post_attention_layernorm")
        f = F.gelu(project(z, f"{layer}.mlp.dense_h_to_4h"), approximate="tanh")
        f = project(f, f"{layer}.mlp.dense_4h_to_h")
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
    variant: Variant,
    learning_rate: float,
    seed: int,
    settings: Settings,
    device: torch.device,
) -> dict[str, Any]:
    """One run, until its last step or until no step succeeds any more.

    Returns:
        ``held_out_loss`` at the end, in nats per pixel. ``skipped``: steps whose gradients were not
        finite. ``curves``, a number for each window of steps: ``loss`` (mean), ``loss_scale``
        (the last), ``norm_input`` and ``score`` (largest magnitudes), ``infinite_variances`` (share of
        LayerNorm's rows), ``zero_gradients`` (share). None: not finite.
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
    dtype = torch.float16 if variant.dtype == "float16" else torch.float32
    optimizer = torch.optim.AdamW(
        master.values(), betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=settings.initial_loss_scale,
        growth_interval=settings.loss_scale_window,
        enabled=variant.dtype == "float16",
    )

    def copies() -> dict[str, Tensor]:
        return {name: weight.detach().to(dtype) for name, weight in master.items()}

    def loss_of(weights: dict[str, Tensor], tokens: Tensor, watch: Watch | None = None) -> Tensor:
        scores = logits(weights, tokens[:, :-1], config, variant, watch).float()
        return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())

    generator = torch.Generator().manual_seed(seed)
    steps: list[dict[str, float]] = []
    skipped: list[int] = []
    for step in range(settings.steps):
        batch = torch.randint(len(data), (settings.batch_size,), generator=generator)
        weights = {name: weight.requires_grad_() for name, weight in copies().items()}
        watch = Watch()
        loss = loss_of(weights, data[batch.to(device)], watch)
        gradients = torch.autograd.grad(scaler.scale(loss), list(weights.values()))
        for weight, gradient in zip(master.values(), gradients, strict=True):
            weight.grad = gradient.float()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, settings)
        steps.append(
            {
                "loss": loss.item(),
                "loss_scale": scaler.get_scale(),
                "norm_input": watch.largest("norm input"),
                "score": watch.largest("score"),
                "infinite_variances": _mean(watch.seen.get("infinite variances", [])),
                "zero_gradients": _zeros(gradients),
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
        weights = copies()
        parts = [loss_of(weights, part).item() * len(part) for part in held_out.split(100)]
    return {
        "variant": dataclasses.asdict(variant),
        "learning_rate": learning_rate,
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
    windows = [steps[start : start + window] for start in range(0, len(steps), window)]
    reduce: dict[str, Callable[[list[float]], float]] = {
        "norm_input": max,
        "score": max,
        "loss_scale": lambda scales: scales[-1],
    }
    return {
        kind: [
            _number(reduce.get(kind, statistics.fmean)([step[kind] for step in part]))
            for part in windows
        ]
        for kind in steps[0]
    }


def _mean(values: Sequence[Tensor]) -> float:
    return torch.stack([*values]).mean().item() if values else 0.0


def _zeros(tensors: Sequence[Tensor]) -> float:
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors)
    return zeros / sum(tensor.numel() for tensor in tensors)


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


# The runs, their table, their picture.


def run_once(
    variant: Variant, rate: float, seed: int, settings: Settings, device: str, folder: Path
) -> dict[str, Any]:
    """The run from its file in the folder, if the same commit, settings and device made it; else
    anew."""
    stem = re.sub(r"\W+", "-", f"{variant.name} {rate:g} {seed}").lower()
    path = folder / f"{stem}.json"
    key = {
        "commit": measure.commit_info(),
        "settings": dataclasses.asdict(settings),
        "device": measure.machine_info(torch.device(device))["device"],
        "torch": torch.__version__,
    }
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["key"] == key:
            return kept["run"]
    torch.set_num_threads(1)  # the tensors are small
    run = train(variant, rate, seed, settings, torch.device(device))
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({"key": key, "run": run}))
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
    started, commit = time.perf_counter(), measure.commit_info()
    runs, lines = [], baselines()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(run_once, variant, rate, seed, settings, device, folder)
            for at in dict.fromkeys(rate for rate, _ in PLAN if rate in rates)
            for seed in seeds
            for rate, variant in PLAN
            if rate == at
        ]
        for future in futures:
            runs.append(run := future.result())
            minutes = (time.perf_counter() - started) / 60
            name = Variant(**run["variant"]).name
            what = outcome(run, lines["position"]["held out"])
            print(
                f"{minutes:5.1f} min  learning rate {run['learning_rate']:g}, seed {run['seed']}, "
                f"{name}: {what}",
                flush=True,
            )
    return {
        "machine_info": measure.machine_info(torch.device(device)) | {"threads": 1},
        "commit_info": commit,
        "datetime": measure.now(),
        "settings": dataclasses.asdict(settings),
        "baselines": lines,
        "runs": runs,
    }


def save(record: dict[str, Any]) -> Path:
    """A line for each run."""
    machine, commit = record["machine_info"], record["commit_info"]
    path = RECORDS / measure.record_name("instability", machine, commit, record["datetime"])
    head = json.dumps({name: record[name] for name in record if name != "runs"}, indent=1)[:-2]
    runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in record["runs"])
    with atomic_write(path) as partial:
        partial.write_text(f'{head},\n "runs": [\n{runs}\n ]\n}}\n')
    return path


def outcome(run: dict[str, Any], position_line: float) -> str:
    """What was seen of a run, in words."""
    skipped = run["skipped"]
    last = run["steps"] - 1
    if streak := skipped_in_a_row(skipped, last):
        if streak > 9:
            scale = math.log2(run["curves"]["loss_scale"][-1])
            return f"the last {streak} steps were skipped, the loss scale fell to 2^{scale:.0f}"
    loss = run["held_out_loss"]
    if loss is None:
        return "the loss is not finite"
    return "below the position line" if loss < position_line else "above the position line"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rates = list(dict.fromkeys(rate for rate, _ in PLAN))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=rates, help="learning rates")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "instability")
    args = parser.parse_args()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    record = collect(args.seeds, args.rates, Settings(), device, args.jobs, args.out)
    path = save(record)
    print(f"\nrecord: {path}")


if __name__ == "__main__":
    main()
