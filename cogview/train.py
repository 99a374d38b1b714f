"""Training of the GPT on token sequences: AdamW, and the loss of text and image tokens.

Data order, pivots and dropout are functions of (seed, step, examples read so far, position of the
micro batch in the batch). Several processes (`cogview.distributed`) share the micro batches of a
step. With `training.micro_batch_size` set, they therefore compute what one process computes, up to
the order of sums.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from cogview import distributed
from cogview.checkpoint import check_settings, check_weights
from cogview.config import Config, ModelConfig
from cogview.data.loading import Reader, num_workers
from cogview.data.tokens import TokenDataset
from cogview.image_tokenizer import ImageTokenizer
from cogview.loop import Loop, step_seed
from cogview.model import GPT
from cogview.sample import draw_images
from cogview.sequence import (
    Batch,
    TokenSequence,
    captioning,
    collate,
    hide_captions,
    loss_weights,
    text_to_image,
)
from cogview.weights import Weights

NUM_DRAWN = 8  # captions, for the pictures while training

# Settings that must not change: the weights of a model depend on the first list, the tokens and the
# data split of a run on the second.
MODEL_SETTINGS = tuple(
    f"model.{field.name}"
    for field in dataclasses.fields(ModelConfig)
    if field.name not in ("dropout", "activation_checkpointing")
)
# Settings that weights of another run must share: they give the weights their sizes and their
# meaning. What a token attends to may change.
INITIAL_SETTINGS = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.norm",
    "model.image_positions",
    "text_tokenizer.vocab_size",
    "image_tokenizer.codebook_size",
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
    image_first = config.model.image_positions == "first"
    return text_to_image(config.vocabulary, text, codes, image_first=image_first)


def _micro_batches(
    config: Config, data: TokenDataset, size: int, starts: range, indices: Sequence[int]
) -> list[Batch]:
    """Those of a step's micro-batches that begin at `starts`; they hold `size` sequences."""
    return [make_batch(config, data, indices[at : at + size]) for at in starts]


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
        initial: weights to start from; a model with more positions keeps its own for the others.
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
        initial: Weights | None = None,
        image_tokenizer: ImageTokenizer | None = None,
    ) -> None:
        for name, data in (("training data", train_data), ("held-out data", held_out_data)):
            _check_data(name, data, config)
        super().__init__(config, config.training, folder, made_from, progress)
        self.train_data = train_data
        self.held_out_data = held_out_data
        self.image_tokenizer = image_tokenizer
        self.on_batch = on_batch
        self.micro_batch_size = _micro_batch_size(config)
        # Where this process's micro-batches begin in a batch.
        starts = range(0, config.training.batch_size, self.micro_batch_size)
        self.starts = starts[distributed.rank() :: distributed.size()]
        self.reader = Reader(
            functools.partial(
                _micro_batches, config, train_data, self.micro_batch_size, self.starts
            ),
            len(train_data),
            config.seed,
            config.training.batch_size,
            num_workers(config.data.workers, self.device),
        )
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            self.model = make_model(config.model, config.vocabulary.padded_size)
        if initial is not None:
            start_from(self.model, initial, config)
        parallel = config.training.parallel
        self.spread_model = distributed.spread(self.model, parallel, self.device, self.dtype)
        self.optimizer = _optimizer(self.model, config)
        self._resume()
        if config.training.compile:
            self.model.compile_layers()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out `loss`, `text_loss` and `image_loss`, in nats per token; and `caption_gap`: how
        much larger the image loss is with the caption of another image. A model that does not
        read its captions has a gap of 0. Of captioning, it is the text loss of another's caption.

        Every call uses the same examples and pivots.
        """
        config, data = self.config, self.held_out_data
        count = min(config.training.eval_examples, len(data))
        size = self.micro_batch_size
        pairs = [data[i] for i in range(count)]
        swapped = _with_other_captions(pairs)
        self.model.eval()
        totals, totals_swapped = _Totals(), _Totals()
        # Sharded processes make the same number of passes. Where examples run out, one counts zero.
        for first in range(0, count, size * distributed.size()):
            start = first + size * distributed.rank()
            counts = start < count
            start = start if counts else 0
            for sums, examples in ((totals, pairs), (totals_swapped, swapped)):
                if not examples:
                    continue
                rows = examples[start : min(start + size, count)]
                sequences = [build_sequence(config, *row) for row in rows]
                batch = collate(config.vocabulary, sequences).to(self.device)
                generator = self._generator(step_seed(config.seed, 0, start))
                losses, weights, targets = self._losses(batch, generator)
                masks = {name: mask & counts for name, mask in targets.items()}
                sums.add(losses, weights * counts, masks)
        self.model.train()
        means = totals.means()
        if swapped:
            name = "image_loss" if config.training.task == "text_to_image" else "text_loss"
            means["caption_gap"] = totals_swapped.means()[name] - means[name]
        return means

    def pictures(self) -> torch.Tensor | None:
        """Held-out images as the image tokenizer keeps them, and below them what the model draws
        for their captions: the same captions every time."""
        config, data = self.config, self.held_out_data
        if self.image_tokenizer is None or config.training.task != "text_to_image":
            return None
        pairs = [data[i] for i in range(min(NUM_DRAWN, len(data)))]
        texts = [text[: config.max_text_len].tolist() for text, _ in pairs]
        self.model.eval()
        with self._autocast(cache=True):
            drawn = draw_images(self.model, config, texts, config.seed, progress=False)
        self.model.train()
        real = torch.from_numpy(np.stack([codes for _, codes in pairs]).astype(np.int64))
        return self.image_tokenizer.decode(torch.cat([real, drawn])).cpu()

    def _train_step(self) -> dict[str, float]:
        config = self.config
        parts = self.reader.read(self.examples)
        if config.training.caption_dropout and config.training.task == "text_to_image":
            parts = [
                hide_captions(
                    config.vocabulary,
                    part,
                    config.training.caption_dropout,
                    step_seed(config.seed, self.step, at),
                )
                for at, part in zip(self.starts, parts, strict=True)
            ]
        parts = [part.to(self.device) for part in parts]
        total_weight = torch.stack([self._weights(part).sum() for part in parts]).sum()
        # The gradients are averaged over the processes, while losses are sums.
        scale = distributed.size() / distributed.total(total_weight)
        totals = _Totals()
        max_hidden = []
        self.optimizer.zero_grad(set_to_none=True)
        for at, part in zip(self.starts, parts, strict=True):
            if self.on_batch is not None:
                self.on_batch(part)
            with distributed.accumulating(self.spread_model, last=at == self.starts[-1]):
                totals.add(*self._backward(part, step_seed(config.seed, self.step, at), scale))
            max_hidden.append(self.model.max_hidden)
        means = totals.means()
        tokens = distributed.total(torch.tensor(sum(part.tokens.numel() for part in parts)))
        return {
            **means,
            **self._update(means["loss"]),
            **self._max_hidden(distributed.largest_of(torch.stack(max_hidden).amax(0)).tolist()),
            "tokens": int(tokens),
        }

    def _max_hidden(self, of_layers: list[float]) -> dict[str, float]:
        """The largest magnitude in the residual stream; that of every layer only where the held-out
        loss is measured, because large models have many."""
        metrics = {"max_hidden": max(of_layers)}
        step, training = self.step + 1, self.config.training
        if step % training.eval_every == 0 or step == training.steps:
            metrics |= {f"max_hidden_{i:02d}": value for i, value in enumerate(of_layers)}
        return metrics

    def _backward(
        self, batch: Batch, seed: int, scale: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """One pass: adds the gradients of `scale` times the sum of the weighted losses.

        Nothing here waits for the GPU.

        Args:
            seed: of dropout and pivots.

        Returns:
            as `_losses`.
        """
        torch.manual_seed(seed)
        losses, weights, masks = self._losses(batch, self._generator(seed))
        self.scaler.scale((losses * weights).sum() * scale).backward()
        return losses.detach(), weights, masks

    def _advice(self) -> str:
        return (
            f"{super()._advice()}, model.norm=sandwich with model.relax=row, or "
            "training.precision=bfloat16"
        )

    def _generator(self, seed: int) -> torch.Generator:
        """The source of the pivots of a micro batch."""
        return torch.Generator(self.device).manual_seed(seed)

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
            z = self.spread_model(inputs, batch.positions[:, :-1], layouts)
            losses = self.model.losses(z, targets)
        image = targets < vocab.codebook_size
        text = ~image & (targets < vocab.first_command)
        return losses, self._weights(batch), {"text": text, "image": image}


def _with_other_captions(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each image with the caption of one half way round the data, where neighbours may be alike, or
    of the next that is another image with another caption; empty if one of them has no such."""
    swapped = []
    for i, pair in enumerate(pairs):
        far = i + len(pairs) // 2
        for step in range(len(pairs)):
            other = pairs[(far + step) % len(pairs)]
            if not any(map(np.array_equal, pair, other)):
                swapped.append((other[0], pair[1]))
                break
        else:
            return []
    return swapped


class _Totals:
    """Sums of losses and weights over several batches, of all processes."""

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
            total, weight = distributed.total(torch.stack(sums).double().sum(0)).tolist()
            if weight:
                means[name] = total / weight
        return means


def start_from(model: GPT, initial: Weights, config: Config) -> None:
    """Copies weights of another run into a model; where it has more positions, it keeps its own.

    Args:
        model: of these settings. On the device `meta`, everything is checked and nothing copied.

    Raises:
        ValueError: the weights do not fit the settings; the message names the one that differs.
    """
    check_settings(initial.config, dataclasses.asdict(config), INITIAL_SETTINGS, initial.source)
    name = "transformer.position_embeddings.weight"
    tensors = dict(initial.tensors)
    if name in tensors:
        given, positions = tensors[name], model.state_dict()[name].clone()
        if len(given) > len(positions):
            raise ValueError(
                f"model.max_positions: {initial.source} has {len(given)}, got {len(positions)}; "
                "set it to that or more"
            )
        positions[: len(given)] = given
        tensors[name] = positions
    check_weights(model, tensors, initial.source)
    if not model.word_embeddings.weight.is_meta:
        model.load_state_dict(tensors)


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


def _micro_batch_size(config: Config) -> int:
    """Sequences per pass of a process.

    Raises:
        ValueError: the passes of a step cannot be shared evenly among the processes.
    """
    training, processes = config.training, distributed.size()
    size = training.micro_batch_size or max(1, training.batch_size // processes)
    if -(-training.batch_size // size) % processes or training.batch_size < processes:
        raise ValueError(
            f"training.batch_size: expected a multiple of {processes} processes x micro batches of "
            f"{size} = {processes * size} sequences, got {training.batch_size}; change it, or "
            "training.micro_batch_size"
        )
    return size
