"""Graphs without distillation: the patches of feature maps as a batch of PyG, their spectrum, and a PyG layer on top.

python examples/graphs_alone.py
"""

import torch
from torch_geometric.nn import GCNConv

from gkd.graphs import GraphBuilder, HeatKernelEncoding, KNNEdges, PatchNodes, eigenmaps, laplacian

torch.manual_seed(0)
features = torch.randn(4, 64, 14, 14).relu()  # of four images, from any network

build = GraphBuilder(PatchNodes(grid=7), KNNEdges(k=6), HeatKernelEncoding())
graph = build(features)
print(graph)

matrix, mask = laplacian(graph)
eigval, eigvec = eigenmaps(matrix, num_eig=4, mask=mask)
print("lowest eigenvalues of every image's graph, the trivial one left out:")
print(eigval)

# What stands in the batch is what PyG's layers read: weights above 0, and the heat kernel's signature of every node.
layer = GCNConv(64 + graph.pe.shape[1], 16)
out = layer(torch.cat([graph.x, graph.pe], dim=1), graph.edge_index, graph.edge_weight)
print("out of a GCN layer:", tuple(out.shape))
