"""Samples as image files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from olss_fast.errors import InputError
from olss_fast.support.files import write_atomically
from olss_fast.support.folders import PathLike, make_folder
from olss_fast.support.text import clipped

GAP = 2  # pixels between the images of a grid
LEAST_WIDTH = 512  # pixels: a narrower grid is enlarged
LINE, LETTER = 16, 7  # height of a line of text, and the most that one of its letters is wide


def to_uint8(images: ArrayLike, name: str = "images") -> NDArray[np.uint8]:
    """(K, C, H, W) in [-1, 1] with C = 1 or 3 -> (K, H, W) or (K, H, W, 3) in 0..255, clamped and rounded."""
    values = np.asarray(images, dtype=np.float64)
    if values.ndim != 4 or values.shape[1] not in (1, 3):
        raise InputError(f"{name} has shape {values.shape}: expected (K, 1, H, W) or (K, 3, H, W), grey or RGB pixels")
    pixels = np.rint(np.clip(np.nan_to_num(values), -1.0, 1.0) * 127.5 + 127.5).astype(np.uint8)
    return pixels[:, 0] if pixels.shape[1] == 1 else np.moveaxis(pixels, 1, -1)


def save_images(images: ArrayLike, folder: PathLike, labels: Sequence[str] = ()) -> list[Path]:
    """Each image as `00000.png` and so on, and all of them in `grid.png`, large enough to look at, with `labels` below
    them (default: their numbers); returns the paths, the grid's last."""
    pixels = to_uint8(images)
    folder = make_folder(folder)
    paths = [folder / f"{i:05d}.png" for i in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        _write(image, path)
    _write(labelled(pixels, labels or [str(i) for i in range(len(pixels))]), folder / "grid.png")
    return [*paths, folder / "grid.png"]


def labelled(pixels: NDArray[np.uint8], labels: Sequence[str]) -> NDArray[np.uint8]:
    """Images (K, H, W[, 3]) as `tile` has them, made larger by a whole number where that takes it to reach
    `LEAST_WIDTH`, with a line of text below each."""
    from PIL import Image, ImageDraw

    count, _, width = pixels.shape[:3]
    columns = math.ceil(math.sqrt(count))
    factor = math.ceil(LEAST_WIDTH / (columns * width))
    cells = []
    for image, label in zip(pixels.repeat(factor, 1).repeat(factor, 2), labels, strict=True):
        strip = Image.new("L", (image.shape[1], LINE), 255)
        most = max(1, image.shape[1] // LETTER)
        line = clipped(label, most).replace("…", "...").encode("ascii", "replace").decode()  # the least that fonts have
        ImageDraw.Draw(strip).text((0, 1), line, fill=0)
        text = np.asarray(strip, dtype=np.uint8)
        cells.append(np.concatenate([image, text if image.ndim == 2 else np.stack([text] * 3, axis=-1)]))
    return tile(np.stack(cells), gap=2 * GAP)


def tile(pixels: NDArray[np.uint8], gap: int = GAP) -> NDArray[np.uint8]:
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
