"""Feature maps become graphs, spectra and messages. Stands alone: needs torch and torch_geometric only."""

import warnings

with warnings.catch_warnings():
    # While it is imported, torch_geometric compiles two classes by what torch deprecates; nobody who imports gkd can change that.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    import torch_geometric.nn  # noqa: F401

from gkd.graphs.attention import AttentionEdges
from gkd.graphs.builder import GraphBuilder, prune
from gkd.graphs.dense import from_dense, from_padded, to_dense, to_padded
from gkd.graphs.edge_index import Edges
from gkd.graphs.edges import CompleteEdges, KNNEdges, RadiusEdges
from gkd.graphs.encodings import AddEncoding, HeatKernelEncoding, LaplacianEncoding, RandomWalkEncoding
from gkd.graphs.fixed_edges import GridEdges, RandomEdges
from gkd.graphs.heat import heat_diagonal, heat_kernel, heat_kernel_signature, heat_trace
from gkd.graphs.laplacian import laplacian
from gkd.graphs.lowrank import LowRank
from gkd.graphs.message import RelationalConv
from gkd.graphs.nodes import ChannelNodes, InstanceNodes, Nodes, PatchNodes, RegionNodes
from gkd.graphs.spectral import Spectrum, eigengap, eigenmaps
from gkd.graphs.stages import StageGraph

__all__ = [
    "AddEncoding",
    "AttentionEdges",
    "ChannelNodes",
    "CompleteEdges",
    "Edges",
    "GraphBuilder",
    "GridEdges",
    "HeatKernelEncoding",
    "InstanceNodes",
    "KNNEdges",
    "LaplacianEncoding",
    "LowRank",
    "Nodes",
    "PatchNodes",
    "RadiusEdges",
    "RandomEdges",
    "RandomWalkEncoding",
    "RegionNodes",
    "RelationalConv",
    "Spectrum",
    "StageGraph",
    "eigengap",
    "eigenmaps",
    "from_dense",
    "from_padded",
    "heat_diagonal",
    "heat_kernel",
    "heat_kernel_signature",
    "heat_trace",
    "laplacian",
    "prune",
    "to_dense",
    "to_padded",
]
