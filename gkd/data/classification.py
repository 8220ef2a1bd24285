"""Images with a class each: splits by class, in memory or in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gkd.data.augment import Normalize, check_statistics
from gkd.data.epochs import EpochData, Plan, seeded, stratified_order
from gkd.data.images import open_image
from gkd.data.workers import FileData, PackedStrings, Reader

Batch = tuple[Tensor, Tensor, Tensor]


class ImageData(EpochData):
    """Labelled images in splits, read in batches that depend on (seed, epoch, step) and on nothing else.

    What is held out and what subset is trained on are stratified and depend on ``split_seed``, never on the seed of a run; smaller
    subsets lie in larger ones.

    The shapes of a batch of :meth:`batches` are **images** [b, C, H, W] float, normalised; **targets** [b] long; **index** [b] long: the
    positions in the split.

    Args:
        targets: Classes of the samples of each part that there is: ``{'train': [N], 'test': [M]}`` and perhaps ``'val'``.
        classes: Names of the classes, in the order of their numbers.
        input_size: Channels, height and width of an image as it is given to a network.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        split_seed: Seed of both choices.
        **splits: ``holdout`` and ``subset`` of :class:`~gkd.data.epochs.EpochData`, and what the subclass beside this one takes.

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
        split_seed: int = 0,
        **splits: Any,
    ) -> None:
        check_statistics(mean, std, input_size[0])
        super().__init__({part: len(labels) for part, labels in targets.items()}, stratified_order(targets["train"], split_seed), **splits)
        for part, labels in targets.items():
            if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
                low, high = int(labels.min()), int(labels.max())
                raise ValueError(f"Expected targets in [0, {len(classes)}) in the part '{part}' (got {low} to {high})")
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)
        self.input_size = (int(input_size[0]), int(input_size[1]), int(input_size[2]))
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self._targets = {split: targets[part][rows] for split, (part, rows) in self._members.items()}

    def targets(self, split: str) -> Tensor:
        """Gives the classes of a split's images: ``targets(split)[index]`` are those of a batch.

        Shapes:
            - **output** [num_samples(split)] long, on the CPU
        """
        self._rows(split)
        return self._targets[split]


class LoadedImages(ImageData, FileData):
    """Images in files, decoded and transformed by persistent workers.

    Workers hand over bytes; these are normalised on the device.

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
        super().__init__(
            targets,
            classes,
            input_size,
            mean,
            std,
            split_seed=split_seed,
            holdout=holdout,
            subset=subset,
            num_workers=num_workers,
            skip_unreadable=skip_unreadable,
        )
        for part, paths in files.items():
            if len(paths) != len(targets[part]):
                raise ValueError(f"Expected as many files as targets in the part '{part}' (got {len(paths)} and {len(targets[part])})")
        self._packed = {part: PackedStrings(paths) for part, paths in files.items()}
        self._transforms = {True: train_transform, False: eval_transform}
        for split in ("train", "test"):  # A wrong transform is told here, not by a worker.
            self._reader(split).prepare(Image.new("RGB", (2 * self.input_size[2], self.input_size[1])), 0, seed=0)
        self._normalize = Normalize(self.mean, self.std, channels_last)

    def _files(self) -> Iterable[str]:
        return (paths[row] for paths in self._packed.values() for row in range(len(paths)))

    def _reader(self, split: str, **options: Any) -> Reader:
        return _Images(self._packed[self._members[split][0]], self._transforms[split == "train"], self.input_size)

    def _read(self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device, **options: Any) -> Iterator[Batch]:
        for index, pixels in self._load(split, plan, draw, device, **options):
            images = self._normalize(pixels.to(device, non_blocking=True))
            yield images, self._targets[split][index].to(device, non_blocking=True), index.to(device, non_blocking=True)


class _Images(Reader):
    """Decodes and transforms one image."""

    def __init__(self, files: PackedStrings, transform: Callable[[Any], Tensor], input_size: tuple[int, int, int]) -> None:
        self.files = files
        self.transform = transform
        self.input_size = input_size

    def source(self, row: int) -> str:
        return self.files[row]

    def read(self, row: int) -> Image.Image:
        return open_image(self.files[row])

    def prepare(self, image: Any, row: int, seed: int | None) -> Tensor:
        with seeded(seed):
            pixels = self.transform(image)
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or tuple(pixels.shape) != self.input_size:
            got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(f"Expected a transform that gives uint8 {list(self.input_size)} (got {got}); v2.PILToTensor() gives uint8")
        return pixels

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(samples)) if samples else torch.empty(0)
