"""Tokenised pairs of caption and image, which the GPT is trained on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from tqdm import tqdm

from cogview.data.images import Images
from cogview.files import atomic_write
from cogview.image_tokenizer import ImageTokenizer
from cogview.text_tokenizer import TextTokenizer


@dataclass
class TokenDataset:
    """Tokenised pairs of caption and image.

    Attributes:
        text_ids: (total text length,) int32, the piece ids of all captions, concatenated.
        text_offsets: (N + 1,) int64; caption `i` is
            `text_ids[text_offsets[i] : text_offsets[i + 1]]`.
        codes: (N, h, w), int16 if the codebook is small enough, else int32.
        text_vocab_size: every piece id is below this.
        codebook_size: every code is below this.
    """

    text_ids: np.ndarray
    text_offsets: np.ndarray
    codes: np.ndarray
    text_vocab_size: int
    codebook_size: int

    def __post_init__(self) -> None:
        offsets, num = self.text_offsets, len(self.codes)
        if self.codes.ndim != 3:
            raise ValueError(f"codes: expected (N, h, w), got {self.codes.shape}")
        if offsets.shape != (num + 1,) or offsets[0] != 0 or offsets[-1] != len(self.text_ids):
            raise ValueError(
                f"text_offsets: expected {num + 1} from 0 to {len(self.text_ids)}, "
                f"got shape {offsets.shape}"
            )
        if num and (empty := np.diff(offsets) <= 0).any():
            raise ValueError(f"text_ids: caption {int(empty.argmax())} is empty")
        for name, ids, limit in (
            ("text_ids", self.text_ids, self.text_vocab_size),
            ("codes", self.codes, self.codebook_size),
        ):
            if ids.size and not 0 <= ids.min() <= ids.max() < limit:
                raise ValueError(
                    f"{name}: expected 0 to {limit - 1}, got {ids.min()} to {ids.max()}"
                )

    @classmethod
    def tokenize(
        cls,
        captions: Sequence[str],
        images: Tensor | Images,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        *,
        batch_size: int = 64,
        progress: bool = True,
    ) -> "TokenDataset":
        """Tokenise captions and images, with one batch of images in memory at a time.

        Args:
            captions: N captions.
            images: N images, as a tensor (N, C, H, W) or as `CaptionedImages`.

        Raises:
            ValueError: captions and images differ in number, or a caption is empty.
        """
        if len(captions) != len(images):
            raise ValueError(
                f"captions: expected one for each of {len(images)} images, got {len(captions)}"
            )
        texts = [text_tokenizer.encode(caption) for caption in captions]
        codebook_size, side = image_tokenizer.config.codebook_size, image_tokenizer.config.code_size
        codes = np.empty(
            (len(images), side, side), np.int16 if codebook_size <= 2**15 else np.int32
        )
        starts = range(0, len(images), batch_size)
        for start in tqdm(
            starts, desc="image codes", unit="batch", disable=None if progress else True
        ):
            indices = list(range(start, min(start + batch_size, len(images))))
            codes[indices] = image_tokenizer.encode(images[indices], batch_size).cpu().numpy()
        return cls(
            np.fromiter((i for text in texts for i in text), np.int32),
            np.cumsum([0, *map(len, texts)], dtype=np.int64),
            codes,
            text_tokenizer.vocab_size,
            codebook_size,
        )

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Piece ids (text length,) and codes (h, w) of pair `i`."""
        return self.text_ids[self.text_offsets[i] : self.text_offsets[i + 1]], self.codes[i]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as one `.npz`; an existing file is replaced atomically."""
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **vars(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenDataset":
        """Load a saved data set.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, corrupt or not a token data set.
        """
        try:
            with np.load(path, allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
            text_vocab_size, codebook_size = (
                int(arrays.pop(n)) for n in ("text_vocab_size", "codebook_size")
            )
            return cls(**arrays, text_vocab_size=text_vocab_size, codebook_size=codebook_size)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                error.errno, "token data set: no such file", str(path)
            ) from None
        except MemoryError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise any exception on damaged files
            raise ValueError(
                f"{path}: expected a token data set, got a corrupt or truncated file ({error})"
            ) from error
