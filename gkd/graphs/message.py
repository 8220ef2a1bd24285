from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj
from torch_geometric.utils import is_sparse, scatter, to_edge_index

from gkd.graphs.arguments import flag, one_of, positive_integer
from gkd.graphs.laplacian import check_weights, connected
from gkd.graphs.similarity import power_of_two, unit_rows
from gkd.graphs.spectral import Spectrum


def _difference(x_i: Tensor, x_j: Tensor) -> Tensor:
    return (x_j - x_i).abs()


def _distance(x_i: Tensor, x_j: Tensor) -> Tensor:
    difference = x_j - x_i
    unit = power_of_two(difference, -1)
    square = (difference / unit).square().sum(dim=-1, keepdim=True)
    apart = square > 0  # the root has an infinite slope at 0, where this takes the subgradient 0
    return torch.where(apart, square.where(apart, 1.0).sqrt(), 0.0) * unit


def _cosine(x_i: Tensor, x_j: Tensor) -> Tensor:
    return (x_i * x_j).sum(dim=-1, keepdim=True)  # of unit rows


Relation = Callable[[Tensor, Tensor], Tensor]
# What is done to the nodes once, and what is then said along every edge. None: the neighbour's features themselves.
RELATIONS: dict[str, tuple[Callable[[Tensor], Tensor] | None, Relation | None]] = {
    "difference": (None, _difference),
    "distance": (None, _distance),
    "cosine": (unit_rows, _cosine),
    "feature": (None, None),
}


class RelationalConv(MessagePassing):
    r"""Lets every node hear how it relates to its neighbours.

    .. math::
        m_i^{(1)} = \sum_j \bar w_{ij} \, \phi(x_i, x_j), \qquad m_i^{(h)} = \sum_j \bar w_{ij} \, m_j^{(h-1)}, \qquad
        \bar w_{ij} = w_{ij} \Big/ \sum_j w_{ij}

    The first hop says a relation, each further hop passes on what the neighbours have heard:

    ============== ================================== ============ =================================================
    ``relation``   :math:`\phi(x_i, x_j)`             width        unchanged by
    ============== ================================== ============ =================================================
    ``difference`` :math:`|x_j - x_i|` per feature    d            translation of all nodes
    ``distance``   :math:`\lVert x_j - x_i \rVert_2`  1            translation and rotation of all nodes
    ``cosine``     :math:`\cos(x_i, x_j)`             1            rotation of all nodes, positive scale of each node
    ``feature``    :math:`x_j` or :math:`W x_j`       d or out     nothing
    ============== ================================== ============ =================================================

    ``distance`` and ``cosine`` do not tell the width of the features, so two networks of unequal widths can be compared by them.
    There is no parameter unless ``in_channels`` and ``out_channels`` ask for :math:`W`. Equivariant to permutations of the nodes and
    invariant to the order of the edges. An edge of weight 0 sends nothing, and a node that no edge reaches hears zeros.

    Args:
        relation: What is said along an edge, see the table.
        hops: How far what is heard travels, at least 1.
        in_channels: Width of the features, for a learned ``feature`` relation.
        out_channels: Width of the messages of a learned ``feature`` relation.
        normalize: Whether the weights that reach a node are scaled to sum to 1. They must not be negative then.
        **kwargs: Further arguments of :class:`torch_geometric.nn.conv.MessagePassing`, such as ``flow``.

    Shapes:
        - **x** [N, d], or two sets of nodes (sources [N, d], targets [M, d]) for one hop; **edge_index** [2, E] as (source j, target i), or
          the transposed adjacency [M, N] as a sparse tensor, whose values are the weights; **edge_weight** [E] or None for ones;
          **output** [N, width] or [M, width]

    Gradient:
        To the features, the weights and W. Finite everywhere: equal features, zero rows and isolated nodes included.

    Raises:
        ValueError: If the relation is unknown, ``hops`` is below 1, only one of the channel numbers is given or a relation cannot
            be learned, shapes do not fit, or (looked at on the CPU only) weights to be normalised are negative or not finite.

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [4.0]])
        >>> edge_index = torch.tensor([[1, 2], [0, 0]])  # nodes 1 and 2 speak to node 0
        >>> RelationalConv("difference")(x, edge_index, torch.tensor([3.0, 1.0])).flatten()
        tensor([1.7500, 0.0000, 0.0000])
    """

    def __init__(
        self,
        relation: str = "difference",
        hops: int = 1,
        in_channels: int | None = None,
        out_channels: int | None = None,
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"aggr": "sum", **kwargs})
        one_of(relation, tuple(RELATIONS), "relation")
        positive_integer(hops, "hops")
        flag(normalize, "normalize")
        if (in_channels is None) != (out_channels is None):
            raise ValueError(f"Expected 'in_channels' and 'out_channels' together (got {in_channels} and {out_channels})")
        if in_channels is not None and relation != "feature":
            raise ValueError(f"Expected 'in_channels' with relation='feature' only (got relation='{relation}')")
        self.relation = relation
        self.hops = hops
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.normalize = normalize
        self.lin = None if in_channels is None or out_channels is None else nn.Linear(in_channels, out_channels, bias=False)

    def reset_parameters(self) -> None:
        """Draws W anew, where there is one."""
        super().reset_parameters()
        if self.lin is not None:
            self.lin.reset_parameters()

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], edge_index: Adj, edge_weight: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns what every node hears, see the class."""
        both = (x, x) if isinstance(x, Tensor) else x
        self._check(both, x is not both[0])
        if is_sparse(edge_index):
            edge_index, value = to_edge_index(edge_index)
            edge_index, edge_weight = edge_index.flip(0), value if edge_weight is None else edge_weight
        sizes = (both[0].size(0), both[1].size(0)) if size is None else size
        weight = self._weights(both[0], edge_index, edge_weight, sizes)
        prepare, relate = RELATIONS[self.relation]
        heard = tuple(rows if prepare is None else prepare(rows) for rows in both)
        heard = heard if self.lin is None else tuple(self.lin(rows) for rows in heard)
        hops = self.hops
        if relate is not None:
            said = self.edge_updater(edge_index, x=heard, size=sizes)
            heard = (self.propagate(edge_index, x=None, said=said, weight=weight, size=sizes),) * 2
            hops -= 1
        for _ in range(hops):
            heard = (self.propagate(edge_index, x=heard, said=None, weight=weight, size=sizes),) * 2
        return heard[0]

    def dense(self, x: Tensor, spectrum: Spectrum) -> Tensor:
        """Does what ``forward`` does by products with the adjacency, in which an edge costs less than a gathered row.

        Args:
            x: Padded features.
            spectrum: The view of the graphs; where their adjacency is known by a factor, it is never written down.

        Shapes:
            - **x** [B, N, d]; **output** [B, N, width]

        Raises:
            ValueError: If the relation is not ``feature``, whose messages alone are products.
        """
        if self.relation != "feature":
            raise ValueError(f"Expected relation='feature' for dense messages (got '{self.relation}')")
        x = x if self.lin is None else self.lin(x)
        total = spectrum.propagate(torch.ones_like(x[:, :, :1]))
        scale = total.where(connected(total), 1.0).reciprocal() if self.normalize else 1.0  # who hears nothing divides 0 by 1
        for _ in range(self.hops):
            x = spectrum.propagate(x) * scale
        return x

    def _check(self, both: tuple[Tensor, Tensor], bipartite: bool) -> None:
        for x in both:
            if x.dim() != 2 or not x.is_floating_point():
                raise ValueError(f"Expected 'x' of shape [num_nodes, channels] in floating point (got {list(x.shape)} in {x.dtype})")
            if self.in_channels is not None and x.size(1) != self.in_channels:
                raise ValueError(f"Expected 'x' with {self.in_channels} channels (got {x.size(1)})")
        if bipartite and self.hops > 1:
            raise ValueError(f"Expected hops=1 between two sets of nodes, none of which hears itself (got hops={self.hops})")

    def _weights(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None, sizes: tuple[int, int]) -> Tensor:
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"Expected 'edge_index' of shape [2, num_edges] (got {list(edge_index.shape)})")
        if edge_weight is None:
            edge_weight = x.new_ones(edge_index.size(1))
        if edge_weight.shape != edge_index.shape[1:]:
            raise ValueError(f"Expected 'edge_weight' of shape [{edge_index.size(1)}] (got {list(edge_weight.shape)})")
        if not self.normalize:
            return edge_weight
        check_weights(edge_weight)
        forward = self.flow == "source_to_target"
        target, num_targets = edge_index[1 if forward else 0], sizes[1 if forward else 0]
        # Shares do not change with the unit of the weights, whatever their sum is.
        largest = scatter(edge_weight.detach(), target, dim=0, dim_size=num_targets, reduce="max")
        edge_weight = edge_weight / power_of_two(largest[:, None], -1)[:, 0][target]
        total = scatter(edge_weight, target, dim=0, dim_size=num_targets, reduce="sum")
        total = total.where(connected(total), torch.ones_like(total))  # a node that hears nothing divides 0 by 1
        return edge_weight / total[target]

    def edge_update(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        """Returns the relation of both ends of every edge."""
        relate = RELATIONS[self.relation][1]
        return x_j if relate is None else relate(x_i, x_j)

    def message(self, x_j: Tensor | None, said: Tensor | None, weight: Tensor) -> Tensor:
        """Weighs what is said along every edge, or what its source has heard before."""
        content = x_j if said is None else said
        assert content is not None  # the first hop of a relation passes `said`, all others x
        return weight.unsqueeze(-1) * content

    def __repr__(self) -> str:
        width = "" if self.lin is None else f", {self.in_channels} -> {self.out_channels}"
        return f"{self.__class__.__name__}({self.relation}, hops={self.hops}{width})"
