from __future__ import annotations

import subprocess
import sys
import urllib.error

import pytest
import torch
from torch import nn

from gkd.models import build_classifier
from gkd.models.cifar import CIFAR_MODELS


@pytest.mark.parametrize("name", CIFAR_MODELS)
def test_zoo_by_name(name):
    with torch.device("meta"):
        model = build_classifier(name, num_classes=7)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_case_tells_two_networks_apart():
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        ours, theirs = build_classifier("ResNet50", num_classes=100), build_classifier("resnet50", num_classes=100)
        same_name = build_classifier("vgg13", num_classes=100), build_classifier("torchvision:vgg13", num_classes=100)
    assert type(ours).__module__.startswith("gkd.")
    assert type(theirs).__module__.startswith("torchvision.")
    assert [type(model).__module__.partition(".")[0] for model in same_name] == ["gkd", "torchvision"]


def test_options_reach_the_network():
    assert build_classifier("resnet8", num_classes=3, widths=(4, 4, 8, 8)).fc.in_features == 8
    pytest.importorskip("torchvision")
    assert build_classifier("mobilenet_v3_small", num_classes=3, dropout=0.5).classifier[2].p == 0.5


@pytest.mark.parametrize("name", ["resnet8", "torchvision:resnet18", "timm:resnet18", "torch.nn:Linear"])
def test_unknown_option(name):
    if not name.startswith(("resnet", "torch.")):
        pytest.importorskip(name.partition(":")[0])
    with pytest.raises(ValueError, match=r"Expected .*(wdith|in_features)"):
        build_classifier(name, num_classes=3, wdith=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_off_unless_asked_for(name):
    pytest.importorskip("torchvision")
    size = 75 if name == "inception_v3" else 32
    with torch.device("meta"):
        model = build_classifier(name, num_classes=4, init_weights=False)
        assert model.train()(torch.zeros(2, 3, size, size)).shape == (2, 4)
        assert build_classifier(name, num_classes=4, init_weights=False, aux_logits=True).aux_logits


def test_timm():
    pytest.importorskip("timm")
    with torch.device("meta"):
        assert build_classifier("timm:resnet18", num_classes=5).fc.out_features == 5
    with pytest.raises(ValueError, match=r"Expected the name of a model of timm, such as .*resnet18.*\(got 'resnett18'\)"):
        build_classifier("timm:resnett18")
    with pytest.raises(ValueError, match=r"Expected the name of a model of timm, such as .*resnet18\.\w+.*\(got 'resnet18.none'\)"):
        build_classifier("timm:resnet18.none")
    with pytest.raises(ValueError, match="Expected a model of timm with published weights"):
        build_classifier("timm:coatnet_0_224", weights="DEFAULT")


def test_timm_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="Expected timm to be installed for 'timm:resnet18'"):
        build_classifier("timm:resnet18")


def test_torchvision_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match="torchvision to be installed for 'resnet18'"):
        build_classifier("resnet18")


@pytest.mark.parametrize(
    ("name", "near"), [("resnet2O", "resnet20"), ("Wrn_40_2", "wrn_40_2"), ("mobilenetv2", "MobileNetV2"), ("resnet-34", "resnet34")]
)
def test_unknown_name_lists_the_near_ones(name, near):
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=rf"Expected the name of a classifier, such as .*{near}.*\(got '{name}'\)"):
        build_classifier(name)


def test_torchvision_weights_that_cannot_be_downloaded(monkeypatch):
    pytest.importorskip("torchvision")

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=r"Expected to download .*no route.*put https://.*resnet18.*\.pth into .*or give a file"):
        build_classifier("resnet18", weights="DEFAULT")


def test_torchvision_weights_that_do_not_exist():
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=r"got 'IMAGENET1K_V7'\): a file that exists, or one of IMAGENET1K_V1"):
        build_classifier("resnet34", weights="IMAGENET1K_V7")


def test_file_of_weights(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    source = torchvision.models.squeezenet1_1(num_classes=4)
    torch.save({"model": source.state_dict()}, tmp_path / "teacher.pth")
    model = build_classifier("squeezenet1_1", num_classes=4, weights=tmp_path / "teacher.pth")
    assert torch.equal(model.classifier[1].weight, source.classifier[1].weight)
    with pytest.warns(UserWarning, match=r"The last layer \(classifier.1.weight, .*\) is new, for 3 classes: .* have 4 classes"):
        model = build_classifier("squeezenet1_1", num_classes=3, weights=str(tmp_path / "teacher.pth"))
    assert model.classifier[1].weight.shape[0] == 3
    assert torch.equal(model.features[0].weight, source.features[0].weight)


def test_own_factory(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "class Zoo:\n"
        "    @staticmethod\n"
        "    def small(num_classes, width=2):\n"
        "        return nn.Sequential(nn.Linear(width, num_classes))\n"
        "def number(num_classes):\n"
        "    return num_classes\n"
        "constant = 3\n"
    )
    (tmp_path / "broken_networks.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = build_classifier("own_networks:Zoo.small", num_classes=5, width=3)
    assert isinstance(model, nn.Sequential)
    assert model[0].weight.shape == (5, 3)
    torch.save({"0.weight": torch.ones(5, 2), "0.bias": torch.ones(5)}, tmp_path / "own.pt")
    assert bool((build_classifier("own_networks:Zoo.small", 5, weights=tmp_path / "own.pt")[0].weight == 1).all())

    with pytest.raises(ValueError, match=r"Expected a function or class of own_networks, such as .*number.* \(got 'numbre'\)"):
        build_classifier("own_networks:numbre")
    with pytest.raises(ValueError, match=r"Expected own_networks:number to return a torch.nn.Module \(got int\)"):
        build_classifier("own_networks:number")
    with pytest.raises(ValueError, match="Expected own_networks:constant to be callable"):
        build_classifier("own_networks:constant")
    with pytest.raises(ValueError, match="importable module"):
        build_classifier("own_network.s:number")
    # The mistake is inside the user's module: its own error tells more.
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        build_classifier("broken_networks:number")


def test_import_is_light():
    code = (
        "import sys, gkd.models; "
        "gkd.models.build_classifier('resnet8', num_classes=10); "
        "found = {'torchvision', 'timm', 'torch_geometric', 'gin', 'torch._dynamo'} & set(sys.modules); "
        "others = {name for name in sys.modules if name.startswith('gkd.') and not name.startswith('gkd.models')}; "
        "assert not found and not others, (found, others)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
