from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch_geometric.data import Data

from gkd.graphs.arguments import one_of
from gkd.graphs.dense import to_dense, to_padded
from gkd.graphs.edge_index import Edges
from gkd.graphs.eigen import Exact, Factored
from gkd.graphs.heat import Times, as_times, heat_diagonal, heat_kernel, heat_trace
from gkd.graphs.laplacian import Normalization, check_normalization, connected, inverse_sqrt, is_sparse, laplacian, node_degree
from gkd.graphs.layout import layout
from gkd.graphs.lowrank import LowRank
from gkd.graphs.perturbation import Gauge
from gkd.graphs.precision import full_precision
from gkd.graphs.similarity_edges import signed_weights
from gkd.graphs.subspace import Subspace
from gkd.graphs.values import readable

Method = Literal["auto", "exact", "lowrank", "subspace"]
# Node attributes that hold the factors of adjacencies with self-loops and without.
FACTOR = {True: "factor", False: "loopless_factor"}
_LARGE = 256  # nodes from which a sparse graph is cheaper by subspace iteration


def eigenmaps(
    graph: Data | Tensor,
    num_eig: int = 8,
    mask: Tensor | None = None,
    method: Method = "auto",
    normalization: Normalization = "sym",
    drop_trivial: bool = True,
    gauge: Gauge = "eigenspace",
    damping: float | None = None,
    init: Tensor | None = None,
    tolerance: float | None = None,
    max_iter: int = 60,
) -> tuple[Tensor, Tensor]:
    r"""Finds the lowest eigenpairs of the Laplacian of every graph: smooth coordinates for the nodes.

    .. math:: L u_k = \lambda_k u_k, \qquad \lambda_1 \le \lambda_2 \le \dots, \qquad U^\top U = I

    An eigenvector has no sign, and inside a repeated eigenvalue there is no basis: compare what does not depend on these, such as
    :math:`U U^\top`. Every component adds one zero eigenvalue, and ``drop_trivial`` drops them all. What is less
    than :math:`8 \epsilon N^{1/4}` of the largest eigenvalue (8e-6 for 256 nodes in float32) counts as zero; a component that hangs on
    by less needs float64. The outcome moves with the nodes when these are permuted.

    Args:
        graph: A graph, a batch of graphs, or Laplacians, which must be symmetric.
        num_eig: Number Q of pairs. A graph that has fewer is filled up with zero vectors, and its largest eigenvalue
            repeats (0 if it has none).
        mask: True where a node exists, for Laplacians. Whatever else they hold has no influence.
        method: 'exact' decomposes completely. 'lowrank' is for a graph with a node attribute ``factor`` [num_nodes, R] such that
            :math:`A = F F^\top`, in :math:`O(N R^2)`; it has no vectors for the eigenvalue 1 beyond the rank. 'subspace' iterates, for
            large sparse graphs. 'auto' takes 'lowrank' where R < N and the pairs fit, 'subspace' for sparse graphs of 256 nodes or
            more, and else 'exact'.
        normalization: Which Laplacian of a graph: 'sym', None (:math:`D - A`), or 'rw', whose eigenvectors are :math:`D^{-1/2} u` with
            those of 'sym' (so :math:`V^\top D V = I`; scikit-learn's spectral embedding).
        drop_trivial: Drop the kernel; otherwise it comes first.
        gauge: What the loss does not depend on, and where the gradient is therefore well defined. 'eigenspace': the basis of every
            eigenspace. 'block': the basis of all the kept vectors together, as for :math:`U U^\top`, which needs a gap only at the cut.
        damping: :math:`\epsilon` in units of the largest eigenvalue; None is 1e-4 in float32, 1e-8 in float64.
        init: Vectors that 'subspace' starts from, such as the last step's.
        tolerance: Residual at which 'subspace' stops, see :func:`~gkd.graphs.subspace.subspace_eigenmaps`.
        max_iter: Rounds after which 'subspace' stops.

    Shapes:
        - **graph** as Laplacians [B, N, N], **mask** [B, N], **init** [B, N, any]; **output** eigval [B, Q] ascending,
          eigvec [B, N, Q] in float32 or float64, rows of padded nodes zero

    Gradient:
        Of first-order perturbation theory with :math:`\delta / (\delta^2 + \epsilon^2)` for :math:`1 / \delta` at the difference
        :math:`\delta` of two eigenvalues. Pairs inside one eigenspace, and with gauge='block' inside the kept block, cancel in a loss
        that has the gauge's invariance, and are left out: the gradient is finite everywhere. Once differentiable.

    Raises:
        ValueError: If shapes or options are wrong, or (checked on the CPU, and elsewhere when the solver fails) a value is not finite.

    References:
        Belkin, Niyogi: Laplacian Eigenmaps for Dimensionality Reduction and Data Representation, Neural Computation 2003.

    Examples:
        >>> path = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
        >>> L, mask = laplacian(path)
        >>> eigval, eigvec = eigenmaps(L, num_eig=2, mask=mask)
        >>> eigval.round(decimals=3)
        tensor([[1., 2.]])
        >>> eigvec[0, :, 0].abs().round(decimals=3)  # (1, 0, -1) / sqrt(2), up to its sign
        tensor([0.7070, 0.0000, 0.7070])
    """
    check_method(method)
    if isinstance(graph, Tensor):
        if method == "lowrank":
            raise ValueError("Expected a graph with a node attribute 'factor' for method='lowrank' (got Laplacians)")
        if normalization == "rw":
            raise ValueError("Expected a graph for normalization='rw' (got Laplacians; these are taken as they are, and symmetric)")
        _check_symmetric(graph)
        solver = Subspace(graph, mask, None, init, tolerance, max_iter) if method == "subspace" else Exact(graph, mask)
        return solver.lowest(num_eig, drop_trivial, gauge, damping)
    if mask is not None:
        raise ValueError("Expected 'mask' with Laplacians only (got one beside a graph, which has its own)")
    return Spectrum(graph, normalization, method, damping, Iteration(init, tolerance, max_iter)).eigenmaps(num_eig, drop_trivial, gauge)


def eigengap(eigval: Tensor, min_eig: int = 1, max_eig: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Finds, in a window, the cut with the largest gap below the next eigenvalue: there the projector is best determined.

    .. math:: q = \arg\max_{m \le q \le M} \; \lambda_{q+1} - \lambda_q

    Nothing waits for a GPU: q stays a tensor. ``torch.arange(Q) < q[:, None]`` selects the columns before the cut; decompose with
    gauge='eigenspace' then, as gauge='block' takes its cut after the last column.

    Args:
        eigval: Eigenvalues, ascending, at least one more than the largest cut.
        min_eig: Smallest cut.
        max_eig: Largest cut; None is as large as possible.

    Shapes:
        - **eigval** [B, Q]; **output** cut [B] (the number of pairs before it), gap [B]

    Gradient:
        Flows from gap; the cut is an integer.

    Raises:
        ValueError: If the window is empty or there are not enough eigenvalues.

    Examples:
        >>> eigengap(torch.tensor([[0.1, 0.2, 0.9, 1.0]]))
        (tensor([2]), tensor([0.7000]))
    """
    if eigval.dim() != 2:
        raise ValueError(f"Expected 'eigval' of shape [num_graphs, num_eig] (got {list(eigval.shape)})")
    max_eig = eigval.size(1) - 1 if max_eig is None else max_eig
    if not 1 <= min_eig <= max_eig < eigval.size(1):
        raise ValueError(f"Expected 1 <= min_eig <= max_eig < {eigval.size(1)} eigenvalues (got {min_eig} and {max_eig})")
    gap, index = eigval[:, min_eig - 1 : max_eig + 1].diff(dim=1).max(1)
    return index + min_eig, gap


class Solver(Protocol):
    """What every method is, once it has looked at the graphs."""

    def lowest(
        self, num_eig: int = 8, drop_trivial: bool = True, gauge: Gauge = "eigenspace", damping: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns eigenvalues [B, num_eig] and eigenvectors [B, N, num_eig]."""


class Iteration(NamedTuple):
    """Options of the method 'subspace'."""

    init: Tensor | None = None
    tolerance: float | None = None
    max_iter: int = 60


class Spectrum:
    """A lazy view of one graph, or batch, that computes whatever is asked for once for all who ask.

    Losses take two of them. Where :attr:`lowrank` is not None, the adjacency is known by a factor, and whoever uses :meth:`propagate`,
    :meth:`laplacian_product`, :meth:`squared_distance`, :attr:`degree` and :meth:`eigenmaps` instead of :attr:`adjacency` and
    :attr:`laplacian` never writes down an n x n matrix. All pairs of a method come from one decomposition.

    Args:
        graph: A graph or a batch of graphs. It must not change while the view is in use.
        normalization: As in :func:`~gkd.graphs.laplacian`.
        method: As in :func:`eigenmaps`.
        damping: As in :func:`eigenmaps`.
        iteration: Options of the method 'subspace'.
        edges: What weighed the edges, such as :class:`~gkd.graphs.KNNEdges`; None if it is not known.

    Examples:
        >>> graph = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=2)
        >>> spectrum = Spectrum.of(graph)
        >>> spectrum.eigenmaps(num_eig=1)[0]
        tensor([[2.]])
        >>> spectrum.laplacian is spectrum.laplacian
        True
    """

    def __init__(
        self,
        graph: Data,
        normalization: Normalization = "sym",
        method: Method = "auto",
        damping: float | None = None,
        iteration: Iteration | None = None,
        edges: Callable[..., Edges] | None = None,
    ) -> None:
        check_method(method)
        check_normalization(normalization)
        self.normalization = normalization
        self.method = method
        self.damping = damping
        self.iteration = Iteration() if iteration is None else iteration
        self.edges = edges
        self._make: Callable[[], Data] = lambda: graph
        self._known: dict[Hashable, Any] = {"graph": graph}

    @classmethod
    def of(cls, graph: Data | Spectrum) -> Spectrum:
        """Returns a view as it is and wraps a graph."""
        return graph if isinstance(graph, Spectrum) else cls(graph)

    @classmethod
    def of_lowrank(
        cls, make: Callable[[], Data], x: Tensor, mask: Tensor, lowrank: LowRank, edges: Callable[..., Edges] | None = None
    ) -> Spectrum:
        """Makes a view of graphs that are known by their factor, with nodes x [B, N, d]; ``make`` builds the batch if it is asked for."""
        spectrum = cls.__new__(cls)
        spectrum.normalization, spectrum.method, spectrum.damping, spectrum.iteration = "sym", "auto", None, Iteration()
        spectrum.edges, spectrum._make = edges, make
        spectrum._known = {"x": x, "mask": mask, "lowrank": lowrank}
        return spectrum

    @property
    def graph(self) -> Data:
        """The graph or batch."""
        graph: Data = self._once("graph", self._make)
        return graph

    @property
    def x(self) -> Tensor:
        """Padded features of the nodes, ``[B, N, d]``."""
        x: Tensor = self._once("x", lambda: to_padded(self.graph.x, self.graph))
        return x

    @property
    def mask(self) -> Tensor:
        """True where a node exists, ``[B, N]``."""
        mask: Tensor = self._once("mask", lambda: layout(self.graph).mask)
        return mask

    @property
    def lowrank(self) -> LowRank | None:
        """The adjacencies by a factor of fewer columns than nodes, padded; None where there is none."""
        lowrank: LowRank | None = self._once("lowrank", lambda: lowrank_of(self.graph))
        return lowrank if lowrank is not None and lowrank.factor.shape[2] < self.mask.shape[1] else None

    @property
    def adjacency(self) -> Tensor:
        """Padded adjacencies, ``[B, N, N]``."""
        A: Tensor = self._once("adjacency", self._adjacency)
        return A

    @property
    def signed_weight(self) -> Tensor:
        """Edge weights ``[E]`` before cosines are clipped at 0; where nothing is known to be clipped, the weights."""
        weight: Tensor = self._once("signed_weight", lambda: signed_weights(self.graph, self.edges))
        return weight

    @property
    def degree(self) -> Tensor:
        """Weight at every node, half from each direction, ``[B, N]``."""
        lowrank = self.lowrank
        degree: Tensor = self._once("degree", (lambda: node_degree(self.graph)[0]) if lowrank is None else lowrank.degree)
        return degree

    @property
    def laplacian(self) -> Tensor:
        """Padded Laplacians, ``[B, N, N]``."""
        L: Tensor = self._once("laplacian", self._laplacian)
        return L

    def propagate(self, X: Tensor) -> Tensor:
        r"""Lets every node hear its neighbours, :math:`A^\top X`, by the factor where there is one.

        Shapes:
            - **X** [B, N, q]; **output** [B, N, q]
        """
        lowrank = self.lowrank
        if lowrank is not None:
            return lowrank.multiply(X)
        with full_precision(X):
            return self.adjacency.mT @ X

    def laplacian_product(self, X: Tensor) -> Tensor:
        r"""Computes :math:`L X`, by the factor where there is one.

        Shapes:
            - **X** [B, N, q]; **output** [B, N, q]
        """
        lowrank = self.lowrank
        with full_precision(X):
            if lowrank is None:
                return self.laplacian @ X
            if self.normalization is None:
                return self.degree[:, :, None] * X - lowrank.multiply(X)
            scale = self._once("scale", lambda: inverse_sqrt(self.degree))[:, :, None]
            product = scale.square() * lowrank.multiply(X) if self.normalization == "rw" else scale * lowrank.multiply(scale * X)
            return connected(self.degree)[:, :, None] * X - product

    def squared_distance(self, spectrum: Spectrum) -> Tensor:
        r"""Computes :math:`\| A_s - A_t \|_F^2` of graphs of equally many nodes, from their factors where both have one.

        Shapes:
            - **output** [B]
        """
        own, goal = self.lowrank, spectrum.lowrank
        if own is not None and goal is not None and own.self_loops == goal.self_loops:
            return own.squared_distance(goal)
        return (self.adjacency - spectrum.adjacency).square().sum(dim=(1, 2))

    def eigenmaps(self, num_eig: int = 8, drop_trivial: bool = True, gauge: Gauge = "eigenspace") -> tuple[Tensor, Tensor]:
        """Returns eigenvalues ``[B, num_eig]`` and eigenvectors ``[B, N, num_eig]``; see :func:`eigenmaps`."""
        pairs: tuple[Tensor, Tensor] = self._once((num_eig, drop_trivial, gauge), lambda: self._solve(num_eig, drop_trivial, gauge))
        return pairs

    def heat_kernel(self, times: Times) -> Tensor:
        """Returns the heat kernels ``[B, T, N, N]``; see :func:`~gkd.graphs.heat_kernel`."""
        return self._heat(heat_kernel, times)

    def heat_diagonal(self, times: Times) -> Tensor:
        """Returns the diagonals of the heat kernels ``[B, N, T]``; see :func:`~gkd.graphs.heat_diagonal`."""
        return self._heat(heat_diagonal, times)

    def heat_trace(self, times: Times) -> Tensor:
        """Returns the heat traces ``[B, T]``; see :func:`~gkd.graphs.heat_trace`."""
        return self._heat(heat_trace, times)

    def choose_method(self, num_eig: int) -> Method:
        """Says which method ``method='auto'`` stands for, from shapes alone."""
        num_nodes, lowrank = self.mask.shape[1], self.lowrank
        fits = lowrank is not None and self.normalization is not None and num_eig < lowrank.factor.shape[2]
        if fits and lowrank is not None and (lowrank.self_loops or num_nodes >= _LARGE):
            return "lowrank"
        large = num_nodes >= _LARGE and num_eig * 16 <= num_nodes
        return "subspace" if large and lowrank is None and is_sparse(self.graph) else "exact"

    def _heat(self, heat: Callable[..., Tensor], times: Times) -> Tensor:
        values = tuple(as_times(times))
        bound = None if self.normalization is None else 2.0
        result: Tensor = self._once((heat, values), lambda: heat(self.laplacian, values, self.mask, bound))
        return result

    def _once(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        # functools.cached_property has a lock up to Python 3.11, which torch.compile cannot follow.
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def _adjacency(self) -> Tensor:
        lowrank = None if "graph" in self._known else self.lowrank
        return to_dense(self.graph)[0] if lowrank is None else lowrank.dense()

    def _laplacian(self) -> Tensor:
        if "graph" in self._known:
            return laplacian(self.graph, self.normalization)[0]
        return laplacian(self.adjacency, self.normalization, self.mask)[0]

    def _solve(self, num_eig: int, drop_trivial: bool, gauge: Gauge) -> tuple[Tensor, Tensor]:
        method = self.method
        if method == "auto":
            method = "exact" if ("solver", "exact") in self._known else self.choose_method(num_eig)
        solver: Solver = self._once(("solver", method), lambda: self._solver(method))
        eigval, eigvec = solver.lowest(num_eig, drop_trivial, gauge, self.damping)
        if self.normalization != "rw":
            return eigval, eigvec
        keep = connected(self.degree)
        return eigval, eigvec * torch.where(keep, torch.where(keep, self.degree, 1.0).rsqrt(), 1.0)[:, :, None]

    def _solver(self, method: Method) -> Solver:
        symmetric: Normalization = "sym" if self.normalization == "rw" else self.normalization
        if method == "lowrank":
            lowrank: LowRank | None = self._once("lowrank", lambda: lowrank_of(self.graph))
            if lowrank is None or symmetric is None:
                raise ValueError(
                    f"Expected a node attribute 'factor' and a normalised Laplacian for method='lowrank' (got {self.graph}, "
                    f"normalization={self.normalization!r})"
                )
            return Factored(lowrank.factor, self.mask) if lowrank.self_loops else Subspace(lowrank, self.mask, "sym", *self.iteration)
        if method == "subspace":
            return Subspace(self.graph, None, symmetric, *self.iteration)
        L = self.laplacian if self.normalization == symmetric else laplacian(self.graph, symmetric)[0]
        return Exact(L, self.mask, symmetric=True)


def lowrank_of(graph: Data) -> LowRank | None:
    """Reads the factor of a graph's adjacency, where it is a node attribute ``factor`` or, without self-loops, ``loopless_factor``."""
    for self_loops, name in FACTOR.items():
        factor = graph.get(name)
        if factor is not None:
            return LowRank(to_padded(factor, graph), self_loops)
    return None


def check_method(method: str) -> None:
    """Raises a ValueError for a method that does not exist."""
    one_of(method, ("auto", "exact", "lowrank", "subspace"), "method")


def _check_symmetric(L: Tensor) -> None:
    """Raises a ValueError for Laplacians that are not symmetric, on the CPU only. NaN is left to a better message."""
    if not readable(L) or L.dim() != 3 or L.size(1) != L.size(2) or L.numel() == 0:
        return
    difference = float((L - L.mT).detach().abs().max())
    if difference > 1e-3 * float(L.detach().abs().max()):
        raise ValueError(f"Expected symmetric Laplacians (got entries that differ by {difference:.3g} from their mirror image)")
