from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from gkd.graphs.builder import GraphBuilder
from gkd.graphs.nodes import ChannelNodes, RegionNodes
from gkd.graphs.precision import full_precision
from gkd.graphs.spectral import Spectrum
from gkd.losses.term import GraphTerm

__all__ = ["GraphLoss"]

TOPOLOGIES = ("teacher", "student", "each")


class GraphLoss(nn.Module):
    r"""Builds the graphs of a student's and a teacher's map, once, and compares them by several terms.

    ================ =======================================================================================================
    ``topology``     edges
    ================ =======================================================================================================
    ``'teacher'``    the teacher's; the student's weights are evaluated on them. What the teacher relates, the student shall
    ``'student'``    the student's; the teacher's weights are evaluated on them
    ``'each'``       every network its own; the only one for graphs of unequal size
    ================ =======================================================================================================

    The terms share each graph's adjacency, Laplacian and eigenpairs. Sums and weights are left to whoever calls: the terms come back by
    name.

    Args:
        builder: Makes the graphs; with a learned part, its parameters are trained through the student's graph.
        terms: Modules of (student, teacher), two :class:`~gkd.graphs.Spectrum` views, by name: :class:`~gkd.losses.VertexLoss`,
            :class:`~gkd.losses.EdgeLoss`, :class:`~gkd.losses.SpectralLoss`, :class:`~gkd.losses.MessageLoss` or others.
        topology: Whose edges are used.
        teacher_builder: Makes the teacher's graphs where they are built differently, over a finer grid for example.
        matched_channels: Whether the student's map must have the teacher's channels, and so an adapter. None: whether a term needs it,
            see :class:`~gkd.losses.GraphTerm`: matched nodes for graphs of channels, matched features for all others.

    Shapes:
        - **student_map**, **teacher_map** [B, C, h, w] or what the nodes take; **output** scalars by name

    Gradient:
        To the student's map; the teacher's graph is built without gradient. Computed in float32 under autocast.

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

    level = "stage"

    def __init__(
        self,
        builder: GraphBuilder,
        terms: Mapping[str, nn.Module],
        topology: Literal["teacher", "student", "each"] = "teacher",
        teacher_builder: GraphBuilder | None = None,
        matched_channels: bool | None = None,
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
        return any(term.matched_nodes if isinstance(self.builder.nodes, ChannelNodes) else term.matched_features for term in terms)

    @property
    def map_size(self) -> tuple[int, int] | None:
        """Height and width that the nodes average the student's map to; None where they look at it as it is."""
        return getattr(self.builder.nodes, "grid", None)

    @property
    def needs_boxes(self) -> bool:
        """Whether the nodes are regions of the images."""
        return isinstance(self.builder.nodes, RegionNodes)

    def forward(
        self,
        student_map: Tensor,
        teacher_map: Tensor,
        *node_args: Any,
        parts: Collection[str] | None = None,
        boxes: Sequence[Tensor] | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the terms by name.

        Args:
            student_map: The student's features.
            teacher_map: The teacher's.
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
        wanted = {name: term for name, term in self.terms.items() if parts is None or name in parts}
        if not wanted:
            return {}
        with full_precision(student_map):
            teacher_map = teacher_map.detach()  # the nodes lift both to float32, after which a large map can go
            if student_map.numel() == 0 or teacher_map.numel() == 0:
                return dict.fromkeys(wanted, 0 * student_map.sum())
            student_graph, teacher_graph = self.graphs(student_map, teacher_map, *node_args)
            student, teacher = Spectrum(student_graph, edges=self.builder.edges), Spectrum(teacher_graph, edges=self._teacher_builder.edges)
            return {name: term(student, teacher) for name, term in wanted.items()}

    def graphs(self, student_map: Tensor, teacher_map: Tensor, *node_args: Any) -> tuple[Batch, Batch]:
        """Builds the two graphs that the terms compare."""
        channels = student_map.size(1), teacher_map.size(1)
        if self.topology != "each" and isinstance(self.builder.nodes, ChannelNodes) and channels[0] != channels[1]:
            raise ValueError(
                f"Expected equally many channels for graphs that share their edges (got student {channels[0]}, teacher {channels[1]}): "
                "send the student's map through a ChannelAdapter, or take topology='each'"
            )
        student = self.builder(student_map, *node_args, static=True) if self.topology != "teacher" else None
        with torch.no_grad():
            topology = student if self.topology == "student" else None
            teacher = self._teacher_builder(teacher_map, *node_args, topology=topology, static=True)
        if student is None:
            student = self.builder(student_map, *node_args, topology=teacher)
        return student, teacher

    @property
    def _teacher_builder(self) -> GraphBuilder:
        return self.builder if self.teacher_builder is None else self.teacher_builder

    def extra_repr(self) -> str:
        """Returns what the printed module shows."""
        return f"topology={self.topology!r}"
