"""The experiment on emoji, whole, on squares that stand for emoji: no font is needed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from benchmarks.experiments import emoji
from cogview.config import load_config
from cogview.image_tokenizer import ImageTokenizer

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
TONES = {"": 255, "light": 200, "dark": 90}
SETTINGS = """
    text_tokenizer.vocab_size=40 image_tokenizer.image_size=16 image_tokenizer.hidden=8
    image_tokenizer.codebook_size=16 image_training.steps=40 image_training.batch_size=8
    image_training.warmup_steps=0 image_training.eval_every=20 model.num_layers=1
    model.hidden_size=32 model.num_heads=2 model.max_positions=48 training.steps=6
    training.warmup_steps=0 training.pictures_every=0 training.eval_every=3 device=cpu
""".split()


def squares(folder: Path) -> None:
    """What `cogview prepare emoji` makes: a colour is a base, the brightness a skin tone."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index, (colour, tone) in enumerate(itertools.product(COLOURS, TONES)):
        path = f"images/{index}.png"
        square = Image.new("RGB", (16, 16), "white")
        full = Image.new("RGB", (10, 10), colour)
        square.paste(Image.eval(full, lambda value, tone=tone: value * TONES[tone] // 255), (3, 3))
        square.save(folder / path)
        held_out = (colour, tone) in (("red", "dark"), ("blue", "light"))
        row = {"path": path, "caption": [f"{colour} {tone}", f"{tone} {colour}"], "base": colour}
        rows.append(row | {"held_out": held_out, "gender": "", "skin_tone": tone})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"font": "none", "names": "none", "languages": ["one", "other"]}
    about |= {"images": len(rows), "held_out": 2}
    (folder / "about.json").write_text(json.dumps(about))


def test_the_experiment_goes_on_where_it_was_and_makes_record_and_pictures(tmp_path: Path) -> None:
    squares(tmp_path / "data")
    with mock.patch.object(emoji, "DOCS", tmp_path / "docs"):
        emoji.train(tmp_path, ["one", "other"], 0, SETTINGS)
        with mock.patch("cogview.image_training.ImageTokenizerTrainer", side_effect=AssertionError):
            emoji.train(tmp_path, ["one", "other"], 0, SETTINGS)  # nothing is trained twice
        record = emoji.measure(tmp_path)
    assert list(record["scores"]) == ["reconstructed", "drawn, one", "drawn, other", "chance"]
    assert record["scores"]["chance"]["top1"] == pytest.approx(1 / 18)
    assert record["scores"]["chance"]["base"] == pytest.approx(3 / 18)
    assert record["scores"]["chance"]["skin_tone"] == pytest.approx(6 / 18)
    assert (
        record["steps"] == {"image tokenizer": 40, "gpt": 6} and record["held_out_image_loss"] > 0
    )
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"samples.png", "curves.png"}
    assert "| drawn, one |" in emoji.table(record)


def test_pictures_are_read_back_as_the_nearest_emoji() -> None:
    torch.manual_seed(0)
    config = load_config("emoji", ["image_tokenizer.image_size=16"]).image_tokenizer
    tokenizer = ImageTokenizer(config).eval()
    real = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    real[4] = real[1]  # the font has the same picture for both
    features = emoji.features(tokenizer, real)
    noisy = real.clone()
    noisy[:, :, 0, 0] += 9
    everything = torch.arange(6)
    read = emoji.read_back(noisy, everything, real, features, tokenizer)
    assert read.tolist() == [0, 1, 2, 3, 4, 5]
    true = torch.tensor([0, 1, 3])
    read = emoji.read_back(noisy[[0, 3, 5]], true, real, features, tokenizer)
    assert read.tolist() == [0, 3, 5]
    attributes = [
        {"base": base, "gender": "", "skin_tone": tone}
        for base, tone in itertools.product(("a", "b"), ("x", "y", "z"))
    ]
    assert emoji.scores(read, true, attributes) == pytest.approx(
        {"top1": 1 / 3, "base": 2 / 3, "gender": 1.0, "skin_tone": 1 / 3}
    )
