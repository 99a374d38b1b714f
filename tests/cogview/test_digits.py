import numpy as np
import pytest
import torch

from cogview.demo import digits
from cogview.demo.digits import CELL_SIZE, CELLS, SPLITS, caption_of, is_held_out, make_scenes
from cogview.demo.reader import DigitReader, caption_accuracy


@pytest.fixture(scope="module")
def reader() -> DigitReader:
    return DigitReader()


def test_caption() -> None:
    assert caption_of((7, 3, 2, 9)) == "a seven and a three above a two and a nine"
    assert caption_of((8, 0, 1, 8)) == "an eight and a zero above a one and an eight"


@pytest.mark.parametrize("split", SPLITS)
def test_scenes(split: str) -> None:
    images, captions, labels = make_scenes(split, 50, seed=3)
    assert images.shape == (50, 1, 64, 64) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    assert labels.shape == (50, 4) and labels.dtype == torch.int64
    assert captions == [caption_of(row) for row in labels.tolist()]
    for top, left in CELLS:  # every cell holds ink
        cells = images[:, 0, top : top + CELL_SIZE, left : left + CELL_SIZE]
        assert (cells.amax((1, 2)) > 0.5).all()


def test_scenes_are_a_pure_function_of_the_seed() -> None:
    first = make_scenes("train", 20, seed=1)
    torch.manual_seed(5)
    again, other = make_scenes("train", 20, seed=1), make_scenes("train", 20, seed=2)
    assert torch.equal(first.images, again.images) and first.captions == again.captions
    assert first.captions != other.captions


def test_no_scenes() -> None:
    assert make_scenes("train", 0, seed=0).images.shape == (0, 1, 64, 64)


def test_combinations_are_held_out() -> None:
    train, test = make_scenes("train", 2000, 0).labels, make_scenes("test", 500, 0).labels
    assert not any(is_held_out(row) for row in train.tolist())
    assert all(is_held_out(row) for row in test.tolist())
    share = np.mean([is_held_out(row) for row in np.ndindex(10, 10, 10, 10)])
    assert 0.09 < share < 0.11
    assert test.unique().tolist() == list(range(10))


def test_handwriting_is_disjoint() -> None:
    glyphs = {
        split: [{g.tobytes() for g in by_size[0]} for by_size in digits._handwriting(split)]
        for split in SPLITS
    }
    for digit in range(10):
        train, read, test = (glyphs[split][digit] for split in SPLITS)
        assert not train & read and not train & test and not read & test
        assert len(test) > 25
    assert sum(len(g) for split in SPLITS for g in glyphs[split]) == 1797


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="split: expected one of train, reader, test, got 'val'"):
        make_scenes("val", 1, 0)
    with pytest.raises(ValueError, match="num: expected 0 or more scenes, got -1"):
        make_scenes("train", -1, 0)
    with pytest.raises(ValueError, match="jitter: expected 0 to 2 pixels, got 3"):
        make_scenes("train", 1, 0, jitter=3)


def test_the_reader_reads_handwriting_it_has_never_seen(reader: DigitReader) -> None:
    scenes = make_scenes("test", 300, seed=7)
    accuracy = caption_accuracy(reader.read(scenes.images), scenes.labels)
    assert accuracy["digit_accuracy"] >= 0.97
    assert accuracy["whole_caption_accuracy"] >= 0.9


def test_the_reader_tells_places_apart(reader: DigitReader) -> None:
    scenes = make_scenes("test", 300, seed=7)
    turned = caption_accuracy(reader.read(scenes.images), scenes.labels.flip(1))
    assert turned["digit_accuracy"] < 0.2


def test_the_reader_refuses_wrong_images(reader: DigitReader) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 1, 64, 64\), got \(2, 3, 64, 64\)"):
        reader.read(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match="NaN"):
        reader.read(torch.full((1, 1, 64, 64), torch.nan))
    assert reader.read(torch.zeros(0, 1, 64, 64)).shape == (0, 4)


def test_caption_accuracy() -> None:
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    read = torch.tensor([[1, 2, 3, 4], [5, 6, 8, 7]])
    assert caption_accuracy(read, labels) == {
        "digit_accuracy": 0.75,
        "whole_caption_accuracy": 0.5,
    }
    with pytest.raises(ValueError, match="read: expected the shape of labels"):
        caption_accuracy(read[:1], labels)
