"""Builds torchvision's detectors with their weights, whatever classes these have."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models.detection import faster_rcnn

from gkd.detection.backend import Backend
from gkd.detection.classes import class_positions, match_classes
from gkd.detection.description import described_weights, inference_size, resolved
from gkd.detection.interface import Detector, DetectorNetwork
from gkd.detection.torchvision.detector import TorchvisionDetector
from gkd.detection.torchvision.export import export_onnx, export_script
from gkd.detection.torchvision.networks import CLASSES, Plan, build_builtin, build_network
from gkd.detection.torchvision.pyramids import downloaded
from gkd.errors import UserError
from gkd.models.weights import load_weights, read_weights

_log = logging.getLogger(__name__)

PUBLISHED = {
    ("faster_rcnn", "resnet50"): "fasterrcnn_resnet50_fpn",
    ("faster_rcnn", "mobilenet_v3_large"): "fasterrcnn_mobilenet_v3_large_fpn",
    ("mask_rcnn", "resnet50"): "maskrcnn_resnet50_fpn",
    ("keypoint_rcnn", "resnet50"): "keypointrcnn_resnet50_fpn",
    ("retinanet", "resnet50"): "retinanet_resnet50_fpn",
    ("fcos", "resnet50"): "fcos_resnet50_fpn",
}
SHAPING = ("fpn_channels", "box_channels", "mask_channels", "keypoint_channels", "anchor_sizes")
# Where the class layers lie.
HEADS = ("roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor", "head.classification_head")
BACKGROUND = "__background__"
# torchvision's COCO weights have a place for each number up to 90, used or not.
COCO_NAMES = tuple(faster_rcnn._COCO_CATEGORIES)


class TorchvisionBackend(Backend):
    """torchvision's detectors; see `Backend`.

    ``DetectorNetwork.architecture`` is one of those that have a backbone of one's choice, any detector of torchvision by its own name
    (``'fasterrcnn_resnet50_fpn_v2'``, ``'ssd300_vgg16'``), or a function of one's own ``'package.module:factory'`` that takes
    ``num_classes``, a background included where the network has one. ``DetectorNetwork.options`` are arguments of torchvision's class
    (``box_score_thresh``, ``image_mean``, ..) and

    ==================== ==============================================================================================
    ``norm``             ``'batch'`` or ``'frozen'`` batch norm; frozen by default where there are weights to start from
    ``trainable_layers`` Stages of the backbone to train, from the deepest: by default 3 with weights, all without
    ``fpn_channels``     Channels of the pyramid, 256; as the following, for a backbone of one's choice only
    ``box_channels``     Channels of a two-stage detector's box head, 1024
    ``mask_channels``    Channels of the mask head, 256
    ``keypoint_channels``  Channels of the keypoint head, 512
    ``anchor_sizes``     Smallest side of the anchors of each level
    ==================== ==============================================================================================

    Weights of other classes start a student in all but the class layers, which the log says; where all classes of the data are among
    theirs, by their names, the class layers are kept too.
    """

    name = "torchvision"

    def build_student(self, network: DetectorNetwork, data: Any) -> TorchvisionDetector:
        """The network with its weights, or ImageNet's in the backbone, or random ones."""
        return self._build(network, data, is_teacher=False)

    def build_teacher(self, network: DetectorNetwork, data: Any) -> TorchvisionDetector:
        """The network with its weights, frozen."""
        if network.setting("weights", self.name) is None:
            raise UserError(
                f"Expected weights of the teacher {network.architecture} on {network.backbone} for torchvision (got none). Set "
                "teacher/DetectorNetwork.weights to a file; a training with this network as its student makes one, student.pth in its "
                "run folder."
            )
        detector = self._build(network, data, is_teacher=True)
        detector.model.requires_grad_(False).eval()
        return detector

    def rebuild(self, description: Mapping[str, Any], weights: Path) -> TorchvisionDetector:
        """The network of a description."""
        plan = Plan(
            description["architecture"],
            description["backbone"],
            description["places"],
            description["num_keypoints"],
            options={**description["options"], "image_mean": description["mean"], "image_std": description["std"]}
            if ":" not in description["architecture"]
            else description["options"],
        )
        model = build_network(plan)
        _load(model, read_weights(weights))
        size = None if description["size"] is None else (description["size"][0], description["size"][1])
        return TorchvisionDetector(model.eval(), description["labels"], plan, size, description["names"])

    def export(self, detector: Detector, kind: str, folder: Path) -> Path:
        """ONNX, or for torch TorchScript, which takes detectors as they are."""
        writers = {"onnx": (export_onnx, "student.onnx"), "torch": (export_script, "student.pt")}
        if kind not in writers:
            raise UserError(f"Expected the export 'onnx' or 'torch' (got {kind!r})")
        write, name = writers[kind]
        write(detector.model, detector.describe()["size"] or (256, 256), folder / name)
        return folder / name

    def _build(self, network: DetectorNetwork, data: Any, is_teacher: bool) -> TorchvisionDetector:
        weights, imagenet = (network.setting(name, self.name) for name in ("weights", "backbone_weights"))
        described = described_weights(weights)
        architecture, backbone = resolved(network, described, self.name)
        options = network.setting("options", self.name)
        is_published = weights is not None and not Path(weights).is_file() and Path(weights).suffix == ""
        if described:
            options = {**described["options"], "image_mean": described["mean"], "image_std": described["std"], **options}
        elif weights is not None and not is_published and architecture in CLASSES:
            options = {"norm": "frozen", "trainable_layers": 3, **options}
        plan = Plan(architecture, backbone, 0, len(getattr(data, "keypoints", ())) or 17, None if weights else imagenet, options)
        plan = replace(plan, places=data.num_classes + plan.has_background)
        names = [*[BACKGROUND] * plan.has_background, *data.classes]
        labels: Sequence[int] | None = range(int(plan.has_background), plan.places)
        if is_published:
            model, plan, places = _published(plan, str(weights), data, is_teacher)
            labels, names = (labels, names) if places is None else (places or None, list(COCO_NAMES))
        elif weights is not None:
            model, plan, named, labels = _from_file(plan, str(weights), described, network.num_classes, data, is_teacher)
            names = names if named is None else list(named)
        else:
            model = build_network(plan)
        size = inference_size(data)
        return TorchvisionDetector(model, labels, plan, size, names if labels is not None else None)


def _from_file(
    plan: Plan, weights: str, described: Mapping[str, Any], num_classes: int | None, data: Any, is_teacher: bool
) -> tuple[Any, Plan, Sequence[str] | None, Sequence[int] | None]:
    """The network with a file's weights, its plan, the names of its places where they are not the data's, and the data's places."""
    state = read_weights(weights)
    model = build_network(plan)
    places = plan.places if num_classes is None else num_classes + plan.has_background
    places = described.get("places") or _places_of(model, plan.places, state) or places
    names = described.get("names") or (COCO_NAMES if places == len(COCO_NAMES) and places != plan.places else None)
    labels: Sequence[int] | None = range(int(plan.has_background), plan.places) if places == plan.places else None
    if names is not None:
        labels = match_classes(data.classes, names, weights) if is_teacher else class_positions(data.classes, names)
    elif labels is None and is_teacher:
        _log.warning(
            "%s: weights of %d classes for data of %d; only its feature maps can be used",
            weights,
            places - plan.has_background,
            data.num_classes,
        )
    if places != plan.places and (is_teacher or labels is not None):
        plan = replace(plan, places=places)
        model = build_network(plan)
    if labels is None and not is_teacher:
        _load_all_but_classes(model, state, weights)
        return model, plan, None, range(int(plan.has_background), plan.places)
    _load(model, state)
    return model, plan, names, labels


def _published(plan: Plan, weights: str, data: Any, is_teacher: bool) -> tuple[Any, Plan, list[int] | None]:
    """The published network, its plan, and the places of the data's classes in it: none for a teacher of other classes; None for new
    class layers."""
    key = (plan.architecture, plan.backbone or "resnet50")
    name = PUBLISHED.get(key, plan.architecture)
    if name in CLASSES:
        listed = ", ".join(f"{architecture} on {backbone}" for architecture, backbone in PUBLISHED)
        raise FileNotFoundError(
            f"Expected a file of weights for {key[0]} on {key[1]} (got {weights!r}; torchvision publishes weights of {listed} only, and of "
            "the networks by its own names). Train the network without distillation to make one: student.pth in its run folder."
        )
    if ":" in name:
        raise FileNotFoundError(f"Expected a file of weights for {name} (got {weights!r}, and no such file)")
    if shaping := [option for option in plan.options if option in SHAPING or (option == "norm" and plan.options[option] != "frozen")]:
        raise UserError(
            f"Expected no option that changes the published network {name} (got {shaping[0]} = {plan.options[shaping[0]]!r} with "
            f"weights = {weights!r}). Leave it out, or train a network of that shape."
        )
    members = models.get_model_weights(name).__members__
    if weights not in members:
        raise FileNotFoundError(f"Expected weights of {name}: a file that exists, or one of {', '.join(members)} (got {weights!r})")
    options = {option: value for option, value in plan.options.items() if option != "norm"}
    keypoints = 17 if name.startswith("keypointrcnn") else plan.num_keypoints
    chosen = members[weights]
    categories = list(chosen.meta["categories"])
    built = replace(plan, architecture=name, backbone=None, places=len(categories), num_keypoints=keypoints, options=options)
    model = downloaded(chosen, lambda: build_builtin(built, chosen))
    match = match_classes if is_teacher else lambda classes, names, whose: class_positions(classes, names)
    places = match(data.classes, categories, f"{name} {weights}")
    if is_teacher or places is not None:
        return model, built, places or []
    built = replace(built, places=plan.places, num_keypoints=plan.num_keypoints)
    fresh = build_network(built)
    for path in HEADS:
        if _has(model, path):
            head = fresh.get_submodule(path)
            _load_all_but_classes(head, model.get_submodule(path).state_dict(), f"{name} {weights}", f"{path}.")
            model.set_submodule(path, head)
    return model, built, None


def _load_all_but_classes(model: nn.Module, state: Mapping[str, Any], source: str, prefix: str = "") -> None:
    """Loads what fits; class layers of another number of classes stay as they were drawn, and are named."""
    current = model.state_dict()
    new = {
        name: current[name]
        for name in current
        if name in state and state[name].shape != current[name].shape and f"{prefix}{name}".startswith(HEADS)
    }
    _load(model, {**state, **new})
    if new:
        _log.warning(
            "%s has other classes: all its weights are taken but those of %s, which start anew",
            source,
            ", ".join(prefix + name for name in new),
        )


def _load(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads strictly; frozen norms have no counters of batches."""
    current = model.state_dict()
    load_weights(model, {name: value for name, value in state.items() if name in current or not name.endswith("num_batches_tracked")})


def _places_of(model: nn.Module, places: int, state: Mapping[str, Any]) -> int | None:
    """Number of places of the class layer in a state_dict of such a network with `places`."""
    for name, tensor in model.state_dict().items():
        is_of_classes = name.startswith(("roi_heads.box_predictor.cls", "head.classification_head")) and name.endswith("bias")
        if is_of_classes and name in state and tensor.shape[0] % places == 0 and tensor.shape != state[name].shape:
            return state[name].shape[0] // (tensor.shape[0] // places)
    return None


def _has(model: nn.Module, path: str) -> bool:
    part: Any = model
    for name in path.split("."):
        part = getattr(part, name, None)
    return isinstance(part, nn.Module)
