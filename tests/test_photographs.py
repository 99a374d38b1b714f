"""The experiment on real photographs: its crops, its record, its table and its picture."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from benchmarks.experiments import photographs
from benchmarks.experiments.photographs import PHOTOGRAPHS, crops_of, place, read_photograph, touch

TINY = {
    "PHOTOGRAPHS": {"china.jpg": "a temple", "flower.jpg": "a flower"},
    "NUM_TRAIN": 6,
    "NUM_HELD_OUT": 2,
    "TRIALS": ((), ("image_tokenizer.decay=0.9",)),
    "TRIAL_SETTINGS": (
        *photographs.TRIAL_SETTINGS, "image_training.steps=2", "image_training.batch_size=2",
        "image_training.eval_every=1", "image_tokenizer.hidden=4",
    ),
    "SETTINGS": (
        *photographs.SETTINGS, "text_tokenizer.vocab_size=30", "image_training.steps=1",
        "image_training.batch_size=2", "image_tokenizer.hidden=4", "training.steps=2",
        "training.batch_size=2", "training.eval_every=1", "model.num_layers=1",
        "model.hidden_size=32", "model.num_heads=2",
    ),
}  # fmt: skip


def test_held_out_crops_are_apart_and_their_captions_are_new() -> None:
    for number, name in enumerate(PHOTOGRAPHS):
        size = read_photograph(name).size
        crops = [(box, place(box, size), held_out) for box, held_out in crops_of(name, number)]
        train = [(box, where) for box, where, held_out in crops if not held_out]
        held_out = [(box, where) for box, where, held_out in crops if held_out]
        assert len(train) == photographs.NUM_TRAIN and len(held_out) == photographs.NUM_HELD_OUT
        for box, _ in train + held_out:
            assert 0 <= box[0] and 0 <= box[1] and box[2] <= size[0] and box[3] <= size[1]
            assert box[2] - box[0] == box[3] - box[1] >= photographs.CROP_SIZE
        assert not any(touch(a, b) for a, _ in train for b, _ in held_out)
        corner = ("top left", "top right", "bottom left", "bottom right")[number % 4]
        assert corner in {where for _, where in held_out}
        assert corner not in {where for _, where in train}


def test_places() -> None:
    where = [place((x, y, x + 2, y + 2), (30, 60)) for y in (0, 20, 58) for x in (0, 14, 28)]
    assert where == [
        *("top left", "top", "top right"),
        *("left", "middle", "right"),
        *("bottom left", "bottom", "bottom right"),
    ]  # fmt: skip


@pytest.fixture
def tiny() -> object:
    with mock.patch.multiple(photographs, **TINY):
        yield


def test_the_command_makes_a_record_and_repeats_nothing(
    tiny: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(photographs.machine, "RESULTS", tmp_path / "records")
    monkeypatch.setattr("sys.argv", ["photographs", "--out", str(tmp_path / "out")])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    photographs.main()
    lines = (tmp_path / "out" / "crops" / "captions.jsonl").read_text().splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    assert len(lines) == 16
    assert all(a.split(",")[0] != b.split(",")[0] for a, b in pairwise(captions))

    (path,) = (tmp_path / "records").iterdir()
    record = json.loads(path.read_text())
    assert record["crops"] == {"train": 12, "held_out": 4}
    assert [[row["step"] for row in run["curve"]] for run in record["trials"]] == [[1, 2]] * 2
    assert record["trials"][0]["curve"] != record["trials"][1]["curve"]
    assert [row["step"] for row in record["gpt"]["curve"]] == [1, 2]
    assert 0.2 < record["plain_error"] < 2

    path.unlink()
    with mock.patch("cogview.loop.Loop.train_step", side_effect=AssertionError("a step again")):
        photographs.main()
    (path,) = (tmp_path / "records").iterdir()
    again = json.loads(path.read_text())
    assert again["gpt"] == record["gpt"] and again["trials"] == record["trials"]

    gap = record["gpt"]["curve"][-1]["caption_gap"]
    shown = photographs.table(record)
    assert f"{gap:+.3f} with another image's caption" in shown and "| `decay=0.9` |" in shown
    photographs.draw(record, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 800
    torch.set_num_threads(threads)
