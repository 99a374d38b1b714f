"""Training of the GPT on token sequences.

AdamW, linear warm-up and cosine decay, gradient clipping, held-out loss, a metrics log,
checkpoints.

Data order, pivots and dropout are functions of (seed, step). A checkpoint therefore needs no
generator states, and a resumed run gives the same bits as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cogview.checkpoint import (
    check_settings,
    checkpoint_path,
    load_latest,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from cogview.config import Config, ModelConfig, RunFolder
from cogview.data.order import batch_indices
from cogview.data.tokens import TokenDataset
from cogview.files import atomic_write
from cogview.model import GPT
from cogview.sequence import Batch, TokenSequence, captioning, collate, loss_weights, text_to_image

# Settings that must not change: the weights of a model depend on the first list, the tokens and the
# data split of a run on the second.
MODEL_SETTINGS = [
    f"model.{field.name}"
    for field in dataclasses.fields(ModelConfig)
    if field.name not in ("dropout", "activation_checkpointing")
]
RUN_SETTINGS = [
    "seed",
    "text_tokenizer.vocab_size",
    "image_tokenizer.image_size",
    "image_tokenizer.channels",
    "image_tokenizer.num_downsamples",
    "image_tokenizer.codebook_size",
    "training.task",
    "training.held_out_fraction",
]

# Under float16, a step is skipped if a gradient is not finite. After more such steps in a row,
# training stops.
MAX_SKIPPED_STEPS = 50


def choose_device(name: str) -> torch.device:
    """The device `cpu`, `cuda:1`, ...; `auto` is CUDA if there is a GPU, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the type depends on the build of torch
        raise ValueError(
            f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    return device


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to `learning_rate`, then a cosine down to `final_learning_rate`."""
    training = config.training
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return (
        training.final_learning_rate
        + (training.learning_rate - training.final_learning_rate) * cosine
    )


def make_batch(config: Config, data: TokenDataset, indices: Sequence[int] | np.ndarray) -> Batch:
    """The training sequences of these pairs, padded to one length; on the CPU."""
    sequences = [build_sequence(config, *data[int(index)]) for index in indices]
    return collate(config.vocabulary, sequences)


def build_sequence(config: Config, text: np.ndarray, codes: np.ndarray) -> TokenSequence:
    """The training sequence of one pair; a caption that does not fit is truncated."""
    text = text[: config.max_text_len]
    if config.training.task == "captioning":
        return captioning(config.vocabulary, codes, text)
    return text_to_image(config.vocabulary, text, codes)


def split_data(data: TokenDataset, config: Config) -> tuple[TokenDataset, TokenDataset]:
    """Training and held-out data: a random split that depends only on the seed.

    Raises:
        ValueError: fewer than two pairs.
    """
    if len(data) < 2:
        raise ValueError(
            f"data: expected at least 2 pairs, one of them to hold out, got {len(data)}"
        )
    order = np.random.default_rng(config.seed).permutation(len(data))
    num_held_out = min(len(data) - 1, max(1, round(config.training.held_out_fraction * len(data))))

    def part(indices: np.ndarray) -> TokenDataset:
        texts = [data[int(index)][0] for index in indices]
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
        codes = data.codes[indices]
        return TokenDataset(
            np.concatenate(texts), offsets, codes, data.text_vocab_size, data.codebook_size
        )

    return part(np.sort(order[num_held_out:])), part(np.sort(order[:num_held_out]))


class Trainer:
    """One training run; resumes from the newest checkpoint in its folder.

    Args:
        config: all settings.
        run_folder: folder for `metrics.jsonl` and `checkpoints/`; created if necessary.
        train_data: token pairs for training.
        held_out_data: token pairs for the held-out loss.
        progress: show a progress bar if standard error is a terminal.
        make_model: called with the model's settings and the padded size of the vocabulary; the
            initial weights that it draws follow the seed.
        on_batch: called with every batch before the model is trained on it.

    Attributes:
        model: the GPT, on the device.
        step: number of finished optimizer steps.

    Raises:
        ValueError: the data does not fit the configuration, a checkpoint has other settings, or
            there are checkpoints but none can be read.
    """

    def __init__(
        self,
        config: Config,
        run_folder: str | os.PathLike[str],
        train_data: TokenDataset,
        held_out_data: TokenDataset,
        progress: bool = True,
        make_model: Callable[[ModelConfig, int], GPT] = GPT,
        on_batch: Callable[[Batch], object] | None = None,
    ) -> None:
        for name, data in (("training data", train_data), ("held-out data", held_out_data)):
            _check_data(name, data, config)
        self.config = config
        self.train_data = train_data
        self.held_out_data = held_out_data
        self.progress = progress
        self.on_batch = on_batch
        self.metrics_path = RunFolder(run_folder).metrics
        self.checkpoints = RunFolder(run_folder).checkpoints
        self.device = choose_device(config.device)
        self.dtype = _compute_dtype(config, self.device)
        with torch.random.fork_rng(_cuda_devices(self.device)):
            torch.manual_seed(config.seed)
            self.model = make_model(config.model, config.vocabulary.padded_size).to(self.device)
        self.optimizer = _optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step = 0
        self.skipped_steps = 0  # number of steps in a row without an update
        self._resume()

    def run(self) -> GPT:
        """Trains up to `config.training.steps`.

        Returns:
            the model, in evaluation mode.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; the message names the step.
                Under float16 such a step is skipped, and more than `MAX_SKIPPED_STEPS` in a row are
                an error.
            OSError: a checkpoint or the metrics cannot be written; earlier checkpoints are intact.
        """
        training = self.config.training
        self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
        saved = self.step
        bar = tqdm(
            initial=self.step,
            total=training.steps,
            desc="gpt",
            unit="step",
            disable=None if self.progress else True,
        )
        devices = _cuda_devices(self.device)
        with bar, torch.random.fork_rng(devices):
            while self.step < training.steps:
                metrics = self._train_step()
                last = self.step == training.steps
                if last or self.step % training.eval_every == 0:
                    metrics |= {
                        f"held_out_{name}": value for name, value in self.evaluate().items()
                    }
                self._log(metrics)
                if last or self.step % training.save_every == 0:
                    self._save()
                    saved = self.step
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", saved=saved, refresh=False)
                bar.update()
        return self.model.eval()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out `loss`, `text_loss` and `image_loss`, in nats per token.

        Every call uses the same examples and pivots.
        """
        training = self.config.training
        count = min(training.eval_examples, len(self.held_out_data))
        size = training.micro_batch_size or training.batch_size
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        self.model.eval()
        totals = _Totals()
        for start in range(0, count, size):
            batch = self._batch(self.held_out_data, np.arange(start, min(start + size, count)))
            totals.add(*self._losses(batch, generator))
        self.model.train()
        return totals.means()

    def _train_step(self) -> dict[str, float]:
        config, training = self.config, self.config.training
        started = time.perf_counter()
        seed = _step_seed(config.seed, self.step)
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator(self.device).manual_seed(seed)  # pivots
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.model.train()
        indices = batch_indices(config.seed, self.step, training.batch_size, len(self.train_data))
        size = training.micro_batch_size or training.batch_size
        parts = [
            self._batch(self.train_data, indices[at : at + size])
            for at in range(0, len(indices), size)
        ]
        total_weight = torch.stack([self._weights(part).sum() for part in parts]).sum()
        totals = _Totals()
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            if self.on_batch is not None:
                self.on_batch(part)
            losses, weights, targets = self._losses(part, generator)
            self.scaler.scale((losses * weights).sum() / total_weight).backward()
            totals.add(losses.detach(), weights, targets)
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), training.clip_grad_norm
        ).item()
        means = totals.means()
        self._check_finite(means["loss"], grad_norm)
        self.scaler.step(self.optimizer)  # skips the update if a gradient is not finite
        self.scaler.update()
        self.step += 1
        metrics = {"step": self.step, **means, "learning_rate": rate, "grad_norm": grad_norm}
        if self.scaler.is_enabled():
            metrics |= {"loss_scale": self.scaler.get_scale(), "skipped_steps": self.skipped_steps}
        return metrics | {"seconds": time.perf_counter() - started}

    def _check_finite(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_steps = 0
            return
        self.skipped_steps += 1
        if self.scaler.is_enabled() and self.skipped_steps <= MAX_SKIPPED_STEPS:
            return
        reason = f"loss {loss} and gradient norm {grad_norm} at step {self.step + 1}"
        if self.scaler.is_enabled():
            reason += f", the {self.skipped_steps}th step in a row that is not finite"
        raise FloatingPointError(
            f"training stopped: {reason}; the checkpoints in {self.checkpoints} are older. Try a "
            "lower learning rate, a longer warm-up, model.norm=sandwich with model.relax=row, or "
            "training.precision=bfloat16"
        )

    def _batch(self, data: TokenDataset, indices: np.ndarray) -> Batch:
        return make_batch(self.config, data, indices).to(self.device)

    def _weights(self, batch: Batch) -> torch.Tensor:
        """Loss weight of every target: (B, S - 1)."""
        training = self.config.training
        return loss_weights(
            self.config.vocabulary, batch.tokens[:, 1:], training.text_weight, training.image_weight
        )

    def _losses(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Cross entropy and weight of every target, and masks of text and image: (B, S - 1)."""
        vocab = self.config.vocabulary
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        layouts = self.model.sample_layouts(batch.text_len, inputs.shape[1], generator)
        with self._autocast():
            z = self.model(inputs, batch.positions[:, :-1], layouts)
            logits = self.model.logits(z)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        ).view(targets.shape)
        image = targets < vocab.codebook_size
        text = ~image & (targets < vocab.first_command)
        return losses, self._weights(batch), {"text": text, "image": image}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.dtype != torch.float32
        return torch.autocast(
            self.device.type, dtype=self.dtype if enabled else None, enabled=enabled
        )

    def _log(self, metrics: dict[str, float]) -> None:
        try:
            with open(self.metrics_path, "a", encoding="utf-8") as log:
                log.write(json.dumps(metrics) + "\n")
        except OSError as error:  # a write to a full disk raises an error without a file name
            raise OSError(error.errno, error.strerror, str(self.metrics_path)) from error

    def _save(self) -> None:
        state = {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
        }
        save_checkpoint(checkpoint_path(self.checkpoints, self.step), state)
        prune_checkpoints(self.checkpoints, self.config.training.keep_checkpoints)

    def _resume(self) -> None:
        state = load_latest(self.checkpoints, set_aside=True)
        if state is None:
            # Left by a run that ended before its first checkpoint.
            self.metrics_path.unlink(missing_ok=True)
            return
        source = f"{self.checkpoints}, step {state['step']},"
        settings = dataclasses.asdict(self.config)
        check_settings(state["config"], settings, MODEL_SETTINGS + RUN_SETTINGS, source)
        load_weights(self.model, state["model"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            if not state["scaler"]:
                raise ValueError(
                    f"{self.checkpoints}: expected checkpoints of a float16 run, got another "
                    "precision; do not change training.precision"
                )
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.skipped_steps = state["skipped_steps"]
        # The log may be ahead of the checkpoint, and its last line may be incomplete.
        kept = [row for row in read_metrics(self.metrics_path) if row["step"] <= self.step]
        with atomic_write(self.metrics_path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a metrics log before the first damaged line; empty if there is no file."""
    rows: list[dict[str, float]] = []
    if not Path(path).is_file():
        return rows
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class _Totals:
    """Sums of losses and weights over several batches."""

    def __init__(self) -> None:
        self.sums: dict[str, list[torch.Tensor]] = {"loss": [], "text_loss": [], "image_loss": []}

    def add(
        self, losses: torch.Tensor, weights: torch.Tensor, targets: dict[str, torch.Tensor]
    ) -> None:
        pairs = {"loss": weights, "text_loss": targets["text"], "image_loss": targets["image"]}
        for name, weight in pairs.items():
            # torch.where instead of a product: a NaN at a position of weight 0 must not count.
            counted = torch.where(weight > 0, losses * weight, 0.0).sum()
            self.sums[name].append(torch.stack([counted, weight.sum().float()]))

    def means(self) -> dict[str, float]:
        means = {}
        for name, sums in self.sums.items():
            total, weight = torch.stack(sums).double().sum(0).tolist()
            if weight:
                means[name] = total / weight
        return means


def _optimizer(model: GPT, config: Config) -> torch.optim.AdamW:
    """AdamW with weight decay only on the matrices of the layers."""
    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embeddings" not in name
        (decayed if is_matrix else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.training.learning_rate, betas=(0.9, 0.95))


def _check_data(name: str, data: TokenDataset, config: Config) -> None:
    if not len(data):
        raise ValueError(f"{name}: expected at least one pair of caption and image, got none")
    for unit, actual, expected in (
        ("pieces of text", data.text_vocab_size, config.text_tokenizer.vocab_size),
        ("image codes", data.codebook_size, config.image_tokenizer.codebook_size),
        ("codes per image", int(np.prod(data.codes.shape[1:])), config.num_codes),
    ):
        if actual != expected:
            raise ValueError(
                f"{name}: expected {expected} {unit} as in the configuration, got {actual}; encode "
                "the data again"
            )


def _compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    precision = config.training.precision
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
        precision
    ]


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
