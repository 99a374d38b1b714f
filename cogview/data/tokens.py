"""Tokenised pairs of caption and image, which the GPT is trained on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from tqdm import tqdm

from cogview.data.images import Images, image_key
from cogview.data.order import held_out
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
        image_keys: (N,) uint64, equal for equal images (`cogview.data.images.image_key`).
        text_vocab_size: every piece id is below this.
        codebook_size: every code is below this.
        made_from: fingerprints of the two tokenizers and of the data, by name.
    """

    text_ids: np.ndarray
    text_offsets: np.ndarray
    codes: np.ndarray
    image_keys: np.ndarray
    text_vocab_size: int
    codebook_size: int
    made_from: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        offsets, num = self.text_offsets, len(self.codes)
        if self.codes.ndim != 3:
            raise ValueError(f"codes: expected (N, h, w), got {self.codes.shape}")
        if offsets.shape != (num + 1,) or offsets[0] != 0 or offsets[-1] != len(self.text_ids):
            raise ValueError(
                f"text_offsets: expected {num + 1} from 0 to {len(self.text_ids)}, "
                f"got shape {offsets.shape}"
            )
        if self.image_keys.shape != (num,):
            raise ValueError(f"image_keys: expected ({num},), got {self.image_keys.shape}")
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
        keys = np.empty(len(images), np.uint64)
        starts = range(0, len(images), batch_size)
        for start in tqdm(
            starts, desc="image codes", unit="batch", disable=None if progress else True
        ):
            indices = list(range(start, min(start + batch_size, len(images))))
            batch = images[indices]
            keys[indices] = [image_key(image) for image in batch]
            codes[indices] = image_tokenizer.encode(batch, batch_size).cpu().numpy()
        data = hashlib.sha256(keys.tobytes() + "\0".join(captions).encode()).hexdigest()[:16]
        return cls(
            np.fromiter((i for text in texts for i in text), np.int32),
            np.cumsum([0, *map(len, texts)], dtype=np.int64),
            codes,
            keys,
            text_tokenizer.vocab_size,
            codebook_size,
            {
                "text tokenizer": text_tokenizer.fingerprint,
                "image tokenizer": image_tokenizer.fingerprint,
                "data": data,
            },
        )

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens."""
        digest = hashlib.sha256()
        for array in (self.text_ids, self.text_offsets, self.codes, self.image_keys):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def select(self, indices: np.ndarray) -> "TokenDataset":
        """Some of the pairs."""
        texts = [self[int(index)][0] for index in indices]
        return dataclasses.replace(
            self,
            text_ids=np.concatenate([np.empty(0, np.int32), *texts]),
            text_offsets=np.cumsum([0, *map(len, texts)], dtype=np.int64),
            codes=self.codes[indices],
            image_keys=self.image_keys[indices],
        )

    def split(self, held_out_fraction: float, seed: int) -> tuple["TokenDataset", "TokenDataset"]:
        """Training and held-out pairs, split by image (`cogview.data.order.held_out`).

        Raises:
            ValueError: fewer than two different images.
        """
        out = held_out(self.image_keys, held_out_fraction, seed)
        return self.select(np.flatnonzero(~out)), self.select(np.flatnonzero(out))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Piece ids (text length,) and codes (h, w) of pair `i`."""
        return self.text_ids[self.text_offsets[i] : self.text_offsets[i + 1]], self.codes[i]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as one `.npz`; an existing file is replaced atomically."""
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **vars(self) | {"made_from": json.dumps(dict(self.made_from))})

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
            made_from = json.loads(str(arrays.pop("made_from")))
            text_vocab_size, codebook_size = (
                int(arrays.pop(n)) for n in ("text_vocab_size", "codebook_size")
            )
            return cls(
                **arrays,
                text_vocab_size=text_vocab_size,
                codebook_size=codebook_size,
                made_from=made_from,
            )
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
