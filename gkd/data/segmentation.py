"""Images with a class for each pixel: in folders, as Pascal VOC has them, and scenes of digits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gkd.data.augment import Normalize, check_statistics
from gkd.data.drawing import draw_scenes
from gkd.data.epochs import EpochData, Plan, count_of, generator
from gkd.data.folders import IMAGENET_MEAN, IMAGENET_STD
from gkd.data.images import check_files, image_files, listing, read_image, read_mask
from gkd.data.voc import VOC_CLASSES, devkit, image_sets
from gkd.data.workers import FileData, PackedStrings, Reader

Batch = tuple[Tensor, Tensor, Tensor]
Pair = tuple[str, str]
"""Paths of an image and of its mask."""

IGNORE = 255


class SegmentationData(EpochData):
    """Images in splits, with the class of every pixel.

    The interface is that of :class:`~gkd.data.classification.ImageData`: ``num_classes``, ``classes``, ``mean``, ``std``, ``input_size``;
    ``num_samples(split)``, ``num_batches(split, batch_size)``, ``check_files()``, and ``batches(split, batch_size, epoch=, start=, seed=,
    rank=, world_size=, device=)`` for the splits ``'train'``, ``'train_eval'``, ``'val'`` (held out, or the data's own) and ``'test'``.

    A batch is **images** [b, 3, H, W] float, normalised; **targets** [b, H, W] long, in [0, num_classes) or ``ignore_index``; **index** [b]
    long: the positions in the split.

    Args:
        classes: Names of the classes, in the order of their numbers; a background is a class like the others.
        input_size: Channels, height and width of an image as it is given to a network.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel.
        sizes: Number of images of each part: ``'train'``, ``'test'`` and perhaps ``'val'``.
        split_seed: Seed of what is held out and left out.
        **splits: ``holdout`` and ``subset`` of :class:`~gkd.data.epochs.EpochData`, and what the subclass beside this one takes.

    Attributes:
        num_classes (int): Number of classes.
        classes (tuple): Names of the classes.
        input_size (tuple): Channels, height and width.
        mean (tuple): Mean of each channel, as the images were normalised.
        std (tuple): Standard deviation of each channel.
        ignore_index (int): 255, the target of pixels that count nowhere.
    """

    ignore_index = IGNORE

    def __init__(
        self,
        classes: Sequence[str],
        input_size: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        sizes: Mapping[str, int],
        split_seed: int = 0,
        **splits: Any,
    ) -> None:
        check_statistics(mean, std, input_size[0])
        if not 2 <= len(classes) <= IGNORE or len(set(classes)) < len(classes):
            raise ValueError(f"Expected 2 to {IGNORE} classes of different names, the background among them (got {list(classes)})")
        super().__init__(sizes, torch.randperm(sizes["train"], generator=generator(split_seed)), **splits)
        self.classes, self.num_classes, self.input_size = tuple(classes), len(classes), input_size
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._normalize = Normalize(self.mean, self.std)


class MaskFiles(SegmentationData, FileData):
    """Images and masks in files, read and resized by persistent workers.

    A training image is resized so that it fits into the square, times a factor of ``scale`` drawn at random; a square is cut out of it at
    random, and mirrored with the probability ``flip``. The others are resized so that they fit into the square. What is left of the square
    is ``ignore_index``, and the mean colour. So the score is that of the resized images, of all their pixels.

    Args:
        pairs: Paths of images and masks of each part. Pixels of a mask are numbers of classes, or 255.
        classes: See :class:`SegmentationData`.
        size: Side of the square, in pixels.
        mean: See :class:`SegmentationData`.
        std: See :class:`SegmentationData`.
        scale: Smallest and largest factor.
        flip: Probability of a mirror image in training. 0 where left and right matter.
        num_workers: Processes that read; 0 reads in this one. ``None``: the cores there are for this process, at most 8.
        skip_unreadable: Leave out images that cannot be read, or whose masks cannot. ``False``: stop.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on. ``None``: all.
        split_seed: Seed of both choices.

    Raises:
        ValueError: If files are missing or numbers do not fit; while reading, if a mask has other sizes than its image, or other values
            than the classes.
    """

    def __init__(
        self,
        pairs: Mapping[str, Sequence[Pair]],
        classes: Sequence[str],
        size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
    ) -> None:
        if size < 1 or not 0 < scale[0] <= scale[1] or not 0 <= flip <= 1:
            raise ValueError(f"Expected size >= 1, 0 < smallest <= largest scale and flip in [0, 1] (got {size}, {scale} and {flip})")
        super().__init__(
            classes,
            (3, size, size),
            mean,
            std,
            {part: len(files) for part, files in pairs.items()},
            split_seed,
            holdout=holdout,
            subset=subset,
            num_workers=num_workers,
            skip_unreadable=skip_unreadable,
        )
        self.scale, self.flip = (float(scale[0]), float(scale[1])), flip
        self._packed = {
            part: (PackedStrings(image for image, _ in files), PackedStrings(mask for _, mask in files)) for part, files in pairs.items()
        }
        self.check_files()

    def _files(self) -> Iterable[str]:
        return (paths[row] for columns in self._packed.values() for paths in columns for row in range(len(paths)))

    def _reader(self, split: str, **options: Any) -> Reader:
        images, masks = self._packed[self._members[split][0]]
        return _Pairs(images, masks, self.num_classes, self.input_size[1], self.mean, self.scale, self.flip)

    def _read(self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device, **options: Any) -> Iterator[Batch]:
        for index, (pixels, masks) in self._load(split, plan, draw, device, **options):
            images = self._normalize(pixels.to(device, non_blocking=True))
            yield images, masks.to(device, non_blocking=True).long(), index.to(device, non_blocking=True)


class SegmentationFolder(MaskFiles):
    """Your own images and masks: ``root/train/images/NAME.jpg`` and ``root/train/masks/NAME.png``, likewise ``val`` and ``test``.

    ``root/images/train/..`` and ``root/masks/train/..`` are read too. ``val`` is the split ``'test'`` where there is no ``test``. Of two
    folders ``root/images`` and ``root/masks`` alone, a share of the images is the split ``'test'``. A mask has the name of its image, and
    as its pixels the numbers of the classes, or 255 for what counts nowhere.

    Args:
        root: The folder.
        classes: Names of the classes, in the order of their numbers.
        test: Where there are no folders for the parts, the test images: a share (float) or a number (int).
        size: See :class:`MaskFiles`, and so the others.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        scale: Smallest and largest factor of a training image's size.
        flip: Probability of a mirror image in training.
        num_workers: Processes that read.
        skip_unreadable: Leave out images that cannot be read.
        holdout: Training images for ``'val'``.
        subset: Of the remaining training images, those to train on.
        split_seed: Seed of both choices.

    Raises:
        ValueError: As :class:`MaskFiles`, and if an image has no mask, or two images one name.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        test: float | int = 0.2,
        size: int = 512,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
    ) -> None:
        pairs = _folder_pairs(Path(root).expanduser(), test, split_seed, type(self).__name__)
        super().__init__(pairs, classes, size, mean, std, scale, flip, num_workers, skip_unreadable, holdout, subset, split_seed)


class VOCSegmentation(MaskFiles):
    """Pascal VOC's segmentation: ``root/VOC2012/{ImageSets/Segmentation,JPEGImages,SegmentationClass}``, 21 classes.

    Args:
        root: The folder that holds ``VOC2012``, or the one that holds ``VOCdevkit``.
        train: Sets to train on, as year/set.
        test: Sets to evaluate on; the official validation set by default, so hold out training images for choices.
        classes: Names of the classes, without the background, which is class 0.
        size: See :class:`MaskFiles`, and so the others.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        scale: Smallest and largest factor of a training image's size.
        flip: Probability of a mirror image in training.
        num_workers: Processes that read.
        skip_unreadable: Leave out images that cannot be read.
        holdout: Training images for ``'val'``.
        subset: Of the remaining training images, those to train on.
        split_seed: Seed of both choices.

    Raises:
        ValueError: As :class:`MaskFiles`, and if a set is absent.

    References:
        Everingham, Van Gool, Williams, Winn, Zisserman: The Pascal Visual Object Classes (VOC) Challenge, IJCV 2010.
    """

    def __init__(
        self,
        root: str | Path,
        train: str | Sequence[str] = "VOC2012/train",
        test: str | Sequence[str] = "VOC2012/val",
        classes: Sequence[str] = VOC_CLASSES,
        size: int = 512,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
    ) -> None:
        base = devkit(root, type(self).__name__)
        pairs = {
            part: [
                (str(year / "JPEGImages" / f"{name}.jpg"), str(year / "SegmentationClass" / f"{name}.png"))
                for year, name in image_sets(base, sets, "Segmentation", type(self).__name__)
            ]
            for part, sets in (("train", train), ("test", test))
        }
        named = ("background", *classes)
        super().__init__(pairs, named, size, mean, std, scale, flip, num_workers, skip_unreadable, holdout, subset, split_seed)


class DigitSceneMasks(SegmentationData):
    """The scenes of :class:`~gkd.data.DigitScenes` with the class of every pixel: the embedded default of segmentation.

    Class 0 is the background, clutter included; class d + 1 are the strokes of the digit d, where nothing covers them. Scenes are kept as
    bytes on the device and not augmented.

    Args:
        size: Height and width of a scene.
        num_train: Training scenes.
        num_test: Test scenes.
        digits: Fewest and most digits in a scene.
        scale: Smallest and largest height of a digit, as a share of the scene.
        clutter: Most lines and fragments in a scene.
        overlap: Share of a digit's box that another may cover.
        scene_seed: Seed of the scenes.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        holdout: Training scenes for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training scenes, those to train on. ``None``: all.
        split_seed: Seed of both choices.

    Examples:
        >>> data = DigitSceneMasks(size=32, num_train=4, num_test=2)
        >>> images, targets, index = next(data.batches("test", 2))
        >>> tuple(images.shape), tuple(targets.shape), data.num_classes
        ((2, 3, 32, 32), (2, 32, 32), 11)
    """

    def __init__(
        self,
        size: int = 128,
        num_train: int = 1000,
        num_test: int = 200,
        digits: tuple[int, int] = (1, 6),
        scale: tuple[float, float] = (0.12, 0.45),
        clutter: int = 8,
        overlap: float = 0.3,
        scene_seed: int = 0,
        mean: Sequence[float] = (0.42, 0.42, 0.42),
        std: Sequence[float] = (0.22, 0.22, 0.22),
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
    ) -> None:
        scenes = draw_scenes({"train": num_train, "test": num_test}, size, digits, scale, clutter, overlap, scene_seed)
        classes = ["background", *map(str, range(10))]
        counts = {part: len(drawn) for part, drawn in scenes.items()}
        super().__init__(classes, (3, size, size), mean, std, counts, split_seed, holdout=holdout, subset=subset)
        self._images = {part: torch.stack([scene.image for scene in drawn]) for part, drawn in scenes.items()}
        self._masks = {
            part: torch.stack([torch.cat((scene.labels.new_zeros(1), scene.labels + 1)).byte()[scene.instances.long()] for scene in drawn])
            for part, drawn in scenes.items()
        }

    def _read(self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device, **options: Any) -> Iterator[Batch]:
        part, members = self._members[split]
        # They move once, and again only when another device asks.
        images, masks = self._images[part], self._masks[part] = self._images[part].to(device), self._masks[part].to(device)
        for index in plan.samples.split(plan.sizes) if plan.sizes else ():
            rows = members[index].to(device)
            yield self._normalize(images[rows]), masks[rows].long(), index.to(device)


class _Pairs(Reader):
    """Reads an image and its mask, and changes both alike."""

    def __init__(
        self,
        images: PackedStrings,
        masks: PackedStrings,
        num_classes: int,
        size: int,
        mean: Sequence[float],
        scale: tuple[float, float],
        flip: float,
    ) -> None:
        self.images, self.masks, self.num_classes = images, masks, num_classes
        self.size, self.colour, self.scale, self.flip = size, [float(round(255 * value)) for value in mean], scale, flip

    def source(self, row: int) -> str:
        return self.images[row]

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        image, mask = read_image(self.images[row]), read_mask(self.masks[row])
        if image.shape[1:] != mask.shape[1:]:
            raise ValueError(f"Expected a mask of {list(image.shape[1:])} pixels at {self.masks[row]} (got {list(mask.shape[1:])})")
        wrong = mask[(mask >= self.num_classes) & (mask != IGNORE) | (mask < 0)]
        if len(wrong):
            values = wrong.unique().tolist()[:5]
            raise ValueError(f"Expected classes below {self.num_classes}, or {IGNORE}, in the mask {self.masks[row]} (got {values})")
        return image, mask.byte()

    def prepare(self, image: tuple[Tensor, Tensor], row: int, seed: int | None) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2 import functional as F

        pixels, mask = image
        chance = [0.0] * 4 if seed is None else torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
        factor = self.size / max(pixels.shape[1:])
        if seed is not None:
            factor *= self.scale[0] + chance[0] * (self.scale[1] - self.scale[0])
        shape = [max(1, round(length * factor)) for length in pixels.shape[1:]]
        pixels = F.resize(pixels, shape, antialias=True)
        mask = F.resize(mask, shape, interpolation=F.InterpolationMode.NEAREST)
        below, right = (max(0, self.size - length) for length in shape)
        pixels, mask = F.pad(pixels, [0, 0, right, below], fill=self.colour), F.pad(mask, [0, 0, right, below], fill=[IGNORE])
        top, left = (int(draw * (length - self.size + 1)) for draw, length in zip(chance[1:3], pixels.shape[1:], strict=True))
        window = (slice(None), slice(top, top + self.size), slice(left, left + self.size))
        pixels, mask = pixels[window], mask[window]
        if seed is not None and chance[3] < self.flip:
            pixels, mask = pixels.flip(2), mask.flip(2)
        return pixels.contiguous(), mask[0].contiguous()

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, masks = zip(*samples, strict=True) if samples else ((torch.empty(0),), (torch.empty(0),))
        return torch.stack(images), torch.stack(masks)


def _folder_pairs(root: Path, test: float | int, seed: int, kind: str) -> dict[str, list[Pair]]:
    folders = {
        part: next((pair for pair in _places(root, part) if all(folder.is_dir() for folder in pair)), None)
        for part in ("train", "val", "test")
    }
    parts = {part: _pairs(*places) for part, places in folders.items() if places is not None}
    if not parts and (root / "images").is_dir() and (root / "masks").is_dir():
        pairs = _pairs(root / "images", root / "masks")
        order, number = torch.randperm(len(pairs), generator=generator(seed)).tolist(), count_of(test, len(pairs), "test")
        parts = {"train": [pairs[row] for row in sorted(order[number:])], "test": [pairs[row] for row in sorted(order[:number])]}
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    if not {"train", "test"} <= set(parts):
        raise ValueError(
            f"Expected the folders train/images, train/masks, test/images and test/masks in {root} (got: {root} {listing(root)}). Put the "
            f"files there, or set {kind}.root to where they are."
        )
    return parts


def _places(root: Path, part: str) -> list[tuple[Path, Path]]:
    return [(root / part / "images", root / part / "masks"), (root / "images" / part, root / "masks" / part)]


def _pairs(images: Path, masks: Path) -> list[Pair]:
    named: dict[str, list[Path]] = {}
    for path in image_files(images):
        named.setdefault(str(path.relative_to(images).with_suffix("")), []).append(path)
    twice = next((paths for paths in named.values() if len(paths) > 1), None)
    if twice is not None:
        raise ValueError(f"Expected images of different names, since a mask has its image's name (got {twice[0]} and {twice[1].name})")
    check_files(masks / f"{name}.png" for name in named)
    return [(str(paths[0]), str(masks / f"{name}.png")) for name, paths in named.items()]
