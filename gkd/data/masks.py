"""Outlines of objects, as COCO writes them, and the masks that they enclose."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

Segmentation = Any
"""Polygons ``[[x1, y1, x2, y2, ..], ..]``, or run lengths ``{'size': [h, w], 'counts': ..}``, in text or as a list."""


def decode_masks(segmentations: Sequence[Segmentation], size: tuple[int, int]) -> Tensor:
    """Fills outlines.

    Args:
        segmentations: Of every object.
        size: Height and width of the image.

    Shapes:
        - **output** [n, h, w] uint8, 0 or 1

    Raises:
        ValueError: If an outline has another size, or none of the forms.
        ImportError: If pycocotools is not installed.

    Examples:
        >>> decode_masks([[[1, 0, 3, 0, 3, 2, 1, 2]]], (2, 4))
        tensor([[[0, 1, 1, 0],
                 [0, 1, 1, 0]]], dtype=torch.uint8)
    """
    masks = torch.zeros(len(segmentations), *size, dtype=torch.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        mask.copy_(torch.from_numpy(_decode(segmentation, size)))
    return masks


def encode_mask(mask: Tensor) -> Segmentation:
    """Run lengths of a mask, column by column, beginning with those outside.

    Shapes:
        - **mask** [h, w] bool

    Examples:
        >>> encode_mask(torch.tensor([[False, True], [False, True]]))
        {'size': [2, 2], 'counts': [2, 2]}
    """
    flat = mask.T.flatten()
    changes = torch.cat((flat[:1], flat[1:] != flat[:-1])).nonzero().flatten().tolist()
    ends = [0, *changes, flat.numel()]
    return {"size": list(mask.shape), "counts": [end - begin for begin, end in pairwise(ends)]}


def segmentation_box(segmentation: Segmentation, size: tuple[int, int]) -> list[float]:
    """The smallest box (x, y, width, height) around an outline."""
    if isinstance(segmentation, list):
        points = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation])
        low, high = points.min(0), points.max(0)
        return [*low.tolist(), *(high - low).tolist()]
    rows, columns = _decode(segmentation, size).nonzero()
    if len(rows) == 0:
        return [0.0] * 4
    left, top = float(columns.min()), float(rows.min())
    return [left, top, float(columns.max()) + 1 - left, float(rows.max()) + 1 - top]


def _decode(segmentation: Segmentation, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    try:
        from pycocotools import mask as coder
    except ImportError as error:
        raise ImportError(f"Expected pycocotools, which reads COCO's outlines (got: {error}): pip install pycocotools") from error
    height, width = size
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:  # A line or a point encloses nothing.
            return np.zeros(size, dtype=np.uint8)
        return coder.decode(coder.merge(coder.frPyObjects(polygons, height, width)))
    if not isinstance(segmentation, dict) or "counts" not in segmentation or tuple(segmentation.get("size", ())) != size:
        raise ValueError(f"Expected polygons, or run lengths of size {list(size)} (got {str(segmentation)[:80]})")
    runs = segmentation
    if isinstance(runs["counts"], list):
        if sum(runs["counts"]) != height * width or min(runs["counts"], default=0) < 0:
            raise ValueError(f"Expected run lengths of {height * width} pixels (got {sum(runs['counts'])})")
        runs = coder.frPyObjects(runs, height, width)
    return coder.decode(runs)
