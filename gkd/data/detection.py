"""Images with boxes, and perhaps masks and keypoints: what all detection data share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gkd.data.annotations import Annotations, Sample, flip_pairs
from gkd.data.box_augment import BoxAugment
from gkd.data.epochs import Plan, generator
from gkd.data.object_reader import ObjectReader, unpack
from gkd.data.workers import FileData, Reader

DetectionBatch = tuple[list[Tensor], list[dict[str, Any]], Tensor]

METRICS = ("coco", "voc", "voc07")


class DetectionData(FileData):
    """Images with boxes in splits, read in batches that depend on (seed, epoch, step) and on nothing else.

    The splits are ``'train'`` (shuffled, flipped, resized to one of ``min_size``; the last batch is dropped when it is not full), and, in
    order, ``'val'`` (training images held out, or the data's own) and ``'test'``. `batches` takes two options more:
    ``antialias``, whether images are smoothed before they are made smaller, as PIL does, and ``resized``, which is False for images as they
    are stored.

    A batch is (images, targets, index): images are RGB bytes of different sizes, neither normalised nor padded, since teacher and student
    each do that in their own way. Targets have ``boxes``, ``labels``, ``image_id`` and the ``size`` that the image had before it was
    resized, and where the annotations were read with them, ``masks`` [n, h, w] uint8 and ``keypoints`` [n, K, 3] (x, y, visibility), in the
    pixels of the image as given.

    Args:
        parts: The parts ``'train'`` and ``'test'``, and perhaps ``'val'``, with the same categories.
        read: Gives the RGB bytes [3, h, w] of a sample's source.
        metric: How detections are judged: ``'coco'``, ``'voc'`` (the area below the curve at an overlap of one half) or ``'voc07'`` (its
            mean at eleven recalls).
        min_size: Length to which the shorter side is resized; of several, training takes one at random and evaluation the last. None: as it
            is.
        max_size: Longest that the longer side may become.
        flip: Probability of a mirror image in training. 0 where left and right matter.
        augment: What else is drawn at random in training.
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
        keypoints (tuple): Names of the keypoints, where these are in the targets.
        flip_pairs (list): Place of each keypoint in a mirror image.
        metric (str): As above.
        input_size (tuple): Channels, height and width of a small image such as networks may be probed with.
        unreadable (dict): Reason by source of the images that could not be read so far.

    Raises:
        ValueError: If a number is out of range, a part holds no images, or its categories are others.
    """

    def __init__(
        self,
        parts: Mapping[str, Annotations],
        read: Callable[[str], Tensor],
        metric: Literal["coco", "voc", "voc07"] = "coco",
        min_size: int | Sequence[int] | None = 800,
        max_size: int = 1333,
        flip: float = 0.5,
        augment: BoxAugment | None = None,
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
        if metric not in METRICS:
            raise ValueError(f"Expected metric among {', '.join(map(repr, METRICS))} (got {metric!r})")
        named = {part: [(category["id"], category["name"]) for category in content.categories] for part, content in parts.items()}
        for part, categories in named.items():
            if categories != named["train"]:
                differing = sorted(set(categories) ^ set(named["train"]))[:5]
                raise ValueError(f"Expected the same categories in the parts 'train' and '{part}' (got, in one only, {differing})")
        self.category_ids, self.classes = (tuple(column) for column in zip(*named["train"], strict=True))
        self.num_classes, self.metric = len(self.classes), metric
        self.min_size, self.max_size, self.flip, self.augment = tuple(sizes), max_size, flip, augment
        self.input_size = (3, 64, 64)
        has_points = any(sample.keypoints is not None for sample in parts["train"].samples)
        self.keypoints = tuple(parts["train"].categories[0]["keypoints"]) if has_points else ()
        self.flip_pairs = flip_pairs(self.keypoints)
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

    def annotations(self, split: str, image_ids: Iterable[int] | None = None) -> dict[str, Any]:
        """What is known of the images of a split, in the form of COCO's json, crowd regions and difficult objects included.

        Args:
            split: Name of the split.
            image_ids: Of the images to take, such as those that could be read (``image_id`` of the targets). None: all.
        """
        part, rows = self._rows(split)
        samples, wanted = self._parts[part].samples, None if image_ids is None else set(image_ids)
        return self._parts[part].select([row for row in rows.tolist() if wanted is None or samples[row].image_id in wanted]).coco()

    def image(self, split: str, index: int) -> Tensor:
        """The RGB bytes [3, h, w] of one image as it is stored."""
        part, rows = self._rows(split)
        return self._read_image(self._parts[part].samples[int(rows[index])].source)

    def _files(self) -> Iterable[str]:
        return [sample.source for part in self._parts.values() for sample in part.samples]

    def _reader(self, split: str, resized: bool = True, **options: Any) -> Reader:
        samples = self._parts[self._members[split][0]].samples
        min_size = self.min_size if resized else ()
        return ObjectReader(samples, self._read_image, min_size, self.max_size, self.flip, self.flip_pairs, self.augment, **options)

    def _read(self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device, **options: Any) -> Iterator[DetectionBatch]:
        part, rows = self._members[split]
        for index, batch in self._load(split, plan, draw, device, **options):
            images, located = unpack(batch, device)
            samples = [self._parts[part].samples[row] for row in rows[index].tolist()]
            targets = [
                {**objects, "image_id": sample.image_id, "size": sample.size} for objects, sample in zip(located, samples, strict=True)
            ]
            yield images, targets, index
