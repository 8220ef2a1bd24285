from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter

from gkd.graphs.laplacian import connected
from gkd.graphs.similarity import unit_rows


def _difference(x_i: Tensor, x_j: Tensor) -> Tensor:
    return (x_j - x_i).abs()


def _distance(x_i: Tensor, x_j: Tensor) -> Tensor:
    square = (x_j - x_i).square().sum(dim=-1, keepdim=True)
    apart = square > 0  # the root has an infinite slope at 0, where this takes the subgradient 0
    return torch.where(apart, square.where(apart, torch.ones_like(square)).sqrt(), torch.zeros_like(square))


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

    Shapes:
        - **x** [N, d], **edge_index** [2, E] as (source j, target i), **edge_weight** [E] or None for ones; **output** [N, width]

    Gradient:
        To the features, the weights and W. Finite everywhere: equal features, zero rows and isolated nodes included.

    Raises:
        ValueError: If the relation is unknown, ``hops`` is below 1, only one of the channel numbers is given or a relation cannot
            be learned, shapes do not fit, or weights to be normalised are negative (looked at on the CPU only).

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
    ) -> None:
        super().__init__(aggr="sum")
        if relation not in RELATIONS:
            raise ValueError(f"Expected 'relation' to be one of {', '.join(RELATIONS)} (got '{relation}')")
        if hops < 1:
            raise ValueError(f"Expected 'hops' to be at least 1 (got {hops})")
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

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Returns what every node hears, see the class."""
        weight = self._weights(x, edge_index, edge_weight)
        prepare, relate = RELATIONS[self.relation]
        heard = x if prepare is None else prepare(x)
        heard = heard if self.lin is None else self.lin(heard)
        hops = self.hops
        if relate is not None:
            said = self.edge_updater(edge_index, x=heard)
            heard = self.propagate(edge_index, x=None, said=said, weight=weight, size=(x.size(0), x.size(0)))
            hops -= 1
        for _ in range(hops):
            heard = self.propagate(edge_index, x=heard, said=None, weight=weight, size=(x.size(0), x.size(0)))
        return heard

    def _weights(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> Tensor:
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(f"Expected 'x' of shape [num_nodes, channels] in floating point (got {list(x.shape)} in {x.dtype})")
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"Expected 'edge_index' of shape [2, num_edges] (got {list(edge_index.shape)})")
        if edge_weight is None:
            edge_weight = x.new_ones(edge_index.size(1))
        if edge_weight.shape != edge_index.shape[1:]:
            raise ValueError(f"Expected 'edge_weight' of shape [{edge_index.size(1)}] (got {list(edge_weight.shape)})")
        if self.in_channels is not None and x.size(1) != self.in_channels:
            raise ValueError(f"Expected 'x' with {self.in_channels} channels (got {x.size(1)})")
        if not self.normalize:
            return edge_weight
        looks = edge_weight.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a look would synchronise
        if looks and edge_weight.numel() > 0 and bool(edge_weight.detach().min() < 0):
            raise ValueError(f"Expected 'edge_weight' not to be negative under normalize=True (got {float(edge_weight.detach().min()):g})")
        target = edge_index[1]
        total = scatter(edge_weight, target, dim=0, dim_size=x.size(0), reduce="sum")
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
