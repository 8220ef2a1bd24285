from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gkd.models import Teacher, build_classifier, find_head

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network(*after):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *after)


@pytest.mark.parametrize(
    ("name", "layer", "path"),
    [
        ("resnet8", "fc", "layer3"),
        ("vgg8", "classifier", "relu4"),
        ("MobileNetV2", "classifier.0", "conv2"),
        ("ShuffleV2", "linear", "relu"),
    ],
)
def test_the_last_layer_of_the_zoo_and_the_map_that_it_sees(name, layer, path):
    model = build_classifier(name, num_classes=7).eval()
    head = find_head(model, (3, 32, 32))
    assert (head.name, head.num_classes) == (layer, 7)
    maps = {}
    model.get_submodule(path).register_forward_hook(lambda _module, _args, output: maps.update({path: output.clone().relu()}))
    logits = model(IMAGES)
    head.check_map(maps[path], logits)
    torch.testing.assert_close(maps[path].mean((2, 3)) @ head.weight.T + head.bias, logits, rtol=1e-4, atol=1e-5)


def test_a_one_by_one_convolution_is_a_last_layer_too():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 5, 1, bias=False), nn.Flatten())
    head = find_head(model, (3, 8, 8))
    assert head.name == "1"
    assert head.weight.shape == (5, 3)
    assert head.bias is None


def test_a_network_without_a_last_linear_layer_says_so_when_it_is_asked():
    head = find_head(network(nn.Linear(6, 5), nn.LayerNorm(5)), (3, 8, 8))
    assert head.num_classes == 5
    with pytest.raises(ValueError, match=r"logits are the output of a linear layer \(got Sequential, where something follows"):
        _ = head.weight


def test_the_rows_of_a_teacher_have_the_order_of_its_answers():
    teacher = Teacher(network(nn.Linear(6, 3)), logit_order=[2, 0, 1], input_size=16)
    head, images = find_head(teacher, (3, 8, 8)), IMAGES[:, :, :16, :16]
    maps = teacher.model[1](teacher.model[0](images))
    torch.testing.assert_close(maps.mean((2, 3)) @ head.weight.T + head.bias, teacher(images))


def test_the_head_follows_its_network():
    model = network(nn.Linear(6, 3))
    head = find_head(model, (3, 8, 8))
    twin, twins_head = copy.deepcopy((model, head))
    nn.init.zeros_(model[4].weight)
    assert not head.weight.any()
    assert twins_head.weight is not head.weight
    assert twins_head.layer is twin[4]
    model.double()
    assert head.weight.dtype is torch.float64


def test_finding_leaves_no_trace():
    model = network(nn.Dropout(), nn.Linear(6, 3)).train()
    before, state = torch.random.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    find_head(model, (3, 8, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model[4].training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_another_map_is_refused_unless_dropout_hides_it():
    model = network(nn.Dropout(), nn.Linear(6, 3)).eval()
    head, maps = find_head(model, (3, 32, 32)), model[0](IMAGES)
    with pytest.raises(ValueError, match=r"Expected the map whose mean the last layer of Sequential sees \(got a map \[4, 6, 32, 32\]"):
        head.check_map(maps - 1, model(IMAGES))
    with pytest.raises(ValueError, match="hidden layers, a norm or a class token"):
        head.check_map(IMAGES, model(IMAGES))
    model.train()
    head.check_map(maps - 1, model(IMAGES))
    model.eval()
    head.check_map(maps.relu(), model(IMAGES))
    head.check_map(maps - 1, model(IMAGES))  # once is enough
