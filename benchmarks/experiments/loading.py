"""How fast training data is read, beside how fast the models of the preset `small` use it.

    python -m benchmarks.experiments.loading

Large photographs are read as JPEG, cropped and resized: whole, as before there was
`Image.draft`, and reduced while they are decoded; in the training process, and ahead of it in
workers. Tokens are read from arrays in memory, as before, and from mapped files.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, JpegImagePlugin
from sklearn.datasets import load_sample_images

from benchmarks import machine
from cogview.config import Config, load_config
from cogview.data.captions import CaptionedImages
from cogview.data.loading import Reader
from cogview.data.sources import open_source
from cogview.data.tokens import TokenDataset
from cogview.image_training import ImageTokenizerTrainer
from cogview.train import Trainer, make_batch

PHOTO_SIZE = (4000, 2664)  # pixels
NUM_PHOTOS = 48
NUM_SEQUENCES = 20_000
IMAGE_BATCH, TOKEN_BATCH = 16, 8
ROUNDS = 3

Measured = dict[str, Any]  # what, workers, unit, per_second


def config(workers: int = 0) -> Config:
    sizes = (f"image_training.batch_size={IMAGE_BATCH}", f"training.batch_size={TOKEN_BATCH}")
    return load_config("small", ["device=cpu", f"data.workers={workers}", *sizes])


def make_photos(folder: Path, num: int = NUM_PHOTOS, size: tuple[int, int] = PHOTO_SIZE) -> None:
    """Crops of scikit-learn's two photographs, enlarged and with the grain of a camera."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(num):
        left, top = rng.integers(0, 40, 2).tolist()
        box = (left, top, left + 600, top + 380)
        large = photos[number % 2].resize(size, Image.Resampling.BICUBIC, box)
        grain = rng.normal(0, 4, (*size[::-1], 1))
        pixels = (np.asarray(large) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=92)
        (folder / f"{number:03d}.txt").write_text(f"photograph number {number}\n")


def make_tokens(settings: Config, num: int = NUM_SEQUENCES) -> TokenDataset:
    rng = np.random.default_rng(0)
    side, offsets = settings.image_tokenizer.code_size, np.arange(num + 1) * 12
    return TokenDataset(
        rng.integers(0, settings.text_tokenizer.vocab_size, 12 * num).astype(np.int32),
        offsets,
        rng.integers(0, settings.image_tokenizer.codebook_size, (num, side, side), np.int16),
        rng.permutation(num).astype(np.uint64),
        settings.text_tokenizer.vocab_size,
        settings.image_tokenizer.codebook_size,
    )


@contextlib.contextmanager
def whole_jpegs() -> Iterator[None]:
    with mock.patch.object(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None):
        yield


def reading(
    fetch: Callable[[list[int]], Any], num: int, batch: int, workers: int, batches: int
) -> float:
    """Examples per second, without the start of the workers."""
    reader = Reader(fetch, num, 0, batch, workers)
    with contextlib.closing(reader):
        reader.read(0)
        started = time.perf_counter()
        for number in range(1, batches + 1):
            reader.read(number * batch)
        return batches * batch / (time.perf_counter() - started)


def training(trainer: ImageTokenizerTrainer | Trainer, steps: int) -> float:
    """Examples per second of the steps behind the first."""
    with contextlib.closing(trainer.reader):
        trainer.train_step()
        started = time.perf_counter()
        for _ in range(steps):
            trainer.train_step()
        return steps * trainer.settings.batch_size / (time.perf_counter() - started)


def measure(folder: Path, settings: Config, rounds: int, steps: int) -> list[Measured]:
    """The best of several rounds of each; the rounds of all alternate."""
    (folder / "photos").mkdir()
    make_photos(folder / "photos")
    size = settings.image_tokenizer.image_size
    images = CaptionedImages(open_source(folder / "photos"), size, progress=False)
    in_memory = images[list(range(len(images)))]
    arrays = make_tokens(settings)
    arrays.save(folder / "tokens")
    mapped = TokenDataset.load(folder / "tokens")
    length = make_batch(settings, arrays, [0]).tokens.shape[1]

    def image_trainer(data: Any, workers: int) -> float:
        out = Path(tempfile.mkdtemp(dir=folder))
        trainer = ImageTokenizerTrainer(config(workers), out, data, in_memory[:2], progress=False)
        return training(trainer, steps)

    def token_trainer(data: TokenDataset, workers: int) -> float:
        out = Path(tempfile.mkdtemp(dir=folder))
        return training(Trainer(config(workers), out, data, data, progress=False), steps)

    def read_images(workers: int) -> float:
        return reading(images.__getitem__, len(images), IMAGE_BATCH, workers, 3 * steps)

    def read_tokens(data: TokenDataset, workers: int) -> float:
        fetch = functools.partial(make_batch, settings, data)
        return reading(fetch, len(data), 64, workers, 20 * steps)

    def whole(function: Callable[..., float], *arguments: Any) -> float:
        with whole_jpegs():
            return function(*arguments)

    plan: list[tuple[str, int, str, Callable[[], float]]] = [
        ("photographs, decoded whole (before)", 0, "images", lambda: whole(read_images, 0)),
        *(
            ("photographs, reduced while decoded", n, "images", functools.partial(read_images, n))
            for n in (0, 1, 2)
        ),
        ("the image tokenizer's steps alone", 0, "images", lambda: image_trainer(in_memory, 0)),
        (
            "its training on photographs decoded whole (before)",
            0,
            "images",
            lambda: whole(image_trainer, images, 0),
        ),
        *(
            (
                "its training on photographs",
                n,
                "images",
                functools.partial(image_trainer, images, n),
            )
            for n in (0, 1)
        ),
        ("tokens in memory (before)", 0, "tokens", lambda: read_tokens(arrays, 0)),
        *(
            ("tokens in mapped files", n, "tokens", functools.partial(read_tokens, mapped, n))
            for n in (0, 1, 2)
        ),
        *(
            (
                "the GPT's training on mapped tokens",
                n,
                "tokens",
                functools.partial(token_trainer, mapped, n),
            )
            for n in (0, 1)
        ),
    ]
    best = [0.0] * len(plan)
    for number in range(rounds):
        for index, (what, workers, unit, run) in enumerate(plan):
            rate = run() * (length if unit == "tokens" else 1)
            best[index] = max(best[index], rate)
            print(
                f"round {number + 1}: {what}, {workers} workers: {rate:,.0f} {unit}/s", flush=True
            )
    return [
        {"what": what, "workers": workers, "unit": unit, "per_second": rate}
        for (what, workers, unit, _), rate in zip(plan, best, strict=True)
    ]


def table(record: dict[str, Any]) -> str:
    rows = ["| what | workers | per second |", "|---|---:|---:|"]
    for row in record["rows"]:
        rows.append(
            f"| {row['what']} | {row['workers']} | {row['per_second']:,.0f} {row['unit']} |"
        )
    settings = record["settings"]
    width, height = settings["photo_size"]
    rows += [
        "",
        f"Photographs of {width}x{height} pixels as JPEG, read to {settings['image_size']} pixels; "
        f"models and sizes of the preset `small`, steps of {IMAGE_BATCH} images and of "
        f"{TOKEN_BATCH} sequences. The best of {settings['rounds']} rounds on "
        f"{record['machine_info']['cpus']} cores that other work shared. Workers take cores from a "
        "model that trains on the CPU; beside a GPU they are free.",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    settings = config()
    info, commit = machine.machine_info(torch.device("cpu")), machine.commit_info()
    record: dict[str, Any] = {
        "machine_info": info,
        "commit_info": commit,
        "datetime": machine.now(),
        "settings": {
            "photo_size": PHOTO_SIZE,
            "num_photos": NUM_PHOTOS,
            "image_size": settings.image_tokenizer.image_size,
            "rounds": args.rounds,
            "steps": args.steps,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        record["rows"] = measure(Path(folder), settings, args.rounds, args.steps)
    name = machine.record_name("loading", info, commit, record["datetime"])
    machine.save_record(record, path := machine.RESULTS / name)
    print(f"\n{table(record)}\n\nrecord: {path}")


if __name__ == "__main__":
    main()
