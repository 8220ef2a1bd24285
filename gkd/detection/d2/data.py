"""Data sets of Detectron2's catalog for gkd, and gkd's data for Detectron2's catalog."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gkd.data.annotations import normalise
from gkd.data.detection import DetectionData
from gkd.data.images import read_image
from gkd.detection.d2.config import is_lazy, require_detectron2
from gkd.errors import UserError


class Detectron2Data(DetectionData):
    """Any detection data set that Detectron2 knows, read by its own readers; order, flips and sizes are gkd's, and so resume exactly.

    Known are the built-in names, such as ``'coco_2017_train'`` and ``'voc_2007_val'``, of folders in ``$DETECTRON2_DATASETS``, and whatever
    the package ``register`` adds to the catalog. Two paths register COCO data that have no name: ``('instances.json', 'images/')``.

    Args:
        train: Name, or json file and image folder, of the training images.
        test: The same of the images to evaluate on.
        register: Module to import first, which adds data sets of your own.
        masks: Whether the targets have masks of the objects.
        keypoints: Whether the targets have keypoints.
        options: As in `DetectionData`: min_size, max_size, flip, skip_empty, holdout, subset, num_workers and so on.

    Attributes:
        names (dict): Names in the catalog, by part.

    Raises:
        UserError: If a name is unknown, files are missing, the annotations are not what Detectron2 expects, or the two parts have other
            classes.
    """

    def __init__(
        self,
        train: str | Sequence[str] = "coco_2017_train",
        test: str | Sequence[str] = "coco_2017_val",
        register: str | None = None,
        masks: bool = False,
        keypoints: bool = False,
        **options: Any,
    ) -> None:
        require_detectron2()
        from detectron2.data import MetadataCatalog

        if register is not None:
            importlib.import_module(register)
        self.names = {part: _name(source) for part, source in (("train", train), ("test", test))}
        records = {part: _records(name) for part, name in self.names.items()}
        about = {part: MetadataCatalog.get(name) for part, name in self.names.items()}
        classes = {part: tuple(found.thing_classes) for part, found in about.items()}
        if classes["train"] != classes["test"]:
            raise UserError(f"Expected the classes of {self.names['train']} in {self.names['test']} (got {classes['test']})")
        numbers = about["train"].get("thing_dataset_id_to_contiguous_id", {i + 1: i for i in range(len(classes["train"]))})
        category_ids = [number for number, _ in sorted(numbers.items(), key=lambda item: item[1])]
        categories = [{"id": number, "name": name} for number, name in zip(category_ids, classes["train"], strict=True)]
        self.record_ids: dict[int, Any] = {}
        parts = {}
        for part, listed in records.items():
            file = about[part].get("json_file")
            # The file has more than the records, such as the areas that the evaluation sorts objects by.
            content = _of_records(listed, categories, part) if file is None else json.loads(Path(file).read_bytes())
            paths = {image["id"]: image["file_name"] for image in content["images"]}
            if file is not None:
                paths = {record["image_id"]: record["file_name"] for record in listed}
            images = [{**image, "file_name": paths[image["id"]]} for image in content["images"] if image["id"] in paths]
            objects = [annotation for annotation in content["annotations"] if annotation["image_id"] in paths]
            content = {**content, "images": images, "annotations": objects}
            parts[part] = normalise(content, self.names[part], _path, classes[part], masks, keypoints)
            given = [record["image_id"] for record in listed] if file is None else [image["id"] for image in images]
            self.record_ids |= {image["id"]: number for image, number in zip(parts[part].images, given, strict=True)}
        metric: Literal["coco", "voc"] = "voc" if about["test"].get("evaluator_type") == "pascal_voc" else "coco"
        super().__init__(parts, read_image, **{"metric": metric, **options})


def _path(image: Mapping[str, Any]) -> Path:
    return Path(image["file_name"])


def _of_records(records: Sequence[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]], part: str) -> dict[str, Any]:
    """What Detectron2's records say, in COCO's form."""
    from detectron2.structures import BoxMode

    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for row, record in enumerate(records):
        # Voc's images are named by strings; where two parts share numbers, they are still different images.
        number = record["image_id"] if isinstance(record["image_id"], int) else row + 1 + 10_000_000 * (part == "test")
        images.append({"id": number, "height": record["height"], "width": record["width"], "file_name": record["file_name"]})
        for one in record["annotations"]:
            box = BoxMode.convert(list(one["bbox"]), one["bbox_mode"], BoxMode.XYWH_ABS)
            kept = {name: one[name] for name in ("iscrowd", "area", "segmentation", "keypoints") if name in one}
            category = categories[one["category_id"]]["id"]
            objects.append({"id": len(objects) + 1, "image_id": number, "category_id": category, "bbox": box, **kept})
    return {"images": images, "annotations": objects, "categories": categories}


def class_names(config: Any) -> tuple[str, ...] | None:
    """Names of the classes of the data that the configuration was trained on, where Detectron2's catalog has them."""
    from detectron2.data import MetadataCatalog

    if is_lazy(config):
        from omegaconf import OmegaConf

        names = OmegaConf.select(config, "dataloader.train.dataset.names") or ()
    else:
        names = config.DATASETS.TRAIN
    name = names if isinstance(names, str) else next(iter(names), None)
    if name is None or name not in MetadataCatalog.list():
        return None
    found = MetadataCatalog.get(name).get("thing_classes")
    return None if found is None else tuple(found)


def register_coco(json_file: str | Path, image_root: str | Path) -> str:
    """Makes COCO annotations known to Detectron2 under a name made of their paths; a second call gives the same name.

    Args:
        json_file: The annotations.
        image_root: Folder of the images.

    Returns:
        The name, for `DatasetCatalog` and `MetadataCatalog`.
    """
    require_detectron2()
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    paths = [Path(path).resolve() for path in (json_file, image_root)]
    name = f"gkd:coco:{paths[0]}:{paths[1]}"
    if name not in DatasetCatalog:
        register_coco_instances(name, {}, str(paths[0]), str(paths[1]))
    return name


def register_split(data: DetectionData, split: str, name: str) -> None:
    """Makes a split of gkd's data known to Detectron2, for its own mappers, loaders and evaluators, or for `Visualizer`.

    Args:
        data: Data whose images are files.
        split: ``'train'``, ``'val'`` or ``'test'``.
        name: Name in Detectron2's catalog; one that is there already is replaced.
    """
    require_detectron2()
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import BoxMode

    def records() -> list[dict[str, Any]]:
        return [
            {
                "file_name": str(sample.source),
                "image_id": sample.image_id,
                "height": sample.size[0],
                "width": sample.size[1],
                "annotations": [
                    {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": 0}
                    for box, label in zip(sample.boxes.tolist(), sample.labels.tolist(), strict=True)
                ],
            }
            for sample in data.samples(split)
        ]

    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, records)
    numbers = {number: label for label, number in enumerate(data.category_ids)}
    MetadataCatalog.get(name).set(thing_classes=list(data.classes), thing_dataset_id_to_contiguous_id=numbers)


def _name(source: str | Sequence[str]) -> str:
    if isinstance(source, str):
        return source
    if len(source) != 2:
        raise UserError(f"Expected a name, or a json file and an image folder (got {list(source)})")
    json_file, image_root = (Path(path) for path in source)
    if not json_file.is_file() or not image_root.is_dir():
        missing = json_file if not json_file.is_file() else image_root
        raise UserError(f"Expected COCO annotations and a folder of images (got {missing}, which does not exist). Correct Detectron2Data.")
    return register_coco(json_file, image_root)


def _records(name: str) -> list[dict[str, Any]]:
    from detectron2.data import DatasetCatalog

    if name not in DatasetCatalog:
        known = [entry for entry in DatasetCatalog.list() if entry.startswith(("coco_2017", "voc_"))]
        raise UserError(
            f"Expected the name of a data set that Detectron2 knows, such as {', '.join(known[:4])} (got {name!r}). "
            "Register it in a module of yours and set Detectron2Data.register to its name, or give a json file and an image folder."
        )
    try:
        return DatasetCatalog.get(name)
    except FileNotFoundError as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise UserError(
            f"Expected the files of {name} (got none at {error.filename}). Set the environment variable DETECTRON2_DATASETS to the folder "
            f"that holds coco/ or VOC2007/ (it is {root!r} now), or give a json file and an image folder."
        ) from error
    except (KeyError, AssertionError, ValueError) as error:
        raise UserError(f"Expected annotations that Detectron2 reads in {name} (got {type(error).__name__}: {error})") from error
