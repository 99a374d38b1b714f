"""Reads drawn digits with a classifier, and measures how often a drawing shows its caption."""

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from cogview.demo.digits import CANVAS_SIZE, CELL_SIZE, CELLS, make_scenes


class DigitReader:
    """A support vector machine that reads the four digits of a scene.

    It is trained on the handwriting of the `reader` split, which neither the image tokenizer nor
    the transformer sees, drawn on the same canvas with the same jitter.
    """

    def __init__(self, num_scenes: int = 1500, seed: int = 0):
        scenes = make_scenes("reader", num_scenes, seed)
        self._classifier = SVC(C=10.0, gamma="scale")
        self._classifier.fit(_features(scenes.images), scenes.labels.flatten().numpy())

    def read(self, images: Tensor) -> Tensor:
        """Digits of scenes.

        Args:
            images: (N, 1, 64, 64) in [0, 1], ink is 1.

        Returns:
            (N, 4) int64, in reading order.

        Raises:
            ValueError: wrong shape, or NaN or infinity.
        """
        if images.ndim != 4 or images.shape[1:] != (1, CANVAS_SIZE, CANVAS_SIZE):
            raise ValueError(
                f"images: expected (N, 1, {CANVAS_SIZE}, {CANVAS_SIZE}), got {tuple(images.shape)}"
            )
        if not images.isfinite().all():
            raise ValueError("images: expected finite values, got NaN or infinity")
        if len(images) == 0:
            return torch.empty(0, len(CELLS), dtype=torch.int64)
        return torch.from_numpy(self._classifier.predict(_features(images))).view(-1, len(CELLS))


def caption_accuracy(read: Tensor, labels: Tensor) -> dict[str, float]:
    """How often the right digit is in the right place.

    Args:
        read: (N, 4) digits read from drawings.
        labels: (N, 4) digits of their captions.

    Returns:
        `digit_accuracy`, the share of right digits in the right place (chance 0.1), and
        `whole_caption_accuracy`, the share of drawings with all four right (chance 0.0001).

    Raises:
        ValueError: different shapes, or no drawings.
    """
    if read.shape != labels.shape or read.numel() == 0:
        raise ValueError(
            f"read: expected the shape of labels, {tuple(labels.shape)}, and not empty, "
            f"got {tuple(read.shape)}"
        )
    right = (read.cpu() == labels.cpu()).float()
    return {
        "digit_accuracy": right.mean().item(),
        "whole_caption_accuracy": right.amin(1).mean().item(),
    }


def _features(images: Tensor) -> np.ndarray:
    """Cells at half resolution: (N, 1, 64, 64) -> (4 N, 256) numpy."""
    images = images.detach().cpu().float()
    cells = torch.stack(
        [images[:, 0, top : top + CELL_SIZE, left : left + CELL_SIZE] for top, left in CELLS], dim=1
    )
    return torch.nn.functional.avg_pool2d(cells.flatten(0, 1).unsqueeze(1), 2).flatten(1).numpy()
