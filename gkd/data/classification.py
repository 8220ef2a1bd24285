"""CIFAR, image folders and ImageNet, through torchvision's readers."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gkd.data.augment import Augmentation, CropFlip, choose
from gkd.data.loader import LoadedImages
from gkd.data.memory import InMemoryImages

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
                found = f"the download failed: {error}"
            elif not folder.is_dir():
                found = f"{root} {_listing(root)}"
            else:
                found = f"{folder} {_listing(folder)}: a file is missing, or its content is not the original one"
            raise ValueError(
                f"Expected {cls._reader} in the folder {folder} (got: {found}). Unpack {cls._archive} in {root}, "
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


class ImageFolder(LoadedImages):
    """Your own images in folders, one a class, decoded by workers: ``root/train/CLASS/*.jpg`` and ``root/test/CLASS/*.jpg``.

    ``root/val`` gives the split ``'val'``, or the split ``'test'`` where there is no ``root/test``. All parts must have the same classes.
    Training images are cut out and resized at random, and mirrored; the others are resized so that the shorter side is 8/7 of ``size``, and
    their centre is cut out.

    Args:
        root: Folder of the parts.
        size: Height and width of the images as they are given to a network.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        train_transform: From a PIL image to a uint8 tensor [3, size, size]; may draw from torch's and Python's global generators, which are
            seeded for each image by (seed, epoch, index). It must be picklable where workers are spawned. ``None``: as above.
        eval_transform: The same without chance. ``None``: as above.
        num_workers: Processes that decode; 0 decodes in this one. ``None``: the cores there are for this process, at most 8.
        skip_unreadable: Leave out images that cannot be read, name and count them in the log and in ``unreadable``. ``False``: stop.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. ``None``: all.
        split_seed: Seed of both choices.
        channels_last: Give the images in the channels_last memory format.

    Raises:
        ValueError: If a folder is absent, has no classes, or has a class without images, or if the parts differ in their classes; while
            reading, if images cannot be read: they are named.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        train_transform: Callable[[Any], Tensor] | None = None,
        eval_transform: Callable[[Any], Tensor] | None = None,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        root = Path(root).expanduser()
        files, targets, classes = {}, {}, {}
        for part, folder in self._folders(root).items():
            files[part], targets[part], classes[part] = _scan(folder, type(self).__name__)
        for part, names in classes.items():
            if names != classes["train"]:
                differing = sorted(set(names) ^ set(classes["train"]))
                raise ValueError(
                    f"Expected the same classes in all parts of {root} (got these in only one of train and {part}: {differing})"
                )
        super().__init__(
            files,
            targets,
            classes["train"],
            (3, size, size),
            mean,
            std,
            train_transform=_train_transform(size) if train_transform is None else train_transform,
            eval_transform=_eval_transform(size) if eval_transform is None else eval_transform,
            num_workers=num_workers,
            skip_unreadable=skip_unreadable,
            holdout=holdout,
            subset=subset,
            split_seed=split_seed,
            channels_last=channels_last,
        )

    @classmethod
    def _folders(cls, root: Path) -> dict[str, Path]:
        """Finds the folder of each part."""
        folders = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
        if "test" not in folders and "val" in folders:
            folders["test"] = folders.pop("val")
        if not {"train", "test"} <= set(folders):
            raise ValueError(
                f"Expected the folders 'train' and 'test' (or 'val') in {root} (got: {root} {_listing(root)}). Put the images into "
                f"{root / 'train' / 'CLASS'} and {root / 'test' / 'CLASS'}, or set {cls.__name__}.root to where they are."
            )
        return folders


class ImageNet(ImageFolder):
    """ImageNet-1k (ILSVRC 2012) in folders: ``root/train/n01440764/*.JPEG`` and ``root/val/n01440764/*.JPEG``.

    The official validation images are the split ``'test'``; hold out training images for choices. The classes are numbered as in
    torchvision's weights: by the sorted names of the folders. For fewer classes, use :class:`ImageFolder`.

    Args:
        root: Folder of ``train`` and ``val``.
        size: Height and width of the images as they are given to a network.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        train_transform: See :class:`ImageFolder`.
        eval_transform: See :class:`ImageFolder`.
        num_workers: See :class:`ImageFolder`.
        skip_unreadable: See :class:`ImageFolder`.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on: a share in (0, 1] or a number. ``None``: all.
        split_seed: Seed of both choices.
        channels_last: Give the images in the channels_last memory format.

    Raises:
        ValueError: As :class:`ImageFolder`, and if there are not 1000 classes.

    References:
        Russakovsky et al.: ImageNet Large Scale Visual Recognition Challenge, IJCV 2015.
    """

    def __init__(
        self,
        root: str | Path = "data/imagenet",
        size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        train_transform: Callable[[Any], Tensor] | None = None,
        eval_transform: Callable[[Any], Tensor] | None = None,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            root,
            size,
            mean,
            std,
            train_transform,
            eval_transform,
            num_workers,
            skip_unreadable,
            holdout,
            subset,
            split_seed,
            channels_last,
        )
        if self.num_classes != 1000:
            raise ValueError(f"Expected 1000 class folders in {root}/train (got {self.num_classes}: use ImageFolder for other data)")

    @classmethod
    def _folders(cls, root: Path) -> dict[str, Path]:
        folders = {"train": root / "train", "test": root / "val"}
        if not all(folder.is_dir() for folder in folders.values()):
            raise ValueError(
                f"Expected the folders 'train' and 'val' of ImageNet in {root} (got: {root} {_listing(root)}). Where the "
                f"archives of ILSVRC2012 are there, torchvision.datasets.ImageNet(root, split) unpacks them; else set {cls.__name__}.root."
            )
        return folders


def _pixels(images: Any) -> Tensor:
    """The images of a torchvision CIFAR reader as [N, 3, 32, 32]."""
    return torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()


def _scan(folder: Path, kind: str) -> tuple[list[str], Tensor, list[str]]:
    """Lists the files of a folder of classes, their classes and the names of these, by torchvision's rules."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, number = find_classes(folder)
        samples = make_dataset(folder, number, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ValueError(f"Expected a folder with images for each class in {folder} (got: {error})") from error
    return [path for path, _ in samples], torch.tensor([target for _, target in samples]), classes


def _train_transform(size: int) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def _eval_transform(size: int) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size), v2.PILToTensor()])


def _listing(folder: Path) -> str:
    """Says in a few words what is in a folder."""
    if not folder.is_dir():
        return "is a file" if folder.exists() else "does not exist"
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"contains {shown}" if names else "is empty"
