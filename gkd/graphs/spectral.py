from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from gkd.graphs.dense import layout, to_dense, to_padded
from gkd.graphs.edges import signed_weights
from gkd.graphs.eigen import Gauge, exact_eigenmaps, lowrank_eigenmaps
from gkd.graphs.heat import Times, heat_kernel, heat_kernel_signature, heat_trace
from gkd.graphs.laplacian import Normalization, connected, is_sparse, laplacian, node_degree
from gkd.graphs.subspace import subspace_eigenmaps

__all__ = ["Spectrum", "eigengap", "eigenmaps", "heat_kernel", "heat_kernel_signature", "heat_trace"]

Method = Literal["auto", "exact", "lowrank", "subspace"]
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
    if method not in ("auto", "exact", "lowrank", "subspace"):
        raise ValueError(f"Expected 'method' to be 'auto', 'exact', 'lowrank' or 'subspace' (got {method!r})")
    if isinstance(graph, Tensor):
        if method == "lowrank":
            raise ValueError("Expected a graph with a node attribute 'factor' for method='lowrank' (got Laplacians)")
        if normalization == "rw":
            raise ValueError("Expected a graph for normalization='rw' (got Laplacians; these are taken as they are, and symmetric)")
        _check_symmetric(graph)
        if method == "subspace":
            return subspace_eigenmaps(graph, num_eig, mask, None, drop_trivial, gauge, damping, init, tolerance, max_iter)
        return exact_eigenmaps(graph, num_eig, mask, drop_trivial, gauge, damping)

    if mask is not None:
        raise ValueError("Expected 'mask' with Laplacians only (got one beside a graph, which has its own)")
    method = choose_method(graph, num_eig, normalization) if method == "auto" else method
    symmetric = "sym" if normalization == "rw" else normalization
    if method == "lowrank":
        if graph.get("factor") is None or symmetric is None:
            raise ValueError(f"Expected a node attribute 'factor' and a normalised Laplacian for method='lowrank' (got {graph})")
        mask = layout(graph).mask
        eigval, eigvec = lowrank_eigenmaps(to_padded(graph.factor, graph), num_eig, mask, drop_trivial, gauge, damping)
    elif method == "subspace":
        eigval, eigvec = subspace_eigenmaps(graph, num_eig, None, symmetric, drop_trivial, gauge, damping, init, tolerance, max_iter)
    else:
        L, mask = laplacian(graph, symmetric)
        eigval, eigvec = exact_eigenmaps(L, num_eig, mask, drop_trivial, gauge, damping, symmetric=True)
    return eigval, _random_walk_vectors(graph, eigvec) if normalization == "rw" else eigvec


def choose_method(graph: Data, num_eig: int, normalization: Normalization = "sym") -> Method:
    """Says which method ``method='auto'`` stands for, from shapes alone."""
    factor = graph.get("factor")
    num_nodes = layout(graph).num_nodes
    if factor is not None and normalization is not None and num_eig < factor.size(1) < num_nodes:
        return "lowrank"
    return "subspace" if num_nodes >= _LARGE and num_eig * 16 <= num_nodes and is_sparse(graph) else "exact"


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


class Spectrum:
    """A lazy view of one graph, or batch, that computes its adjacency, Laplacian and eigenpairs once for all who ask.

    Args:
        graph: A graph or a batch of graphs. It must not change while the view is in use.
        normalization: As in :func:`~gkd.graphs.laplacian.laplacian`.
        method: As in :func:`eigenmaps`.
        damping: As in :func:`eigenmaps`.
        edges: What weighed the edges, such as :class:`~gkd.graphs.KNNEdges`; None if it is not known.

    Examples:
        >>> graph = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=2)
        >>> spectrum = Spectrum.of(graph)
        >>> spectrum.eigenmaps(num_eig=1)[0]
        tensor([[2.]])
        >>> spectrum.eigenmaps(num_eig=1)[0] is spectrum.eigenmaps(num_eig=1)[0]
        True
    """

    def __init__(
        self,
        graph: Data,
        normalization: Normalization = "sym",
        method: Method = "auto",
        damping: float | None = None,
        edges: nn.Module | None = None,
    ) -> None:
        self.graph = graph
        self.edges = edges
        self.normalization = normalization
        self.method = method
        self.damping = damping
        self._known: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, graph: Data | Spectrum) -> Spectrum:
        """Returns a view as it is and wraps a graph."""
        return graph if isinstance(graph, Spectrum) else cls(graph)

    @property
    def adjacency(self) -> Tensor:
        """Padded adjacencies, ``[B, N, N]``."""
        adjacency: Tensor = self._once("adjacency", lambda: to_dense(self.graph)[0])
        return adjacency

    @property
    def mask(self) -> Tensor:
        """True where a node exists, ``[B, N]``."""
        mask: Tensor = self._once("mask", lambda: layout(self.graph).mask)
        return mask

    @property
    def signed_weight(self) -> Tensor:
        """Edge weights ``[E]`` before cosines are clipped at 0; where nothing is known to be clipped, the weights."""
        weight: Tensor = self._once("signed_weight", lambda: signed_weights(self.graph, self.edges))
        return weight

    @property
    def laplacian(self) -> Tensor:
        """Padded Laplacians, ``[B, N, N]``."""
        L: Tensor = self._once("laplacian", lambda: laplacian(self.graph, self.normalization)[0])
        return L

    def eigenmaps(self, num_eig: int = 8, drop_trivial: bool = True, gauge: Gauge = "eigenspace") -> tuple[Tensor, Tensor]:
        """Returns eigenvalues ``[B, num_eig]`` and eigenvectors ``[B, N, num_eig]``; see :func:`eigenmaps`."""
        pairs: tuple[Tensor, Tensor] = self._once((num_eig, drop_trivial, gauge), lambda: self._solve(num_eig, drop_trivial, gauge))
        return pairs

    def heat_kernel(self, times: Times) -> Tensor:
        """Returns the heat kernels ``[B, T, N, N]``; see :func:`~gkd.graphs.heat.heat_kernel`."""
        return heat_kernel(self.laplacian, times, self.mask, self._bound)

    def heat_trace(self, times: Times) -> Tensor:
        """Returns the heat traces ``[B, T]``; see :func:`~gkd.graphs.heat.heat_trace`."""
        return heat_trace(self.laplacian, times, self.mask, self._bound)

    @property
    def _bound(self) -> float | None:
        return None if self.normalization is None else 2.0

    def _once(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        # functools.cached_property has a lock up to Python 3.11, which torch.compile cannot follow.
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def _solve(self, num_eig: int, drop_trivial: bool, gauge: Gauge) -> tuple[Tensor, Tensor]:
        method = choose_method(self.graph, num_eig, self.normalization) if self.method == "auto" else self.method
        if method == "exact" and self.normalization != "rw":
            return exact_eigenmaps(self.laplacian, num_eig, self.mask, drop_trivial, gauge, self.damping, symmetric=True)
        return eigenmaps(
            self.graph,
            num_eig,
            method=method,
            normalization=self.normalization,
            drop_trivial=drop_trivial,
            gauge=gauge,
            damping=self.damping,
        )


def _random_walk_vectors(graph: Data, eigvec: Tensor) -> Tensor:
    degree, _ = node_degree(graph)
    keep = connected(degree)
    return eigvec * torch.where(keep, torch.where(keep, degree, 1.0).rsqrt(), 1.0)[:, :, None]


def _check_symmetric(L: Tensor) -> None:
    """Raises a ValueError for Laplacians that are not symmetric, on the CPU only. NaN is left to a better message."""
    if torch.compiler.is_compiling() or L.device.type != "cpu" or L.dim() != 3 or L.size(1) != L.size(2) or L.numel() == 0:
        return
    difference = float((L - L.mT).detach().abs().max())
    if difference > 1e-3 * float(L.detach().abs().max()):
        raise ValueError(f"Expected symmetric Laplacians (got entries that differ by {difference:.3g} from their mirror image)")
