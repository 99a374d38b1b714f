"""What Sandwich-LN and PB-relax are for: a deep float16 model is trained with Pre-LN, with
Sandwich-LN, and with Sandwich-LN and PB-relax, and watched at every operation.

    python -m benchmarks.experiments.instability --help

The toy experiment of the CogView paper (arXiv 2105.13290, section 2.4: deep, learning rate 0.1,
batches of 4), as deep as CogView and very narrow: the model of cogview/model.py learns handwritten
digits, a token a pixel. Weights, activations and gradients are float16, Adam's weights float32, the
loss scale is dynamic. In place of the fused operators stand separate operations, as CogView had
them; LayerNorm both of separate float16 operations, whose squares overflow at 256, and as one with
float32 statistics.

Without a GPU float16 is simulated: every operation of the model, forward and backward, takes
float16, computes in float32, and rounds its result to float16. The loss is float32, computed from
float16 logits.

A run that has ended stays in FOLDER and is not repeated at the same commit. The record is written
to benchmarks/results/, its table printed; `make report` puts both into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

import cogview.model
import cogview_kernels as ck
from benchmarks.suite import measure
from cogview.config import ModelConfig
from cogview.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results"
ALPHA = 32.0  # of PB-relax attention
HALF_MAX = 65504.0
VOCAB_SIZE = 17 + 10  # levels of a pixel, digits


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    norm: str
    relax: bool
    statistics: str  # dtype of LayerNorm's mean and variance
    dtype: str = "float16"

    @property
    def stem(self) -> str:
        words = f"{self.name} {self.statistics} statistics {self.dtype}"
        return re.sub(r"\W+", "-", words).lower()


VARIANTS = (
    *(
        Variant(name, norm, relax, statistics)
        for statistics in ("float16", "float32")
        for name, norm, relax in (
            ("Pre-LN", "pre", False),
            ("Sandwich-LN", "sandwich", False),
            ("Sandwich-LN + PB-relax", "sandwich", True),
        )
    ),
    # The method or the precision: which of them fails?
    Variant("Pre-LN, all in float32", "pre", False, "float32", "float32"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The same for all variants."""

    steps: int = 120
    num_layers: int = 48
    hidden_size: int = 64
    num_heads: int = 4
    batch_size: int = 4
    learning_rate: float = 0.1
    warmup_steps: int = 10
    weight_decay: float = 0.04
    clip_grad_norm: float = 1.0
    initial_loss_scale: float = 2.0**16
    loss_scale_window: int = 25  # steps without overflow after which the scale doubles
    give_up_after: int = 50  # skipped steps in a row, as in cogview/train.py
    peaks_every: int = 10  # steps between records of the largest value of every layer


# The separate operations.


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, relax: bool, statistics: str
) -> Tensor:
    if relax:
        peak = x.detach().abs().amax(-1, keepdim=True)
        x = x / (torch.where(peak == 0, 8.0, peak) / 8)
    if statistics == "float32":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight + bias


def causal_attention(q: Tensor, k: Tensor, v: Tensor, relax: bool) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v``; relaxed, ``softmax((q / (a sqrt(D)) k^T - max) a) v``."""
    alpha = ALPHA if relax else 1.0
    scores = q / (alpha * math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    if relax:
        peak = scores.detach().masked_fill(later, -math.inf).amax(-1, keepdim=True)
        # Those of later keys may be above the peak; far below it the weight is zero anyway.
        scores = (scores - peak).clamp(-HALF_MAX / alpha, 0) * alpha
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


@contextlib.contextmanager
def separate_operations(variant: Variant) -> Iterator[None]:
    """The model computes with the functions above instead of the fused operators."""

    def norm(self: ck.PBRelaxLayerNorm, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, variant.relax, variant.statistics)

    def add_and_norm(
        f: Tensor, h: Tensor, post: Callable[..., Tensor] | None, pre: Any, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        h = h + (f if post is None else post(f))
        return h, pre(h)

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return causal_attention(q, k, v, variant.relax)

    with (
        mock.patch.object(ck.PBRelaxLayerNorm, "forward", norm),
        mock.patch.object(cogview.model, "_add_and_norm", add_and_norm),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    ):
        yield


# Float16, and what it does.

aten = torch.ops.aten
MOVES = (aten.clone.default, aten._unsafe_view.default)  # change no number
MASKS = (aten.masked_fill.Scalar,)  # write minus infinity on purpose

Place = tuple[str, str, str]  # forward or backward, module, operation


class EveryOperation(TorchDispatchMode):
    """Sees each operation below autograd, forward and backward: keeps the largest magnitude of its
    results and, where float16 is simulated, rounds them.

    Tensors are float16 either way, so nothing can stay unrounded. Simulation is for CPUs, whose own
    float16 operations round inside some reductions and are slow at matrix products.
    """

    def __init__(self, simulate: bool) -> None:
        super().__init__()
        self.simulate = simulate
        self.tracker = ModuleTracker()
        self.places: list[Place] = []
        self.extremes: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> EveryOperation:
        self.tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.tracker.__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func in MOVES:
            return func(*args, **kwargs)
        # A conversion or an addition in place rounds its result by itself.
        native = not self.simulate or "dtype" in kwargs or func._schema.is_mutable
        out = func(*args, **kwargs) if native else _rounded(func, args, kwargs)
        if func in MASKS:
            return out
        phase = "backward" if self.tracker.is_bw else "forward"
        place = phase, max(self.tracker.parents, key=len), func.overloadpacket.__name__
        for result in out if isinstance(out, tuple) else (out,):
            if isinstance(result, Tensor) and result.is_floating_point():
                self.places.append(place)
                smallest, largest = result.aminmax()
                self.extremes.append((smallest.float(), largest.float()))
        return out

    def take(self) -> tuple[list[Place], Tensor]:
        """The places since the last call, and the largest magnitude at each: inf where any number
        is none."""
        smallest, largest = (torch.stack(part) for part in zip(*self.extremes, strict=True))
        peaks = torch.maximum(-smallest, largest).nan_to_num(math.inf, math.inf).cpu()
        places = self.places
        self.places, self.extremes = [], []
        return places, peaks


def _rounded(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operation in float32; float16 what would have been float16."""
    wide = [_widened(argument) for argument in args]
    out = func(*wide, **kwargs)
    if all(new is old for new, old in zip(wide, args, strict=True)):
        return out
    if func is aten.native_layer_norm.default:
        return _halved(out[0]), *out[1:]  # the statistics are float32 on a GPU, too
    return tuple(map(_halved, out)) if isinstance(out, tuple) else _halved(out)


def _widened(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.dtype == torch.float16:
        return argument.float()
    if argument is torch.float16:  # the softmax's backward is told its input's
        return torch.float32
    if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
        return [_widened(tensor) for tensor in argument]
    return argument


def _halved(out: Any) -> Any:
    return out.half() if isinstance(out, Tensor) and out.dtype == torch.float32 else out


# Training.

# What is recorded by layer: part of the layer, its operation.
HIDDEN = {
    "residual": ("", "add"),
    "attention branch": ("attention.dense", "addmm"),
    "mlp branch": ("mlp.dense_4h_to_h", "addmm"),
}


def digits() -> Tensor:
    """Handwritten digits as tokens, int64 (1797, 65): which digit, then 8x8 pixels of 17 levels."""
    images, labels = load_digits(return_X_y=True)
    return torch.cat([17 + torch.tensor(labels)[:, None], torch.tensor(images).long()], dim=1)


def loss_by_frequency(data: Tensor) -> float:
    """What a model reaches that has learned nothing but how frequent each token is; nats."""
    shares = data[:, 1:].flatten().bincount() / data[:, 1:].numel()
    return -(shares * shares.clamp_min(1e-9).log()).sum().item()


def train(variant: Variant, seed: int, settings: Settings, device: torch.device) -> dict[str, Any]:
    """One run, until its last step or until no step succeeds any more; what happened in each.

    Returns:
        By step: ``loss`` in nats per token (None: not finite), ``loss_scale``, ``zero_gradients``
        (share of the weights). ``skipped``: steps whose gradients were not finite.
        ``first_overflow``: step, module and operation whose result was the first not to be finite,
        in a forward and in a backward; ``forward_overflows``: steps with one in the forward.
        ``hidden``: at ``peak_steps`` the largest magnitude in each layer (None: not finite), by
        kind as in HIDDEN; ``largest``: over all steps.
    """
    started = time.perf_counter()
    data = digits()
    config = ModelConfig(
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_heads=settings.num_heads,
        max_positions=data.shape[1] - 1,
        dropout=0.0,
        norm=variant.norm,  # type: ignore[arg-type]
        attention="dense",
        embedding_gradient_scale=1.0,
    )
    torch.manual_seed(seed)
    master = cogview.model.GPT(config, VOCAB_SIZE).to(device)
    model = copy.deepcopy(master).to(getattr(torch, variant.dtype))
    optimizer = torch.optim.AdamW(
        master.parameters(),
        settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    half = variant.dtype == "float16"
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=settings.initial_loss_scale,
        growth_interval=settings.loss_scale_window,
        enabled=half,
    )
    watch = EveryOperation(simulate=half and device.type == "cpu")
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(config.max_positions, device=device).expand(settings.batch_size, -1)
    run: dict[str, Any] = {
        "variant": dataclasses.asdict(variant),
        "seed": seed,
        "loss": [],
        "loss_scale": [],
        "zero_gradients": [],
        "skipped": [],
        "first_overflow": {"forward": None, "backward": None},
        "forward_overflows": 0,
        "peak_steps": [],
        "hidden": {kind: [] for kind in HIDDEN},
    }
    largest = {kind: torch.zeros(config.num_layers) for kind in HIDDEN}
    skipped_in_a_row = 0
    for step in range(settings.steps):
        tokens = data[torch.randint(len(data), (settings.batch_size,), generator=generator)]
        tokens = tokens.to(device)
        run["loss_scale"].append(scaler.get_scale())
        with separate_operations(variant), watch:
            z = model(tokens[:, :-1], positions, [None] * config.num_layers)
            logits = model.logits(z).float()
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            scaler.scale(loss).backward()
        zeros = _take_gradients(master, model)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(master.parameters(), settings.clip_grad_norm)
        if norm.isfinite():  # as the scaler decides; in float32 there is none
            scaler.step(optimizer)
        scaler.update()
        model.load_state_dict(master.state_dict())

        run["loss"].append(_number(loss.item()))
        run["zero_gradients"].append(_number(zeros))
        places, peaks = watch.take()
        _note_overflows(run, step, places, peaks)
        hidden = largest_by_layer(places, peaks, config.num_layers)
        for kind, values in hidden.items():
            largest[kind] = largest[kind].maximum(values)
            if step % settings.peaks_every == 0:
                run["hidden"][kind].append(_numbers(values))
        if step % settings.peaks_every == 0:
            run["peak_steps"].append(step)
        skipped_in_a_row = 0 if norm.isfinite() else skipped_in_a_row + 1
        if skipped_in_a_row:
            run["skipped"].append(step)
        if skipped_in_a_row == settings.give_up_after:
            break
    run["largest"] = {kind: _numbers(values) for kind, values in largest.items()}
    return run | {"seconds": time.perf_counter() - started}


def _take_gradients(master: torch.nn.Module, model: torch.nn.Module) -> float:
    """Moves the model's gradients to the float32 weights; the share of them that is zero."""
    zeros = total = 0
    for weight, copied in zip(master.parameters(), model.parameters(), strict=True):
        assert copied.grad is not None
        weight.grad, copied.grad = copied.grad.float(), None
        zeros += int((weight.grad == 0).sum())
        total += weight.numel()
    return zeros / total


def _note_overflows(run: dict[str, Any], step: int, places: list[Place], peaks: Tensor) -> None:
    overflows: dict[str, Place] = {}
    for index in peaks.isinf().nonzero().flatten().tolist():
        overflows.setdefault(places[index][0], places[index])
    run["forward_overflows"] += "forward" in overflows
    for phase, (_, module, operation) in overflows.items():
        if run["first_overflow"][phase] is None:
            run["first_overflow"][phase] = {
                "step": step,
                "module": re.sub(r"^GPT\.?(transformer\.)?", "", module),
                "operation": operation,
            }


def largest_by_layer(places: list[Place], peaks: Tensor, num_layers: int) -> dict[str, Tensor]:
    """By kind as in HIDDEN, the largest magnitude in each layer's forward."""
    found = {kind: torch.zeros(num_layers) for kind in HIDDEN}
    kinds = {part_and_operation: kind for kind, part_and_operation in HIDDEN.items()}
    for (phase, module, operation), peak in zip(places, peaks, strict=True):
        match = re.search(r"\.layers\.(\d+)\.?(.*)", module)
        if phase == "forward" and match and (match[2], operation) in kinds:
            values = found[kinds[match[2], operation]]
            values[int(match[1])] = torch.maximum(values[int(match[1])], peak)
    return found


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _numbers(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


# The runs, their table, their picture.


def run_once(
    variant: Variant, seed: int, settings: Settings, device: str, folder: Path
) -> dict[str, Any]:
    """The run from its file in the folder, if the same commit, settings and device made it; else
    anew."""
    path = folder / f"{variant.stem}-{seed}.json"
    key = {
        "commit": measure.commit_info(),
        "settings": dataclasses.asdict(settings),
        "device": measure.machine_info(torch.device(device))["device"],
        "torch": torch.__version__,
    }
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return kept["run"]
    torch.set_num_threads(1)  # the tensors are small
    run = train(variant, seed, settings, torch.device(device))
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({"key": key, "run": run}))
    return run


def collect(
    seeds: Sequence[int], settings: Settings, device: str, jobs: int, folder: Path
) -> dict[str, Any]:
    """All variants with each seed, as a record."""
    started, commit = time.perf_counter(), measure.commit_info()
    runs = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(run_once, variant, seed, settings, device, folder)
            for seed in seeds
            for variant in VARIANTS
        ]
        for future in futures:
            runs.append(future.result())
            name = describe(runs[-1]["variant"])
            minutes = (time.perf_counter() - started) / 60
            what = outcome(runs[-1], loss_by_frequency(digits()))
            print(f"{minutes:5.1f} min  seed {runs[-1]['seed']}  {name}: {what}", flush=True)
    return {
        "machine_info": measure.machine_info(torch.device(device)) | {"threads": 1},
        "commit_info": commit,
        "datetime": measure.now(),
        "simulated_float16": device == "cpu",
        "settings": dataclasses.asdict(settings),
        "loss_by_frequency": _number(loss_by_frequency(digits())),
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


def describe(variant: dict[str, Any]) -> str:
    if variant["dtype"] == "float32":
        return variant["name"]
    return f"{variant['name']}, {variant['statistics']} statistics"


def zero_gradients(run: dict[str, Any]) -> float:
    """Their share, the median of the second half of the steps that were not skipped."""
    shares = [z for step, z in enumerate(run["zero_gradients"]) if step not in run["skipped"]]
    return statistics.median(shares[len(shares) // 2 :]) if shares else math.nan


def outcome(run: dict[str, Any], loss_by_frequency: float) -> str:
    """What became of a run, in words. Steps count from 0."""
    last, skipped = len(run["loss"]) - 1, set(run["skipped"])
    late = range(len(run["loss"]) // 2, last + 1)
    streak = next((n for n in range(last + 1) if last - n not in skipped), last + 1)
    if streak >= 10:
        return f"diverges: no step succeeds from {last + 1 - streak} on"
    if sum(step in skipped for step in late) > len(late) / 2 or math.isnan(final_loss(run)):
        return "diverges: most steps do not succeed"
    learns = final_loss(run) < (1 - LEARNS) * loss_by_frequency
    if zero_gradients(run) > STARVED:
        return "hardly a gradient is left" + (", yet the loss falls" if learns else "")
    return "trains" if learns else "learns nothing but the tokens' frequencies"


STARVED = 0.9  # share of gradients that are zero
LEARNS = 0.02  # a loss below the frequencies' by this share


def final_loss(run: dict[str, Any]) -> float:
    """The mean of the last ten steps; NaN where one is not finite."""
    return statistics.fmean(math.nan if loss is None else loss for loss in run["loss"][-10:])


def table(record: dict[str, Any]) -> str:
    """A row for each variant; where seeds differ, smallest to largest."""
    settings = record["settings"]
    lines = [
        "| LayerNorm's statistics | variant | outcome | final loss | largest hidden value, first "
        "layer | last layer | smallest loss scale | skipped steps | gradients that are zero "
        "| first result in a forward that is not finite |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        by_variant.setdefault(describe(run["variant"]), []).append(run)
    for runs in by_variant.values():
        variant = runs[0]["variant"]
        half = variant["dtype"] == "float16"
        residuals = [run["largest"]["residual"] for run in runs]
        cells = [
            variant["statistics"],
            variant["name"],
            "; ".join(dict.fromkeys(outcome(run, record["loss_by_frequency"]) for run in runs)),
            _span([final_loss(run) for run in runs], "{:.2f}"),
            _span([_or_inf(residual[0]) for residual in residuals], "{:,.0f}"),
            _span([_or_inf(residual[-1]) for residual in residuals], "{:,.0f}"),
            _span([math.log2(min(run["loss_scale"])) for run in runs], "2^{:.0f}") if half else "",
            _span([len(run["skipped"]) for run in runs], "{:.0f}"),
            _span([zero_gradients(run) for run in runs], "{:.1%}"),
            "; ".join(dict.fromkeys(map(_first_overflow, runs))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machine, seeds = record["machine_info"], sorted({run["seed"] for run in record["runs"]})
    how = "simulated on" if record["simulated_float16"] else "of"
    lines += [
        "",
        f"{settings['num_layers']} layers, hidden size {settings['hidden_size']}, "
        f"{settings['steps']} steps of {settings['batch_size']} sequences of 64 pixels; AdamW at "
        f"{settings['learning_rate']:g} after {settings['warmup_steps']} steps of warm-up, weight "
        f"decay {settings['weight_decay']:g}, gradients clipped at {settings['clip_grad_norm']:g}, "
        f"a loss scale that begins at 2^{math.log2(settings['initial_loss_scale']):.0f} and "
        f"doubles after {settings['loss_scale_window']} good steps; {len(seeds)} seeds; float16 "
        f"{how} {machine['device']}, "
        f"torch {machine['torch']}, commit {record['commit_info']['id'][:9]}, "
        f"{record['datetime'][:10]}. Loss in nats per token, the mean of the last ten steps (NaN: "
        f"one was not finite); the tokens' frequencies alone give "
        f"{record['loss_by_frequency']:.2f}. Zero gradients: the median of the second half of the "
        f"steps that were not skipped. Steps and layers count from 0.",
    ]
    return "\n".join(lines)


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _span(values: Sequence[float], form: str) -> str:
    """Smallest to largest."""
    texts = dict.fromkeys(
        "overflow" if math.isinf(value) else "NaN" if math.isnan(value) else form.format(value)
        for value in sorted(values, key=lambda value: (math.isnan(value), value))
    )
    return " to ".join([*texts][:1] + [*texts][1:][-1:])


def _first_overflow(run: dict[str, Any]) -> str:
    first = run["first_overflow"]["forward"]
    if first is None:
        return "none"
    return f"step {first['step']}: `{first['operation']}` in `{first['module']}`"


COLOURS = {
    "Pre-LN": "#D55E00",
    "Sandwich-LN": "#E69F00",
    "Sandwich-LN + PB-relax": "#0072B2",
    "Pre-LN, all in float32": "#8A8A8A",
}


def draw(record: dict[str, Any], path: Path) -> None:
    """Hidden values by layer, loss scale, loss and vanished gradients by step; a row of panels for
    each dtype of LayerNorm's statistics."""
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = ("float16", "float32")
    for axes, dtype in zip(figure.subplots(2, 4), rows, strict=True):
        runs = [run for run in record["runs"] if run["variant"]["statistics"] == dtype]
        _draw_hidden(axes[0], runs, 256 if dtype == "float16" else None)
        for axis, name, label in (
            (axes[1], "loss_scale", "loss scale"),
            (axes[2], "loss", "loss (nats per token)"),
            (axes[3], "zero_gradients", "share of gradients that are zero"),
        ):
            _draw_steps(axis, runs, name)
            axis.set_ylabel(label)
        axes[1].set_yscale("log", base=2)
        axes[2].axhline(record["loss_by_frequency"], color="black", linestyle=":", linewidth=1)
        axes[2].text(
            1, record["loss_by_frequency"], " tokens' frequencies alone", fontsize=8, va="bottom"
        )
        axes[2].set_yscale("log")
        axes[2].yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axes[2].yaxis.set_minor_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axes[3].set_ylim(-0.03, 1.03)
        axes[0].set_title(f"LayerNorm with {dtype} statistics", loc="left", fontsize=11)
    lines = {
        str(line.get_label()): line
        for axes in (figure.axes[2], figure.axes[6])
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }
    figure.legend(
        list(lines.values()), list(lines), loc="outside upper center", ncols=4, frameon=False
    )
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


HOW_TO_READ = (
    "Lines are runs, all seeds; on the left the first seed's, at the steps that stand beside them. "
    "A cross: the step before the first forward with a result that is not finite. The loss is the "
    "mean of five steps."
)


def _draw_hidden(axis: Axes, runs: list[dict[str, Any]], limit: float | None) -> None:
    """The first seed's, at three steps: the later, the darker. A run that gave up ends earlier."""
    seed = runs[0]["seed"]
    for run in runs:
        if run["seed"] != seed:
            continue
        steps = run["peak_steps"]
        for index, alpha in ((0, 0.3), (len(steps) // 3, 0.6), (len(steps) - 1, 1.0)):
            values = [_or_inf(value) for value in run["hidden"]["residual"][index]]
            colour = COLOURS[run["variant"]["name"]]
            axis.plot(values, color=colour, alpha=alpha)
            finite = [layer for layer, value in enumerate(values) if math.isfinite(value)]
            if finite:
                axis.annotate(
                    f"step {steps[index]}",
                    (finite[-1], values[finite[-1]]),
                    (3, 0),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                    va="center",
                )
    for value, text in ((HALF_MAX, "float16 ends: 65504"), (limit, "its square overflows: 256")):
        if value:
            axis.axhline(value, color="black", linestyle=":", linewidth=1)
            axis.text(0, value, text, fontsize=8, va="bottom")
    axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.set_ylabel("largest magnitude of the residual stream")
    axis.margins(x=0.12)


def _draw_steps(axis: Axes, runs: list[dict[str, Any]], name: str) -> None:
    """All seeds, the loss as the mean of five steps; a cross where a forward first overflowed."""
    for run in runs:
        if name == "loss_scale" and run["variant"]["dtype"] == "float32":
            continue
        values = [math.nan if value is None else value for value in run[name]]
        variant = run["variant"]["name"]
        if name == "loss":
            values = [statistics.fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
        first = run["seed"] == runs[0]["seed"]
        axis.plot(values, color=COLOURS[variant], linewidth=1.2, label=variant if first else None)
        overflow = run["first_overflow"]["forward"]
        if overflow:
            step = max(0, overflow["step"] - 1)
            axis.plot(step, values[step], "x", color=COLOURS[variant], markersize=8)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "instability")
    args = parser.parse_args()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    record = collect(args.seeds, Settings(steps=args.steps), device, args.jobs, args.out)
    path = save(record)
    print(f"\n{table(record)}\n\nrecord: {path}")


if __name__ == "__main__":
    main()
