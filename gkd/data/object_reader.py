"""Reads one image with its objects: in a worker, from flat arrays that are cheap to hand over."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gkd.data.annotations import MIN_SIDE, Sample
from gkd.data.box_augment import BoxAugment, Objects
from gkd.data.masks import decode_masks
from gkd.data.workers import PackedStrings, Reader


class Packed(NamedTuple):
    """A batch of images and objects in few tensors, each of which costs a worker one file descriptor.

    Shapes:
        - **pixels** [sum 3 h w] uint8; **boxes** [n, 4]; **labels** [n] long; **masks** [sum of n_i h_i w_i] uint8 or None;
          **keypoints** [n, K, 3] or None
    """

    sizes: list[tuple[int, int]]
    counts: list[int]
    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    keypoints: Tensor | None


class ObjectReader(Reader):
    """Reads an image; augments, resizes and flips it together with its objects.

    Args:
        samples: Images and objects.
        read: Gives the RGB bytes [3, h, w] of a source.
        min_size: Lengths of the shorter side.
        max_size: Longest that the longer side may become.
        flip: Probability of a mirror image, where there is a seed.
        pairs: Place of each keypoint in a mirror image.
        augment: What else is drawn, where there is a seed.
        antialias: Whether images are smoothed before they are made smaller.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        read: Callable[[str], Tensor],
        min_size: Sequence[int],
        max_size: int,
        flip: float,
        pairs: Sequence[int] = (),
        augment: BoxAugment | None = None,
        antialias: bool = False,
    ) -> None:
        self.read_image = read
        self.min_size, self.max_size, self.flip = tuple(min_size), max_size, flip
        self.pairs, self.augment, self.antialias = list(pairs), augment, antialias
        self.sources = PackedStrings(sample.source for sample in samples)
        self.sizes = np.array([sample.size for sample in samples], dtype=np.int64)
        self.ends = np.cumsum([0, *(len(sample.boxes) for sample in samples)])
        self.boxes = torch.cat([sample.boxes for sample in samples]).numpy()
        self.labels = torch.cat([sample.labels for sample in samples]).numpy()
        outlines = [sample.segmentations for sample in samples if sample.segmentations is not None]
        points = [sample.keypoints for sample in samples if sample.keypoints is not None]
        self.outlines = PackedStrings(map(json.dumps, outlines)) if outlines else None
        self.keypoints = torch.cat(points).numpy() if points else None

    def source(self, row: int) -> str:
        """Path of the image's file."""
        return self.sources[row]

    def read(self, row: int) -> tuple[Tensor, Objects]:
        """Reads the image, which must have the size that the annotations say, and its objects."""
        image = self.read_image(self.sources[row])
        height, width = self.sizes[row].tolist()
        if tuple(image.shape[1:]) != (height, width):
            raise ValueError(f"Expected {height} x {width} pixels, as the annotations say (got {image.shape[1]} x {image.shape[2]})")
        return image, self.objects(row)

    def prepare(self, image: tuple[Tensor, Objects], row: int, seed: int | None) -> tuple[Tensor, Objects]:
        """Augments, resizes and flips the image, and its objects alike."""
        pixels, objects = image
        chance = [1.0, 1.0] if seed is None else torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        factor = 1.0
        if self.augment is not None and seed is not None:
            pixels, objects, factor = self.augment(pixels, objects, seed)
        shape = pixels.shape[-2:]
        shorter, longer = min(shape), max(shape)
        if self.min_size:
            shorter = self.min_size[-1] if seed is None else self.min_size[int(chance[0] * len(self.min_size))]
            longer = self.max_size
        pixels = resize(pixels, max(1, round(shorter * factor)), max(1, round(longer * factor)), self.antialias)
        return _followed(pixels, objects, shape, self.pairs, chance[1] < self.flip)

    def objects(self, row: int) -> Objects:
        """The objects of an image as it is stored."""
        part = slice(self.ends[row], self.ends[row + 1])
        height, width = self.sizes[row].tolist()
        return Objects(
            torch.from_numpy(self.boxes[part]),
            torch.from_numpy(self.labels[part]),
            None if self.outlines is None else decode_masks(json.loads(self.outlines[row]), (height, width)),
            None if self.keypoints is None else torch.from_numpy(self.keypoints[part]),
        )

    def collate(self, samples: Sequence[tuple[Tensor, Objects]]) -> Packed:
        """Puts images and objects into few tensors; `unpack` takes them apart."""
        if not samples:
            return Packed([], [], torch.empty(0), torch.empty(0), torch.empty(0), None, None)
        masks = [objects.masks.flatten() for _, objects in samples if objects.masks is not None]
        points = [objects.keypoints for _, objects in samples if objects.keypoints is not None]
        return Packed(
            [(image.shape[1], image.shape[2]) for image, _ in samples],
            [len(objects.boxes) for _, objects in samples],
            torch.cat([image.flatten() for image, _ in samples]),
            torch.cat([objects.boxes for _, objects in samples]),
            torch.cat([objects.labels for _, objects in samples]),
            torch.cat(masks) if masks else None,
            torch.cat(points) if points else None,
        )


def unpack(batch: Packed, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Takes a batch to the device, and apart again.

    Shapes:
        - **images** [3, h, w] uint8; of each the **boxes** [n, 4] and **labels** [n], and **masks** [n, h, w] and **keypoints** [n, K, 3]
          where there are some
    """
    pixels = batch.pixels.to(device, non_blocking=True).split([3 * height * width for height, width in batch.sizes])
    images = [flat.view(3, height, width) for flat, (height, width) in zip(pixels, batch.sizes, strict=True)]
    columns = {"boxes": batch.boxes, "labels": batch.labels, "keypoints": batch.keypoints}
    split = {name: column.to(device, non_blocking=True).split(batch.counts) for name, column in columns.items() if column is not None}
    if batch.masks is not None:
        shapes = [(count, *size) for count, size in zip(batch.counts, batch.sizes, strict=True)]
        flat = batch.masks.to(device, non_blocking=True).split([count * height * width for count, height, width in shapes])
        split["masks"] = tuple(mask.view(shape) for mask, shape in zip(flat, shapes, strict=True))
    return images, [{name: column[place] for name, column in split.items()} for place in range(len(images))]


def resize(image: Tensor, min_size: int, max_size: int, antialias: bool = False) -> Tensor:
    """Resizes an image so that its shorter side has `min_size` pixels, or fewer where the longer side would exceed `max_size`.

    Shapes:
        - **image** [3, h, w] uint8; **output** [3, h', w'] uint8

    Examples:
        >>> resize(torch.zeros(3, 50, 200, dtype=torch.uint8), 100, 300).shape
        torch.Size([3, 75, 300])
    """
    height, width = image.shape[-2:]
    scale = min(min_size / min(height, width), max_size / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if size == (height, width):
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=antialias)
    return resized[0].round_().clamp_(0, 255).to(torch.uint8)


def _followed(image: Tensor, objects: Objects, shape: Sequence[int], pairs: Sequence[int], is_flipped: bool) -> tuple[Tensor, Objects]:
    """Resizes the objects of an image of the given shape as the image was, flips both if asked, and leaves out what has no area now."""
    height, width = image.shape[-2:]
    scale = torch.tensor([width / shape[1], height / shape[0]])
    boxes, masks, keypoints = objects.boxes * scale.repeat(2), objects.masks, objects.keypoints
    if masks is not None and masks.shape[1:] != image.shape[1:]:
        masks = F.interpolate(masks[None], (height, width), mode="nearest-exact")[0] if len(masks) else masks.new_zeros(0, height, width)
    if keypoints is not None:
        keypoints = torch.cat((keypoints[..., :2] * scale, keypoints[..., 2:]), dim=-1)
    if is_flipped:
        image = image.flip(2)
        boxes = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)
        masks = None if masks is None else masks.flip(2)
        if keypoints is not None:
            mirrored = torch.stack((width - keypoints[..., 0], *keypoints[..., 1:].unbind(-1)), dim=-1)
            # A point that is not marked stays at the origin.
            keypoints = torch.where(keypoints[..., 2:] > 0, mirrored, keypoints)[:, pairs]
    moved = Objects(boxes, objects.labels, masks, keypoints)
    return image, moved.select(((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1))
