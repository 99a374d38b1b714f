"""A user's captioned images, and the order in which training reads its examples.

    folder/captions.tsv     path<TAB>caption, one record per line, or
    folder/captions.csv     path,caption, quoted as usual, or
    folder/captions.jsonl   {"path": "cat.png", "caption": "a cat"}
    folder/...              the images, in any format that Pillow reads

Paths are relative to the folder. A first line `path<TAB>caption` or `path,caption` is a header.
"""

import csv
import functools
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from cogview.text_tokenizer import caption_problem

CAPTION_FILES = ("captions.tsv", "captions.csv", "captions.jsonl")


class Images(Protocol):
    """A tensor of images (N, C, H, W), or any object that loads a batch of images by indices."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int], /) -> Tensor: ...


class CaptionedImages:
    """The records of a folder; `images[[0, 7]]` reads two images: (2, C, H, W) uint8.

    The constructor decodes every image once, so that a corrupt one is found before training and not
    in the middle of it.

    Args:
        folder: the folder; the top of this module describes its files.
        image_size: side in pixels; images are cropped around their centre to a square and resized.
        channels: 3 for RGB, 1 for grey.
        skip_bad: skip records that cannot be used, with one warning that counts them.
        progress: show a progress bar if standard error is a terminal.

    Attributes:
        paths: list of N paths.
        captions: list of N captions.

    Raises:
        FileNotFoundError: no folder or no captions file; a missing image, unless `skip_bad`.
        ValueError: several captions files; no usable record; unless `skip_bad`, a corrupt image, a
            caption without a visible character or a malformed record, named by file and line.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        image_size: int,
        channels: int = 3,
        *,
        skip_bad: bool = False,
        progress: bool = True,
    ):
        if channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {channels}")
        self.image_size = image_size
        self.channels = channels
        self.paths: list[Path] = []
        self.captions: list[str] = []

        records_file = _records_file(Path(folder))
        errors: list[ValueError | OSError] = []
        with ThreadPoolExecutor() as pool:
            results = pool.map(self._check, _records(records_file))
            for result in tqdm(
                results, desc="images", unit="image", disable=None if progress else True
            ):
                if not isinstance(result, Exception):
                    self.paths.append(result[0])
                    self.captions.append(result[1])
                elif skip_bad:
                    errors.append(result)
                else:
                    pool.shutdown(cancel_futures=True)
                    raise result
        if not self.paths:
            reason = f"; the first of {len(errors)} errors: {errors[0]}" if errors else ""
            raise ValueError(
                f"{records_file}: expected at least one usable record, got none{reason}"
            )
        if errors:
            num_records = len(errors) + len(self.paths)
            warnings.warn(
                f"{records_file}: skipped {len(errors)} of {num_records} records; "
                f"the first: {errors[0]}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(
            [read_image(self.paths[i], self.image_size, self.channels) for i in indices]
        )

    def _check(self, record: "_Record") -> tuple[Path, str] | ValueError | OSError:
        if record.error is not None:
            return ValueError(f"{record.place}: {record.error}")
        if problem := caption_problem(record.caption):
            return ValueError(f"{record.place}: expected a caption for {record.path}, {problem}")
        try:
            read_image(record.path, self.image_size, self.channels)
        except FileNotFoundError:
            return FileNotFoundError(2, f"{record.place}: no such image", str(record.path))
        except (ValueError, OSError) as error:
            return error
        return record.path, record.caption.strip()


def read_image(path: str | os.PathLike[str], image_size: int, channels: int = 3) -> Tensor:
    """Read an image, crop it around its centre to a square, and resize it.

    Transparent pixels become white, 16-bit grey is scaled to 8 bits, and the camera's orientation
    tag is applied.

    Returns:
        (channels, image_size, image_size) uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is corrupt or truncated, or holds 32-bit grey values,
            whose range is unknown.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            # Pillow reads 16-bit PNG and PPM as mode I; in other formats mode I holds 32 bits.
            if image.mode.startswith("I;16") or (
                image.mode == "I" and opened.format in ("PNG", "PPM")
            ):
                pixels = np.asarray(image, dtype=np.float32)
                image = Image.fromarray((pixels / 257).clip(0, 255).round().astype(np.uint8))
            elif image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}: grey values of unknown range")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise any exception on damaged files
        raise ValueError(
            f"{path}: expected an image, got a corrupt or unsupported file ({error})"
        ) from error
    return (
        torch.from_numpy(np.array(image).reshape(image_size, image_size, channels))
        .permute(2, 0, 1)
        .contiguous()
    )


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Indices of the examples that a training step reads.

    This is a pure function, so that a resumed run needs no iterator state. Every epoch is a new
    permutation of all examples. The steps cut the sequence of epochs into batches; a batch may span
    two epochs, and every example is read.

    Returns:
        (batch_size,) int64 in `[0, num_examples)`.

    Raises:
        ValueError: a negative step, or no batch or examples.
    """
    if step < 0 or batch_size < 1 or num_examples < 1:
        raise ValueError(
            "expected step >= 0, batch_size >= 1 and num_examples >= 1, "
            f"got step={step}, batch_size={batch_size}, num_examples={num_examples}"
        )
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = _permutation(seed, int(epoch), num_examples)[offsets[in_epoch]]
    return indices


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


@dataclass
class _Record:
    place: str  # file and line, for messages
    path: Path = Path()
    caption: str = ""
    error: str | None = None


def _records_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(2, "image folder: no such folder", str(folder))
    found = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            2, f"image folder: expected {' or '.join(CAPTION_FILES)} in it", str(folder)
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder}: expected one captions file, got {', '.join(path.name for path in found)}"
        )
    return found[0]


def _records(records_file: Path) -> Iterator[_Record]:
    try:
        text = records_file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{records_file}: expected UTF-8 text ({error})") from error
    read_rows = {".tsv": _tsv_rows, ".csv": _csv_rows, ".jsonl": _json_rows}[records_file.suffix]
    for line, row in read_rows(text):
        place = f"{records_file}:{line}"
        if isinstance(row, str):
            yield _Record(place, error=row)
        elif line > 1 or row != ["path", "caption"]:
            yield _Record(place, records_file.parent / row[0], row[1])


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Line number, and [path, caption] or the error of the line.

    There is no quoting: a caption may hold any character except tab and newline.
    """
    for line, row in enumerate(text.split("\n"), 1):
        if row := row.removesuffix("\r"):
            yield line, _two_columns(row.split("\t"))


def _csv_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Line number, and [path, caption] or the error of the line."""
    rows = csv.reader(io.StringIO(text, newline=None), strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num, str(error)
            continue
        if row:
            yield rows.line_num, _two_columns(row)


def _two_columns(row: list[str]) -> list[str] | str:
    return row if len(row) == 2 else f"expected 2 columns, path and caption, got {len(row)}"


def _json_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Line number, and [path, caption] or the error of the line."""
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            record = json.loads(row)
        except (ValueError, RecursionError) as error:
            yield line, f"expected a JSON object ({error})"
            continue
        match record:
            case {"path": str(path), "caption": str(caption)}:
                yield line, [path, caption]
            case _:
                yield line, 'expected {"path": ..., "caption": ...} with two strings'
