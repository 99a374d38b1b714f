"""Which examples are for training, and the order in which it reads them."""

import functools
import hashlib

import numpy as np


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


def held_out(image_keys: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which images are held out: a function of an image's key and the seed alone.

    All captions of an image are therefore on one side, copies of an image too, and images that are
    added later leave the others where they are.

    Args:
        image_keys: (N,) uint64, equal for equal images.
        fraction: expected share of the different images that are held out. At least one is, and at
            least one is not.

    Returns:
        (N,) bool.

    Raises:
        ValueError: fewer than two different images.
    """
    keys, of_key = np.unique(image_keys, return_inverse=True)
    if len(keys) < 2:
        raise ValueError(
            f"data: expected at least 2 different images, one of them to hold out, got {len(keys)}"
        )
    mixed = [hashlib.blake2b(b"%d %d" % (seed, key), digest_size=8).digest() for key in keys]
    places = np.frombuffer(b"".join(mixed), ">u8") / 2.0**64
    chosen = places < fraction
    chosen[places.argmin()] = True
    chosen[places.argmax()] = False
    return chosen[of_key]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
