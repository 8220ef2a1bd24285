"""CIFAR-10 and CIFAR-100, through torchvision's readers."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gkd.data.augment import Augmentation, CropFlip, choose
from gkd.data.images import listing
from gkd.data.memory import InMemoryImages


class _CIFAR(InMemoryImages):
    """What CIFAR-10 and CIFAR-100 share: 50,000 training and 10,000 test images, read once and held as bytes."""

    _reader: ClassVar[str]
    _folder: ClassVar[str]
    _archive: ClassVar[str]

    def __init__(
        self,
        root: str | Path,
        download: bool,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augmentation | str | None,
        holdout: float | int,
        subset: float | int | None,
        split_seed: int,
        channels_last: bool,
    ) -> None:
        train = self._load(Path(root).expanduser(), download, train=True)
        test = self._load(Path(root).expanduser(), download, train=False)
        super().__init__(
            {part: (_pixels(images), torch.tensor(images.targets)) for part, images in (("train", train), ("test", test))},
            train.classes,
            mean,
            std,
            augment=choose(augment, CropFlip()),
            holdout=holdout,
            subset=subset,
            split_seed=split_seed,
            channels_last=channels_last,
        )

    @classmethod
    def _load(cls, root: Path, download: bool, train: bool) -> Any:
        from torchvision import datasets

        folder = root / cls._folder
        try:
            return getattr(datasets, cls._reader)(root, train=train, download=download)
        except (RuntimeError, OSError, EOFError, tarfile.TarError) as error:
            if download:
                state = f"the download failed: {error}"
            elif not folder.is_dir():
                state = f"{root} {listing(root)}"
            else:
                state = f"{folder} {listing(folder)}: a file is missing, or its content is not the original one"
            raise ValueError(
                f"Expected {cls._reader} in the folder {folder} (got: {state}). Unpack {cls._archive} in {root}, "
                f"or set {cls.__name__}.root to where {cls._folder} is, or set {cls.__name__}.download = True to fetch it once."
            ) from error


class CIFAR10(_CIFAR):
    """CIFAR-10: 10 classes of 32x32 images, in memory, augmented on the device.

    Args:
        root: Folder that contains ``cifar-10-batches-py``.
        download: Fetch the data into root if they are not there. Do it in one process, before several start.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        augment: Augmentation of the split ``'train'``. ``'default'``: crops padded by 4, and mirror images. ``None``: none.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. ``None``: all.
        split_seed: Seed of both choices.
        channels_last: Give the images in the channels_last memory format.

    Raises:
        ValueError: If the data are not in the folder, or not whole: says what was found and how to get them.

    References:
        Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    _reader = "CIFAR10"
    _folder = "cifar-10-batches-py"
    _archive = "cifar-10-python.tar.gz"

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = False,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        augment: Augmentation | str | None = "default",
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__(root, download, mean, std, augment, holdout, subset, split_seed, channels_last)


class CIFAR100(_CIFAR):
    """CIFAR-100: 100 classes of 32x32 images, in memory, augmented on the device; statistics of the CRD recipe.

    Args:
        root: Folder that contains ``cifar-100-python``.
        download: Fetch the data into root if they are not there. Do it in one process, before several start.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        augment: Augmentation of the split ``'train'``. ``'default'``: crops padded by 4, and mirror images. ``None``: none.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. ``None``: all.
        split_seed: Seed of both choices.
        channels_last: Give the images in the channels_last memory format.

    Raises:
        ValueError: If the data are not in the folder, or not whole: says what was found and how to get them.

    References:
        Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009.
        Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020.
    """

    _reader = "CIFAR100"
    _folder = "cifar-100-python"
    _archive = "cifar-100-python.tar.gz"

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = False,
        mean: Sequence[float] = (0.5071, 0.4867, 0.4408),
        std: Sequence[float] = (0.2675, 0.2565, 0.2761),
        augment: Augmentation | str | None = "default",
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__(root, download, mean, std, augment, holdout, subset, split_seed, channels_last)


def _pixels(images: Any) -> Tensor:
    """The images of a torchvision CIFAR reader as [N, 3, 32, 32]."""
    return torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
