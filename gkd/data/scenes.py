"""Scenes of handwritten digits with boxes: a detection problem of real strokes that comes with the installation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gkd.data.detection import DetectionData, Part, Sample
from gkd.data.order import mix, stratified_order

Array = np.ndarray[Any, Any]

# Seed of the division of the digits into those of training and of test scenes: a fact of this data set, not a setting.
_DIGIT_SEED = 0
_TEST_SHARE = 0.3


class DigitScenes(DetectionData):
    """scikit-learn's 1797 handwritten digits, composed into scenes with boxes: the embedded default of detection.

    Digits of different size, colour and brightness stand on an uneven ground, before and behind clutter of lines and fragments of digits,
    and cover each other in part. Digits of test scenes occur in no training scene. A box is the rectangle around the strokes, covered parts
    included; a digit that would be covered for more than `overlap` is moved or left out. The annotations are COCO's, and so is the metric.

    Everything follows from `scene_seed`: the same on every machine, and image i is the same whatever the number of images.

    Args:
        size: Height and width of a scene.
        num_train: Training scenes.
        num_test: Test scenes.
        digits: Fewest and most digits in a scene; 0 makes some scenes empty.
        scale: Smallest and largest height of a digit, as a share of the scene.
        clutter: Most lines and fragments in a scene.
        overlap: Share of a digit's box that another may cover.
        scene_seed: Seed of the scenes.
        holdout: Training scenes for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training scenes, those to train on. None: all.
        skip_empty: Whether scenes without digits are left out of the training.
        min_size: As in `DetectionData`; None leaves the scenes as they are.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> data = DigitScenes(size=64, num_train=4, num_test=2)
        >>> images, targets, index = next(data.batches("test", 2))
        >>> [tuple(image.shape) for image in images], sorted(targets[0])
        ([(3, 64, 64), (3, 64, 64)], ['boxes', 'image_id', 'labels', 'size'])
    """

    def __init__(
        self,
        size: int = 128,
        num_train: int = 1000,
        num_test: int = 200,
        digits: tuple[int, int] = (1, 6),
        scale: tuple[float, float] = (0.12, 0.45),
        clutter: int = 8,
        overlap: float = 0.3,
        scene_seed: int = 0,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        skip_empty: bool = True,
        min_size: int | None = None,
    ) -> None:
        if size < 16 or not 0 <= digits[0] <= digits[1] or not 0 < scale[0] <= scale[1] <= 1 or min(num_train, num_test) < 1:
            raise ValueError(
                "Expected size >= 16, 0 <= fewest <= most digits, 0 < smallest <= largest scale <= 1 and scenes in both parts "
                f"(got {size}, {digits}, {scale}, {num_train} and {num_test})"
            )
        pools = _digit_pools()
        self._scenes: dict[tuple[str, int], Tensor] = {}
        parts = {}
        for number, (part, count) in enumerate((("train", num_train), ("test", num_test))):
            samples: list[Sample] = []
            annotations: list[dict[str, Any]] = []
            for index in range(count):
                chance = np.random.default_rng(mix(scene_seed, number, index))
                image, boxes, labels = compose(chance, pools[part], size, digits, scale, clutter, overlap)
                source, image_id = (part, index), number * 10_000_000 + index + 1
                self._scenes[source] = image
                samples.append(Sample(image_id, source, (size, size), boxes, labels))
                annotations += [
                    _annotation(len(annotations) + i + 1, image_id, box, int(label))
                    for i, (box, label) in enumerate(zip(boxes.tolist(), labels, strict=True))
                ]
            images = [
                {"id": sample.image_id, "height": size, "width": size, "file_name": f"{part}/{sample.source[1]:06d}.png"}
                for sample in samples
            ]
            categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
            parts[part] = Part(samples, {"images": images, "annotations": annotations, "categories": categories})
        super().__init__(
            parts,
            [str(digit) for digit in range(10)],
            range(1, 11),
            self._scenes.__getitem__,
            min_size=min_size,
            flip=0.0,
            skip_empty=skip_empty,
            holdout=holdout,
            subset=subset,
            num_workers=0,
        )


def compose(
    chance: np.random.Generator,
    pool: tuple[Array, Array],
    size: int,
    digits: tuple[int, int] = (1, 6),
    scale: tuple[float, float] = (0.12, 0.45),
    clutter: int = 8,
    overlap: float = 0.3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Composes one scene.

    Args:
        chance: Where all draws come from.
        pool: Digits [m, 8, 8] in [0, 1] and their classes [m].
        size: As in `DigitScenes`, and so the others.
        digits: Fewest and most.
        scale: Smallest and largest.
        clutter: Most pieces.
        overlap: Largest covered share.

    Shapes:
        - **output**: image [3, size, size] uint8, boxes [n, 4], labels [n] long
    """
    canvas = _ground(chance, size)
    pieces = int(chance.integers(0, clutter + 1))
    for _ in range(pieces - pieces // 3):
        _draw_clutter(chance, canvas, pool[0], size)
    boxes: list[list[float]] = []
    labels: list[int] = []
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
                break
    for _ in range(pieces // 3):  # before the digits
        _draw_line(chance, canvas, size)
    canvas += chance.normal(0.0, 0.02, (3, size, size))
    image = torch.from_numpy((canvas.clip(0, 1) * 255).round().astype(np.uint8))
    return image, torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.long)


def _digit_pools() -> dict[str, tuple[Array, Array]]:
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


def _annotation(number: int, image_id: int, box: list[float], label: int) -> dict[str, Any]:
    width, height = box[2] - box[0], box[3] - box[1]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [box[0], box[1], width, height],
        "area": width * height,
        "iscrowd": 0,
    }
