"""Captions and images of a source, checked before anything is trained on them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from cogview.data.images import ImageFile, image_key, read_image
from cogview.data.order import NOT_GIVEN, data_fingerprint, held_out
from cogview.data.sources import Member, Record, Source
from cogview.files import atomic_write
from cogview.text_tokenizer import caption_problem

CHUNK = 1024  # records that are checked side by side
NUM_NAMED = 3  # bad records in a message; the others are in the list


@dataclass
class Subset:
    """Some of the images of a source."""

    images: CaptionedImages
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return self.images[self.indices[list(indices)].tolist()]

    @property
    def keys(self) -> np.ndarray:
        """Of these images, as `CaptionedImages.keys`."""
        return self.images.keys[self.indices]


class CaptionedImages:
    """The images of a source; `images[[0, 7]]` reads two of them: (2, C, H, W) uint8.

    The constructor decodes every image once, so that a corrupt one is found before training and not
    in the middle of it. Records that name the same file are one image with several captions.

    Args:
        source: where they are (`cogview.data.sources.open_source`).
        image_size: side in pixels; images are cropped around their centre to a square and resized.
        channels: 3 for RGB, 1 for grey.
        skip_bad: skip records that cannot be used, with one warning that counts them.
        bad_records: a file to list all of them in; None: the message lists them all.
        known_keys: a file that keeps the keys of the images, so that the next command decodes only
            those that are new or have changed (by size and time of the last change).
        progress: show a progress bar if standard error is a terminal.

    Attributes:
        files: list of N files.
        captions: list of N tuples of one or more captions.
        keys: (N,) uint64, equal for equal images (`image_key`).
        held_out: (N,) int8: 1 or 0 if the source says so, `NOT_GIVEN` if it does not.
        attributes: list of N mappings: what else the source says, by name.

    Raises:
        ValueError: no usable record; unless `skip_bad`, any corrupt or missing image, caption
            without a visible character or malformed record.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        channels: int = 3,
        *,
        skip_bad: bool = False,
        bad_records: str | os.PathLike[str] | None = None,
        known_keys: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ):
        if channels not in (1, 3):
            raise ValueError(f"image_tokenizer.channels: expected 1 or 3, got {channels}")
        self.image_size = image_size
        self.channels = channels
        self.files: list[Path | ImageFile] = []
        self.captions: list[tuple[str, ...]] = []
        self.attributes: list[Mapping[str, Any]] = []
        keys: list[int] = []
        given: list[int] = []
        known: dict[Path | ImageFile, int] = {}
        self._keys_before, self._keys_now = self._read_keys(known_keys), dict[str, int]()
        bad: list[str] = []
        num_records = 0
        for record, key in self._checked(source, progress):
            num_records += 1
            if record.error is not None:
                bad.append(f"{record.place}: {record.error}")
                continue
            assert record.image is not None
            says = NOT_GIVEN if record.held_out is None else int(record.held_out)
            index = known.setdefault(record.image, len(self.files))
            if index < len(self.files):
                self.captions[index] += record.captions
                given[index] = max(given[index], says)
                continue
            self.files.append(record.image)
            self.captions.append(record.captions)
            self.attributes.append(record.attributes)
            keys.append(key)
            given.append(says)
        _report(source, bad, num_records, skip_bad, bad_records)
        if known_keys is not None and self._keys_now != self._keys_before:
            with atomic_write(known_keys) as temporary:
                content = {"of": self._decoding(), "keys": self._keys_now}
                temporary.write_text(json.dumps(content), encoding="utf-8")
        del self._keys_before, self._keys_now
        self.keys = np.array(keys, np.uint64)
        self.held_out = np.array(given, np.int8)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """Equal for equal images in the same order, whatever their captions."""
        return data_fingerprint(self.keys, self.held_out, ())

    def split(self, held_out_fraction: float, seed: int) -> tuple[Subset, Subset]:
        """Images for training and held-out ones; the same images as `TokenDataset.split` holds out.

        Raises:
            ValueError: fewer than two different images.
        """
        out = held_out(self.keys, self.held_out, held_out_fraction, seed)
        return Subset(self, np.flatnonzero(~out)), Subset(self, np.flatnonzero(out))

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(
            [read_image(self.files[i], self.image_size, self.channels) for i in indices]
        )

    def _checked(self, source: Source, progress: bool) -> Iterator[tuple[Record, int]]:
        """Each record, and the key of its image; what is wrong with it stands in its `error`."""
        records = source.records()
        bar = tqdm(desc="images", unit="image", disable=None if progress else True)
        with bar, ThreadPoolExecutor() as pool:
            while chunk := list(islice(records, CHUNK)):
                for record, key in zip(chunk, pool.map(self._check, chunk), strict=True):
                    bar.update()
                    yield record, key

    def _check(self, record: Record) -> int:
        _check_captions(record)
        if record.error is not None:
            return 0
        if record.image is None:
            record.error = "expected an image, got a caption alone"
            return 0
        try:
            stamp = _stamp(record.image)
            key = self._keys_before.get(stamp, self._keys_now.get(stamp))
            if key is None:
                key = image_key(read_image(record.image, self.image_size, self.channels))
            if stamp:
                self._keys_now[stamp] = key
            return key
        except FileNotFoundError:
            record.error = f"no such image: {record.image}"
        except (ValueError, OSError) as error:
            record.error = str(error)
        return 0

    def _decoding(self) -> list[object]:
        """What the key of an image depends on, beside the image."""
        return [self.image_size, self.channels, PIL.__version__]

    def _read_keys(self, path: str | os.PathLike[str] | None) -> dict[str, int]:
        try:
            content = json.loads(Path(path or "").read_text(encoding="utf-8"))
            return dict(content["keys"]) if content["of"] == self._decoding() else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # none yet, or damaged: all images are decoded again


def _stamp(image: Path | ImageFile) -> str:
    """Changes when the image does; empty if that cannot be told."""
    file, place = (image.shard, image.offset) if isinstance(image, Member) else (image, 0)
    if not isinstance(file, Path):
        return ""
    status = file.stat()
    # Not the time of modification, which tools that unpack or copy set to that of the original.
    return f"{file.absolute()} {place} {status.st_size} {status.st_ctime_ns}"


def read_captions(
    source: Source,
    *,
    skip_bad: bool = False,
    bad_records: str | os.PathLike[str] | None = None,
) -> list[str]:
    """The captions of a source to train on, without a look at its images: all but those of images
    that the source says are held out. What a hash of the pixels holds out is not left out.

    Args: as for `CaptionedImages`.

    Raises:
        ValueError: no usable record, or only held-out ones; unless `skip_bad`, a malformed record
            or a caption without a visible character.
    """
    found: list[tuple[Path | ImageFile | None, tuple[str, ...]]] = []
    out: set[Path | ImageFile | None] = set()
    bad: list[str] = []
    num_records = 0
    for record in source.records():
        num_records += 1
        _check_captions(record)
        if record.error is not None:
            bad.append(f"{record.place}: {record.error}")
            continue
        found.append((record.image, record.captions))
        if record.held_out:
            out.add(record.image)
    _report(source, bad, num_records, skip_bad, bad_records)
    captions = [caption for image, of_image in found if image not in out for caption in of_image]
    if not captions:
        raise ValueError(f"{source.rule}: expected captions to train on, got held-out ones alone")
    return captions


def _check_captions(record: Record) -> None:
    if record.error is None:
        for caption in record.captions:
            if problem := caption_problem(caption):
                of_image = f" for {record.image}" if record.image is not None else ""
                record.error = f"expected a caption{of_image}, {problem}"
        record.captions = tuple(caption.strip() for caption in record.captions)


def _report(
    source: Source,
    bad: list[str],
    num_records: int,
    skip_bad: bool,
    bad_records: str | os.PathLike[str] | None,
) -> None:
    """Lists the bad records; then a warning, or an error."""
    if bad_records is not None:
        if bad:
            with atomic_write(bad_records) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
        else:
            Path(bad_records).unlink(missing_ok=True)
    named = bad if bad_records is None else bad[:NUM_NAMED]
    more = "" if len(named) == len(bad) else f"; all are listed in {bad_records}"
    listed = "; ".join(named) + more
    if len(bad) == num_records:
        raise ValueError(
            f"{source.rule}: expected at least one usable record, got none"
            + (f" in {num_records}: {listed}" if bad else "")
        )
    if bad and not skip_bad:
        raise ValueError(
            f"{source.rule}: {len(bad)} of {num_records} records cannot be used: {listed}; repair "
            "them, or skip them with --skip-bad"
        )
    if bad:
        warnings.warn(
            f"{source.rule}: skipped {len(bad)} of {num_records} records: {listed}", stacklevel=3
        )
