"""Which examples are for training, and the order in which it reads them."""

import functools
import hashlib
from collections.abc import Iterable

import numpy as np

NOT_GIVEN = -1  # of `held_out`


def read_order(seed: int, first: int, count: int, num_examples: int) -> np.ndarray:
    """Indices of the examples that training reads after it has read `first` of them.

    This is a pure function, so that a resumed run needs no iterator state. Every epoch is a new
    permutation of all examples, and every example is read; a batch may span epochs.

    Returns:
        (count,) int64 in `[0, num_examples)`.

    Raises:
        ValueError: a negative `first`, or no examples to read.
    """
    if first < 0 or count < 1 or num_examples < 1:
        raise ValueError(
            "expected first >= 0, count >= 1 and num_examples >= 1, "
            f"got first={first}, count={count}, num_examples={num_examples}"
        )
    epochs, offsets = np.divmod(np.arange(first, first + count), num_examples)
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = _permutation(seed, int(epoch), num_examples)[offsets[in_epoch]]
    return indices


def held_out(
    image_keys: np.ndarray, given: np.ndarray | None, fraction: float, seed: int
) -> np.ndarray:
    """Which images are held out: what the data says, else a function of image key and seed alone.

    All captions of an image are therefore on one side, copies of an image too, and images that are
    added later leave the others where they are.

    Args:
        image_keys: (N,) uint64, equal for equal images.
        given: (N,) int8: 1 if the data says that the image is held out, 0 if it says that the image
            is for training, `NOT_GIVEN` if it does not say. Where it says both of two copies, both
            are held out. None: it says nothing.
        fraction: expected share of the other different images that are held out. If the data says
            nothing, at least one is, and at least one is not.

    Returns:
        (N,) bool.

    Raises:
        ValueError: fewer than two different images, or the data holds out all of them or none.
    """
    keys, of_key = np.unique(image_keys, return_inverse=True)
    if len(keys) < 2:
        raise ValueError(
            "--data: expected at least 2 different images, one of them to hold out, got "
            f"{len(keys)}"
        )
    mixed = [hashlib.blake2b(b"%d %d" % (seed, key), digest_size=8).digest() for key in keys]
    places = np.frombuffer(b"".join(mixed), ">u8") / 2.0**64
    chosen = places < fraction
    said = np.full(len(keys), NOT_GIVEN, np.int8)
    if given is not None:
        np.maximum.at(said, of_key, given)
    if (said == NOT_GIVEN).all():
        chosen[places.argmin()] = True
        chosen[places.argmax()] = False
    chosen = np.where(said == NOT_GIVEN, chosen, said == 1)
    if chosen.all() or not chosen.any():
        raise ValueError(
            f"--data: expected some images to be held out and some not, got {chosen.sum()} held "
            f"out of {len(keys)}; the column held_out decides where it says true or false"
        )
    return chosen[of_key]


def data_fingerprint(
    image_keys: np.ndarray, given: np.ndarray | None, captions: Iterable[Iterable[str]]
) -> str:
    """Equal for equal images, captions and `held_out` columns."""
    digest = hashlib.sha256(np.ascontiguousarray(image_keys, np.uint64).tobytes())
    if given is not None:
        digest.update(np.ascontiguousarray(given, np.int8).tobytes())
    for texts in captions:
        digest.update("\0".join(texts).encode() + b"\1")
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
