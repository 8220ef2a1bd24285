from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from gkd.graphs.builder import GraphBuilder
from gkd.graphs.nodes import ChannelNodes, InstanceNodes, RegionNodes
from gkd.graphs.precision import full_precision
from gkd.graphs.spectral import Spectrum
from gkd.graphs.stages import StageGraph
from gkd.losses.encodings import EncodingLoss
from gkd.losses.inputs import gather_images, nan_if_diverged
from gkd.losses.term import GraphTerm

__all__ = ["GraphLoss"]

TOPOLOGIES = ("teacher", "student", "each")
Features = Tensor | Mapping[str, Tensor]


class GraphLoss(nn.Module):
    r"""Builds the graphs of a student's and a teacher's features, once, and compares them by several terms.

    ================ =======================================================================================================
    ``topology``     edges
    ================ =======================================================================================================
    ``'teacher'``    the teacher's; the student's weights are evaluated on them. What the teacher relates, the student shall
    ``'student'``    the student's; the teacher's weights are evaluated on them
    ``'each'``       every network its own; the only one for graphs of unequal size
    ================ =======================================================================================================

    With a :class:`~gkd.graphs.GraphBuilder` it compares the maps of one stage, with a :class:`~gkd.graphs.StageGraph` those of several
    stages as one graph an image, edges inside a stage and across stages alike. The terms share each graph's adjacency, Laplacian and
    eigenpairs. Sums and weights are left to whoever calls: the terms come back by name.

    Args:
        builder: Makes the graphs; with a learned part, its parameters are trained through the student's graph.
        terms: Modules of (student, teacher), two :class:`~gkd.graphs.Spectrum` views, by name: :class:`~gkd.losses.VertexLoss`,
            :class:`~gkd.losses.EdgeLoss`, :class:`~gkd.losses.SpectralLoss`, :class:`~gkd.losses.MessageLoss` or others.
        topology: Whose edges are used.
        teacher_builder: Makes the teacher's graphs where they are built differently, over a finer grid for example.
        matched_channels: Whether the student's map must have the teacher's channels, and so an adapter. None: whether a term needs it,
            see :class:`~gkd.losses.GraphTerm`: matched nodes for graphs of channels, matched features for all others.
        gather: Join the images of all processes to one graph, see :func:`~gkd.losses.inputs.gather_images`; for graphs of instances.

    Shapes:
        - **student**, **teacher** [B, C, h, w] or what the nodes take; of a StageGraph {stage: [B, C, h, w]}; **output** scalars by name

    Gradient:
        To the student's features; the teacher's graph is built without gradient. Computed in float32 under autocast. Features of the
        student that are not finite give NaN, on which a training stops with a message of its own.

    Raises:
        ValueError: If the topology or a part is unknown, or a term finds graphs that do not match.

    Examples:
        >>> from gkd.losses import EdgeLoss, VertexLoss
        >>> from gkd.graphs import ChannelNodes, GraphBuilder, KNNEdges
        >>> loss = GraphLoss(GraphBuilder(ChannelNodes(), KNNEdges(k=2)), {"vertex": VertexLoss(), "edge": EdgeLoss()})
        >>> features = torch.rand(2, 8, 4, 4)
        >>> loss(features, 2 * features)
        {'vertex': tensor(0.), 'edge': tensor(0.)}
    """

    def __init__(
        self,
        builder: GraphBuilder | StageGraph,
        terms: Mapping[str, nn.Module],
        topology: Literal["teacher", "student", "each"] = "teacher",
        teacher_builder: GraphBuilder | StageGraph | None = None,
        matched_channels: bool | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__()
        if topology not in TOPOLOGIES:
            raise ValueError(f"Expected 'topology' to be one of {', '.join(TOPOLOGIES)} (got '{topology}')")
        if not terms:
            raise ValueError("Expected at least one term (got none)")
        self.builder = builder
        self.teacher_builder = teacher_builder
        self.terms = nn.ModuleDict(terms)
        self.topology = topology
        self._matched_channels = matched_channels
        self.gather = gather
        if gather and not self._has_nodes(InstanceNodes):
            raise ValueError("Expected gather=True with InstanceNodes, which relate the images of a batch (got nodes inside an image)")

    @property
    def level(self) -> Literal["stage", "stages"]:
        """Whether it compares one stage after the other, or all together."""
        return "stages" if isinstance(self.builder, StageGraph) else "stage"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the terms."""
        return tuple(self.terms)

    @property
    def matched_channels(self) -> bool:
        """Whether the student's map must have the teacher's channels."""
        if self._matched_channels is not None:
            return self._matched_channels
        terms = map(GraphTerm.of, self.terms.values())
        return any(term.matched_nodes if self._has_nodes(ChannelNodes) else term.matched_features for term in terms)

    @property
    def map_size(self) -> tuple[int, int] | None:
        """Height and width that the nodes average the student's map to; None where they look at it as it is."""
        return getattr(self.builder.nodes, "grid", None) if isinstance(self.builder, GraphBuilder) else None

    @property
    def needs_boxes(self) -> bool:
        """Whether the nodes are regions of the images."""
        return self._has_nodes(RegionNodes)

    def check_parts(self, active: Collection[str]) -> None:
        """Asks that every encoding that was given is read by a term that weighs something.

        Args:
            active: Names of the terms whose weight is not 0 for ever.

        Raises:
            ValueError: If one is not.
        """
        reads = any(GraphTerm.of(term).reads_encoding for name, term in self.terms.items() if name in active)
        given = [name for name, term in self.terms.items() if isinstance(term, EncodingLoss) and term.encoding is not None]
        idle = [name for name in given if name not in active]
        if idle:
            raise ValueError(f"Expected a weight above 0 of '{idle[0]}', whose EncodingLoss is given an encoding (got 0)")
        for builder in (self.builder, self.teacher_builder):
            if builder is not None and builder.encoding is not None and not reads:
                raise ValueError(
                    f"Expected an EncodingLoss without an encoding of its own and with a weight above 0, for a {type(builder).__name__} "
                    f"that gives the nodes an encoding (got {type(builder.encoding).__name__}, and terms {', '.join(active)})"
                )

    def forward(
        self,
        student: Features,
        teacher: Features,
        *node_args: Any,
        parts: Collection[str] | None = None,
        boxes: Sequence[Tensor] | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the terms by name.

        Args:
            student: The student's features.
            teacher: The teacher's.
            *node_args: What else the nodes are made of.
            parts: Names of the terms to compute; None for all.
            boxes: For region nodes: the boxes of every image [n_i, 4], in pixels.
            image_size: For region nodes: height and width of the images.
        """
        if boxes is not None:
            node_args = (boxes, image_size, *node_args)
        unknown = set(parts or ()).difference(self.terms)
        if unknown:
            raise ValueError(f"Expected 'parts' among {', '.join(self.terms)} (got '{min(unknown)}')")
        active = {name: term for name, term in self.terms.items() if parts is None or name in parts}
        if not active:
            return {}
        if self.gather and isinstance(student, Tensor) and isinstance(teacher, Tensor):
            student, teacher = gather_images(student, teacher)
        maps = [student] if isinstance(student, Tensor) else list(student.values())
        with full_precision(maps[0]):
            if any(features.numel() == 0 for features in maps):
                return dict.fromkeys(active, torch.stack([0 * features.float().sum() for features in maps]).sum())
            try:
                views = self.views(student, teacher, *node_args)
                return {name: term(*views) for name, term in active.items()}
            except ValueError as error:
                return dict.fromkeys(active, nan_if_diverged(error, *maps))

    def graphs(self, student: Features, teacher: Features, *node_args: Any) -> tuple[Batch, Batch]:
        """Builds the two graphs that the terms compare."""
        student_view, teacher_view = self.views(student, teacher, *node_args)
        return student_view.graph, teacher_view.graph

    def views(self, student: Features, teacher: Features, *node_args: Any) -> tuple[Spectrum, Spectrum]:
        """Builds what the terms are given: graphs whose adjacency, spectrum and so on are computed once, when a term asks for them."""
        if self.topology != "each" and self._has_nodes(ChannelNodes):
            _check_channels(student, teacher)
        student_view = _view(self.builder, student, node_args) if self.topology != "teacher" else None
        with torch.no_grad():
            teacher_view = _view(self._teacher_builder, teacher, node_args, student_view if self.topology == "student" else None)
        if student_view is None:
            student_view = _view(self.builder, student, node_args, teacher_view)
        return student_view, teacher_view

    @property
    def _teacher_builder(self) -> GraphBuilder | StageGraph:
        return self.builder if self.teacher_builder is None else self.teacher_builder

    def _has_nodes(self, kind: type[nn.Module]) -> bool:
        builders = self.builder.builders if isinstance(self.builder, StageGraph) else [self.builder]
        return any(isinstance(builder.nodes, kind) for builder in builders)

    def extra_repr(self) -> str:
        """Returns what the printed module shows."""
        return f"topology={self.topology!r}"


def _view(builder: GraphBuilder | StageGraph, features: Features, node_args: Sequence[Any], topology: Spectrum | None = None) -> Spectrum:
    if isinstance(builder, GraphBuilder):
        assert isinstance(features, Tensor)
        return builder.view(features, *node_args, topology=topology)
    return Spectrum(builder(features, *node_args, topology=None if topology is None else topology.graph, static=True))


def _check_channels(student: Features, teacher: Features) -> None:
    maps = [({"": features} if isinstance(features, Tensor) else features) for features in (student, teacher)]
    for stage, student_map in maps[0].items():
        teacher_map = maps[1][stage]
        if student_map.size(1) != teacher_map.size(1):
            raise ValueError(
                f"Expected equally many channels for graphs that share their edges (got student {student_map.size(1)}, "
                f"teacher {teacher_map.size(1)}): send the student's map through a ChannelAdapter, or take topology='each'"
            )
