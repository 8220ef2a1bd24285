from __future__ import annotations

import math

import pytest
import torch

from gkd.losses import DKDLoss, KDLoss, MLKDLoss, Outputs, SDDLoss, dkd_loss, kd_loss, sdd_loss
from tests.losses.heads import LinearHead


def draw(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_regions(features, weight, bias, scales):
    """Cells of every grid, one by one: [N][K] of an image."""
    regions = []
    for scale in scales:
        high, wide = features.shape[1] // scale, features.shape[2] // scale
        for i in range(scale):
            for j in range(scale):
                cell = features[:, i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                regions.append(weight @ cell.sum((1, 2)) / (high * wide) + bias)
    return regions


def slow_sdd(student, teacher, heads, target, loss, scales):
    total = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        ours, theirs = (slow_regions(x, *head, scales) for x, head in ((s, heads[0]), (t, heads[1])))
        whole_is_right = theirs[0].argmax() == y
        for a, b in zip(ours, theirs, strict=True):
            weight = 1.0 if (b.argmax() == y) == whole_is_right else 2.0
            total += weight * loss(a[None], b[None], y[None])
    return total / (len(student) * len(ours))


@pytest.fixture
def case():
    student, teacher = draw(6, 3, 4, 8).requires_grad_(), draw(6, 5, 8, 4, seed=1)
    heads = LinearHead(draw(4, 3, seed=2).requires_grad_(), draw(4, seed=3)), LinearHead(draw(4, 5, seed=4), draw(4, seed=5))
    return student, teacher, heads, torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("loss", [KDLoss(temperature=3.0), DKDLoss(beta=2.0)], ids=["kd", "dkd"])
def test_value_and_gradients_agree_with_loops(case, loss):
    student, teacher, heads, target = case
    value = SDDLoss(loss)(student, teacher, Outputs(draw(6, 4), draw(6, 4), target, *heads))
    expected = slow_sdd(student, teacher, heads, target, loss, (1, 2, 4))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    for gradient, slow in zip(*(torch.autograd.grad(x, [student, heads[0].weight]) for x in (value, expected)), strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-9)


def test_regions_that_the_teacher_sees_otherwise_count_double():
    # KL of a fair coin from the teacher's 3 : 1 is 3/4 log 3 - log 2, whichever class is the likelier.
    student, teacher = torch.zeros(1, 3, 2), torch.tensor([[[math.log(3), 0.0], [math.log(3), 0.0], [0.0, math.log(3)]]])
    divergence = 0.75 * math.log(3) - math.log(2)
    for target in (0, 1):
        loss = sdd_loss(student, teacher, torch.tensor([target]), KDLoss(temperature=1.0))
        assert loss.item() == pytest.approx((1 + 1 + 2) / 3 * divergence, rel=1e-5)


def test_with_the_whole_image_alone_it_is_the_loss_itself(case):
    student, teacher, heads, target = case
    whole = [head.bias + x.mean((2, 3)) @ head.weight.T for x, head in ((student, heads[0]), (teacher, heads[1]))]
    outputs = Outputs(*whole, target, *heads)
    torch.testing.assert_close(SDDLoss(KDLoss(), scales=(1,))(student, teacher, outputs), kd_loss(*whole))
    torch.testing.assert_close(SDDLoss(DKDLoss(), scales=(1,))(student, teacher, outputs), dkd_loss(*whole, target))
    assert SDDLoss(KDLoss())(teacher, teacher, Outputs(whole[1], whole[1], target, heads[1], heads[1])).abs() < 1e-9


def test_grids_finer_than_a_map_are_left_out(case):
    student, teacher, heads, target = case
    outputs = Outputs(draw(6, 4), draw(6, 4), target, *heads)
    small = student[:, :, :2, :2]
    torch.testing.assert_close(SDDLoss(KDLoss())(small, teacher, outputs), SDDLoss(KDLoss(), scales=(1, 2))(small, teacher, outputs))


def test_no_gradient_to_the_teacher(case):
    student, teacher, heads, target = case
    teacher.requires_grad_()
    SDDLoss(KDLoss())(student, teacher, Outputs(draw(6, 4), draw(6, 4), target, *heads)).backward()
    assert teacher.grad is None
    assert student.grad.any()


def test_errors():
    with pytest.raises(TypeError, match="Expected a loss of class logits that returns one value"):
        SDDLoss(MLKDLoss())
    with pytest.raises(ValueError, match=r"1 itself for the whole image \(got \(2, 4\)\)"):
        SDDLoss(KDLoss(), scales=(2, 4))
    with pytest.raises(ValueError, match="SDD needs the true class of every image"):
        sdd_loss(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3), torch.zeros(2, 3), KDLoss())
    with pytest.raises(ValueError, match=r"Expected logits of regions \[B, N, K\]"):
        sdd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), KDLoss())
