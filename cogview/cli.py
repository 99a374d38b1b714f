"""The command `cogview`."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where they are used: `cogview --help` must not wait for torch
    from cogview.config import Config
    from cogview.data.captions import CaptionedImages
    from cogview.loop import Loop
    from cogview.run import Run

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
folder takes its settings from a preset. `--set key=value` changes a setting, for example
--set training.steps=500 --set model.num_layers=6. If a training was interrupted, run the same
command again: it resumes from its newest checkpoint.
"""

_RESUMING = ("train", "train-image-tokenizer", "demo")


def _reported_errors() -> tuple[type[Exception], ...]:
    """Errors that the user or the system caused; torch raises RuntimeError, for example out of
    memory."""
    import yaml

    causes = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError, MemoryError)
    return (*causes, yaml.YAMLError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        the exit code: 0; 2 for an error of the user or the system (one line on standard error);
            128 + the signal for Ctrl-C and SIGTERM; 141 if standard output was closed, as `head`
            does.
    """
    args = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        return args.run_command(args) or 0
    except BrokenPipeError:
        # Discard the remaining output; otherwise Python reports the closed pipe when it exits.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        return 141
    except _reported_errors() as error:
        if args.debug:
            traceback.print_exc()
        print(f"cogview: error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = "resumes from the newest checkpoint, if there is one"
        next_start = resumes if args.command in _RESUMING else "starts from the beginning"
        print(f"\ncogview: stopped; the same command {next_start}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="cogview", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be given several times",
    )
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument(
        "--run", required=True, metavar="FOLDER", type=Path, help="the run folder of the model"
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
        command.set_defaults(run_command=function, command=name)
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
        "train the VQVAE on images, or resume its training",
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


def _demo(args: argparse.Namespace) -> int:
    from cogview.config import load_config
    from cogview.demo.main import run_demo

    config = load_config(args.preset, args.set)
    return _until_stopped(lambda: run_demo(config, args.out, progress=not args.quiet))


def _train_text_tokenizer(args: argparse.Namespace) -> None:
    from cogview.text_tokenizer import TextTokenizer

    run = _new_or_open(args)
    settings = run.config.text_tokenizer
    with run.writing():
        images = _images(args, run)
        tokenizer = TextTokenizer.train(
            images.captions,
            None,
            settings.vocab_size,
            model_type=settings.model_type,
            character_coverage=settings.character_coverage,
        )
        run.save_text_tokenizer(tokenizer)
        _keep_config(args, run)
    print(f"{len(images)} captions, {settings.vocab_size} pieces: {run.text_tokenizer_path}")


def _train_image_tokenizer(args: argparse.Namespace) -> int:
    from cogview.image_training import ImageTokenizerTrainer

    run = _new_or_open(args)
    with run.writing():
        images = _images(args, run)
        train_images, held_out_images = images.split(
            run.config.data.held_out_fraction, run.config.seed
        )
        trainer = ImageTokenizerTrainer(
            run.config,
            run.image_training,
            train_images,
            held_out_images,
            {"data": images.fingerprint},
            progress=not args.quiet,
        )
        if trainer.step < run.config.image_training.steps:
            run.check_no_checkpoints("image tokenizer")
        _keep_config(args, run)
        if code := _train_until_stopped(trainer):
            return code
        trainer.model.made_from = trainer.made_from | run.split_settings()
        trainer.model.save(run.image_tokenizer_path)
        held_out = trainer.evaluate()
    print(
        f"held-out reconstruction loss {held_out['reconstruction_loss']:.4f}, "
        f"{held_out['codes_used']} of {run.config.image_tokenizer.codebook_size} codes used "
        f"(perplexity {held_out['perplexity']:.1f}): {run.image_tokenizer_path}"
    )
    return 0


def _encode(args: argparse.Namespace) -> None:
    from cogview.data.tokens import TokenDataset
    from cogview.text_tokenizer import warn_of_unknown_characters

    run = _new_or_open(args)
    with run.writing():
        text_tokenizer, image_tokenizer = run.text_tokenizer(), run.image_tokenizer()
        images = _images(args, run)
        warn_of_unknown_characters(text_tokenizer, images.captions)
        data = TokenDataset.tokenize(
            images.captions, images, text_tokenizer, image_tokenizer, progress=not args.quiet
        )
        data.save(run.tokens_path)
        _keep_config(args, run)
    longest = run.config.max_text_len
    clipped = sum(len(data[i][0]) > longest for i in range(len(data)))
    note = (
        f" ({clipped} captions are longer than {longest} pieces and will be truncated)"
        if clipped
        else ""
    )
    print(f"{len(data)} pairs{note}: {run.tokens_path}")


def _train(args: argparse.Namespace) -> int:
    from cogview.train import Trainer

    run = _new_or_open(args)
    with run.writing():
        tokens = run.tokens()
        train_data, held_out_data = tokens.split(run.config.data.held_out_fraction, run.config.seed)
        trainer = Trainer(
            run.config,
            run.path,
            train_data,
            held_out_data,
            run.tokenizer_fingerprints() | {"tokens": tokens.fingerprint},
            progress=not args.quiet,
            image_tokenizer=run.image_tokenizer(),
        )
        _keep_config(args, run)
        if code := _train_until_stopped(trainer):
            return code
    losses = trainer.evaluate()
    print(
        f"step {trainer.step}, held-out loss: image {losses['image_loss']:.4f}, "
        f"text {losses['text_loss']:.4f} nats per token: {trainer.checkpoints}"
    )
    return 0


def _train_until_stopped(trainer: Loop) -> int:
    """The exit code of a signal that stopped it, or 0."""
    if trainer.step:
        print(f"resuming from step {trainer.step}", flush=True)
    return _until_stopped(trainer.run)


def _until_stopped(function: Callable[[], object]) -> int:
    from cogview.loop import Stopped

    try:
        function()
    except Stopped as stopped:
        print(f"cogview: {stopped}; the same command goes on from there", file=sys.stderr)
        return 128 + stopped.signal
    return 0


def _sample(args: argparse.Namespace) -> None:
    from cogview.data.images import to_pillow
    from cogview.files import atomic_write
    from cogview.plots import save_grid
    from cogview.run import Run

    run = Run.open(args.run, args.set)
    captions = list(args.captions)
    for caption in captions:
        if re.match(r"[a-z_]+(\.[a-z_]+)+=", caption):
            raise ValueError(f"captions: {caption!r} looks like a setting; give it behind --set")
    if args.file is not None:
        captions += [
            line for line in args.file.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    if not captions:
        raise ValueError("captions: expected at least one, on the command line or with --file")
    if args.num < 1:
        raise ValueError(f"--num: expected 1 or more, got {args.num}")
    captions = [caption for caption in captions for _ in range(args.num)]
    beginning: list[int] = []
    if args.image is not None:
        num_codes = run.config.num_codes
        keep = num_codes // 2 if args.keep is None else args.keep
        if not 0 <= keep <= num_codes:
            raise ValueError(f"--keep: expected 0 to {num_codes} codes, got {keep}")
        beginning = run.codes([args.image]).flatten()[:keep].tolist()
    elif args.keep is not None:
        raise ValueError("--keep: expected --image with it, got no --image")
    images = run.draw(captions, args.seed, beginning, progress=not args.quiet)
    out = args.out or run.path / "samples"
    for number, image in enumerate(images):
        with atomic_write(out / f"{number:04d}.png") as temporary:
            to_pillow(image).save(temporary, format="png")
    save_grid(images, captions, out / "grid.png")
    print(f"{len(images)} images: {out}")


def _caption(args: argparse.Namespace) -> None:
    from cogview.run import Run

    captions = Run.open(args.run, args.set).caption(args.images, args.seed, not args.quiet)
    for path, caption in zip(args.images, captions, strict=True):
        print(f"{path}\t{caption}")


def _info(args: argparse.Namespace) -> None:
    from cogview.config import load_config, preset_names, to_yaml

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
    in_folder = Path(args.name) / "config.yaml"
    config = load_config(in_folder if in_folder.is_file() else args.name, args.set)
    print(
        f"# {_num_parameters(config):,} parameters, vocabulary of {config.vocabulary.padded_size}"
    )
    print(to_yaml(config), end="")


def _new_or_open(args: argparse.Namespace) -> Run:
    """The run of the folder, or with --preset a new one; its settings changed by --set."""
    from cogview.run import Run

    preset = getattr(args, "preset", None)
    if preset is None:
        return Run.open(args.run, args.set)
    return Run.create(args.run, preset, args.set)


def _keep_config(args: argparse.Namespace, run: Run) -> None:
    """Saves new settings in the run folder, once the command has started well with them."""
    if getattr(args, "preset", None) is not None or args.set:
        run.save_config()


def _images(args: argparse.Namespace, run: Run) -> CaptionedImages:
    from cogview.data.captions import CaptionedImages

    size, channels = run.config.image_tokenizer.image_size, run.config.image_tokenizer.channels
    return CaptionedImages(
        args.data, size, channels, skip_bad=args.skip_bad, progress=not args.quiet
    )


def _num_parameters(config: Config) -> int:
    import torch

    from cogview.model import GPT

    with torch.device("meta"):
        model = GPT(config.model, config.vocabulary.padded_size)
    return sum(parameter.numel() for parameter in model.parameters())


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"cogview: warning: {message}", file=sys.stderr)
