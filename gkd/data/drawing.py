"""Draws scenes of handwritten digits: real strokes on an uneven ground, among clutter."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gkd.data.epochs import mix, stratified_order

Array = np.ndarray[Any, Any]

# Seed of the division of the digits into those of training and of test scenes: a fact of this data set, not a setting.
_DIGIT_SEED = 0
_TEST_SHARE = 0.3


class Scene(NamedTuple):
    """A scene and what stands in it.

    Shapes:
        - **image** [3, size, size] uint8; **boxes** [n, 4]; **labels** [n] long; **instances** [size, size] uint8: 0 where no stroke is
          seen, i + 1 where the i-th digit is
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    instances: Tensor


def draw_scenes(
    num_scenes: dict[str, int],
    size: int,
    digits: tuple[int, int],
    scale: tuple[float, float],
    clutter: int,
    overlap: float,
    scene_seed: int,
) -> dict[str, list[Scene]]:
    """Draws the scenes of the parts ``'train'`` and ``'test'``; scene i of a part is the same whatever their number.

    Raises:
        ValueError: If a number is out of range.
    """
    if size < 16 or not 0 <= digits[0] <= digits[1] or not 0 < scale[0] <= scale[1] <= 1 or min(num_scenes.values()) < 1:
        raise ValueError(
            "Expected size >= 16, 0 <= fewest <= most digits, 0 < smallest <= largest scale <= 1 and scenes in both parts "
            f"(got {size}, {digits}, {scale} and {num_scenes})"
        )
    pools = digit_pools()
    return {
        part: [
            compose(np.random.default_rng(mix(scene_seed, number, index)), pools[part], size, digits, scale, clutter, overlap)
            for index in range(num_scenes[part])
        ]
        for number, part in enumerate(("train", "test"))
    }


def compose(
    chance: np.random.Generator,
    pool: tuple[Array, Array],
    size: int,
    digits: tuple[int, int] = (1, 6),
    scale: tuple[float, float] = (0.12, 0.45),
    clutter: int = 8,
    overlap: float = 0.3,
) -> Scene:
    """Composes one scene.

    Args:
        chance: Where all draws come from.
        pool: Digits [m, 8, 8] in [0, 1] and their classes [m].
        size: As in `DigitScenes`, and so the others.
        digits: Fewest and most.
        scale: Smallest and largest.
        clutter: Most pieces.
        overlap: Largest covered share.
    """
    canvas = _ground(chance, size)
    pieces = int(chance.integers(0, clutter + 1))
    for _ in range(pieces - pieces // 3):
        _draw_clutter(chance, canvas, pool[0], size)
    boxes: list[list[float]] = []
    labels: list[int] = []
    instances = np.zeros((size, size), dtype=np.uint8)
    for _ in range(int(chance.integers(digits[0], digits[1] + 1))):
        for _ in range(8):  # places to try
            chosen = int(chance.integers(len(pool[0])))
            height = size * scale[0] * (scale[1] / scale[0]) ** chance.random()
            glyph = _glyph(pool[0][chosen], max(6, round(height)), 0.75 + 0.5 * chance.random())
            if glyph.shape[0] > size or glyph.shape[1] > size:
                continue
            top, left = (int(chance.integers(0, size - length + 1)) for length in glyph.shape)
            box = [float(left), float(top), float(left + glyph.shape[1]), float(top + glyph.shape[0])]
            if _most_covered(box, boxes) <= overlap:
                _paint(chance, canvas, glyph, top, left)
                boxes.append(box)
                labels.append(int(pool[1][chosen]))
                instances[top : top + glyph.shape[0], left : left + glyph.shape[1]][glyph > 0.5] = len(labels)
                break
    for _ in range(pieces // 3):  # before the digits
        _draw_line(chance, canvas, size)
    canvas += chance.normal(0.0, 0.02, (3, size, size))
    image = torch.from_numpy((canvas.clip(0, 1) * 255).round().astype(np.uint8))
    return Scene(image, torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.long), torch.from_numpy(instances))


def digit_pools() -> dict[str, tuple[Array, Array]]:
    """The digits [m, 8, 8] in [0, 1] and their classes [m] that scenes of either part are made of."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images, targets = (loaded.images / 16).astype(np.float32), loaded.target
    order = stratified_order(torch.from_numpy(targets).long(), _DIGIT_SEED).numpy()
    num_test = round(_TEST_SHARE * len(order))
    return {part: (images[rows], targets[rows]) for part, rows in (("test", order[:num_test]), ("train", order[num_test:]))}


def _enlarged(grey: Array, height: int, width: int) -> Array:
    return np.asarray(Image.fromarray(np.ascontiguousarray(grey)).resize((width, height), Image.Resampling.BICUBIC))


def _glyph(digit: Array, height: int, aspect: float) -> Array:
    """The strokes of a digit [h, w] in [0, 1], enlarged, without empty rows and columns around them."""
    rows, columns = (np.flatnonzero(digit.max(side) > 0.25) for side in (1, 0))
    strokes = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = max(4, round(height * strokes.shape[1] / strokes.shape[0] * aspect))
    return ((_enlarged(strokes, height, width) - 0.15) / 0.6).clip(0, 1)


def _ground(chance: np.random.Generator, size: int) -> Array:
    """A colour that changes slowly over the image [3, size, size]."""
    coarse = chance.uniform(-0.5, 0.5, (3, 4, 4)).astype(np.float32)
    level, contrast = chance.uniform(0.25, 0.6), chance.uniform(0.1, 0.35)
    return np.stack([level + contrast * _enlarged(plane, size, size) for plane in coarse]).astype(np.float32)


def _paint(chance: np.random.Generator, canvas: Array, glyph: Array, top: int, left: int, contrast: float = 0.3) -> None:
    """Draws a glyph, clearly brighter or darker than what is behind it."""
    window = canvas[:, top : top + glyph.shape[0], left : left + glyph.shape[1]]
    sign = 1.0 if chance.random() < 0.5 else -1.0
    colour = window.mean((1, 2), keepdims=True) + sign * chance.uniform(contrast, contrast + 0.3, (3, 1, 1))
    window += glyph * (colour.clip(0, 1) - window)


def _draw_clutter(chance: np.random.Generator, canvas: Array, digits: Array, size: int) -> None:
    """A line, or a piece cut out of a digit."""
    if chance.random() < 0.5:
        _draw_line(chance, canvas, size)
        return
    height = max(6, round(size * chance.uniform(0.1, 0.3)))
    glyph = _glyph(digits[int(chance.integers(len(digits)))], height, 1.0)
    rows = slice(0, max(2, height // 2)) if chance.random() < 0.5 else slice(height // 2, height)
    piece = glyph[rows, : max(2, round(glyph.shape[1] * 0.6))]
    if max(piece.shape) < size:
        top, left = (int(chance.integers(0, size - length + 1)) for length in piece.shape)
        _paint(chance, canvas, piece, top, left, contrast=0.1)


def _draw_line(chance: np.random.Generator, canvas: Array, size: int) -> None:
    start, end = chance.uniform(0, size, (2, 2)).astype(np.float32)
    grid = np.arange(size, dtype=np.float32) + 0.5
    across, down = grid[None, :] - start[0], grid[:, None] - start[1]
    along = end - start
    share = ((across * along[0] + down * along[1]) / max(float(along @ along), 1e-6)).clip(0, 1)
    distance = np.hypot(across - share * along[0], down - share * along[1])
    stroke = 0.5 * (1 + chance.uniform(0.5, size / 60) - distance).clip(0, 1)
    canvas += stroke * (chance.uniform(0.0, 1.0, (3, 1, 1)) - canvas)


def _most_covered(box: list[float], others: list[list[float]]) -> float:
    """Largest share of a box, this or another, that lies in their intersection."""
    covered = 0.0
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        if width > 0 and height > 0:
            smaller = min((corners[2] - corners[0]) * (corners[3] - corners[1]) for corners in (box, other))
            covered = max(covered, width * height / smaller)
    return covered
