"""A run: one folder that holds everything that belongs to a model.

    config.yaml             all settings
    text_tokenizer.model    SentencePiece
    image_training/         checkpoints, metrics and pictures of the image tokenizer's training
    image_tokenizer.pt      the finished image tokenizer
    tokens.npz              the training data as tokens
    checkpoints/, metrics.jsonl, tensorboard/, pictures/   the GPT's training
    samples/                drawings

Whatever is made from something else carries its fingerprint: tokens those of both tokenizers and of
the data, checkpoints those of the tokens and of both tokenizers. Loading compares them, so that a
tokenizer that was trained again under a finished model is an error instead of noise.

    from cogview.run import Run

    images = Run.open("runs/mine").draw(["a red bird", "a blue bird"])  # (2, C, H, W) in [0, 1]
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cogview.checkpoint import check_settings, list_checkpoints, load_latest, load_weights
from cogview.config import Config, load_config, save_config
from cogview.data.images import read_image
from cogview.data.tokens import TokenDataset
from cogview.files import exclusive
from cogview.image_tokenizer import ImageTokenizer
from cogview.loop import check_made_from, choose_device
from cogview.model import GPT
from cogview.sample import draw_images, write_captions
from cogview.text_tokenizer import TextTokenizer, warn_of_unknown_characters
from cogview.train import MODEL_SETTINGS

# What the weights of a model depend on: the settings in the folder must say the same.
IMAGE_TOKENIZER_SETTINGS = (
    *("codebook_size", "codebook_dim", "image_size", "channels", "num_downsamples", "hidden"),
    *("mean", "std"),
)
DRAWING_SETTINGS = (
    *MODEL_SETTINGS,
    "training.task",
    "text_tokenizer.vocab_size",
    "image_tokenizer.codebook_size",
)


class Run:
    """A run folder and its settings.

    Args:
        path: the folder; it may not exist yet.
        config: the settings, as they are or will be in `config.yaml`.

    Attributes:
        path, config: as given.
        text_tokenizer_path, image_tokenizer_path, tokens_path: files in it.
        image_training: folder of the image tokenizer's training.
        device: that of the settings.
    """

    def __init__(self, path: str | os.PathLike[str], config: Config) -> None:
        self.path = Path(path)
        self.config = config
        self.text_tokenizer_path = self.path / "text_tokenizer.model"
        self.image_tokenizer_path = self.path / "image_tokenizer.pt"
        self.image_training = self.path / "image_training"
        self.tokens_path = self.path / "tokens.npz"
        self.checkpoints = self.path / "checkpoints"

    @classmethod
    def open(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
        """An existing run, its settings changed by `overrides` such as `["device=cpu"]`.

        Raises:
            FileNotFoundError: there is no `config.yaml` in the folder.
            ValueError: the settings are wrong.
        """
        file = Path(path) / "config.yaml"
        if not file.is_file():
            raise FileNotFoundError(
                f"{path}: expected config.yaml in it, got none; start a new run by training a "
                "tokenizer with --preset"
            )
        return cls(path, load_config(file, overrides))

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], preset: str, overrides: Sequence[str] = ()
    ) -> Run:
        """A run with the settings of a preset or of a YAML file; nothing is written yet.

        Raises:
            ValueError: the folder holds results already, or the settings are wrong.
        """
        run = cls(path, load_config(preset, overrides))
        if (run.path / "config.yaml").is_file() and run.results():
            raise ValueError(
                f"--preset: {run.path / 'config.yaml'} already holds the settings; change them "
                "with --set"
            )
        return run

    def results(self) -> list[Path]:
        """What the commands have made so far."""
        paths = (
            self.text_tokenizer_path,
            self.image_tokenizer_path,
            self.image_training,
            self.tokens_path,
            self.checkpoints,
            self.path / "metrics.jsonl",
        )
        return [path for path in paths if path.exists()]

    def save_config(self) -> None:
        save_config(self.config, self.path / "config.yaml")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other processes from writing to the folder. Reading, as `draw` does, needs no lock.

        Raises:
            OSError: another process is writing to it; the message names it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path / ".lock"):
            yield

    @property
    def device(self) -> torch.device:
        return choose_device(self.config.device)

    def text_tokenizer(self) -> TextTokenizer:
        """
        Raises:
            FileNotFoundError, ValueError: there is none, or not one of these settings.
        """
        path, config = self.text_tokenizer_path, self.config.text_tokenizer
        tokenizer = TextTokenizer.load(path)
        _check_setting("text_tokenizer.vocab_size", path, tokenizer.vocab_size, config.vocab_size)
        return tokenizer

    def image_tokenizer(self) -> ImageTokenizer:
        """On the device of the settings.

        Raises:
            FileNotFoundError, ValueError: there is none, or not one of these settings.
        """
        path, config = self.image_tokenizer_path, self.config.image_tokenizer
        tokenizer = ImageTokenizer.load(path, device=self.device)
        for name in IMAGE_TOKENIZER_SETTINGS:
            actual, expected = getattr(tokenizer.config, name), getattr(config, name)
            _check_setting(f"image_tokenizer.{name}", path, actual, expected)
        return tokenizer

    def tokenizer_fingerprints(self) -> dict[str, str]:
        return {
            "text tokenizer": self.text_tokenizer().fingerprint,
            "image tokenizer": self.image_tokenizer().fingerprint,
        }

    def split_settings(self) -> dict[str, str]:
        """The settings that choose the held-out images, for `ImageTokenizer.made_from`."""
        fraction = self.config.data.held_out_fraction
        return {"seed": f"{self.config.seed}", "data.held_out_fraction": f"{fraction}"}

    def tokens(self) -> TokenDataset:
        """The training data, made by the tokenizers that are in the folder now.

        Raises:
            FileNotFoundError, ValueError: there is none, it is damaged, a tokenizer was trained
                again since, or the image tokenizer was trained on images that are now held out.
        """
        tokens = TokenDataset.load(self.tokens_path)
        for name, fingerprint in self.tokenizer_fingerprints().items():
            made_from = tokens.made_from.get(name, "unknown")
            if made_from != fingerprint:
                raise ValueError(
                    f"{self.tokens_path}: made with another {name} ({made_from}) "
                    f"than the one in the folder now ({fingerprint}); run cogview encode again"
                )
        trained_with = self.image_tokenizer().made_from
        for name, value in self.split_settings().items():
            if trained_with.get(name, value) != value:
                raise ValueError(
                    f"{name}: {self.image_tokenizer_path} was trained with {trained_with[name]}, "
                    f"got {value}: it would have seen held-out images; set it back, or use a new "
                    "run folder"
                )
        return tokens

    def save_text_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """
        Raises:
            ValueError: the GPT was trained with another one, which would be lost.
        """
        path = self.text_tokenizer_path
        if path.is_file() and path.read_bytes() != tokenizer.model_proto:
            self.check_no_checkpoints("text tokenizer")
        tokenizer.save(path)

    def check_no_checkpoints(self, tokenizer: str) -> None:
        """
        Raises:
            ValueError: a GPT was trained with the tokenizers in the folder, so that none of them
                may be replaced by another.
        """
        if list_checkpoints(self.checkpoints):
            raise ValueError(
                f"{self.checkpoints}: trained with the {tokenizer} in the folder, and useless with "
                "another; use a new run folder, or move the checkpoints away"
            )

    def model(self, task: str = "text_to_image") -> GPT:
        """The newest checkpoint, in evaluation mode on the device; bfloat16 on a GPU.

        Raises:
            FileNotFoundError, ValueError: there is none, it has other settings or was trained for
                another task, or a tokenizer was trained again since.
        """
        if self.config.training.task != task:
            does = {"text_to_image": "draw images", "captioning": "write captions"}[task]
            raise ValueError(
                f"training.task: expected {task} to {does}, got {self.config.training.task}"
            )
        state = load_latest(self.checkpoints)
        if state is None:
            raise FileNotFoundError(
                f"{self.checkpoints}: expected a checkpoint in it, got none; run cogview train "
                "first"
            )
        source = f"{self.checkpoints}, step {state['step']},"
        check_settings(state["config"], dataclasses.asdict(self.config), DRAWING_SETTINGS, source)
        check_made_from(state["made_from"], self.tokenizer_fingerprints(), source)
        model = GPT(self.config.model, self.config.vocabulary.padded_size)
        load_weights(model, state["model"], source)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return model.to(self.device, dtype).eval()

    def codes(self, paths: Sequence[str | os.PathLike[str]]) -> Tensor:
        """Codes (N, h, w) of image files, on the CPU."""
        tokenizer = self.image_tokenizer()
        size, channels = tokenizer.config.image_size, tokenizer.config.channels
        images = torch.stack([read_image(path, size, channels) for path in paths])
        return tokenizer.encode(images).cpu()

    def draw(
        self,
        captions: Sequence[str],
        seed: int = 0,
        beginning: Sequence[int] = (),
        progress: bool = False,
    ) -> Tensor:
        """Draws an image for each caption.

        Args:
            captions: texts.
            seed: another seed gives other images.
            beginning: the first codes of all images, row by row; the model draws the rest.
            progress: show a progress bar if standard error is a terminal.

        Returns:
            (N, C, H, W) float32 in [0, 1], on the CPU.

        Raises:
            FileNotFoundError, ValueError: something of the run is missing or does not fit, or a
                caption is empty or too long.
        """
        tokenizer = self.text_tokenizer()
        texts = [tokenizer.encode(caption) for caption in captions]
        warn_of_unknown_characters(tokenizer, captions)
        beginnings = [beginning] * len(texts)
        codes = draw_images(self.model(), self.config, texts, seed, beginnings, progress)
        return self.image_tokenizer().decode(codes).cpu()

    def caption(
        self, paths: Sequence[str | os.PathLike[str]], seed: int = 0, progress: bool = False
    ) -> list[str]:
        """Writes a caption for each image file.

        Raises:
            FileNotFoundError, ValueError: as `draw`, or the run was trained for another task.
        """
        model = self.model("captioning")
        rows = write_captions(model, self.config, self.codes(paths), seed, progress=progress)
        tokenizer = self.text_tokenizer()
        return [tokenizer.decode(pieces) for pieces in rows]


def _check_setting(key: str, path: Path, actual: object, expected: object) -> None:
    if actual != expected:
        raise ValueError(
            f"{key}: {path} has {actual}, the settings say {expected}; set it back, or train the "
            "tokenizer again"
        )
