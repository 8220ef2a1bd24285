"""How good a detector is: COCO's average precisions, and Pascal VOC's."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from gkd.detection.interface import Detections, Detector
from gkd.errors import UserError

Found = dict[str, Any]

HEADLINES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KEYPOINT_HEADLINES = ("AP", "AP50", "AP75", "APm", "APl")


def evaluate_detector(detector: Detector, data: Any, split: str, batches: Callable[[], Iterator[tuple]]) -> dict[str, Any]:
    """Detects in all images of a split and judges by the data's metric.

    Under several processes each sees its part, with the running statistics of the first, and all get the same record.

    Args:
        detector: What is judged; its model is back in the mode it was in afterwards.
        data: Gives ``annotations(split)`` and ``metric``, as `gkd.data.DetectionData` does.
        split: Name of the split.
        batches: Gives this process's batches of the split, with images as they are stored.

    Returns:
        ``split`` and the numbers of `coco_metrics`; where the metric is Pascal VOC's, AP50 and those of the classes are by `voc_metrics`.
        Of networks that segment instances also ``segm_AP``, .., of those that find keypoints ``keypoint_AP``, ..
    """
    is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_shared:
        for buffer in detector.model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    read: list[int] = []
    results: list[Found] = []
    for images, targets, _ in batches():
        for target, found in zip(targets, detector.detect(images), strict=True):
            read.append(target["image_id"])
            results += _results(found, target["image_id"], data.category_ids)
    if is_shared:
        gathered: list[tuple[list[int], list[Found]]] = [([], []) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, (read, results))
        read = [number for part, _ in gathered for number in part]
        results = [found for _, part in gathered for found in part]
    # Images that could not be read are no images in which nothing was found.
    annotations = data.annotations(split, read)
    record = coco_metrics(annotations, results)
    if data.metric != "coco":
        record = {name: record[name] for name in HEADLINES} | voc_metrics(annotations, results, eleven_points=data.metric == "voc07")
    if detector.has_masks:
        record |= coco_metrics(annotations, results, "segm")
    if detector.num_keypoints:
        record |= coco_metrics(annotations, results, "keypoints")
    return {"split": split, **record}


def _results(found: Detections, image_id: int, category_ids: Sequence[int]) -> list[Found]:
    """What was found in an image, in COCO's form."""
    boxes = found.boxes.float().cpu()
    boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)
    rows = zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    results = [{"image_id": image_id, "category_id": int(category_ids[label]), "bbox": box, "score": score} for box, score, label in rows]
    if found.masks is not None:
        from pycocotools import mask as coder

        planes = np.asfortranarray(found.masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0))
        for result, runs in zip(results, coder.encode(planes), strict=True):
            result["segmentation"] = runs
    if found.keypoints is not None:
        for result, points in zip(results, found.keypoints.flatten(1).tolist(), strict=True):
            result["keypoints"] = points
    return results


def coco_metrics(
    annotations: Mapping[str, Any], results: Sequence[Found], kind: Literal["bbox", "segm", "keypoints"] = "bbox"
) -> dict[str, float | None]:
    """COCO's numbers in percent: AP over IoU .5 to .95, AP50, AP75, APs, APm, APl, and AP/CLASS of every class; None where there is nothing
    to find.

    Args:
        annotations: What is there, in COCO's form.
        results: What was found: dictionaries of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``, and
            ``segmentation`` (run lengths) or ``keypoints`` (x, y, score of each).
        kind: What is compared. Numbers of masks begin with ``segm_``, those of keypoints with ``keypoint_``; the latter have no APs. The
            tolerances of keypoints are COCO's for its 17 of a person, and 0.05 each for others.

    Raises:
        UserError: If pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError(
            f"Expected pycocotools, which computes COCO's average precision (got: {error}). Install it: pip install 'gkd[detection]', or "
            "pip install pycocotools."
        ) from error

    class Evaluation(COCOeval):
        """Leaves out difficult objects as it does crowds; the base class forgets what was to be ignored."""

        def _prepare(self) -> None:
            super()._prepare()
            for objects in self._gts.values():
                for annotation in objects:
                    annotation["ignore"] = annotation["ignore"] or annotation.get("difficult", 0)

    names = {category["id"]: category["name"] for category in annotations["categories"]}
    prefix, headlines = {"bbox": ("", HEADLINES), "segm": ("segm_", HEADLINES), "keypoints": ("keypoint_", KEYPOINT_HEADLINES)}[kind]
    if not results:
        there = {one["category_id"] for one in annotations["annotations"] if not (one.get("iscrowd", 0) or one.get("difficult", 0))}
        of_classes = {f"AP/{name}": 0.0 if number in there else None for number, name in names.items()}
        return {f"{prefix}{name}": value for name, value in {**dict.fromkeys(headlines, 0.0), **of_classes}.items()}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth = COCO()
        truth.dataset = dict(annotations)
        truth.createIndex()
        # A box, where there is one, decides by which area an object is small: that of masks and keypoints is their own.
        kept = ("image_id", "category_id", "score", "segmentation" if kind == "segm" else kind)
        found = truth.loadRes([{name: result[name] for name in kept} for result in results])
        evaluation = Evaluation(truth, found, kind)
        if kind == "keypoints" and (number := len(results[0]["keypoints"]) // 3) != len(evaluation.params.kpt_oks_sigmas):
            evaluation.params.kpt_oks_sigmas = np.full(number, 0.05)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    record = {f"{prefix}{key}": _percent(value) for key, value in zip(headlines, evaluation.stats[: len(headlines)], strict=True)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all sizes, most detections
    for place, number in enumerate(evaluation.params.catIds):
        known = precision[:, :, place][precision[:, :, place] > -1]
        record[f"{prefix}AP/{names[number]}"] = _percent(known.mean() if known.size else -1)
    return record


def voc_metrics(
    annotations: Mapping[str, Any], results: Sequence[Found], min_iou: float = 0.5, eleven_points: bool = False
) -> dict[str, float | None]:
    """Pascal VOC's average precision at one IoU, in percent: AP50, their mean over the classes, and AP50/CLASS; None where there is nothing
    to find.

    The area under the precision that is attained at a recall or above, as VOC does since 2010. Difficult objects count neither as found nor
    as missed.

    Args:
        annotations: What is there, in COCO's form, with ``difficult`` where that is so.
        results: What was found, as for `coco_metrics`.
        min_iou: Overlap from which on an object is found.
        eleven_points: The mean of the precision at the recalls 0, 0.1, .., 1, as VOC did until 2009, instead of the area.
    """
    record: dict[str, float | None] = {}
    for category in annotations["categories"]:
        there = [annotation for annotation in annotations["annotations"] if annotation["category_id"] == category["id"]]
        found = [result for result in results if result["category_id"] == category["id"]]
        record[f"AP50/{category['name']}"] = _percent(_average_precision(there, found, min_iou, eleven_points))
    known = [value for value in record.values() if value is not None]
    return {"AP50": float(np.mean(known)) if known else None, **record}


def _average_precision(there: Sequence[Mapping[str, Any]], found: Sequence[Found], min_iou: float, eleven_points: bool) -> float:
    of_image: dict[int, list[Mapping[str, Any]]] = {}
    for annotation in there:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    number = sum(not annotation.get("difficult", 0) for annotation in there)
    if number == 0:
        return -1.0
    taken: set[int] = set()
    hits: list[bool] = []
    for result in sorted(found, key=lambda result: -result["score"]):
        near = of_image.get(result["image_id"], [])
        overlaps = _overlaps(result["bbox"], [annotation["bbox"] for annotation in near])
        best = int(overlaps.argmax()) if len(near) else -1
        if best < 0 or overlaps[best] < min_iou:
            hits.append(False)
        elif not near[best].get("difficult", 0):
            hits.append(near[best]["id"] not in taken)
            taken.add(near[best]["id"])
    if not hits:
        return 0.0
    right = np.cumsum(hits)
    recall, precision = right / number, right / np.arange(1, len(hits) + 1)
    attained = np.maximum.accumulate(precision[::-1])[::-1]
    if eleven_points:
        places = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-9)
        return float(np.append(attained, 0.0)[places].mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * attained))


def _overlaps(box: Sequence[float], others: Sequence[Sequence[float]]) -> np.ndarray[Any, Any]:
    """Intersection over union of boxes (x, y, width, height)."""
    array = np.asarray(others, dtype=np.float64).reshape(-1, 4)
    low = np.maximum(array[:, :2], box[:2])
    high = np.minimum(array[:, :2] + array[:, 2:], np.add(box[:2], box[2:]))
    common = (high - low).clip(0).prod(1)
    return common / (array[:, 2:].prod(1) + box[2] * box[3] - common).clip(1e-9)


def _percent(value: float) -> float | None:
    return None if value < 0 else 100.0 * float(value)
