"""CogView on colour emoji: combinations that it has never seen, drawn from their names.

    python -m benchmarks.experiments.emoji --help

It runs the commands of docs/training.md with the preset `emoji`: from the system's emoji font to
drawings of the held-out combinations of profession, gender and skin tone. Each drawing is then read
back: it is taken for the real emoji, among all, whose features are nearest. The features are what
the image tokenizer's encoder makes of a picture. Stopped, it goes on where it was.

It writes docs/emoji/: the record, a grid of drawings, and curves.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.report.tables import table as markdown
from cogview.cli import main as cogview
from cogview.data.captions import CaptionedImages
from cogview.data.sources import open_source
from cogview.files import atomic_write
from cogview.image_tokenizer import ImageTokenizer
from cogview.loop import read_metrics
from cogview.plots import save_curves, save_grid
from cogview.run import Run

DOCS = machine.ROOT / "docs" / "emoji"
NUM_SHOWN = 24
PLOTTED = {
    "loss": "loss",
    "image_loss": "image loss (nats per token)",
    "held_out_image_loss": "held-out image loss (nats per token)",
    "held_out_caption_gap": "more with another caption (nats per token)",
    "reconstruction_loss": "mean squared error (normalised)",
    "held_out_reconstruction_loss": "held-out mean squared error (normalised)",
}


def features(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """(N, F): what the encoder makes of images (N, C, H, W), before the nearest codes are taken."""
    with torch.no_grad():
        parts = [tokenizer._vectors(tokenizer._checked(part)) for part in images.split(64)]
    return torch.cat(parts).flatten(1)


def read_back(
    images: Tensor, true: Tensor, real: Tensor, real_features: Tensor, tokenizer: ImageTokenizer
) -> Tensor:
    """Which real emoji each image is nearest to.

    Args:
        images: (N, C, H, W).
        true: (N,), what they should show: indices of `real`. If a font has the same picture for
            the nearest emoji, the true one is returned.
        real, real_features: of all emoji.

    Returns:
        (N,) indices of `real`.
    """
    nearest = torch.cdist(features(tokenizer, images), real_features).argmin(1)
    same = (real[nearest] == real[true]).flatten(1).all(1)
    return torch.where(same, true, nearest)


def scores(read: Tensor, true: Tensor, attributes: list[dict[str, Any]]) -> dict[str, float]:
    """Share of images taken for the true emoji, or for one with the same base and so on."""
    result = {"top1": (read == true).double().mean().item()}
    for name in ("base", "gender", "skin_tone"):
        pairs = zip(read.tolist(), true.tolist(), strict=True)
        result[name] = float(
            np.mean([attributes[a][name] == attributes[b][name] for a, b in pairs])
        )
    return result


def chance(true: Tensor, attributes: list[dict[str, Any]]) -> dict[str, float]:
    """The same for a guess among all emoji."""
    result = {"top1": 1 / len(attributes)}
    for name in ("base", "gender", "skin_tone"):
        values = [row[name] for row in attributes]
        shares = [values.count(values[i]) / len(values) for i in true.tolist()]
        result[name] = float(np.mean(shares))
    return result


def train(folder: Path, languages: list[str], limit: int, settings: list[str]) -> None:
    """The commands of docs/training.md. What has ended already is quick, or is left as it is."""
    data, run = folder / "data", folder / "run"
    if not (data / "captions.jsonl").is_file():
        _command("prepare", "emoji", "--out", data, "--languages", *languages, "--limit", limit)
    new = [] if (run / "config.yaml").is_file() else ["--preset", "emoji"]
    sets = [part for setting in settings for part in ("--set", setting)]
    if not (run / "text_tokenizer.model").is_file():
        _command("train-text-tokenizer", "--run", run, "--data", data, *new, *sets)
    if not (run / "image_tokenizer.pt").is_file():
        _command("train-image-tokenizer", "--run", run, "--data", data, *sets)
    if not (run / "tokens" / "meta.json").is_file():
        _command("encode", "--run", run, "--data", data)
    _command("train", "--run", run, *sets)


def _command(*words: object) -> None:
    print(f"$ cogview {' '.join(map(str, words))}", flush=True)
    if code := cogview([str(word) for word in words]):
        raise SystemExit(code)


def measure(folder: Path) -> dict[str, Any]:
    """The record; draws every held-out emoji from its name in each language."""
    run = Run.open(folder / "run")
    config, tokenizer = run.config, run.image_tokenizer()
    data = CaptionedImages(
        open_source(str(folder / "data")), config.image_tokenizer.image_size, progress=False
    )
    about = json.loads((folder / "data" / "about.json").read_text(encoding="utf-8"))
    real = data[range(len(data))]
    attributes = [dict(row) for row in data.attributes]
    true = torch.from_numpy(np.flatnonzero(data.held_out == 1))
    real_features = features(tokenizer, real)
    reconstructed = tokenizer.decode(tokenizer.encode(real[true]))

    def measured(images: Tensor) -> tuple[Tensor, dict[str, float]]:
        read = read_back(images, true, real, real_features, tokenizer)
        return read == true, scores(read, true, attributes)

    rows = {"reconstructed": measured(reconstructed)[1]}
    started = time.perf_counter()
    for index, language in enumerate(about["languages"]):
        captions = [data.captions[i][index] for i in true.tolist()]
        drawn = run.draw(captions, progress=True)
        right, rows[f"drawn, {language}"] = measured(drawn)
        if index == 0:
            chosen = torch.linspace(0, len(true) - 1, NUM_SHOWN).long()
            DOCS.mkdir(exist_ok=True)
            save_grid(
                drawn[chosen],
                [captions[i] for i in chosen.tolist()],
                DOCS / "samples.png",
                right=right[chosen].tolist(),
                columns=6,
            )
    seconds = {"drawing": time.perf_counter() - started}
    curves = {}
    logs = {
        "image tokenizer": run.image_training / "metrics.jsonl",
        "gpt": run.path / "metrics.jsonl",
    }
    for name, path in logs.items():
        log = read_metrics(path)
        seconds[name] = sum(row["seconds"] for row in log)
        curves[name] = [
            {key: row[key] for key in ("step", *PLOTTED) if row.get(key) is not None} for row in log
        ]
    save_curves(curves, DOCS / "curves.png", PLOTTED)
    last = curves["gpt"][-1]
    return {
        "machine_info": machine.machine_info(run.device) | {"threads": torch.get_num_threads()},
        "commit_info": machine.commit_info(),
        "datetime": machine.now(),
        "data": {
            name: about[name] for name in ("font", "names", "languages", "images", "held_out")
        },
        "parameters": sum(parameter.numel() for parameter in run.model().parameters()),
        "steps": {
            "image tokenizer": config.image_training.steps,
            "gpt": config.training.steps,
        },
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "held_out_reconstruction_loss": curves["image tokenizer"][-1][
            "held_out_reconstruction_loss"
        ],
        "image_loss": last["image_loss"],
        "held_out_image_loss": last["held_out_image_loss"],
        "held_out_caption_gap": last["held_out_caption_gap"],
        "sampling": {
            name: getattr(config.sampling, name)
            for name in ("temperature", "top_k", "top_p", "guidance")
        },
        "scores": rows | {"chance": chance(true, attributes)},
    }


def table(record: dict[str, Any]) -> str:
    """How the held-out emoji are read back."""
    titles = {
        "top1": "the emoji itself",
        "base": "base",
        "gender": "gender",
        "skin_tone": "skin tone",
    }
    rows = [
        {"held-out emoji": name} | {titles[key]: f"{value:.1%}" for key, value in row.items()}
        for name, row in record["scores"].items()
    ]
    data, seconds = record["data"], record["seconds"]
    note = " ".join(
        [
            f"{data['held_out']} held-out combinations of {data['images']:,} emoji",
            f"({data['font']}), read back among all of them by the image tokenizer's features.",
            f"{record['parameters'] / 1e6:.1f} M parameters;",
            f"{record['steps']['image tokenizer']:,} steps of the image tokenizer in",
            f"{seconds['image tokenizer'] / 60:.0f} minutes, {record['steps']['gpt']:,} of the GPT",
            f"in {seconds['gpt'] / 60:.0f}. Held-out image loss",
            f"{record['held_out_image_loss']:.3f} nats per token,",
            f"{record['held_out_caption_gap']:.3f} more with another image's caption.",
        ]
    )
    return f"{markdown(rows)}\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "emoji")
    parser.add_argument("--languages", nargs="+", default=["en"], metavar="CODE")
    parser.add_argument(
        "--limit", type=int, default=0, help="only about so many emoji, for a trial"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    train(args.out, args.languages, args.limit, args.set)
    record = measure(args.out)
    with atomic_write(DOCS / "metrics.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(record)}\n\nrecord: {DOCS}/metrics.json")


if __name__ == "__main__":
    main()
