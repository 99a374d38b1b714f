"""A run: one folder that holds everything that belongs to a model.

    config.yaml             all settings
    text_tokenizer.model    SentencePiece
    image_training/         checkpoints, metrics and pictures of the image tokenizer's training
    image_tokenizer.pt      the finished image tokenizer
    tokens/                 the training data as tokens
    bad_records.txt         what could not be used of the data, if anything
    image_keys.json         hashes of the images, so that unchanged ones are not decoded again
    checkpoints/, metrics.jsonl, tensorboard/, pictures/   the GPT's training
    samples/                drawings
    model.safetensors       weights of another run, that this one starts from; or, where there are
                            no checkpoints, all that there is of the GPT: an exported run

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
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogview.checkpoint import check_settings, list_checkpoints, load_latest, load_weights
from cogview.config import Config, load_config, save_config
from cogview.data.images import read_image
from cogview.data.tokens import TokenDataset
from cogview.files import atomic_write, exclusive
from cogview.image_tokenizer import ImageTokenizer
from cogview.loop import check_made_from, choose_device, compute_dtype
from cogview.model import GPT
from cogview.sample import draw_images, write_captions
from cogview.text_tokenizer import TextTokenizer, warn_of_unknown_characters
from cogview.train import MODEL_SETTINGS, start_from
from cogview.weights import Weights, load_weights_file, read_metadata, save_tensors, save_weights

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
        text_tokenizer_path, image_tokenizer_path, tokens_path, bad_records_path, known_keys_path:
            what is in it.
        image_training: folder of the image tokenizer's training.
        device: that of the settings.
    """

    def __init__(self, path: str | os.PathLike[str], config: Config) -> None:
        self.path = Path(path)
        self.config = config
        self.text_tokenizer_path = self.path / "text_tokenizer.model"
        self.image_tokenizer_path = self.path / "image_tokenizer.pt"
        self.image_training = self.path / "image_training"
        self.tokens_path = self.path / "tokens"
        self.bad_records_path = self.path / "bad_records.txt"
        self.known_keys_path = self.path / "image_keys.json"
        self.checkpoints = self.path / "checkpoints"
        self.weights_path = self.path / "model.safetensors"

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

    @classmethod
    def before_start(
        cls,
        path: str | os.PathLike[str],
        source: str | os.PathLike[str],
        overrides: Sequence[str] = (),
    ) -> Run:
        """The run that `start_from` makes; nothing is written.

        Raises:
            FileNotFoundError: there are no settings.
        """
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        own = Path(path) / "config.yaml"
        settings = own if own.is_file() else folder / "config.yaml"
        if not settings.is_file():
            raise FileNotFoundError(
                f"--init-from: expected a run folder or a folder of cogview export, with "
                f"config.yaml in it, got {source}"
            )
        return cls(path, load_config(settings, overrides))

    @classmethod
    def start_from(
        cls,
        path: str | os.PathLike[str],
        source: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        tokens: bool = False,
    ) -> Run:
        """A run whose GPT starts with the weights of another one.

        What the folder does not have yet, it takes from the other run: settings, changed by
        `overrides`, and tokenizers. The optimizer starts fresh, and the sequences may be longer:
        `model.max_positions` may be larger than that of the other run. Called again for the same
        weights, this opens the run.

        Args:
            path: the folder.
            source: a run folder, a folder of `cogview export`, or the `model.safetensors` in one.
            tokens: take over the tokens of the other run too, if the folder has none.

        Raises:
            FileNotFoundError: there are no weights, or no settings.
            ValueError: the settings do not fit the weights, the tokenizers in the folder are not
                those of the weights, or the folder has checkpoints of a run with another start.
        """
        run = cls.before_start(path, source, overrides)
        source = Path(source)
        folder = source if source.is_dir() else source.parent
        other = cls(folder, Config())
        weights = cls.open(folder).weights() if source.is_dir() else load_weights_file(source)
        with torch.device("meta"):
            start_from(
                GPT(run.config.model, run.config.vocabulary.padded_size), weights, run.config
            )
        if list_checkpoints(run.checkpoints):
            started = read_metadata(run.weights_path) if run.weights_path.is_file() else {}
            if started.get("fingerprint") != weights.fingerprint:
                raise ValueError(
                    f"--init-from: {run.checkpoints} holds a run that did not start from these "
                    "weights; leave --init-from away to go on with it, or use a new run folder"
                )
            return run
        with run.writing():
            for name in ("text_tokenizer_path", "image_tokenizer_path"):
                _copy_missing(getattr(other, name), getattr(run, name))
            run._check_tokenizers(weights)
            if tokens:
                _copy_missing(other.tokens_path, run.tokens_path)
            save_weights(run.weights_path, weights)
            run.save_config()
        return run

    def results(self) -> list[Path]:
        """What the commands have made so far."""
        paths = (
            self.text_tokenizer_path,
            self.image_tokenizer_path,
            self.image_training,
            self.tokens_path,
            self.checkpoints,
            self.weights_path,
            self.path / "metrics.jsonl",
        )
        return [path for path in paths if path.exists()]

    def save_config(self) -> None:
        save_config(self.config, self.path / "config.yaml")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other processes from writing to the folder. Reading, as `draw` does, needs no lock.

        Raises:
            OSError: another process is writing to it; the message names it. Or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(
                20, "--run: expected a folder, got a file", self.path
            ) from None
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
        self._expect_file(path, "train-text-tokenizer")
        tokenizer = TextTokenizer.load(path)
        _check_setting("text_tokenizer.vocab_size", path, tokenizer.vocab_size, config.vocab_size)
        return tokenizer

    def image_tokenizer(self) -> ImageTokenizer:
        """On the device of the settings.

        Raises:
            FileNotFoundError, ValueError: there is none, or not one of these settings.
        """
        path, config = self.image_tokenizer_path, self.config.image_tokenizer
        self._expect_file(path, "train-image-tokenizer")
        tokenizer = ImageTokenizer.load(path, device=self.device)
        for name in IMAGE_TOKENIZER_SETTINGS:
            actual, expected = getattr(tokenizer.config, name), getattr(config, name)
            _check_setting(f"image_tokenizer.{name}", path, actual, expected)
        return tokenizer

    def _expect_file(self, path: Path, command: str) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.path}: expected {path.name} in it, got none; cogview {command} makes it"
            )

    def tokenizer_fingerprints(self) -> dict[str, str]:
        return {
            "text tokenizer": self.text_tokenizer().fingerprint,
            "image tokenizer": self.image_tokenizer().fingerprint,
        }

    def _check_tokenizers(self, weights: Weights) -> None:
        """Warns of weights of another program that do not name their tokenizers.

        Raises:
            ValueError: the weights were trained with other tokenizers, or are a checkpoint that
                does not name them.
        """
        now = self.tokenizer_fingerprints()
        unknown = [name for name in now if name not in weights.made_from]
        if unknown and not weights.is_checkpoint:
            warnings.warn(
                f"{weights.source} does not say which {' and '.join(unknown)} it was trained with: "
                "if the folder holds another one, drawings are noise",
                stacklevel=3,
            )
            now = {name: value for name, value in now.items() if name in weights.made_from}
        check_made_from(weights.made_from, now, weights.source)

    def tokens(self) -> TokenDataset:
        """The training data, made by the tokenizers that are in the folder now.

        Raises:
            FileNotFoundError, ValueError: there is none, it is damaged, or a tokenizer was trained
                again since.
        """
        tokens = TokenDataset.load(self.tokens_path)
        for name, fingerprint in self.tokenizer_fingerprints().items():
            made_from = tokens.made_from.get(name, "unknown")
            if made_from != fingerprint:
                raise ValueError(
                    f"{self.tokens_path}: made with another {name} ({made_from}) "
                    f"than the one in the folder now ({fingerprint}); run cogview encode again"
                )
        return tokens

    def split(self, tokens: TokenDataset) -> tuple[TokenDataset, TokenDataset]:
        """Pairs for training and held-out ones, as the settings say.

        Raises:
            ValueError: the image tokenizer was trained on a held-out image, or there are fewer than
                two different images.
        """
        train, out = tokens.split(self.config.data.held_out_fraction, self.config.seed)
        keys = np.unique(tokens.image_keys[tokens.image_of[out.rows]])
        seen = np.isin(keys, self.image_tokenizer().trained_on).sum()
        if seen:
            raise ValueError(
                f"data.held_out_fraction, seed, or held_out of the data: {seen} of {len(keys)} "
                f"held-out images are among those that {self.image_tokenizer_path} was trained on; "
                "set back what was changed since, or train an image tokenizer in a new run folder"
            )
        return train, out

    def weights(self) -> Weights:
        """The weights of the newest checkpoint, or else of `model.safetensors`, on the CPU.

        Raises:
            FileNotFoundError, ValueError: there are none, they are damaged, or the settings of the
                model are not those that they were trained with.
        """
        state = load_latest(self.checkpoints)
        if state is not None:
            source = f"{self.checkpoints}, step {state['step']},"
            made_from, step = state["made_from"], state["step"]
            weights = Weights(state["model"], state["config"], made_from, step, source, True)
        elif self.weights_path.is_file():
            weights = load_weights_file(self.weights_path)
        else:
            raise FileNotFoundError(
                f"{self.checkpoints}: expected a checkpoint in it, got none; run cogview train "
                "first"
            )
        check_settings(
            weights.config, dataclasses.asdict(self.config), DRAWING_SETTINGS, weights.source
        )
        return weights

    def initial_weights(self) -> Weights | None:
        """What the training of the GPT starts from, if that is not random: `model.safetensors`,
        unless there are checkpoints.

        Raises:
            ValueError: the file is damaged, or its tokenizers are not those in the folder.
        """
        if not self.weights_path.is_file() or list_checkpoints(self.checkpoints):
            return None
        weights = load_weights_file(self.weights_path)
        self._check_tokenizers(weights)
        return weights

    def started_from(self) -> dict[str, str]:
        """The fingerprint of the weights that the GPT started from, if they were not random."""
        if not self.weights_path.is_file():
            return {}
        metadata = read_metadata(self.weights_path)
        step, known = metadata.get("step", "?"), metadata.get("fingerprint", "unknown")
        return {"initial weights": f"{known}, step {step}"}

    def export(
        self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
    ) -> list[Path]:
        """Writes weights, tokenizers and settings to a folder that other programs can read, and
        that `Run.open` and `Run.start_from` take for a run.

        Args:
            dtype: of the GPT's weights.

        Returns:
            the files.

        Raises:
            FileExistsError: the folder is a run already.
            FileNotFoundError, ValueError: something of the run is missing or does not fit.
        """
        other = Run(folder, self.config)
        if (other.path / "config.yaml").exists():
            raise FileExistsError(f"--out: expected a new folder, got a run: {folder}")
        weights = self.weights()
        self._check_tokenizers(weights)
        image_tokenizer = self.image_tokenizer()
        self.text_tokenizer().save(other.text_tokenizer_path)
        image_tokenizer.save(other.image_tokenizer_path)
        codes = other.image_tokenizer_path.with_suffix(".safetensors")
        save_tensors(codes, image_tokenizer.state_dict())
        save_weights(other.weights_path, weights.to(dtype))
        other.save_config()
        return sorted(path for path in other.path.iterdir() if path.is_file())

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
        if list_checkpoints(self.checkpoints) or self.weights_path.is_file():
            path = self.weights_path if self.weights_path.is_file() else self.checkpoints
            raise ValueError(
                f"{path}: trained with the {tokenizer} in the folder, and useless with another; "
                "use a new run folder, or move the weights away"
            )

    def model(self, task: str = "text_to_image") -> GPT:
        """The newest checkpoint, or else `model.safetensors`, in evaluation mode on the device;
        float32 on the CPU, on a GPU the dtype of `training.precision`.

        Raises:
            FileNotFoundError, ValueError: there is none, it has other settings or was trained for
                another task, or a tokenizer was trained again since.
        """
        if self.config.training.task != task:
            does = {"text_to_image": "draw images", "captioning": "write captions"}[task]
            raise ValueError(
                f"training.task: expected {task} to {does}, got {self.config.training.task}"
            )
        weights = self.weights()
        self._check_tokenizers(weights)
        model = GPT(self.config.model, self.config.vocabulary.padded_size)
        load_weights(model, weights.tensors, weights.source)
        dtype = torch.float32
        if self.device.type == "cuda":
            dtype = compute_dtype(self.config.training.precision, self.device)
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
            TypeError: one string instead of a list.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions: expected a list of captions, got one string, {captions!r}")
        tokenizer = self.text_tokenizer()
        texts = [tokenizer.encode(caption) for caption in captions]
        for caption, text in zip(captions, texts, strict=True):
            if len(text) > self.config.max_text_len:
                raise ValueError(
                    f"caption: expected at most {self.config.max_text_len} pieces beside an "
                    f"image, as model.max_positions leaves, got {len(text)} in {caption[:60]!r}..."
                )
        warn_of_unknown_characters(tokenizer, captions)
        if self.config.sampling.guidance != 1 and not self.config.training.caption_dropout:
            warnings.warn(
                f"sampling.guidance: {self.config.sampling.guidance:g}, of a model that was "
                "trained with training.caption_dropout=0, and has never drawn without a caption",
                stacklevel=2,
            )
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


def _copy_missing(source: Path, target: Path) -> None:
    """Copies a file or folder, unless there is none or the target has one."""
    if target.exists():
        return
    if source.is_dir():
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        partial.replace(target)
    elif source.is_file():
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def _check_setting(key: str, path: Path, actual: object, expected: object) -> None:
    if actual != expected:
        raise ValueError(
            f"{key}: {path} has {actual}, the settings say {expected}; set it back, or train the "
            "tokenizer again"
        )
