"""The CRD zoo against the original.

crd_zoo.json was recorded from RepDistiller's own models (commit b84f547, 100 classes): number of parameters, number of
entries of the state_dict, a hash of its names and shapes in order, and the first three logits of the first image, in eval and
then in train mode, with the weights and images that `planted` and `images` below draw from NumPy's frozen generator.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gkd.models import FeatureTaps
from gkd.models.cifar import CIFAR_MODELS, resnet20, vgg8, wrn_16_1
from gkd.models.cifar.resnet import ResNet
from gkd.models.cifar.wide_resnet import WideResNet

RECORD = json.loads(Path(__file__).with_name("crd_zoo.json").read_text())

# Issue 3, from the papers that compare on these networks.
PUBLISHED = {
    "resnet20": 278_324,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_40_2": 2_255_156,
    "vgg13": 9_462_180,
    "MobileNetV2": 812_836,
    "ShuffleV2": 1_355_528,
    "ResNet50": 23_705_252,
}


def planted(model: nn.Module) -> nn.Module:
    generator = np.random.RandomState(0)
    for name, value in model.state_dict().items():
        if value.dtype == torch.long:
            value.zero_()
            continue
        drawn = generator.standard_normal(value.shape)
        if name.endswith("running_var"):
            drawn = 0.5 + drawn**2
        elif value.dim() > 1:
            drawn = drawn * (2 / value[0].numel()) ** 0.5
        else:
            drawn = 1 + 0.1 * drawn if name.endswith("weight") else 0.1 * drawn
        value.copy_(torch.from_numpy(drawn))
    return model


def images() -> Tensor:
    return torch.from_numpy(np.random.RandomState(1).standard_normal((2, 3, 32, 32))).float()


def test_every_name_is_recorded():
    assert set(RECORD) == set(CIFAR_MODELS)
    assert {name: RECORD[name]["parameters"] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", RECORD)
def test_names_and_shapes_are_the_originals(name):
    record = RECORD[name]
    with torch.device("meta"):
        model = CIFAR_MODELS[name](num_classes=100)
    state = model.state_dict()
    names = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    assert len(state) == record["entries"]
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == record["sha256"], names


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet8x4", "ResNet50", "wrn_16_1", "wrn_16_2", "vgg8", "vgg13", "MobileNetV2", "ShuffleV1", "ShuffleV2"]
)
def test_logits_are_the_originals(name):
    with torch.device("meta"):
        model = CIFAR_MODELS[name](num_classes=100)
    planted(model.to_empty(device="cpu"))
    with torch.no_grad():
        for mode in ("eval", "train"):
            model.train(mode == "train")
            logits = model(images())
            expected = torch.tensor(RECORD[name][mode])
            assert logits.shape == (2, 100)
            # The record has 5 decimals; sums in another order differ by some 1e-7 of the largest logit.
            torch.testing.assert_close(logits[0, :3], expected, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet8", [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ("resnet8x4", [(64, 32, 32), (128, 16, 16), (256, 8, 8)]),
        ("ResNet50", [(256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)]),
        ("wrn_16_2", [(32, 32, 32), (64, 16, 16), (128, 8, 8)]),
        ("vgg8", [(128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)]),
        ("MobileNetV2", [(12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)]),
        ("ShuffleV1", [(240, 16, 16), (480, 8, 8), (960, 4, 4)]),
        ("ShuffleV2", [(116, 16, 16), (232, 8, 8), (464, 4, 4)]),
    ],
)
def test_stages_and_embedding(name, shapes):
    with torch.device("meta"):
        model = CIFAR_MODELS[name]()
    features = FeatureTaps(model, [*model.stages, "avgpool"]).shapes((3, 32, 32))
    *maps, embedding = features.values()
    assert [tuple(shape[1:]) for shape in maps] == shapes
    assert len(embedding) == 2


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "ShuffleV1"])
def test_stages_are_activated(name):
    model = CIFAR_MODELS[name]()
    _, features = FeatureTaps(model, model.stages)(images())
    for path, feature in features.items():
        assert float(feature.detach().min()) == 0, path


def test_last_stage_is_what_the_classifier_sees():
    model = resnet20(num_classes=10).eval()
    logits, features = FeatureTaps(model, ["layer3"])(images())
    torch.testing.assert_close(model.fc(features["layer3"].mean((2, 3))), logits)


def test_activated_maps_of_a_wide_resnet():
    model = wrn_16_1().eval()
    paths = ["block1", "block2.layer.0.relu1", "block2", "block3.layer.0.relu1", "block3", "relu"]
    _, features = FeatureTaps(model, paths)(images())
    norms = {"block1": model.block2.layer[0].bn1, "block2": model.block3.layer[0].bn1, "block3": model.bn1}
    for before, after in zip(paths[::2], paths[1::2], strict=True):
        assert float(features[before].detach().min()) < 0
        torch.testing.assert_close(norms[before](features[before]).relu(), features[after])


def test_stages_of_vgg_before_activation():
    model = vgg8().eval()
    _, features = FeatureTaps(model, ["block3", "relu3"])(images())
    assert float(features["block3"].detach().min()) < 0
    torch.testing.assert_close(features["block3"].relu(), features["relu3"], rtol=0, atol=0)


@pytest.mark.parametrize("name", CIFAR_MODELS)
def test_other_sizes(name):
    with torch.device("meta"):
        model = CIFAR_MODELS[name](num_classes=10)
        for size in (8, 28, 64):
            assert model(torch.zeros(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_every_parameter_gets_a_gradient(name):
    model = CIFAR_MODELS[name](num_classes=10)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    lacking = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]
    assert not lacking


def test_vgg_pools_once_more_from_64_pixels_on():
    with torch.device("meta"):
        taps = FeatureTaps(vgg8(), ["relu4"])
    assert taps.shapes((3, 64, 64))["relu4"][2:] == (4, 4)
    assert taps.shapes((3, 32, 32))["relu4"][2:] == (4, 4)


@pytest.mark.parametrize(("network", "arguments", "form"), [(ResNet, (18,), "6 n \\+ 2"), (WideResNet, (18, 1), "6 n \\+ 4")])
def test_impossible_depth(network, arguments, form):
    with pytest.raises(ValueError, match=f"Expected a depth of {form} \\(got 18\\)"):
        network(*arguments)


def test_initial_weights():
    torch.manual_seed(0)
    model = vgg8()
    weight = model.block3[0].weight.detach()
    # He, fan out: variance 2 / (9 * 512); standard error of the estimate below 0.1 %.
    assert float(weight.std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not model.block3[0].bias.any()
    assert not model.classifier.bias.any()
    assert not wrn_16_1().fc.bias.any()
    assert resnet20().fc.bias.any()


@pytest.mark.parametrize("name", ["resnet8", "ResNet50", "ShuffleV1", "ShuffleV2"])
def test_maps_before_their_activation(name):
    model = CIFAR_MODELS[name](num_classes=10)
    stages = [path for path in model.stages if path != "layer4"]
    _, features = FeatureTaps(model, [*stages, *(f"{stage}.-1.preact" for stage in stages)])(torch.randn(2, 3, 8, 8))
    for stage in stages:
        before, after = features[f"{stage}.-1.preact"].detach(), features[stage].detach()
        assert float(before.min()) < 0
        if name == "ShuffleV2":
            before = before.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # the shuffle comes after
        torch.testing.assert_close(before.relu(), after, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_the_pooled_vector_pulls_at_everything_below_the_classifier(name):
    model = CIFAR_MODELS[name](num_classes=10)
    _, features = FeatureTaps(model, "avgpool")(torch.randn(2, 3, 8, 8))
    features["avgpool"].square().sum().backward()
    lacking = {key.split(".")[0] for key, parameter in model.named_parameters() if parameter.grad is None}
    assert lacking <= {"fc", "linear", "classifier"}
