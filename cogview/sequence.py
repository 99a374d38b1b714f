"""Token ids, and the sequences that are built from text pieces and image codes.

The ids, in CogView's order (the sizes are settings; CogView's own are in brackets):

    image codes      0 .. codebook_size - 1                          [0 .. 8191]
    text pieces      codebook_size .. codebook_size + text_size - 1  [8192 .. 58191]
    command tokens   from codebook_size + text_size                  [58192 .. 58218]
    padding          up to a multiple of 128, never used             [58219 .. 58239]

Three kinds of sequence:

    text to image      [ROI1] text [BASE] [BOI1] codes [EOI1]
    super-resolution   [ROI1] text [BASE] [BOI1] codes [EOI1]
                       [ROI2] [POS0] [BASE] [BOI2] codes [EOI2]
    captioning         [BASE] [BOI1] codes [EOI1] [ROI1] text [SEP]

[BASE] names the size of the picture: [TINY] up to 8x8 codes, [SMALL] up to 16x16, [BASE] up to
32x32, [BIG] beyond. The super-resolution sequence always has [BASE], and its positions restart at 0
at [ROI2].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Offsets from the first command token.
COMMANDS = {
    "PAD": 0,
    **{f"BOI{i}": i for i in (1, 2, 3)},
    **{f"EOI{i}": 3 + i for i in (1, 2, 3)},
    **{f"ROI{i}": 6 + i for i in (1, 2, 3)},
    "SEP": 10,
    "MASK": 11,
    "CLS": 12,
    "ENC": 13,
    "TINY": 14,
    "SMALL": 15,
    "BASE": 16,
    "BIG": 17,
    **{f"POS{i}": 18 + i for i in range(9)},
}


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one model: image codes first, then text pieces, then command tokens."""

    codebook_size: int = 8192
    text_size: int = 50000

    @property
    def first_command(self) -> int:
        return self.codebook_size + self.text_size

    @property
    def size(self) -> int:
        """Number of ids in use (58219 for CogView)."""
        return self.first_command + len(COMMANDS)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding: `size` rounded up to a multiple of 128 (58240 for CogView)."""
        return -(-self.size // 128) * 128

    def command(self, name: str) -> int:
        """Id of a command token; the name has no brackets, for example "BOI1"."""
        return self.first_command + COMMANDS[name]

    def size_command(self, num_codes: int) -> int:
        """Id of the token that announces an image of `num_codes` codes."""
        for name, side in (("TINY", 8), ("SMALL", 16), ("BASE", 32)):
            if num_codes <= side * side:
                return self.command(name)
        return self.command("BIG")

    def text_ids(self, pieces: Iterable[int]) -> list[int]:
        """Token ids of text pieces (numbered from 0)."""
        ids = [int(piece) for piece in pieces]
        if not ids:
            raise ValueError("text: expected at least one piece, got none (an empty caption?)")
        _check_range("text piece", ids, self.text_size)
        return [piece + self.codebook_size for piece in ids]

    def image_ids(self, codes: Iterable[int] | np.ndarray | torch.Tensor) -> list[int]:
        """Token ids of image codes of any shape, as a flat list, row by row."""
        if isinstance(codes, torch.Tensor):
            codes = codes.cpu().numpy()
        ids = np.asarray(codes).reshape(-1).tolist()
        _check_range("image code", ids, self.codebook_size)
        return ids

    def image_mask(self) -> torch.Tensor:
        """bool (padded_size,): the ids that may be drawn as an image code."""
        mask = torch.zeros(self.padded_size, dtype=torch.bool)
        mask[: self.codebook_size] = True
        return mask

    def text_mask(self) -> torch.Tensor:
        """bool (padded_size,): the ids that may be drawn as text: pieces, and [SEP] to end it."""
        mask = torch.zeros(self.padded_size, dtype=torch.bool)
        mask[self.codebook_size : self.first_command] = True
        mask[self.command("SEP")] = True
        return mask


def _check_range(name: str, ids: Sequence[int], size: int) -> None:
    if ids and not (0 <= min(ids) and max(ids) < size):
        raise ValueError(f"{name}: expected 0 .. {size - 1}, got {min(ids)} .. {max(ids)}")


@dataclass(frozen=True)
class TokenSequence:
    """One sequence of token ids."""

    tokens: list[int]
    positions: list[int]
    text_len: int  # number of tokens before the first image code

    def __len__(self) -> int:
        return len(self.tokens)


def text_to_image(
    vocab: Vocabulary,
    text: Iterable[int],
    codes: Iterable[int] | np.ndarray | torch.Tensor,
    num_codes: int | None = None,
    image_first: bool = False,
) -> TokenSequence:
    """`[ROI1] text [BASE] [BOI1] codes [EOI1]`, or the beginning of it as a prompt.

    Args:
        text: text pieces, numbered from 0; at least one.
        codes: image codes, row by row. With fewer than `num_codes` codes (none to draw a whole
            image) the sequence is a prompt: it ends after them, and the model draws the rest.
        num_codes: number of codes of the whole image; default: the number of `codes`.
        image_first: the positions are those of `captioning`: the image's come before the text's,
            though its tokens come after.

    Raises:
        ValueError: empty text, an id out of range, or more codes than `num_codes`.
    """
    image = vocab.image_ids(codes)
    num_codes = len(image) if num_codes is None else num_codes
    if not len(image) <= num_codes or num_codes < 1:
        raise ValueError(
            f"codes: expected at most {num_codes} (and an image of 1 or more), got {len(image)}"
        )
    head = [
        vocab.command("ROI1"),
        *vocab.text_ids(text),
        vocab.size_command(num_codes),
        vocab.command("BOI1"),
    ]
    tail = [vocab.command("EOI1")] if len(image) == num_codes else []
    tokens = head + image + tail
    positions = list(range(len(tokens)))
    if image_first:
        of_text = len(head) - 2
        positions = [num_codes + 3 + i for i in range(of_text)] + positions[:-of_text]
    return TokenSequence(tokens, positions, len(head))


def super_resolution(
    vocab: Vocabulary,
    text: Iterable[int],
    codes: Iterable[int] | np.ndarray | torch.Tensor,
    fine_codes: Iterable[int] | np.ndarray | torch.Tensor = (),
    num_fine_codes: int | None = None,
) -> TokenSequence:
    """`[ROI1] text [BASE][BOI1] codes [EOI1][ROI2][POS0][BASE][BOI2] fine codes [EOI2]`, or the
    beginning of it as a prompt.

    The positions restart at 0 at [ROI2].

    Args:
        text: text pieces, numbered from 0; at least one.
        codes: image codes of the whole small image.
        fine_codes: image codes of the large image, or the first of them.
        num_fine_codes: number of codes of the large image; default: the number of `fine_codes`.
    """
    image, fine = vocab.image_ids(codes), vocab.image_ids(fine_codes)
    num_fine_codes = len(fine) if num_fine_codes is None else num_fine_codes
    if not image or not len(fine) <= num_fine_codes or num_fine_codes < 1:
        raise ValueError(
            f"codes: expected a whole small image and at most {num_fine_codes} (and 1 or more) "
            f"fine codes, got {len(image)} and {len(fine)}"
        )
    head = [
        vocab.command("ROI1"),
        *vocab.text_ids(text),
        vocab.command("BASE"),
        vocab.command("BOI1"),
    ]
    first = [*head, *image, vocab.command("EOI1")]
    second = [vocab.command(name) for name in ("ROI2", "POS0", "BASE", "BOI2")] + fine
    if len(fine) == num_fine_codes:
        second.append(vocab.command("EOI2"))
    return TokenSequence(first + second, [*range(len(first)), *range(len(second))], len(head))


def captioning(
    vocab: Vocabulary,
    codes: Iterable[int] | np.ndarray | torch.Tensor,
    text: Iterable[int] | None = None,
) -> TokenSequence:
    """`[BASE] [BOI1] codes [EOI1] [ROI1] text [SEP]`; without `text`, the prompt up to [ROI1]."""
    image = vocab.image_ids(codes)
    if not image:
        raise ValueError("codes: expected an image of at least one code, got none")
    head = [vocab.size_command(len(image)), vocab.command("BOI1")]
    tokens = [*head, *image, vocab.command("EOI1"), vocab.command("ROI1")]
    if text is not None:
        tokens += [*vocab.text_ids(text), vocab.command("SEP")]
    return TokenSequence(tokens, list(range(len(tokens))), len(head))


@dataclass
class Batch:
    """A batch of sequences of different lengths, padded at the end with [PAD]."""

    tokens: torch.Tensor  # (B, S) int64
    positions: torch.Tensor  # (B, S) int64, 0 on padding
    text_len: torch.Tensor  # (B,) int32, number of tokens before the first image code

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.tokens.to(device), self.positions.to(device), self.text_len.to(device))


def collate(
    vocab: Vocabulary, sequences: Sequence[TokenSequence], length: int | None = None
) -> Batch:
    """Pads sequences to `length` (default: the longest length).

    Raises:
        ValueError: no sequence, or a sequence longer than `length`.
    """
    if not sequences:
        raise ValueError("sequences: expected at least one, got none")
    longest = max(len(sequence) for sequence in sequences)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(
            f"sequence: expected at most {length} tokens, got {longest}; shorten the text"
        )
    tokens = torch.full((len(sequences), length), vocab.command("PAD"), dtype=torch.int64)
    positions = torch.zeros((len(sequences), length), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence.tokens)
        positions[row, : len(sequence)] = torch.tensor(sequence.positions)
    text_len = torch.tensor([sequence.text_len for sequence in sequences], dtype=torch.int32)
    return Batch(tokens, positions, text_len)


def hide_captions(vocab: Vocabulary, batch: Batch, share: float, seed: int) -> Batch:
    """Replaces the text of some sequences by [MASK], piece by piece; lengths and positions stay.

    Args:
        batch: on the CPU.
        share: probability of each sequence.
        seed: the choice is a function of it.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(len(batch.tokens), 1, generator=generator) < share
    text = (batch.tokens >= vocab.codebook_size) & (batch.tokens < vocab.first_command)
    tokens = batch.tokens.masked_fill(hidden & text, vocab.command("MASK"))
    return Batch(tokens, batch.positions, batch.text_len)


def loss_weights(
    vocab: Vocabulary, targets: torch.Tensor, text_weight: float = 1.0, image_weight: float = 1.0
) -> torch.Tensor:
    """Weight of each target token in the loss, by its type: 1 for command tokens, 0 for padding and
    for text that is hidden.

    Args:
        targets: token ids, any shape, int64.

    Returns:
        float32, the shape of `targets`.
    """
    weights = torch.ones(targets.shape, dtype=torch.float32, device=targets.device)
    weights[targets < vocab.codebook_size] = image_weight
    weights[(targets >= vocab.codebook_size) & (targets < vocab.first_command)] = text_weight
    weights[(targets == vocab.command("PAD")) | (targets == vocab.command("MASK"))] = 0.0
    return weights
