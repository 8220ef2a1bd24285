"""Detectron2's own evaluators on what a detector of gkd finds."""

from __future__ import annotations

import json
import math
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gkd.data.detection import DetectionData
from gkd.detection.d2.data import Detectron2Data
from gkd.detection.interface import Detector
from gkd.errors import UserError


def evaluate_with_detectron2(detector: Detector, data: DetectionData, split: str, batches: Callable[[], Iterator[tuple]]) -> dict[str, Any]:
    """Record of one evaluation by `COCOEvaluator` or `PascalVOCDetectionEvaluator`; several processes put their images together.

    Args:
        detector: What is evaluated.
        data: Gives the true boxes. Pascal VOC's evaluator reads its xml files, so those data must come from Detectron2's catalog.
        split: Name of the split.
        batches: Gives this process's batches of the split.

    Returns:
        ``split`` and, in percent, AP, AP50 and AP75, for COCO also APs, APm, APl and ``AP/CLASS``; None where there are no true boxes.

    Raises:
        UserError: If the data are Pascal VOC's and not of Detectron2's catalog, or the split is a part of them.
    """
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    if data.metric != "coco":
        if not isinstance(data, Detectron2Data) or split != "test":
            raise UserError(
                "Expected Detectron2Data, and its whole test part, for Detectron2's evaluator of Pascal VOC "
                f"(got the split {split!r} of {type(data).__name__}). Choose Detectron2Backend.evaluator = 'gkd'."
            )
        found = _judge(PascalVOCDetectionEvaluator(data.names["test"]), _detect(detector, batches), data.record_ids)
        return {"split": split, **{key: _number(value) for key, value in found.items()}}
    detected = _detect(detector, batches)
    read = _from_all([number for number, _ in detected])
    name = f"gkd:{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "annotations.json"
        file.write_text(json.dumps(data.annotations(split, read)))
        numbers = {number: label for label, number in enumerate(data.category_ids)}
        MetadataCatalog.get(name).set(json_file=str(file), thing_classes=list(data.classes), thing_dataset_id_to_contiguous_id=numbers)
        try:
            found = _judge(COCOEvaluator(name, tasks=("bbox",), use_fast_impl=False), detected, {})
        finally:
            MetadataCatalog.remove(name)
    if "AP-" not in "".join(found):  # without any detection, Detectron2 answers NaN where the average precision is 0
        found = {**dict.fromkeys(found, 0.0), **{f"AP-{name}": 0.0 for name in data.classes}}
    return {"split": split, **{key.replace("AP-", "AP/"): _number(value) for key, value in found.items()}}


def _detect(detector: Detector, batches: Callable[[], Iterator[tuple]]) -> list[tuple[int, Any]]:
    """Ids of this process's images, with what is found in them."""
    from detectron2.structures import Boxes, Instances

    detected = []
    for images, targets, _ in batches():
        for target, found in zip(targets, detector.detect(images), strict=True):
            instances = Instances(target["size"], pred_boxes=Boxes(found.boxes.float().cpu()))
            instances.scores, instances.pred_classes = found.scores.float().cpu(), found.labels.cpu()
            if found.masks is not None:
                instances.pred_masks = found.masks.cpu()
            if found.keypoints is not None:
                instances.pred_keypoints = found.keypoints.cpu()
            detected.append((target["image_id"], instances))
    return detected


def _judge(evaluator: Any, detected: list[tuple[int, Any]], names: dict[int, Any]) -> dict[str, float]:
    evaluator.reset()
    for number, instances in detected:
        evaluator.process([{"image_id": names.get(number, number)}], [{"instances": instances}])
    results = [evaluator.evaluate()]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(results, src=0)  # the evaluators answer on the first process only
    return dict((results[0] or {}).get("bbox", {}))


def _from_all(numbers: list[int]) -> list[int]:
    """The numbers of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return numbers
    gathered: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, numbers)
    return [number for part in gathered for number in part]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) and value >= 0 else None
