"""Samples as image files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from olss_fast._files import write_atomically
from olss_fast.errors import InputError
from olss_fast.report import PathLike, make_folder


def to_uint8(images: ArrayLike, name: str = "images") -> NDArray[np.uint8]:
    """(K, C, H, W) in [-1, 1] with C = 1 or 3 -> (K, H, W) or (K, H, W, 3) in 0..255, clamped and rounded."""
    values = np.asarray(images, dtype=np.float64)
    if values.ndim != 4 or values.shape[1] not in (1, 3):
        raise InputError(f"{name} has shape {values.shape}: expected (K, 1, H, W) or (K, 3, H, W), grey or RGB pixels")
    pixels = np.rint(np.clip(np.nan_to_num(values), -1.0, 1.0) * 127.5 + 127.5).astype(np.uint8)
    return pixels[:, 0] if pixels.shape[1] == 1 else np.moveaxis(pixels, 1, -1)


def save_images(images: ArrayLike, folder: PathLike) -> list[Path]:
    """Each image as `00000.png` and so on, and all of them in `grid.png`; returns the paths, the grid's last."""
    pixels = to_uint8(images)
    folder = make_folder(folder)
    paths = [folder / f"{i:05d}.png" for i in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        _write(image, path)
    _write(tile(pixels), folder / "grid.png")
    return [*paths, folder / "grid.png"]


def tile(pixels: NDArray[np.uint8], gap: int = 2) -> NDArray[np.uint8]:
    """Images (K, H, W[, 3]) in a nearly square grid, row by row, `gap` white pixels apart."""
    count, height, width = pixels.shape[:3]
    columns = math.ceil(math.sqrt(count))
    lines = math.ceil(count / columns)
    size = (lines * (height + gap) - gap, columns * (width + gap) - gap, *pixels.shape[3:])
    sheet = np.full(size, 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _write(image: NDArray[np.uint8], path: Path) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
