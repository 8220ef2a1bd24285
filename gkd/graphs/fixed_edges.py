from __future__ import annotations

import torch
from torch import Tensor

from gkd.graphs.arguments import positive_integer
from gkd.graphs.cache import static_tensors
from gkd.graphs.edge_index import Symmetrize
from gkd.graphs.nearest import check_neighbors, neighbors, num_slots
from gkd.graphs.nodes import Nodes
from gkd.graphs.similarity import Comparable, Metric
from gkd.graphs.similarity_edges import NeighborEdges
from gkd.graphs.values import readable


class GridEdges(NeighborEdges):
    """Joins every patch with those beside it.

    The grid is read off the positions, so nodes may come in any order. Every node has as many slots as it can have neighbours; those that
    would leave the grid are fillers (self-loops of weight 0).

    Args:
        neighbors: 4 (left, right, above, below) or 8 (the corners too).
        metric: 'cosine' or 'euclidean': of the weights.
        sigma: Bandwidth of the euclidean weights; None: the mean edge length of each graph, detached.

    Shapes:
        - **nodes.x** [B, n, d], **nodes.pos** [B, n, 2]; **output.edge_index** [2, B * n * neighbors]

    Raises:
        ValueError: If the nodes have no positions on a grid. Values are checked on the CPU only.

    Examples:
        >>> from gkd.graphs.nodes import PatchNodes
        >>> edges = GridEdges()(PatchNodes()(torch.ones(1, 3, 1, 3)))
        >>> edges.edge_index[:, edges.edge_weight > 0].tolist()
        [[1, 0, 2, 1], [0, 1, 1, 2]]
    """

    def __init__(self, neighbors: int = 4, metric: Metric = "cosine", sigma: float | None = None) -> None:
        super().__init__(metric, symmetrize=None, sigma=sigma)
        if neighbors not in (4, 8):
            raise ValueError(f"Expected 4 or 8 neighbors (got {neighbors})")
        self.neighbors = neighbors

    def width(self, num_nodes: int) -> int:
        """Number of neighbour slots of a node."""
        return self.neighbors

    def choose(self, rows: Comparable, nodes: Nodes) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The patches beside each."""
        x = rows.x
        pos, (batch_size, num_nodes, _) = nodes.pos, x.shape
        if pos is None or nodes.mask is not None or pos.shape != (batch_size, num_nodes, 2):
            got = "padded nodes" if nodes.mask is not None else "no positions" if pos is None else f"positions {list(pos.shape)}"
            raise ValueError(f"Expected nodes on a grid, with positions [B, n, 2], as PatchNodes makes them (got {got})")
        if num_nodes == 0:
            return torch.empty(batch_size, 0, self.neighbors, dtype=torch.long, device=x.device), None, None
        # The centre of the first cell is half a cell from the border: (0.5 / width, 0.5 / height).
        size = (0.5 / pos.amin(dim=1)).round().clamp(1, num_nodes)[:, None, :]
        cell = (pos * size).floor().clamp(min=0).minimum(size - 1).long()
        size = size.long()
        number = torch.arange(num_nodes, device=x.device).expand(batch_size, -1)
        place = (cell[..., 1] * size[..., 0] + cell[..., 0]).clamp(max=num_nodes - 1)
        node_at = torch.zeros_like(number).scatter(1, place, number)
        if readable(pos):
            on_grid = ((cell + 0.5) / size - pos).abs() < 1e-3 / size
            if not bool(on_grid.all()) or not torch.equal(node_at.gather(1, place), number):
                raise ValueError("Expected nodes on a grid, one in the centre of each cell, as PatchNodes makes them (got other positions)")
        # Cells of a 3 x 3 window, row by row: every second one, or all but the middle. Made on the device, which nobody waits for.
        window = torch.arange(self.neighbors, device=x.device)
        window = 2 * window + 1 if self.neighbors == 4 else window + (window >= 4)
        beside = cell[:, :, None, :] + torch.stack((window % 3 - 1, window // 3 - 1), dim=-1)
        exists = ((beside >= 0) & (beside < size[:, :, None, :])).all(dim=-1)
        index = (beside[..., 1] * size[..., 0, None] + beside[..., 0]).clamp(0, num_nodes - 1)
        return node_at.gather(1, index.flatten(1)).view_as(index), exists, None

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"neighbors={self.neighbors}, {super().extra_repr()}"


class RandomEdges(NeighborEdges):
    """Joins every node with k others that chance chose: the control that tells what a choice by similarity is worth.

    Neighbours depend on the seed and on the numbers of the nodes alone: they come from a hash of these, not from a generator with a state.
    So they are the same in every step, in every graph of a batch, on every device, in teacher and student, and after resuming; nothing
    else that draws random numbers is disturbed.

    Args:
        k: Number of neighbours, without the node itself.
        seed: Another seed gives other neighbours.
        metric: 'cosine' or 'euclidean': of the weights.
        symmetrize: 'union', 'mutual' or None, as in :class:`~gkd.graphs.KNNEdges`.
        sigma: Bandwidth of the euclidean weights; None: the mean edge length of each graph, detached.

    Shapes:
        - **nodes.x** [B, n, d]; **output.edge_index** [2, B * n * k], twice as long for 'union', **output.edge_weight** [as long]

    Raises:
        ValueError: If k is not smaller than the number of nodes, in graphs without padding that have at least two.

    Examples:
        >>> nodes = Nodes(torch.rand(2, 10, 4))
        >>> torch.equal(RandomEdges(k=3, seed=1)(nodes).edge_index, RandomEdges(k=3, seed=1)(nodes).edge_index)
        True
    """

    def __init__(
        self, k: int = 8, seed: int = 0, metric: Metric = "cosine", symmetrize: Symmetrize | None = "union", sigma: float | None = None
    ) -> None:
        super().__init__(metric, symmetrize, sigma)
        if not isinstance(seed, int):
            raise ValueError(f"Expected seed to be an integer (got {seed!r})")
        self.k = positive_integer(k, "k")
        self.seed = seed

    def width(self, num_nodes: int) -> int:
        """Number of neighbour slots of a node."""
        return num_slots(self.k, num_nodes - 1)

    def choose(self, rows: Comparable, nodes: Nodes) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """K other nodes of each."""
        x = rows.x
        batch_size, num_nodes, _ = x.shape
        k = check_neighbors(self.k, num_nodes - 1, nodes.mask)
        if nodes.mask is None:
            (source,) = static_tensors(_random_neighbors, self.seed, num_nodes, k, x.device)
            return source.expand(batch_size, -1, -1), None, None
        scores = _random_scores(self.seed, num_nodes, x.device).expand(batch_size, -1, -1)
        source, exists = neighbors(scores, k, nodes.mask, loops=False)
        return source, exists if exists is None else exists & nodes.mask[:, :, None], None

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"k={self.k}, seed={self.seed}, symmetrize={self.symmetrize!r}, {super().extra_repr()}"


def _random_neighbors(seed: int, num_nodes: int, k: int, device: torch.device) -> tuple[Tensor]:
    return (neighbors(_random_scores(seed, num_nodes, device)[None], k, None, loops=False)[0],)


def _random_scores(seed: int, num_nodes: int, device: torch.device) -> Tensor:
    """Random integers [n, n] without ties in a row; those of the first nodes do not depend on how many follow."""
    number = torch.arange(num_nodes, device=device)
    row = _mix(_mix(number + 1) + _mix(torch.full_like(number, seed % 2**32)))
    return _mix(_mix(row[:, None] + _mix(number + 1)[None, :])) * 2**20 + number


def _mix(value: Tensor) -> Tensor:
    """Scrambles integers to 32 bits; products stay below 2**60, so nothing overflows, on any device."""
    for _ in range(2):
        value = value & 0xFFFFFFFF
        value = ((value ^ (value >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return value ^ (value >> 16)
