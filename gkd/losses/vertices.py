from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch

from gkd.graphs.dense import to_padded
from gkd.graphs.message import RelationalConv
from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.similarity import unit_rows
from gkd.graphs.spectral import Spectrum
from gkd.losses.attention import check_temperature, feature_attention, guides, node_attention
from gkd.losses.inputs import unit_scale
from gkd.losses.matching import check_matched, mean_over_nodes

__all__ = ["MessageLoss", "VertexLoss", "vertex_loss"]


def _cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor, feature_weight: Tensor | None) -> Tensor:
    if feature_weight is not None:
        student, teacher = (x * feature_weight.sqrt().unsqueeze(1) for x in (student, teacher))
    # Half the squared distance of unit rows is 1 - cos, and 0 where both rows are zero, which have no cosine.
    return (unit_rows(student) - unit_rows(teacher)).square().sum(dim=-1) / 2


def _standardized_distance(student: Tensor, teacher: Tensor, mask: Tensor, feature_weight: Tensor | None) -> Tensor:
    return _squared_distance(_standardize(student, mask), _standardize(teacher, mask), mask, feature_weight) / 2


def _squared_distance(student: Tensor, teacher: Tensor, mask: Tensor, feature_weight: Tensor | None) -> Tensor:
    square = (student - teacher).square()
    return square.mean(dim=-1) if feature_weight is None else (square * feature_weight.unsqueeze(1)).mean(dim=-1)


def _standardize(x: Tensor, mask: Tensor) -> Tensor:
    """Gives all the features of a graph together mean 0 and variance 1; those of a graph without variation become 0."""
    exists = mask.unsqueeze(-1)
    x = x.where(exists, 0.0)
    count = (mask.sum(dim=1) * x.size(-1)).clamp(min=1).view(-1, 1, 1)
    x = unit_scale(x, (1, 2))
    centred = (x - x.sum(dim=(1, 2), keepdim=True) / count).where(exists, 0.0)
    variance = centred.square().sum(dim=(1, 2), keepdim=True) / count
    # What rounding leaves of a constant is no variation.
    rounding = (64 * torch.finfo(x.dtype).eps) ** 2 * x.detach().square().sum(dim=(1, 2), keepdim=True) / count
    varies = variance > rounding.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    return centred * torch.where(varies, variance.where(varies, 1.0).rsqrt(), 0.0)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student_log, teacher_log = ((x / temperature).log_softmax(dim=-1) for x in (student, teacher))
    return F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=-1) * temperature**2


LARGEST_DENSE = 1024  # nodes of a graph up to which messages go by dense products
METRICS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "cosine": _cosine_distance,
    "standardized": _standardized_distance,
    "mse": _squared_distance,
}
DISTANCES = (*METRICS, "kl")


def vertex_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    distance: str = "cosine",
    node_weight: Tensor | None = None,
    feature_weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Compares the features of matched nodes.

    .. math:: \frac{1}{B} \sum_b \frac{1}{n_b} \sum_i w_i \, \delta(x^s_i, x^t_i)

    ================= ======================================================================== ==================================
    ``distance``      :math:`\delta`                                                           unchanged by
    ================= ======================================================================== ==================================
    ``cosine``        :math:`1 - \cos_v(x^s_i, x^t_i)`, in the inner product weighted by v     positive scale of every node
    ``standardized``  :math:`\frac{1}{2d} \sum_k v_k (\hat x^s_{ik} - \hat x^t_{ik})^2`,       scale and shift of a whole graph
                      each graph's features brought to mean 0 and variance 1
    ``mse``           :math:`\frac{1}{d} \sum_k v_k (x^s_{ik} - x^t_{ik})^2`                   nothing
    ``kl``            :math:`T^2 \, \mathrm{KL}\big( \sigma(x^t_i / T) \,\|\,                  shift of every node
                      \sigma(x^s_i / T) \big)`, each node's features as logits
    ================= ======================================================================== ==================================

    The first two are between 0 and 2 without weights, and equal to 1 where nothing agrees. Of channel nodes at full size, ``kl`` is the
    channel-wise distillation of :func:`~gkd.losses.cwd_loss`. All are unchanged by a permutation of the nodes
    or features of both graphs. The value grows neither with B nor with n and d.

    Args:
        student: Features of the student's nodes.
        teacher: Features of the teacher's nodes; gets no gradient.
        mask: Which nodes exist; None for all. What else the features hold there has no influence.
        distance: 'cosine', 'standardized', 'mse' or 'kl'.
        node_weight: w, best of mean 1; None for ones.
        feature_weight: v >= 0, best of mean 1; None for ones. Not with 'kl', whose features are one distribution.
        temperature: T of 'kl', in units of the features.

    Shapes:
        - **student**, **teacher** [B, n, d], **mask** and **node_weight** [B, n], **feature_weight** [B, d]; **output** scalar

    Gradient:
        Finite everywhere; 0 at a zero row (cosine) and at a graph without variation (standardized), where the distance has no slope.

    Raises:
        ValueError: If the shapes differ, or an option or their combination is unknown.

    References:
        Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021.

    Examples:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> vertex_loss(x, x.flip(-1)), vertex_loss(x, 3 * x)
        (tensor(1.), tensor(0.))
    """
    if student.shape != teacher.shape or student.dim() != 3:
        raise ValueError(
            f"Expected equal features [B, n, d] in student and teacher (got student {list(student.shape)}, teacher {list(teacher.shape)}): "
            "send the student's map through a ChannelAdapter, or give the builder's nodes a common grid"
        )
    _check_options(distance, DISTANCES, temperature)
    if distance == "kl" and feature_weight is not None:
        raise ValueError("Expected feature_weight=None with distance='kl', which compares the features of a node as one distribution")
    with full_precision(student):
        student, teacher = as_float(student), as_float(teacher.detach())
        mask = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if mask is None else mask
        if distance == "kl":
            values = _divergence(student, teacher, temperature)
        else:
            values = METRICS[distance](student, teacher, mask, feature_weight)
        return mean_over_nodes(values if node_weight is None else values * node_weight, mask)


class VertexLoss(nn.Module):
    """Compares the features of matched nodes, guided by where the teacher responds; see :func:`vertex_loss`.

    Args:
        guidance: Temperature of the attention that weighs nodes and features (of 'kl' the nodes alone) by the teacher's responses, see
            :func:`~gkd.losses.node_attention`; None or ``inf`` weighs all alike.
        distance: 'cosine', 'standardized', 'mse' or 'kl'.
        temperature: Of 'kl', in units of the features.

    Shapes:
        - **student**, **teacher**: graphs of equally many nodes with equally many features; **output** scalar

    Raises:
        ValueError: If a temperature is not positive, the distance is unknown, or the graphs do not match.
    """

    matched_nodes = True
    matched_features = True
    reads_encoding = False

    def __init__(self, guidance: float | None = None, distance: str = "cosine", temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(guidance)
        _check_options(distance, DISTANCES, temperature)
        self.guidance = guidance
        self.distance = distance
        self.temperature = temperature

    def forward(self, student: Batch | Spectrum, teacher: Batch | Spectrum) -> Tensor:
        """Returns the loss of two batches of graphs."""
        student, teacher = Spectrum.of(student), Spectrum.of(teacher)
        check_matched(student.mask, teacher.mask)
        mask, student_x, teacher_x = student.mask, student.x, teacher.x
        node_weight = feature_weight = None
        if guides(self.guidance):
            node_weight = node_attention(teacher_x, self.guidance, mask)
            feature_weight = None if self.distance == "kl" else feature_attention(teacher_x, self.guidance, mask)
        return vertex_loss(student_x, teacher_x, mask, self.distance, node_weight, feature_weight, self.temperature)

    def extra_repr(self) -> str:
        """Returns what the printed module shows."""
        temperature = f", temperature={self.temperature}" if self.distance == "kl" else ""
        return f"guidance={self.guidance}, distance={self.distance!r}{temperature}"


class MessageLoss(nn.Module):
    r"""Compares what matched nodes hear from their neighbours.

    .. math:: \frac{1}{B} \sum_b \frac{1}{n_b} \sum_i \delta(m^s_i, m^t_i)

    with the messages m of a :class:`~gkd.graphs.RelationalConv` and a distance of :func:`vertex_loss`. Each network's messages are weighed
    by its own edge weights; :class:`GraphLoss` sends both over the same edges. A relation without width (``'distance'``, ``'cosine'``) lets
    the widths of the two networks differ; ``distance='cosine'`` would only see the sign of such messages.

    Args:
        conv: What is sent, and how many hops it travels. The default, the neighbours' features, goes by dense products and is cheap;
            ``'difference'`` writes down every feature of every edge.
        distance: 'standardized', 'cosine' or 'mse'.

    Shapes:
        - **student**, **teacher**: graphs of equally many nodes; **output** scalar

    Raises:
        ValueError: If the distance is unknown or the graphs do not match.
    """

    matched_nodes = True
    reads_encoding = False

    def __init__(self, conv: nn.Module | None = None, distance: str = "standardized") -> None:
        super().__init__()
        _check_options(distance, METRICS)
        self.conv = RelationalConv("feature") if conv is None else conv
        self.distance = distance

    @property
    def matched_features(self) -> bool:
        """Whether the messages are as wide as the features."""
        return getattr(self.conv, "relation", None) not in ("distance", "cosine")

    def forward(self, student: Batch | Spectrum, teacher: Batch | Spectrum) -> Tensor:
        """Returns the loss of two batches of graphs."""
        student, teacher = Spectrum.of(student), Spectrum.of(teacher)
        check_matched(student.mask, teacher.mask)
        with full_precision(student.mask):
            student_messages = self._messages(student)
            with torch.no_grad():
                teacher_messages = self._messages(teacher)
        return vertex_loss(student_messages, teacher_messages, student.mask, self.distance)

    def _messages(self, spectrum: Spectrum) -> Tensor:
        conv, is_small = self.conv, spectrum.lowrank is not None or spectrum.mask.size(1) <= LARGEST_DENSE
        if is_small and isinstance(conv, RelationalConv) and conv.relation == "feature":
            return conv.dense(as_float(spectrum.x), spectrum)
        graph = spectrum.graph
        weight = graph.get("edge_weight")
        return to_padded(conv(as_float(graph.x), graph.edge_index, None if weight is None else as_float(weight)), graph)

    def extra_repr(self) -> str:
        """Returns what the printed module shows."""
        return f"distance={self.distance!r}"


def _check_options(distance: str, allowed: Collection[str], temperature: float = 1.0) -> None:
    if distance not in allowed:
        raise ValueError(f"Expected 'distance' to be one of {', '.join(allowed)} (got '{distance}')")
    if not temperature > 0:
        raise ValueError(f"Expected a temperature above 0 (got {temperature})")
