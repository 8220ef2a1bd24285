"""Pascal VOC: boxes in xml files, one an image."""

from __future__ import annotations

from collections.abc import Container, Sequence
from glob import escape
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from gkd.data.annotations import Annotations, Record, normalise
from gkd.data.box_augment import BoxAugment
from gkd.data.detection import DetectionData
from gkd.data.images import SUFFIXES, read_image

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOC(DetectionData):
    """Pascal VOC 2007 and 2012, or own data in its way: ``root/VOC2007/{Annotations,ImageSets/Main,JPEGImages}``.

    Objects marked difficult are trained on unless `difficult` says otherwise, and never count in the evaluation, neither found nor missed.
    An image is the file of the set's name with any suffix, or else the one that ``<filename>`` names.

    Args:
        root: The folder that holds ``VOC2007``, or the one that holds ``VOCdevkit``.
        train: Sets to train on, as year/set.
        test: Sets to evaluate on.
        val: Sets to choose on. None: none, unless ``holdout`` is given.
        classes: Names of the classes, in the order of the labels.
        ignore: Names of objects to leave out. Those of VOC's twenty classes that are not among `classes` are left out anyway; any other
            name is an error.
        difficult: Whether difficult objects are trained on.
        metric: See `DetectionData`, and so the others.
        min_size: Length to which the shorter side is resized; of several, training takes one at random and evaluation the last.
        max_size: Longest that the longer side may become.
        flip: Probability of a mirror image in training.
        augment: What else is drawn at random in training.
        skip_empty: Whether images without boxes are left out of the training.
        holdout: Training images for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training images, those to train on. None: all.
        split_seed: Seed of both choices.
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
        train: str | Sequence[str] = ("VOC2007/trainval", "VOC2012/trainval"),
        test: str | Sequence[str] = ("VOC2007/test",),
        val: str | Sequence[str] | None = None,
        classes: Sequence[str] = VOC_CLASSES,
        ignore: Sequence[str] = (),
        difficult: bool = True,
        metric: Literal["coco", "voc", "voc07"] = "voc",
        min_size: int | Sequence[int] | None = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        max_size: int = 1333,
        flip: float = 0.5,
        augment: BoxAugment | None = None,
        skip_empty: bool = True,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        split_seed: int = 0,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        base = devkit(root, type(self).__name__)
        classes = (classes,) if isinstance(classes, str) else tuple(classes)
        left_out = (set(VOC_CLASSES) | set(ignore)) - set(classes)
        given = {"train": train, "val": val, "test": test}
        parts = {part: _read_part(base, sets, classes, left_out, difficult) for part, sets in given.items() if sets is not None}
        super().__init__(
            parts,
            read_image,
            metric=metric,
            min_size=min_size,
            max_size=max_size,
            flip=flip,
            augment=augment,
            skip_empty=skip_empty,
            holdout=holdout,
            subset=subset,
            split_seed=split_seed,
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
        names += [(root / year, name) for name in _set_names(path)]
    return names


def _set_names(path: Path) -> list[str]:
    """The names in a set, which may hold spaces; in the sets of a single class, 1, 0 or -1 stands behind each."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected an image set, text in UTF-8, at {path} (got: {error})") from error
    split = [line.rsplit(maxsplit=1) for line in lines]
    names = {parts[0] for parts in split}
    is_marked = all(len(parts) == 2 and parts[1] in ("1", "0", "-1") for parts in split) and len(names) == len(lines)
    return [parts[0] for parts in split] if is_marked else lines


def find_image(folder: Path, name: str, filename: str | None = None) -> Path:
    """The image of a name without suffix: the usual one, the one that is there, or the one that its annotation names."""
    candidates = [folder / f"{name}.jpg", *(folder / f"{name}{suffix}" for suffix in SUFFIXES), *([folder / filename] if filename else [])]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    others = (path for path in folder.glob(f"{escape(name)}.*") if path.stem == name and path.suffix.lower() in SUFFIXES)
    return min(others, default=candidates[0])


def _read_part(root: Path, sets: str | Sequence[str], classes: Sequence[str], left_out: Container[str], difficult: bool) -> Annotations:
    number_of = {name: number + 1 for number, name in enumerate(classes)}
    images: list[Record] = []
    objects: list[Record] = []
    paths: dict[str, Path] = {}
    for folder, name in image_sets(root, sets, "Main", "VOC"):
        path = folder / "Annotations" / f"{name}.xml"
        image, there = _read_xml(path)
        file = find_image(folder / "JPEGImages", name, image.pop("filename"))
        image |= {"id": len(images) + 1, "file_name": str(file.relative_to(root))}
        paths[image["file_name"]] = file
        images.append(image)
        for record in there:
            if record["name"] in number_of:
                objects.append({**record, "id": len(objects) + 1, "image_id": image["id"], "category_id": number_of[record["name"]]})
            elif record["name"] not in left_out:
                raise ValueError(
                    f"Expected objects of the classes {', '.join(classes)} in {path} (got {record['name']!r}). Bind VOC.classes for other "
                    "data, or VOC.ignore to leave these out."
                )
    categories = [{"id": number, "name": name} for name, number in number_of.items()]
    content = {"images": images, "annotations": objects, "categories": categories}
    where = sets if isinstance(sets, str) else ", ".join(sets)
    return normalise(content, where, lambda image: paths[image["file_name"]], difficult=difficult)


def _read_xml(path: Path) -> tuple[Record, list[Record]]:
    try:
        tree = ElementTree.parse(path)
        image: Record = {side: int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width")}
        image["filename"] = (tree.findtext("filename") or "").strip()
        objects = []
        for element in tree.iter("object"):
            # Pixels are counted from 1, and the last one belongs to the box.
            left, top, right, bottom = (float(_text(element, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
            is_difficult = int((element.findtext("difficult") or "0").strip() == "1")
            objects.append({"name": _text(element, "name"), "bbox": box, "difficult": is_difficult})
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise ValueError(f"Expected an annotation of Pascal VOC at {path} (got: {error})") from error
    return image, objects


def _text(element: Any, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no element {path}")
    return text.strip()
