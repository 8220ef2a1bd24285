"""scikit-learn's handwritten digits: real images that come with the installation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gkd.data.augment import Augmentation, CropFlip, choose
from gkd.data.epochs import stratified_order
from gkd.data.memory import InMemoryImages

# Seed of the division into training and test images: a fact of this data set, not a setting.
_TEST_SEED = 0


def digit_images(size: int) -> tuple[Tensor, Tensor]:
    """Loads the 1797 digits of 8x8 grey values, enlarged (bilinearly) on black to ``size``, with a margin of an eighth on each side.

    Args:
        size: Height and width, a multiple of 8.

    Shapes:
        - **images** [1797, 1, size, size] uint8; **targets** [1797] long

    References:
        Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (the test part).
    """
    from sklearn.datasets import load_digits

    if size < 8 or size % 8:
        raise ValueError(f"Expected size as a positive multiple of 8 (got {size})")
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    margin = size // 8
    large = F.interpolate(grey, size=size - 2 * margin, mode="bilinear", align_corners=False)
    return F.pad(large.round().byte(), (margin,) * 4), torch.from_numpy(digits.target).long()


class Digits(InMemoryImages):
    """1797 real handwritten digits, the embedded default: nothing to download, and a network trains in seconds.

    The division into training and test images is fixed and stratified. The digits have a margin of ``size / 8`` and are shifted by up to
    as much, so that no stroke is cut off; they are not mirrored. Their three channels are equal, so that every network takes them.

    Args:
        size: Height and width of an image, a multiple of 8.
        test: Share of the images that make the test split.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        augment: Augmentation of the split ``'train'``. ``'default'``: shifts by up to ``size / 8``. ``None``: none.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. ``None``: all.
        split_seed: Seed of these two choices.
        channels_last: Give the images in the channels_last memory format.

    Raises:
        ValueError: If size is not a multiple of 8, or if a share is out of range.

    Examples:
        >>> data = Digits(size=16, holdout=0.1)
        >>> [data.num_samples(split) for split in ("train", "val", "test")]
        [1132, 126, 539]
    """

    def __init__(
        self,
        size: int = 32,
        test: float = 0.3,
        mean: Sequence[float] = (0.172, 0.172, 0.172),
        std: Sequence[float] = (0.29, 0.29, 0.29),
        augment: Augmentation | str | None = "default",
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        if not 0 < test < 1:
            raise ValueError(f"Expected test as a share in (0, 1) (got {test})")
        images, targets = digit_images(size)
        images = images.expand(-1, 3, -1, -1)
        order = stratified_order(targets, _TEST_SEED)
        num_test = max(1, round(test * len(order)))
        parts = {"test": order[:num_test].sort().values, "train": order[num_test:].sort().values}
        super().__init__(
            {part: (images[rows], targets[rows]) for part, rows in parts.items()},
            10,
            mean,
            std,
            augment=choose(augment, CropFlip(padding=size // 8, flip=0.0)),
            holdout=holdout,
            subset=subset,
            split_seed=split_seed,
            channels_last=channels_last,
        )
