from __future__ import annotations

import math

import pytest
import torch

from gkd.losses import channel_attention, feature_attention, node_attention, spatial_attention

X = torch.tensor([[[1.0, -3.0], [0.0, 2.0], [4.0, 0.0]]])  # mean |x| of the nodes: 2, 1, 2; of the features: 5/3, 5/3


def test_hand_values():
    # relative to their mean 5/3 the nodes respond by 1.2, 0.6 and 1.2, which is 0.6 apart
    e = math.exp(0.6)
    expected = torch.tensor([[3 * e / (2 * e + 1), 3 / (2 * e + 1), 3 * e / (2 * e + 1)]])
    torch.testing.assert_close(node_attention(X, temperature=1.0), expected)
    torch.testing.assert_close(feature_attention(X, temperature=1.0), torch.ones(1, 2))


def test_maps_as_in_the_definition():
    features = torch.randn(2, 3, 4, 5)
    mean = features.abs().mean((1, 2, 3))[:, None]
    spatial = 20 * torch.softmax(features.abs().mean(1).flatten(1) / (0.5 * mean), 1).view(2, 4, 5)
    channel = 3 * torch.softmax(features.abs().mean((2, 3)) / (0.5 * mean), 1)
    torch.testing.assert_close(spatial_attention(features, 0.5), spatial)
    torch.testing.assert_close(channel_attention(features, 0.5), channel)


@pytest.mark.parametrize("attention", [node_attention, feature_attention])
def test_mean_one_and_no_gradient(attention):
    x = torch.randn(3, 5, 4, requires_grad=True)
    weight = attention(x, 0.3)
    torch.testing.assert_close(weight.mean(1), torch.ones(3))
    assert not weight.requires_grad


@pytest.mark.parametrize("attention", [node_attention, feature_attention])
def test_infinite_temperature_weighs_all_alike(attention):
    torch.testing.assert_close(attention(torch.randn(3, 5, 4), float("inf")), torch.ones(3, 5 if attention is node_attention else 4))


def test_padding_is_ignored():
    mask = torch.tensor([[True, True, True, False, False], [False] * 5])
    x = torch.full((2, 5, 2), 1e6)
    x[0, :3] = X[0]
    torch.testing.assert_close(node_attention(x, 1.0, mask)[0, :3], node_attention(X, 1.0)[0])
    torch.testing.assert_close(feature_attention(x, 1.0, mask)[:1], feature_attention(X, 1.0))
    assert not node_attention(x, 1.0, mask)[~mask].any()


@pytest.mark.parametrize("attention", [node_attention, feature_attention])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 50.0, 1e30])
def test_the_scale_of_the_features_has_no_influence_and_the_temperature_has(attention, scale):
    x = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0)) ** 3
    torch.testing.assert_close(attention(scale * x, 0.5), attention(x, 0.5))
    assert attention(x, 0.1).max() > attention(x, 0.5).max() + 0.1


def test_a_graph_that_does_not_respond_is_weighed_evenly():
    assert torch.equal(node_attention(torch.zeros(1, 3, 2), 0.5), torch.ones(1, 3))
    assert torch.equal(feature_attention(torch.zeros(1, 3, 2), 0.5), torch.ones(1, 2))
    assert node_attention(torch.zeros(2, 0, 2), 0.5).shape == (2, 0)
    assert feature_attention(torch.zeros(2, 3, 0), 0.5).shape == (2, 0)


def test_half_precision_is_lifted():
    assert node_attention(X.bfloat16(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="Expected a guidance temperature above 0"):
        node_attention(X, temperature)


def test_maps_only():
    with pytest.raises(ValueError, match=r"Expected 'features' of shape \[B, C, h, w\]"):
        spatial_attention(X, 1.0)
