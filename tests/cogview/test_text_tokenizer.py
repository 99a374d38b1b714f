import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogview.demo.digits import caption_of, make_scenes
from cogview.text_tokenizer import TextTokenizer, caption_problem, warn_of_unknown_characters


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return make_scenes("train", 500, seed=0).captions


@pytest.fixture(scope="module")
def tokenizer(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.train(corpus, tmp_path_factory.mktemp("text") / "digits.model", 32)


@settings(max_examples=50, deadline=None)
@given(digits=st.tuples(*[st.integers(0, 9)] * 4))
def test_round_trip_of_captions_never_seen(
    tokenizer: TextTokenizer, digits: tuple[int, ...]
) -> None:
    caption = caption_of(digits)
    ids = tokenizer.encode(caption)
    assert all(0 < i < tokenizer.vocab_size for i in ids)  # no piece is unknown
    assert tokenizer.decode(ids) == caption


def test_vocab_size(tokenizer: TextTokenizer) -> None:
    assert tokenizer.vocab_size == 32


def test_training_is_deterministic_and_loading_gives_the_same(
    corpus: list[str], tmp_path: Path
) -> None:
    first = TextTokenizer.train(corpus, tmp_path / "a.model", 32)
    TextTokenizer.train(iter(corpus), tmp_path / "b.model", 32)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert TextTokenizer.load(tmp_path / "b.model").encode(corpus[0]) == first.encode(corpus[0])


def test_training_prints_nothing(
    corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    TextTokenizer.train(corpus, tmp_path / "a.model", 32)
    assert capfd.readouterr() == ("", "")


def test_unknown_characters(corpus: list[str], tokenizer: TextTokenizer, tmp_path: Path) -> None:
    assert 0 in tokenizer.encode("a χ")
    assert tokenizer.unknown_characters("a χψ and ☃") == "χψ☃"
    assert tokenizer.unknown_characters("a one") == ""
    with pytest.warns(UserWarning, match="^2 captions with characters .*: χ ☃$"):
        warn_of_unknown_characters(tokenizer, ["a χ", "a one", "☃ and χ"])
    spelled = TextTokenizer.train(
        corpus, tmp_path / "a.model", 300, byte_fallback=True, model_type="bpe"
    )
    assert spelled.decode(spelled.encode("a χ above")) == "a χ above"


@pytest.mark.parametrize("text", ["", "  \t\n"])
def test_empty_caption(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(ValueError, match="caption: expected some text"):
        tokenizer.encode(text)


@pytest.mark.parametrize("text", ["\u200b", " \xad\u2060", "\x01", "\ufffd", "\u2581"])
def test_invisible_caption(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(ValueError, match="caption: expected some text, got no visible character"):
        tokenizer.encode(text)


def test_half_a_surrogate_pair(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="caption: .* half a surrogate pair in 'a .ud800'"):
        tokenizer.encode("a \ud800")
    with pytest.raises(ValueError, match=r"corpus\[1\]: got half a surrogate pair"):
        TextTokenizer.train(["a one", "a \ud800"], tmp_path / "a.model", 8)


def test_every_visible_character_has_a_piece(tokenizer: TextTokenizer) -> None:
    for code in [*range(0xD800), *range(0xE000, 0x20000)]:
        if caption_problem(chr(code)) is None:
            assert tokenizer.encode(chr(code))


def test_wrong_types(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="caption: expected a string, got NoneType"):
        tokenizer.encode(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"corpus\[1\]: expected a string, got int"):
        TextTokenizer.train(["a one", 1], tmp_path / "a.model", 8)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="got one string"):
        TextTokenizer.train("a one", tmp_path / "a.model", 8)


def test_ids_out_of_range(tokenizer: TextTokenizer) -> None:
    for wrong in (-1, 32):
        with pytest.raises(ValueError, match=f"expected 0 to 31, got {wrong}"):
            tokenizer.decode([1, wrong])


def test_vocabulary_that_does_not_fit_the_corpus(corpus: list[str], tmp_path: Path) -> None:
    """The error names the nearest size that does."""
    for wrong in (5000, 3):
        for kind in ("unigram", "bpe"):
            expected = (
                rf"vocab_size: expected at (most|least) (\d+).*, for 500 captions, got {wrong}$"
            )
            with pytest.raises(ValueError, match=expected) as raised:
                TextTokenizer.train(corpus, tmp_path / "a.model", wrong, model_type=kind)
            assert not (tmp_path / "a.model").exists()
            match = re.search(expected, str(raised.value))
            assert match and (match[1] == "most") == (wrong == 5000)
            nearest = int(match[2])
            assert TextTokenizer.train(corpus, None, nearest, model_type=kind).vocab_size == nearest


def test_empty_corpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one caption, got none"):
        TextTokenizer.train(["", "  "], tmp_path / "a.model", 8)


def test_bad_model_files(corpus: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.model"
    with pytest.raises(FileNotFoundError, match=r"no such file.*a\.model"):
        TextTokenizer.load(path)
    TextTokenizer.train(corpus, path, 32)
    model = path.read_bytes()
    path.write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match=r"a\.model: expected a SentencePiece model"):
        TextTokenizer.load(path)
    # Truncated anywhere, also between two pieces, where SentencePiece itself raises no error.
    for length in [*range(600), len(model) // 2, len(model) - 1]:
        path.write_bytes(model[:length])
        with pytest.raises(ValueError, match=r"a\.model: expected a .*SentencePiece model"):
            TextTokenizer.load(path)
