"""Data sets too large for memory: images are decoded and augmented by workers, and normalised on the device."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gkd.data.augment import Normalize
from gkd.data.base import AUGMENT, Batch, ImageData
from gkd.data.order import Plan, mix

_log = logging.getLogger(__name__)

# A row of the split's files, and the seed of its augmentation (None: no chance in it).
_Item = tuple[int, int | None]
# An image [3, H, W], or the path and the reason why there is none.
_Sample = Tensor | tuple[str, str]


class LoadedImages(ImageData):
    """Images in files, decoded and transformed by persistent workers.

    Workers hand over bytes; these are normalised on the device. Each image's transform is seeded by (seed, epoch, index), so neither the
    number of workers nor the batch in which an image comes makes a difference, and an epoch starts at any step without reading those
    before.

    Args:
        files: Paths of the images of each part: ``'train'``, ``'test'`` and perhaps ``'val'``.
        targets: Classes of the same images.
        classes: Names of the classes.
        input_size: Channels, height and width of what the transforms give.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        train_transform: From a PIL image to a uint8 tensor of ``input_size``, for the split ``'train'``.
        eval_transform: The same without chance, for the others.
        num_workers: Processes that decode; 0 decodes in this one. ``None``: the cores there are for this process, at most 8.
        skip_unreadable: Leave out images that cannot be read: their batch is smaller by them. ``False``: stop.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. ``None``: all.
        split_seed: Seed of both choices.
        channels_last: Give the images in the channels_last memory format.

    Attributes:
        unreadable (dict): Reason by path of the images that could not be read so far.

    Raises:
        ValueError: While reading, if images cannot be read (they are named), or if a transform gives something else than it should.
    """

    def __init__(
        self,
        files: Mapping[str, Sequence[str]],
        targets: Mapping[str, Tensor],
        classes: Sequence[str],
        input_size: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        train_transform: Callable[[Any], Tensor],
        eval_transform: Callable[[Any], Tensor],
        num_workers: int | None = None,
        skip_unreadable: bool = False,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__(targets, classes, input_size, mean, std, holdout=holdout, subset=subset, split_seed=split_seed)
        for part, paths in files.items():
            if len(paths) != len(targets[part]):
                raise ValueError(f"Expected as many files as targets in the part '{part}' (got {len(paths)} and {len(targets[part])})")
        if num_workers is None:
            num_workers = min(8, max(1, _usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        if num_workers < 0:
            raise ValueError(f"Expected num_workers >= 0 (got {num_workers})")
        self.num_workers = num_workers
        self.skip_unreadable = skip_unreadable
        self.unreadable: dict[str, str] = {}
        stored = {part: _Paths(paths) for part, paths in files.items()}
        self._images = {
            split: _Images(stored[part], train_transform if split == "train" else eval_transform, self.input_size)
            for split, (part, _) in self._members.items()
        }
        for split in ("train", "test"):  # A wrong transform is told here, not by a worker.
            self._images[split].transformed(Image.new("RGB", (2 * self.input_size[2], self.input_size[1])), seed=0)
        self._normalize = Normalize(self.mean, self.std, channels_last)
        self._loaders: dict[tuple[str, bool], _Loader] = {}

    def _read(self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device) -> Iterator[Batch]:
        part, members = self._members[split]
        index = plan.samples.split(plan.sizes) if plan.sizes else ()
        steps = (
            [
                (row, None if draw is None else mix(*draw, AUGMENT, number))
                for row, number in zip(members[numbers].tolist(), numbers.tolist(), strict=True)
            ]
            for numbers in index
        )
        # One loader serves all epochs of a split; a second iteration at the same time gets its own.
        key = (split, device.type == "cuda")
        loader = self._loaders.pop(key, None) or _Loader(self._images[split], self.num_workers, pin=key[1])
        try:
            for numbers, (images, unreadable) in zip(index, loader.read(steps), strict=False):
                readable = self._without(numbers, unreadable, part)
                images = self._normalize(images.to(device, non_blocking=True))
                yield images, self._targets[split][readable].to(device, non_blocking=True), readable.to(device, non_blocking=True)
        finally:
            self._loaders[key] = loader

    def _without(self, index: Tensor, unreadable: dict[int, tuple[str, str]], part: str) -> Tensor:
        """Gives the batch's index without the images that could not be read."""
        if not unreadable:
            return index
        new = {path: reason for path, reason in unreadable.values() if path not in self.unreadable}
        self.unreadable.update(new)
        if not self.skip_unreadable or len(unreadable) == len(index):
            named = "\n".join(f"  {path}: {reason}" for path, reason in unreadable.values())
            raise ValueError(
                f"Expected {len(index)} readable '{part}' images in a batch (got {len(unreadable)} that cannot be read).\n{named}\n"
                "Replace them or take them away, or set skip_unreadable = True to go on without them."
            )
        for path, reason in new.items():
            _log.warning("image left out, it cannot be read: %s: %s (%d so far)", path, reason, len(self.unreadable))
        readable = torch.ones(len(index), dtype=torch.bool)
        readable[list(unreadable)] = False
        return index[readable]


class _Paths:
    """A list of paths in one block of bytes: forked workers share it, where Python strings would be copied by their counted references."""

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(path) for path in encoded])

    def __getitem__(self, row: int) -> str:
        begin = self.ends[row - 1] if row else 0
        return os.fsdecode(self.text[begin : self.ends[row]].tobytes())


class _Images(Dataset[_Sample]):
    """Decodes and transforms one image, in a worker or here."""

    def __init__(self, files: _Paths, transform: Callable[[Any], Tensor], input_size: tuple[int, int, int]) -> None:
        self.files = files
        self.transform = transform
        self.input_size = input_size

    def __getitem__(self, item: _Item) -> _Sample:
        from torchvision.datasets.folder import default_loader

        row, seed = item
        path = self.files[row]
        try:
            picture = default_loader(path)
        except Exception as error:  # Whatever a damaged file makes a decoder raise.
            return path, f"{type(error).__name__}: {error}"
        return self.transformed(picture, seed)

    def transformed(self, picture: Any, seed: int | None) -> Tensor:
        """Transforms an image by draws from the seed; the generators of this process (without workers, the training's) do not move."""
        if seed is None:
            image = self.transform(picture)
        else:
            state = random.getstate()
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(seed)
                random.seed(seed)
                image = self.transform(picture)
            random.setstate(state)
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or tuple(image.shape) != self.input_size:
            got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"Expected a transform that gives uint8 {list(self.input_size)} (got {got}); v2.PILToTensor() gives uint8")
        return image


class _Steps(Sampler[list[_Item]]):
    """The batches of the epoch that is read next."""

    def __init__(self) -> None:
        self.steps: Iterable[list[_Item]] = ()

    def __iter__(self) -> Iterator[list[_Item]]:
        return iter(self.steps)


class _Loader:
    """A DataLoader whose workers live on from epoch to epoch while the batches change."""

    def __init__(self, images: _Images, num_workers: int, pin: bool) -> None:
        self.steps = _Steps()
        self.loader = DataLoader(
            images,
            batch_sampler=self.steps,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin,
            collate_fn=_collate,
            generator=torch.Generator(),  # Else each epoch would draw from the global one.
        )

    def read(self, steps: Iterable[list[_Item]]) -> Iterator[tuple[Tensor, dict[int, tuple[str, str]]]]:
        self.steps.steps = steps
        return iter(self.loader)


def _collate(samples: list[_Sample]) -> tuple[Tensor, dict[int, tuple[str, str]]]:
    """Stacks the images that could be read, and gives the others by their position."""
    images = [sample for sample in samples if isinstance(sample, Tensor)]
    unreadable = {position: sample for position, sample in enumerate(samples) if not isinstance(sample, Tensor)}
    return torch.stack(images) if images else torch.empty(0), unreadable


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
