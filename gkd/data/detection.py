"""Images with boxes: what all detection data share, and the readers of COCO's and Pascal VOC's annotations are built on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gkd.data.epochs import Plan, generator
from gkd.data.workers import FileData, PackedStrings, Reader

DetectionBatch = tuple[list[Tensor], list[dict[str, Any]], Tensor]


class Sample(NamedTuple):
    """One image and the boxes to train on.

    Args:
        image_id: Its number in the annotations.
        source: What the data's reader takes: a path, or a position.
        size: Height and width.
        boxes: (x1, y1, x2, y2) in pixels, with area, inside the image.
        labels: Classes of the boxes, counted from 0.

    Shapes:
        - **boxes** [n, 4], **labels** [n] long
    """

    image_id: int
    source: Any
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Part:
    """The images of one part of the data, and what is known of them, in COCO's form, for the evaluation."""

    samples: Sequence[Sample]
    annotations: Mapping[str, Any]


class DetectionData(FileData):
    """Images with boxes in splits, read in batches that depend on (seed, epoch, step) and on nothing else.

    The splits are ``'train'`` (shuffled, flipped, resized to one of ``min_size``; the last batch is dropped when it is not full), and, in
    order, ``'val'`` (training images held out) and ``'test'``.

    A batch is (images, targets, index): images are RGB bytes of different sizes, neither normalised nor padded, since teacher and student
    each do that in their own way. Targets have ``boxes``, ``labels``, ``image_id`` and the ``size`` that the image had before it was
    resized.

    Args:
        parts: The parts ``'train'`` and ``'test'``.
        classes: Names of the classes, in the order of their labels.
        category_ids: Number of each class in the annotations.
        read: Gives the RGB bytes [3, h, w] of a sample's source.
        metric: ``'coco'`` or ``'voc'``: how detections are judged.
        min_size: Length to which the shorter side is resized; of several, training takes one at random and evaluation the last. None: as it
            is.
        max_size: Longest that the longer side may become.
        flip: Probability of a mirror image in training. 0 where left and right matter.
        skip_empty: Whether images without boxes are left out of the training.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. None: all.
        split_seed: Seed of both choices.
        num_workers: Processes that decode; 0 decodes in this one. None: the cores there are for this process, at most 8.
        skip_unreadable: Leave out images that cannot be read: their batch is smaller by them. False: stop.

    Attributes:
        classes (tuple): Names of the classes.
        num_classes (int): Number of classes, without a background.
        category_ids (tuple): Number of each class in the annotations.
        metric (str): As above.
        input_size (tuple): Channels, height and width of a small image such as networks may be probed with.
        unreadable (dict): Reason by source of the images that could not be read so far.

    Raises:
        ValueError: If a number is out of range or a part holds no images.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        classes: Sequence[str],
        category_ids: Sequence[int],
        read: Callable[[Any], Tensor],
        metric: Literal["coco", "voc"] = "coco",
        min_size: int | Sequence[int] | None = 800,
        max_size: int = 1333,
        flip: float = 0.5,
        skip_empty: bool = True,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        sizes = [] if min_size is None else [min_size] if isinstance(min_size, int) else list(min_size)
        if any(size < 1 or size > max_size for size in sizes) or not 0 <= flip <= 1:
            raise ValueError(f"Expected 0 < min_size <= max_size and flip in [0, 1] (got {min_size}, {max_size} and {flip})")
        self.classes, self.category_ids, self.metric = tuple(classes), tuple(category_ids), metric
        self.num_classes = len(self.classes)
        self.min_size, self.max_size, self.flip = tuple(sizes), max_size, flip
        self.input_size = (3, 64, 64)
        self._read_image = read
        rows = [row for row, sample in enumerate(parts["train"].samples) if len(sample.boxes) or not skip_empty]
        if not rows:
            raise ValueError(
                "Expected images in the part 'train' (got none; images without boxes are left out of the training while skip_empty = True)"
            )
        order = torch.tensor(rows)[torch.randperm(len(rows), generator=generator(split_seed))]
        numbers = {part: len(content.samples) for part, content in parts.items()}
        super().__init__(numbers, order, holdout, subset, num_workers, skip_unreadable)
        self._parts = dict(parts)

    def samples(self, split: str) -> list[Sample]:
        """The images of a split, in order: ``samples(split)[index]`` are those of a batch."""
        part, rows = self._rows(split)
        return [self._parts[part].samples[row] for row in rows.tolist()]

    def annotations(self, split: str) -> dict[str, Any]:
        """What is known of the images of a split, in the form of COCO's json, crowd regions and difficult objects included."""
        content = self._parts[self._rows(split)[0]].annotations
        ids = {sample.image_id for sample in self.samples(split)}
        return {
            "info": {},
            "images": [image for image in content["images"] if image["id"] in ids],
            "annotations": [annotation for annotation in content["annotations"] if annotation["image_id"] in ids],
            "categories": list(content["categories"]),
        }

    def image(self, split: str, index: int) -> Tensor:
        """The RGB bytes [3, h, w] of one image as it is stored."""
        part, rows = self._rows(split)
        return self._read_image(self._parts[part].samples[int(rows[index])].source)

    def _files(self) -> list[str]:
        return [sample.source for part in self._parts.values() for sample in part.samples]

    def _reader(self, split: str, **options: Any) -> Reader:
        samples = self._parts[self._members[split][0]].samples
        return _Images(samples, self._read_image, self.min_size, self.max_size, self.flip, **options)

    def _read(self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device, **options: Any) -> Iterator[DetectionBatch]:
        part, rows = self._members[split]
        samples = self._parts[part].samples
        for index, batch in self._load(split, plan, draw, device, **options):
            pixels = [image.to(device, non_blocking=True) for image, _ in batch]
            targets = [
                self._target(samples[row], image, is_flipped, device)
                for row, (image, is_flipped) in zip(rows[index].tolist(), batch, strict=True)
            ]
            yield pixels, targets, index

    def _target(self, sample: Sample, image: Tensor, is_flipped: bool, device: torch.device | str) -> dict[str, Any]:
        height, width = image.shape[-2:]
        boxes = sample.boxes * torch.tensor([width / sample.size[1], height / sample.size[0]]).repeat(2)
        if is_flipped:
            boxes = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)
        located = {"boxes": boxes.to(device, non_blocking=True), "labels": sample.labels.to(device, non_blocking=True)}
        return {**located, "image_id": sample.image_id, "size": sample.size}


class _Images(Reader):
    """Reads, resizes and flips one image; gives it with whether it was flipped."""

    def __init__(
        self,
        samples: Sequence[Sample],
        read: Callable[[Any], Tensor],
        min_size: Sequence[int],
        max_size: int,
        flip: float,
        antialias: bool = False,
    ) -> None:
        self.sources = PackedStrings(sample.source for sample in samples)
        self.sizes = np.array([sample.size for sample in samples], dtype=np.int32)
        self.read_image = read
        self.min_size, self.max_size, self.flip, self.antialias = min_size, max_size, flip, antialias

    def source(self, row: int) -> str:
        return self.sources[row]

    def read(self, row: int) -> Tensor:
        image = self.read_image(self.sources[row])
        height, width = self.sizes[row].tolist()
        if tuple(image.shape[1:]) != (height, width):
            raise ValueError(f"Expected {height} x {width} pixels, as the annotations say (got {image.shape[1]} x {image.shape[2]})")
        return image

    def prepare(self, image: Tensor, row: int, seed: int | None) -> tuple[Tensor, bool]:
        chance = [1.0, 1.0] if seed is None else torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        if self.min_size:
            chosen = self.min_size[-1] if seed is None else self.min_size[int(chance[0] * len(self.min_size))]
            image = resize(image, chosen, self.max_size, self.antialias)
        is_flipped = chance[1] < self.flip
        return (image.flip(2) if is_flipped else image), is_flipped

    def collate(self, samples: Sequence[tuple[Tensor, bool]]) -> list[tuple[Tensor, bool]]:
        return list(samples)


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


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cuts boxes off at the edges of the image, and tells which are left with an area.

    Args:
        boxes: (x1, y1, x2, y2) in pixels.
        size: Height and width of the image.

    Shapes:
        - **boxes** [n, 4]; **output** [n, 4], [n] bool

    Examples:
        >>> clip_boxes(torch.tensor([[-2.0, 1.0, 9.0, 3.0], [9.0, 1.0, 12.0, 3.0]]), (4, 8))
        (tensor([[0., 1., 8., 3.],
                [8., 1., 8., 3.]]), tensor([ True, False]))
    """
    height, width = size
    clipped = torch.stack([boxes[:, side].clamp(0, (width, height)[side % 2]) for side in range(4)], dim=1)
    return clipped, (clipped[:, 2:] > clipped[:, :2]).all(1)
