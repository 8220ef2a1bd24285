from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gkd.losses.relations import (
    CCLoss,
    ICKDLoss,
    IRGLoss,
    PKTLoss,
    RKDLoss,
    SPLoss,
    cc_loss,
    ickd_loss,
    irg_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    sp_loss,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(v):
    length = np.linalg.norm(v)
    return v / length if length > 0 else v


def huber(a, b):
    d = abs(a - b)
    return d - 0.5 if d >= 1 else 0.5 * d * d


def test_sp_by_hand():
    # student rows e1, e2: G = I; teacher rows e1, e1: each row (1, 1) / sqrt(2). 4 entries: twice (1 - r)^2 and twice r^2 over 4
    student, teacher = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    r = 0.5**0.5
    assert sp_loss(student, teacher).item() == pytest.approx((2 * (1 - r) ** 2 + 2 * r**2) / 4)


def test_sp_agrees_with_loops():
    student, teacher = draw(4, 3, 2, 2), draw(4, 5, 3, 1, seed=1)
    g, h = (np.array([[a.ravel() @ b.ravel() for b in x] for a in x]) for x in (student.numpy(), teacher.numpy()))
    expected = np.mean([(unit(a) - unit(b)) ** 2 for a, b in zip(g, h, strict=True)])
    assert sp_loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_rkd_agrees_with_loops():
    student, teacher = draw(5, 3), 4 * draw(5, 7, seed=1) + 10

    def distances(x):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[d > 0].mean()

    def cosines(x):
        triples = itertools.product(range(5), repeat=3)
        return [unit(x[i] - x[j]) @ unit(x[k] - x[j]) for i, j, k in triples]

    s, t = student.numpy(), teacher.numpy()
    expected = np.mean([huber(a, b) for a, b in zip(distances(s).ravel(), distances(t).ravel(), strict=True)])
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    angles = np.mean([huber(a, b) for a, b in zip(cosines(s), cosines(t), strict=True)])
    assert rkd_angle_loss(student, teacher).item() == pytest.approx(angles, rel=1e-9)
    assert RKDLoss()(student, teacher).item() == pytest.approx(25 * expected + 50 * angles, rel=1e-9)
    assert RKDLoss(angle_weight=0.0)(student, teacher).item() == pytest.approx(25 * expected, rel=1e-9)


def test_rkd_angle_keeps_its_digits_far_from_the_origin_and_at_duplicates():
    student, teacher = draw(6, 16), draw(6, 16, seed=1)
    far = rkd_angle_loss((student + 100).float(), (teacher + 100).float()).item()
    assert far == pytest.approx(rkd_angle_loss(student, teacher).item(), rel=1e-4)
    student[1] = student[0]  # their difference has no direction: cosines 0, as normalising a zero vector gives
    differences = F.normalize(student[None] - student[:, None], dim=2)
    goal = F.normalize(teacher[None] - teacher[:, None], dim=2)
    torch.testing.assert_close(rkd_angle_loss(student, teacher), F.smooth_l1_loss(differences @ differences.mT, goal @ goal.mT))


def test_cc_by_hand():
    # differences (1, 2), (3, 0), (1, 1): (1 * 3 + 2 * 0 + 3 * 1 + 0 * 1) / 2
    student, teacher = torch.tensor([[1.0, -2.0], [0.0, 5.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [3.0, 5.0], [0.0, 2.0]])
    assert cc_loss(student, teacher).item() == 3


def test_pkt_agrees_with_loops():
    student, teacher = draw(4, 3), draw(4, 6, seed=1)

    def probabilities(x):
        p = np.array([[(unit(a) @ unit(b) + 1) / 2 for b in x] for a in x])
        return p / p.sum(1, keepdims=True)

    p, q = probabilities(teacher.numpy()), probabilities(student.numpy())
    assert pkt_loss(student, teacher).item() == pytest.approx(np.mean(p * np.log((p + 1e-7) / (q + 1e-7))), rel=1e-9)


@pytest.mark.parametrize("sizes", [((2, 2), (1, 3)), ((3, 3), (3, 3))], ids=["low rank", "direct"])
def test_ickd_agrees_with_loops(sizes):
    student, teacher = draw(3, 5, *sizes[0]), draw(3, 5, *sizes[1], seed=1)
    student[0, 2] = 0
    teacher[1, 3] = 0
    expected = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        g, h = (np.array([[a.ravel() @ b.ravel() for b in x] for a in x]) for x in (s, t))
        expected += sum(((unit(a) - unit(b)) ** 2).sum() for a, b in zip(g, h, strict=True))
    assert ickd_loss(student, teacher).item() == pytest.approx(expected / 15, rel=1e-9)


def test_irg_agrees_with_loops():
    student, teacher = [draw(4, 2, 4, 4), draw(4, 4, 2, 2)], [draw(4, 3, 4, 4, seed=1), draw(4, 6, 2, 2, seed=1)]

    def edges(x):
        d = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
        return d / d.max()

    def moves(x, y):
        x = x.reshape(4, x.shape[1], 2, 2, 2, 2).mean((3, 5))  # 2x2 cells
        y = (y[:, 0::2] + y[:, 1::2]) / 2  # neighbouring channels
        d = ((x - y) ** 2).sum((1, 2, 3))
        return d / d.max()

    s, t = ([x.numpy() for x in y] for y in (student, teacher))
    stages = [(s[0], t[0]), (s[1], t[1]), (s[1].mean((2, 3)), t[1].mean((2, 3)))]
    expected = 5 * np.mean([((edges(a) - edges(b)) ** 2).mean() for a, b in stages])
    assert irg_loss(student[1:], teacher[1:]).item() == pytest.approx(
        5 * np.mean([((edges(a) - edges(b)) ** 2).mean() for a, b in stages[1:]])
    )
    expected += 7 * ((moves(*s) - moves(*t)) ** 2).mean()
    assert irg_loss(student, teacher, transform_weight=7.0).item() == pytest.approx(expected, rel=1e-9)
    assert IRGLoss(transform_weight=7.0)(
        dict(zip("ab", student, strict=True)), dict(zip("ab", teacher, strict=True))
    ).item() == pytest.approx(expected)


def irg(student, teacher):
    return irg_loss([student, student[:, :2, :2, :2]], [teacher, teacher[:, :2, :2, :2]])


MAPS = {"sp": SPLoss(), "rkd": RKDLoss(), "pkt": PKTLoss(), "ickd": ickd_loss, "irg": irg}


@pytest.mark.parametrize("name", MAPS)
def test_zero_at_teacher_and_gradient_to_student_only(name):
    loss = MAPS[name]
    student, teacher = draw(4, 5, 2, 2).requires_grad_(), draw(4, 5, 2, 2, seed=1).requires_grad_()
    assert loss(student, student.detach()).abs().item() < 1e-9
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("case", ["zero", "identical", "one zero", "two alike"])
def test_finite_on_degenerate_batches(name, case):
    student = torch.randn(4, 5, 2, 2)
    if case == "zero":
        student = torch.zeros_like(student)
    elif case == "identical":
        student = student[:1].repeat(4, 1, 1, 1)
    elif case == "one zero":
        student[1] = 0
    else:
        student[1] = student[0]
    student.requires_grad_()
    for teacher in (torch.randn(4, 5, 2, 2), student.detach()):
        value = MAPS[name](student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e5


@pytest.mark.parametrize("name", MAPS)
def test_invariances(name):
    loss = MAPS[name]
    student, teacher = draw(4, 5, 2, 2), draw(4, 5, 2, 2, seed=1)
    value = loss(student, teacher)
    torch.testing.assert_close(loss(3 * student, 0.2 * teacher), value)  # scale
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(student[order], teacher[order]), value)  # order of the batch
    if name in ("sp", "rkd", "pkt"):
        rotation = torch.linalg.qr(draw(5, 5, seed=2))[0]
        torch.testing.assert_close(loss(torch.einsum("dc,bchw->bdhw", rotation, student), teacher), value)
    shifted = torch.isclose(loss(student + 1, teacher), value).item()
    assert shifted == (name in ("rkd", "irg"))


@pytest.mark.parametrize("name", MAPS)
def test_float32_under_autocast(name):
    student, teacher = draw(4, 5, 2, 2).float(), draw(4, 5, 2, 2, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, half = MAPS[name](student, teacher), MAPS[name](student.bfloat16(), teacher.bfloat16())
    assert value.dtype == half.dtype == torch.float32
    torch.testing.assert_close(value, MAPS[name](student, teacher), rtol=0, atol=0)


@pytest.mark.parametrize("make", [CCLoss, ICKDLoss])
def test_losses_with_layers_train_them(make):
    loss = make()
    student, teacher = torch.randn(4, 3, 4, 4, requires_grad=True), torch.randn(4, 5, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"Expected build\("):
        loss(student, teacher)
    loss.build(student.shape, teacher.shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    value.backward()
    assert list(loss.parameters())
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_cc_is_zero_at_equal_embeddings_and_depends_on_the_order():
    student, teacher = draw(4, 3), draw(4, 3, seed=1)
    assert cc_loss(student, student).item() == 0
    order = torch.tensor([0, 2, 1, 3])
    assert not torch.isclose(cc_loss(student[order], teacher[order]), cc_loss(student, teacher))


def test_errors():
    one = draw(1, 3, 2, 2)
    for loss in (SPLoss(), RKDLoss(), PKTLoss(), irg):
        with pytest.raises(ValueError, match="Expected a batch of at least 2"):
            loss(one, one)
    with pytest.raises(ValueError, match="Expected one batch size"):
        sp_loss(draw(2, 3), draw(3, 3))
    with pytest.raises(ValueError, match="Expected equally many channels"):
        ickd_loss(draw(2, 3, 2, 2), draw(2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"Expected two embeddings \[B, D\]"):
        cc_loss(draw(2, 3), draw(2, 4))
    with pytest.raises(ValueError, match=r"Expected features \[B, C, h, w\] or \[B, C\]"):
        RKDLoss()(draw(2, 3, 4), draw(2, 3, 4))
    with pytest.raises(ValueError, match="Expected equally many stages"):
        irg_loss([], [])


def test_ickd_of_dead_channels_by_both_ways():
    """Eight channels of 2 x 2 pixels, of which some are dead, go by products with pixels; of 3 x 3 pixels by channels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 8, 2, 2, generator=generator) for _ in range(2))
    student[0, :3], teacher[0, 2:5], teacher[1] = 0, 0, 0
    student.requires_grad_()
    value = ickd_loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    # pixels of zeros change no product of channels
    wider = [torch.nn.functional.pad(x, (0, 1, 0, 1)) for x in (student, teacher)]
    expected = ickd_loss(*wider)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
    assert gradient.isfinite().all()
