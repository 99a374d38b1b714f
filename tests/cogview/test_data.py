import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cogview.data.captions import CaptionedImages
from cogview.data.images import read_image
from cogview.data.order import held_out, read_order
from cogview.data.sources import open_source

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    write_tsv(tmp_path, *[(f"{name}.png", f"a {name} card") for name in COLOURS])
    return tmp_path


def write_tsv(folder: Path, *rows: tuple[str, ...]) -> None:
    (folder / "captions.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))


def load(folder: Path, **options: bool) -> CaptionedImages:
    return CaptionedImages(open_source(folder), 16, progress=False, **options)


def test_reads_captions_and_images(folder: Path) -> None:
    images = load(folder)
    assert images.captions == [("a red card",), ("a green card",), ("a blue card",)]
    batch = images[[2, 0]]
    assert batch.shape == (2, 3, 16, 16) and batch.dtype == torch.uint8
    assert batch[:, :, 8, 8].tolist() == [[0, 0, 255], [255, 0, 0]]


def test_the_three_formats_agree(folder: Path) -> None:
    rows = [("red.png", 'a "red" card, large'), ("green.png", "ein grünes Blatt")]
    tsv, jsonl = folder / "captions.tsv", folder / "captions.jsonl"
    write_tsv(folder, ("path", "caption"), *rows)
    expected = load(folder).captions
    assert expected == [(caption,) for _, caption in rows]
    tsv.unlink()
    jsonl.write_text("".join(json.dumps({"path": p, "caption": c}) + "\n" for p, c in rows))
    assert load(folder).captions == expected
    jsonl.unlink()
    (folder / "captions.csv").write_text(
        'path,caption\nred.png,"a ""red"" card, large"\n\ngreen.png,ein grünes Blatt\n'
    )
    assert load(folder).captions == expected


def test_crops_the_centre(tmp_path: Path) -> None:
    image = Image.new("L", (60, 20), 0)
    image.paste(255, (20, 0, 40, 20))  # only the middle third is white
    image.save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 20, 1) == 255).all()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), [255, 255, 255]),
        (Image.new("L", (8, 8), 128), [128, 128, 128]),
        (Image.new("1", (8, 8), 1), [255, 255, 255]),
        (Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16)), [127, 127, 127]),
    ],
    ids=["transparent", "grey", "black and white", "16 bit"],
)
def test_kinds_of_images(tmp_path: Path, image: Image.Image, expected: list[int]) -> None:
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 8)[:, 4, 4].tolist() == expected


def test_a_corrupt_image_is_named(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "green.png")
    data = (folder / "green.png").read_bytes()
    for broken in (b"", b"no image", data[:10], data[: len(data) // 2]):
        (folder / "green.png").write_bytes(broken)
        with pytest.raises(ValueError, match=r"green\.png: expected an image, got a corrupt"):
            load(folder)


@pytest.mark.parametrize("kind", ["I;16.png", "I.ppm", "I;16.tif"])
def test_16_bits_of_grey_become_8(tmp_path: Path, kind: str) -> None:
    mode, _, suffix = kind.partition(".")
    pixels = np.full((8, 8), 100 * 257, np.int32 if mode == "I" else np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    assert (read_image(tmp_path / f"a.{suffix}", 8, 1) == 100).all()


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_grey_of_unknown_range_is_named(tmp_path: Path, mode: str, dtype: type) -> None:
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif: .*mode {mode}: grey values of unknown range"):
        read_image(tmp_path / "a.tif", 8)


@pytest.mark.parametrize("error", [struct.error, RuntimeError, SyntaxError, ZeroDivisionError])
def test_every_error_of_a_decoder_names_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    transpose = ImageOps.exif_transpose

    def damaged(image: Image.Image) -> Image.Image:
        if str(getattr(image, "filename", "")).endswith("green.png"):
            raise error("damaged")
        return transpose(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", damaged)
    with pytest.raises(ValueError, match=r"green\.png: expected an image, got .*\(damaged\)"):
        load(folder)
    with pytest.warns(UserWarning, match="skipped 1 of 3 records"):
        assert load(folder, skip_bad=True).captions == [("a red card",), ("a blue card",)]


def test_out_of_memory_is_not_blamed_on_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(image: Image.Image) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(ImageOps, "exif_transpose", exhausted)
    with pytest.raises(MemoryError):
        load(folder, skip_bad=True)


def test_a_missing_image_is_named(folder: Path) -> None:
    (folder / "green.png").unlink()
    with pytest.raises(ValueError, match=r"captions\.tsv:2: no such image.*green\.png"):
        load(folder)


def test_an_empty_caption_is_named(folder: Path) -> None:
    write_tsv(folder, ("red.png", "a red card"), ("blue.png", "  "))
    with pytest.raises(ValueError, match=r"captions\.tsv:2: expected a caption for .*blue\.png"):
        load(folder)


@pytest.mark.parametrize(
    ("caption", "problem"),
    [("\u200b\xad", "no visible character"), ("a \ud800", "half a surrogate pair")],
)
def test_a_caption_without_text_is_named(folder: Path, caption: str, problem: str) -> None:
    (folder / "captions.tsv").unlink()
    rows = [{"path": "red.png", "caption": "a red card"}, {"path": "blue.png", "caption": caption}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"captions\.jsonl:2: .*blue\.png, got {problem}"):
        load(folder)
    with pytest.warns(UserWarning, match="skipped 1 of 2 records"):
        assert load(folder, skip_bad=True).captions == [("a red card",)]


def test_a_deeply_nested_line_is_named(folder: Path) -> None:
    (folder / "captions.tsv").unlink()
    (folder / "captions.jsonl").write_text("\n" + "[" * 100_000)
    with pytest.raises(ValueError, match=r"captions\.jsonl:2: expected a JSON object"):
        load(folder)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["captions.tsv", "captions.csv"])
def test_only_newlines_end_a_line(folder: Path, name: str, newline: str) -> None:
    (folder / "captions.tsv").unlink()
    captions = [f"a{c}card" for c in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    separator = "\t" if name.endswith("tsv") else ","
    rows = [f"red.png{separator}{caption}{newline}" for caption in captions]
    (folder / name).write_bytes("".join(rows).encode())
    assert load(folder).captions == [tuple(captions)]


def test_a_malformed_record_is_named(folder: Path) -> None:
    write_tsv(folder, ("red.png", "a red card"), ("blue.png",))
    with pytest.raises(ValueError, match=r"1 of 2 records .*tsv:2: expected 2 columns.*got 1"):
        load(folder)
    (folder / "captions.tsv").unlink()
    for wrong in ("{", "[]", '{"path": "red.png"}', '{"path": "red.png", "caption": 3}'):
        (folder / "captions.jsonl").write_text(f"\n{wrong}\n")
        with pytest.raises(ValueError, match=r"captions\.jsonl:2: .*expected"):
            load(folder)
    (folder / "captions.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"captions\.jsonl: expected UTF-8"):
        load(folder)


def test_skipping_bad_records_warns_with_a_count(folder: Path) -> None:
    write_tsv(
        folder,
        ("red.png", "a red card"),
        ("gone.png", "a lost card"),
        ("green.png", ""),
        ("green.png",),
        ("captions.tsv", "a text"),
        ("blue.png", "a blue card"),
    )
    with pytest.warns(UserWarning, match=r"skipped 4 of 6 records.*captions\.tsv:2"):
        images = load(folder, skip_bad=True)
    assert images.captions == [("a red card",), ("a blue card",)]
    assert [path.name for path in images.files] == ["red.png", "blue.png"]
    write_tsv(folder, ("gone.png", "a lost card"))
    with pytest.raises(ValueError, match=r"at least one usable record.*gone\.png"):
        load(folder, skip_bad=True)


def test_all_bad_records_are_listed(folder: Path, tmp_path: Path) -> None:
    rows = [("red.png", "a red card"), *((f"{i}.png", "lost") for i in range(30))]
    write_tsv(folder, *rows)
    listed = tmp_path / "run" / "bad_records.txt"
    with pytest.raises(ValueError, match=r"30 of 31 .*all are listed in .*--skip-bad"):
        CaptionedImages(open_source(folder), 16, bad_records=listed, progress=False)
    lines = listed.read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"{folder / 'captions.tsv'}:{number}" for number in range(2, 32)
    ]
    with pytest.raises(ValueError) as error:
        load(folder)
    assert all(line in str(error.value) for line in lines)
    write_tsv(folder, rows[0])
    CaptionedImages(open_source(folder), 16, bad_records=listed, progress=False)
    assert not listed.exists()


def test_unchanged_images_are_not_decoded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def observed(file: Path, *arguments: int) -> torch.Tensor:
        decoded.append(file.name)
        return read_image(file, *arguments)

    monkeypatch.setattr("cogview.data.captions.read_image", observed)

    def keys(size: int = 16) -> list[int]:
        decoded.clear()
        source, known = open_source(folder), tmp_path / "run" / "image_keys.json"
        images = CaptionedImages(source, size, known_keys=known, progress=False)
        decoded.sort()
        return images.keys.tolist()

    first = keys()
    assert len(decoded) == 3 and keys() == first and decoded == []
    Image.new("RGB", (40, 30), "black").save(folder / "green.png", "bmp")
    second = keys()
    assert decoded == ["green.png"] and [a == b for a, b in zip(first, second, strict=True)] == [
        True,
        False,
        True,
    ]
    # Another picture with the size and time of the old one, as archives and copies have.
    status = (folder / "green.png").stat()
    Image.new("RGB", (40, 30), "white").save(folder / "green.png", "bmp")
    assert (folder / "green.png").stat().st_size == status.st_size
    os.utime(folder / "green.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert keys() != second and decoded == ["green.png"]
    Image.new("RGB", (40, 30), "black").save(folder / "green.png", "bmp")
    keys(8)
    assert len(decoded) == 3  # other pixels
    (tmp_path / "run" / "image_keys.json").write_text("{")
    assert keys() == second and len(decoded) == 3


def test_a_large_jpeg_is_decoded_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:800, :1200]
    pixels = np.stack([x / 5, y / 4, (x + y) / 9], 2).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    jpeg, png = (read_image(tmp_path / name, 64).int() for name in ("a.jpg", "a.png"))
    assert (jpeg - png).abs().max() <= 4
    loaded: list[tuple[int, int]] = []
    transpose = ImageOps.exif_transpose

    def observed(opened: Image.Image) -> Image.Image:
        loaded.append(opened.size)
        return transpose(opened)

    monkeypatch.setattr(ImageOps, "exif_transpose", observed)
    for size in (64, 300, 700):
        read_image(tmp_path / "a.jpg", size)
    # The shorter side keeps at least twice the pixels, and is never made larger than it is.
    assert loaded == [(300, 200), (1200, 800), (1200, 800)]


def test_no_warning_without_bad_records(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(folder, skip_bad=True)) == 3


def test_folders(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder.*nowhere"):
        load(folder / "nowhere")
    (folder / "captions.csv").write_text("red.png,a red card\n")
    with pytest.raises(ValueError, match=r"got captions\.tsv, captions\.csv"):
        load(folder)
    (folder / "captions.csv").unlink()
    (folder / "captions.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected captions\.tsv, captions\.csv"):
        load(folder)


@given(
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 12),
    num_examples=st.integers(1, 9),
    num_epochs=st.integers(1, 3),
)
def test_batches_are_a_sequence_of_permutations(
    seed: int, batch_size: int, num_examples: int, num_epochs: int
) -> None:
    steps = -(-num_epochs * num_examples // batch_size)
    batches = [
        read_order(seed, step * batch_size, batch_size, num_examples) for step in range(steps)
    ]
    stream = np.concatenate(batches)[: num_epochs * num_examples]
    for epoch in stream.reshape(num_epochs, num_examples):
        assert sorted(epoch) == list(range(num_examples))
    # A pure function: the order of the calls does not matter.
    read_order(seed + 1, 0, batch_size, num_examples)
    for step in reversed(range(steps)):
        np.testing.assert_array_equal(
            read_order(seed, step * batch_size, batch_size, num_examples), batches[step]
        )


def test_epochs_and_seeds_differ() -> None:
    first, second = read_order(0, 0, 100, 100), read_order(0, 100, 100, 100)
    assert (first != second).any() and (first != read_order(1, 0, 100, 100)).any()


def test_impossible_batches() -> None:
    for first, count, num_examples in ((-1, 1, 1), (0, 0, 1), (0, 1, 0)):
        with pytest.raises(ValueError, match=f"got first={first}, count={count}"):
            read_order(0, first, count, num_examples)


def test_the_data_may_say_what_is_held_out() -> None:
    keys = np.array([5, 6, 7, 5, 8], np.uint64)
    given = np.array([0, 0, 1, 1, 0], np.int8)  # two copies of 5 are not agreed upon
    assert held_out(keys, given, 0.5, 0).tolist() == [True, False, True, True, False]
    many = np.arange(1000, dtype=np.uint64)
    some = np.where(many < 500, -1, 0).astype(np.int8)
    by_hash = held_out(many, None, 0.1, 0)
    out = held_out(many, some, 0.1, 0)
    assert (out[:500] == by_hash[:500]).all() and not out[500:].any()
    with pytest.raises(ValueError, match="got 0 held out of 1000; the column held_out decides"):
        held_out(many, np.zeros(1000, np.int8), 0.1, 0)
    with pytest.raises(ValueError, match="got 1000 held out of 1000"):
        held_out(many, np.ones(1000, np.int8), 0.1, 0)
