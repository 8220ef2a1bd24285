from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from gkd.graphs.eigen import rounding
from gkd.graphs.precision import full_precision
from gkd.graphs.spectral import Spectrum
from gkd.losses.matching import check_matched, mean_over_graphs, mean_over_nodes

__all__ = ["SpectralLoss", "heat_loss", "projector_loss", "residual_loss", "spectrum_loss"]

FORMS = ("projector", "heat", "residual", "spectrum")
CUTS = ("weighted", "largest", "fixed")
KERNELS = ("full", "signature", "trace")
TIMES = (1.0, 2.0, 4.0)


def residual_loss(student: Batch | Spectrum, teacher: Batch | Spectrum, num_eig: int = 8, drop_trivial: bool = True) -> Tensor:
    r"""Asks the teacher's eigenpairs to be eigenpairs of the student's Laplacian; the student's are never computed.

    .. math:: \frac{1}{B} \sum_b \frac{1}{q} \lVert L_s U_t - U_t \Lambda_t \rVert_F^2

    Zero if and only if the q pairs are eigenpairs of the student too. Unchanged by signs, and by any rotation inside a repeated
    eigenvalue that the q pairs hold as a whole; equivariant to a permutation of the nodes of both. Between 0 and 4 for normalised
    Laplacians, whatever B, n and q. A student graph that is known by a factor is not made dense.

    Args:
        student: The student's graphs.
        teacher: The teacher's; get no gradient.
        num_eig: Number q of pairs, the lowest; a graph that has fewer is averaged over those that it has.
        drop_trivial: Whether the whole kernel of the teacher is left out. It has a vector for every component, and so for every
            isolated node: with it, the dead channels of a network would be most of what is compared.

    Shapes:
        - **student**, **teacher**: B graphs of equally many nodes; **output** scalar

    Gradient:
        That of a polynomial in the Laplacian: finite everywhere.

    Raises:
        ValueError: If the numbers of graphs or nodes differ.
    """
    student, teacher = Spectrum.of(student), Spectrum.of(teacher)
    check_matched(student.mask, teacher.mask)
    eigval, eigvec = (value.detach() for value in teacher.eigenmaps(num_eig, drop_trivial=drop_trivial))
    with full_precision(eigvec):
        residual = student.laplacian_product(eigvec) - eigvec * eigval.unsqueeze(1)
    count = eigvec.square().sum(dim=(1, 2)).round().clamp(min=1)  # pairs that a graph lacks are zero vectors
    return mean_over_graphs(residual.square().sum(dim=(1, 2)) / count, student.mask)


def projector_loss(
    student: Batch | Spectrum,
    teacher: Batch | Spectrum,
    num_eig: int = 8,
    cut: Literal["weighted", "largest", "fixed"] = "weighted",
    drop_trivial: bool = True,
) -> Tensor:
    r"""Compares the spaces that the lowest eigenvectors span.

    .. math::
        \delta_q = \frac{1}{2q} \lVert U_s U_s^\top - U_t U_t^\top \rVert_F^2 = 1 - \frac{1}{q} \lVert U_s^\top U_t \rVert_F^2,
        \qquad U \in \mathbb{R}^{n \times q}

    A projector is determined as well as the gap above its q lowest eigenvalues is large. ``cut='weighted'`` takes all cuts up to
    ``num_eig``, each by the teacher's gap there: :math:`\sum_q g_q \delta_q / \sum_q g_q`, with :math:`g_q = \lambda_{q+1} - \lambda_q`.
    ``'largest'`` takes the cut of the largest gap, ``'fixed'`` the one at ``num_eig``, to be used where a gap is known to be there. A gap
    that is no larger than the error of the eigenvalues is none: what such a cut divides is not determined, and counts 0.

    Only products of q x q enter. Unchanged by signs, and by a rotation inside an eigenspace that no counted cut divides. In [0, 1].

    Args:
        student: The student's graphs.
        teacher: The teacher's; get no gradient.
        num_eig: Number of pairs.
        cut: 'weighted', 'largest' or 'fixed'.
        drop_trivial: Whether both kernels, one vector for every component, are left out as a whole. Kept, the value does not jump when
            the student's graph falls apart, but isolated nodes such as dead channels are most of what is compared.

    Shapes:
        - **student**, **teacher**: B graphs of equally many nodes; **output** scalar

    Gradient:
        Finite everywhere: damped where the student has no gap, see :func:`~gkd.graphs.eigenmaps`.

    Raises:
        ValueError: If the numbers of graphs or nodes differ or the cut is unknown.
    """
    _expect("cut", cut, CUTS)
    student, teacher = Spectrum.of(student), Spectrum.of(teacher)
    check_matched(student.mask, teacher.mask)
    _, student_eigvec = student.eigenmaps(num_eig, drop_trivial=drop_trivial, gauge="block" if cut == "fixed" else "eigenspace")
    eigval, eigvec = (value.detach() for value in teacher.eigenmaps(num_eig + 1, drop_trivial=drop_trivial))
    gap = eigval.diff(dim=1)
    gap = gap.where(gap > rounding(eigval.amax(dim=1, keepdim=True), eigvec.size(1)), 0.0)
    lacks_next = eigvec[..., -1].square().sum(dim=1) < 0.5  # a graph whose pairs are all there needs no gap
    eigvec = eigvec[..., :num_eig]
    with full_precision(eigvec):
        # Entry q of the diagonal of the double cumulated sum is the squared norm of the product of the first q columns of both.
        overlap = (student_eigvec.mT @ eigvec).square().cumsum(dim=1).cumsum(dim=2).diagonal(dim1=1, dim2=2)
    # Twice q, unless one of the graphs lacks pairs.
    dimensions = (student_eigvec.detach().square().sum(dim=1) + eigvec.square().sum(dim=1)).cumsum(dim=1)
    distance = 1 - 2 * overlap / dimensions.clamp(min=1)
    distance = distance.where(dimensions > 0.5, 0.0)
    if cut == "fixed":
        value = distance[:, -1].where((gap[:, -1] > 0) | lacks_next, 0.0)
    elif cut == "largest":
        largest, place = gap.max(dim=1, keepdim=True)
        value = distance.gather(1, place).where(largest > 0, 0.0).squeeze(1)
    else:
        value = (gap * distance).sum(dim=1) / gap.sum(dim=1).clamp(min=torch.finfo(gap.dtype).eps)
    return mean_over_graphs(value, student.mask)


def heat_loss(
    student: Batch | Spectrum,
    teacher: Batch | Spectrum,
    times: Sequence[float] = TIMES,
    kernel: Literal["full", "signature", "trace"] = "full",
) -> Tensor:
    r"""Compares how heat spreads over the graphs, :math:`H_t = e^{-tL}`.

    ============= ============================================================================================== =====================
    ``kernel``    value, averaged over the times and graphs                                                      needs
    ============= ============================================================================================== =====================
    ``full``      :math:`\frac{1}{n} \lVert H^s_t - H^t_t \rVert_F^2`: what arrives where                        matched nodes
    ``signature`` :math:`\frac{1}{n} \sum_i (H^s_t - H^t_t)_{ii}^2`: what stays on each node                     matched nodes
    ``trace``     :math:`\big( \frac{1}{n_s} \mathrm{tr} H^s_t - \frac{1}{n_t} \mathrm{tr} H^t_t \big)^2`        nothing: sizes may differ
    ============= ============================================================================================== =====================

    No eigenvector, no cut and no gap: matrix products only, smooth at repeated eigenvalues. Signature and trace are blind to
    some changes of a graph, the trace to everything but its eigenvalues.

    Args:
        student: The student's graphs.
        teacher: The teacher's; get no gradient.
        times: Diffusion times; each the double of the one before costs one product more.
        kernel: 'full', 'signature' or 'trace'.

    Shapes:
        - **student**, **teacher**: B graphs; **output** scalar

    Raises:
        ValueError: If the graphs do not match or the kernel is unknown.
    """
    _expect("kernel", kernel, KERNELS)
    student, teacher = Spectrum.of(student), Spectrum.of(teacher)
    if kernel == "trace":
        return _trace_distance(student, teacher, times)
    check_matched(student.mask, teacher.mask)
    if kernel == "signature":
        difference = student.heat_diagonal(times) - teacher.heat_diagonal(times).detach()
        return mean_over_nodes(difference.square().mean(dim=-1), student.mask)
    difference = student.heat_kernel(times) - teacher.heat_kernel(times).detach()
    return mean_over_nodes(difference.square().sum(dim=-1).mean(dim=1), student.mask)


def spectrum_loss(student: Batch | Spectrum, teacher: Batch | Spectrum, num_eig: int = 8, times: Sequence[float] = TIMES) -> Tensor:
    r"""Compares the sorted eigenvalues, the kernel among them: the shape of a graph, whatever its nodes are called.

    .. math:: \frac{1}{B} \sum_b \frac{1}{q} \sum_{k \le q} (\lambda^s_k - \lambda^t_k)^2

    Graphs of unequal size are compared by their heat traces instead, see :func:`heat_loss`. The eigenvalues move by no more than the
    Laplacian does (Weyl), so the value is continuous whatever eigenvalues cross. Unchanged by a permutation of the nodes of *one* of the
    graphs. In [0, 4].

    Args:
        student: The student's graphs.
        teacher: The teacher's; get no gradient.
        num_eig: Number q of eigenvalues, the lowest.
        times: Diffusion times of the heat trace.

    Shapes:
        - **student**, **teacher**: B graphs; **output** scalar

    Raises:
        ValueError: If the numbers of graphs differ.
    """
    student, teacher = Spectrum.of(student), Spectrum.of(teacher)
    if student.mask.shape != teacher.mask.shape:
        return _trace_distance(student, teacher, times)
    student_eigval = student.eigenmaps(num_eig, drop_trivial=False)[0]
    teacher_eigval = teacher.eigenmaps(num_eig, drop_trivial=False)[0].detach()
    return mean_over_graphs((student_eigval - teacher_eigval).square().mean(dim=1), student.mask)


class SpectralLoss(nn.Module):
    """Compares the spectra of two batches of graphs.

    ============= ======================================== =================== ==========================================================
    ``form``      see                                      matched nodes       cost beside the teacher's, and when to take it
    ============= ======================================== =================== ==========================================================
    ``residual``  :func:`residual_loss`                    needed              q products of a matrix and a vector; the default
    ``projector`` :func:`projector_loss`                   needed              an eigendecomposition; clusters matter, not their order
    ``heat``      :func:`heat_loss`                        unless ``'trace'``  about ten matrix products; small graphs, instance graphs
    ``spectrum``  :func:`spectrum_loss`                    not needed          an eigendecomposition; no adapter wanted
    ============= ======================================== =================== ==========================================================

    The distance of the eigenvectors themselves is not among them: an eigenvector has no sign, so it is no property of the graph.

    Args:
        form: 'residual', 'projector', 'heat' or 'spectrum'.
        num_eig: Number of eigenpairs, the lowest.
        cut: Of 'projector'.
        kernel: Of 'heat'.
        times: Diffusion times, of 'heat' and, for graphs of unequal size, 'spectrum'.
        drop_trivial: Of 'residual' and 'projector': whether the kernel is left out.

    Shapes:
        - **student**, **teacher**: batches of graphs, or :class:`~gkd.graphs.Spectrum` views of them; **output** scalar

    Raises:
        ValueError: If an option is unknown or the graphs do not match.
    """

    matched_features = False
    reads_encoding = False

    def __init__(
        self,
        form: Literal["projector", "heat", "residual", "spectrum"] = "residual",
        num_eig: int = 8,
        cut: Literal["weighted", "largest", "fixed"] = "weighted",
        kernel: Literal["full", "signature", "trace"] = "full",
        times: Sequence[float] = TIMES,
        drop_trivial: bool = True,
    ) -> None:
        super().__init__()
        _expect("form", form, FORMS)
        _expect("cut", cut, CUTS)
        _expect("kernel", kernel, KERNELS)
        if num_eig < 1:
            raise ValueError(f"Expected 'num_eig' to be at least 1 (got {num_eig})")
        if not times:
            raise ValueError("Expected at least one diffusion time (got none)")
        self.form = form
        self.num_eig = num_eig
        self.cut = cut
        self.kernel = kernel
        self.times = tuple(times)
        self.drop_trivial = drop_trivial

    @property
    def matched_nodes(self) -> bool:
        """Whether node i of the student must mean node i of the teacher."""
        return not (self.form == "spectrum" or (self.form == "heat" and self.kernel == "trace"))

    def forward(self, student: Batch | Spectrum, teacher: Batch | Spectrum) -> Tensor:
        """Returns the loss of two batches of graphs."""
        if self.form == "residual":
            return residual_loss(student, teacher, self.num_eig, self.drop_trivial)
        if self.form == "projector":
            return projector_loss(student, teacher, self.num_eig, self.cut, self.drop_trivial)
        if self.form == "heat":
            return heat_loss(student, teacher, self.times, self.kernel)
        return spectrum_loss(student, teacher, self.num_eig, self.times)

    def extra_repr(self) -> str:
        """Returns what the printed module shows."""
        return f"form={self.form!r}, num_eig={self.num_eig}"


def _trace_distance(student: Spectrum, teacher: Spectrum, times: Sequence[float]) -> Tensor:
    student_trace, teacher_trace = student.heat_trace(times), teacher.heat_trace(times).detach()
    if student_trace.shape != teacher_trace.shape:
        sizes = f"{student_trace.size(0)} and {teacher_trace.size(0)}"
        raise ValueError(f"Expected as many graphs in the student as in the teacher (got {sizes})")
    both = student.mask.any(dim=1) & teacher.mask.any(dim=1)
    return mean_over_graphs((student_trace - teacher_trace).square().mean(dim=1), both.unsqueeze(1))


def _expect(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"Expected '{name}' to be one of {', '.join(allowed)} (got '{value}')")
