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
import resource
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
from cogview.data.loading import load
from cogview.data.order import read_order
from cogview.data.sources import open_source
from cogview.data.tokens import TokenDataset
from cogview.image_training import ImageTokenizerTrainer
from cogview.train import Trainer, make_batch

PHOTO_SIZE = (4000, 2664)  # pixels
NUM_PHOTOS = 32
NUM_SEQUENCES = 5_120
IMAGE_BATCH, TOKEN_BATCH = 8, 4
ROUNDS = 3

Measured = dict[str, Any]  # what, workers, unit, per_core_second, per_second


def config() -> Config:
    sizes = (f"image_training.batch_size={IMAGE_BATCH}", f"training.batch_size={TOKEN_BATCH}")
    return load_config("small", ["device=cpu", *sizes])


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


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def reading(fetch: Callable[[list[int]], Any], num: int, batch: int, workers: int) -> int:
    """Reads `num` examples, and none ahead of them; how many that were."""
    batches = read_order(0, 0, num, num).reshape(-1, batch).tolist()
    for _ in load(fetch, batches, workers):
        pass
    return num


def training(trainer: ImageTokenizerTrainer | Trainer) -> int:
    """Two steps; how many examples they read."""
    for _ in range(2):
        trainer.train_step()
    trainer.reader.close()
    return trainer.examples


def measure(folder: Path, rounds: int) -> list[Measured]:
    """The best of several rounds of each; the rounds of all alternate."""
    settings = config()
    (folder / "photos").mkdir()
    make_photos(folder / "photos")
    size = settings.image_tokenizer.image_size
    images = CaptionedImages(open_source(folder / "photos"), size, progress=False)
    in_memory = images[list(range(len(images)))]
    arrays = make_tokens(settings)
    arrays.save(folder / "tokens")
    mapped = TokenDataset.load(folder / "tokens")
    length = make_batch(settings, arrays, [0]).tokens.shape[1]

    def scratch() -> Path:
        return Path(tempfile.mkdtemp(dir=folder))

    def train_images() -> int:
        trainer = ImageTokenizerTrainer(settings, scratch(), in_memory, in_memory[:2], None, False)
        return training(trainer)

    def train_tokens() -> int:
        return training(Trainer(settings, scratch(), arrays, arrays, None, False)) * length

    def read_images(workers: int) -> int:
        return reading(images.__getitem__, len(images), IMAGE_BATCH, workers)

    def read_whole() -> int:
        with whole_jpegs():
            return read_images(0)

    def read_tokens(data: TokenDataset, workers: int) -> int:
        fetch = functools.partial(make_batch, settings, data)
        return reading(fetch, len(data), 64, workers) * length

    photographs, mapped_tokens = "photographs, reduced while decoded", "tokens in mapped files"
    plan: list[tuple[str, int, str, Callable[[], int]]] = [
        ("photographs, decoded whole (before)", 0, "images", read_whole),
        (photographs, 0, "images", lambda: read_images(0)),
        (photographs, 1, "images", lambda: read_images(1)),
        (photographs, 2, "images", lambda: read_images(2)),
        ("the image tokenizer trains on", 0, "images", train_images),
        ("tokens in memory (before)", 0, "tokens", lambda: read_tokens(arrays, 0)),
        (mapped_tokens, 0, "tokens", lambda: read_tokens(mapped, 0)),
        (mapped_tokens, 1, "tokens", lambda: read_tokens(mapped, 1)),
        (mapped_tokens, 2, "tokens", lambda: read_tokens(mapped, 2)),
        ("the GPT trains on", 0, "tokens", train_tokens),
    ]
    rows: list[Measured] = [
        {"what": what, "workers": workers, "unit": unit, "per_core_second": 0.0, "per_second": 0.0}
        for what, workers, unit, _ in plan
    ]
    for number in range(rounds):
        for row, (*_, run) in zip(rows, plan, strict=True):
            cpu, wall = cpu_seconds(), time.perf_counter()
            examples = run()
            for name, now, before in (
                ("per_core_second", cpu_seconds(), cpu),
                ("per_second", time.perf_counter(), wall),
            ):
                row[name] = max(row[name], examples / (now - before))
            print(f"round {number + 1}: {row}", flush=True)
    return rows


def table(record: dict[str, Any]) -> str:
    rows = ["| what | workers | per second of one core |", "|---|---:|---:|"]
    for row in record["rows"]:
        rate = f"{row['per_core_second']:.1f}"
        if row["unit"] == "tokens":  # as many figures
            rate = f"{float(format(row['per_core_second'], '.3g')):,.0f}"
        rows.append(f"| {row['what']} | {row['workers']} | {rate} {row['unit']} |")
    settings = record["settings"]
    width, height = settings["photo_size"]
    rows += [
        "",
        f"Photographs of {width}x{height} pixels as JPEG, read to {settings['image_size']} pixels; "
        "models of the preset `small`, on the CPU. Processor time of all processes, not the time "
        f"that passed: other work shared the cores. The best of {settings['rounds']} rounds.",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    info, commit = machine.machine_info(torch.device("cpu")), machine.commit_info()
    record: dict[str, Any] = {
        "machine_info": info,
        "commit_info": commit,
        "datetime": machine.now(),
        "settings": {
            "photo_size": PHOTO_SIZE,
            "num_photos": NUM_PHOTOS,
            "image_size": config().image_tokenizer.image_size,
            "rounds": args.rounds,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        record["rows"] = measure(Path(folder), args.rounds)
    name = machine.record_name("loading", info, commit, record["datetime"])
    machine.save_record(record, path := machine.RESULTS / name)
    print(f"\n{table(record)}\n\nrecord: {path}")


if __name__ == "__main__":
    main()
