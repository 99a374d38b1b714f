"""The order in which training reads its examples."""

import functools

import numpy as np


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Indices of the examples that a training step reads.

    This is a pure function, so that a resumed run needs no iterator state. Every epoch is a new
    permutation of all examples. The steps cut the sequence of epochs into batches; a batch may span
    two epochs, and every example is read.

    Returns:
        (batch_size,) int64 in `[0, num_examples)`.

    Raises:
        ValueError: a negative step, or no batch or examples.
    """
    if step < 0 or batch_size < 1 or num_examples < 1:
        raise ValueError(
            "expected step >= 0, batch_size >= 1 and num_examples >= 1, "
            f"got step={step}, batch_size={batch_size}, num_examples={num_examples}"
        )
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = _permutation(seed, int(epoch), num_examples)[offsets[in_epoch]]
    return indices


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
