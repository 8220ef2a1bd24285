"""Draws what nodes and edges mean, on scikit-learn's real digits: the picture of gkd/graphs/README.md.

    python projects/graphs_gallery/draw.py [gkd/graphs/gallery.png]

Ten seconds on one core. The network is one layer of fixed filters, so that the picture needs no training and always comes out the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torchvision.ops import roi_align

from gkd.graphs import (
    AttentionEdges,
    ChannelNodes,
    CompleteEdges,
    GraphBuilder,
    GridEdges,
    InstanceNodes,
    KNNEdges,
    LaplacianEncoding,
    PatchNodes,
    RadiusEdges,
    RandomEdges,
    RegionNodes,
)

EDGES: dict[str, nn.Module] = {
    "KNNEdges(k=4)": KNNEdges(k=4),
    "RadiusEdges(0.3)": RadiusEdges(0.3, metric="cosine"),
    "CompleteEdges()": CompleteEdges(),
    "GridEdges(8)": GridEdges(neighbors=8),
    "AttentionEdges(k=4)": AttentionEdges(k=4, temperature=0.2),
    "RandomEdges(k=4)": RandomEdges(k=4, seed=0),
}
COLORS = mpl.colormaps["coolwarm"]
INK = "#30343b"


def directions(images: Tensor, number: int = 16, size: int = 7) -> Tensor:
    """What a first layer of a network sees: how strongly brightness rises in each of 16 directions. [B, 1, 8, 8] -> [B, 16, 8, 8]"""
    angle = 2 * torch.pi * torch.arange(number)[:, None, None] / number
    axis = torch.linspace(-1.5, 1.5, size)
    along = axis * angle.cos() + axis[:, None] * angle.sin()
    filters = along * torch.exp(-(axis.square() + axis[:, None].square()))
    large = F.interpolate(images, scale_factor=3, mode="bicubic")
    return F.avg_pool2d(F.conv2d(large, filters[:, None], padding=size // 2).relu(), 3)


def digits(classes: tuple[int, ...], each: int) -> Tensor:
    images, labels = load_digits(return_X_y=True)
    chosen = np.concatenate([np.flatnonzero(labels == label)[:each] for label in classes])
    return torch.from_numpy(images[chosen]).float().view(-1, 1, 8, 8) / 16


def scene() -> tuple[Tensor, Tensor]:
    """Digits of three classes on one canvas, and the boxes around them."""
    corners = [(2, 3), (14, 1), (27, 3), (1, 15), (14, 13), (28, 16), (3, 28), (15, 26), (27, 28)]
    order = [0, 3, 6, 4, 1, 7, 8, 5, 2]  # classes apart
    canvas, boxes = torch.zeros(1, 1, 38, 38), []
    for image, place in zip(digits((0, 1, 7), 3), order, strict=True):
        x, y = corners[place]
        canvas[0, 0, y : y + 8, x : x + 8] = image[0]
        boxes.append([x - 1, y - 1, x + 9, y + 9])
    return canvas, torch.tensor(boxes, dtype=torch.float32)


def around_a_circle(graph: Data) -> np.ndarray:
    """Nodes on a circle, related ones side by side: by the angle of the first two eigenvectors."""
    u = LaplacianEncoding(num_eig=2, sign=None)(graph).numpy()
    rank = np.argsort(np.argsort(np.arctan2(u[:, 1], u[:, 0])))
    angle = 2 * np.pi * rank / len(rank)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def draw_edges(axes: Axes, graph: Data, place: np.ndarray, width: float) -> None:
    weight = graph.edge_weight.numpy()
    lines = place[graph.edge_index.t().numpy()]
    strength = weight / weight.max(initial=1e-12)
    dense = min(1.0, 5 * len(place) / max(int((weight > 0).sum()), 1))
    color = np.tile(np.array(mpl.colors.to_rgba(INK)), (len(weight), 1))
    color[:, 3] = np.where(weight > 0, (0.1 + 0.6 * strength) * dense, 0)
    axes.add_collection(LineCollection(list(lines), colors=list(map(tuple, color)), linewidths=width * (0.4 + strength), zorder=1))


def node_colors(graph: Data) -> np.ndarray:
    value = graph.pe[:, 0].numpy()
    largest = value[np.abs(value).argmax()]  # of any sign: an eigenvector has none, a picture that comes out the same needs one
    value = value / (largest or 1)
    return COLORS(0.5 + 0.5 * np.sign(value) * np.sqrt(np.abs(value)))  # the root also tells small values from 0


def draw_thumbnails(axes: Axes, graph: Data, place: np.ndarray, pictures: np.ndarray, zoom: float) -> None:
    draw_edges(axes, graph, place, 0.9)
    for picture, spot, color in zip(pictures, place, node_colors(graph), strict=True):
        style = {"edgecolor": color, "linewidth": 2.2, "boxstyle": "square,pad=0.06"}
        axes.add_artist(AnnotationBbox(OffsetImage(picture, zoom=zoom, cmap="gray_r"), spot, pad=0, bboxprops=style))
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25))


def draw_on_image(axes: Axes, graph: Data, image: np.ndarray, boxes: np.ndarray | None) -> None:
    axes.imshow(image, cmap="gray_r", extent=(0, 1, 1, 0), alpha=0.25 if boxes is None else 0.6, vmin=0, vmax=1)
    place = graph.pos[:, :2].numpy()
    draw_edges(axes, graph, place, 1.0)
    colors = node_colors(graph)
    axes.scatter(place[:, 0], place[:, 1], s=34 if boxes is None else 46, c=colors, edgecolors=INK, linewidths=0.5, zorder=2)
    for box, color in zip([] if boxes is None else boxes / len(image), colors, strict=False):
        axes.add_patch(Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, edgecolor=color, linewidth=1.8, zorder=1.5))
    axes.set(xlim=(-0.03, 1.03), ylim=(1.03, -0.03))


def columns() -> dict[str, tuple[nn.Module, tuple[Any, ...], Callable[[Axes, Data], None]]]:
    """For each node class: the module, what it is called with and how its graph is drawn."""
    image = digits((3,), 1)
    some = digits((0, 1, 7), 7)
    canvas, boxes = scene()
    maps, many, wide = directions(image), directions(some), directions(canvas)

    def circled(nodes: nn.Module, features: Tensor, pictures: Tensor, zoom: float) -> Callable[[Axes, Data], None]:
        place = around_a_circle(GraphBuilder(nodes, CompleteEdges())(features))
        return lambda axes, graph: draw_thumbnails(axes, graph, place, pictures.numpy(), zoom)

    channel, instance = ChannelNodes(), InstanceNodes()
    return {
        "ChannelNodes\n16 channels of one digit": (channel, (maps,), circled(channel, maps, maps[0], 1.5)),
        "PatchNodes\n6 x 6 places of one digit": (
            PatchNodes(grid=6),
            (maps,),
            lambda axes, graph: draw_on_image(axes, graph, image[0, 0].numpy(), None),
        ),
        "InstanceNodes\n21 digits: 0, 1, 7": (instance, (many,), circled(instance, many, some[:, 0], 1.35)),
        "RegionNodes\n9 boxes in one image": (
            RegionNodes(roi_align, output_size=4),
            (wide, [boxes], (38, 38)),
            lambda axes, graph: draw_on_image(axes, graph, canvas[0, 0].numpy(), boxes.numpy()),
        ),
    }


def draw(output: Path) -> None:
    cells = columns()
    figure, grid = plt.subplots(len(EDGES), len(cells), figsize=(9.6, 14), dpi=96, layout="constrained")
    for axes, node_name in zip(grid[0], cells, strict=True):
        axes.set_title(node_name, fontsize=12, color=INK)
    for row, (edge_name, edges) in zip(grid, EDGES.items(), strict=True):
        row[0].set_ylabel(edge_name, fontsize=12, color=INK)
        for axes, (nodes, inputs, draw_graph) in zip(row, cells.values(), strict=True):
            axes.set_aspect("equal")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            try:
                graph = GraphBuilder(nodes, edges, LaplacianEncoding(num_eig=1, sign=None))(*inputs)
            except ValueError:  # these nodes have no grid
                axes.text(0.5, 0.5, "no grid", transform=axes.transAxes, ha="center", color="#9aa0a6", fontsize=11)
                continue
            draw_graph(axes, graph)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(output, optimize=True)
    plt.close(figure)


if __name__ == "__main__":
    default = Path(__file__).parents[2] / "gkd" / "graphs" / "gallery.png"
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
