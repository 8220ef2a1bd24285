"""Detection data in the layout of YOLO: a text file with boxes beside each image, and a yaml file over all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gkd.data.annotations import Record, normalise
from gkd.data.box_augment import BoxAugment
from gkd.data.detection import DetectionData
from gkd.data.images import image_files, image_size, read_image


class YOLO(DetectionData):
    """Your own images in the layout of YOLO: ``data.yaml``, ``images/train/NAME.jpg`` and ``labels/train/NAME.txt``.

    A line of a text file is ``class x y width height``, of the centre, in shares of the image; or ``class x1 y1 x2 y2 ..``, an outline; or,
    where the yaml file has ``kpt_shape``, a box and keypoints. An image without a text file has no objects. The yaml file has ``names``,
    and for ``train``, ``val`` and perhaps ``test`` a folder, several, or a text file that lists images. ``val`` is the split ``'test'``
    where there is no ``test``.

    Args:
        root: The yaml file, or the folder that holds ``data.yaml``.
        classes: Names of the classes to take, in the order of the labels. None: all.
        masks: Whether the targets have masks of the objects, which then need outlines.
        keypoints: Whether the targets have keypoints.
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
        ValueError: If files are absent or damaged, or a class is unknown: says which, and what to do.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str] | None = None,
        masks: bool = False,
        keypoints: bool = False,
        metric: Literal["coco", "voc", "voc07"] = "coco",
        min_size: int | Sequence[int] | None = 640,
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
        file = Path(root).expanduser()
        file = file / "data.yaml" if file.is_dir() else file
        config = _read_yaml(file)
        names = _names(config, file)
        shape = [int(number) for number in config.get("kpt_shape") or ()]
        points = [f"point {number}" for number in range(shape[0])] if shape else []
        categories = [{"id": number + 1, "name": name, "keypoints": points} for number, name in names.items()]
        parts = {}
        for part in ("train", "val", "test"):
            if config.get(part):
                images, objects = _read_part(_images(config, part, file), names, shape)
                content = {"images": images, "annotations": objects, "categories": categories}
                parts[part] = normalise(content, f"{part} of {file}", _path, classes, masks, keypoints)
        if "test" not in parts and "val" in parts:
            parts["test"] = parts.pop("val")
        if not {"train", "test"} <= set(parts):
            raise ValueError(f"Expected train, and val or test, in {file} (got {', '.join(map(str, config))})")
        if keypoints and flip and config.get("flip_idx") is None:
            raise ValueError(f"Expected flip_idx in {file}, the places of the keypoints in a mirror image, or flip = 0 (got none)")
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
        self.flip_pairs = [int(number) for number in config.get("flip_idx") or range(len(self.keypoints))]


def _path(image: Record) -> Path:
    return Path(image["file_name"])


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    if not file.is_file():
        near = sorted(path.name for path in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        raise ValueError(f"Expected YOLO's description of the data at {file} (got no such file; there are {', '.join(near) or 'none'})")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"Expected a yaml file at {file} (got: {error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"Expected names, train and val in {file} (got {type(config).__name__})")
    return config


def _names(config: Mapping[str, Any], file: Path) -> dict[int, str]:
    names = config.get("names")
    items = names.items() if isinstance(names, dict) else enumerate(names) if isinstance(names, list) else ()
    numbered = {int(number): str(name) for number, name in items}
    if not numbered or sorted(numbered) != list(range(len(numbered))) or config.get("nc") not in (None, len(numbered)):
        raise ValueError(
            f"Expected names of the classes from 0 on, as many as nc says, in {file} (got {names!r} and nc={config.get('nc')})"
        )
    return dict(sorted(numbered.items()))


def _images(config: Mapping[str, Any], part: str, file: Path) -> list[Path]:
    """The images of a part: of a folder, of several, or of a list in a text file."""
    given = config[part]
    found: list[Path] = []
    for entry in [given] if isinstance(given, str) else given:
        place = _place(str(entry), str(config.get("path") or ""), file)
        if place.is_dir():
            found += image_files(place)
        elif place.suffix == ".txt" and place.is_file():
            lines = (line.strip() for line in place.read_text(encoding="utf-8-sig").splitlines())
            found += [place.parent / line for line in lines if line]
        else:
            raise ValueError(f"Expected a folder of images, or a text file that lists some, for {part} of {file} (got {place})")
    return found


def _place(entry: str, base: str, file: Path) -> Path:
    """Where a path of the yaml file leads: from its ``path`` or its folder; ``../train`` is often meant to be beside the yaml file."""
    folders = [file.parent / base, Path(base).expanduser(), file.parent]
    candidates = [folder / name for folder in folders for name in (entry, entry.removeprefix("../"))]
    return next((place for place in candidates if place.exists()), candidates[0])


def _read_part(paths: Sequence[Path], names: Mapping[int, str], shape: Sequence[int]) -> tuple[list[Record], list[Record]]:
    images: list[Record] = []
    objects: list[Record] = []
    for path in paths:
        try:
            height, width = image_size(path)
        except OSError:  # Named where files are checked, or when it is read.
            height, width = 1, 1
        images.append({"id": len(images) + 1, "file_name": str(path), "height": height, "width": width})
        labels = label_file(path)
        if labels.is_file():
            objects += [{**one, "image_id": len(images)} for one in _read_labels(labels, names, shape, height, width)]
    if not any(label_file(path).is_file() for path in paths):
        example = label_file(paths[0]) if paths else "none"
        raise ValueError(f"Expected images with text files of their objects (got {len(paths)} images, and no file such as {example})")
    return images, objects


def label_file(path: Path) -> Path:
    """The text file of an image: in ``labels`` where the image is in ``images``, or beside it."""
    folders = list(path.parts)
    for place in range(len(folders) - 2, -1, -1):
        if folders[place] == "images":
            return Path(*folders[:place], "labels", *folders[place + 1 :]).with_suffix(".txt")
    return path.with_suffix(".txt")


def _read_labels(file: Path, names: Mapping[int, str], shape: Sequence[int], height: int, width: int) -> Iterator[Record]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected lines of numbers at {file} (got: {error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = [float(text) for text in line.split()]
        except ValueError:
            values = []
        label, place = (int(values[0]), values[1:]) if values and values[0].is_integer() else (-1, [])
        expected = 4 + shape[0] * shape[1] if shape else 4
        if label not in names or not (len(place) == expected or (not shape and len(place) >= 6 and len(place) % 2 == 0)):
            what = f"a class below {len(names)} and {expected} numbers" + ("" if shape else ", or an outline,")
            raise ValueError(f"Expected {what} in line {number} of {file} (got {line.strip()[:60]!r})")
        yield {"id": number, "category_id": label + 1, **_object(place, shape, height, width)}


def _object(place: Sequence[float], shape: Sequence[int], height: int, width: int) -> Record:
    if len(place) > 4 and not shape:
        return {"bbox": None, "segmentation": [[value * (width, height)[side % 2] for side, value in enumerate(place)]]}
    x, y, w, h = (value * (width, height)[side % 2] for side, value in enumerate(place[:4]))
    points = [place[begin : begin + shape[1]] for begin in range(4, len(place), shape[1])] if shape else []
    marked = [number for point in points for number in (point[0] * width, point[1] * height, point[2] if len(point) > 2 else 2)]
    return {"bbox": [x - w / 2, y - h / 2, w, h], "keypoints": marked}
