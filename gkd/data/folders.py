"""Image folders and ImageNet: images in files, one folder a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gkd.data.classification import LoadedImages
from gkd.data.images import image_files, is_hidden, listing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
                f"Expected the folders 'train' and 'test' (or 'val') in {root} (got: {root} {listing(root)}). Put the images into "
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
                f"Expected the folders 'train' and 'val' of ImageNet in {root} (got: {root} {listing(root)}). Where the "
                f"archives of ILSVRC2012 are there, torchvision.datasets.ImageNet(root, split) unpacks them; else set {cls.__name__}.root."
            )
        return folders


def _scan(folder: Path, kind: str) -> tuple[list[str], Tensor, list[str]]:
    """Lists the files of a folder of classes, their classes and the names of these."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    files = [image_files(folder / name) for name in classes]
    hollow = [name for name, paths in zip(classes, files, strict=True) if not paths]
    if hollow or not classes:
        state = f"no images of the classes {', '.join(hollow)}" if hollow else f"{folder} {listing(folder)}"
        raise ValueError(f"Expected a folder with images for each class in {folder} (got: {state}). Correct the data or {kind}.root.")
    targets = [number for number, paths in enumerate(files) for _ in paths]
    return [str(path) for paths in files for path in paths], torch.tensor(targets), classes


def _train_transform(size: int) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def _eval_transform(size: int) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
