"""The command `cogview`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from PIL import Image

from cogview.checkpoint import check_settings, load_latest, load_weights
from cogview.config import Config, RunFolder, load_config, preset_names, save_config, to_yaml
from cogview.data.captions import CaptionedImages
from cogview.data.images import read_image
from cogview.data.tokens import TokenDataset
from cogview.demo.main import run_demo
from cogview.files import atomic_write
from cogview.image_tokenizer import ImageTokenizer, train_image_tokenizer
from cogview.model import GPT
from cogview.plots import save_grid
from cogview.sample import draw_images, write_captions
from cogview.text_tokenizer import TextTokenizer
from cogview.train import MODEL_SETTINGS, Trainer, choose_device, split_data

DESCRIPTION = """\
CogView: draw images from text with one transformer over text and image tokens.

To see it work, without any data of your own (minutes on two CPU cores):

  cogview demo --out results/demo
  cogview sample --run results/demo "a seven and a three above a two and a nine"

With a folder of your own images, and captions.tsv in it (file name, tab, caption):

  cogview train-text-tokenizer  --run runs/mine --data photos --preset small
  cogview train-image-tokenizer --run runs/mine --data photos
  cogview encode                --run runs/mine --data photos
  cogview train                 --run runs/mine
  cogview sample                --run runs/mine "a red bird on a branch" --num 4

A run folder holds everything that belongs to a model. Each command reads the settings in it; a new
folder takes its settings from a preset. `--set key=value` changes settings, for example
--set training.steps=500 model.num_layers=6. If `cogview train` was interrupted, run it again: it
resumes from its newest checkpoint. Every other command starts from the beginning.
"""

# Errors that the user or the system caused; torch raises RuntimeError, for example out of memory.
_REPORTED_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    RuntimeError,
    MemoryError,
    yaml.YAMLError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        the exit code: 0; 2 for an error of the user or the system (one line on standard error); 130
            for Ctrl-C; 141 if standard output was closed, as `head` does.
    """
    args = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        args.run_command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Discard the remaining output; otherwise Python reports the closed pipe when it exits.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        return 141
    except _REPORTED_ERRORS as error:
        if args.debug:
            traceback.print_exc()
        print(f"cogview: error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        next_start = "starts from the beginning"
        if args.run_command is _train:
            next_start = "resumes from the newest checkpoint, if there is one"
        print(f"\ncogview: stopped; the same command {next_start}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="cogview", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings"
    )
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument(
        "--run", required=True, metavar="FOLDER", type=RunFolder, help="the run folder of the model"
    )
    preset = argparse.ArgumentParser(add_help=False)
    preset.add_argument(
        "--preset", metavar="NAME", help="settings of a new run folder: a preset or a YAML file"
    )
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "--data",
        required=True,
        metavar="FOLDER",
        help="images, and captions.tsv, .csv or .jsonl with path and caption",
    )
    data.add_argument(
        "--skip-bad", action="store_true", help="skip images and captions that cannot be read"
    )

    def add(
        name: str, function: object, help: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, parents=[*parents, common])
        command.set_defaults(run_command=function)
        return command

    command = add(
        "demo",
        _demo,
        "train on handwritten digits, draw captions, and measure how many digits are right",
    )
    command.add_argument(
        "--out", default="results/demo", metavar="FOLDER", help="where the results go (%(default)s)"
    )
    command.add_argument(
        "--preset", default="digits", metavar="NAME", help="preset or YAML file (%(default)s)"
    )

    add(
        "train-text-tokenizer",
        _train_text_tokenizer,
        "train the SentencePiece model on captions",
        run,
        data,
        preset,
    )
    add(
        "train-image-tokenizer",
        _train_image_tokenizer,
        "train the VQVAE on images",
        run,
        data,
        preset,
    )
    add(
        "encode",
        _encode,
        "turn images and captions into tokens, with the two tokenizers",
        run,
        data,
    )
    add("train", _train, "train the transformer on the tokens, or resume its training", run)

    command = add("sample", _sample, "draw images from captions", run)
    command.add_argument("captions", nargs="*", metavar="CAPTION", help="what to draw")
    command.add_argument("--file", type=Path, help="read captions from a text file, one per line")
    command.add_argument("--num", type=int, default=1, help="images for each caption (%(default)s)")
    command.add_argument(
        "--seed", type=int, default=0, help="a different seed gives other images (%(default)s)"
    )
    command.add_argument(
        "--image", type=Path, help="complete this image: keep its upper rows of codes"
    )
    command.add_argument(
        "--keep", type=int, metavar="N", help="number of codes to keep of --image (default: half)"
    )
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the images go (default: RUN/samples)"
    )

    command = add(
        "caption",
        _caption,
        "write captions, with a model trained with training.task=captioning",
        run,
    )
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help="a different seed gives other captions (%(default)s)",
    )

    command = add(
        "info",
        _info,
        "list the presets, or show the settings of a preset, a YAML file or a run folder",
    )
    command.add_argument("name", nargs="?", metavar="NAME", help="preset, YAML file or run folder")
    return parser


def _demo(args: argparse.Namespace) -> None:
    run_demo(load_config(args.preset, args.set), args.out, progress=not args.quiet)


def _train_text_tokenizer(args: argparse.Namespace) -> None:
    config = _run_config(args)
    images = _images(args, config)
    settings = config.text_tokenizer
    TextTokenizer.train(
        images.captions,
        args.run.text_tokenizer,
        settings.vocab_size,
        model_type=settings.model_type,
        character_coverage=settings.character_coverage,
    )
    _keep_config(args, config)
    print(f"{len(images)} captions, {settings.vocab_size} pieces: {args.run.text_tokenizer}")


def _train_image_tokenizer(args: argparse.Namespace) -> None:
    config = _run_config(args)
    training = config.image_training
    images = _images(args, config)
    trained, metrics = train_image_tokenizer(
        config.image_tokenizer,
        images,
        steps=training.steps,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        seed=config.seed,
        device=choose_device(config.device),
        progress=not args.quiet,
    )
    trained.save(args.run.image_tokenizer)
    _keep_config(args, config)
    error = metrics[-1]["reconstruction_loss"]
    print(f"{len(images)} images, reconstruction loss {error:.4f}: {args.run.image_tokenizer}")


def _encode(args: argparse.Namespace) -> None:
    config = _run_config(args)
    text_tokenizer, image_tokenizer = _tokenizers(args.run, config)
    images = _images(args, config)
    data = TokenDataset.tokenize(
        images.captions, images, text_tokenizer, image_tokenizer, progress=not args.quiet
    )
    data.save(args.run.tokens)
    _keep_config(args, config)
    clipped = sum(len(data[i][0]) > config.max_text_len for i in range(len(data)))
    note = (
        f" ({clipped} captions are longer than {config.max_text_len} pieces and will be truncated)"
        if clipped
        else ""
    )
    print(f"{len(data)} pairs{note}: {args.run.tokens}")


def _train(args: argparse.Namespace) -> None:
    config = _run_config(args)
    train_data, held_out_data = split_data(TokenDataset.load(args.run.tokens), config)
    trainer = Trainer(config, args.run.path, train_data, held_out_data, progress=not args.quiet)
    _keep_config(args, config)
    if trainer.step:
        print(f"resuming from step {trainer.step}")
    trainer.run()
    losses = trainer.evaluate()
    print(
        f"step {trainer.step}, held-out loss: image {losses['image_loss']:.4f}, "
        f"text {losses['text_loss']:.4f} nats per token: {args.run.checkpoints}"
    )


def _sample(args: argparse.Namespace) -> None:
    config = _run_config(args)
    captions = list(args.captions)
    if args.file is not None:
        captions += [
            line for line in args.file.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    if not captions:
        raise ValueError("captions: expected at least one, on the command line or with --file")
    if args.num < 1:
        raise ValueError(f"--num: expected 1 or more, got {args.num}")
    captions = [caption for caption in captions for _ in range(args.num)]
    text_tokenizer, image_tokenizer = _tokenizers(args.run, config)
    texts = [text_tokenizer.encode(caption) for caption in captions]
    beginnings = None
    if args.image is not None:
        keep = config.num_codes // 2 if args.keep is None else args.keep
        if not 0 <= keep <= config.num_codes:
            raise ValueError(f"--keep: expected 0 to {config.num_codes} codes, got {keep}")
        kept_codes = _codes(image_tokenizer, [args.image]).flatten()[:keep].tolist()
        beginnings = [kept_codes] * len(captions)
    elif args.keep is not None:
        raise ValueError("--keep: expected --image with it, got no --image")
    model = _model(args.run, config)
    codes = draw_images(model, config, texts, args.seed, beginnings, progress=not args.quiet)
    images = image_tokenizer.decode(codes).cpu()
    out = args.out or args.run.path / "samples"
    for number, image in enumerate(images):
        with atomic_write(out / f"{number:04d}.png") as temporary:
            _to_pillow(image).save(temporary, format="png")
    save_grid(images, captions, out / "grid.png")
    print(f"{len(images)} images: {out}")


def _caption(args: argparse.Namespace) -> None:
    config = _run_config(args)
    if config.training.task != "captioning":
        raise ValueError(
            f"training.task: expected captioning to write captions, got {config.training.task}"
        )
    text_tokenizer, image_tokenizer = _tokenizers(args.run, config)
    codes = _codes(image_tokenizer, args.images)
    model = _model(args.run, config)
    captions = write_captions(model, config, codes, args.seed, progress=not args.quiet)
    for path, pieces in zip(args.images, captions, strict=True):
        print(f"{path}\t{text_tokenizer.decode(pieces)}")


def _info(args: argparse.Namespace) -> None:
    if args.name is None:
        print(f"{'preset':<12}{'parameters':>15}{'layers':>8}{'hidden':>8}{'heads':>7}   image")
        for name in preset_names():
            config = load_config(name, args.set)
            model, image = config.model, config.image_tokenizer
            print(
                f"{name:<12}{_num_parameters(config):>15,}{model.num_layers:>8}"
                f"{model.hidden_size:>8}{model.num_heads:>7}   "
                f"{image.image_size}x{image.image_size} pixels, "
                f"{image.code_size}x{image.code_size} codes"
            )
        return
    in_folder = RunFolder(args.name).config
    config = load_config(in_folder if in_folder.is_file() else args.name, args.set)
    print(
        f"# {_num_parameters(config):,} parameters, vocabulary of {config.vocabulary.padded_size}"
    )
    print(to_yaml(config), end="")


def _run_config(args: argparse.Namespace) -> Config:
    """The settings of the run folder, or of the preset for a new folder, changed by --set."""
    preset = getattr(args, "preset", None)
    run = args.run
    if preset is None and not run.config.is_file():
        raise ValueError(
            f"{run.path}: expected config.yaml in it, got none; start a new run by training a "
            "tokenizer with --preset"
        )
    results = (run.text_tokenizer, run.image_tokenizer, run.tokens, run.checkpoints, run.metrics)
    if preset is not None and run.config.is_file() and any(path.exists() for path in results):
        raise ValueError(
            f"--preset: {run.config} already holds the settings; change them with --set"
        )
    return load_config(run.config if preset is None else preset, args.set)


def _keep_config(args: argparse.Namespace, config: Config) -> None:
    """Saves new settings in the run folder, once the command has succeeded with them."""
    if getattr(args, "preset", None) is not None or args.set:
        save_config(config, args.run.config)


def _images(args: argparse.Namespace, config: Config) -> CaptionedImages:
    size, channels = config.image_tokenizer.image_size, config.image_tokenizer.channels
    return CaptionedImages(
        args.data, size, channels, skip_bad=args.skip_bad, progress=not args.quiet
    )


def _tokenizers(run: RunFolder, config: Config) -> tuple[TextTokenizer, ImageTokenizer]:
    text_tokenizer = TextTokenizer.load(run.text_tokenizer)
    image_tokenizer = ImageTokenizer.load(run.image_tokenizer, device=choose_device(config.device))
    for unit, actual, expected in (
        ("pieces", text_tokenizer.vocab_size, config.text_tokenizer.vocab_size),
        ("codes", image_tokenizer.config.codebook_size, config.image_tokenizer.codebook_size),
        ("codes per side", image_tokenizer.config.code_size, config.image_tokenizer.code_size),
    ):
        if actual != expected:
            raise ValueError(
                f"{run.path}: expected a tokenizer of {expected} {unit} as in the settings, got "
                f"{actual}; train the tokenizer again, or set the settings back"
            )
    return text_tokenizer, image_tokenizer


def _model(run: RunFolder, config: Config) -> GPT:
    state = load_latest(run.checkpoints)
    if state is None:
        raise FileNotFoundError(
            f"{run.checkpoints}: expected a checkpoint in it, got none; run cogview train first"
        )
    device = choose_device(config.device)
    source = f"{run.checkpoints}, step {state['step']},"
    check_settings(state["config"], dataclasses.asdict(config), MODEL_SETTINGS, source)
    model = GPT(config.model, config.vocabulary.padded_size)
    load_weights(model, state["model"], source)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def _codes(tokenizer: ImageTokenizer, paths: Sequence[Path]) -> torch.Tensor:
    size, channels = tokenizer.config.image_size, tokenizer.config.channels
    return tokenizer.encode(torch.stack([read_image(path, size, channels) for path in paths])).cpu()


def _to_pillow(image: torch.Tensor) -> Image.Image:
    """(C, H, W) in [0, 1] to 8 bits."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _num_parameters(config: Config) -> int:
    with torch.device("meta"):
        model = GPT(config.model, config.vocabulary.padded_size)
    return sum(parameter.numel() for parameter in model.parameters())


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"cogview: warning: {message}", file=sys.stderr)
