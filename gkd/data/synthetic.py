"""Made-up images of any shape, for smoke tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gkd.data.augment import Augmentation
from gkd.data.epochs import generator
from gkd.data.memory import InMemoryImages


class RandomImages(InMemoryImages):
    """Noise over one smooth random pattern a class: stands in for any data set where nothing but its shape matters.

    The classes are balanced and easy to learn, so a loss that does not fall means a mistake. No number measured on these images says
    anything about a method.

    Args:
        num_classes: Number of classes.
        input_size: Channels, height and width.
        num_train: Training images.
        num_test: Test images.
        noise: Standard deviation of the noise, where the pattern's is 1/4 of the range of a byte.
        seed: Everything is drawn from it.
        augment: Augmentation of the training images. ``None``: none.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. ``None``: all.
        split_seed: Seed of both choices.
        channels_last: Give the images in the channels_last memory format.

    Examples:
        >>> data = RandomImages(num_classes=4, input_size=(3, 16, 16), num_train=32, num_test=8)
        >>> images, targets, index = next(data.batches("train", 8))
        >>> images.shape, targets.unique()
        (torch.Size([8, 3, 16, 16]), tensor([0, 1, 2, 3]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        input_size: tuple[int, int, int] = (3, 32, 32),
        num_train: int = 256,
        num_test: int = 128,
        noise: float = 0.25,
        seed: int = 0,
        augment: Augmentation | None = None,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        channels, height, width = input_size
        if min(num_classes, num_train, num_test, channels, height, width) < 1:
            numbers = f"num_classes={num_classes}, input_size={tuple(input_size)}, num_train={num_train}, num_test={num_test}"
            raise ValueError(f"Expected positive numbers (got {numbers})")
        source = generator(seed)
        coarse = torch.randn(num_classes, channels, 4, 4, generator=source) / 4
        patterns = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)

        def draw(num_images: int) -> tuple[Tensor, Tensor]:
            targets = torch.arange(num_images) % num_classes
            images = patterns[targets] + noise * torch.randn(num_images, channels, height, width, generator=source)
            return ((images + 0.5) * 255).round_().clamp_(0, 255).byte(), targets

        super().__init__(
            {"train": draw(num_train), "test": draw(num_test)},
            num_classes,
            mean=[0.5] * channels,
            std=[0.25] * channels,
            augment=augment,
            holdout=holdout,
            subset=subset,
            split_seed=split_seed,
            channels_last=channels_last,
        )
