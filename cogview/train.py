"""Training of the GPT on token sequences: AdamW, and the loss of text and image tokens.

Data order, pivots and dropout are functions of (seed, step, examples read so far).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cogview.config import Config, ModelConfig
from cogview.data.order import read_order
from cogview.data.tokens import TokenDataset
from cogview.image_tokenizer import ImageTokenizer
from cogview.loop import Loop, step_seed
from cogview.model import GPT
from cogview.sample import draw_images
from cogview.sequence import Batch, TokenSequence, captioning, collate, loss_weights, text_to_image

NUM_DRAWN = 8  # captions, for the pictures while training

# Settings that must not change: the weights of a model depend on the first list, the tokens and the
# data split of a run on the second.
MODEL_SETTINGS = tuple(
    f"model.{field.name}"
    for field in dataclasses.fields(ModelConfig)
    if field.name not in ("dropout", "activation_checkpointing")
)
RUN_SETTINGS = (
    "seed",
    "data.held_out_fraction",
    "text_tokenizer.vocab_size",
    "image_tokenizer.image_size",
    "image_tokenizer.channels",
    "image_tokenizer.num_downsamples",
    "image_tokenizer.codebook_size",
    "training.task",
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


class Trainer(Loop):
    """One training run of the GPT; resumes from the newest checkpoint in its folder.

    Args:
        config: all settings.
        folder: folder of the run (`cogview.loop` lists what is written); created if necessary.
        train_data: token pairs for training.
        held_out_data: token pairs for the held-out loss.
        made_from: fingerprints of tokens and tokenizers, by name.
        progress: show a progress bar if standard error is a terminal.
        make_model: called with the model's settings and the padded size of the vocabulary; the
            initial weights that it draws follow the seed.
        on_batch: called with every batch before the model is trained on it.
        image_tokenizer: for pictures of what the model draws; without it there are none.

    Raises:
        ValueError: the data does not fit the configuration, a checkpoint has other settings, or
            there are checkpoints but none can be read.
    """

    name = "gpt"
    unit = "tokens"
    sections = ("training", "model")
    fixed_settings = (*MODEL_SETTINGS, *RUN_SETTINGS)
    model: GPT

    def __init__(
        self,
        config: Config,
        folder: str | os.PathLike[str],
        train_data: TokenDataset,
        held_out_data: TokenDataset,
        made_from: Mapping[str, str] | None = None,
        progress: bool = True,
        make_model: Callable[[ModelConfig, int], GPT] = GPT,
        on_batch: Callable[[Batch], object] | None = None,
        image_tokenizer: ImageTokenizer | None = None,
    ) -> None:
        for name, data in (("training data", train_data), ("held-out data", held_out_data)):
            _check_data(name, data, config)
        super().__init__(config, config.training, folder, made_from, progress)
        self.train_data = train_data
        self.held_out_data = held_out_data
        self.image_tokenizer = image_tokenizer
        self.on_batch = on_batch
        self.dtype = _compute_dtype(config, self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            self.model = make_model(config.model, config.vocabulary.padded_size).to(self.device)
        self.optimizer = _optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._resume()

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

    def pictures(self) -> torch.Tensor | None:
        """Held-out images as the image tokenizer keeps them, and below them what the model draws
        for their captions: the same captions every time."""
        config, data = self.config, self.held_out_data
        if self.image_tokenizer is None or config.training.task != "text_to_image":
            return None
        pairs = [data[i] for i in range(min(NUM_DRAWN, len(data)))]
        texts = [text[: config.max_text_len].tolist() for text, _ in pairs]
        self.model.eval()
        drawn = draw_images(self.model, config, texts, config.seed, progress=False)
        self.model.train()
        real = torch.from_numpy(np.stack([codes for _, codes in pairs]).astype(np.int64))
        return self.image_tokenizer.decode(torch.cat([real, drawn])).cpu()

    def _train_step(self) -> dict[str, float]:
        config, training = self.config, self.config.training
        generator = torch.Generator(self.device)  # pivots
        generator.manual_seed(step_seed(config.seed, self.step))
        indices = read_order(config.seed, self.examples, training.batch_size, len(self.train_data))
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
        means = totals.means()
        tokens = sum(part.tokens.numel() for part in parts)
        return {**means, **self._update(means["loss"]), "tokens": tokens}

    def _advice(self) -> str:
        return (
            f"{super()._advice()}, model.norm=sandwich with model.relax=row, or "
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
