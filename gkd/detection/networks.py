"""How the distiller calls and reads two detectors: by levels, with regions and with proposals that both share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gkd.detection.interface import Detector, Images, Output
from gkd.detection.regions import Regions, grid_candidates, mine_background, padded_boxes, region_labels, shared_proposals
from gkd.distill import NetworkPair
from gkd.errors import UserError
from gkd.graphs.values import constant
from gkd.models.modes import evaluating
from gkd.models.names import near
from gkd.models.watch import watched

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

    def heads(self, student: nn.Module, teacher: nn.Module, input_size: Sequence[int]) -> tuple[Any, Any]:
        """Detectors have no last layer that gives the logits of an image.

        Raises:
            UserError: Always.
        """
        raise UserError("Expected classifiers for a term that asks for the networks' outputs (got detectors)")

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

    def logits(self, output: Output, teacher_output: Mapping[str, Tensor], targets: Any, compares: str = "classes") -> tuple[Any, Any, Any]:
        """What terms of the level ``'logits'`` compare.

        ============= =============================================================================================================
        ``classes``   class logits of both on the student's best proposals [B * P, K + 1], and the class of each proposal; of one-stage
                      detectors those at all places [B * n, K], and the targets as they are
        ``masks``     masks of both [m, h, w] in those of the proposals that hold an object, and their classes
        ``locations`` boxes of both at all places [B * n, 4 m], and the highest score [B * n] that the teacher has there
        ``crossed``   class logits that the teacher's head gives on the student's maps, and on its own
        ============= =============================================================================================================
        """
        assert self.teacher is not None
        if compares == "masks":
            return self._masks(output, teacher_output, targets)
        if compares == "locations":
            return self._locations(output, teacher_output)
        if compares == "crossed":
            return self._crossed(output, teacher_output, targets)
        if output.proposals is None:
            return self._dense_logits(output, teacher_output, targets)
        boxes, labels = self._shared(output, targets)
        student = self.student.class_logits(output.features, list(boxes.unbind()), output.image_size)
        with torch.no_grad():
            goal = self.teacher.class_logits(teacher_output, list(boxes.unbind()), output.image_size)
        return student, goal, labels.flatten()

    def _shared(self, output: Output, targets: Any) -> tuple[Tensor, Tensor]:
        """Boxes [B, P, 4] that both networks look at, the student's proposals or else the regions, and their classes [B, P]."""
        if output.proposals is None:
            shared = torch.stack(self.regions((), targets, output)[0])
            whole = constant((0.0, 0.0, output.image_size[1], output.image_size[0]), shared)
            shared = torch.where(shared[..., 2:3] < 0, whole, shared)
        else:
            shared = shared_proposals(output.proposals, self.choice.proposals, output.image_size)
        true = padded_boxes([target["boxes"] for target in targets])
        return shared, region_labels(shared, true, [target["labels"] for target in targets], self.num_classes)

    def _masks(self, output: Output, teacher_output: Mapping[str, Tensor], targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        assert self.teacher is not None
        boxes, labels = self._shared(output, targets)
        is_object = labels < self.num_classes
        chosen = [box[rows] for box, rows in zip(boxes, is_object, strict=True)]
        classes = labels[is_object]
        student = self.student.mask_logits(output.features, chosen, classes, output.image_size)
        with torch.no_grad():
            goal = self.teacher.mask_logits(teacher_output, chosen, classes, output.image_size)
        return student, goal, classes

    def _dense_logits(self, output: Output, teacher_output: Mapping[str, Tensor], targets: Any) -> tuple[Tensor, Tensor, Any]:
        assert self.teacher is not None
        with torch.no_grad():
            goal = self.teacher.dense_logits(teacher_output)
        student = _same_places(output.dense_logits, goal, "class scores")
        return student.flatten(0, 1), goal.flatten(0, 1), targets

    def _locations(self, output: Output, teacher_output: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        assert self.teacher is not None
        with torch.no_grad():
            goal, scores = self.teacher.dense_locations(teacher_output), self.teacher.dense_logits(teacher_output)
        student = _same_places(output.dense_locations, goal, "boxes")
        return student.flatten(0, 1), goal.flatten(0, 1), scores.amax(2).sigmoid().flatten()

    def _crossed(self, output: Output, teacher_output: Mapping[str, Tensor], targets: Any) -> tuple[Tensor, Tensor, Any]:
        assert self.teacher is not None
        levels = [level for level in teacher_output if level in output.features]
        student, teacher = ({level: maps[level] for level in levels} for maps in (output.features, teacher_output))
        for level in levels:
            if student[level].shape != teacher[level].shape:
                raise UserError(
                    f"Expected maps that the teacher's head can read, {list(teacher[level].shape)} at {level}, for a term that crosses the "
                    f"heads (got {list(student[level].shape)} of the student). Give the student's pyramid the teacher's channels."
                )
        if not self.teacher.two_stage:
            with torch.no_grad():
                goal = self.teacher.dense_logits(teacher)
            return self.teacher.dense_logits(student).flatten(0, 1), goal.flatten(0, 1), targets
        boxes, labels = self._shared(output, targets)
        with torch.no_grad():
            goal = self.teacher.class_logits(teacher, list(boxes.unbind()), output.image_size)
        return self.teacher.class_logits(student, list(boxes.unbind()), output.image_size), goal, labels.flatten()

    def anchors(self, output: Output, logits: tuple[Any, Any, Any]) -> list[Tensor]:
        """The student's maps, from which both the task and the logits follow."""
        return list(output.features.values())


def _same_places(student: Tensor | None, teacher: Tensor, what: str) -> Tensor:
    if student is None or student.shape != teacher.shape:
        raise UserError(
            f"Expected student and teacher with {what} at the same places (got student {None if student is None else list(student.shape)}, "
            f"teacher {list(teacher.shape)}: images, places, values). Compare maps or graphs instead, or cross the heads: CrossKDLoss."
        )
    return student
