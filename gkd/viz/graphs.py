"""Pictures of graphs: the student's and the teacher's side by side, and their spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gkd.graphs.dense import to_dense
from gkd.graphs.laplacian import laplacian
from gkd.graphs.spectral import Spectrum, eigenmaps
from gkd.viz.style import INK, LINE, MUTED, STUDENT, TEACHER, bare, grid_of, styled, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch_geometric.data import Data

EDGES_PER_NODE, MAX_EDGES = 6, 800  # of a dense graph the strongest edges are drawn: more strokes are a grey cloud
TIE = 0.05  # strength, beside the graph's mean degree, of what holds components together in a drawing


def spectral_layout(graph: Data) -> Tensor:
    r"""Places every node by the first two eigenvectors of its graph that are not trivial, each stretched to [-1, 1].

    Components would lie on one point, and an isolated node anywhere. All pairs are therefore tied weakly: with the mean degree
    :math:`\bar d` the layout is that of :math:`A + 0.05 \, \bar d / n`.

    Args:
        graph: A graph or a batch.

    Shapes:
        - **output** [B, n, 2], padded nodes at 0
    """
    A, mask = to_dense(graph)
    A = (A + A.mT).detach().double() / 2
    exists = (mask.unsqueeze(1) & mask.unsqueeze(2)).double()
    count = mask.sum(dim=1).clamp(min=1).view(-1, 1, 1)
    degree = (A * exists).sum(dim=(1, 2), keepdim=True) / count
    L, _ = laplacian(A + exists * (TIE * degree / count).clamp(min=1e-9), mask=mask)
    place = eigenmaps(L, num_eig=2, mask=mask)[1]
    return place / place.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)


def align(place: Tensor, reference: Tensor) -> Tensor:
    """Turns and mirrors a layout so that its nodes come near those of another, as eigenvectors have no sign and may be exchanged.

    Shapes:
        - **place**, **reference**, **output** [n, 2]
    """
    u, _, v = torch.linalg.svd(place.T @ reference)
    return place @ u @ v


@styled
def draw_graph_pair(
    student_graph: Data,
    teacher_graph: Data,
    images: Tensor | None = None,
    number: int = 3,
    titles: Sequence[str] = (),
) -> Figure:
    """Draws the student's graphs and the teacher's side by side, a row for each of the first images.

    Nodes lie where their spectral embedding puts them; the student's is turned towards the teacher's where they have equally many
    nodes. An edge is the stronger the wider and darker it is; of a dense graph the strongest are drawn, six for
    each node. A node has the same colour in all panels of its row: that of its place in the image where nodes have places, that of its
    place in the teacher's drawing otherwise.

    Args:
        student_graph: The student's graphs.
        teacher_graph: The teacher's, equally many.
        images: In [0, 1]; drawn beside the graphs with the nodes at their places. Where one graph has a node for each image, the nodes are
            the images.
        number: Of rows, at most.
        titles: Of the rows.

    Shapes:
        - **images** [B, C, H, W]
    """
    singles = [_split(graph, number) for graph in (student_graph, teacher_graph)]
    rows = min(map(len, singles))
    count = singles[0][0].num_nodes if rows else 0
    thumbnails = _pictures(images) if images is not None and rows == 1 and len(images) == count and count > 1 else None
    beside = images is not None and thumbnails is None and len(images) >= rows
    columns = 3 if beside else 2
    side = 3.9 if thumbnails is not None else 2.35
    figure, panels = grid_of(max(rows, 1) * columns, columns, side, side * 1.04)
    for row in range(rows):
        student, teacher = singles[0][row], singles[1][row]
        axes = panels[row * columns : (row + 1) * columns]
        place, target = spectral_layout(student)[0], spectral_layout(teacher)[0]
        place = align(place, target) if place.shape == target.shape else place
        colors = [_colors(graph, target if graph.num_nodes == len(target) else place) for graph in (student, teacher)]
        if beside and images is not None:
            _draw_image(axes[0], _pictures(images[row : row + 1])[0], teacher, colors[1])
            axes[0].set_title(titles[row] if row < len(titles) else f"image {row + 1}")
        for axis, graph, spot, color, name in zip(
            axes[-2:], (student, teacher), (place, target), colors, ("student", "teacher"), strict=True
        ):
            _draw_graph(axis, graph, spot.numpy(), color, thumbnails)
            if row == 0:
                axis.set_title(name, color=STUDENT if name == "student" else TEACHER)
    for panel in panels:
        bare(panel)
        if rows == 0:
            panel.text(0.5, 0.5, "no graph", ha="center", color=MUTED, transform=panel.transAxes)
    return figure


@styled
def draw_spectra(student_graph: Data, teacher_graph: Data, number: int = 3, num_eig: int = 24, titles: Sequence[str] = ()) -> Figure:
    """Draws the lowest eigenvalues of the normalised Laplacians of student and teacher, a panel for each of the first images.

    Args:
        student_graph: The student's graphs.
        teacher_graph: The teacher's.
        number: Of panels, at most.
        num_eig: Eigenvalues, at most.
        titles: Of the panels.
    """
    pairs = list(zip(_split(student_graph, number), _split(teacher_graph, number), strict=False))
    figure, panels = grid_of(max(len(pairs), 1), 3, 2.55, 2.1)
    for row, (panel, pair) in enumerate(zip(panels, pairs, strict=False)):
        for graph, color, name, marker in zip(pair, (STUDENT, TEACHER), ("student", "teacher"), ("o", "s"), strict=True):
            count = min(num_eig, graph.num_nodes)
            eigval = Spectrum(graph).eigenmaps(count, drop_trivial=False)[0][0].detach().numpy()
            panel.plot(range(1, count + 1), eigval, color=color, label=name, marker=marker, markersize=3, linewidth=1)
        panel.set_title(titles[row] if row < len(titles) else f"image {row + 1}" if len(pairs) > 1 else "eigenvalues")
        panel.set_ylim(bottom=-0.04)
        panel.set_xlabel("eigenvalue number")
        whole_ticks(panel)
    if pairs:
        panels[0].legend(loc="lower right")
    return figure


def _split(graph: Data, number: int) -> list[Data]:
    """The first graphs of a batch, without edges of weight 0."""
    from torch_geometric.data import Data

    count = getattr(graph, "num_graphs", 1)
    singles = [graph.get_example(position) for position in range(min(count, number))] if hasattr(graph, "get_example") else [graph]
    pruned = []
    for single in singles:
        weight = single.get("edge_weight")
        weight = torch.ones(single.edge_index.size(1)) if weight is None else weight.detach().float()
        keep = weight != 0
        pruned.append(
            Data(
                edge_index=single.edge_index[:, keep].cpu(),
                edge_weight=weight[keep].cpu(),
                pos=None if single.get("pos") is None else single.pos.detach().cpu(),
                num_nodes=single.num_nodes,
            )
        )
    return pruned


def _strongest(graph: Data) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of nodes [E, 2] with their weight in units of the largest, weak ones first; both directions are one edge, by their mean."""
    A = to_dense(graph)[0][0]
    A = ((A + A.mT) / 2).triu(diagonal=1)
    pairs = A.nonzero()
    weight = A[pairs[:, 0], pairs[:, 1]]
    order = weight.argsort()[-min(EDGES_PER_NODE * len(A), MAX_EDGES) :]
    return pairs[order].numpy(), (weight[order] / weight.max().clamp(min=1e-12) if len(order) else weight).clamp(0, 1).numpy()


def _colors(graph: Data, place: Tensor) -> np.ndarray:
    """A colour for every node: hue by the direction from the middle, paler near it."""
    from matplotlib.colors import hsv_to_rgb

    spot = place.double() if graph.pos is None else 2 * graph.pos[:, :2].double() - 1
    hue = (torch.atan2(spot[:, 1], spot[:, 0]) / (2 * torch.pi)) % 1
    far = spot.norm(dim=1)
    saturation = 0.25 + 0.6 * far / far.max().clamp(min=1e-12)
    return hsv_to_rgb(torch.stack((hue, saturation, torch.full_like(hue, 0.86)), dim=1).numpy())


def _draw_graph(axes: Axes, graph: Data, place: np.ndarray, colors: np.ndarray, thumbnails: np.ndarray | None) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    pairs, strength = _strongest(graph)
    crowd = min(1.0, (3 * len(place) / max(len(pairs), 1)) ** 0.5)  # the more edges a node has the fainter each
    color = np.empty((len(pairs), 4))
    color[:, :3] = to_rgb(INK)
    color[:, 3] = (0.06 + 0.7 * strength**2) * crowd
    width = (0.3 + 1.6 * strength) * crowd**0.5
    axes.add_collection(LineCollection(list(place[pairs]), colors=list(map(tuple, color)), linewidths=width, zorder=1, clip_on=False))
    if thumbnails is None:
        size = float(np.clip(1400 / max(len(place), 1), 8, 55))
        axes.scatter(place[:, 0], place[:, 1], s=size, c=colors, edgecolors=INK, linewidths=0.5, zorder=2)
    else:
        for picture, spot, edge in zip(thumbnails, place, colors, strict=True):
            style = {"edgecolor": edge, "linewidth": 1.4, "boxstyle": "square,pad=0.04"}
            image = OffsetImage(picture, zoom=15 / picture.shape[0], cmap="gray", interpolation="nearest", norm=None)
            axes.add_artist(AnnotationBbox(image, tuple(spot), pad=0, bboxprops=style))
    axes.set(xlim=(-1.18, 1.18), ylim=(-1.18, 1.18), aspect="equal")


def _draw_image(axes: Axes, picture: np.ndarray, graph: Data, colors: np.ndarray) -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0), interpolation="nearest", alpha=0.85)
    if graph.pos is not None:
        place = graph.pos[:, :2].numpy()
        axes.scatter(place[:, 0], place[:, 1], s=26, c=colors, edgecolors=LINE, linewidths=0.6)
    axes.set(xlim=(0, 1), ylim=(1, 0))


def _pictures(images: Tensor) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, 3] or [B, H, W]."""
    pictures = images.detach().float().cpu().clamp(0, 1)
    return pictures.movedim(1, -1).numpy() if pictures.size(1) == 3 else pictures.mean(dim=1).numpy()
