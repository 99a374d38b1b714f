"""Tokens on disk: what is written is what is read, whatever happens meanwhile."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.config import ImageTokenizerConfig
from cogview.data.captions import CaptionedImages
from cogview.data.order import data_fingerprint
from cogview.data.sources import open_source
from cogview.data.tokens import ARRAYS, TokenDataset
from cogview.image_tokenizer import ImageTokenizer
from cogview.text_tokenizer import TextTokenizer

NUM = 24


@pytest.fixture
def images(tmp_path: Path) -> CaptionedImages:
    """24 images; 0 and 1 are the same picture under two names, and all have two captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for i in range(NUM):
        colour = (10 * max(i, 1), 40, 250 - 10 * max(i, 1))
        Image.new("RGB", (20, 16), colour).save(folder / f"{i}.png")
        lines += [f"{i}.png\ta card\n", f"{i}.png\tthe card number {i}\n"]
    (folder / "captions.tsv").write_text("".join(lines))
    return CaptionedImages(open_source(folder), 16, progress=False)


@pytest.fixture
def tokenizers(tmp_path: Path) -> tuple[TextTokenizer, ImageTokenizer]:
    captions = ["a card", *(f"the card number {i}" for i in range(NUM))]
    text = TextTokenizer.train(captions, tmp_path / "text.model", 26)
    torch.manual_seed(0)
    config = ImageTokenizerConfig(16, 3, 8, 2, codebook_size=50, codebook_dim=4)
    return text, ImageTokenizer(config).eval()


@pytest.fixture
def tokens(
    tmp_path: Path, images: CaptionedImages, tokenizers: tuple[TextTokenizer, ImageTokenizer]
) -> TokenDataset:
    return TokenDataset.encode(
        tmp_path / "tokens", images.captions, images, *tokenizers, batch_size=5, progress=False
    )


def test_tokens_of_images_with_several_captions(
    tmp_path: Path,
    images: CaptionedImages,
    tokens: TokenDataset,
    tokenizers: tuple[TextTokenizer, ImageTokenizer],
) -> None:
    text, image = tokenizers
    assert len(tokens) == 2 * NUM and tokens.codes.shape == (NUM, 4, 4)
    assert tokens.codes.dtype == np.int16 and isinstance(tokens.codes, np.memmap)
    assert tokens.made_from["data"] == data_fingerprint(
        images.keys, images.held_out, images.captions
    )
    expected = image.encode(images[list(range(NUM))])
    for i in (0, 1, 2 * NUM - 1):
        pieces, codes = tokens[i]
        assert text.decode(pieces.tolist()) == images.captions[i // 2][i % 2]
        assert torch.equal(torch.tensor(codes).long(), expected[i // 2])
    with_workers = TokenDataset.encode(
        tmp_path / "again", images.captions, images, text, image, workers=2, progress=False
    )
    assert with_workers.fingerprint == tokens.fingerprint
    loaded = TokenDataset.load(tmp_path / "tokens")
    assert loaded.fingerprint == tokens.fingerprint != loaded.select(np.arange(3)).fingerprint
    in_memory = TokenDataset(
        *(
            np.array(getattr(tokens, n))
            for n in ("text_ids", "text_offsets", "codes", "image_keys")
        ),
        tokens.text_vocab_size,
        tokens.codebook_size,
        tokens.made_from,
        np.array(tokens.image_of),
    )
    assert in_memory.fingerprint == tokens.fingerprint
    in_memory.save(tmp_path / "saved")
    assert TokenDataset.load(tmp_path / "saved").fingerprint == tokens.fingerprint


@pytest.mark.parametrize("given", [False, True])
def test_no_image_is_on_both_sides(
    images: CaptionedImages, tokens: TokenDataset, given: bool
) -> None:
    """The image tokenizer and the GPT hold out the same images, with all captions and copies."""
    if given:
        images.held_out[:] = np.arange(NUM) % 3 == 1  # of the two copies, one
        tokens = TokenDataset(**{**vars(tokens), "held_out": images.held_out, "rows": None})
    for seed in range(5):
        parts = zip(images.split(0.3, seed), tokens.split(0.3, seed), strict=True)
        keys = []
        for some_images, some_tokens in parts:
            rows = tokens.image_of[some_tokens.rows]
            assert set(rows) == set(some_images.indices)
            assert len(some_tokens) == 2 * len(some_images)
            keys.append(set(images.keys[some_images.indices]))
            assert keys[-1] == set(tokens.image_keys[rows])
        assert not keys[0] & keys[1] and len(keys[0]) + len(keys[1]) == NUM - 1
        if given:
            assert set(images.keys[[0, 1, 4, 7]]) <= keys[1] and images.keys[2] in keys[0]


def test_parts_share_the_arrays(tokens: TokenDataset) -> None:
    train, out = tokens.split(0.3, 0)
    for part in (train, out, train.select(np.array([3, 1]))):
        assert all(getattr(part, name) is getattr(tokens, name) for name in ARRAYS)
    np.testing.assert_array_equal(train.select(np.array([3, 1]))[1][1], train[1][1])
    with pytest.raises(ValueError, match="rows: expected all 48 pairs, got"):
        train.save("nowhere")


def test_damaged_files_are_named(tmp_path: Path, tokens: TokenDataset) -> None:
    folder = tmp_path / "tokens"
    meta = json.loads((folder / "meta.json").read_text())
    for name in ARRAYS:
        path = folder / meta["arrays"][name]["file"]
        whole = path.read_bytes()
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        for damaged, problem in (
            (whole[:-1], f"expected {len(whole)} bytes, got {len(whole) - 1}"),
            (b"", f"expected {len(whole)} bytes, got 0"),
            (flipped, "its content has changed since it was written"),
            (None, "no such file"),
        ):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{path.name}: {problem}.*encode the data again"):
                TokenDataset.load(folder)
        path.write_bytes(whole)
    TokenDataset.load(folder)
    for damaged in (b"", b"{", b"[]", b'{"arrays": {}}'):
        (folder / "meta.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"meta\.json: expected the description"):
            TokenDataset.load(folder)
    with pytest.raises(FileNotFoundError, match="run cogview encode first"):
        TokenDataset.load(tmp_path / "nowhere")


def test_a_failed_encode_leaves_the_old_tokens(
    tmp_path: Path,
    images: CaptionedImages,
    tokens: TokenDataset,
    tokenizers: tuple[TextTokenizer, ImageTokenizer],
) -> None:
    images.files[-1].unlink()  # type: ignore[union-attr]
    with pytest.raises(FileNotFoundError, match=r"23\.png"):
        TokenDataset.encode(
            tmp_path / "tokens", images.captions, images, *tokenizers, progress=False
        )
    assert TokenDataset.load(tmp_path / "tokens").fingerprint == tokens.fingerprint
    assert not list((tmp_path / "tokens").glob(".*"))


def made_up(seed: int) -> TokenDataset:
    codes = np.random.default_rng(seed).integers(0, 9, (50, 4, 4)).astype(np.int16)
    offsets, keys = np.arange(51), np.arange(50, dtype=np.uint64)
    return TokenDataset(np.zeros(50, np.int32), offsets, codes, keys, 3, 9)


def save_and_die(tokens: TokenDataset, folder: Path, moment: int) -> bool:
    """Saves in a process that is killed when it has changed `moment` files; whether it was."""
    process = os.fork()
    if process == 0:
        count = 0

        def counted(function: Callable[..., None]) -> Callable[..., None]:
            def wrapped(*arguments: object, **options: object) -> None:
                nonlocal count
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                function(*arguments, **options)

            return wrapped

        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        tokens.save(folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_kill_leaves_the_old_tokens_or_the_new_ones(tmp_path: Path) -> None:
    old, new = made_up(1), made_up(2)
    old.save(tmp_path)
    found, moment = [], 0
    while save_and_die(new, tmp_path, moment):
        found.append(TokenDataset.load(tmp_path).fingerprint)
        moment += 1
    order = [old.fingerprint, new.fingerprint]
    assert moment > 12 and set(found) == set(order) and found == sorted(found, key=order.index)
    assert TokenDataset.load(tmp_path).fingerprint == new.fingerprint
    assert len(list(tmp_path.iterdir())) == 1 + len(ARRAYS)  # what was left behind is gone


def test_memory_does_not_grow_with_the_images(
    tmp_path: Path, tokenizers: tuple[TextTokenizer, ImageTokenizer]
) -> None:
    """At no time are more than two batches of images alive."""
    text, image = tokenizers
    alive = 0
    most = 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Many:
        def __len__(self) -> int:
            return 200

        def __getitem__(self, indices: list[int]) -> torch.Tensor:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return torch.zeros(len(indices), 3, 16, 16).as_subclass(Counted)

    tokens = TokenDataset.encode(
        tmp_path / "tokens", ["a card"] * 200, Many(), text, image, batch_size=4, progress=False
    )
    assert len(tokens) == 200 and most <= 2


def test_inconsistent_token_data_sets() -> None:
    codes = np.zeros((2, 2, 2), np.int16)
    ids, offsets = np.array([1, 2, 3], np.int32), np.array([0, 1, 3])
    keys = np.arange(2, dtype=np.uint64)
    TokenDataset(ids, offsets, codes, keys, 4, 1)
    with pytest.raises(ValueError, match="text_ids: expected 0 to 2, got 1 to 3"):
        TokenDataset(ids, offsets, codes, keys, 3, 1)
    with pytest.raises(ValueError, match="codes: expected 0 to 0, got 1 to 1"):
        TokenDataset(ids, offsets, codes + 1, keys, 4, 1)
    with pytest.raises(ValueError, match="text_offsets: expected 3 from 0 to 3"):
        TokenDataset(ids, offsets[:2], codes, keys, 4, 1)
    with pytest.raises(ValueError, match="caption 1 is empty"):
        TokenDataset(ids, np.array([0, 3, 3]), codes, keys, 4, 1)
    with pytest.raises(ValueError, match="image_of: expected 0 to 1, got 0 to 2"):
        TokenDataset(ids, offsets, codes, keys, 4, 1, image_of=np.array([0, 2]))
