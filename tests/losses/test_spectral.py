from __future__ import annotations

import pytest
import torch
from scipy.linalg import expm, subspace_angles
from torch_geometric.data import Batch

from gkd.graphs.builder import GraphBuilder
from gkd.graphs.dense import from_dense, to_dense
from gkd.graphs.edges import CompleteEdges, KNNEdges
from gkd.graphs.nodes import ChannelNodes
from gkd.graphs.spectral import Spectrum
from gkd.graphs.testing import complete_graph, cycle_graph, fixture_graphs, path_graph
from gkd.losses import SpectralLoss, heat_loss, projector_loss, residual_loss, spectrum_loss

LOSSES = {
    "residual": SpectralLoss("residual", num_eig=3),
    "projector": SpectralLoss("projector", num_eig=3),
    "largest": SpectralLoss("projector", num_eig=3, cut="largest"),
    "fixed": SpectralLoss("projector", num_eig=3, cut="fixed"),
    "kernel": SpectralLoss("projector", num_eig=3, drop_trivial=False),
    "heat": SpectralLoss("heat"),
    "signature": SpectralLoss("heat", kernel="signature"),
    "trace": SpectralLoss("heat", kernel="trace"),
    "spectrum": SpectralLoss("spectrum", num_eig=3),
}
MATCHED = [name for name, loss in LOSSES.items() if loss.matched_nodes]
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def adjacency(seed=0, batch=2, n=6):
    A = torch.rand(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (A + A.mT).tril(-1) + (A + A.mT).tril(-1).mT


def graph(seed=0, **sizes):
    return from_dense(adjacency(seed, **sizes))


def numpy_laplacian(A):
    scale = A.sum(-1).rsqrt()
    return (torch.eye(A.size(-1), dtype=A.dtype) - scale[:, :, None] * A * scale[:, None, :]).numpy()


@every_loss
class TestEveryForm:
    def test_zero_at_equality(self, loss):
        assert loss(graph(), graph()).item() == pytest.approx(0, abs=1e-12)
        assert loss(graph(0), graph(1)).item() > 1e-9

    def test_permuting_both_changes_nothing(self, loss):
        A, B, order = adjacency(0), adjacency(1), torch.tensor([3, 1, 5, 0, 2, 4])
        value = loss(from_dense(A), from_dense(B))
        moved = loss(from_dense(A[:, order][:, :, order]), from_dense(B[:, order][:, :, order]))
        torch.testing.assert_close(moved, value)

    def test_permuting_one_changes_what_needs_matched_nodes(self, loss):
        A, order = adjacency(0), torch.tensor([3, 1, 5, 0, 2, 4])
        value = loss(from_dense(A[:, order][:, :, order]), from_dense(A)).item()
        assert (value > 1e-4) == loss.matched_nodes
        assert loss.matched_nodes or value == pytest.approx(0, abs=1e-12)

    def test_scaling_the_weights_of_one_changes_nothing(self, loss):
        torch.testing.assert_close(loss(from_dense(3 * adjacency(0)), graph(1)), loss(graph(0), graph(1)))

    def test_ragged_is_the_mean_of_singles(self, loss):
        graphs = fixture_graphs(torch.float64)
        graphs = [graphs[name] for name in ("path", "cycle", "star", "grid", "complete")]
        students, teachers = ([graph.clone() for graph in graphs] for _ in range(2))
        for other in students + teachers:  # random weights: a cut through a repeated eigenvalue would leave the choice to the solver
            other.edge_weight = other.edge_weight * torch.rand_like(other.edge_weight).add(0.2)
        singles = [loss(a, b) for a, b in zip(students, teachers, strict=True)]
        value = loss(Batch.from_data_list(students), Batch.from_data_list(teachers))
        torch.testing.assert_close(value, torch.stack(singles).mean(), rtol=1e-4, atol=1e-9)

    def test_gradient_where_gaps_are_real(self, loss):
        teacher = graph(1)

        def value(A):
            return loss(from_dense((A + A.mT) / 2), teacher)

        torch.autograd.gradcheck(value, adjacency(0).add(1e-3).requires_grad_(), atol=1e-5, rtol=1e-3, fast_mode=True)

    @pytest.mark.parametrize("student", fixture_graphs())
    def test_finite_gradient_at_degenerate_graphs(self, loss, student):
        student = fixture_graphs()[student].clone()
        n = student.num_nodes
        student.edge_weight.requires_grad_()
        teacher = fixture_graphs()["path"] if n == 4 else from_dense(adjacency(1, 1, n).float())
        for other in (teacher, fixture_graphs()["cycle"] if n == 8 else complete_graph(n), student):
            value = loss(student, other)
            (gradient,) = torch.autograd.grad(value, student.edge_weight)
            assert value.isfinite()
            assert gradient.isfinite().all()

    def test_no_gradient_to_the_teacher(self, loss):
        student, teacher = graph(0), graph(1)
        student.edge_weight.requires_grad_()
        teacher.edge_weight.requires_grad_()
        loss(student, teacher).backward()
        assert student.edge_weight.grad.abs().sum() > 0
        assert teacher.edge_weight.grad is None

    def test_float32_under_autocast(self, loss):
        student, teacher = (from_dense(adjacency(seed).float()) for seed in (0, 1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(student, teacher)
        torch.testing.assert_close(value, loss(student, teacher), rtol=1e-6, atol=0)

    def test_graphs_without_nodes_do_not_count(self, loss):
        mask = torch.tensor([[True] * 6, [False] * 6])
        student, teacher = (from_dense(adjacency(seed), mask) for seed in (0, 1))
        torch.testing.assert_close(loss(student, teacher), loss(graph(0, batch=1), from_dense(adjacency(1)[:1])))

    def test_more_pairs_than_nodes(self, loss):
        many = SpectralLoss(loss.form, 10, loss.cut, loss.kernel, drop_trivial=loss.drop_trivial)
        student = path_graph(4)
        student.edge_weight = torch.tensor([0.5, 0.5, 1.0, 1.0, 1.0, 1.0], requires_grad=True)
        value = many(student, path_graph(4))
        value.backward()
        assert value.isfinite()
        assert student.edge_weight.grad.isfinite().all()

    def test_value_does_not_grow_with_the_batch(self, loss):
        A, B = adjacency(0), adjacency(1)
        value = loss(from_dense(torch.cat([A] * 5)), from_dense(torch.cat([B] * 5)))
        torch.testing.assert_close(value, loss(from_dense(A), from_dense(B)))


def test_residual_by_hand():
    # All pairs of the teacher together are an orthonormal basis, so that the residuals sum up to |L_s - L_t|^2. Path 0-1-2 against the
    # triangle: (1/sqrt(2) - 1/2)^2 at four entries, (1/2)^2 at two; divided by three pairs.
    expected = (4 * (0.5**0.5 - 0.5) ** 2 + 2 * 0.25) / 3
    assert residual_loss(complete_graph(3), path_graph(3), num_eig=3, drop_trivial=False).item() == pytest.approx(expected, rel=1e-5)


def test_residual_is_zero_if_and_only_if_the_pairs_are_shared():
    # the complete graph's vectors above the constant one are those of any graph of equal degrees: the values are not
    student, teacher = cycle_graph(8), complete_graph(8)
    assert residual_loss(student, teacher, num_eig=1, drop_trivial=False).item() == pytest.approx(0, abs=1e-10)
    assert residual_loss(student, teacher, num_eig=2, drop_trivial=False).item() > 0.01
    assert residual_loss(student, teacher, num_eig=1).item() > 0.01


def test_residual_never_decomposes_the_student():
    class Closed(Spectrum):
        def eigenmaps(self, *args, **kwargs):
            raise AssertionError

    assert residual_loss(Closed(graph(0)), graph(1)).item() > 0


class Rotated(Spectrum):
    """Gives other eigenvectors of the same graph: with other signs, and turned inside repeated eigenvalues (or, if asked, across)."""

    across = False

    def eigenmaps(self, num_eig=8, drop_trivial=True, gauge="eigenspace"):
        eigval, eigvec = super().eigenmaps(num_eig, drop_trivial, gauge)
        same = (eigval[0, :, None] - eigval[0]).abs() < 1e-6
        turn = torch.randn(num_eig, num_eig, generator=torch.Generator().manual_seed(0), dtype=eigvec.dtype)
        turn = torch.linalg.matrix_exp(torch.where(same if not self.across else torch.ones_like(same), turn - turn.T, 0.0))
        signs = torch.where(same.sum(0) == 1, -1.0, 1.0)  # of simple ones: a sign is a whole rotation there
        return eigval, eigvec @ turn * signs


class Mixed(Rotated):
    across = True


@pytest.mark.parametrize("loss", [LOSSES[name] for name in MATCHED], ids=MATCHED)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_gauge(loss, side):
    # the spectrum of the cycle is 0, a, a, b, b, ..: a cut after three pairs divides no eigenspace
    if loss.drop_trivial:
        loss = SpectralLoss(loss.form, 2, loss.cut, loss.kernel)
    other = from_dense(adjacency(4, 1, 8))
    cycle = cycle_graph(8, torch.float64)
    if side == "student":
        # a cut of the other graph may divide the cycle's eigenspaces, so only one that does not is compared
        loss = SpectralLoss(
            loss.form, loss.num_eig, "fixed" if loss.form == "projector" else loss.cut, loss.kernel, drop_trivial=loss.drop_trivial
        )
        compare = [loss(view(cycle), other) for view in (Spectrum, Rotated)]
    else:
        compare = [loss(other, view(cycle)) for view in (Spectrum, Rotated)]
    torch.testing.assert_close(compare[1], compare[0])


def test_rotation_across_eigenspaces_is_another_graph():
    other, cycle = from_dense(adjacency(4, 1, 8)), cycle_graph(8, torch.float64)
    for loss in (LOSSES["residual"], LOSSES["projector"]):
        assert loss(other, Mixed(cycle)).item() != pytest.approx(loss(other, cycle).item(), rel=1e-3)


@pytest.mark.parametrize("q", [1, 3, 5])
def test_fixed_cut_is_the_distance_of_projectors(q):
    student, teacher = (Spectrum(graph(seed, batch=1)).eigenmaps(q, drop_trivial=False)[1][0] for seed in (0, 1))
    projectors = [U @ U.T for U in (student, teacher)]
    expected = (projectors[0] - projectors[1]).square().sum() / (2 * q)
    value = projector_loss(graph(0, batch=1), graph(1, batch=1), num_eig=q, cut="fixed", drop_trivial=False)
    torch.testing.assert_close(value, expected)
    sines = torch.from_numpy(subspace_angles(student.numpy(), teacher.numpy())).sin()
    torch.testing.assert_close(value, sines.square().mean())


def test_cuts_by_a_loop():
    student, teacher = graph(0), graph(1)
    gap = Spectrum(teacher).eigenmaps(5)[0].diff(dim=1)
    single = [
        torch.stack(
            [projector_loss(from_dense(adjacency(0)[b : b + 1]), from_dense(adjacency(1)[b : b + 1]), q, "fixed") for q in range(1, 5)]
        )
        for b in range(2)
    ]
    weighted = sum((gap[b] * single[b]).sum() / gap[b].sum() for b in range(2)) / 2
    largest = sum(single[b][gap[b].argmax()] for b in range(2)) / 2
    torch.testing.assert_close(projector_loss(student, teacher, 4, "weighted"), weighted)
    torch.testing.assert_close(projector_loss(student, teacher, 4, "largest"), largest)


def test_orthogonal_spaces_are_one_apart():
    # two components each, over other nodes: the kernels {01|23} and {02|13} share the constant vector only
    def pairs(first, second):
        A = torch.zeros(1, 4, 4)
        for i, j in (first, second):
            A[0, i, j] = A[0, j, i] = 1
        return from_dense(A)

    assert projector_loss(pairs((0, 1), (2, 3)), pairs((0, 2), (1, 3)), 2, "fixed", drop_trivial=False).item() == pytest.approx(
        0.5, abs=1e-5
    )


@pytest.mark.parametrize("kernel", ["full", "signature", "trace"])
def test_heat_by_scipy(kernel):
    times = (0.5, 3.0)
    total = 0.0
    for b in range(2):
        for t in times:
            H, G = (torch.from_numpy(expm(-t * numpy_laplacian(adjacency(seed))[b])) for seed in (0, 1))
            if kernel == "full":
                total += (H - G).square().sum() / 6
            elif kernel == "signature":
                total += (H - G).diagonal().square().sum() / 6
            else:
                total += ((H.trace() - G.trace()) / 6) ** 2
    torch.testing.assert_close(heat_loss(graph(0), graph(1), times, kernel), total / 4)


def test_spectrum_by_numpy():
    own, other = (torch.linalg.eigvalsh(torch.from_numpy(numpy_laplacian(adjacency(seed))))[:, :3] for seed in (0, 1))
    torch.testing.assert_close(spectrum_loss(graph(0), graph(1), num_eig=3), (own - other).square().mean())


@pytest.mark.parametrize("loss", [LOSSES["trace"], LOSSES["spectrum"]])
def test_unequal_sizes_without_matched_nodes(loss):
    student, teacher = complete_graph(4), complete_graph(7)
    # K_n: 0 once and n/(n-1) otherwise
    traces = [torch.tensor([(1 + (n - 1) * torch.exp(torch.tensor(-t * n / (n - 1)))) / n for t in (1.0, 2.0, 4.0)]) for n in (4, 7)]
    torch.testing.assert_close(loss(student, teacher), (traces[0] - traces[1]).square().mean())
    with pytest.raises(ValueError, match=r"Expected as many graphs in the student as in the teacher \(got 1 and 2\)"):
        loss(student, Batch.from_data_list([teacher, teacher]))


@pytest.mark.parametrize("loss", [LOSSES[name] for name in MATCHED], ids=MATCHED)
def test_unequal_sizes_with_matched_nodes(loss):
    with pytest.raises(ValueError, match=r"node i being node i \(got student \[1, 4\], teacher \[1, 7\]\)"):
        loss(complete_graph(4), complete_graph(7))


@pytest.mark.parametrize("loss", [LOSSES["residual"], LOSSES["projector"]])
def test_low_rank_graphs_equal_dense_ones(loss):
    features = torch.rand(2, 12, 2, 3, dtype=torch.float64)
    features[0, 3] = 0
    builder = GraphBuilder(ChannelNodes(), CompleteEdges(self_loops=True, nonnegative=True))
    other = torch.rand(2, 12, 2, 3, dtype=torch.float64)
    values = []
    for keep in (True, False):
        leaf = features.clone().requires_grad_()
        student, teacher = builder(leaf), builder(other)
        if not keep:
            del student.factor, teacher.factor
        value = loss(student, teacher)
        value.backward()
        values.append((value, leaf.grad))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-8)


def test_views_are_shared():
    calls = []

    class Counted(Spectrum):
        def _solve(self, *args):
            calls.append(args)
            return super()._solve(*args)

    student, teacher = Counted(graph(0)), Counted(graph(1))
    for _ in range(2):
        spectrum_loss(student, teacher, num_eig=3)
    residual_loss(student, teacher, num_eig=3, drop_trivial=False)
    assert len(calls) == 2


@pytest.mark.parametrize("edges", [KNNEdges(k=3), CompleteEdges()])
def test_identical_channels(edges):
    features = torch.rand(1, 1, 3, 3).expand(1, 6, 3, 3).clone().requires_grad_()
    other = torch.rand(1, 6, 3, 3)
    builder = GraphBuilder(ChannelNodes(), edges)
    for loss in LOSSES.values():
        (gradient,) = torch.autograd.grad(loss(builder(features), builder(other)), features)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "eigenvectors"}, "'form' to be one of projector, heat, residual, spectrum .got 'eigenvectors'"),
        ({"cut": "first"}, "'cut' to be one of"),
        ({"kernel": "half"}, "'kernel' to be one of"),
        ({"num_eig": 0}, "'num_eig' to be at least 1"),
        ({"times": ()}, "at least one diffusion time"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        SpectralLoss(**options)


@pytest.mark.parametrize("cut", ["weighted", "largest", "fixed"])
def test_a_teacher_without_a_gap_says_nothing(cut):
    """A complete graph has one eigenvalue n / (n - 1) for all but the kernel: which vectors the solver returns is rounding."""
    n = 12
    A = torch.ones(1, n, n) - torch.eye(n)
    noise = 1e-7 * torch.rand(1, n, n, generator=torch.Generator().manual_seed(0)).triu(1)
    teacher = from_dense(A + noise + noise.mT)
    weights = torch.rand(1, n, n, generator=torch.Generator().manual_seed(1))
    student = from_dense((weights + weights.mT) / 2 * (1 - torch.eye(n)))
    for number in range(3):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(number))
        permuted = [from_dense(to_dense(graph)[0][:, order][:, :, order]) for graph in (student, teacher)]
        assert projector_loss(*permuted, num_eig=4, cut=cut).item() == 0


def test_fixed_cut_above_all_the_pairs_needs_no_gap():
    weights = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(1))
    connected = from_dense((weights + weights.mT) / 2 * (1 - torch.eye(6)))
    apart = weights.clone()
    apart[:, :3, 3:] = 0
    apart[:, 3:, :3] = 0
    apart = from_dense((apart + apart.mT) / 2 * (1 - torch.eye(6)))
    # five dimensions beside the kernel against four, nearly contained in them: 1 - 2 * 4 / 9
    assert projector_loss(connected, apart, num_eig=6, cut="fixed").item() == pytest.approx(1 / 9, rel=0.05)
