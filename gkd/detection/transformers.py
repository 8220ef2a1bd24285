"""Detectors of Hugging Face's transformers that predict a set of boxes: DETR, RT-DETR and their like."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from gkd.detection.backend import Backend
from gkd.detection.classes import class_positions, match_classes, refuse_classes
from gkd.detection.description import described_weights
from gkd.detection.frame import resampled
from gkd.detection.interface import Detections, Detector, DetectorNetwork, Images, Maps, Output, Targets
from gkd.errors import UserError
from gkd.models.modes import evaluating
from gkd.models.names import near
from gkd.models.weights import load_weights

_log = logging.getLogger(__name__)

# The library's preparation of images for each kind of network.
PROCESSORS = {
    "detr": "DetrImageProcessor",
    "conditional_detr": "ConditionalDetrImageProcessor",
    "deformable_detr": "DeformableDetrImageProcessor",
    "rt_detr": "RTDetrImageProcessor",
    "rt_detr_v2": "RTDetrImageProcessor",
    "d_fine": "RTDetrImageProcessor",
}
HYBRID = ("rt_detr", "rt_detr_v2", "d_fine")  # their encoder gives a pyramid
SIZE = 640


class _Reached(Exception):
    """The maps are there; what follows is not needed."""


class TransformersDetector(Detector):
    """A set-predicting detector of transformers; see `Detector`.

    The library's own image processor resizes every image to one square and normalises it. There are neither proposals nor scores at all
    places: terms that need them say so; maps and graphs of them are there for every term.

    Args:
        model: A ``...ForObjectDetection``.
        labels: The model's class of every class of the data; None if it has others.
        side: Height and width of the square.
    """

    two_stage = False

    def __init__(self, model: Any, labels: Sequence[int] | None, side: int = SIZE) -> None:
        import transformers

        self.model: Any = model
        self.labels, self.side = None if labels is None else tuple(labels), side
        names = self.model.config.id2label
        self.classes = tuple(names[index] for index in sorted(names))
        self.processor = getattr(transformers, PROCESSORS[self.model.config.model_type])(size={"height": side, "width": side})
        self._source = self.model.model.encoder if self.model.config.model_type in HYBRID else self.model.model.backbone
        with evaluating(self.model), torch.no_grad():
            maps = self._native([torch.zeros(3, side, side, dtype=torch.uint8)])
        self.levels = tuple(maps)

    def image_size(self, images: Images) -> tuple[int, int]:
        """Height and width of a batch into which all images fit: none of them is padded before it is resized."""
        return max(image.shape[1] for image in images), max(image.shape[2] for image in images)

    def forward(self, images: Images, targets: Targets) -> Output:
        """Losses and maps of one pass."""
        table = self._label_table()
        labels = []
        for image, target in zip(images, targets, strict=True):
            size = target["boxes"].new_tensor([image.shape[2], image.shape[1]]).repeat(2)
            boxes = box_convert(target["boxes"] / size, "xyxy", "cxcywh")
            labels.append({"class_labels": table[target["labels"].cpu()].to(boxes.device), "boxes": boxes})
        seen: dict[str, Any] = {}
        handle = self._source.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
        try:
            loss = self.model(**self._inputs(images), labels=labels).loss
        finally:
            handle.remove()
        return Output({"loss_set_prediction": loss}, self._framed(_maps(seen["output"], self.side), images), self.image_size(images))

    def features(self, images: Images) -> Maps:
        """Maps alone: the network is left as soon as they are there."""
        return self._framed(self._native(images), images)

    @torch.no_grad()
    def detect(self, images: Images) -> list[Detections]:
        """The library's own inference."""
        table = self._label_table()
        label_of = torch.full((len(self.classes or ()) + 1,), -1)
        label_of[table] = torch.arange(len(table))
        with evaluating(self.model):
            outputs = self.model(**self._inputs(images))
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        detections = []
        for result in self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes):
            labels = label_of.to(result["labels"].device)[result["labels"]]
            order = result["scores"].argsort(descending=True, stable=True)
            order = order[labels[order] >= 0]
            detections.append(Detections(result["boxes"][order], result["scores"][order], labels[order]))
        return detections

    def describe(self) -> dict[str, Any]:
        """The configuration, and how images are prepared."""
        normalises = self.processor.do_normalize
        return {
            "architecture": self.model.config.model_type,
            "backbone": None,
            "config": self.model.config.to_dict(),
            "labels": None if self.labels is None else list(self.labels),
            "names": list(self.classes or ()),
            "size": [self.side, self.side],
            "mean": list(self.processor.image_mean) if normalises else [0.0] * 3,
            "std": list(self.processor.image_std) if normalises else [1.0] * 3,
            "channels": "RGB",
            "thresholds": {},
        }

    def save(self, path: Path) -> None:
        """A folder that ``from_pretrained`` reads."""
        self.model.save_pretrained(path)
        self.processor.save_pretrained(path)

    def _inputs(self, images: Images) -> dict[str, Tensor]:
        return dict(self.processor(images=list(images), return_tensors="pt").to(images[0].device))

    def _native(self, images: Images) -> dict[str, Tensor]:
        seen: dict[str, Any] = {}

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            seen["output"] = output
            raise _Reached

        handle = self._source.register_forward_hook(leave)
        try:
            self.model(**self._inputs(images))
        except _Reached:
            pass
        finally:
            handle.remove()
        return _maps(seen["output"], self.side)

    def _framed(self, maps: Mapping[str, Tensor], images: Images) -> Maps:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        return Maps(resampled(maps, (self.side, self.side), sizes, self.image_size(images)), maps)

    def _label_table(self) -> Tensor:
        if self.labels is None:
            raise refuse_classes((), None, "its losses and detections")
        return torch.tensor(self.labels)


class TransformersBackend(Backend):
    """transformers' set-predicting detectors; see `Backend`.

    ``DetectorNetwork.architecture`` is the library's name of the kind, ``'rt_detr'`` or ``'detr'`` say, ``options`` are entries of its
    configuration, and ``image_size``, the side of the square that images are resized to (640). ``weights`` are a folder that
    ``save_pretrained`` wrote, a name of the Hugging Face hub, or what gkd wrote. Code of repositories is not run.
    """

    name = "transformers"
    antialias = True
    checkpoint_name = "student"

    def build_student(self, network: DetectorNetwork, data: Any) -> TransformersDetector:
        """The network with its weights, or random ones."""
        return self._build(network, data, is_teacher=False)

    def build_teacher(self, network: DetectorNetwork, data: Any) -> TransformersDetector:
        """The network with its weights, frozen."""
        if network.setting("weights", self.name) is None:
            raise UserError("Expected weights of the teacher for transformers (got none). Set teacher/DetectorNetwork.weights to a folder.")
        detector = self._build(network, data, is_teacher=True)
        detector.model.requires_grad_(False).eval()
        return detector

    def rebuild(self, description: Mapping[str, Any], weights: Path) -> TransformersDetector:
        """The network of a description."""
        model = _from_config(description["architecture"], description["config"])
        load_weights(model, weights)
        return TransformersDetector(model.eval(), description["labels"], description["size"][0])

    def _build(self, network: DetectorNetwork, data: Any, is_teacher: bool) -> TransformersDetector:
        weights, options = network.setting("weights", self.name), network.setting("options", self.name)
        described = described_weights(weights)
        side = options.pop("image_size", described["size"][0] if described else SIZE)
        names = dict(enumerate(data.classes))
        labels: Sequence[int] | None = range(data.num_classes)
        if described:
            model = _from_config(described["architecture"], {**described["config"], **options})
            load_weights(model, weights)
        elif weights is not None:
            model = _from_pretrained(str(weights), options)
        else:
            architecture = network.architecture or "rt_detr"
            model = _from_config(architecture, {**options, "id2label": names, "label2id": {name: index for index, name in names.items()}})
        if weights is not None:
            theirs = [model.config.id2label[index] for index in sorted(model.config.id2label)]
            labels = match_classes(data.classes, theirs, str(weights)) if is_teacher else class_positions(data.classes, theirs)
            if labels is None and not is_teacher:
                if described:
                    raise UserError(f"Expected weights of the data's classes (got {weights}, of others). Name the folder beside it.")
                labels, model = range(data.num_classes), _from_pretrained(str(weights), {**options, "num_labels": data.num_classes})
                model.config.id2label = names
                _log.warning("%s has other classes: all its weights are taken but those of the class layers, which start anew", weights)
        return TransformersDetector(model, labels, side)


BACKEND = TransformersBackend


def _from_config(kind: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForObjectDetection

    if kind not in PROCESSORS:
        raise UserError(f"Expected the architecture {near(kind, PROCESSORS)} of transformers (got {kind!r}).")
    entries = {name: value for name, value in options.items() if name != "model_type"}
    try:
        return AutoModelForObjectDetection.from_config(AutoConfig.for_model(kind, **entries))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"Expected options that make a {kind} of transformers (got {type(error).__name__}: {error})") from error


def _from_pretrained(source: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForObjectDetection

    try:
        config = AutoConfig.from_pretrained(source, **options)
        model = AutoModelForObjectDetection.from_pretrained(source, config=config, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Expected a folder that save_pretrained wrote, or a name of the Hugging Face hub (got {source}: "
            f"{next(iter(str(error).splitlines()), type(error).__name__)})"
        ) from error
    if model.config.model_type not in PROCESSORS:
        raise UserError(f"Expected a detector of the kinds {', '.join(PROCESSORS)} (got {model.config.model_type} in {source})")
    return model


def _maps(output: Any, side: int) -> dict[str, Tensor]:
    """Maps by the level that their stride gives."""
    listed = getattr(output, "last_hidden_state", output)
    maps = [map_[0] if isinstance(map_, tuple) else map_ for map_ in listed]
    return {f"p{round(torch.log2(torch.tensor(side / map_.shape[-1])).item())}": map_ for map_ in maps}
