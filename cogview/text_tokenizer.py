"""Text to piece ids and back, with a SentencePiece model that is trained or loaded."""

import hashlib
import io
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from cogview.files import atomic_write

_SURROGATE = re.compile("[\ud800-\udfff]")
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode categories: controls, formats, separators
_SPACES = "\u2581\ufffd"  # visible characters that SentencePiece treats as spaces


class TextTokenizer:
    """SentencePiece pieces, numbered from 0 (the unknown piece).

    There is no begin, end or padding piece: `cogview.sequence` has its own command tokens, and
    shifts piece ids past the image codes.
    """

    def __init__(self, model_proto: bytes):
        self.model_proto = model_proto
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model_proto)
        self.fingerprint = hashlib.sha256(model_proto).hexdigest()[:16]  # equal for equal models

    @classmethod
    def train(
        cls,
        corpus: Iterable[str],
        path: str | os.PathLike[str] | None,
        vocab_size: int,
        *,
        model_type: str = "unigram",
        character_coverage: float = 0.9995,
        byte_fallback: bool = False,
        max_sentences: int = 1_000_000,
    ) -> "TextTokenizer":
        """Train on a corpus and save the model; the same corpus gives the same model.

        Args:
            corpus: captions; blank ones are skipped.
            path: the `.model` file to write, as `save` does; None: do not save it.
            vocab_size: number of pieces, including the unknown piece (CogView: 50 000).
            model_type: `unigram`, `bpe`, `word` or `char`.
            character_coverage: share of the characters of the corpus that get a piece of their own.
            byte_fallback: spell unknown characters as bytes (256 of the `vocab_size` pieces)
                instead of mapping them to the unknown piece.
            max_sentences: train on at most this many captions.

        Returns:
            the trained tokenizer.

        Raises:
            TypeError: the corpus holds something that is not a string.
            ValueError: the corpus is empty or holds half a surrogate pair, or `vocab_size` does not
                fit the corpus (the message names the nearest size that does).
            OSError: the model cannot be saved.
        """
        captions = _checked(corpus, max_sentences)
        if not captions:
            raise ValueError("text tokenizer: expected at least one caption, got none")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(captions),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=character_coverage,
                byte_fallback=byte_fallback,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"text_tokenizer.vocab_size: expected {_possible_size(str(error))}, for "
                f"{len(captions)} captions, got {vocab_size}"
            ) from error
        tokenizer = cls(model.getvalue())
        if path is not None:
            tokenizer.save(path)
        return tokenizer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.model` file; an existing one is replaced atomically."""
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.model_proto)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TextTokenizer":
        """Load a `.model` file, trained here or by SentencePiece itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a SentencePiece model, or is cut short.
        """
        try:
            model = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                error.errno, "text tokenizer: no such file", str(path)
            ) from None
        try:
            tokenizer = cls(model)
            fields = ModelProto.FromString(model)
        except (RuntimeError, OSError, DecodeError) as error:
            raise ValueError(f"{path}: expected a SentencePiece model, got {error}") from error
        # SentencePiece accepts a model that is truncated between two fields. These are the last.
        if not (fields.HasField("trainer_spec") and fields.HasField("normalizer_spec")):
            raise ValueError(f"{path}: expected a whole SentencePiece model, got a truncated one")
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Piece ids in `[0, vocab_size)` of a caption.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `text` has no visible character, or half a surrogate pair.
        """
        if not isinstance(text, str):
            raise TypeError(f"caption: expected a string, got {type(text).__name__}")
        if problem := caption_problem(text):
            raise ValueError(f"caption: expected some text, {problem}")
        return self._processor.encode(text)

    def unknown_characters(self, text: str) -> str:
        """The characters of a caption that no piece stands for: the model cannot see them."""
        unknown = self._processor.unk_id()
        if unknown not in self._processor.encode(text):
            return ""
        pieces = self._processor.encode(text, out_type="proto").pieces
        return "".join(piece.surface for piece in pieces if piece.id == unknown)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of piece ids; an unknown piece becomes U+2047.

        Raises:
            ValueError: an id is outside `[0, vocab_size)`.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"text ids: expected 0 to {self.vocab_size - 1}, got {i}")
        return self._processor.decode(ids)


def warn_of_unknown_characters(tokenizer: TextTokenizer, captions: Iterable[str]) -> None:
    """One warning that lists the characters without a piece, the most frequent first."""
    counts: Counter[str] = Counter()
    num_captions = 0
    for caption in captions:
        unknown = tokenizer.unknown_characters(caption)
        counts.update(unknown)
        num_captions += bool(unknown)
    if counts:
        listed = " ".join(character for character, _ in counts.most_common(20))
        more = f" and {len(counts) - 20} more" if len(counts) > 20 else ""
        warnings.warn(
            f"{num_captions} caption{'s' * (num_captions > 1)} with characters that the text "
            f"tokenizer has no piece for, so that the model cannot see them: {listed}{more}",
            stacklevel=2,
        )


def caption_problem(text: str) -> str | None:
    """Why a text cannot be a caption ("got ..."), or None if it can."""
    if _SURROGATE.search(text):
        return f"got half a surrogate pair in {text!r}"
    if all(unicodedata.category(c) in _INVISIBLE or c in _SPACES for c in text):
        return f"got no visible character in {text!r}" if text.strip() else f"got {text!r}"
    return None


def _possible_size(reason: str) -> str:
    """What SentencePiece says of a vocabulary size that does not fit the corpus, in our words."""
    if most := re.search(r"value <= (\d+)", reason):
        return f"at most {most[1]}"
    if least := re.search(r"\d+ vs (\d+)", reason):
        return f"at least {least[1]}, or a smaller text_tokenizer.character_coverage"
    # The message is "Internal: src/trainer.cc(n) [condition] reason".
    return f"another size ({reason.rpartition('] ')[2].strip() or reason})"


def _checked(corpus: Iterable[str], max_sentences: int) -> list[str]:
    def captions() -> Iterator[str]:
        for number, caption in enumerate(corpus):
            if not isinstance(caption, str):
                raise TypeError(
                    f"corpus[{number}]: expected a string, got {type(caption).__name__}"
                )
            if _SURROGATE.search(caption):
                raise ValueError(f"corpus[{number}]: {caption_problem(caption)}")
            if not caption_problem(caption):
                yield " ".join(caption.split())  # a caption must be one line for SentencePiece

    if isinstance(corpus, str):
        raise TypeError("corpus: expected an iterable of captions, got one string")
    return [caption for _, caption in zip(range(max_sentences), captions(), strict=False)]
