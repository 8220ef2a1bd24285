"""The one reader of image files: every mode becomes 8-bit RGB as a person would see it, or is refused."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Of these formats, Pillow gives 16-bit grey values as 32-bit integers.
_SIXTEEN_BITS_AS_INTEGERS = ("PNG", "PPM")

# What brings an image of each EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | Path) -> Image.Image:
    """Reads a file as an RGB picture of 8 bits a channel.

    The picture is turned as its camera says (EXIF); 16-bit grey values, and floats in [0, 1], are scaled to 8 bits; what is transparent
    shows white; palettes, CMYK and the rest are converted by Pillow.

    Args:
        path: Any format that Pillow reads; of several frames, the first.

    Raises:
        ValueError: If the pixels are 32-bit integers, or floats outside [0, 1]: their scale is unknown.
        OSError: If the file is missing, truncated or no image.
    """
    with _opened(path) as picture:
        return _rgb(_turned(picture), picture.format)


def read_image(path: str | Path) -> Tensor:
    """Reads a file as :func:`open_image` does, as a tensor.

    Shapes:
        - **output** [3, h, w] uint8
    """
    return _tensor(open_image(path))


def read_mask(path: str | Path) -> Tensor:
    """Reads a file whose pixels are numbers of classes: grey values, or indices into a palette, which are taken as they are.

    Shapes:
        - **output** [1, h, w] uint8 or int32

    Raises:
        ValueError: If there is more than one channel.
        OSError: If the file is missing, truncated or no image.
    """
    with _opened(path) as picture:
        mask = _turned(picture)
        if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise ValueError(f"Expected a mask of one channel that holds numbers of classes (got mode {mask.mode})")
        values = np.array(mask)
    return torch.from_numpy(values.astype(np.uint8 if values.dtype.itemsize == 1 else np.int32))[None]


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image as :func:`open_image` gives it, from the head of its file unless it is turned."""
    with _opened(path) as picture:
        width, height = picture.size if _orientation(picture) == 1 else _turned(picture).size
        return height, width


def image_files(folder: Path) -> list[Path]:
    """Lists the images in a folder and those below it, in order; hidden files and folders are left out.

    Such are what other programs leave: ``.ipynb_checkpoints``, ``._picture.jpg``, ``__MACOSX``.
    """
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        files += [(parent, name) for name in names if not is_hidden(name) and name.lower().endswith(SUFFIXES)]
    return [Path(parent, name) for parent, name in sorted(files)]


def listing(folder: Path) -> str:
    """Says in a few words what is in a folder."""
    if not folder.is_dir():
        return "is a file" if folder.exists() else "does not exist"
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"contains {shown}" if names else "is empty"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out."""
    return name.startswith(".") or name == "__MACOSX"


def check_files(paths: Iterable[str | Path]) -> None:
    """Raises where files are absent; each folder is listed once, which is fast for a hundred thousand of them.

    Raises:
        ValueError: If there are none of these files, or not all; the first are named.
    """
    files = [Path(path) for path in paths]
    listed = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {file.parent for file in files}}
    absent = [file for file in files if file.name not in listed[file.parent]]
    if absent:
        first = ", ".join(map(str, absent[:3])) + (", .." if len(absent) > 3 else "")
        raise ValueError(
            f"Expected all {len(files)} files of the data (got {len(absent)} absent: {first}). Bring them there, or take them out of the "
            "annotations."
        )


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    # Not by its name: Pillow maps such files into memory, and then turns uncompressed TIFFs wrongly.
    with open(path, "rb") as file, Image.open(file) as picture:
        yield picture


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:  # Whatever damaged camera data make Pillow raise; the pixels do not depend on them.
        return 1


def _turned(picture: Image.Image) -> Image.Image:
    picture.load()  # Which turns a TIFF, and finds camera data that stand behind the pixels.
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image, kind: str | None) -> Image.Image:
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and kind in _SIXTEEN_BITS_AS_INTEGERS):
        grey = np.array(picture).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode == "F":
        values = np.array(picture)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"Expected floats in [0, 1] (got {values.min()} to {values.max()}): save the image with 8 or 16 bits")
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
    if mode == "I":
        raise ValueError("Expected 8 or 16 bits a channel (got 32-bit integers, whose scale is unknown): save the image with 8 or 16 bits")
    if "transparency" in picture.info or mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        coloured = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return picture.convert("RGB")


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
