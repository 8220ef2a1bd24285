"""Published weights, without a network: what a library would download is made here."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from gkd.models import build_classifier
from gkd.models.classifiers import is_safe, open_classifier


def same(model: nn.Module, source: nn.Module, but: tuple[str, ...] = ()) -> bool:
    state, expected = model.state_dict(), source.state_dict()
    assert state.keys() == expected.keys()
    return all(torch.equal(value, expected[name]) for name, value in state.items() if not name.startswith(but or ("?",)))


@pytest.fixture
def published(monkeypatch):
    """Makes torchvision 'download' the weights of a network that was drawn at random."""
    models = pytest.importorskip("torchvision").models

    def publish(name: str) -> nn.Module:
        source = models.get_model(name)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: source.state_dict())
        return source

    return publish


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT", "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1"])
def test_torchvision_by_name(published, weights):
    source = published("shufflenet_v2_x0_5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = open_classifier("shufflenet_v2_x0_5", 1000, weights)
    assert same(classifier.model, source)
    assert classifier.num_classes == 1000
    assert classifier.preprocessing.mean == (0.485, 0.456, 0.406)
    assert classifier.preprocessing.size == (224, 224)


@pytest.mark.parametrize(("name", "head"), [("shufflenet_v2_x0_5", "fc"), ("squeezenet1_1", "classifier.1")])
def test_torchvision_for_other_classes(published, name, head):
    source = published(name)
    with pytest.warns(
        UserWarning, match=rf"The last layer \({head}\) is new, for 10 classes: torchvision's \S+ have 1000 classes"
    ) as caught:
        classifier = open_classifier(name, 10, "IMAGENET1K_V1")
    assert len(caught) == 1
    assert same(classifier.model, source, (head,))
    assert classifier.model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert classifier.new_layers == [head]
    own = open_classifier(name, 10, "IMAGENET1K_V1", keep_classes=True)
    assert same(own.model, source)
    assert own.num_classes == 1000


def test_file_for_other_classes(tmp_path):
    source = build_classifier("resnet8", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match=r"The last layer \(fc.weight, fc.bias\) is new, for 4 classes: the weights in \S+ have 7 classes"):
        classifier = open_classifier("resnet8", 4, tmp_path / "weights.pt")
    assert same(classifier.model, source, ("fc",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = open_classifier("resnet8", 4, tmp_path / "weights.pt", keep_classes=True)
    assert own.num_classes == 7
    assert same(own.model, source)


@pytest.fixture
def timm_folder(tmp_path):
    timm = pytest.importorskip("timm")
    from timm.models._hub import save_for_hf

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)
    model.pretrained_cfg.update(std=(0.25, 0.25, 0.25), input_size=(3, 32, 32), num_classes=5)
    save_for_hf(model, tmp_path / "folder", model_args=options)
    return model, tmp_path / "folder"


@pytest.mark.parametrize("form", ["timm:{}", "timm:local-dir:{}"])
def test_timm_folder(timm_folder, form):
    source, folder = timm_folder
    classifier = open_classifier(form.format(folder), 5, "DEFAULT")
    assert same(classifier.model, source)
    assert classifier.preprocessing.mean == (0.5, 0.5, 0.5)
    assert classifier.preprocessing.std == (0.25, 0.25, 0.25)
    assert classifier.preprocessing.size == (32, 32)
    with pytest.warns(UserWarning, match=r"The last layer \(head\) is new, for 3 classes: timm's weights of \S+ have 5 classes"):
        classifier = open_classifier(form.format(folder), 3, "DEFAULT")
    assert same(classifier.model, source, ("head",))
    assert open_classifier(form.format(folder), 3, "DEFAULT", keep_classes=True).num_classes == 5
    assert build_classifier(form.format(folder), 3).head.out_features == 3


def test_timm_published(monkeypatch):
    timm = pytest.importorskip("timm")
    source = timm.create_model("mobilenetv3_small_050")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: source.state_dict())
    with pytest.warns(
        UserWarning, match=r"The last layer \(classifier\) is new, for 10 classes: timm's weights of mobilenetv3_small_050 have 1000"
    ):
        classifier = open_classifier("timm:mobilenetv3_small_050", 10, "DEFAULT")
    assert same(classifier.model, source, ("classifier",))
    own = open_classifier("timm:mobilenetv3_small_050", 10, "DEFAULT", keep_classes=True)
    assert same(own.model, source)


def test_timm_statistics_are_its_own(tmp_path):
    pytest.importorskip("timm")
    # timm publishes this one with mean and deviation 0.5, unlike ImageNet's usual statistics.
    options = {"img_size": 32, "embed_dim": 12, "depth": 1}
    name = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    torch.save(build_classifier(name, **options).state_dict(), tmp_path / "weights.pt")
    classifier = open_classifier(name, 10, tmp_path / "weights.pt", options, keep_classes=True)
    assert classifier.preprocessing.mean == classifier.preprocessing.std == (0.5, 0.5, 0.5)
    assert classifier.preprocessing.size == (32, 32)
    # A file for other classes is somebody's own training, of which nothing is known.
    torch.save(build_classifier(name, 10, **options).state_dict(), tmp_path / "own.pt")
    assert open_classifier(name, 10, tmp_path / "own.pt", options).preprocessing is None


def test_timm_hub_without_a_network(monkeypatch):
    pytest.importorskip("timm")

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"Expected to download timm's weights of hf-hub:owner/model \(got: no route\)"):
        build_classifier("timm:hf-hub:owner/model", weights="DEFAULT")


SMALL = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
CONFIGS = {
    "ViT": {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
        "patch_size": 8,
    },
    "Dinov2": {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 32, "patch_size": 8},
    "ConvNext": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"},
}


@pytest.mark.parametrize("family", CONFIGS)
def test_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(num_labels=5, **CONFIGS[family])
    source = getattr(transformers, f"{family}ForImageClassification")(config)
    source.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}')
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        classifier = open_classifier(f"transformers:{tmp_path}", 5, "DEFAULT")
    assert same(classifier.model, source)
    assert classifier.model(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 5)
    assert classifier.preprocessing.std == (0.2, 0.2, 0.2)
    assert classifier.preprocessing.size == ((32, 32) if "image_size" in CONFIGS[family] else None) or family == "ConvNext"
    with pytest.warns(UserWarning, match=r"The last layer \(classifier\S*\) is new, for 3 classes: .* have 5 classes"):
        classifier = open_classifier(f"transformers:{tmp_path}", 3, "DEFAULT")
    assert same(classifier.model, source, ("classifier",))
    assert open_classifier(f"transformers:{tmp_path}", 3, "DEFAULT", keep_classes=True).num_classes == 5
    random = build_classifier(f"transformers:{tmp_path}", 3)
    assert random(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 3)
    assert not same(random, source, ("classifier",))


def test_transformers_without_a_last_layer(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = transformers.Dinov2Model(transformers.Dinov2Config(**CONFIGS["Dinov2"]))
    source.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"The last layer \(classifier\) is new, for 3 classes: .* have no classes"):
        classifier = open_classifier(f"transformers:{tmp_path}", 3, "DEFAULT")
    assert same(classifier.model.dinov2, source)
    assert open_classifier(f"transformers:{tmp_path}", 3, "DEFAULT", keep_classes=True).num_classes is None


def test_transformers_with_options_that_do_not_fit(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=5, **CONFIGS["ViT"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"for this configuration \(got none of this shape for .*position_embeddings"):
        open_classifier(f"transformers:{tmp_path}", 5, "DEFAULT", {"image_size": 64})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Expected an image classifier of transformers at"):
        build_classifier(f"transformers:{tmp_path}")


def test_transformers_that_cannot_be_downloaded(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(FileNotFoundError, match=r"Expected to download owner/model from the Hugging Face hub \(got: no route\)"):
        build_classifier("transformers:owner/model", weights="DEFAULT")


def test_code_of_a_repository_is_not_run(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    with pytest.raises(ValueError, match="Expected an image classifier of transformers at"):
        build_classifier(f"transformers:{tmp_path}", weights="DEFAULT")
    assert not (tmp_path / "was_run").exists()


def test_transformers_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match="Expected transformers to be installed for 'transformers:google/vit'"):
        build_classifier("transformers:google/vit")


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "torchvision:vgg13", "timm:resnet18"])
def test_descriptions_that_lead_to_nothing_else(name):
    assert is_safe(name, {"dropout": 0.5})
    assert not is_safe(name, {"pretrained": True})


@pytest.mark.parametrize(
    "name", ["torch.hub:load", "os:system", "my.package:factory", "timm:hf-hub:a/b", "timm:local-dir:/x", "transformers:a/b", ":x"]
)
def test_descriptions_that_lead_elsewhere(name):
    assert not is_safe(name, {})
