"""Image files to tensors."""

import os
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class Images(Protocol):
    """A tensor of images (N, C, H, W), or any object that loads a batch of images by indices."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int], /) -> Tensor: ...


def read_image(path: str | os.PathLike[str], image_size: int, channels: int = 3) -> Tensor:
    """Read an image, crop it around its centre to a square, and resize it.

    Transparent pixels become white, 16-bit grey is scaled to 8 bits, and the camera's orientation
    tag is applied.

    Returns:
        (channels, image_size, image_size) uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is corrupt or truncated, or holds 32-bit grey values,
            whose range is unknown.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            # Pillow reads 16-bit PNG and PPM as mode I; in other formats mode I holds 32 bits.
            if image.mode.startswith("I;16") or (
                image.mode == "I" and opened.format in ("PNG", "PPM")
            ):
                pixels = np.asarray(image, dtype=np.float32)
                image = Image.fromarray((pixels / 257).clip(0, 255).round().astype(np.uint8))
            elif image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}: grey values of unknown range")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise any exception on damaged files
        raise ValueError(
            f"{path}: expected an image, got a corrupt or unsupported file ({error})"
        ) from error
    return (
        torch.from_numpy(np.array(image).reshape(image_size, image_size, channels))
        .permute(2, 0, 1)
        .contiguous()
    )
