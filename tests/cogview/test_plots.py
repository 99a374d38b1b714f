from pathlib import Path

import pytest
import torch
from PIL import Image

from cogview.plots import GRID_LIMIT, save_curves, save_grid


def ink(path: Path) -> float:
    """Share of the picture that is not white."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        grey = torch.tensor(list(image.convert("L").tobytes()), dtype=torch.float32)
    return (grey < 250).float().mean().item()


@pytest.mark.parametrize(("num", "channels"), [(1, 1), (6, 3)])
def test_grid(tmp_path: Path, num: int, channels: int) -> None:
    images, captions = torch.rand(num, channels, 8, 8), ["a caption that is long enough"] * num
    save_grid(images, captions, tmp_path / "a.png", right=[True] * num, title="samples")
    assert ink(tmp_path / "a.png") > 0.3
    save_grid(torch.zeros(num, 1, 8, 8), captions, tmp_path / "b.png")
    assert ink(tmp_path / "b.png") < 0.2  # a blank drawing is blank paper


def test_dollar_signs_in_captions_start_no_formula(tmp_path: Path) -> None:
    captions = ["costs $5 and $6", r"$\frac{$ and \unknown$"]
    save_grid(torch.zeros(2, 1, 8, 8), captions, tmp_path / "a.png", title=r"$\frac{$")
    assert (tmp_path / "a.png").is_file()


def test_characters_without_a_glyph_are_boxes(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    save_grid(torch.zeros(1, 1, 8, 8), ["红色的鸟"], tmp_path / "a.png")
    assert not recwarn.list and ink(tmp_path / "a.png") > 0


def test_a_large_grid_is_limited(tmp_path: Path) -> None:
    num = GRID_LIMIT + 1
    save_grid(torch.zeros(num, 1, 2, 2), ["a"] * num, tmp_path / "a.png", right=[True] * num)
    save_grid(torch.zeros(num - 1, 1, 2, 2), ["a"] * (num - 1), tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as cut, Image.open(tmp_path / "b.png") as whole:
        assert cut.size == whole.size


def test_curves(tmp_path: Path) -> None:
    log = [{"step": i, "loss": 1 / (i + 1)} for i in range(50)]
    log[10]["validation_loss"] = 0.5
    save_curves({"transformer": log}, tmp_path / "a.png", {"loss": "loss (nats per token)"})
    assert 0.005 < ink(tmp_path / "a.png") < 0.3


def test_nothing_to_draw(tmp_path: Path) -> None:
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="images: expected at least one image"):
        save_grid(images[:0], [], tmp_path / "a.png")
    with pytest.raises(ValueError, match="captions: expected one for each of 2 images, got 1"):
        save_grid(images, ["one"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="right: expected one for each of 2 images, got 1"):
        save_grid(images, ["one", "two"], tmp_path / "a.png", right=[True])
    with pytest.raises(ValueError, match="metrics: expected records"):
        save_curves({"transformer": []}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
