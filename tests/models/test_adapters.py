from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from gkd.models import ChannelAdapter


def test_is_a_linear_map_of_every_pixel():
    adapter = ChannelAdapter(3, 5, norm=False)
    torch.nn.init.normal_(adapter.conv.bias)
    x = torch.randn(2, 3, 4, 6)
    weight, bias = adapter.conv.weight.flatten(1), adapter.conv.bias
    expected = torch.einsum("oc,bchw->bohw", weight, x) + bias.view(-1, 1, 1)
    torch.testing.assert_close(adapter(x), expected)
    torch.testing.assert_close(adapter(x[:, :, 0, 0]), F.linear(x[:, :, 0, 0], weight, bias))


def test_norm_standardises_the_channels():
    adapter = ChannelAdapter(4, 7)
    assert adapter.conv.bias is None
    output = adapter(3 + torch.randn(8, 4, 5, 5))
    torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.var((0, 2, 3), correction=0), torch.ones(7), atol=1e-3, rtol=0)
    vectors = adapter(3 + torch.randn(64, 4))
    assert vectors.shape == (64, 7)
    torch.testing.assert_close(vectors.mean(0), torch.zeros(7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [8, 4, 3, 16, (4, 16), (16, 5), (1, 1)])
def test_size_is_matched(size):
    adapter = ChannelAdapter(3, 5, norm=False)
    x = torch.randn(2, 3, 8, 8)
    expected = (size, size) if isinstance(size, int) else size
    assert adapter(x, size=size).shape == (2, 5, *expected)
    fixed = ChannelAdapter(3, 5, size=size)
    assert fixed(x).shape == (2, 5, *expected)
    assert fixed(x, size=(2, 3)).shape == (2, 5, 2, 3)


def test_smaller_maps_are_averages_and_larger_ones_bilinear():
    adapter = ChannelAdapter(3, 5, norm=False)
    x = torch.randn(2, 3, 8, 8)
    # Without the norm, resizing and the convolution commute.
    torch.testing.assert_close(adapter(x, size=4), F.avg_pool2d(adapter(x), 2))
    torch.testing.assert_close(adapter(x, size=16), F.interpolate(adapter(x), scale_factor=2, mode="bilinear"))


def test_variance_is_kept_at_the_start():
    torch.manual_seed(0)
    adapter = ChannelAdapter(256, 512, norm=False)
    assert not adapter.conv.bias.any()
    assert float(adapter.conv.weight.detach().var()) == pytest.approx(1 / 256, rel=0.02)


def test_gradients_reach_input_and_parameters():
    for norm in (True, False):
        adapter = ChannelAdapter(3, 4, norm=norm)
        x = torch.randn(2, 3, 5, 7, requires_grad=True)
        adapter(x, size=(9, 3)).square().sum().backward()
        assert x.grad.isfinite().all()
        assert all(parameter.grad is not None for parameter in adapter.parameters())
    double = copy.deepcopy(ChannelAdapter(2, 3, norm=False)).double()
    assert torch.autograd.gradcheck(lambda x: double(x, size=(4, 2)), torch.randn(1, 2, 3, 3, dtype=torch.double, requires_grad=True))


def test_dtype_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        output = ChannelAdapter(3, 4)(torch.randn(2, 3, 4, 4), size=8)
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4), (2, 5, 3), (3,)])
def test_other_inputs(shape):
    with pytest.raises(ValueError, match=r"Expected features \[B, 3, h, w\] or \[B, 3\] \(got \["):
        ChannelAdapter(3, 5)(torch.zeros(shape))


def test_size_for_vectors():
    with pytest.raises(ValueError, match=r"Expected a map \[B, 3, h, w\] to bring to size 4"):
        ChannelAdapter(3, 5)(torch.zeros(2, 3), size=4)
