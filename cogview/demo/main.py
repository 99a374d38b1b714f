"""The demonstration: trains a whole CogView on handwriting, and measures how well it draws.

It composes scenes with captions from real handwritten digits, and trains a text tokenizer, an image
tokenizer and the GPT on them. Then the GPT draws captions whose combination of digits it has never
seen, and a classifier, trained on handwriting that no other part has seen, reads the digits.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cogview.config import Config, to_yaml
from cogview.data.images import picture_grid, to_pillow
from cogview.data.tokens import TokenDataset
from cogview.demo.digits import CANVAS_SIZE, make_scenes
from cogview.demo.reader import DigitReader, caption_accuracy
from cogview.files import atomic_write
from cogview.image_training import ImageTokenizerTrainer
from cogview.loop import read_metrics
from cogview.plots import save_curves, save_grid
from cogview.run import Run
from cogview.sample import draw_images
from cogview.text_tokenizer import TextTokenizer
from cogview.train import Trainer

NUM_TRAIN_SCENES = 9000
NUM_TEST_SCENES = 128  # of four digits each; the GPT draws all of them
NUM_SHOWN = 16
JITTER = 0  # digits in the middle of their quarters: shifted ones take longer to learn
MARKER = ".demonstration"
RESULTS = ("metrics.json", "samples.png", "reconstructions.png", "curves.png")

UNITS = {
    "loss": "loss",
    "text_loss": "text loss (nats per token)",
    "image_loss": "image loss (nats per token)",
    "held_out_text_loss": "held-out text loss (nats per token)",
    "held_out_image_loss": "held-out image loss (nats per token)",
    "reconstruction_loss": "mean squared error (normalised)",
    "learning_rate": "learning rate",
}


def run_demo(
    config: Config, folder: str | os.PathLike[str], progress: bool = True
) -> dict[str, Any]:
    """Trains everything, draws held-out captions, reads them, and writes the results to `folder`.

    A demonstration that was stopped goes on where it was, if the settings are the same. One that is
    finished, or had other settings, is deleted first. Afterwards `cogview sample --run FOLDER`
    draws more captions.

    Args:
        config: settings, such as the preset `digits`.
        folder: folder for samples.png, reconstructions.png, curves.png, metrics.json, config.yaml,
            the tokenizers and the checkpoints.
        progress: show progress bars if standard error is a terminal.

    Returns:
        the content of metrics.json.

    Raises:
        ValueError: the configuration does not fit the scenes (64x64 pixels, one channel), or the
            folder holds a run on other data, which stays untouched.
        Stopped: SIGTERM or Ctrl-C came during a training; the step that was running is saved.
        OSError: the folder cannot be written, or another process writes to it.
    """
    run = Run(folder, config)
    _check(config, run)
    with run.writing():
        return _run_demo(config, run, progress)


def _run_demo(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    device = run.device
    seconds: dict[str, float] = {}
    if resumed := _is_unfinished(run):
        print(f"going on with {run.path}", flush=True)
    else:
        for path in [run.path / name for name in RESULTS] + run.results():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        run.save_config()
        (run.path / MARKER).write_text("a demonstration, which `cogview demo` may delete\n")
    print(f"CogView on handwriting, on {device}, to {run.path}", flush=True)

    with _stage("scenes", seconds):
        train = make_scenes("train", NUM_TRAIN_SCENES, config.seed, JITTER)
        test = make_scenes("test", NUM_TEST_SCENES, config.seed, JITTER)
    with _stage("text tokenizer", seconds):
        text = config.text_tokenizer
        text_tokenizer = TextTokenizer.train(
            train.captions,
            run.text_tokenizer_path,
            text.vocab_size,
            model_type=text.model_type,
            character_coverage=text.character_coverage,
        )
    with _stage("image tokenizer", seconds):
        image_trainer = ImageTokenizerTrainer(
            config,
            run.image_training,
            train.images,
            test.images,
            {"data": f"scenes {NUM_TRAIN_SCENES}"},
            progress=progress,
        )
        image_trainer.run()
        image_tokenizer = image_trainer.model
        image_tokenizer.save(run.image_tokenizer_path)
    with _stage("image codes", seconds):
        tokens = TokenDataset.encode(
            run.tokens_path,
            train.captions + test.captions,
            torch.cat([train.images, test.images]),
            text_tokenizer,
            image_tokenizer,
            held_out=np.repeat(
                np.array([0, 1], np.int8), [len(train.captions), len(test.captions)]
            ),
            progress=progress,
        )
        train_data, test_data = tokens.split(config.data.held_out_fraction, config.seed)
        test_codes = torch.tensor(tokens.codes[len(train.captions) :])
        reconstructions = image_tokenizer.decode(test_codes).cpu()
    with _stage("gpt", seconds):
        made_from = run.tokenizer_fingerprints() | {"tokens": tokens.fingerprint}
        trainer = Trainer(config, run.path, train_data, test_data, made_from, progress=progress)
        trainer.run()
        model = trainer.model
    with _stage("drawing", seconds):
        texts = [text_tokenizer.encode(caption) for caption in test.captions]
        codes = draw_images(model, config, texts, seed=config.seed, progress=progress)
        drawings = image_tokenizer.decode(codes).cpu()
    with _stage("reading back", seconds):
        reader = DigitReader(seed=config.seed)
        read = {
            "real": reader.read(test.images),
            "reconstructed": reader.read(reconstructions),
            "drawn": reader.read(drawings),
        }
        accuracy = {name: caption_accuracy(digits, test.labels) for name, digits in read.items()}

    image_metrics = read_metrics(image_trainer.metrics_path)
    gpt_metrics = read_metrics(trainer.metrics_path)
    result: dict[str, Any] = {
        "caption_accuracy": accuracy["drawn"]["digit_accuracy"],
        "chance": 0.1,
        "accuracy": accuracy,
        "num_drawings": len(drawings),
        "held_out_image_loss": gpt_metrics[-1]["held_out_image_loss"],
        "held_out_caption_gap": gpt_metrics[-1].get("held_out_caption_gap"),
        "reconstruction_error": float((reconstructions - test.images).square().mean()),
        "codes_used": test_codes.unique().numel(),
        "sampling": {
            "temperature": config.sampling.temperature,
            "top_k": config.sampling.top_k,
            "top_p": config.sampling.top_p,
        },
        "attention": attention_sparsity(config, trainer, test_data),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": _describe(device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seed": config.seed,
        "seconds": seconds,  # of this process
        "resumed": resumed,
    }
    right = (read["drawn"] == test.labels).all(1).tolist()
    save_grid(
        drawings[:NUM_SHOWN],
        test.captions[:NUM_SHOWN],
        run.path / "samples.png",
        right=right[:NUM_SHOWN],
        title="Drawn from captions that were held out",
    )
    pairs = torch.cat([test.images[:8], reconstructions[:8]])  # each above what the codes keep
    with atomic_write(run.path / "reconstructions.png") as temporary:
        to_pillow(picture_grid(1 - pairs)).save(temporary, format="png")  # ink on paper
    curves = {"image tokenizer": _plotted(image_metrics), "gpt": _plotted(gpt_metrics)}
    save_curves(curves, run.path / "curves.png", UNITS)
    with atomic_write(run.path / "metrics.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(report(result, run), flush=True)
    return result


def attention_sparsity(config: Config, trainer: Trainer, data: TokenDataset) -> dict[str, float]:
    """How much of a whole sequence the attention reads.

    Returns:
        `attended_fraction`: number of attended keys over the number that causal attention would
        attend to, summed over all rows; `longest_list_fraction`: number of keys in the row that
        attends to most, over the length of the sequence.
    """
    batch = trainer._batch(data, torch.arange(min(8, len(data))).numpy())
    size, length = batch.tokens.shape
    generator = torch.Generator(trainer.device).manual_seed(config.seed)
    layout = trainer.model.sample_layouts(batch.text_len, length, generator)[0]
    if layout is None:
        return {"attended_fraction": 1.0, "longest_list_fraction": 1.0}
    keys = layout.dense_mask(size, length, length).sum(-1)
    causal = size * length * (length + 1) / 2
    return {
        "attended_fraction": keys.sum().item() / causal,
        "longest_list_fraction": keys.max().item() / length,
    }


def report(result: dict[str, Any], run: Run) -> str:
    """The table that the demonstration prints at its end."""
    lines = ["", "                          digits right   captions all right"]
    for name, scores in result["accuracy"].items():
        digits, captions = scores["digit_accuracy"], scores["whole_caption_accuracy"]
        lines.append(f"{name + ' scenes':<26}{digits:>10.1%}{captions:>18.1%}")
    lines.append(f"{'chance':<26}{0.1:>10.1%}{0.0001:>18.2%}")
    attention, sampling = result["attention"], result["sampling"]
    lines += [
        "",
        f"caption accuracy          {result['caption_accuracy']:.1%} of the drawn digits are "
        f"right, in the right place ({result['num_drawings']} held-out captions)",
        f"sampling                  temperature {sampling['temperature']}, "
        f"top-k {sampling['top_k']}, top-p {sampling['top_p']}",
        f"attention                 {attention['attended_fraction']:.0%} of the causal keys; "
        f"at most {attention['longest_list_fraction']:.0%} of the sequence in one row",
        f"time                      {sum(result['seconds'].values()):.0f} s on {result['device']}",
        f"results                   {run.path}/: samples.png reconstructions.png curves.png "
        "metrics.json",
    ]
    return "\n".join(lines)


def _check(config: Config, run: Run) -> None:
    for name, expected in (("image_size", CANVAS_SIZE), ("channels", 1)):
        actual = getattr(config.image_tokenizer, name)
        if actual != expected:
            raise ValueError(
                f"image_tokenizer.{name}: expected {expected}, as the demonstration's scenes have, "
                f"got {actual}"
            )
    is_demonstration = any((run.path / name).is_file() for name in (MARKER, "metrics.json"))
    if run.results() and not is_demonstration:
        raise ValueError(
            f"{run.path}: holds a run on other data ({run.results()[0].name}), which the "
            "demonstration would replace; choose another folder"
        )


def _is_unfinished(run: Run) -> bool:
    """Whether a demonstration with these settings was stopped in the folder."""
    settings = run.path / "config.yaml"
    if not ((run.path / MARKER).is_file() and settings.is_file()):
        return False
    same = settings.read_text(encoding="utf-8") == to_yaml(run.config)
    return same and not (run.path / "metrics.json").is_file()


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} {platform.machine()} CPU cores"


@contextlib.contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"{name:<18}", end="", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    print(f"{seconds[name]:7.1f} s", flush=True)


def _plotted(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The step and the quantities that have an axis label in `UNITS`."""
    return [{name: row[name] for name in ("step", *UNITS) if name in row} for row in rows]
