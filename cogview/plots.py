"""Pictures of a finished run: labelled samples and curves, each written atomically.

While a run goes on, TensorBoard shows its curves.
"""

import math
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cogview.files import atomic_write

GRID_LIMIT = 100  # images in a grid; matplotlib draws at most 2**16 pixels per side


def save_grid(
    images: Tensor,
    captions: Sequence[str],
    path: str | os.PathLike[str],
    *,
    right: Sequence[bool] | None = None,
    title: str = "",
    columns: int = 4,
) -> None:
    """Save images in a grid, each under its caption.

    The grid holds at most the first `GRID_LIMIT` images, and the title then says so: a larger
    figure would exceed matplotlib's limit of pixels.

    Args:
        images: (N, C, H, W) in [0, 1]; C is 1 (shown as ink on paper) or 3.
        captions: N texts; long ones are wrapped, and `$` does not start a formula.
        path: PNG file.
        right: whether each image shows its caption; captions are then green or red.
        title: title of the whole picture.
        columns: images per row.

    Raises:
        ValueError: no images, or another number of captions (or of `right`) than images.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got none")
    for name, per_image in (("captions", captions), ("right", right)):
        if per_image is not None and len(per_image) != len(images):
            raise ValueError(
                f"{name}: expected one for each of {len(images)} images, got {len(per_image)}"
            )
    if len(images) > GRID_LIMIT:
        title = f"{title} (the first {GRID_LIMIT} of {len(images)} images)".strip()
        images, captions = images[:GRID_LIMIT], captions[:GRID_LIMIT]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.75 * rows + 0.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis in axes[len(images) :]:
        axis.set_axis_off()
    for i, (axis, image, caption) in enumerate(zip(axes, images, captions, strict=False)):
        _show(axis, image)
        colour = "black" if right is None else ("darkgreen" if right[i] else "firebrick")
        axis.set_title(textwrap.fill(caption, 26), fontsize=8.5, color=colour, parse_math=False)
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    _save(figure, path)


def save_curves(
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
    path: str | os.PathLike[str],
    units: Mapping[str, str] | None = None,
) -> None:
    """Save training curves over `step`, one panel for each run and quantity.

    Args:
        metrics: for each run (such as `image tokenizer`) its metrics log: records with `step` and
            numbers. A record may lack some of the numbers. Losses that are all positive and fall by
            more than a factor of 10 have a logarithmic scale.
        path: PNG file.
        units: axis label of a quantity, such as `{"loss": "loss (nats per token)"}`; default: its
            name.

    Raises:
        ValueError: no records.
    """
    curves = [
        (run, name, *_curve(records, name))
        for run, records in metrics.items()
        for name in _quantities(records)
    ]
    if not curves:
        raise ValueError("metrics: expected records with `step` and at least one number, got none")
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis, (run, name, steps, values) in zip(axes, curves, strict=False):
        axis.plot(steps, values, linewidth=1.2, marker="." if len(steps) < 20 else None)
        if "loss" in name and values.min() > 0 and values.max() > 10 * values.min():
            axis.set_yscale("log")
        axis.set_title(run, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel((units or {}).get(name, name.replace("_", " ")))
        axis.grid(alpha=0.3)
    _save(figure, path)


def _quantities(records: Sequence[Mapping[str, float]]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    return [
        name
        for name in names
        if any(isinstance(record.get(name), int | float) for record in records)
    ]


def _curve(records: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [
        (record["step"], record[name])
        for record in records
        if isinstance(record.get(name), int | float)
    ]
    steps, values = np.array(points, dtype=np.float64).T
    return steps, values


def _show(axis: Axes, image: Tensor) -> None:
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("lightgrey")
    pixels = image.detach().cpu().float().clamp(0, 1).numpy()
    if len(pixels) == 1:
        axis.imshow(pixels[0], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    else:
        axis.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # One for each character that matplotlib's font does not have; the picture shows a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=110)
