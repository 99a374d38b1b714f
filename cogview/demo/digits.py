"""Scenes of real handwriting: four digits on a canvas, described by a caption.

The handwriting is the UCI set that ships with scikit-learn (1797 digits of 8x8 pixels). A scene is
a 64x64 canvas with one digit in each quarter; "a seven and a three above a two and a nine" names
them in reading order. Training and evaluation share neither handwritten images nor combinations of
four digits: both are split.

    split      handwriting    combinations
    train      50 %           all except the held-out ones
    reader     30 %           all; trains the classifier that reads the drawings
    test       20 %           only the held-out ones
"""

import functools
import zlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

CANVAS_SIZE = 64
CELL_SIZE = 32
CELLS = ((0, 0), (0, CELL_SIZE), (CELL_SIZE, 0), (CELL_SIZE, CELL_SIZE))  # top, left
DIGIT_SIZES = (26, 27, 28)  # side in pixels to which the 8x8 originals are scaled
SPLITS = ("train", "reader", "test")

_SHARES = (0.5, 0.3, 0.2)
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PHRASES = tuple(f"{'an' if name == 'eight' else 'a'} {name}" for name in _NAMES)


class Scenes(NamedTuple):
    images: torch.Tensor  # (N, 1, 64, 64) float32 in [0, 1], ink is 1
    captions: list[str]
    labels: torch.Tensor  # (N, 4) int64, digits in reading order


def caption_of(digits: tuple[int, ...] | list[int] | np.ndarray) -> str:
    """Caption of four digits in reading order."""
    first, second, third, fourth = (_PHRASES[int(digit)] for digit in digits)
    return f"{first} and {second} above {third} and {fourth}"


def is_held_out(digits: tuple[int, ...] | list[int] | np.ndarray) -> bool:
    """Whether a combination of digits is kept for the test split: one in ten, by a fixed hash."""
    return zlib.crc32(bytes(int(digit) for digit in digits)) % 10 == 0


def make_scenes(split: str, num: int, seed: int, jitter: int = 2) -> Scenes:
    """Compose scenes of random digits; a pure function of its arguments.

    Args:
        split: `train`, `reader` or `test`, see the table above.
        num: number of scenes.
        seed: for the choice of digits, handwriting and jitter.
        jitter: as for `compose_scenes`.

    Raises:
        ValueError: unknown split, negative `num`, or jitter out of range.
    """
    if num < 0:
        raise ValueError(f"num: expected 0 or more scenes, got {num}")
    _check_split(split)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    return compose_scenes(split, _draw_combinations(split, num, rng), rng, jitter)


def compose_scenes(
    split: str, labels: np.ndarray, rng: np.random.Generator, jitter: int = 2
) -> Scenes:
    """Compose scenes of given digits, held-out combinations or not.

    Args:
        split: whose handwriting.
        labels: (N, 4) int64, the digits in reading order.
        rng: for the choice of handwriting and jitter.
        jitter: largest shift of a digit from the middle of its cell, in pixels in each direction
            (at most 2, so that the largest digits stay inside their cell).

    Raises:
        ValueError: unknown split, or jitter out of range.
    """
    spare = (CELL_SIZE - max(DIGIT_SIZES)) // 2
    if not 0 <= jitter <= spare:
        raise ValueError(f"jitter: expected 0 to {spare} pixels, got {jitter}")
    handwriting = _handwriting(split)
    images = np.zeros((len(labels), CANVAS_SIZE, CANVAS_SIZE), dtype=np.float32)
    for image, digits in zip(images, labels, strict=True):
        for (cell_top, cell_left), digit in zip(CELLS, digits, strict=True):
            size_idx = int(rng.integers(len(DIGIT_SIZES)))
            glyphs = handwriting[digit][size_idx]
            glyph = glyphs[rng.integers(len(glyphs))]
            size = DIGIT_SIZES[size_idx]
            margins = (CELL_SIZE - size) // 2 + rng.integers(-jitter, jitter + 1, 2)
            top, left = cell_top + margins[0], cell_left + margins[1]
            image[top : top + size, left : left + size] = glyph
    return Scenes(
        torch.from_numpy(images).unsqueeze(1),
        [caption_of(digits) for digits in labels],
        torch.from_numpy(labels),
    )


def _draw_combinations(split: str, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, 4) int64 digits that the split may show."""
    combinations = np.stack(np.unravel_index(np.arange(10**4), (10,) * 4), axis=1)
    held_out = _held_out_combinations()
    allowed = {"train": ~held_out, "reader": np.ones_like(held_out), "test": held_out}[split]
    return rng.choice(combinations[allowed], size=num).astype(np.int64).reshape(num, 4)


@functools.cache
def _held_out_combinations() -> np.ndarray:
    """(10000,) bool, indexed by the four digits as one decimal number."""
    return np.array([is_held_out(digits) for digits in np.ndindex(10, 10, 10, 10)])


@functools.cache
def _handwriting(split: str) -> tuple[tuple[np.ndarray, ...], ...]:
    """A split's glyphs, by digit and size: each (num_glyphs, size, size) float32 in [0, 1]."""
    _check_split(split)
    originals, labels = load_digits(return_X_y=True)
    originals = originals.reshape(-1, 8, 8).astype(np.float32) / 16
    bounds = np.cumsum((0.0, *_SHARES))
    split_idx = SPLITS.index(split)
    rng = np.random.default_rng(0)  # the split of the handwriting is fixed
    glyphs = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit))
        start, stop = (np.round(bounds[split_idx : split_idx + 2] * len(order))).astype(int)
        glyphs.append(tuple(_scaled(originals[order[start:stop]], size) for size in DIGIT_SIZES))
    return tuple(glyphs)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")


def _scaled(images: np.ndarray, size: int) -> np.ndarray:
    bicubic = Image.Resampling.BICUBIC
    resized = [np.asarray(Image.fromarray(image).resize((size, size), bicubic)) for image in images]
    return np.clip(np.stack(resized), 0.0, 1.0)
