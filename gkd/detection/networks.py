"""How the distiller calls and reads two detectors: by levels, with regions and with proposals that both share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gkd.detection.interface import Detector, Images, Output
from gkd.detection.regions import Regions, grid_candidates, mine_background, padded_boxes, region_labels, shared_proposals
from gkd.detection.watch import watched
from gkd.distill import NetworkPair
from gkd.errors import UserError
from gkd.models.modes import evaluating
from gkd.models.names import near

CANDIDATES = 200  # proposals among which background is looked for


class TaskLosses(nn.Module):
    """The losses of the library, which came with the student's maps."""

    def forward(self, output: Output, targets: Any) -> dict[str, Tensor]:
        """Returns them by name."""
        return output.losses


class LevelTaps:
    """Calls a detector and gives its maps by level, as `gkd.models.FeatureTaps` gives those of modules.

    Args:
        detector: The detector.
        places: Names of the levels that are wanted, or paths of modules of the network, such as ``'backbone.body.layer3'``.
        model: What is called: ``detector.forward`` of a student, ``detector.features`` of a teacher.

    Raises:
        ValueError: If the detector has no such level or module.
    """

    def __init__(self, detector: Detector, places: Iterable[str], model: Callable[..., Any]) -> None:
        self.detector, self.places, self.model = detector, tuple(places), model
        modules = dict(detector.model.named_modules())
        self.modules = {place: modules[place] for place in self.places if place in modules and place not in detector.levels}
        for place in self.places:
            if place not in detector.levels and place not in modules:
                raise ValueError(
                    f"Expected the stages in Distiller.taps to be levels of {type(detector.model).__name__}, {', '.join(detector.levels)}, "
                    f"or paths of its modules, such as {near(place, [name for name in modules if name])} (got {place!r})"
                )

    def __call__(self, *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Output and maps."""
        seen: dict[str, Any] = {}
        with watched(self.modules, seen):
            output = self.model(*inputs)
        return output, self._read(output.features if isinstance(output, Output) else output, seen)

    def shapes(self, input_size: Sequence[int]) -> dict[str, torch.Size]:
        """Shapes of the maps of two images of this size, in eval mode."""
        device = next(self.detector.model.parameters()).device
        images = [torch.zeros(tuple(input_size), dtype=torch.uint8, device=device)] * 2
        seen: dict[str, Any] = {}
        with evaluating(self.detector.model), torch.no_grad(), watched(self.modules, seen):
            features = self.detector.features(images)
        return {place: map_.shape for place, map_ in self._read(features, seen).items()}

    def _read(self, features: Mapping[str, Tensor], seen: Mapping[str, Any]) -> dict[str, Tensor]:
        for place in self.modules:
            if not isinstance(seen.get(place), Tensor):
                kind = type(seen[place]).__name__ if place in seen else "one that does not run for the feature maps"
                raise ValueError(f"Expected a module of the backbone that returns a map as the stage '{place}' (got {kind})")
        return {place: seen[place] if place in self.modules else features[place] for place in self.places}


class DetectorPair(NetworkPair):
    """Two detectors as the distiller's networks; see `gkd.distill.NetworkPair`.

    The teacher computes its maps and nothing else, unless a term compares class logits: then its box head sees the student's proposals, or
    its classification head all places where there are no proposals.

    Args:
        student: The detector to train.
        teacher: The detector to learn from; None for a plain training.
        regions: Which regions take part.
        num_classes: Classes of the data.
    """

    def __init__(self, student: Detector, teacher: Detector | None, regions: Regions, num_classes: int) -> None:
        self.student, self.teacher = student, teacher
        self.choice, self.num_classes = regions, num_classes

    def student_taps(self, student: nn.Module, paths: Iterable[str]) -> LevelTaps:
        """The student in training: losses and maps of one pass."""
        return LevelTaps(self.student, paths, self.student.forward)

    def teacher_taps(self, teacher: nn.Module, paths: Iterable[str]) -> LevelTaps:
        """The teacher: maps alone."""
        assert self.teacher is not None
        return LevelTaps(self.teacher, paths, self.teacher.features)

    def student_inputs(self, images: Any, targets: Any) -> tuple[Any, ...]:
        """Images and what is in them."""
        return images, targets

    def regions(self, images: Images, targets: Any, output: Output, true_boxes_only: bool = False) -> tuple[list[Tensor], tuple[int, int]]:
        """True boxes and, unless a term is about true boxes only, background: that which the student responds to."""
        true = [target["boxes"] for target in targets]
        if self.choice.background == 0 or true_boxes_only:
            return true, output.image_size
        if output.regions is None:
            boxes = padded_boxes(true)
            if output.proposals is not None:
                candidates = padded_boxes([found[:CANDIDATES] for found in output.proposals])
            else:
                candidates = grid_candidates(next(iter(output.features.values())), output.image_size)
            mined = mine_background(candidates, boxes, self.choice.background, self.choice.max_iou)
            output.regions = list(torch.cat((boxes, mined), dim=1).unbind())
        return output.regions, output.image_size

    def logits(self, output: Output, teacher_output: Mapping[str, Tensor], targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits of both on the student's best proposals [B * P, K + 1], and the class of each proposal; of one-stage detectors those
        at all places [B * n, K], and the targets as they are."""
        assert self.teacher is not None
        if output.proposals is None:
            return self._dense_logits(output, teacher_output, targets)
        shared = shared_proposals(output.proposals, self.choice.proposals, output.image_size)
        boxes = list(shared.unbind())
        own = self.student.class_logits(output.features, boxes, output.image_size)
        with torch.no_grad():
            goal = self.teacher.class_logits(teacher_output, boxes, output.image_size)
        true = padded_boxes([target["boxes"] for target in targets])
        labels = region_labels(shared, true, [target["labels"] for target in targets], self.num_classes)
        return own, goal, labels.flatten()

    def _dense_logits(self, output: Output, teacher_output: Mapping[str, Tensor], targets: Any) -> tuple[Tensor, Tensor, Any]:
        assert self.teacher is not None
        own = output.dense_logits
        with torch.no_grad():
            goal = self.teacher.dense_logits(teacher_output)
        if own is None or own.shape != goal.shape:
            raise UserError(
                "Expected student and teacher with class scores at the same places for a term of class logits (got student "
                f"{None if own is None else list(own.shape)}, teacher {list(goal.shape)}: images, places, classes)"
            )
        return own.flatten(0, 1), goal.flatten(0, 1), targets

    def anchors(self, output: Output, logits: tuple[Any, Any, Any]) -> list[Tensor]:
        """The student's maps, from which both the task and the logits follow."""
        return list(output.features.values())
