"""A node and an edge of your own: checked, used in a builder, and bound in gin through `import`.

python examples/own_graph.py
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gkd.config import configure
from gkd.graphs import Edges, GraphBuilder, Nodes
from gkd.graphs.testing import check_gradients

__all__ = ["FullGaussianEdges", "RowNodes"]


class RowNodes(nn.Module):
    """Every row of a feature map is a node: x [B, h, C * w]."""

    def forward(self, features: Tensor) -> Nodes:
        """From maps [B, C, h, w]."""
        return Nodes(features.transpose(1, 2).flatten(2))


class FullGaussianEdges(nn.Module):
    """All pairs of nodes, weighed by exp(-d^2 / scale) of their distance; with an edge_index, those pairs."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, nodes: Nodes, edge_index: Tensor | None = None) -> Edges:
        """From nodes [B, n, d]; an edge_index [2, E] numbers the nodes of all graphs one after the other."""
        batch, count, _ = nodes.x.shape
        if edge_index is None:
            pairs = torch.combinations(torch.arange(count), with_replacement=False).t()
            pairs = torch.cat([pairs, pairs.flip(0)], dim=1)
            edge_index = (pairs[:, None] + count * torch.arange(batch)[:, None]).flatten(1)
        rows = nodes.x.flatten(0, 1)
        difference = rows[edge_index[0]] - rows[edge_index[1]]
        return Edges(edge_index, (-difference.square().mean(1) / self.scale).exp())


if __name__ == "__main__":
    torch.manual_seed(0)
    graph = GraphBuilder(RowNodes(), FullGaussianEdges())(torch.randn(2, 8, 6, 6))
    print(graph)
    check_gradients(lambda x: FullGaussianEdges()(Nodes(x)).edge_weight, torch.randn(1, 5, 3))

    # In gin: `import own_graph` makes the names in __all__ known, also in the cells of a sweep.
    sys.path.insert(0, str(Path(__file__).parent))
    recipe = Path("own_graph_recipe.gin")
    recipe.write_text(
        "import own_graph\nGraphBuilder.nodes = @RowNodes()\nGraphBuilder.edges = @FullGaussianEdges()\nFullGaussianEdges.scale = 2.0\n"
    )
    print(configure([str(recipe)]).build("GraphBuilder"))
    recipe.unlink()
