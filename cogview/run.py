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
from collections.abc import Iterator, Sequence
from pathlib import Path

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
from cogview.text_tokenizer import TextTokenizer
from cogview.train import MODEL_SETTINGS, start_from
from cogview.weights import Weights, load_weights_file, read_metadata, save_tensors, save_weights


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
        path, source = Path(path), Path(source)
        folder = source if source.is_dir() else source.parent
        own = path / "config.yaml"
        settings = own if own.is_file() else folder / "config.yaml"
        if not settings.is_file():
            raise FileNotFoundError(
                f"--init-from: expected a run folder or a folder of cogview export, with "
                f"config.yaml in it, got {source}"
            )
        run, other = cls(path, load_config(settings, overrides)), cls(folder, Config())
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
            check_made_from(weights.made_from, run.tokenizer_fingerprints(), weights.source)
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
        tokenizer = TextTokenizer.load(self.text_tokenizer_path)
        self._check_size("pieces", tokenizer.vocab_size, self.config.text_tokenizer.vocab_size)
        return tokenizer

    def image_tokenizer(self) -> ImageTokenizer:
        """On the device of the settings.

        Raises:
            FileNotFoundError, ValueError: there is none, or not one of these settings.
        """
        tokenizer = ImageTokenizer.load(self.image_tokenizer_path, device=self.device)
        has, wants = tokenizer.config, self.config.image_tokenizer
        self._check_size("codes", has.codebook_size, wants.codebook_size)
        self._check_size("codes per side", has.code_size, wants.code_size)
        return tokenizer

    def _check_size(self, unit: str, actual: int, expected: int) -> None:
        if actual != expected:
            raise ValueError(
                f"{self.path}: expected a tokenizer of {expected} {unit} as in the settings, got "
                f"{actual}; train the tokenizer again, or set the settings back"
            )

    def tokenizer_fingerprints(self) -> dict[str, str]:
        return {
            "text tokenizer": self.text_tokenizer().fingerprint,
            "image tokenizer": self.image_tokenizer().fingerprint,
        }

    def tokens(self) -> TokenDataset:
        """The training data, made by the tokenizers that are in the folder now.

        Raises:
            FileNotFoundError, ValueError: there is none, it is damaged, or a tokenizer was trained
                again since.
        """
        tokens = TokenDataset.load(self.tokens_path)
        for name, fingerprint in self.tokenizer_fingerprints().items():
            if tokens.made_from.get(name) != fingerprint:
                raise ValueError(
                    f"{self.tokens_path}: made with another {name} ({tokens.made_from.get(name)}) "
                    f"than the one in the folder now ({fingerprint}); run cogview encode again"
                )
        return tokens

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
            weights = Weights(state["model"], state["config"], made_from, step, source)
        elif self.weights_path.is_file():
            weights = load_weights_file(self.weights_path)
        else:
            raise FileNotFoundError(
                f"{self.checkpoints}: expected a checkpoint in it, got none; run cogview train "
                "first"
            )
        check_settings(
            weights.config, dataclasses.asdict(self.config), MODEL_SETTINGS, weights.source
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
        check_made_from(weights.made_from, self.tokenizer_fingerprints(), weights.source)
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
        check_made_from(weights.made_from, self.tokenizer_fingerprints(), weights.source)
        for name in ("text_tokenizer_path", "image_tokenizer_path"):
            _copy_missing(getattr(self, name), getattr(other, name))
        save_weights(other.weights_path, weights.to(dtype))
        codes = other.image_tokenizer_path.with_suffix(".safetensors")
        save_tensors(codes, self.image_tokenizer().state_dict())
        other.save_config()
        return sorted(path for path in other.path.iterdir() if path.is_file())

    def model(self) -> GPT:
        """The newest checkpoint, or else `model.safetensors`, in evaluation mode on the device;
        float32 on the CPU, on a GPU the dtype of `training.precision`.

        Raises:
            FileNotFoundError, ValueError: there is none, it has other settings, or a tokenizer was
                trained again since.
        """
        weights = self.weights()
        check_made_from(weights.made_from, self.tokenizer_fingerprints(), weights.source)
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
        """
        texts = [self.text_tokenizer().encode(caption) for caption in captions]
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
        task = self.config.training.task
        if task != "captioning":
            raise ValueError(f"training.task: expected captioning to write captions, got {task}")
        codes = self.codes(paths)
        rows = write_captions(self.model(), self.config, codes, seed, progress=progress)
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
