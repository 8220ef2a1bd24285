"""Images with boxes: what all detection data share, and the readers of COCO's and Pascal VOC's annotations are built on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from gkd.data.base import AUGMENT, ORDER
from gkd.data.order import generator, mix, num_steps, plan_epoch

_log = logging.getLogger(__name__)

DetectionBatch = tuple[list[Tensor], list[dict[str, Any]], Tensor]


class UnreadableImageError(ValueError):
    """Images of a batch that cannot be read; the message names them and says how many there were so far."""


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


class DetectionData:
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
        self.skip_unreadable = skip_unreadable
        self.unreadable: dict[str, str] = {}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        default = min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self.num_workers = default if num_workers is None else num_workers
        self._read = read

        train = [sample for sample in parts["train"].samples if len(sample.boxes) or not skip_empty]
        order = torch.randperm(len(train), generator=generator(split_seed)).tolist()
        num_held = _count(holdout, len(order), "holdout")
        num_train = len(order) - num_held if subset is None else _count(subset, len(order) - num_held, "subset")
        chosen = {"train": order[num_held : num_held + num_train], "val": order[:num_held]}
        self._samples = {split: [train[row] for row in sorted(rows)] for split, rows in chosen.items()}
        self._samples["test"] = list(parts["test"].samples)
        self._annotations = {"train": parts["train"].annotations, "val": parts["train"].annotations, "test": parts["test"].annotations}
        for split in ("train", "test"):
            if not self._samples[split]:
                raise ValueError(
                    f"Expected images in the split '{split}' (got none; images without boxes are left out of the training while "
                    "skip_empty = True)"
                )

    def num_samples(self, split: str) -> int:
        """Counts the images of a split; ``'val'`` has none unless some were held out."""
        return len(self.samples(split))

    def num_batches(self, split: str, batch_size: int, world_size: int = 1) -> int:
        """Counts the steps of an epoch in which each of ``world_size`` processes takes ``batch_size`` images."""
        return num_steps(self.num_samples(split), batch_size, world_size, drop_last=split == "train")

    def samples(self, split: str) -> list[Sample]:
        """The images of a split, in order: ``samples(split)[index]`` are those of a batch."""
        if split not in self._samples:
            raise ValueError(f"Expected a split among {', '.join(map(repr, self._samples))} (got {split!r})")
        return self._samples[split]

    def annotations(self, split: str) -> dict[str, Any]:
        """What is known of the images of a split, in the form of COCO's json, crowd regions and difficult objects included."""
        known = self._annotations[split]
        ids = {sample.image_id for sample in self.samples(split)}
        return {
            "info": {},
            "images": [image for image in known["images"] if image["id"] in ids],
            "annotations": [annotation for annotation in known["annotations"] if annotation["image_id"] in ids],
            "categories": list(known["categories"]),
        }

    def image(self, split: str, index: int) -> Tensor:
        """The RGB bytes [3, h, w] of one image as it is stored."""
        return self._read(self.samples(split)[index].source)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        antialias: bool = False,
        epoch: int = 0,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> Iterator[DetectionBatch]:
        """Reads an epoch of a split in batches.

        The order depends on (seed, epoch), flip and size of an image on (seed, epoch) and its index, so that ``start`` continues an
        interrupted epoch bit for bit whatever the number of workers.

        Args:
            split: ``'train'``, ``'val'`` or ``'test'``.
            batch_size: Images that one process takes in one step.
            antialias: Whether images are smoothed before they are made smaller, as PIL does.
            epoch: Only ``'train'`` depends on it, and on the seed.
            start: Steps of the epoch to leave out; they are not even read.
            seed: Seed of the run.
            rank: This process.
            world_size: Number of processes.
            device: Where images and targets are wanted.

        Raises:
            ValueError: If the split is unknown or too small for one batch.
            UnreadableImageError: If an image cannot be read and `skip_unreadable` is not set, or a whole batch cannot be read.
        """
        if batch_size < 1 or self.num_batches(split, batch_size, world_size) < 1:
            raise ValueError(
                f"Expected at least one batch of {world_size} x {batch_size} images (got {self.num_samples(split)} in '{split}')"
            )
        train = split == "train"
        samples = self.samples(split)
        order = torch.randperm(len(samples), generator=generator(seed, epoch, ORDER)) if train else torch.arange(len(samples))
        plan = plan_epoch(order, batch_size, drop_last=train, start=start, rank=rank, world_size=world_size)
        steps = [
            [(row, mix(seed, epoch, AUGMENT, row) if train else None) for row in rows.tolist()]
            for rows in (plan.samples.split(plan.sizes) if plan.sizes else ())
        ]
        images = _Images(samples, self._read, self.min_size, self.max_size, self.flip if train else 0.0, antialias)
        pin = torch.device(device).type == "cuda"
        # A generator of its own, or each epoch would draw from the global one.
        loader = DataLoader(
            images, batch_sampler=steps, num_workers=self.num_workers, collate_fn=list, pin_memory=pin, generator=torch.Generator()
        )
        for step, read in zip(steps, loader, strict=True):
            batch = [(row, item) for (row, _), item in zip(step, read, strict=True) if not isinstance(item, str)]
            failed = {str(samples[row].source): item for (row, _), item in zip(step, read, strict=True) if isinstance(item, str)}
            self._take_note(failed, len(batch))
            pixels = [item[0].to(device, non_blocking=True) for _, item in batch]
            targets = [self._target(samples[row], item[0], item[1], device) for row, item in batch]
            yield pixels, targets, torch.tensor([row for row, _ in batch])

    def _target(self, sample: Sample, image: Tensor, is_flipped: bool, device: torch.device | str) -> dict[str, Any]:
        height, width = image.shape[-2:]
        boxes = sample.boxes * torch.tensor([width / sample.size[1], height / sample.size[0]]).repeat(2)
        if is_flipped:
            boxes = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)
        located = {"boxes": boxes.to(device, non_blocking=True), "labels": sample.labels.to(device, non_blocking=True)}
        return {**located, "image_id": sample.image_id, "size": sample.size}

    def _take_note(self, failed: dict[str, str], num_read: int) -> None:
        new = {source: reason for source, reason in failed.items() if source not in self.unreadable}
        self.unreadable.update(new)
        if failed and (not self.skip_unreadable or num_read == 0):
            named = "\n".join(f"  {source}: {reason}" for source, reason in failed.items())
            raise UnreadableImageError(
                f"Expected readable images (got {len(self.unreadable)} so far that cannot be read).\n{named}\n"
                "Replace them, take them out of the annotations, or set skip_unreadable = True to go on without them."
            )
        for source, reason in new.items():
            _log.warning("image left out, it cannot be read: %s: %s (%d so far)", source, reason, len(self.unreadable))


class _Images(Dataset):
    """Reads, resizes and flips one image, in a worker or here; gives it with whether it was flipped, or the reason why there is none."""

    def __init__(
        self,
        samples: Sequence[Sample],
        read: Callable[[Any], Tensor],
        min_size: Sequence[int],
        max_size: int,
        flip: float,
        antialias: bool,
    ) -> None:
        self.samples, self.read = samples, read
        self.min_size, self.max_size, self.flip, self.antialias = min_size, max_size, flip, antialias

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[Tensor, bool] | str:
        row, seed = item
        sample = self.samples[row]
        try:
            image = self.read(sample.source)
        except Exception as error:  # whatever a damaged file makes a decoder raise
            return f"{type(error).__name__}: {error}"
        if tuple(image.shape[1:]) != sample.size:
            return f"Expected {sample.size[0]} x {sample.size[1]} pixels, as the annotations say (got {image.shape[1]} x {image.shape[2]})"
        chance = [1.0, 1.0] if seed is None else torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        if self.min_size:
            chosen = self.min_size[-1] if seed is None else self.min_size[int(chance[0] * len(self.min_size))]
            image = resize(image, chosen, self.max_size, self.antialias)
        is_flipped = chance[1] < self.flip
        return (image.flip(2) if is_flipped else image), is_flipped


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


def _count(amount: float | int, total: int, name: str) -> int:
    number = round(amount * total) if isinstance(amount, float) else amount
    if amount < 0 or number > total:
        raise ValueError(f"Expected {name} as a share (float) in [0, 1] or a number (int) of at most {total} images (got {amount!r})")
    return number
