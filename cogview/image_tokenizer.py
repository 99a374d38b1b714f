"""Images to codes and back: CogView's VQVAE, generalised in size, channels and quantisation rule.

    encoder    num_downsamples x [Conv2d 4x4 stride 2, ReLU], Conv2d 1x1 to codebook_dim
    quantise   nearest of the codebook_size vectors (see `ImageTokenizerConfig`)
    decoder    num_downsamples x [ConvTranspose2d 4x4 stride 2, ReLU], Conv2d 1x1 to the channels

With the defaults (256x256 RGB, 32x32 codes out of 8192) it is CogView's tokenizer, with the same
names in the state dict: 19 034 883 parameters, and the codebook of 8192 x 256 as a buffer.
"""

import hashlib
import math
import os
import zipfile
from dataclasses import asdict
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import ImageTokenizerConfig
from cogview.files import atomic_write, check_zip

_DAMAGED = (UnpicklingError, zipfile.BadZipFile)


class ImageTokenizerOutput(NamedTuple):
    """One forward pass in training."""

    reconstruction: Tensor  # (B, C, H, W) in the range of the images, not clamped
    codes: Tensor  # (B, h, w) int64
    loss: Tensor  # scalar to minimise, the sum of the two below
    reconstruction_loss: Tensor  # scalar, mean squared error in normalised units
    codebook_loss: Tensor  # scalar, weighted


class Quantizer(nn.Module):
    """The codebook. `embed` is (codebook_dim, codebook_size) as in CogView's checkpoints."""

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        self.config = config
        self.temperature = 1.0  # for gumbel sampling; the training loop anneals it
        self.num_restarted = 0  # codes that the last update revived
        embed = torch.empty(config.codebook_dim, config.codebook_size)
        nn.init.xavier_uniform_(embed, gain=nn.init.calculate_gain("tanh"))
        if config.quantizer in ("straight_through", "gumbel"):
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # Start at 1: from 0, the first update would divide unused codes by almost 0.
        self.register_buffer("cluster_size", torch.ones(config.codebook_size))
        self.register_buffer("embed_avg", embed.detach().clone())

    def nearest(self, vectors: Tensor) -> Tensor:
        """(N, codebook_dim) -> (N,) int64."""
        return self._distances(vectors.detach()).argmin(1)

    def lookup(self, codes: Tensor) -> Tensor:
        """(...) int64 -> (..., codebook_dim)."""
        return F.embedding(codes, self.embed.t())

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise `vectors` (N, codebook_dim); in training mode also update the codebook.

        Returns:
            quantised (N, codebook_dim), with the gradient that `config.quantizer` defines; codes
            (N,) int64; codebook loss, a scalar.
        """
        config = self.config
        if config.quantizer == "gumbel" and self.training:
            return self._sample(vectors)
        codes = self.nearest(vectors)
        quantised = self.lookup(codes)
        loss = config.commitment * F.mse_loss(vectors, quantised.detach())
        if config.quantizer == "straight_through":
            loss = loss + F.mse_loss(quantised, vectors.detach())
        # Not from a step that float16 skips: averages would keep its infinity for good.
        if self.training and config.quantizer != "gumbel" and vectors.isfinite().all():
            self._update(vectors.detach(), codes)
        return vectors + (quantised - vectors).detach(), codes, loss

    def _distances(self, vectors: Tensor) -> Tensor:
        """Squared distance to each code, minus |vector|^2: (N, codebook_size)."""
        return self.embed.pow(2).sum(0) - 2 * vectors @ self.embed

    def _sample(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = -self._distances(vectors)  # a softmax ignores |vector|^2
        one_hot = F.gumbel_softmax(logits, tau=self.temperature, hard=True)
        log_prob = logits.log_softmax(1)
        log_uniform = -math.log(self.config.codebook_size)
        divergence = (log_prob.exp() * (log_prob - log_uniform)).sum(1).mean()
        return one_hot @ self.embed.t(), one_hot.argmax(1), self.config.kl_weight * divergence

    @torch.no_grad()
    def _update(self, vectors: Tensor, codes: Tensor) -> None:
        config = self.config
        # Sum by a one-hot product: unlike a scatter, it is deterministic on a GPU.
        one_hot = F.one_hot(codes, config.codebook_size).to(vectors.dtype)
        self.cluster_size.lerp_(one_hot.sum(0), 1 - config.decay)
        if config.quantizer == "moving_average":
            self.embed_avg.lerp_(vectors.t() @ one_hot, 1 - config.decay)
            mean = self.embed_avg / self.cluster_size
            self.embed.copy_(torch.where(self.cluster_size > 1e-5, mean, self.embed))
            unused = (self.cluster_size < config.restart_below).nonzero().squeeze(1)
            self.num_restarted = len(unused)
            self.restart(unused, vectors)

    @torch.no_grad()
    def restart(self, codes: Tensor, vectors: Tensor) -> None:
        """Set `codes` (K,) to random rows of `vectors` (N, codebook_dim), with fresh averages."""
        rows = torch.randint(len(vectors), (len(codes),), device=vectors.device)
        self.embed[:, codes] = vectors[rows].t()
        self.embed_avg[:, codes] = vectors[rows].t()
        self.cluster_size[codes] = 1.0


class _Encoder(nn.Module):
    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        blocks: list[nn.Module] = []
        for i in range(config.num_downsamples):
            in_channels = config.hidden if i else config.channels
            blocks += [
                nn.Conv2d(in_channels, config.hidden, 4, stride=2, padding=1),
                nn.ReLU(inplace=True),
            ]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(config.hidden, config.codebook_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


class _Decoder(nn.Module):
    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        blocks: list[nn.Module] = []
        for i in range(config.num_downsamples):
            in_channels = config.hidden if i else config.codebook_dim
            blocks += [
                nn.ConvTranspose2d(in_channels, config.hidden, 4, stride=2, padding=1),
                nn.ReLU(inplace=True),
            ]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(config.hidden, config.channels, 1))

    def forward(self, vectors: Tensor) -> Tensor:
        return self.blocks(vectors)


class ImageTokenizer(nn.Module):
    """VQVAE between images (B, C, H, W) in [0, 1] and codes (B, h, w)."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        self.config = config
        # What it was trained on: fingerprints, and the keys of the images (`image_key`), none of
        # which may later be held out.
        self.made_from: dict[str, str] = {}
        self.trained_on = np.empty(0, np.uint64)
        self.enc_b = _Encoder(config)
        self.quantize_t = Quantizer(config)
        self.dec = _Decoder(config)
        self.register_buffer("mean", torch.tensor(config.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(-1, 1, 1), persistent=False)

    @property
    def fingerprint(self) -> str:
        """Equal for equal weights, so that equal images get equal codes."""
        config = self.config  # of which the rest shows in the weights, or matters in training only
        digest = hashlib.sha256(repr((config.image_size, config.mean, config.std)).encode())
        for name, tensor in self.state_dict().items():
            if name not in ("quantize_t.cluster_size", "quantize_t.embed_avg"):  # of training
                digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Codes of images.

        Args:
            images: (B, C, H, W) floating point in [0, 1], or uint8.
            batch_size: images encoded at a time; bounds the memory and does not change the result.

        Returns:
            (B, h, w) int64 on the device of the tokenizer.

        Raises:
            ValueError: wrong shape, or an image holds NaN or infinity.
            TypeError: wrong dtype.
        """
        size = self.config.code_size
        codes = torch.empty(len(images), size, size, dtype=torch.int64, device=self.mean.device)
        for start in range(0, len(images), batch_size):
            vectors = self._vectors(self._checked(images[start : start + batch_size]))
            nearest = self.quantize_t.nearest(vectors.flatten(0, 2))
            codes[start : start + batch_size] = nearest.view(vectors.shape[:3])
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor, batch_size: int = 64) -> Tensor:
        """Images of codes.

        Args:
            codes: (B, h, w) integers in `[0, codebook_size)`.
            batch_size: images decoded at a time.

        Returns:
            (B, C, H, W) float32 in [0, 1].

        Raises:
            ValueError: wrong shape, or a code out of range.
        """
        config = self.config
        if codes.ndim != 3 or codes.shape[1:] != (config.code_size, config.code_size):
            raise ValueError(
                f"codes: expected (B, {config.code_size}, {config.code_size}), "
                f"got {tuple(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < config.codebook_size:
            raise ValueError(
                f"codes: expected 0 to {config.codebook_size - 1}, "
                f"got {int(codes.min())} to {int(codes.max())}"
            )
        size = config.image_size
        images = self.mean.new_empty(len(codes), config.channels, size, size)
        for start in range(0, len(codes), batch_size):
            batch = codes[start : start + batch_size].to(self.mean.device, torch.int64)
            vectors = self.quantize_t.lookup(batch)
            images[start : start + batch_size] = self._images(vectors).clamp(0, 1)
        return images

    def forward(self, images: Tensor) -> ImageTokenizerOutput:
        """Reconstruct `images` (B, C, H, W); in training mode, also update the codebook.

        Under autocast the convolutions have half precision, codes and losses float32.
        """
        images = self._checked(images)
        vectors = self._vectors(images).float()  # (B, h, w, codebook_dim)
        with torch.autocast(images.device.type, enabled=False):
            quantised, codes, codebook_loss = self.quantize_t(vectors.flatten(0, 2))
        reconstruction = self._images(quantised.view_as(vectors)).float()
        reconstruction_loss = F.mse_loss(reconstruction / self.std, images / self.std)
        return ImageTokenizerOutput(
            reconstruction,
            codes.view(vectors.shape[:3]),
            reconstruction_loss + codebook_loss,
            reconstruction_loss,
            codebook_loss,
        )

    @torch.no_grad()
    def start_codebook(self, images: Tensor) -> None:
        """Sets the codes to random encoder outputs of these images; a fixed codebook stays."""
        if self.config.quantizer == "fixed":
            return
        vectors = self._vectors(self._checked(images)).flatten(0, 2)
        all_codes = torch.arange(self.config.codebook_size, device=vectors.device)
        self.quantize_t.restart(all_codes, vectors)

    def _vectors(self, images: Tensor) -> Tensor:
        return self.enc_b((images - self.mean) / self.std).permute(0, 2, 3, 1)

    def _images(self, vectors: Tensor) -> Tensor:
        return self.dec(vectors.permute(0, 3, 1, 2)) * self.std + self.mean

    def _checked(self, images: Tensor) -> Tensor:
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images: expected (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}"
            )
        if images.dtype == torch.uint8:
            return images.to(self.mean.device).float() / 255
        if not images.is_floating_point():
            raise TypeError(f"images: expected floating point or uint8, got {images.dtype}")
        images = images.to(self.mean.device, torch.float32)
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(
                f"images: image {int((~finite).nonzero()[0])} of the batch holds NaN or infinity"
            )
        return images

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save configuration, weights and what it was trained on; an existing file is replaced
        atomically."""
        state = {
            "config": asdict(self.config),
            "made_from": self.made_from,
            "trained_on": torch.from_numpy(self.trained_on),
            "model": self.state_dict(),
        }
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: ImageTokenizerConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> "ImageTokenizer":
        """Load a saved tokenizer, or a bare state dict such as CogView's.

        Keys of a state dict may start with `module.`, the prefix that wrappers add.

        Args:
            path: the file.
            config: configuration of a bare state dict (default: CogView's).
            device: device of the tokenizer.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or corrupt, or does not fit the configuration.
        """
        try:
            check_zip(path)
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                error.errno, "image tokenizer: no such file", str(path)
            ) from None
        except (PermissionError, IsADirectoryError):
            raise
        # A truncated file raises RuntimeError or OSError (EINVAL), depending on where it ends.
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, *_DAMAGED) as error:
            raise ValueError(
                f"{path}: expected a saved image tokenizer, "
                f"got a corrupt or truncated file ({error})"
            ) from error
        try:
            weights = saved
            if "config" in saved:
                config, weights = ImageTokenizerConfig(**saved["config"]), saved["model"]
            tokenizer = cls(config or ImageTokenizerConfig())
            if weights is not saved:
                tokenizer.made_from = dict(saved.get("made_from", {}))
                if "trained_on" in saved:
                    tokenizer.trained_on = saved["trained_on"].numpy()
            tokenizer.load_state_dict(
                {name.removeprefix("module."): value for name, value in weights.items()}
            )
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected weights of this image tokenizer: {error}"
            ) from error
        return tokenizer.eval().to(device)
