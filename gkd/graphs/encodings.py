from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import BaseTransform

from gkd.graphs.arguments import one_of, positive_integer
from gkd.graphs.dense import from_padded, to_dense
from gkd.graphs.heat import as_times, heat_diagonal, heat_kernel_signature
from gkd.graphs.laplacian import Normalization, check_normalization, check_weights, connected, laplacian
from gkd.graphs.precision import full_precision
from gkd.graphs.similarity import power_of_two
from gkd.graphs.spectral import Method, check_method, eigenmaps

Sign = Literal["random", "abs"] | None


class LaplacianEncoding(nn.Module):
    r"""Places every node by the lowest non-trivial Laplacian eigenvectors of its graph.

    .. math:: p_i = (u_1(i), \dots, u_q(i)), \qquad L u_k = \lambda_k u_k, \qquad \lambda_k > 0

    The whole kernel is dropped: one vector for every component of the graph. A graph that has fewer pairs gets zeros in the last columns.
    An eigenvector has no sign, and a repeated eigenvalue no basis, so this encoding is one of several equal ones. ``sign`` says what to
    do about the first; :class:`HeatKernelEncoding` and :class:`RandomWalkEncoding` know neither problem.

    Args:
        num_eig: Number of eigenvectors q.
        normalization: Laplacian: ``'sym'``, ``'rw'`` or None.
        method: Solver, see :func:`~gkd.graphs.spectral.eigenmaps`.
        sign: ``'random'``: in training every vector of every graph gets a random sign, so that what follows learns to do without it;
            in eval the sign is the solver's. ``'abs'``: absolute values, which have no sign and no longer tell the two ends of a path
            apart. None: the sign is the solver's.
        seed: Seed of the module's own generator of signs. Its state is part of ``state_dict()``; in the worker processes of a
            :class:`~torch.utils.data.DataLoader` it starts from the worker's seed instead, or all of them would draw alike.

    Shapes:
        - **graph** with N nodes; **output** [N, q]

    Gradient:
        Flows to ``edge_weight``; finite also at repeated eigenvalues.

    Raises:
        ValueError: If ``num_eig`` is below 1 or ``sign`` unknown.

    References:
        Dwivedi et al.: Benchmarking Graph Neural Networks, JMLR 2023.

    Examples:
        >>> from gkd.graphs.testing import path_graph
        >>> LaplacianEncoding(num_eig=2, sign="abs")(path_graph(3))[0]
        tensor([0.7071, 0.5000])
    """

    def __init__(
        self, num_eig: int = 8, normalization: Normalization = "sym", method: Method = "auto", sign: Sign = "random", seed: int = 0
    ) -> None:
        super().__init__()
        one_of(sign, ("random", "abs", None), "sign")
        check_method(method)
        check_normalization(normalization)
        self.num_eig = positive_integer(num_eig, "num_eig")
        self.normalization: Normalization = normalization
        self.method: Method = method
        self.sign: Sign = sign
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._worker_seed: int | None = None

    def forward(self, graph: Data) -> Tensor:
        """Returns the encoding of every node, see the class."""
        _, eigvec = eigenmaps(graph, self.num_eig, method=self.method, normalization=self.normalization)
        if self.sign == "random" and self.training:
            eigvec = eigvec * self._random_signs(eigvec)
        if self.sign == "abs":
            eigvec = eigvec.abs()
        return from_padded(eigvec, graph)

    def _random_signs(self, eigvec: Tensor) -> Tensor:
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self._generator.manual_seed(worker.seed + self.seed)
        bits = torch.randint(0, 2, (eigvec.size(0), 1, eigvec.size(2)), generator=self._generator)
        return (2 * bits - 1).to(eigvec)

    def get_extra_state(self) -> Tensor:
        """Returns the state of the generator of signs, so that a resumed training draws what an uninterrupted one would."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Sets the state of the generator of signs."""
        self._generator.set_state(state.cpu())

    def extra_repr(self) -> str:
        """Says what was asked for."""
        return f"num_eig={self.num_eig}, normalization={self.normalization!r}, method={self.method!r}, sign={self.sign!r}"


class HeatKernelEncoding(nn.Module):
    r"""Describes every node by the heat that stays on it at several times, the heat kernel signature.

    .. math:: p_i(t) = \left( e^{-t L} \right)_{ii} = \sum_k e^{-t \lambda_k} u_k(i)^2

    Unchanged by signs of eigenvectors and bases of eigenspaces, and blind to symmetry: nodes that an automorphism exchanges are equal.

    Args:
        num_eig: None: the whole sum, by matrix products alone, which compile and never wait for a GPU. A number: the sum over so many
            lowest pairs, the kernel among them, for graphs too large for that. A cut inside an eigenspace leaves it to the solver
            which part of it is kept.
        times: Diffusion times: small ones see the neighbourhood, large ones the whole graph. Times that are halves of each other share
            work; the default suits the eigenvalues 0 to 2 of the normalised Laplacian.
        normalization: Laplacian: ``'sym'`` or None; ``'rw'`` has the diagonal of ``'sym'``.
        method: Solver of the lowest pairs, see :func:`~gkd.graphs.spectral.eigenmaps`.

    Shapes:
        - **graph** with N nodes; **output** [N, len(times)] in [0, 1]

    Gradient:
        Flows to ``edge_weight``. Of the whole sum it is exact whatever eigenvalues repeat; with ``num_eig`` it is that of
        :func:`~gkd.graphs.heat.heat_kernel_signature`.

    Raises:
        ValueError: If ``num_eig`` is below 1, or ``times`` is empty or has a negative or infinite entry.

    References:
        Sun, Ovsjanikov, Guibas: A Concise and Provably Informative Multi-Scale Signature Based on Heat Diffusion, SGP 2009.

    Examples:
        >>> from gkd.graphs.testing import complete_graph
        >>> HeatKernelEncoding(times=(0.0, 64.0))(complete_graph(4))[0]  # at first all of it, at last a fair share
        tensor([1.0000, 0.2500])
    """

    def __init__(
        self,
        num_eig: int | None = None,
        times: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        normalization: Normalization = "sym",
        method: Method = "auto",
    ) -> None:
        super().__init__()
        if num_eig is not None:
            positive_integer(num_eig, "num_eig")
        check_method(method)
        check_normalization(normalization)
        self.num_eig = num_eig
        self.times = as_times(times)
        self.normalization: Normalization = "sym" if normalization == "rw" else normalization
        self.method: Method = method

    def forward(self, graph: Data) -> Tensor:
        """Returns the encoding of every node, see the class."""
        if self.num_eig is None:
            L, mask = laplacian(graph, self.normalization)
            heat = heat_diagonal(L, self.times, mask, bound=None if self.normalization is None else 2.0)
        else:
            eigval, eigvec = eigenmaps(graph, self.num_eig, method=self.method, normalization=self.normalization, drop_trivial=False)
            heat = heat_kernel_signature(eigval, eigvec, self.times)
        return from_padded(heat, graph)

    def extra_repr(self) -> str:
        """Says what was asked for."""
        times = ", ".join(f"{time:g}" for time in self.times)
        return f"num_eig={self.num_eig}, times=({times}), normalization={self.normalization!r}, method={self.method!r}"


class RandomWalkEncoding(nn.Module):
    r"""Describes every node by the probability that a random walk is back after 1, 2, ... steps.

    .. math:: p_i(k) = \left( (D^{-1} A)^k \right)_{ii}

    Matrix products only: it compiles and never waits for a GPU. A walk that reaches a node without an edge ends there, so an isolated
    node has zeros. On graphs of unit weights this is PyG's ``AddRandomWalkPE``; on others it differs, since that one lets a step go to
    any neighbour alike, and this one goes by the weights.

    Args:
        walk_length: Number of steps.

    Shapes:
        - **graph** with N nodes; **output** [N, walk_length] in [0, 1]

    Gradient:
        Flows to ``edge_weight``; finite also where a node has no edge.

    Raises:
        ValueError: If ``walk_length`` is below 1.

    References:
        Dwivedi et al.: Graph Neural Networks with Learnable Structural and Positional Representations, ICLR 2022.

    Examples:
        >>> from gkd.graphs.testing import path_graph
        >>> RandomWalkEncoding(walk_length=4)(path_graph(3))
        tensor([[0.0000, 0.5000, 0.0000, 0.5000],
                [0.0000, 1.0000, 0.0000, 1.0000],
                [0.0000, 0.5000, 0.0000, 0.5000]])
    """

    def __init__(self, walk_length: int = 8) -> None:
        super().__init__()
        self.walk_length = positive_integer(walk_length, "walk_length")

    def forward(self, graph: Data) -> Tensor:
        """Returns the encoding of every node, see the class."""
        A, _ = to_dense(graph)
        return from_padded(return_probabilities(A, self.walk_length), graph)

    def extra_repr(self) -> str:
        """Says what was asked for."""
        return f"walk_length={self.walk_length}"


def return_probabilities(A: Tensor, walk_length: int) -> Tensor:
    r"""Gives the probability that a walk along the rows of A is back after 1, 2, ... steps.

    Args:
        A: Adjacencies that are not negative.
        walk_length: Number of steps.

    Shapes:
        - **A** [B, N, N]; **output** [B, N, walk_length]

    Examples:
        >>> return_probabilities(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), walk_length=2)
        tensor([[[0., 1.],
                 [0., 1.]]])
    """
    check_weights(A)
    A = A / power_of_two(A)  # a walk does not see a common factor
    degree = A.sum(dim=-1, keepdim=True)
    step = A / degree.where(connected(degree), torch.ones_like(degree))
    back = [step.diagonal(dim1=1, dim2=2)]
    walk = shorter = step
    with full_precision(A):
        for length in range(2, walk_length + 1):
            # The diagonal of P^(a+b) needs P^a and P^b alone: half of the products.
            if length % 2 == 0:
                shorter = walk
            else:
                walk = walk @ step
            back.append((walk * shorter.transpose(1, 2)).sum(dim=-1))
    return torch.stack(back, dim=-1)


class AddEncoding(BaseTransform):
    """Adds an encoding to the nodes of a graph: the transform that makes a PyG pipeline use one of gkd's encodings.

    It takes the place of ``AddLaplacianEigenvectorPE`` and ``AddRandomWalkPE``. On a :class:`~torch_geometric.data.Batch` every graph
    is encoded for itself, all of them at once and on the device where they are, and ``to_data_list()`` gives each its part.
    The graph that was passed in stays as it was.

    Args:
        encoding: Module from a graph to a row for every node. It is used as it is: call its ``eval()`` for what it does outside training.
        attr_name: Attribute that holds the encoding; None appends it to ``x``.

    Gradient:
        Flows through the encoding.

    Raises:
        ValueError: If the encoding does not give one row per node.

    Examples:
        >>> import torch_geometric.transforms as T
        >>> from gkd.graphs.testing import cycle_graph
        >>> transform = T.Compose([T.AddSelfLoops("edge_weight"), AddEncoding(RandomWalkEncoding(walk_length=4))])
        >>> transform(cycle_graph(6)).pe.shape
        torch.Size([6, 4])
    """

    def __init__(self, encoding: Callable[[Data], Tensor], attr_name: str | None = "pe") -> None:
        self.encoding = encoding
        self.attr_name = attr_name

    def forward(self, graph: Data) -> Data:
        """Returns the graph with its encoding, see the class."""
        pe = self.encoding(graph)
        if pe.dim() != 2 or pe.size(0) != graph.num_nodes:
            raise ValueError(f"Expected an encoding of shape [{graph.num_nodes}, num_features] (got {list(pe.shape)})")
        if self.attr_name is None and graph.x is not None:
            x = graph.x if graph.x.dim() > 1 else graph.x.unsqueeze(-1)
            dtype = x.dtype if x.is_floating_point() else pe.dtype
            graph.x = torch.cat([x.to(dtype), pe.to(dtype)], dim=-1)
            return graph
        return add_attribute(graph, self.attr_name or "x", pe)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.encoding!r}, attr_name={self.attr_name!r})"


def add_attribute(graph: Data, name: str, value: Tensor, like: str = "x") -> Data:
    """Gives a graph one more value per node or edge; a Batch also learns where it belongs, so that taking the batch apart keeps it.

    Args:
        graph: A graph or a batch; changed in place, except for the tables of slices, which a shallow copy may share.
        name: Name of the attribute.
        value: A row for every node or edge.
        like: An attribute that is divided among the graphs in the same way.
    """
    graph[name] = value
    slices = getattr(graph, "_slice_dict", None)
    if isinstance(graph, Batch) and slices is not None:
        parts = slices[like] if like in slices else graph.ptr.cpu()
        graph._slice_dict = {**slices, name: parts}
        graph._inc_dict = {**graph._inc_dict, name: torch.zeros(parts.numel() - 1, dtype=torch.long)}
    return graph
