"""What `--data` may name: every kind of source gives the same images and captions."""

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from cogview.data.captions import CaptionedImages, read_captions
from cogview.data.sources import Columns, open_source

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
CAPTIONS = {name: (f"a {name} card", f"eine Karte in {name}") for name in COLOURS}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    return folder


def tables(folder: Path, images: Path) -> list[tuple[Path, Columns]]:
    """The same data as a TSV, CSV and JSONL, with columns of other names."""
    tsv, csv, jsonl = (folder / f"pairs{suffix}" for suffix in (".tsv", ".csv", ".jsonl"))
    rows = [(f"{name}.png", *captions, len(name)) for name, captions in CAPTIONS.items()]
    header = "file_name", "en", "de", "length"
    tsv.write_text("".join("\t".join(map(str, row)) + "\n" for row in (header, *rows)))
    csv.write_text("".join(",".join(map(str, row)) + "\n" for row in (header, *rows)))
    objects = [{"img": row[0], "caption": row[1:3], "length": row[3]} for row in rows]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in objects))
    named = Columns(captions=["en", "de"], folder=images)
    return [(tsv, named), (csv, named), (jsonl, Columns(folder=images))]


def texts_beside(folder: Path) -> None:
    for name, captions in CAPTIONS.items():
        (folder / f"{name}.txt").write_text("\n".join(captions) + "\n\n")


def load(data: object, columns: Columns | None = None, **options: bool) -> CaptionedImages:
    return CaptionedImages(open_source(str(data), columns), 16, progress=False, **options)


def assert_complete(loaded: CaptionedImages, data: object) -> None:
    colours = loaded[list(range(len(loaded)))][:, :, 8, 8].tolist()
    by_colour = dict(zip(map(tuple, colours), loaded.captions, strict=True))
    assert by_colour == {colour: CAPTIONS[name] for name, colour in COLOURS.items()}, data


def test_tables_name_their_columns(tmp_path: Path, images: Path) -> None:
    for path, columns in tables(tmp_path, images):
        loaded = load(path, columns)
        assert_complete(loaded, path)
        assert [int(row["length"]) for row in loaded.attributes] == [3, 5, 4]
        captions = read_captions(open_source(path, columns))
        assert captions == [caption for pair in CAPTIONS.values() for caption in pair]
    tsv = tmp_path / "pairs.tsv"
    assert (
        "pairs.tsv: a table with the columns file_name, en, de"
        in open_source(tsv, Columns(captions=["en"])).rule
    )
    with pytest.raises(ValueError, match="--caption-column: expected zh among the .*en, de"):
        open_source(tsv, Columns(captions=["zh"]))
    with pytest.raises(ValueError, match="--caption-column: expected one of caption, captions"):
        open_source(tsv)
    with pytest.raises(ValueError, match="--image-column: expected photo among the columns"):
        open_source(tsv, Columns(image="photo"))
    tsv.write_text("name\tcaption\nred.png\ta red card\n")  # a header, and no pair
    with pytest.raises(ValueError, match="--image-column: expected one of path, image"):
        open_source(tsv)


def test_texts_beside_the_images(images: Path) -> None:
    texts_beside(images)
    assert_complete(load(images), "texts")
    assert "images, each with a .txt beside it" in open_source(images).rule
    (images / "green.txt").unlink()
    (images / "lost.txt").write_text("a caption without an image")
    with pytest.raises(ValueError) as error:
        load(images)
    assert "2 of 4 records cannot be used" in str(error.value)
    assert "green.png: expected its captions in green.txt beside it" in str(error.value)
    assert "lost.txt: expected an image of the same name beside it" in str(error.value)


def test_coco(tmp_path: Path, images: Path) -> None:
    (tmp_path / "annotations").mkdir()
    images.rename(tmp_path / "train2017")
    path = tmp_path / "annotations" / "captions_train2017.json"
    content = {
        "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(COLOURS)],
        "annotations": [
            {"image_id": i, "caption": caption}
            for number in range(2)
            for i, name in enumerate(COLOURS)
            for caption in CAPTIONS[name][number : number + 1]
        ],
    }
    path.write_text(json.dumps(content))
    assert_complete(load(path), "coco")
    content["annotations"][2]["image_id"] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 of 4 .*image 9: expected it among the images"):
        load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected COCO captions, a JSON object with images"):
        load(path)


def test_webdataset(tmp_path: Path, images: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=2, verbose=0) as writer:
        for name, captions in CAPTIONS.items():
            pixels = (images / f"{name}.png").read_bytes()
            writer.write({"__key__": name, "png": pixels, "txt": "\n".join(captions)})
    for data in (folder, folder / "{000..001}.tar"):
        assert_complete(load(data), data)
    assert "2 WebDataset shards" in open_source(folder).rule
    other = tmp_path / "other.tar"
    with webdataset.TarWriter(str(other)) as writer:
        for name, value in (("red", [1]), ("green", {"caption": "a green card"}), ("blue", "text")):
            pixels = (images / f"{name}.png").read_bytes()
            writer.write({"__key__": name, "png": pixels, "json": json.dumps(value).encode()})
    with pytest.raises(ValueError, match=r"2 of 3 .*red: .* a JSON object \(got \[1\]\); .*blue"):
        load(other)
    whole = (folder / "000.tar").read_bytes()
    with tarfile.open(folder / "000.tar") as tar:
        second = tar.getmember("green.png").offset
    for cut in (700, second):  # within a file, and between two records
        (folder / "000.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"1 of \d .*000\.tar: expected a whole tar"):
            load(folder)
    with pytest.raises(FileNotFoundError, match="no such shard"):
        open_source(str(folder / "{000..002}.tar"))


def test_hugging_face(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet with images, and a saved data set with a split; both without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = {
        "image": [str(images / f"{name}.png") for name in COLOURS],
        "caption": [list(captions) for captions in CAPTIONS.values()],
        "held_out": [False, True, False],
        "number": [1, 2, 3],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "a.parquet")
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "parquet"
    for name in (folder, folder / "a.parquet", f"{tmp_path / 'saved'}@test"):
        loaded = load(name)
        assert_complete(loaded, name)
        assert loaded.held_out.tolist() == [0, 1, 0]
        assert [row["number"] for row in loaded.attributes] == [1, 2, 3]
    with pytest.raises(ValueError, match="@SPLIT with one of the splits train, test"):
        load(tmp_path / "saved")
    with pytest.raises(ValueError, match="expected de among the columns, got image, caption"):
        open_source(folder, Columns(captions=["de"]))
    # What other programs write: bytes alone; some are missing.
    pixels = [(images / f"{name}.png").read_bytes() for name in COLOURS]
    plain = tmp_path / "plain.parquet"
    rows |= {"image": pixels}
    datasets.Dataset.from_dict(rows).to_parquet(plain)
    assert_complete(load(plain), plain)
    rows |= {"image": [*pixels[:2], None]}
    datasets.Dataset.from_dict(rows).to_parquet(plain)
    with pytest.raises(ValueError, match="1 of 3 .* row 2: .*neither bytes nor a path in the col"):
        load(plain)
    (folder / "a.parquet").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"a\.parquet: the package datasets cannot load it"):
        open_source(folder / "a.parquet")


def test_captions_alone(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a red card\n\na blue card\n")
    source = open_source(tmp_path / "captions.txt")
    assert read_captions(source) == ["a red card", "a blue card"]
    with pytest.raises(ValueError, match="expected an image, got a caption alone"):
        CaptionedImages(source, 16, progress=False)


def test_captions_are_read_without_their_images(tmp_path: Path) -> None:
    (tmp_path / "captions.tsv").write_text("gone.png\ta red card\n")
    assert read_captions(open_source(tmp_path)) == ["a red card"]


def test_a_column_says_what_is_held_out(tmp_path: Path, images: Path) -> None:
    for values, expected in ((("true", "false", ""), [1, 0, -1]), (("1", "0", "0"), [1, 0, 0])):
        rows = zip(COLOURS, values, strict=True)
        lines = "".join(f"{name}.png\ta card\t{value}\n" for name, value in rows)
        (images / "captions.tsv").write_text("path\tcaption\theld_out\n" + lines)
        assert load(images).held_out.tolist() == expected
    # An image is held out with all its captions; the text tokenizer does not see them either.
    header = "path\tcaption\theld_out\n"
    rest = "green.png\tgreen\tfalse\nblue.png\tblue\t\n"
    (images / "captions.tsv").write_text(header + "red.png\ta\t\nred.png\tb\ttrue\n" + rest)
    assert load(images).held_out.tolist() == [1, 0, -1]
    assert read_captions(open_source(images)) == ["green", "blue"]
    (images / "captions.tsv").write_text(header + "red.png\ta\ttrue\n")
    with pytest.raises(ValueError, match="expected captions to train on, got held-out ones alone"):
        read_captions(open_source(images))
    (images / "captions.tsv").write_text(header + "red.png\ta card\tperhaps\n")
    with pytest.raises(ValueError, match="held_out: expected true or false, got 'perhaps'"):
        load(images)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="expected captions.tsv, .*in the folder"):
        open_source(tmp_path)
    (tmp_path / "a.docx").touch()
    with pytest.raises(ValueError, match=r"a\.docx: expected \.txt, \.tsv"):
        open_source(tmp_path / "a.docx")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogview.data import sources

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    sources.optional_package.cache_clear()
    monkeypatch.setattr(sources.importlib, "import_module", missing)
    (tmp_path / "a.tar").touch()
    with pytest.raises(
        ModuleNotFoundError, match=r"webdataset is not installed; run pip .*\[data\]"
    ):
        open_source(tmp_path)
