from __future__ import annotations

import pytest
import torch

from gkd.losses import at_loss, sp_loss
from gkd.losses.inputs import gram, sum_of_squares, vectors

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def maps(seed=0, dtype=torch.float32, layout=torch.contiguous_format):
    values = torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=layout)


def test_gram_has_the_derivatives_of_a_product():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 3, dtype=torch.float64)  # not symmetric
    assert torch.equal(gram(x), x @ x.mT)
    expected, got = (torch.autograd.grad((function(x) * weight).sum(), x)[0] for function in (lambda x: x @ x.mT, gram))
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradgradcheck(gram, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_squares(layout):
    x = maps(dtype=torch.float64, layout=layout).requires_grad_()
    torch.testing.assert_close(sum_of_squares(x), x.square().sum(1))
    assert torch.autograd.gradcheck(sum_of_squares, x)
    zero = torch.zeros(1, 2, 1, 1, requires_grad=True)
    sum_of_squares(zero).sum().backward()
    assert zero.grad.abs().sum() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_squares_of_half_precision_are_those_of_float32(layout):
    x, weight = maps(dtype=torch.bfloat16, layout=layout).requires_grad_(), torch.rand(3, 4, 5)
    exact = x.detach().float().requires_grad_()
    got, expected = sum_of_squares(x), exact.square().sum(1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    (own,), (other,) = torch.autograd.grad((got * weight).sum(), x), torch.autograd.grad((expected * weight).sum(), exact)
    assert own.dtype == torch.bfloat16
    torch.testing.assert_close(own.float(), other, rtol=2**-7, atol=0)  # two roundings


@pytest.mark.parametrize("loss", [at_loss, sp_loss])
def test_the_layout_in_memory_makes_no_difference(loss):
    values, gradients = [], []
    for layout in LAYOUTS:
        student, teacher = maps(0, layout=layout).requires_grad_(), maps(1, layout=layout)
        values.append(loss(student, teacher))
        gradients.append(torch.autograd.grad(values[-1], student)[0])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(loss(maps(0, layout=LAYOUTS[0]), maps(1, layout=LAYOUTS[1])), values[0].detach())


def test_vectors_are_not_copied():
    for layout in LAYOUTS:
        x = maps(layout=layout)
        assert vectors(x).data_ptr() == x.data_ptr()
        assert vectors(x).shape == (3, 160)
    assert vectors(torch.rand(3, 7)).shape == (3, 7)
