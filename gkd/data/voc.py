"""Pascal VOC: boxes in xml files, one an image."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from gkd.data.detection import DetectionData, Part, Sample, clip_boxes
from gkd.data.images import check_files, read_image

_log = logging.getLogger(__name__)

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOC(DetectionData):
    """Pascal VOC 2007 and 2012: ``root/VOC2007/{Annotations,ImageSets/Main,JPEGImages}``.

    Objects marked difficult are trained on unless `difficult` says otherwise, and never count in the evaluation, neither found nor missed.

    Args:
        root: The folder that holds ``VOC2007``, or the one that holds ``VOCdevkit``.
        train: Parts to train on, as year/set.
        test: Parts to evaluate on.
        classes: Names of the classes.
        difficult: Whether difficult objects are trained on.
        min_size: Length to which the shorter side is resized; of several, training takes one at random and evaluation the last.
        max_size: Longest that the longer side may become.
        flip: Probability of a mirror image in training.
        skip_empty: Whether images without boxes are left out of the training.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on. None: all.
        num_workers: Processes that decode; 0 decodes in this one. None: the cores there are for this process, at most 8.
        skip_unreadable: Leave out images that cannot be read. False: stop.

    Raises:
        ValueError: If files are absent or damaged, or an object is of an unknown class: says which, and what to do.

    References:
        Everingham, Van Gool, Williams, Winn, Zisserman: The Pascal Visual Object Classes (VOC) Challenge, IJCV 2010.
    """

    def __init__(
        self,
        root: str | Path,
        train: Sequence[str] = ("VOC2007/trainval", "VOC2012/trainval"),
        test: Sequence[str] = ("VOC2007/test",),
        classes: Sequence[str] = VOC_CLASSES,
        difficult: bool = True,
        min_size: int | Sequence[int] | None = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        max_size: int = 1333,
        flip: float = 0.5,
        skip_empty: bool = True,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        root = devkit(root, type(self).__name__)
        parts = {part: _read_part(root, sets, tuple(classes), difficult) for part, sets in (("train", train), ("test", test))}
        super().__init__(
            parts,
            classes,
            range(1, len(classes) + 1),
            read_image,
            metric="voc",
            min_size=min_size,
            max_size=max_size,
            flip=flip,
            skip_empty=skip_empty,
            holdout=holdout,
            subset=subset,
            num_workers=num_workers,
            skip_unreadable=skip_unreadable,
        )


def devkit(root: str | Path, kind: str) -> Path:
    """Finds the folder that holds those of the years.

    Raises:
        ValueError: If there is none.
    """
    root = Path(root).expanduser()
    if (root / "VOCdevkit").is_dir():
        root = root / "VOCdevkit"
    if not root.is_dir():
        raise ValueError(
            f"Expected the folder of Pascal VOC at {root} (got none, seen from {Path.cwd()}). Download the archives of 2007 and 2012 "
            f"from http://host.robots.ox.ac.uk/pascal/VOC/, unpack them there, or correct {kind}.root."
        )
    return root


def image_sets(root: Path, sets: str | Sequence[str], folder: str, kind: str) -> list[tuple[Path, str]]:
    """Lists the images of sets such as ``'VOC2007/trainval'``: the folder of the year, and the name without its suffix.

    Args:
        root: See :func:`devkit`.
        sets: One set, or several.
        folder: ``'Main'`` or ``'Segmentation'``.
        kind: The class that asks.

    Raises:
        ValueError: If a set is absent.
    """
    names = []
    for wanted in [sets] if isinstance(sets, str) else sets:
        year, _, split = wanted.partition("/")
        path = root / year / "ImageSets" / folder / f"{split}.txt"
        if not path.is_file():
            there = sorted(f"{file.parents[2].name}/{file.stem}" for file in root.glob(f"*/ImageSets/{folder}/*.txt"))
            raise ValueError(
                f"Expected the image set {wanted} at {path} (got no such file; there are {', '.join(there[:6]) or 'none'}). Bind "
                f"{kind}.train and {kind}.test to sets that are there."
            )
        names += [(root / year, _set_name(line)) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return names


def _set_name(line: str) -> str:
    """The name in a line of a set, which may hold spaces; the sets of a single class have 1, 0 or -1 behind it."""
    name, _, mark = line.strip().rpartition(" ")
    return name.strip() if name and mark in ("1", "0", "-1") else line.strip()


class _Object(NamedTuple):
    name: str
    corners: list[float]
    is_difficult: bool


def _read_part(root: Path, sets: Sequence[str], classes: Sequence[str], difficult: bool) -> Part:
    label_of = {name: label for label, name in enumerate(classes)}
    samples: list[Sample] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for folder, name in image_sets(root, sets, "Main", "VOC"):
        path = folder / "Annotations" / f"{name}.xml"
        size, objects = _read_xml(path)
        unknown = next((found.name for found in objects if found.name not in label_of), None)
        if unknown is not None:
            raise ValueError(
                f"Expected objects of the classes {', '.join(classes)} in {path} (got {unknown!r}). Bind VOC.classes for other data."
            )
        image_id = len(images) + 1
        corners = torch.tensor([found.corners for found in objects], dtype=torch.float32).view(-1, 4)
        clipped, has_area = clip_boxes(corners, size)
        counts["cut off at the edge of the image"] += int(((clipped - corners).abs() > 1).any(1).sum())
        counts["left out, without area inside the image"] += int((~has_area).sum())
        labels = torch.tensor([label_of[found.name] for found in objects], dtype=torch.long)
        is_kept = has_area & (torch.tensor([not found.is_difficult for found in objects], dtype=torch.bool) | difficult)
        source = folder / "JPEGImages" / f"{name}.jpg"
        samples.append(Sample(image_id, str(source), size, clipped[is_kept], labels[is_kept]))
        images.append({"id": image_id, "height": size[0], "width": size[1], "file_name": str(source.relative_to(root))})
        for found, (left, top, right, bottom) in zip(objects, clipped.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label_of[found.name] + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "difficult": int(found.is_difficult),
                }
            )
    check_files([root / image["file_name"] for image in images])
    for what, count in counts.items():
        if count:
            _log.warning("%s: %d boxes %s", ", ".join(sets), count, what)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(classes)]
    return Part(samples, {"images": images, "annotations": annotations, "categories": categories})


def _read_xml(path: Path) -> tuple[tuple[int, int], list[_Object]]:
    try:
        tree = ElementTree.parse(path)
        size = (int(_text(tree, "size/height")), int(_text(tree, "size/width")))
        objects = []
        for found in tree.iter("object"):
            # Pixels are counted from 1, and the last one belongs to the box.
            left, top, right, bottom = (float(_text(found, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            objects.append(
                _Object(_text(found, "name"), [left - 1, top - 1, right, bottom], found.findtext("difficult", "0").strip() == "1")
            )
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise ValueError(f"Expected an annotation of Pascal VOC at {path} (got: {error})") from error
    return size, objects


def _text(element: Any, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no element {path}")
    return text.strip()
