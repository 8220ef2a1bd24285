"""What gkd.graphs costs, beside the way of PyTorch Geometric that takes one image after the other.

All sides start from the same feature maps, with the same number of threads, and are timed in turns in one process. PyG's is what a
careful user writes with it today: neighbours by one matrix product and ``topk`` per image, ``to_undirected``, ``Data``,
``AddLaplacianEigenvectorPE``, ``Batch.from_data_list``. That transform stands there twice: as it is by default, which takes a general
eigensolver, and with ``is_undirected=True``, which takes the symmetric one and is right for these graphs. Neither has a gradient through
the eigenvectors, so its forward stands beside our forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from measure import Run, in_child, machine, peak_memory, time_in_turns, timed, write_json
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import AddLaplacianEigenvectorPE
from torch_geometric.utils import to_undirected

from gkd.graphs import ChannelNodes, CompleteEdges, GraphBuilder, KNNEdges, LaplacianEncoding
from gkd.graphs.builder import build_batch

__all__ = ["GraphBenchmark"]

PYG, SYMMETRIC = "PyG", "PyG, symmetric"
PRELOAD = ("gkd.graphs", "torch_geometric.transforms", "scipy.sparse.linalg")


class Setting(NamedTuple):
    """The sizes of one row."""

    images: int
    channels: int
    grid: int
    num_eig: int
    k: int
    device: str


def feature_maps(setting: Setting, gradient: bool = False) -> Tensor:
    """Feature maps as after a ReLU, the same in every process."""
    shape = (setting.images, setting.channels, setting.grid, setting.grid)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    return values.to(setting.device).requires_grad_(gradient)


# gkd: all images at once.


def gkd_batch(setting: Setting) -> Run:
    nodes = ChannelNodes()(feature_maps(setting))
    edges = KNNEdges(k=setting.k)(nodes)
    return lambda: build_batch(nodes, edges)


def gkd_graph(edges: torch.nn.Module, encoding: bool, backward: bool, setting: Setting) -> Run:
    features = feature_maps(setting, gradient=backward)
    builder = GraphBuilder(ChannelNodes(), edges, LaplacianEncoding(setting.num_eig, sign=None) if encoding else None)

    def run() -> None:
        graph = builder(features)
        if backward:
            torch.autograd.grad(graph.pe.abs().sum(), features)

    return run


# PyG: one image after the other.


def pyg_batch(setting: Setting) -> Run:
    parts = [(graph.x, graph.edge_index, graph.edge_weight) for graph in map(_pyg_knn(setting.k), feature_maps(setting))]
    return lambda: Batch.from_data_list([Data(x=x, edge_index=index, edge_weight=weight) for x, index, weight in parts])


def _similarity(image: Tensor) -> tuple[Tensor, Tensor]:
    x = image.flatten(1)
    unit = torch.nn.functional.normalize(x, dim=1)
    return x, unit @ unit.t()


def _pyg_knn(k: int) -> Callable[[Tensor], Data]:
    def build(image: Tensor) -> Data:
        x, similarity = _similarity(image)
        weight, neighbour = similarity.fill_diagonal_(-1).topk(k, dim=1)
        node = torch.arange(len(x), device=x.device).repeat_interleave(k)
        index, weight = to_undirected(torch.stack([node, neighbour.flatten()]), weight.flatten(), reduce="max")
        return Data(x=x, edge_index=index, edge_weight=weight)

    return build


def _pyg_complete(image: Tensor) -> Data:
    x, similarity = _similarity(image)
    node = torch.arange(len(x), device=x.device)
    return Data(x=x, edge_index=torch.cartesian_prod(node, node).t(), edge_weight=similarity.flatten())


def pyg_graph(build: Callable[[Tensor], Data], transform: Callable[[Data], Data] | None, setting: Setting) -> Run:
    features = feature_maps(setting)

    def run() -> None:
        graphs = [build(image) for image in features]
        if transform is not None:
            graphs = [transform(graph.cpu()) for graph in graphs]  # SciPy solves on the CPU only
        Batch.from_data_list(graphs).to(setting.device)

    return run


def pyg_eigenpairs(build: Callable[[Setting], Callable[[Tensor], Data]]) -> dict[str, Callable[[Setting], Run]]:
    """PyG's sides of a row with eigenpairs: its transform as it is by default, and told that the graph is undirected."""

    def side(undirected: bool) -> Callable[[Setting], Run]:
        return lambda s: pyg_graph(build(s), AddLaplacianEigenvectorPE(s.num_eig, attr_name="pe", is_undirected=undirected), s)

    return {PYG: side(False), SYMMETRIC: side(True)}


def knn(setting: Setting) -> torch.nn.Module:
    return KNNEdges(k=setting.k, metric="cosine")


def complete(setting: Setting) -> torch.nn.Module:
    return CompleteEdges(nonnegative=True, self_loops=True)


KNN_PYG = pyg_eigenpairs(lambda s: _pyg_knn(s.k))
COMPLETE_PYG = pyg_eigenpairs(lambda s: _pyg_complete)

TASKS: dict[str, dict[str, Callable[[Setting], Run]]] = {
    "Batch alone": {"gkd": gkd_batch, PYG: pyg_batch},
    "kNN graph": {"gkd": lambda s: gkd_graph(knn(s), False, False, s), PYG: lambda s: pyg_graph(_pyg_knn(s.k), None, s)},
    "kNN + eigenpairs": {"gkd": lambda s: gkd_graph(knn(s), True, False, s), **KNN_PYG},
    "kNN + eigenpairs, backward": {"gkd": lambda s: gkd_graph(knn(s), True, True, s), **KNN_PYG},
    "complete + eigenpairs": {"gkd": lambda s: gkd_graph(complete(s), True, False, s), **COMPLETE_PYG},
    "complete + eigenpairs, backward": {"gkd": lambda s: gkd_graph(complete(s), True, True, s), **COMPLETE_PYG},
}


def memory_probe(task: str, side: str, setting: Setting, threads: int) -> float:
    """MiB that one run needs at its peak beyond what was there before; runs in a process of its own."""
    torch.set_num_threads(threads)
    TASKS[task][side](setting._replace(images=2, channels=2 * setting.num_eig))()  # load what is loaded on first use
    return peak_memory(TASKS[task][side](setting), setting.device)


def table(result: dict[str, Any]) -> str:
    """The rows as text. Times are per image, since the large PyG rows take fewer of them."""
    head = f"{'ms an image, peak MiB':32} {'n':>5} {'images':>7} {'gkd':>8} {'MiB':>5}"
    head += "".join(f" {side:>15} {'MiB':>5} {'ratio':>7}" for side in (PYG, SYMMETRIC))
    lines = [", ".join(f"{name} {value}" for name, value in result["machine"].items()), head, "-" * len(head)]
    for row in result["rows"]:
        ms, mib = row["ms_per_image"], row["peak_mib"]
        images = "/".join(str(number) for number in dict.fromkeys(row["images"].values()))
        line = f"{row['task']:32} {row['channels']:5} {images:>7} {ms['gkd']:8.3f} {mib['gkd']:5.0f}"
        lines.append(line + "".join(f" {ms[side]:15.3f} {mib[side]:5.0f} {ratio:6.1f}x" for side, ratio in row["ratio"].items()))
    lines.append(f"{PYG}: AddLaplacianEigenvectorPE as it is by default; symmetric: with is_undirected=True.")
    lines.append("backward: PyG has none through its eigenvectors; its forward stands beside our forward and backward.")
    return "\n".join(lines)


def images_of(task: str, side: str, channels: int, batch_size: int) -> int:
    """Images of a row: all of them up to 256 channels, then as many as keep a row within memory and minutes."""
    if channels <= 256 or task == "Batch alone":
        return batch_size
    fewer = batch_size * 256**2 // channels**2
    return max(1, fewer if side == "gkd" or "eigenpairs" not in task else fewer // 8)


@dataclass(frozen=True)
class GraphBenchmark:
    """Times graph building and spectra against PyG's way and prints one table.

    Args:
        batch_size: Images of a batch.
        channels: Numbers of channels, that is, of nodes.
        grid: Height and width of the feature maps.
        num_eig: Eigenpairs of each graph.
        k: Neighbours of each node.
        repeats: Timed runs of each row, whose median counts; a single one where a run of PyG takes over 10 seconds.
        threads: CPU threads of torch, the same on both sides.
        device: Where our side runs, and theirs but for the eigenvectors.
        output: JSON file of the result; None writes none.
    """

    batch_size: int = 64
    channels: Sequence[int] = (64, 128, 256, 512, 2048)
    grid: int = 8
    num_eig: int = 8
    k: int = 8
    repeats: int = 5
    threads: int = 2
    device: str = "cpu"
    output: str | None = "runs/benchmark/graphs.json"

    def run(self) -> dict[str, Any]:
        """Measures, prints the table and writes the JSON file.

        Returns:
            ``machine`` and ``rows``: task, channels, and by side images, ms_per_image, ratio (of it to gkd) and peak_mib.
        """
        torch.set_num_threads(self.threads)
        rows = []
        for task, sides in TASKS.items():
            for number in self.channels:
                settings = {
                    side: Setting(
                        images_of(task, side, number, self.batch_size),
                        number,
                        self.grid,
                        min(self.num_eig, number - 2),
                        min(self.k, number - 1),
                        self.device,
                    )
                    for side in sides
                }
                runs = {side: make(settings[side]) for side, make in sides.items()}
                once = timed(runs[PYG], self.device)
                seconds = time_in_turns(runs, self.repeats if once < 10 else 1, self.device)
                per_image = {side: 1000 * seconds[side] / settings[side].images for side in sides}
                rows.append(
                    {
                        "task": task,
                        "channels": number,
                        "images": {side: settings[side].images for side in sides},
                        "ms_per_image": per_image,
                        "ratio": {side: per_image[side] / per_image["gkd"] for side in sides if side != "gkd"},
                        "peak_mib": {
                            side: in_child(memory_probe, task, side, settings[side], self.threads, preload=PRELOAD) for side in sides
                        },
                    }
                )
        result = {"machine": machine(self.device, self.threads), "options": asdict(self), "rows": rows}
        print(table(result))
        write_json(result, self.output)
        return result
