"""What the pictures of a run are made of: the graphs, maps and answers of a distiller on one batch of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gkd.models import read_logits
from gkd.models.modes import evaluating

if TYPE_CHECKING:
    from torch_geometric.data import Batch


@dataclass(frozen=True)
class GraphPair:
    """The graphs that one graph loss compares at one stage.

    Attributes:
        name: ``term/stage``.
        student: The student's graphs, on the CPU.
        teacher: The teacher's.
        nodes: Name of the node class: what a node stands for.
        edges: Name of the edge class.
        topology: Whose edges are used.
    """

    name: str
    student: Batch
    teacher: Batch
    nodes: str = ""
    edges: str = ""
    topology: str = ""


@dataclass(frozen=True)
class Views:
    """What two networks make of the same images, on the CPU.

    Attributes:
        images: [B, C, H, W] in [0, 1].
        pairs: Graphs of the graph losses.
        attention: Mean strength of the features at every place, [B, h, w], by ``student · stage`` and ``teacher · stage``.
        targets: [B], where the images were classified.
        answers: The student's, [B].
        classes: Names.
    """

    images: Tensor
    pairs: Sequence[GraphPair] = ()
    attention: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None
    answers: Tensor | None = None
    classes: Sequence[str] = ()


@torch.no_grad()
def collect_views(
    distiller: Any,
    batch: Sequence[Any],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] = (),
) -> Views:
    """Runs student and teacher on a batch, in eval mode, and keeps the graphs and maps that the losses would compare.

    No loss is evaluated and nothing in the distiller changes. Maps come from the stages that some loss looks at: a distillation of
    logits alone has neither graphs nor maps.

    Args:
        distiller: A :class:`~gkd.distill.Distiller`.
        batch: Images, normalised for the student, and targets, as in training.
        mean: Mean of each channel that the images were normalised with.
        std: Standard deviation, likewise.
        classes: Names of the classes.
    """
    images, targets = batch[0], batch[1] if len(batch) > 1 else None
    with evaluating(distiller):
        output, student, teacher, adapted = distiller.features(images, targets)
        pairs = []
        for name, stage, term, is_adapted in distiller.stage_terms():
            if not callable(getattr(term, "graphs", None)) or getattr(term, "needs_boxes", False):
                continue  # no graphs, or graphs of regions, which are the detection's to draw
            own = adapted[stage] if is_adapted else student[stage]
            student_graph, teacher_graph = (graph.detach().to("cpu") for graph in term.graphs(own.float(), teacher[stage].float()))
            nodes, edges = (type(module).__name__ for module in (term.builder.nodes, term.builder.edges))
            pairs.append(GraphPair(f"{name}/{stage}", student_graph, teacher_graph, nodes, edges, str(term.topology)))
    maps = [(f"{who} · {stage}", found[stage]) for stage in student for who, found in (("student", student), ("teacher", teacher))]
    attention = {name: value.float().abs().mean(dim=1).cpu() for name, value in maps if value.dim() == 4}
    labels = targets.cpu() if isinstance(targets, Tensor) and targets.dim() == 1 else None
    answers = output.argmax(dim=1).cpu() if isinstance(output, Tensor) and output.dim() == 2 else None
    shown = unnormalize(images, mean, std).cpu()
    return Views(shown, pairs, attention, labels, answers, tuple(map(str, classes)))


@torch.no_grad()
def count_confusion(model: nn.Module, batches: Iterable[Sequence[Tensor]], num_classes: int, max_batches: int | None = None) -> Tensor:
    """Counts how often each class (row) is taken for each class (column), with the model in eval mode.

    Args:
        model: From images to logits.
        batches: Images and targets.
        num_classes: Number of classes.
        max_batches: Stop after as many.

    Shapes:
        - **output** [num_classes, num_classes], whole numbers, on the CPU
    """
    matrix = torch.zeros(num_classes * num_classes, dtype=torch.long)
    with evaluating(model):
        for images, targets, *_ in islice(batches, max_batches):
            pair = targets * num_classes + read_logits(model(images)).argmax(dim=1)
            matrix += torch.bincount(pair, minlength=num_classes * num_classes).cpu()
    return matrix.view(num_classes, num_classes)


def unnormalize(images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Gives images back their colours, in [0, 1]; without statistics each is stretched from its darkest to its brightest value.

    Shapes:
        - **images** and **output** [B, C, H, W]; **mean**, **std** C numbers
    """
    images = images.detach().float()
    if mean is None or std is None:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        return (images - low) / (high - low).clamp(min=1e-12)
    scale, shift = (images.new_tensor(list(values)).view(1, -1, 1, 1) for values in (std, mean))
    return (images * scale + shift).clamp(0, 1)
