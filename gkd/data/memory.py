"""Data sets that fit into memory: held as bytes on the device, augmented there in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gkd.data.augment import Augmentation, Normalize
from gkd.data.classification import Batch, ImageData
from gkd.data.epochs import AUGMENT, Plan, generator

# Pixel values augmented in one go on an accelerator, where launching kernels costs more than running them on one batch.
_ACCELERATOR_CHUNK = 1 << 24


class InMemoryImages(ImageData):
    """Your own images as tensors, in splits, shuffled and augmented on the device.

    Nothing is loaded in the background: a batch is a gather and a few elementwise operations where the network is. All draws of an
    epoch are made on the CPU before its first batch, so no step waits for the device.

    Args:
        parts: ``{'train': (images, targets), 'test': (images, targets)}``, and ``'val'`` if there is one.
        classes: Names of the classes, or their number.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        augment: Augmentation of the split ``'train'``. ``None``: none.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. ``None``: all.
        split_seed: Seed of both choices.
        channels_last: Give the images in the channels_last memory format.

    Shapes:
        - **images** [N, C, H, W] uint8, **targets** [N] long

    Raises:
        ValueError: If images are not uint8 or differ in shape, or if their number is not that of the targets.

    Examples:
        >>> images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
        >>> targets = torch.arange(10) % 2
        >>> data = InMemoryImages({"train": (images, targets), "test": (images, targets)}, ["cat", "dog"], [0.5] * 3, [0.25] * 3)
        >>> [tuple(images.shape) for images, targets, index in data.batches("test", 4)]
        [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[Tensor, Tensor]],
        classes: Sequence[str] | int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augmentation | None = None,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        if not {"train", "test"} <= set(parts) <= {"train", "val", "test"}:
            raise ValueError(f"Expected parts 'train' and 'test', and perhaps 'val' (got {sorted(parts)})")
        shape = parts["train"][0].shape[1:]
        for part, (images, targets) in parts.items():
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != shape:
                expected = f"uint8 images [N, {', '.join(map(str, shape))}]" if len(shape) == 3 else "uint8 images [N, C, H, W]"
                raise ValueError(f"Expected {expected} in the part '{part}' (got {images.dtype} {list(images.shape)})")
            if targets.dtype != torch.long or targets.shape != images.shape[:1]:
                raise ValueError(f"Expected long targets [{len(images)}] in the part '{part}' (got {targets.dtype} {list(targets.shape)})")
        names = [str(number) for number in range(classes)] if isinstance(classes, int) else classes
        super().__init__(
            {part: targets for part, (_, targets) in parts.items()},
            names,
            (shape[0], shape[1], shape[2]),
            mean,
            std,
            holdout=holdout,
            subset=subset,
            split_seed=split_seed,
        )
        self.augment = augment
        self._normalize = Normalize(self.mean, self.std, channels_last)
        self._images = {part: images for part, (images, _) in parts.items()}

    def _read(self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device, **options: Any) -> Iterator[Batch]:
        part, members = self._members[split]
        images = self._images[part] = self._images[part].to(device)  # moves once, and again only when another device asks
        rows, targets, index = (x.to(device) for x in (members[plan.samples], self._targets[split][plan.samples], plan.samples))
        draws = None
        if draw is not None and self.augment is not None:
            # For the whole epoch and all ranks, then this rank's share.
            uniform = torch.rand(self.num_samples(split), self.augment.num_draws, generator=generator(*draw, AUGMENT))
            draws = uniform[plan.place].to(device)

        together = 1
        if device.type != "cpu" and plan.sizes:
            together = max(1, _ACCELERATOR_CHUNK // (plan.sizes[0] * images[0].numel()))
        begin = 0
        for first in range(0, len(plan.sizes), together):
            sizes = plan.sizes[first : first + together]
            chunk = slice(begin, begin + sum(sizes))
            begin = chunk.stop
            pixels = images[rows[chunk]]
            if draws is not None and self.augment is not None:
                pixels = self.augment(pixels, draws[chunk])
            yield from zip(self._normalize(pixels).split(sizes), targets[chunk].split(sizes), index[chunk].split(sizes), strict=True)
