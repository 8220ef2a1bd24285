from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from gkd.graphs.dense import from_padded, padded_edges, scatter_edges
from gkd.graphs.lowrank import LowRank
from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.spectral import Spectrum
from gkd.losses.attention import check_temperature, guides, node_attention
from gkd.losses.matching import check_matched, mean_over_graphs

__all__ = ["EdgeLoss", "adjacency_loss", "edge_loss", "factor_loss"]

DISTANCES = ("mse", "smooth_l1", "kl")
Distance = Literal["mse", "smooth_l1", "kl"]
SMOOTH_BETA = 0.1  # edge weights lie in [0, 1]: from here on a difference counts linearly


def edge_loss(
    student: Tensor,
    teacher: Tensor,
    edge_index: Tensor,
    mask: Tensor,
    batch: Tensor | None = None,
    distance: Distance = "mse",
    temperature: float = 0.1,
    node_weight: Tensor | None = None,
) -> Tensor:
    r"""Compares the weights that two networks give to the same edges.

    .. math::
        \text{mse}: \; \frac{1}{B} \sum_b \frac{1}{|E^t_b|} \sum_{ij} w_i w_j (a^s_{ij} - a^t_{ij})^2 \qquad
        \text{kl}: \; \frac{1}{B} \sum_b \frac{1}{n_b} \sum_j w_j \, \mathrm{KL}\big( p^t_{\cdot j} \,\|\, p^s_{\cdot j} \big), \quad
        p_{ij} = \mathrm{softmax}_i (a_{ij} / \tau)

    'mse' and 'smooth_l1' (which differs from half of it beyond differences of :math:`\beta = 0.1`, where it is linear) are averages over
    the edges of the teacher: slots to which the teacher gives the weight 0 are none, whatever the student gives them, so that pruned graphs
    have the same loss. 'kl' reads the weights that arrive at a node, of either sign, as the logits of its attention, a weight of 0 being
    one of the choices; a constant added to all of them changes nothing, and the average goes over the nodes that have an
    edge. No factor :math:`\tau^2` is applied. Fillers (self-loops of weight 0) have no influence. Unchanged by the order of the edges and
    by a permutation of the nodes; the value grows neither with B nor with the number of nodes or edges.

    Args:
        student: Weights that the student gives to the edges.
        teacher: Weights that the teacher gives to them; get no gradient.
        edge_index: Source i and target j of the edges.
        mask: Which nodes of the padded graphs exist.
        batch: Graph of every node; None if all graphs have n nodes and equally many edges, one graph's after the other's.
        distance: 'mse', 'smooth_l1' or 'kl'.
        temperature: :math:`\tau` of 'kl', in units of the weights.
        node_weight: w, best of mean 1; None for ones.

    Shapes:
        - **student**, **teacher** [E], **edge_index** [2, E], **mask** [B, n], **batch** and **node_weight** [N]; **output** scalar

    Raises:
        ValueError: If the weights do not match the edges or an option is unknown.
    """
    if student.shape != teacher.shape or student.shape != edge_index.shape[1:]:
        raise ValueError(
            f"Expected one weight for each of {edge_index.size(1)} edges (got student {list(student.shape)}, teacher {list(teacher.shape)})"
        )
    _check_options(distance, temperature)
    student, teacher = as_float(student), as_float(teacher.detach())
    source, target = edge_index
    num_graphs = mask.size(0)
    num_nodes = mask.numel() if batch is None else batch.numel()

    def per_graph(values: Tensor, graph: Tensor | None) -> Tensor:
        return values.view(num_graphs, -1).sum(dim=1) if graph is None else values.new_zeros(num_graphs).index_add(0, graph, values)

    if distance != "kl":
        exists = teacher != 0
        values = _difference(student, teacher, distance).where(exists, 0.0)
        values = values if node_weight is None else values * (node_weight[source] * node_weight[target])
        graph = None if batch is None else batch[target]
        return mean_over_graphs(per_graph(values, graph) / per_graph(exists.to(values.dtype), graph).clamp(min=1), mask)

    # A self-loop that both networks weigh is an edge, any other a filler.
    exists = (source != target) | ((student != 0) & (teacher != 0))
    student_log, teacher_log = (_log_softmax_at(weight / temperature, target, exists, num_nodes) for weight in (student, teacher))
    divergence = (teacher_log.exp() * (teacher_log - student_log)).where(exists, 0.0)
    at_node = student.new_zeros(num_nodes).index_add(0, target, divergence)
    hears = student.new_zeros(num_nodes).index_add(0, target, exists.to(student.dtype)) > 0
    at_node = at_node if node_weight is None else at_node * node_weight
    return mean_over_graphs(per_graph(at_node, batch) / per_graph(hears.to(at_node.dtype), batch).clamp(min=1), mask)


def adjacency_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    distance: Distance = "mse",
    temperature: float = 0.1,
    node_weight: Tensor | None = None,
) -> Tensor:
    """Compares two graphs that have edges of their own: :func:`edge_loss` over all the pairs of nodes.

    A pair that is no edge of the student weighs 0 there; one that is no edge of the teacher is left out by 'mse' and 'smooth_l1', and is
    one of the choices of 'kl'. Two complete graphs have the same loss here as there, and by 'mse' and 'smooth_l1' any two graphs over the
    same edges.

    Args:
        student: Adjacencies of the student's graphs.
        teacher: Adjacencies of the teacher's graphs; get no gradient.
        mask: Which nodes exist.
        distance: 'mse', 'smooth_l1' or 'kl'.
        temperature: Of 'kl', in units of the weights.
        node_weight: Best of mean 1; None for ones.

    Shapes:
        - **student**, **teacher** [B, n, n], entry (i, j) the weight from i to j, **mask**, **node_weight** [B, n]; **output** scalar

    Raises:
        ValueError: If the shapes differ or an option is unknown.
    """
    if student.shape != teacher.shape or student.shape[:2] != mask.shape:
        raise ValueError(
            f"Expected adjacencies [B, n, n] of {list(mask.shape)} nodes (got student {list(student.shape)}, teacher {list(teacher.shape)})"
        )
    _check_options(distance, temperature)
    student, teacher = as_float(student), as_float(teacher.detach())
    if distance != "kl":
        exists = teacher != 0
        values = _difference(student, teacher, distance).where(exists, 0.0)
        values = values if node_weight is None else values * node_weight.unsqueeze(1) * node_weight.unsqueeze(2)
        return mean_over_graphs(values.sum(dim=(1, 2)) / exists.sum(dim=(1, 2)).clamp(min=1), mask)
    exists = mask.unsqueeze(1) & mask.unsqueeze(2) & ~torch.eye(mask.size(1), dtype=torch.bool, device=mask.device)
    exists = exists | ((student != 0) & (teacher != 0))
    lowest = torch.finfo(student.dtype).min
    student_log, teacher_log = ((weight / temperature).where(exists, lowest).log_softmax(dim=1) for weight in (student, teacher))
    at_node = (teacher_log.exp() * (teacher_log - student_log)).where(exists, 0.0).sum(dim=1)
    at_node = at_node if node_weight is None else at_node * node_weight
    return mean_over_graphs(at_node.sum(dim=1) / exists.any(dim=1).sum(dim=1).clamp(min=1), mask)


def factor_loss(student: LowRank, teacher: LowRank, mask: Tensor, node_weight: Tensor | None = None) -> Tensor:
    r"""Compares the adjacencies of complete graphs by their factors, see :meth:`gkd.graphs.LowRank.squared_distance`.

    .. math:: \frac{1}{B} \sum_b \frac{1}{|E_b|} \sum_{ij \in E_b} w_i w_j (f^s_i \cdot f^s_j - f^t_i \cdot f^t_j)^2

    with all pairs of nodes that are not isolated in the teacher's graph as edges :math:`E_b`.

    Args:
        student: The student's graphs.
        teacher: The teacher's; get no gradient.
        mask: Which nodes exist.
        node_weight: w, best of mean 1; None for ones.

    Shapes:
        - **mask**, **node_weight** [B, n]; **output** scalar

    Raises:
        ValueError: If the graphs do not match.
    """
    teacher_factor = teacher.factor.detach()
    joined = (teacher_factor != 0).any(dim=2)
    scale = joined.to(teacher_factor.dtype) if node_weight is None else joined * node_weight.sqrt()
    weighted = [LowRank(factor * scale.unsqueeze(2), student.self_loops) for factor in (student.factor, teacher_factor)]
    count = joined.sum(dim=1)
    pairs = count.square() if student.self_loops else count * (count - 1)
    return mean_over_graphs(weighted[0].squared_distance(weighted[1]) / pairs.clamp(min=1), mask)


class EdgeLoss(nn.Module):
    """Compares how strongly matched nodes are related.

    Graphs that share their edges, as :class:`~gkd.losses.GraphLoss` builds them, are compared edge by edge (:func:`edge_loss`), others
    by their dense adjacencies (:func:`adjacency_loss`). Complete graphs that are known by their factors
    (:class:`~gkd.graphs.LowRank`) are compared by these: 'mse' is then the mean over all pairs of nodes that have edges in the teacher's
    graph, and no adjacency is written down. For a complete graph of instances, ``distance='kl'`` compares whom every image
    attends to. Its logits are the weights; those of cosines that :class:`~gkd.losses.GraphLoss` built are taken before they are clipped at
    0, see :attr:`gkd.graphs.Spectrum.signed_weight`.

    Args:
        distance: 'mse', 'smooth_l1' or 'kl'.
        temperature: Of 'kl', in units of the weights.
        guidance: Temperature of the attention that weighs an edge by how strongly the teacher responds at both of its ends (for
            'kl': at its target), see :func:`~gkd.losses.node_attention`; None or ``inf`` weighs all alike.

    Shapes:
        - **student**, **teacher**: graphs of equally many nodes; **output** scalar

    Raises:
        ValueError: If an option is unknown or not positive, or the graphs do not match.
    """

    matched_nodes = True
    matched_features = False
    reads_encoding = False

    def __init__(self, distance: Distance = "mse", temperature: float = 0.1, guidance: float | None = None) -> None:
        super().__init__()
        _check_options(distance, temperature)
        check_temperature(guidance)
        self.distance = distance
        self.temperature = temperature
        self.guidance = guidance

    def forward(self, student: Batch | Spectrum, teacher: Batch | Spectrum) -> Tensor:
        """Returns the loss of two batches of graphs."""
        student, teacher = Spectrum.of(student), Spectrum.of(teacher)
        check_matched(student.mask, teacher.mask)
        mask, node_weight = teacher.mask, None
        with full_precision(teacher.mask):
            if guides(self.guidance):
                node_weight = node_attention(teacher.x, self.guidance, mask)
            own, goal = student.lowrank, teacher.lowrank
            if own is not None and goal is not None and self.distance == "mse" and own.self_loops == goal.self_loops:
                return factor_loss(own, goal, mask, node_weight)
            if (own is not None and goal is not None) or student.graph.edge_index is not teacher.graph.edge_index:
                student_A, teacher_A = self._adjacency(student), self._adjacency(teacher)
                return adjacency_loss(student_A, teacher_A, mask, self.distance, self.temperature, node_weight)
            student_weight, teacher_weight = self._weights(student), self._weights(teacher)
            batch = None if _is_uniform(teacher.graph) else teacher.graph.batch
            node_weight = None if node_weight is None else from_padded(node_weight, teacher.graph)
            edge_index = teacher.graph.edge_index
            return edge_loss(student_weight, teacher_weight, edge_index, mask, batch, self.distance, self.temperature, node_weight)

    def _weights(self, spectrum: Spectrum) -> Tensor:
        if self.distance == "kl":
            return spectrum.signed_weight
        weight = spectrum.graph.get("edge_weight")
        return torch.ones(spectrum.graph.edge_index.size(1), device=spectrum.mask.device) if weight is None else weight

    def _adjacency(self, spectrum: Spectrum) -> Tensor:
        if self.distance != "kl" or spectrum.lowrank is not None:  # of which no cosine is negative
            return spectrum.adjacency
        return scatter_edges(padded_edges(spectrum.graph)[0], as_float(spectrum.signed_weight), *spectrum.mask.shape)

    def extra_repr(self) -> str:
        """Returns what the printed module shows."""
        temperature = f", temperature={self.temperature}" if self.distance == "kl" else ""
        return f"distance={self.distance!r}{temperature}, guidance={self.guidance}"


def _is_uniform(graph: Data) -> bool:
    """Says whether all graphs have equally many nodes and edges, from what a batch keeps on the CPU; a single graph has."""
    if graph.get("batch") is None:
        return True
    if torch.compiler.is_compiling():  # a look at values would break the compiled graph; the general way is right for uniform ones too
        return False
    slices = getattr(graph, "_slice_dict", None) or {}
    return all(name in slices and len(set(slices[name].diff().tolist())) <= 1 for name in ("x", "edge_index"))


def _difference(student: Tensor, teacher: Tensor, distance: Distance) -> Tensor:
    if distance == "mse":
        return (student - teacher).square()
    return F.smooth_l1_loss(student, teacher, reduction="none", beta=SMOOTH_BETA)


def _log_softmax_at(logits: Tensor, target: Tensor, exists: Tensor, num_nodes: int) -> Tensor:
    """Log-softmax over the edges that arrive at a node; 0 where there is no edge."""
    logits = logits.where(exists, torch.finfo(logits.dtype).min)
    top = logits.new_full((num_nodes,), torch.finfo(logits.dtype).min).scatter_reduce(0, target, logits.detach(), "amax")
    shifted = (logits - top[target]).where(exists, 0.0)
    total = logits.new_zeros(num_nodes).index_add(0, target, shifted.exp() * exists)
    total = total.where(total > 0, torch.ones_like(total))
    return shifted - total.log()[target]


def _check_options(distance: str, temperature: float) -> None:
    if distance not in DISTANCES:
        raise ValueError(f"Expected 'distance' to be one of {', '.join(DISTANCES)} (got '{distance}')")
    if not temperature > 0:
        raise ValueError(f"Expected a temperature above 0 (got {temperature})")
