"""Training of the image tokenizer: AdamW on the reconstruction of images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cogview.config import Config, LoopConfig
from cogview.data.images import Images
from cogview.data.loading import Reader, num_workers
from cogview.image_tokenizer import ImageTokenizer
from cogview.loop import Loop

NUM_SHOWN = 8  # pairs of an image and its reconstruction


class ImageTokenizerTrainer(Loop):
    """One training run of the image tokenizer; resumes from the newest checkpoint in its folder.

    Unless the codebook is fixed, the codes start at random encoder outputs of the first batch. The
    temperature of gumbel sampling falls from 1 to 1/16.

    Args:
        config: all settings.
        folder: where the results go (`cogview.loop` lists what is written); created if necessary.
        train_images: (N, C, H, W) in [0, 1] or uint8, or an object that returns such a batch for a
            list of indices.
        held_out_images: the same, for the held-out reconstruction loss and the pictures.
        made_from: fingerprint of the data, by name.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        ValueError: no images, a checkpoint has other settings, or there are checkpoints but none
            can be read.
    """

    name = "image tokenizer"
    unit = "images"
    sections = ("image_training", "image_tokenizer")
    fixed_settings = (
        "seed",
        "data.held_out_fraction",
        *(
            f"image_tokenizer.{name}"
            for name in (
                "image_size channels hidden num_downsamples codebook_size codebook_dim quantizer "
                "mean std"
            ).split()
        ),
    )
    model: ImageTokenizer

    def __init__(
        self,
        config: Config,
        folder: str | os.PathLike[str],
        train_images: Tensor | Images,
        held_out_images: Tensor | Images,
        made_from: Mapping[str, str] | None = None,
        progress: bool = True,
    ) -> None:
        for name, images in (("images", train_images), ("held-out images", held_out_images)):
            if len(images) == 0:
                raise ValueError(f"{name}: expected at least one image, got none")
        super().__init__(config, config.image_training, folder, made_from, progress)
        self.train_images = train_images
        self.held_out_images = held_out_images
        in_memory = isinstance(train_images, Tensor)
        self.reader = Reader(
            train_images.__getitem__,
            len(train_images),
            config.seed,
            config.image_training.batch_size,
            0 if in_memory else num_workers(config.data.workers, self.device),
        )
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            model = ImageTokenizer(config.image_tokenizer)
        # Convolutions are faster so, on GPUs and CPUs.
        channels_last: Any = {"memory_format": torch.channels_last}
        self.model = model.to(self.device, **channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0)
        self._resume()

    def _train_step(self) -> dict[str, float]:
        """Metrics: `loss`; `reconstruction_loss`, mean squared error in normalised units;
        `codebook_loss`; of the batch `codes_used`, the number of different codes, and `perplexity`,
        the exponential of their entropy; `codes_revived`, that restarted in this step."""
        settings = self.settings
        batch = self.reader.read(self.examples)
        quantizer = self.model.quantize_t
        if self.step == 0:
            self.model.start_codebook(batch)
        quantizer.temperature = temperature(settings, self.step)
        with self._autocast():
            output = self.model(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(output.loss).backward()
        loss = output.loss.item()
        return {
            "loss": loss,
            "reconstruction_loss": output.reconstruction_loss.item(),
            "codebook_loss": output.codebook_loss.item(),
            **_use_of_codes(output.codes, self.config.image_tokenizer.codebook_size),
            "codes_revived": quantizer.num_restarted,
            **self._update(loss),
            "images": len(batch),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out `reconstruction_loss`, `codes_used` and `perplexity`."""
        settings, config = self.settings, self.config.image_tokenizer
        count = min(settings.eval_examples, len(self.held_out_images))
        self.model.eval()
        error, codes = 0.0, []
        for start in range(0, count, settings.batch_size):
            indices = list(range(start, min(start + settings.batch_size, count)))
            with self._autocast():
                output = self.model(self.held_out_images[indices])
            error += output.reconstruction_loss.item() * len(indices)
            codes.append(output.codes)
        self.model.train()
        return {
            "reconstruction_loss": error / count,
            **_use_of_codes(torch.cat(codes), config.codebook_size),
        }

    def schedule(self, settings: LoopConfig, step: int) -> dict[str, float]:
        gumbel = self.config.image_tokenizer.quantizer == "gumbel"
        return super().schedule(settings, step) | (
            {"temperature": temperature(settings, step)} if gumbel else {}
        )

    def in_words(self, metrics: Mapping[str, float]) -> str:
        return (
            f", {metrics['codes_used']} of {self.config.image_tokenizer.codebook_size} codes used "
            f"(perplexity {metrics['perplexity']:.1f}), {metrics['codes_revived']} revived"
        )

    def pictures(self) -> Tensor:
        """Held-out images, and below them what the tokenizer makes of them."""
        count = min(NUM_SHOWN, len(self.held_out_images))
        images = self.held_out_images[list(range(count))]
        self.model.eval()
        decoded = self.model.decode(self.model.encode(images)).cpu()
        self.model.train()
        scaled = images / 255 if images.dtype == torch.uint8 else images
        return torch.cat([scaled.cpu(), decoded])


def temperature(settings: LoopConfig, step: int) -> float:
    """Of gumbel sampling: falls from 1 to 1/16."""
    return 16.0 ** (-step / settings.steps)


def _use_of_codes(codes: Tensor, codebook_size: int) -> dict[str, float]:
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    entropy = torch.special.entr(counts / counts.sum()).sum()
    return {"codes_used": int((counts > 0).sum()), "perplexity": entropy.exp().item()}
