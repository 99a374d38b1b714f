"""Tokenised pairs of caption and image, which the GPT is trained on.

    tokens/meta.json        vocabularies, fingerprints; file, size and SHA-256 of each array
    tokens/codes-1f0c….npy  image codes, and so on: one file for each array

The arrays stay on disk and are mapped into memory. A file is named after its content, and
`meta.json`, which names the files, is replaced last: whoever is killed while writing leaves the
earlier tokens as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from cogview.data.images import Images, image_key
from cogview.data.loading import load
from cogview.data.order import NOT_GIVEN, data_fingerprint, held_out
from cogview.files import atomic_write
from cogview.image_tokenizer import ImageTokenizer
from cogview.text_tokenizer import TextTokenizer

ARRAYS = ("text_ids", "text_offsets", "image_of", "codes", "image_keys", "held_out")
CHUNK_BYTES = 1 << 24  # that are in memory while a file is read or written


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """Tokenised pairs of caption and image. An image with several captions is several pairs.

    The arrays hold all pairs; `select` and `split` share them, and choose `rows`.

    Attributes:
        text_ids: (total text length,) int32, the piece ids of all captions, concatenated.
        text_offsets: (P + 1,) int64; caption `i` is
            `text_ids[text_offsets[i] : text_offsets[i + 1]]`.
        codes: (M, h, w), of each image; int16 if the codebook is small enough, else int32.
        image_keys: (M,) uint64, equal for equal images (`cogview.data.images.image_key`).
        text_vocab_size: every piece id is below this.
        codebook_size: every code is below this.
        made_from: fingerprints of the two tokenizers and of the data, by name.
        image_of: (P,) int64, the image of each caption; by default one caption for each image.
        held_out: (M,) int8: what the data says (`cogview.data.order.held_out`); by default nothing.
        rows: (N,) int64, the pairs of this data set; by default all.
        checksums: SHA-256 of the arrays, by name, if they are known.
    """

    text_ids: np.ndarray
    text_offsets: np.ndarray
    codes: np.ndarray
    image_keys: np.ndarray
    text_vocab_size: int
    codebook_size: int
    made_from: Mapping[str, str] = field(default_factory=dict)
    image_of: np.ndarray = None  # type: ignore[assignment]
    held_out: np.ndarray = None  # type: ignore[assignment]
    rows: np.ndarray = None  # type: ignore[assignment]
    checksums: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        offsets, num = self.text_offsets, len(self.codes)
        if self.codes.ndim != 3:
            raise ValueError(f"codes: expected (M, h, w), got {self.codes.shape}")
        defaults = {
            "image_of": lambda: np.arange(num),
            "held_out": lambda: np.full(num, NOT_GIVEN, np.int8),
            "rows": lambda: np.arange(len(self.image_of)),
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default())
        pairs = len(self.image_of)
        if offsets.shape != (pairs + 1,) or offsets[0] != 0 or offsets[-1] != len(self.text_ids):
            raise ValueError(
                f"text_offsets: expected {pairs + 1} from 0 to {len(self.text_ids)}, "
                f"got shape {offsets.shape}"
            )
        for name in ("image_keys", "held_out"):
            if getattr(self, name).shape != (num,):
                raise ValueError(f"{name}: expected ({num},), got {getattr(self, name).shape}")
        if self.checksums is None:  # else they were checked when they were written
            self._check_values()

    def _check_values(self) -> None:
        if (empty := np.diff(self.text_offsets) <= 0).any():
            raise ValueError(f"text_ids: caption {int(empty.argmax())} is empty")
        for name, ids, limit in (
            ("text_ids", self.text_ids, self.text_vocab_size),
            ("codes", self.codes, self.codebook_size),
            ("image_of", self.image_of, len(self.codes)),
        ):
            _check_range(name, ids, limit)

    @classmethod
    def encode(
        cls,
        folder: str | os.PathLike[str],
        captions: Sequence[str | Sequence[str]],
        images: Tensor | Images,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        *,
        held_out: np.ndarray | None = None,
        batch_size: int = 64,
        workers: int = 0,
        progress: bool = True,
    ) -> TokenDataset:
        """Tokenises captions and images into a folder; a batch of images is in memory at a time.

        Args:
            folder: earlier tokens in it are replaced at the end.
            captions: for each of M images its caption, or several.
            images: M images, as a tensor (M, C, H, W) or as `CaptionedImages`.
            held_out: (M,) int8, as `CaptionedImages.held_out`.
            workers: processes that read images.

        Raises:
            ValueError: captions and images differ in number, or a caption is empty.
            OSError: the tokens cannot be written; earlier ones are intact.
        """
        num = len(images)
        if len(captions) != num:
            raise ValueError(
                f"captions: expected one or more for each of {num} images, got {len(captions)}"
            )
        given = np.full(num, NOT_GIVEN, np.int8) if held_out is None else held_out
        codebook_size, side = image_tokenizer.config.codebook_size, image_tokenizer.config.code_size
        dtype = np.int16 if codebook_size <= 2**15 else np.int32
        texts = [(text,) if isinstance(text, str) else tuple(text) for text in captions]
        batches = [
            list(range(start, min(start + batch_size, num))) for start in range(0, num, batch_size)
        ]
        with _writing(Path(folder), dtype, (side, side)) as arrays:
            arrays["text_offsets"].append([0])
            total = 0
            for index, of_image in enumerate(texts):
                for text in of_image:
                    pieces = text_tokenizer.encode(text)
                    total += len(pieces)
                    arrays["text_ids"].append(pieces)
                    arrays["text_offsets"].append([total])
                arrays["image_of"].append([index] * len(of_image))
            bar = tqdm(total=num, desc="codes", unit="image", disable=None if progress else True)
            keys: list[int] = []
            with bar, contextlib.closing(load(images.__getitem__, batches, workers)) as loaded:
                for batch in loaded:
                    keys += [image_key(image) for image in batch]
                    arrays["codes"].append(image_tokenizer.encode(batch, batch_size).cpu().numpy())
                    bar.update(len(batch))
            arrays["image_keys"].append(keys)
            arrays["held_out"].append(given)
            arrays.finish(
                text_vocab_size=text_tokenizer.vocab_size,
                codebook_size=codebook_size,
                made_from={
                    "text tokenizer": text_tokenizer.fingerprint,
                    "image tokenizer": image_tokenizer.fingerprint,
                    "data": data_fingerprint(np.array(keys, np.uint64), given, texts),
                },
            )
        return cls.load(folder, verify=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for equal tokens of the same rows."""
        checksums = self.checksums or {name: _sha256(getattr(self, name)) for name in ARRAYS}
        digest = hashlib.sha256(json.dumps([checksums[name] for name in ARRAYS]).encode())
        digest.update(np.ascontiguousarray(self.rows, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def select(self, indices: np.ndarray) -> TokenDataset:
        """Some of the pairs; the arrays are shared, not copied."""
        return dataclasses.replace(self, rows=self.rows[indices])

    def split(self, held_out_fraction: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
        """Training and held-out pairs, split by image (`cogview.data.order.held_out`).

        Raises:
            ValueError: fewer than two different images.
        """
        images = self.image_of[self.rows]
        out = held_out(self.image_keys[images], self.held_out[images], held_out_fraction, seed)
        return self.select(np.flatnonzero(~out)), self.select(np.flatnonzero(out))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Piece ids (text length,) and codes (h, w) of pair `i`."""
        row = self.rows[i]
        start, stop = self.text_offsets[row : row + 2]
        return self.text_ids[start:stop], self.codes[self.image_of[row]]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes all arrays to a folder; earlier tokens in it are replaced at the end.

        Raises:
            ValueError: this is a part of a data set.
            OSError: the tokens cannot be written; earlier ones are intact.
        """
        if len(self) != len(self.image_of):
            raise ValueError(f"rows: expected all {len(self.image_of)} pairs, got {len(self)}")
        with _writing(Path(folder), self.codes.dtype, self.codes.shape[1:]) as arrays:
            for name in ARRAYS:
                array = getattr(self, name)
                rows = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
                for start in range(0, len(array), rows):
                    arrays[name].append(array[start : start + rows])
            arrays.finish(
                text_vocab_size=self.text_vocab_size,
                codebook_size=self.codebook_size,
                made_from=dict(self.made_from),
            )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> TokenDataset:
        """Opens the tokens in a folder; the arrays are mapped, not read.

        Args:
            verify: read all files once and compare their checksums; their sizes are compared
                always.

        Raises:
            FileNotFoundError: there are none.
            ValueError: a file is missing, truncated or damaged; the message names it.
        """
        path = Path(folder) / "meta.json"
        try:
            meta = json.loads(path.read_bytes())
            entries = {name: dict(meta["arrays"][name]) for name in ARRAYS}
            arrays = {n: _mapped(Path(folder), entry, verify) for n, entry in entries.items()}
            return cls(
                **arrays,
                text_vocab_size=meta["text_vocab_size"],
                codebook_size=meta["codebook_size"],
                made_from=meta["made_from"],
                checksums={name: entry["sha256"] for name, entry in entries.items()},
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            message = "tokens: no such folder, or no meta.json in it; run cogview encode first"
            raise FileNotFoundError(2, message, str(folder)) from error
        except _Damaged:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected the description of a token data set, got a damaged file "
                f"({error!r}); encode the data again"
            ) from error


class _Damaged(ValueError):
    pass


def _mapped(folder: Path, entry: Mapping[str, Any], verify: bool) -> np.ndarray:
    path = folder / Path(entry["file"]).name
    problem = None
    if not path.is_file():
        problem = "no such file"
    elif (size := path.stat().st_size) != entry["bytes"]:
        problem = f"expected {entry['bytes']} bytes, got {size}"
    elif verify and _sha256_of_file(path) != entry["sha256"]:
        problem = "its content has changed since it was written (SHA-256)"
    if problem is not None:
        raise _Damaged(f"{path}: {problem}; encode the data again")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise _Damaged(f"{path}: {error}; encode the data again") from error


class _Growing:
    """A `.npy` file to which rows are appended."""

    def __init__(self, path: Path, dtype: Any, row_shape: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.row_shape = path, np.dtype(dtype), row_shape
        self.length = 0
        self.file = open(path, "wb+")
        self._write_header()
        self.begin = self.file.tell()

    def append(self, rows: Any) -> None:
        array = np.asarray(rows, self.dtype).reshape(-1, *self.row_shape)
        self.length += len(array)
        self.file.write(array.tobytes())

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.begin, "numpy leaves room for the length to grow"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def _write_header(self) -> None:
        header = np.lib.format.header_data_from_array_1_0(
            np.empty((0, *self.row_shape), self.dtype)
        )
        header["shape"] = (self.length, *self.row_shape)
        np.lib.format.write_array_header_1_0(self.file, header)


class _Arrays(dict[str, _Growing]):
    """The arrays of a data set while they are written."""

    def __init__(self, folder: Path, codes_dtype: Any, code_shape: tuple[int, ...]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        dtypes = (np.int32, np.int64, np.int64, codes_dtype, np.uint64, np.int8)
        for name, dtype in zip(ARRAYS, dtypes, strict=True):
            shape = code_shape if name == "codes" else ()
            self[name] = _Growing(folder / f".{name}.partial.npy", dtype, shape)

    def finish(self, **meta: Any) -> None:
        """Gives the files their names, and replaces `meta.json`."""
        entries = {}
        for name, array in self.items():
            array.close()
            checksum = _sha256_of_file(array.path)
            file = self.folder / f"{name}-{checksum[:12]}.npy"
            os.replace(array.path, file)
            entries[name] = {
                "file": file.name,
                "dtype": str(array.dtype),
                "shape": [array.length, *array.row_shape],
                "bytes": file.stat().st_size,
                "sha256": checksum,
            }
        with atomic_write(self.folder / "meta.json") as temporary:
            temporary.write_text(json.dumps({**meta, "arrays": entries}, indent=1) + "\n")
        kept = {entry["file"] for entry in entries.values()}
        for path in self.folder.glob("*.npy"):
            if path.name not in kept:
                path.unlink()


@contextlib.contextmanager
def _writing(folder: Path, dtype: Any, code_shape: tuple[int, ...]) -> Iterator[_Arrays]:
    before = " earlier tokens are intact" if (folder / "meta.json").is_file() else ""
    arrays: dict[str, _Growing] = {}
    try:
        arrays = _Arrays(folder, dtype, code_shape)
        yield arrays
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent != folder:
            raise  # of an image
        raise OSError(
            error.errno, f"tokens not saved: {error.strerror or error};{before}", str(folder)
        ) from error
    finally:
        for array in arrays.values():
            with contextlib.suppress(OSError):  # a full disk, while the rest is flushed
                array.file.close()
            array.path.unlink(missing_ok=True)


def _check_range(name: str, ids: np.ndarray, limit: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < limit:
        raise ValueError(f"{name}: expected 0 to {limit - 1}, got {ids.min()} to {ids.max()}")


def _sha256(array: np.ndarray) -> str:
    """Of the file that the array would be saved as."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
