"""The command `cogview`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
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
    from cogview.data.sources import Source
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

On several GPUs:

  torchrun --nproc_per_node=8 -m -- cogview train --run runs/mine

A run folder holds everything that belongs to a model. Each command reads the settings in it; a new
folder takes its settings from a preset. `--set key=value` changes a setting, for example
--set training.steps=500 --set model.num_layers=6. If a training was interrupted, run the same
command again: it resumes from its newest checkpoint.

To go on from a finished model, with other images or for another task, in a new folder:

  cogview encode --run runs/new --init-from runs/mine --data drawings
  cogview train  --run runs/new
"""

_RESUMING = ("train", "train-image-tokenizer", "demo")


def _reported_errors() -> tuple[type[Exception], ...]:
    """Errors that the user or the system caused; torch raises RuntimeError, for example out of
    memory."""
    import yaml

    causes = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError, MemoryError)
    return (ModuleNotFoundError, *causes, yaml.YAMLError)


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
        if _process() and args.command != "train":
            raise ValueError(
                f"torchrun: expected cogview train, the command that runs on several processes, "
                f"got cogview {args.command}"
            )
        return args.run_command(args) or 0
    except BrokenPipeError:
        # Discard the remaining output; otherwise Python reports the closed pipe when it exits.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        return 141
    except _reported_errors() as error:
        if args.debug:
            traceback.print_exc()
        print(f"cogview: error{_process()}: {_message(error)}", file=sys.stderr)
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

    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--quiet", action="store_true", help="no progress bars")
    quiet.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common = argparse.ArgumentParser(add_help=False, parents=[quiet])
    common.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be given several times",
    )
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
        metavar="SOURCE",
        help="images and captions: a folder with captions.tsv, .csv or .jsonl (or metadata.*) in "
        "it, with a .txt beside each image, with WebDataset shards (*.tar) or with Parquet; a "
        "table .tsv, .csv or .jsonl; captions_*.json of COCO; shards-{000..009}.tar; .parquet; "
        "hf:owner/name of the Hugging Face hub; for the text tokenizer also a .txt of captions",
    )
    data.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="what paths of images are relative to (default: the file that names them)",
    )
    data.add_argument(
        "--image-column", default="", metavar="NAME", help="column of the image or its path"
    )
    data.add_argument(
        "--caption-column",
        action="append",
        default=[],
        metavar="NAME",
        help="column of the caption; may be given several times, for several captions an image",
    )
    data.add_argument(
        "--skip-bad",
        action="store_true",
        help="skip records that cannot be used, and list them in RUN/bad_records.txt",
    )

    initial = argparse.ArgumentParser(add_help=False)
    initial.add_argument(
        "--init-from",
        metavar="RUN|FILE",
        type=Path,
        help="start from the weights of another run, or of a model.safetensors; a new run folder "
        "takes settings and tokenizers from there",
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
        initial,
    )
    add(
        "train",
        _train,
        "train the transformer on the tokens, or resume its training",
        run,
        initial,
    )

    command = add(
        "export",
        _export,
        "write weights, tokenizers and settings for other programs, as safetensors; or weights in "
        "the layout of the released CogView",
        run,
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the files go"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights as safetensors (%(default)s)",
    )
    command.add_argument(
        "--released", action="store_true", help="in the layout of the released CogView, in float16"
    )
    command.add_argument(
        "--shards",
        type=int,
        default=1,
        metavar="N",
        help="with --released: number of model-parallel shards (%(default)s)",
    )

    command = add(
        "import-released",
        _import_released,
        "make a run of a checkpoint in the layout of the released CogView",
        run,
    )
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="with mp_rank_00_model_states.pt in it"
    )
    command.add_argument(
        "--preset",
        default="cogview-4b",
        metavar="NAME",
        help="tokenizers, training and sampling: a preset or a YAML file (%(default)s); the sizes "
        "of the transformer are those of the checkpoint",
    )
    command.add_argument(
        "--text-tokenizer", type=Path, metavar="FILE", help="its SentencePiece model"
    )
    command.add_argument("--image-tokenizer", type=Path, metavar="FILE", help="its VQVAE")

    command = add(
        "plan",
        _plan,
        "show the memory that a training takes of each GPU, and what travels between them, "
        "without a GPU",
    )
    command.add_argument(
        "--preset", default="cogview-4b", metavar="NAME", help="preset or YAML file (%(default)s)"
    )
    command.add_argument("--gpus", type=int, default=8, metavar="N", help="number (%(default)s)")
    command.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="fsdp", help="how they share (%(default)s)"
    )

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

    command = commands.add_parser(
        "prepare",
        help="make a data set that every machine can make",
        description="Make a data set that every machine can make, for --data of other commands.",
        parents=[quiet],
    )
    command.set_defaults(run_command=_prepare, command="prepare")
    command.add_argument(
        "name", choices=["emoji"], help="emoji: the colour-emoji font of the system as pictures"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the pictures go"
    )
    command.add_argument("--font", type=Path, help="a font file (default: the one fontconfig has)")
    command.add_argument(
        "--languages",
        nargs="+",
        default=["en"],
        metavar="CODE",
        help="captions in these languages, such as en zh; each picture gets all (%(default)s)",
    )
    command.add_argument(
        "--size", type=int, default=64, help="side of the pictures in pixels (%(default)s)"
    )
    command.add_argument(
        "--limit", type=int, default=0, metavar="N", help="only about N emoji, for a trial"
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
    from cogview.data.captions import read_captions
    from cogview.text_tokenizer import TextTokenizer

    run = _new_or_open(args)
    settings = run.config.text_tokenizer
    with run.writing():
        captions = read_captions(
            _source(args), skip_bad=args.skip_bad, bad_records=run.bad_records_path
        )
        tokenizer = TextTokenizer.train(
            captions,
            None,
            settings.vocab_size,
            model_type=settings.model_type,
            character_coverage=settings.character_coverage,
        )
        run.save_text_tokenizer(tokenizer)
        _keep_config(args, run)
    print(f"{len(captions)} captions, {settings.vocab_size} pieces: {run.text_tokenizer_path}")


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
    import numpy as np

    from cogview.data.loading import num_workers
    from cogview.data.tokens import TokenDataset
    from cogview.text_tokenizer import warn_of_unknown_characters

    run = _new_or_open(args)
    with run.writing():
        text_tokenizer, image_tokenizer = run.text_tokenizer(), run.image_tokenizer()
        images = _images(args, run)
        warn_of_unknown_characters(text_tokenizer, itertools.chain.from_iterable(images.captions))
        data = TokenDataset.encode(
            run.tokens_path,
            images.captions,
            images,
            text_tokenizer,
            image_tokenizer,
            held_out=images.held_out,
            workers=num_workers(run.config.data.workers, run.device),
            progress=not args.quiet,
        )
        _keep_config(args, run)
    longest = run.config.max_text_len
    clipped = int((np.diff(data.text_offsets) > longest).sum())
    note = (
        f" ({clipped} captions are longer than {longest} pieces and will be truncated)"
        if clipped
        else ""
    )
    print(f"{len(data)} captions of {len(images)} images{note}: {run.tokens_path}")


def _train(args: argparse.Namespace) -> int:
    from cogview import distributed
    from cogview.run import Run
    from cogview.train import Trainer

    if args.init_from is None:
        settings = Run.open(args.run, args.set).config
    else:
        settings = Run.before_start(args.run, args.init_from, args.set).config
    with distributed.processes(settings.device), contextlib.ExitStack() as stack:
        first = distributed.is_first()
        with distributed.first_before_others():
            if first:  # with --init-from it writes what the others read
                run = _new_or_open(args)
                stack.enter_context(run.writing())
            else:
                run = Run.open(args.run, args.set)
        tokens = run.tokens()
        train_data, held_out_data = tokens.split(run.config.data.held_out_fraction, run.config.seed)
        made_from = (
            run.tokenizer_fingerprints() | {"tokens": tokens.fingerprint} | run.started_from()
        )
        trainer = Trainer(
            run.config,
            run.path,
            train_data,
            held_out_data,
            made_from,
            progress=not args.quiet,
            initial=run.initial_weights(),
            image_tokenizer=run.image_tokenizer(),
        )
        if first:
            _keep_config(args, run)
        if code := _train_until_stopped(trainer):
            return code
        losses = trainer.evaluate()
        if first:
            gap = losses.get("caption_gap")
            print(
                f"step {trainer.step}, held-out loss: image {losses['image_loss']:.4f}, "
                f"text {losses['text_loss']:.4f} nats per token"
                + (f", {gap:.4f} more with another image's caption" if gap is not None else "")
                + f": {trainer.checkpoints}"
            )
    return 0


def _train_until_stopped(trainer: Loop) -> int:
    """The exit code of a signal that stopped it, or 0."""
    from cogview.distributed import is_first

    if trainer.step and is_first():
        print(f"resuming from step {trainer.step}", flush=True)
    return _until_stopped(trainer.run)


def _until_stopped(function: Callable[[], object]) -> int:
    from cogview.distributed import is_first
    from cogview.loop import Stopped

    try:
        function()
    except Stopped as stopped:
        if is_first():
            print(f"cogview: {stopped}; the same command goes on from there", file=sys.stderr)
        return 128 + stopped.signal
    return 0


def _export(args: argparse.Namespace) -> None:
    import torch

    from cogview.released import write_released
    from cogview.run import Run

    run = Run.open(args.run, args.set)
    if args.released:
        weights = run.weights()
        files = write_released(
            args.out, weights.tensors, run.config.model, args.shards, weights.step
        )
    elif args.shards != 1:
        raise ValueError(f"--shards: expected --released with it, got {args.shards} without")
    else:
        files = run.export(args.out, getattr(torch, args.dtype))
    print(f"{', '.join(str(file.relative_to(args.out)) for file in files)}: {args.out}")


def _import_released(args: argparse.Namespace) -> None:
    from cogview.released import import_released

    run = import_released(
        args.folder, args.run, args.preset, args.set, args.text_tokenizer, args.image_tokenizer
    )
    missing = [
        path.name
        for path in (run.text_tokenizer_path, run.image_tokenizer_path)
        if not path.is_file()
    ]
    note = f"; put {' and '.join(missing)} there to draw" if missing else ""
    print(f"{_num_parameters(run.config):,} parameters: {run.path}{note}")


def _plan(args: argparse.Namespace) -> None:
    from cogview.config import load_config
    from cogview.plan import plan

    if args.gpus < 1:
        raise ValueError(f"--gpus: expected 1 or more, got {args.gpus}")
    config = load_config(args.preset, [*args.set, f"training.parallel={args.parallel}"])
    result = plan(config, args.gpus)
    print(
        f"{args.preset}, {args.gpus} GPUs, {args.parallel}: {result.passes} passes of "
        f"{result.micro_batch_size} sequences per step and GPU"
    )
    for name, size in {**result.memory, "in all, at the peak": result.peak}.items():
        print(f"{name:<34}{size / 2**30:8.2f} GiB")
    for name, size in (("weights", result.gathered), ("gradients", result.reduced)):
        print(f"{'arrives per step, ' + name:<34}{size / 2**30:8.2f} GiB")


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


def _prepare(args: argparse.Namespace) -> None:
    from cogview.data.emoji_set import prepare_emoji

    about = prepare_emoji(
        args.out, args.font, args.languages, args.size, args.limit, progress=not args.quiet
    )
    without = len(about["not_in_the_font"]) + len(about["no_skin_tone_in_the_font"])
    print(
        f"{about['images']} emoji of {about['font']}, {about['held_out']} of them held out "
        f"({without} are not in the font): {args.out}"
    )


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
    if in_folder.is_file():
        from cogview.run import Run

        for name, value in Run(args.name, config).started_from().items():
            print(f"# {name}: {value}")
    print(
        f"# {_num_parameters(config):,} parameters, vocabulary of {config.vocabulary.padded_size}"
    )
    print(to_yaml(config), end="")


def _new_or_open(args: argparse.Namespace) -> Run:
    """The run of the folder, or with --preset a new one; its settings changed by --set."""
    from cogview.run import Run

    if getattr(args, "init_from", None) is not None:
        tokens = args.command == "train"
        return Run.start_from(args.run, args.init_from, args.set, tokens=tokens)
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
        _source(args),
        size,
        channels,
        skip_bad=args.skip_bad,
        bad_records=run.bad_records_path,
        known_keys=run.known_keys_path,
        progress=not args.quiet,
    )


def _source(args: argparse.Namespace) -> Source:
    from cogview.data.sources import Columns, open_source

    source = open_source(args.data, Columns(args.image_column, args.caption_column, args.images))
    if not args.quiet:
        print(f"data: {source.rule}")
    return source


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


def _process() -> str:
    """Which one of torchrun's processes this is, for messages; empty if it is the only one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return ""
    return f" (process {os.environ['RANK']} of {os.environ['WORLD_SIZE']})"


def _show_warning(message: Warning | str, *_: object) -> None:
    if _process() and os.environ["RANK"] != "0":
        return  # the first process says the same
    print(f"cogview: warning: {message}", file=sys.stderr)
