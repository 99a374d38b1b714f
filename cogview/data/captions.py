"""Captioned images in a folder.

    folder/captions.tsv     path<TAB>caption, one record per line, or
    folder/captions.csv     path,caption, quoted as usual, or
    folder/captions.jsonl   {"path": "cat.png", "caption": "a cat"}
    folder/...              the images, in any format that Pillow reads

Paths are relative to the folder. A first line `path<TAB>caption` or `path,caption` is a header.
"""

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cogview.data.images import image_key, read_image
from cogview.data.order import held_out
from cogview.text_tokenizer import caption_problem

CAPTION_FILES = ("captions.tsv", "captions.csv", "captions.jsonl")


@dataclass
class Subset:
    """Some of the images of a folder."""

    images: "CaptionedImages"
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return self.images[self.indices[list(indices)].tolist()]


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
        keys: list of N numbers, equal for equal images (`image_key`).

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
        self.keys: list[int] = []

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
                    self.keys.append(result[2])
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

    @property
    def fingerprint(self) -> str:
        """Equal for equal images and captions."""
        keys = np.array(self.keys, np.uint64).tobytes()
        return hashlib.sha256(keys + "\0".join(self.captions).encode()).hexdigest()[:16]

    def split(self, held_out_fraction: float, seed: int) -> tuple["Subset", "Subset"]:
        """Images for training and held-out ones; the same images as `TokenDataset.split` holds out.

        Raises:
            ValueError: fewer than two different images.
        """
        out = held_out(np.array(self.keys, np.uint64), held_out_fraction, seed)
        return Subset(self, np.flatnonzero(~out)), Subset(self, np.flatnonzero(out))

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(
            [read_image(self.paths[i], self.image_size, self.channels) for i in indices]
        )

    def _check(self, record: "_Record") -> tuple[Path, str, int] | ValueError | OSError:
        if record.error is not None:
            return ValueError(f"{record.place}: {record.error}")
        if problem := caption_problem(record.caption):
            return ValueError(f"{record.place}: expected a caption for {record.path}, {problem}")
        try:
            image = read_image(record.path, self.image_size, self.channels)
        except FileNotFoundError:
            return FileNotFoundError(2, f"{record.place}: no such image", str(record.path))
        except (ValueError, OSError) as error:
            return error
        return record.path, record.caption.strip(), image_key(image)


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
