"""The preset `small` on real photographs, which need no download: what a short training reaches.

    python -m benchmarks.experiments.photographs --help

The pictures are crops of the colour photographs inside scikit-learn and scikit-image. A caption
names the photograph and the place of the crop in it: "a cat, top left". One corner of each
photograph is held out: no other crop touches it, and no other caption names it together with that
photograph.

First, short trainings of the image tokenizer compare settings, on the middle of each crop. Then the
command line trains the whole preset. `--out` keeps everything: the same command goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import machine
from benchmarks.report.tables import table as markdown
from cogview import cli
from cogview.config import Config, load_config
from cogview.data.captions import CaptionedImages
from cogview.data.sources import open_source
from cogview.files import atomic_write
from cogview.image_training import ImageTokenizerTrainer
from cogview.loop import read_metrics

PRESET = "small"
# What captions call the photographs, by their names in the two packages.
PHOTOGRAPHS = {
    "china.jpg": "a temple",
    "flower.jpg": "a flower",
    "astronaut": "an astronaut",
    "chelsea": "a cat",
    "coffee": "a cup of coffee",
    "hubble_deep_field": "galaxies",
    "immunohistochemistry": "tissue",
    "retina": "a retina",
    "rocket": "a rocket",
    "stereo_motorcycle": "a motorcycle",
}
NUM_TRAIN, NUM_HELD_OUT = 200, 16  # crops of each photograph
CROP_SIZE = 128  # pixels; crops are this large or larger, and then made smaller
TRIAL_SIZE = 64  # pixels a side, from the middle of a crop

# Of the image tokenizer: short trainings of a narrow one, in the order of trying. They start from
# what the preset had before them.
TRIAL_SETTINGS = (
    *("device=cpu", f"image_tokenizer.image_size={TRIAL_SIZE}", "image_tokenizer.hidden=32"),
    *("image_tokenizer.codebook_dim=128", "image_tokenizer.decay=0.99"),
    *("image_tokenizer.restart_below=0.1", "image_training.learning_rate=3e-4"),
    *("image_training.warmup_steps=0", "image_training.batch_size=32", "image_training.steps=150"),
    *("image_training.eval_every=25", "image_training.save_every=150"),
    *("image_training.pictures_every=0", "image_training.precision=float32"),
)
FAST, SHORT = "image_training.learning_rate=3e-3", "image_tokenizer.codebook_dim=16"
REVIVED, HALF = "image_tokenizer.restart_below=1", "image_training.batch_size=16"
WIDE = "image_tokenizer.hidden=128"  # as the preset
TRIALS: tuple[tuple[str, ...], ...] = (
    (),
    ("image_training.learning_rate=1e-3",),
    (FAST,),
    (FAST, SHORT),
    (FAST, "image_tokenizer.decay=0.9"),
    (FAST, SHORT, "image_tokenizer.decay=0.9"),
    (FAST, REVIVED),
    (FAST, SHORT, REVIVED),
    (FAST, SHORT, "image_tokenizer.restart_below=0.5"),
    (FAST, SHORT, "image_tokenizer.restart_below=0.5", "image_tokenizer.decay=0.95"),
    (FAST, "image_tokenizer.codebook_dim=32", REVIVED),
    (FAST, SHORT, REVIVED, "image_training.warmup_steps=15"),
    (FAST, SHORT, REVIVED, HALF),
    (FAST, SHORT, REVIVED, HALF, WIDE),
    ("image_training.learning_rate=1e-3", SHORT, REVIVED, HALF, WIDE),
)
# Of the whole preset: what fits minutes on a core, and so few words. Of 50 held-out crops, the one
# half way round, whose caption the gap is measured with, shows another photograph.
SETTINGS = (
    *("text_tokenizer.vocab_size=56", "text_tokenizer.model_type=bpe", "device=cpu"),
    *("image_training.steps=300", "image_training.batch_size=8", "image_training.eval_every=50"),
    *("image_training.save_every=100", "training.steps=100", "training.batch_size=8"),
    *("training.eval_every=25", "training.eval_examples=50", "training.save_every=50"),
    *("training.pictures_every=0", "model.dropout=0"),
)


def read_photograph(name: str) -> Image.Image:
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))
    from skimage import data  # nothing else here needs it

    pixels = getattr(data, name)()
    return Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels)  # left of stereo


Box = tuple[int, int, int, int]  # left, top, right, bottom


def held_out_corner(size: tuple[int, int], number: int) -> Box:
    """A square of half the shorter side, in one of the four corners."""
    width, height = size
    side = min(size) // 2
    left, top = (width - side) * (number % 2), (height - side) * (number // 2 % 2)
    return left, top, left + side, top + side


def boxes(within: Box, largest: int, rng: np.random.Generator) -> Iterator[Box]:
    """Random squares inside a box, of `CROP_SIZE` to `largest` pixels a side, without end."""
    left, top, right, bottom = within
    while True:
        side = int(rng.integers(CROP_SIZE, largest + 1))
        x = int(rng.integers(left, right - side + 1))
        y = int(rng.integers(top, bottom - side + 1))
        yield x, y, x + side, y + side


def touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place(box: Box, size: tuple[int, int]) -> str:
    """Where the middle of a crop lies, in thirds of the photograph: "top left", "top", ..."""
    column, row = (3 * (box[axis] + box[axis + 2]) // (2 * size[axis]) for axis in (0, 1))
    words = ("top", "", "bottom")[row], ("left", "", "right")[column]
    return " ".join(filter(None, words)) or "middle"


def crops_of(name: str, number: int) -> Iterator[tuple[Box, bool]]:
    """Crops of a photograph, and whether each is held out: first those for training."""
    size = read_photograph(name).size
    corner, rng = held_out_corner(size, number), np.random.default_rng(number)
    side = corner[2] - corner[0]
    for_training = (box for box in boxes((0, 0, *size), side, rng) if not touch(box, corner))
    yield from ((box, False) for box in islice(for_training, NUM_TRAIN))
    yield from ((box, True) for box in islice(boxes(corner, side, rng), NUM_HELD_OUT))


def write_crops(folder: Path) -> Path:
    """A folder of images with captions and the column `held_out`; neighbouring lines are of
    different photographs."""
    if (table := folder / "captions.jsonl").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (name, called) in enumerate(PHOTOGRAPHS.items()):
        photograph = read_photograph(name)
        for index, (box, held_out) in enumerate(crops_of(name, number)):
            crop = photograph.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC, box)
            crop.save(folder / (file := f"{index:04d}-{number:02d}.png"))
            caption = f"{called}, {place(box, photograph.size)}"
            lines.append({"file_name": file, "caption": caption, "held_out": held_out})
    lines.sort(key=lambda line: str(line["file_name"]))
    with atomic_write(table) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


OF_IMAGES = {  # measurements on held-out crops: their names in the record, and in the metrics
    "error": "held_out_reconstruction_loss",
    "codes_used": "held_out_codes_used",
    "perplexity": "held_out_perplexity",
}
OF_GPT = {
    "image_loss": "held_out_image_loss",
    "text_loss": "held_out_text_loss",
    "caption_gap": "held_out_caption_gap",
}


def measured(folder: Path, names: dict[str, str]) -> dict[str, Any]:
    """What the log of a training says: seconds of all steps, and the measurements."""
    rows = read_metrics(folder / "metrics.jsonl")
    curve = [
        {"step": row["step"]} | {name: float(f"{row[of]:.5g}") for name, of in names.items()}
        for row in rows
        if "held_out_loss" in row or OF_IMAGES["error"] in row
    ]
    return {"seconds": round(sum(row["seconds"] for row in rows), 1), "curve": curve}


def trial(settings: tuple[str, ...], crops: CaptionedImages, folder: Path) -> dict[str, Any]:
    """A short training of the image tokenizer with these settings."""
    kept = folder / ("-".join(settings) or "before") / "trial.json"
    if not kept.is_file():
        config = load_config(PRESET, [*TRIAL_SETTINGS, *settings])
        train, held_out = (middle(part[range(len(part))]) for part in crops.split(0.01, 0))
        data = {"data": crops.fingerprint}
        trainer = ImageTokenizerTrainer(config, kept.parent, train, held_out, data, progress=False)
        trainer.run()
        result = {"settings": settings, "commit": machine.commit_info()["id"]}
        with atomic_write(kept) as partial:
            partial.write_text(json.dumps(result | measured(kept.parent, OF_IMAGES)))
    result = json.loads(kept.read_text())
    print(f"{settings}: {result['curve'][-1]}, {result['seconds']} s", flush=True)
    return result


def middle(images: torch.Tensor) -> torch.Tensor:
    first = (CROP_SIZE - TRIAL_SIZE) // 2
    return images[:, :, first : first + TRIAL_SIZE, first : first + TRIAL_SIZE]


def plain_error(config: Config, images: torch.Tensor) -> float:
    """The reconstruction error of one colour, the best one, for all pixels of all images."""
    images = images / 255
    std = torch.tensor(config.image_tokenizer.std).view(-1, 1, 1)
    return float(((images - images.mean((0, 2, 3), keepdim=True)) / std).square().mean())


def train(folder: Path, data: Path) -> Config:
    """The preset by the four commands, as a person gives them; what is finished is not repeated."""
    new = [] if (folder / "config.yaml").is_file() else ["--preset", PRESET]
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    run, on = ["--run", str(folder), *settings], ["--data", str(data)]
    commands = [
        ["train-text-tokenizer", *run, *on, *new],
        ["train-image-tokenizer", *run, *on],
        *([] if (folder / "tokens").is_dir() else [["encode", *run, *on]]),
        ["train", *run],
    ]
    for command in commands:
        if code := cli.main(command):
            raise SystemExit(code)
    return load_config(folder / "config.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", action="store_true", help="only compare settings")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "photographs")
    args = parser.parse_args()
    data = write_crops(args.out / "crops")
    crops = CaptionedImages(open_source(data), CROP_SIZE, known_keys=args.out / "keys.json")
    trials = [trial(settings, crops, args.out / "trials") for settings in TRIALS]
    if args.trials:
        return
    config = train(args.out / PRESET, data)
    held_out = crops.split(config.data.held_out_fraction, config.seed)[1]
    record: dict[str, Any] = {
        "machine_info": machine.machine_info(torch.device("cpu")),
        "commit_info": machine.commit_info(),
        "datetime": machine.now(),
        "photographs": PHOTOGRAPHS,
        "crops": {"train": len(crops) - len(held_out), "held_out": len(held_out)},
        "plain_error": plain_error(config, held_out[range(len(held_out))]),
        "trial_settings": TRIAL_SETTINGS,
        "trials": trials,
        "preset": PRESET,
        "settings": SETTINGS,
        "image_tokenizer": measured(args.out / PRESET / "image_training", OF_IMAGES),
        "gpt": measured(args.out / PRESET, OF_GPT),
    }
    name = machine.record_name(
        "photographs", record["machine_info"], record["commit_info"], record["datetime"]
    )
    machine.save_record(record, path := machine.RESULTS / name)
    print(f"\n{table(record)}\n\nrecord: {path}")


def table(record: dict[str, Any]) -> str:
    """The trained preset, and the trials of its image tokenizer."""
    images, gpt, crops = record["image_tokenizer"], record["gpt"], record["crops"]
    error, loss = images["curve"][-1], gpt["curve"][-1]
    rows = [
        {
            "part": "image tokenizer",
            "steps": f"{error['step']:,}",
            "on held-out crops": f"error {error['error']:.3f} (of one plain colour: "
            f"{record['plain_error']:.3f}), {error['codes_used']:.0f} codes used",
        },
        {
            "part": "GPT",
            "steps": f"{loss['step']:,}",
            "on held-out crops": f"image loss {loss['image_loss']:.3f}; "
            f"{loss['caption_gap']:+.3f} with another image's caption",
        },
    ]
    trials = [
        {
            "changed": ", ".join(f"`{setting.partition('.')[2]}`" for setting in run["settings"])
            or "nothing",
            "error": f"{run['curve'][-1]['error']:.3f}",
            "codes used": f"{run['curve'][-1]['codes_used']:.0f}",
        }
        for run in record["trials"]
    ]
    note = (
        f"The preset `{record['preset']}` with {', '.join(f'`{s}`' for s in record['settings'])}, "
        f"trained on {crops['train']:,} crops of {len(record['photographs'])} photographs; "
        f"{crops['held_out']} crops of their corners are held out. Error: mean squared error of "
        "normalised pixels. Loss: nats per code."
    )
    of_trials = (
        "Trials of the image tokenizer, on the middle of the crops, one seed each, with "
        f"{', '.join(f'`{s}`' for s in record['trial_settings'])} and what a line names."
    )
    return "\n\n".join((markdown(rows), note, markdown(trials), of_trials))


HOW_TO_READ = (
    "By step, on held-out crops: the error of the image tokenizer, in the trials (thin) and in the "
    "training of the preset (thick); the GPT's image loss with the crop's own caption and with "
    "that of another one."
)


def draw(record: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in record["trials"]:
        plot(left, run, "error", color="#999999", linewidth=0.8)
    plot(left, record["image_tokenizer"], "error", color="#0072B2", linewidth=2)
    left.set(ylabel="held-out error", yscale="log")
    plot(right, record["gpt"], "image_loss", color="#0072B2", label="own caption")
    right.plot(
        [row["step"] for row in record["gpt"]["curve"]],
        [row["image_loss"] + row["caption_gap"] for row in record["gpt"]["curve"]],
        color="#D55E00",
        label="another image's caption",
    )
    right.set(ylabel="held-out image loss (nats per code)")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.set_xlabel("step")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def plot(axis: Axes, run: dict[str, Any], name: str, **style: Any) -> None:
    axis.plot([row["step"] for row in run["curve"]], [row[name] for row in run["curve"]], **style)


if __name__ == "__main__":
    main()
