"""Losses between the heads of detectors: hand values, no gradient to the teacher, degenerate inputs."""

from __future__ import annotations

import math

import pytest
import torch

from gkd.losses import CrossKDLoss, KDLoss, LDLoss, MaskKDLoss, ld_loss, mask_kd_loss


def test_numbers_are_compared_by_their_smooth_difference_weighed_by_confidence():
    # |0.5| gives 0.125, |2| gives 1.5; the mean of four sides is 0.40625 and 0; the weights 1 and 0.5 add up to 1.5.
    student = torch.zeros(2, 4)
    teacher = torch.tensor([[0.5, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    loss = ld_loss(student, teacher, torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx((0.125 + 1.5) / 4 / 1.5)


def test_distributions_are_compared_by_their_divergence():
    # One side, two bins, at temperature 1: teacher (3/4, 1/4), student (1/2, 1/2).
    teacher = torch.tensor([[math.log(3.0), 0.0] + [0.0] * 6])
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = ld_loss(torch.zeros(1, 8), teacher, torch.ones(1), temperature=1.0)
    assert loss.item() == pytest.approx(divergence / 4, rel=1e-5)
    # The gradient is that of temperature 1, whatever the temperature, in the limit of flat distributions.
    assert ld_loss(torch.zeros(1, 8), teacher, torch.ones(1), temperature=10.0).item() > 0
    assert ld_loss(teacher, teacher, torch.ones(1)).item() == pytest.approx(0)


def test_masks_by_hand_and_resized():
    # Teacher 1/2, student 3/4: log(1/2) - (log(3/4) + log(1/4)) / 2.
    student = torch.full((1, 2, 2), math.log(3.0), requires_grad=True)
    teacher = torch.zeros(1, 2, 2, requires_grad=True)
    loss = mask_kd_loss(student, teacher)
    assert loss.item() == pytest.approx(math.log(0.5) - (math.log(0.75) + math.log(0.25)) / 2, rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert mask_kd_loss(student.detach(), torch.zeros(1, 4, 4)).item() == pytest.approx(loss.item(), rel=1e-5)


def test_nothing_to_compare_gives_zero_with_a_gradient():
    student = torch.zeros(0, 4, 4, requires_grad=True)
    loss = MaskKDLoss()(student, torch.zeros(0, 4, 4))
    loss.backward()
    assert loss.item() == 0
    places = torch.randn(3, 4, requires_grad=True)
    loss = LDLoss()(places, torch.randn(3, 4), torch.zeros(3))  # the teacher is sure of nothing
    loss.backward()
    assert loss.item() == 0
    assert not places.grad.any()


def test_what_is_crossed_is_compared_as_asked():
    logits, goal = torch.randn(4, 3), torch.randn(4, 3)
    assert CrossKDLoss().dense
    crossed = CrossKDLoss(KDLoss(temperature=2.0))
    assert not crossed.dense
    torch.testing.assert_close(crossed(logits, goal, None), KDLoss(temperature=2.0)(logits, goal, None))


@pytest.mark.parametrize(
    ("student", "teacher", "weight"),
    [((2, 4), (2, 8), (2,)), ((2, 6), (2, 6), (2,)), ((2, 4), (2, 4), (3,))],
)
def test_wrong_shapes(student, teacher, weight):
    with pytest.raises(ValueError, match="Expected"):
        ld_loss(torch.zeros(student), torch.zeros(teacher), torch.zeros(weight))
