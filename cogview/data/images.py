"""Image files to tensors, and back."""

import hashlib
import os
from typing import BinaryIO, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor


class Images(Protocol):
    """A tensor of images (N, C, H, W), or any object that loads a batch of images by indices."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int], /) -> Tensor: ...


class ImageFile(Protocol):
    """An image that is no file of its own; `str` gives its name for messages."""

    def open(self) -> BinaryIO: ...


def image_key(image: Tensor) -> int:
    """A number below 2**64 that is equal for equal images, of any dtype that holds the same pixels.

    Args:
        image: (C, H, W), uint8 or floating point in [0, 1].
    """
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    digest = hashlib.sha256(image.contiguous().cpu().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big")


def read_image(
    file: str | os.PathLike[str] | ImageFile, image_size: int, channels: int = 3
) -> Tensor:
    """Read an image, crop it around its centre to a square, and resize it.

    A large JPEG is decoded at a half, a quarter or an eighth of its size, where that leaves at
    least twice as many pixels a side as are asked for: several times faster, and no different to
    the eye. Transparent pixels become white, 16-bit grey is scaled to 8 bits,
    and the camera's orientation tag is applied.

    Returns:
        (channels, image_size, image_size) uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is corrupt or truncated, or holds 32-bit grey values,
            whose range is unknown.
    """
    try:
        name = file if isinstance(file, (str, os.PathLike)) else file.open()
        with Image.open(name) as opened:
            opened.draft(None, (2 * image_size, 2 * image_size))
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
            f"{file}: expected an image, got a corrupt or unsupported file ({error})"
        ) from error
    return (
        torch.from_numpy(np.array(image).reshape(image_size, image_size, channels))
        .permute(2, 0, 1)
        .contiguous()
    )


def to_pillow(image: Tensor) -> Image.Image:
    """(C, H, W) in [0, 1] to 8 bits."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def picture_grid(images: Tensor, columns: int = 8, gap: int = 2) -> Tensor:
    """Images (N, C, H, W) in [0, 1] side by side in one, with white between them."""
    missing = -len(images) % columns if len(images) > columns else 0
    padded = F.pad(images, (0, gap, 0, gap), value=1.0)
    padded = torch.cat([padded, padded.new_ones(missing, *padded.shape[1:])])
    rows = padded.split(columns)
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)[:, :-gap, :-gap]
