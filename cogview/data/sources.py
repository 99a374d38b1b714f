"""What the argument `--data` may name, and its records.

    photos/            a folder with captions.tsv, .csv or .jsonl, or metadata.csv or .jsonl in it
    photos/            a folder of images, each with a .txt beside it: one caption a line
    shards/            a folder of WebDataset shards (*.tar): image and .txt of the same name
    dataset/           any other folder that Hugging Face `datasets` loads (Parquet, save_to_disk)
    pairs.tsv          a table with a header: .tsv, .csv or .jsonl (one JSON object a line)
    captions_2017.json COCO captions; images in `--images`, or ../2017/ as COCO has them
    pairs.parquet      Parquet with images in it, or with their paths
    a-{000..009}.tar   WebDataset shards
    hf:owner/name      a data set of the Hugging Face hub (hf:owner/name@validation: another split)
    captions.txt       captions alone, one a line: for the text tokenizer

Paths of images are relative to the file that names them, or to `--images`. A table of exactly two
columns, path and caption, needs no header. A column `held_out` (true or false) says which images
are held out, in place of the hash of their pixels; other columns are kept as attributes.
"""

from __future__ import annotations

import csv
import functools
import importlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cogview.data.images import ImageFile

TABLES = tuple(
    f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in (".tsv", ".csv", ".jsonl")
)
IMAGE_COLUMNS = ("path", "image", "file_name", "filename", "filepath", "image_path", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences", "title", "description")


@dataclass
class Record:
    """An image with its captions, before anybody has looked at them.

    Attributes:
        place: file and line, or the like, for messages.
        image: where its bytes are; None for captions alone.
        captions: one or more.
        held_out: whether the source says that it is held out, or not; None if it does not say.
        attributes: what else the source says about it, by name.
        error: why it cannot be used.
    """

    place: str
    image: Path | ImageFile | None = None
    captions: tuple[str, ...] = ()
    held_out: bool | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass
class Source:
    """The records behind one `--data`.

    Attributes:
        rule: for people: as what the argument was understood.
        records: called for each pass over the records.
    """

    rule: str
    records: Callable[[], Iterator[Record]]


@dataclass
class Columns:
    """The names of the columns that matter; empty: the usual ones are tried in turn.

    Attributes:
        image: the column with the image or its path.
        captions: columns with captions; each gives the image one caption more.
        folder: what the paths of images are relative to; None: the folder of the file.
    """

    image: str = ""
    captions: Sequence[str] = ()
    folder: Path | None = None

    def choose(self, names: Iterable[str]) -> tuple[str, tuple[str, ...]]:
        """The column of the image and those of captions.

        Raises:
            ValueError: there is no such column.
        """
        names = list(names)
        image = [self.image] if self.image else [n for n in IMAGE_COLUMNS if n in names][:1]
        captions = list(self.captions) or [n for n in CAPTION_COLUMNS if n in names][:1]
        for option, usual, chosen in (
            ("--image-column", IMAGE_COLUMNS, image),
            ("--caption-column", CAPTION_COLUMNS, captions),
        ):
            expected = chosen or [f"one of {', '.join(usual)}"]
            if not chosen or not set(chosen) <= set(names):
                raise ValueError(
                    f"{option}: expected {' and '.join(expected)} among the columns, got "
                    f"{', '.join(names)}"
                )
        return image[0], tuple(captions)

    def record(self, place: str, row: Mapping[str, Any], folder: Path) -> Record:
        """The record of a row whose image is a path."""
        try:
            image, captions = self.choose(row)
        except ValueError as error:
            return Record(place, error=str(error))
        path = row[image]
        if not isinstance(path, str) or not path:
            return Record(place, error=f"expected a path in {image}, got {path!r}")
        rest = {n: v for n, v in row.items() if n not in (image, *captions, "held_out")}
        return _record(place, (self.folder or folder) / path, (row[n] for n in captions), row, rest)


class Member(NamedTuple):
    """A file in a tar that is not compressed."""

    shard: Path
    name: str
    offset: int
    size: int

    def open(self) -> io.BytesIO:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"


@dataclass(frozen=True, eq=False)
class Cell:
    """An image in a row of a Hugging Face data set."""

    name: str
    rows: Any  # datasets.Dataset with this column alone, not decoded
    column: str
    row: int
    folder: Path

    def open(self) -> BinaryIO:
        value = self.rows[self.row][self.column]
        found = value if isinstance(value, dict) else {}
        content = value if isinstance(value, bytes) else found.get("bytes")
        if content is not None:
            return io.BytesIO(content)
        path = value if isinstance(value, str) else found.get("path")
        if not path:
            raise ValueError(f"neither bytes nor a path in the column {self.column}")
        return open(self.folder / path, "rb")

    def __str__(self) -> str:
        return f"{self.name}: row {self.row}"


def open_source(data: str | os.PathLike[str], columns: Columns | None = None) -> Source:
    """Finds out what the argument names; the top of this module lists the rules.

    Raises:
        FileNotFoundError: there is no such file or folder, or a folder without data.
        ModuleNotFoundError: the package that reads it is not installed.
        ValueError: a folder with several tables, a wrong column, or a format that is not known.
    """
    columns = columns or Columns()
    name, path = str(data), Path(data)
    if name.startswith("hf:") or (not path.exists() and "@" in name):
        return _hugging_face(name, columns)
    if name.endswith(".tar"):
        return _shards(_expanded(name), columns)
    if path.is_dir():
        return _folder(path, columns)
    if not path.exists():
        raise FileNotFoundError(2, "--data: no such file or folder", name)
    match path.suffix:
        case ".txt":
            return Source(f"{path}: captions alone, one a line", lambda: _lines(path))
        case ".tsv" | ".csv" | ".jsonl":
            return _table(path, columns)
        case ".json":
            return _coco(path, columns)
        case ".parquet":
            return _hugging_face(name, columns)
    raise ValueError(
        f"{path}: expected .txt, .tsv, .csv, .jsonl, .json (COCO), .parquet or .tar, or a folder"
    )


def _folder(folder: Path, columns: Columns) -> Source:
    if tables := [folder / name for name in TABLES if (folder / name).is_file()]:
        if len(tables) > 1:
            raise ValueError(
                f"{folder}: expected one table, got {', '.join(path.name for path in tables)}; "
                "name one of them as --data"
            )
        return _table(tables[0], columns)
    if shards := sorted(folder.glob("*.tar")):
        return _shards(shards, columns)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")) or next(
        folder.rglob("*.parquet"), None
    ):
        return _hugging_face(str(folder), columns)
    if any(path.with_suffix(".txt").is_file() for path in _image_files(folder)):
        return Source(
            f"{folder}: images, each with a .txt beside it", lambda: _texts_beside(folder)
        )
    raise FileNotFoundError(
        2,
        f"--data: expected {', '.join(TABLES[:3])}, a .txt beside each image, *.tar or *.parquet "
        "in the folder",
        str(folder),
    )


# ---- captions alone, and captions beside images


def _lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line := line.removesuffix("\r").strip():
            yield Record(f"{path}:{number}", captions=(line,))


def _image_files(folder: Path) -> Iterator[Path]:
    from PIL import Image

    known = Image.registered_extensions()
    return (path for path in folder.rglob("*") if path.suffix.lower() in known)


def _texts_beside(folder: Path) -> Iterator[Record]:
    images = sorted(_image_files(folder))
    for image in images:
        path = image.with_suffix(".txt")
        try:
            captions = _captions(path.read_bytes())
        except FileNotFoundError:
            yield Record(str(image), error=f"expected its captions in {path.name} beside it")
        except ValueError as error:
            yield Record(str(path), error=f"expected UTF-8 text ({error})")
        else:
            yield Record(str(path), image, tuple(captions) or ("",))
    beside = {image.with_suffix(".txt") for image in images}
    for path in sorted(set(folder.rglob("*.txt")) - beside):
        yield Record(str(path), error="expected an image of the same name beside it")


# ---- tables


def _table(path: Path, columns: Columns) -> Source:
    if path.suffix == ".jsonl":
        rule, records = "one JSON object a line", lambda: _json_records(path, columns)
    else:
        read_rows = _tsv_rows if path.suffix == ".tsv" else _csv_rows
        first = next((row for _, row in read_rows(read_text(path)) if not isinstance(row, str)), [])
        header = _header(path, first, columns)
        rule = f"a table with the columns {', '.join(header) if header else 'path, caption'}"

        def records() -> Iterator[Record]:
            return _table_records(path, read_rows, header, columns)

    return Source(f"{path}: {rule}", records)


def _header(path: Path, first: list[str], columns: Columns) -> list[str]:
    """The names in the first row, or nothing if the table has no header."""
    try:
        columns.choose(first)
        return first
    except ValueError as error:
        usual = {*IMAGE_COLUMNS, *CAPTION_COLUMNS}
        named = columns.image or columns.captions or usual & {name.lower() for name in first}
        if len(first) <= 2 and not named:
            return []
        raise ValueError(f"{path}: {error}") from None


def _table_records(
    path: Path,
    read_rows: Callable[[str], Iterator[tuple[int, list[str] | str]]],
    header: list[str],
    columns: Columns,
) -> Iterator[Record]:
    names = header or ["path", "caption"]
    skip = bool(header)
    for line, row in read_rows(read_text(path)):
        place = f"{path}:{line}"
        if isinstance(row, str):
            yield Record(place, error=row)
        elif skip:
            skip = False
        elif len(row) != len(names):
            expected = f"expected {len(names)} columns, {', '.join(names)}, got {len(row)}"
            yield Record(place, error=expected)
        else:
            yield columns.record(place, dict(zip(names, row, strict=True)), path.parent)


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Line number, and the cells or the error of the line.

    There is no quoting: a caption may hold any character except tab and newline.
    """
    for line, row in enumerate(text.split("\n"), 1):
        if row := row.removesuffix("\r"):
            yield line, row.split("\t")


def _csv_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Line number, and the cells or the error of the line."""
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
            yield rows.line_num, row


def _json_records(path: Path, columns: Columns) -> Iterator[Record]:
    for line, row in enumerate(read_text(path).split("\n"), 1):
        place = f"{path}:{line}"
        if not row.strip():
            continue
        try:
            record = json.loads(row)
        except (ValueError, RecursionError) as error:
            yield Record(place, error=f"expected a JSON object ({error})")
            continue
        if isinstance(record, dict):
            yield columns.record(place, record, path.parent)
        else:
            yield Record(place, error=f"expected a JSON object, got {row.strip()[:40]}")


def _record(
    place: str,
    image: Path | ImageFile,
    cells: Iterable[Any],
    row: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> Record:
    """A cell holds a caption or a list of captions; of several cells, some may be empty."""
    captions: list[str] = []
    for cell in cells:
        found = cell if isinstance(cell, (list, tuple)) else [cell]
        if not all(isinstance(caption, str) or caption is None for caption in found):
            return Record(place, error=f"expected a caption or a list of captions, got {cell!r}")
        captions += [caption for caption in found if caption and caption.strip()]
    says = row.get("held_out")
    held_out = {"true": True, "1": True, "false": False, "0": False, "": None, "none": None}
    if (key := str(says).lower()) not in held_out:
        return Record(place, error=f"held_out: expected true or false, got {says!r}")
    return Record(place, image, tuple(captions) or ("",), held_out[key], attributes)


# ---- COCO


def _coco(path: Path, columns: Columns) -> Source:
    folder = columns.folder
    if folder is None:  # annotations/captions_train2017.json and train2017/*.jpg
        beside = path.parent.parent / path.stem.removeprefix("captions_")
        folder = beside if beside.is_dir() else path.parent
    return Source(f"{path}: COCO captions, images in {folder}", lambda: _coco_records(path, folder))


def _coco_records(path: Path, folder: Path) -> Iterator[Record]:
    try:
        content = json.loads(read_text(path))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[Any, list[str]] = {image: [] for image in names}
        unknown = []
        for annotation in content["annotations"]:
            if annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(annotation["caption"])
            else:
                unknown.append(annotation["image_id"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected COCO captions, a JSON object with images (id, file_name) and "
            f"annotations (image_id, caption): {error!r}"
        ) from error
    for image, name in names.items():
        yield _record(f"{path}: image {image}", folder / str(name), captions[image], {}, {})
    for image in unknown:
        yield Record(f"{path}: image {image}", error="expected it among the images, got a caption")


# ---- WebDataset


def _expanded(pattern: str) -> list[Path]:
    expand = optional_package("webdataset.shardlists").expand_urls
    shards = [Path(name) for name in expand(pattern)]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(2, "--data: no such shard", str(shard))
    return shards


def _shards(shards: Sequence[Path], columns: Columns) -> Source:
    split_name = optional_package("webdataset.tariterators").base_plus_ext
    rule = f"{shards[0]}{' ...' if len(shards) > 1 else ''}: {len(shards)} WebDataset shards"
    return Source(
        rule,
        lambda: itertools.chain.from_iterable(
            _shard_records(shard, split_name, columns) for shard in shards
        ),
    )


def _shard_records(
    shard: Path, split_name: Callable[[str], tuple[str | None, str]], columns: Columns
) -> Iterator[Record]:
    """Neighbouring files of the same name up to the first dot are one record."""

    def files() -> Iterator[tuple[str | None, str, Member]]:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.isfile():
                    member = Member(shard, info.name, info.offset_data, info.size)
                    yield *split_name(info.name), member
            # A tar ends with blocks of zeros: without one, it may have been cut between two files.
            if shard.stat().st_size < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")

    try:
        for key, group in itertools.groupby(files(), lambda file: file[0]):
            if key is not None:
                members = {extension.lower(): member for _, extension, member in group}
                yield _shard_record(f"{shard}: {key}", members, columns)
    except tarfile.ReadError as error:
        yield Record(str(shard), error=f"expected a whole tar, not compressed ({error})")


def _shard_record(place: str, members: Mapping[str, Member], columns: Columns) -> Record:
    from PIL import Image

    known = Image.registered_extensions()
    images = [e for e in members if "." + e in known]
    if columns.image:
        images = [columns.image] if columns.image in members else []
    if not images:
        return Record(place, error=f"expected an image among {', '.join(members)}")
    texts = [e for e in columns.captions or ("txt", *CAPTION_COLUMNS) if e in members]
    row: dict[str, Any] = {}
    try:
        if "json" in members:
            row = json.loads(members["json"].open().read())
            if not isinstance(row, dict):
                raise ValueError(f"got {row!r:.40}")
        captions: list[Any] = [_captions(members[e].open().read()) for e in texts]
    except (ValueError, RecursionError) as error:
        return Record(place, error=f"expected UTF-8 text and a JSON object ({error})")
    if not texts:
        captions = [row[n] for n in columns.captions or CAPTION_COLUMNS if n in row]
    if not captions:
        return Record(place, error=f"expected a caption among {', '.join((*members, *row))}")
    return _record(place, members[images[0]], captions, row, {})


# ---- Hugging Face


def _hugging_face(data: str, columns: Columns) -> Source:
    datasets = optional_package("datasets")
    name, _, split = data.removeprefix("hf:").partition("@")
    path, folder = Path(name), Path(name)
    if not data.startswith("hf:") and not path.exists():
        raise FileNotFoundError(2, "--data: no such file or folder", name)
    try:
        if data.startswith("hf:"):
            loaded, folder = datasets.load_dataset(name, split=split or "train"), Path()
        elif path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=name, split="train")
            folder = path.parent
        elif any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name)
    except Exception as error:  # of the network, of pyarrow, of datasets itself
        raise ValueError(f"{data}: the package datasets cannot load it: {error}") from error
    if isinstance(loaded, dict):
        if not split and len(loaded) == 1:
            (split,) = loaded
        if split not in loaded:
            raise ValueError(
                f"{data}: expected {name}@SPLIT with one of the splits {', '.join(loaded)}"
            )
        loaded = loaded[split]
    try:
        image, captions = columns.choose(loaded.column_names)
    except ValueError as error:
        raise ValueError(f"{data}: {error}") from None
    if isinstance(loaded.features[image], datasets.Image):
        loaded = loaded.cast_column(image, datasets.Image(decode=False))
    images = loaded.select_columns([image])
    texts = loaded.remove_columns([image])
    simple = [
        name
        for name, feature in texts.features.items()
        if isinstance(feature, datasets.Value) and name not in (*captions, "held_out")
    ]

    def records() -> Iterator[Record]:
        for number, row in enumerate(texts):
            cell = Cell(data, images, image, number, columns.folder or folder)
            attributes = {name: row[name] for name in simple}
            yield _record(str(cell), cell, [row[name] for name in captions], row, attributes)

    rule = f"a data set of {len(loaded)} rows, columns {image} and {', '.join(captions)}"
    return Source(f"{data}: {rule}", records)


@functools.cache
def optional_package(name: str) -> Any:
    """Imports a package of the extra `data`.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        root = name.partition(".")[0]
        raise ModuleNotFoundError(
            f"{root} is not installed; run pip install '.[data]' in a clone of the repository"
        ) from error


def _captions(text: bytes) -> list[str]:
    """One a line."""
    return [line.strip() for line in text.decode("utf-8-sig").split("\n") if line.strip()]


def read_text(path: Path) -> str:
    """
    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from error
