"""Splits and epochs that all image classification data share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gkd.data.order import Plan, generator, num_steps, plan_epoch, stratified_order

Batch = tuple[Tensor, Tensor, Tensor]

# Names of independent streams of draws under one (seed, epoch).
ORDER, AUGMENT = 1, 2


class ImageData(ABC):
    """Labelled images in splits, read in batches that depend on (seed, epoch, step) and on nothing else.

    The splits are

    * ``'train'``: shuffled and augmented; the last batch is dropped when it is not full;
    * ``'train_eval'``: the same images in order, not augmented;
    * ``'val'``: training images held out (or the data's own validation part), in order, not augmented;
    * ``'test'``: in order, not augmented.

    What is held out and what subset is trained on are stratified and depend on ``split_seed``, never on the seed of a run; smaller
    subsets lie in larger ones.

    Args:
        targets: Classes of the samples of each part that there is: ``{'train': [N], 'test': [M]}`` and perhaps ``'val'``.
        classes: Names of the classes, in the order of their numbers.
        input_size: Channels, height and width of an image as it is given to a network.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. ``None``: all.
        split_seed: Seed of both choices.

    Attributes:
        num_classes (int): Number of classes.
        classes (tuple): Names of the classes.
        input_size (tuple): Channels, height and width.
        mean (tuple): Mean of each channel, as the images were normalised.
        std (tuple): Standard deviation of each channel.

    Raises:
        ValueError: If the numbers do not fit the data.
    """

    def __init__(
        self,
        targets: Mapping[str, Tensor],
        classes: Sequence[str],
        input_size: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
    ) -> None:
        if not len(mean) == len(std) == input_size[0] or min(std) <= 0:
            raise ValueError(f"Expected mean and positive std for each of {input_size[0]} channels (got mean={mean}, std={std})")
        if holdout and "val" in targets:
            raise ValueError(f"Expected holdout=0 where the data bring their own validation images (got holdout={holdout})")
        for part, labels in targets.items():
            if len(labels) == 0:
                raise ValueError(f"Expected images in the part '{part}' (got none)")
            if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
                low, high = int(labels.min()), int(labels.max())
                raise ValueError(f"Expected targets in [0, {len(classes)}) in the part '{part}' (got {low} to {high})")
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)
        self.input_size = (int(input_size[0]), int(input_size[1]), int(input_size[2]))
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)

        order = stratified_order(targets["train"], split_seed)
        num_held = _count(holdout, len(order), "holdout")
        num_train = len(order) - num_held if subset is None else _count(subset, len(order) - num_held, "subset")
        if num_train < 1:
            raise ValueError(f"Expected at least one training image (got holdout={holdout} and subset={subset} of {len(order)})")
        train = order[num_held : num_held + num_train].sort().values
        # {split: (part it is read from, rows of that part)}
        self._members = {"train": ("train", train), "train_eval": ("train", train), "val": ("train", order[:num_held].sort().values)}
        self._members.update({part: (part, torch.arange(len(labels))) for part, labels in targets.items() if part != "train"})
        self._targets = {split: targets[part][rows] for split, (part, rows) in self._members.items()}

    def num_samples(self, split: str) -> int:
        """Counts the images of a split; ``'val'`` has none unless some were held out."""
        return len(self.targets(split))

    def targets(self, split: str) -> Tensor:
        """Gives the classes of a split's images: ``targets(split)[index]`` are those of a batch.

        Shapes:
            - **output** [num_samples(split)] long, on the CPU
        """
        if split not in self._targets:
            names = ", ".join(f"'{name}'" for name in self._targets)
            raise ValueError(f"Expected a split among {names} (got '{split}')")
        return self._targets[split]

    def num_batches(self, split: str, batch_size: int, world_size: int = 1) -> int:
        """Counts the steps of an epoch in which each of ``world_size`` processes takes ``batch_size`` images."""
        return num_steps(self.num_samples(split), batch_size, world_size, drop_last=split == "train")

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        epoch: int = 0,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> Iterator[Batch]:
        """Reads an epoch of a split in batches.

        The order depends on (seed, epoch), the augmentation of an image on (seed, epoch) and its place or index; both are drawn on the CPU
        by generators of their own. So ``start`` continues an interrupted epoch bit for bit, the device makes no difference, and what the
        ranks see in a step is together what a single process with ``world_size * batch_size`` sees.

        Args:
            split: ``'train'``, ``'train_eval'``, ``'val'`` or ``'test'``.
            batch_size: Images that one process takes in one step.
            epoch: Only ``'train'`` depends on it, and on the seed.
            start: Steps of the epoch to leave out; they are not even read.
            seed: Seed of the run.
            rank: This process.
            world_size: Number of processes. The last, shorter step of a split that is not ``'train'`` is shared out evenly: a rank that
                gets nothing of it has one batch fewer.
            device: Where the batches are wanted.

        Shapes:
            - **images** [b, C, H, W] float, normalised; **targets** [b] long; **index** [b] long: the positions in the split

        Raises:
            ValueError: If the split is unknown or too small for one batch, or if a number is out of range.
        """
        self._check(split, batch_size, start, rank, world_size)
        train = split == "train"
        num_samples = self.num_samples(split)
        order = torch.randperm(num_samples, generator=generator(seed, epoch, ORDER)) if train else torch.arange(num_samples)
        plan = plan_epoch(order, batch_size, drop_last=train, start=start, rank=rank, world_size=world_size)
        return self._read(split, plan, (seed, epoch) if train else None, torch.device(device))

    @abstractmethod
    def _read(self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device) -> Iterator[Batch]:
        """Yields the batches of a plan, augmented by draws from (seed, epoch) where that is given."""

    def _check(self, split: str, batch_size: int, start: int, rank: int, world_size: int) -> None:
        num_samples = self.num_samples(split)
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"Expected batch_size and world_size of at least 1 (got {batch_size} and {world_size})")
        if not 0 <= rank < world_size:
            raise ValueError(f"Expected rank in [0, {world_size}) (got {rank})")
        if split == "val" and num_samples == 0:
            raise ValueError(
                f"Expected held-out images for the split 'val' (got none: construct {type(self).__name__} with holdout=0.1, say)"
            )
        num_batches = self.num_batches(split, batch_size, world_size)
        if num_batches < 1:
            needed = f"{batch_size} images" if world_size == 1 else f"{world_size} x {batch_size} images"
            raise ValueError(
                f"Expected at least one full batch of {needed} (got {num_samples} in the split '{split}': take smaller batches)"
            )
        if not 0 <= start <= num_batches:
            raise ValueError(f"Expected start in [0, {num_batches}] (got {start})")


def _count(amount: float | int, total: int, name: str) -> int:
    """Turns a share (float) or a number (int) of samples into a number."""
    number = round(amount * total) if isinstance(amount, float) else amount
    if amount < 0 or number > total:
        raise ValueError(f"Expected {name} as a share (float) in [0, 1] or a number (int) of at most {total} images (got {amount!r})")
    return number
