from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from gkd.graphs.dense import to_padded
from gkd.graphs.encodings import HeatKernelEncoding
from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.spectral import Spectrum
from gkd.losses.matching import check_matched
from gkd.losses.vertices import vertex_loss

__all__ = ["EncodingLoss", "encoding_loss"]

DISTANCES = ("standardized", "cosine", "mse")
ALIGNMENTS = ("sign", "rotation")


def encoding_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    distance: Literal["standardized", "cosine", "mse"] = "standardized",
    alignment: Literal["sign", "rotation"] = "sign",
) -> Tensor:
    r"""Compares where matched nodes are in the spectrum of their graphs: their positional encodings, node by node.

    .. math:: \frac{1}{B} \sum_b \frac{1}{n_b} \sum_i \delta(p^s_i Q_b, p^t_i), \qquad
              Q_b = \arg\min_{Q \in \mathcal{Q}} \sum_i \| p^s_i Q - p^t_i \|^2

    An eigenvector has no sign, so the plain distance of two encodings by eigenvectors is no function of the graphs. The student's encoding
    is brought to the teacher's first:

    ============= ============================================ ======================================================================
    ``alignment`` :math:`\mathcal{Q}`                          for
    ============= ============================================ ======================================================================
    ``sign``      a sign for every column                      any encoding. Heat kernels, random walks and absolute values are not
                                                               negative and stay as they are; eigenvectors lose the sign
    ``rotation``  orthogonal matrices (Procrustes)             eigenvectors that may come in another order, or in another basis of a
                                                               repeated eigenvalue. Not for columns that mean something, such as times
    ============= ============================================ ======================================================================

    ================= ============================================================================================================
    ``distance``      :math:`\delta`
    ================= ============================================================================================================
    ``standardized``  of every column, brought to mean 0 and variance 1 over the nodes of its graph, half the mean square; that is
                      1 - correlation. All columns count alike, however little they vary. Not with ``'rotation'``, which mixes them
    ``cosine``        :math:`1 - \cos` of the rows
    ``mse``           mean square
    ================= ============================================================================================================

    The first two are between 0 and 2. All are unchanged by a permutation of the nodes of both graphs and by signs of the columns of either
    encoding; with ``'rotation'`` by any orthogonal change of the columns of either.

    Args:
        student: Encodings of the student's nodes.
        teacher: Encodings of the teacher's nodes; get no gradient.
        mask: Which nodes exist; None for all. What else the encodings hold there has no influence.
        distance: 'standardized', 'cosine' or 'mse'.
        alignment: 'sign' or 'rotation'.

    Shapes:
        - **student**, **teacher** [B, n, t], **mask** [B, n]; **output** scalar

    Gradient:
        Finite everywhere. :math:`Q_b` is held fixed, for 'mse' without any loss: at the minimum it has no slope.

    Raises:
        ValueError: If the shapes differ, or an option or their combination is unknown.

    Examples:
        >>> eigvec = torch.tensor([[[0.7, 0.5], [0.0, -0.7], [-0.7, 0.5]]])
        >>> encoding_loss(eigvec, -eigvec), encoding_loss(eigvec, eigvec.roll(1, dims=1)).round(decimals=3)
        (tensor(0.), tensor(0.5000))
    """
    _check_options(distance, alignment)
    if student.shape != teacher.shape or student.dim() != 3:
        raise ValueError(
            f"Expected equal encodings [B, n, t] in student and teacher (got student {list(student.shape)}, teacher {list(teacher.shape)})"
        )
    with full_precision(student):
        student, teacher = as_float(student), as_float(teacher.detach())
        if mask is None:
            mask = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
        student, teacher = (x.where(mask.unsqueeze(-1), 0.0) for x in (student, teacher))
        student = _turn(student, teacher, alignment)
        if distance == "standardized":  # every column is a graph of its own
            columns = student.size(2)
            student, teacher = (x.mT.flatten(0, 1).unsqueeze(-1) for x in (student, teacher))
            mask = mask.repeat_interleave(columns, dim=0)
        return vertex_loss(student, teacher, mask, distance)


def _turn(student: Tensor, teacher: Tensor, alignment: str) -> Tensor:
    if alignment == "sign":
        product = (student.detach() * teacher).sum(dim=1, keepdim=True)
        return torch.where(product < 0, -student, student)
    with torch.no_grad():
        left, _, right = torch.linalg.svd(student.mT @ teacher, full_matrices=False)
    return student @ (left @ right)


def _check_options(distance: str, alignment: str) -> None:
    for name, value, allowed in (("distance", distance, DISTANCES), ("alignment", alignment, ALIGNMENTS)):
        if value not in allowed:
            raise ValueError(f"Expected '{name}' to be one of {', '.join(allowed)} (got '{value}')")
    if alignment == "rotation" and distance == "standardized":
        raise ValueError("Expected distance 'cosine' or 'mse' with alignment='rotation', which mixes the columns (got 'standardized')")


class EncodingLoss(nn.Module):
    """Compares the positional encodings of matched nodes, see :func:`encoding_loss`.

    An encoding is made of edge weights alone, so the widths of the two networks may differ. ``'signature'`` of :class:`SpectralLoss`
    compares the same heat as :class:`~gkd.graphs.HeatKernelEncoding`, by its plain square.

    Args:
        encoding: Makes the encodings of both graphs, when the loss is computed; None takes ``pe``, which the graphs have of their
            builder (``GraphBuilder(..., encoding=RandomWalkEncoding())``), and the heat kernel signature where they have none.
        distance: 'standardized', 'cosine' or 'mse'.
        alignment: 'sign', or 'rotation' for eigenvectors whose order or basis is not to count.

    Shapes:
        - **student**, **teacher**: graphs of equally many nodes with encodings of equal width; **output** scalar

    Raises:
        ValueError: If an option is unknown, only one of the graphs has an encoding, or the graphs do not match.

    Examples:
        >>> from gkd.graphs import ChannelNodes, GraphBuilder, HeatKernelEncoding, KNNEdges
        >>> builder = GraphBuilder(ChannelNodes(), KNNEdges(k=2))
        >>> features = torch.rand(2, 8, 4, 4)
        >>> EncodingLoss(HeatKernelEncoding())(builder(features), builder(2 * features)).round(decimals=3)
        tensor(0.)
    """

    matched_nodes = True
    matched_features = False

    @property
    def reads_encoding(self) -> bool:
        """Whether it compares what the builder gave to the nodes."""
        return self.encoding is None

    def __init__(
        self,
        encoding: nn.Module | None = None,
        distance: Literal["standardized", "cosine", "mse"] = "standardized",
        alignment: Literal["sign", "rotation"] = "sign",
    ) -> None:
        super().__init__()
        _check_options(distance, alignment)
        self.encoding = encoding
        self.distance = distance
        self.alignment = alignment

    def forward(self, student: Batch | Spectrum, teacher: Batch | Spectrum) -> Tensor:
        """Returns the loss of two batches of graphs."""
        student, teacher = Spectrum.of(student), Spectrum.of(teacher)
        check_matched(student.mask, teacher.mask)
        encoding = self._encoding(student.graph, teacher.graph)
        student_pe = encoding(student.graph)
        with torch.no_grad():
            teacher_pe = encoding(teacher.graph)
        padded = to_padded(student_pe, student.graph), to_padded(teacher_pe, teacher.graph)
        return encoding_loss(*padded, student.mask, self.distance, self.alignment)

    def _encoding(self, student: Data, teacher: Data) -> Callable[[Data], Tensor]:
        if self.encoding is not None:
            return self.encoding
        given = [graph.get("pe") is not None for graph in (student, teacher)]
        if all(given):
            return lambda graph: graph.pe
        if any(given):
            raise ValueError(f"Expected encodings 'pe' of both graphs or of none (got {student} and {teacher})")
        return HeatKernelEncoding()

    def extra_repr(self) -> str:
        """Returns what the printed module shows."""
        return f"distance={self.distance!r}, alignment={self.alignment!r}"
