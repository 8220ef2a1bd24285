"""How outputs become maps: tokens, channels that stand last, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gkd.models import FeatureTaps, Teacher, list_taps, tokens_to_map
from gkd.models.cifar import resnet8
from gkd.models.maps import fits, patch_grid, token_grid


class Patches(nn.Module):
    """A transformer's skeleton: patches of 4x4 pixels, `extra` tokens before them, one layer on the tokens, the mean."""

    def __init__(self, extra: int = 1, width: int = 8, patch: int = 4) -> None:
        super().__init__()
        self.extra = extra
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        tokens = torch.cat([tokens.new_zeros(len(tokens), self.extra, tokens.size(2)), tokens], 1)
        return self.head(self.block(tokens).mean(1))


class Last(nn.Module):
    """Maps with their channels last, as Swin has them."""

    def __init__(self, width: int = 8, stride: int = 4, only: int | None = None) -> None:
        super().__init__()
        self.only = only
        self.stem = nn.Conv2d(3, width, stride, stride)
        self.act = nn.ReLU()
        self.block = nn.Linear(width, width)

    def forward(self, images):
        assert self.only is None or images.size(-1) == self.only, "another size"
        return self.block(self.act(self.stem(images).permute(0, 2, 3, 1))).mean((1, 2))


def images(height: int = 16, width: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width)


def test_tokens_to_map_hand_value():
    # One class token, then the patches row by row: patch (row, column) carries 10 row + column.
    patches = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
    tokens = torch.cat([torch.tensor([99.0]), patches]).view(1, 7, 1)
    expected = torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]).view(1, 1, 2, 3)
    assert torch.equal(tokens_to_map(tokens, (2, 3)), expected)
    assert torch.equal(tokens_to_map(expected.permute(0, 2, 3, 1), (2, 3)), expected)


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 12, 8), (2, 257, 8), (2, 3, 2, 8), (2, 8)])
def test_tokens_that_do_not_fill_the_grid(shape):
    with pytest.raises(ValueError, match=r"Expected tokens \[B, N, C\] with N from 6 to 11"):
        tokens_to_map(torch.zeros(shape), (2, 3))


@pytest.mark.parametrize("extra", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [(16, 16), (16, 32), (20, 12)])
def test_auto_is_the_grid_of_the_patch_embedding(extra, size):
    model = Patches(extra)
    x = images(*size)
    _, features = FeatureTaps(model, ["embed", "block@auto"])(x)
    torch.testing.assert_close(features["block@auto"], model.block(features["embed"].movedim(1, -1)).movedim(-1, 1))


def test_auto_of_merged_patches():
    model = Patches()
    assert [token_grid(model, tokens, (60, 28)) for tokens in (105, 106, 32, 8, 2)] == [(15, 7), (15, 7), (8, 4), (4, 2), (2, 1)]
    assert token_grid(model, 60, (60, 28)) is None


def test_auto_without_a_patch_embedding():
    # Seven-pixel convolutions with stride 4, as in a hybrid: 8 x 8 tokens and a class token. A third of the networks of timm are like it.
    model = nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3), nn.Flatten(2))
    assert patch_grid(model, (32, 32)) is None
    assert token_grid(model, 65, (32, 32)) == (8, 8)
    assert token_grid(model, 33, (32, 64)) == (4, 8)
    assert token_grid(model, 57, (32, 32)) is None  # 7 x 7 and eight more


@pytest.mark.parametrize("declared", [9, 16])
def test_auto_with_as_many_extra_tokens_as_the_model_declares(declared):
    model = Patches(declared)
    with pytest.raises(ValueError, match="Expected tokens that form a grid"):
        FeatureTaps(model, "block@auto")(images(24, 24))
    model.num_prefix_tokens = declared
    assert FeatureTaps(model, "block@auto").shapes((3, 24, 24))["block@auto"] == (2, 8, 6, 6)
    assert FeatureTaps(model, "block@6x6").shapes((3, 24, 24))["block@6x6"] == (2, 8, 6, 6)


@pytest.mark.parametrize(
    ("pixels", "grid", "message"),
    [
        (64, "14x14", r"the grid 16x16 for 257 tokens of images 64x64 \(got 'block@14x14'\)"),
        (16, "2x8", r"the grid 4x4 for 17 tokens of images 16x16 \(got 'block@2x8'\)"),
        (16, "3x3", r"the grid 4x4 for 17 tokens"),
        (16, "4x5", r"the grid 4x4 for 17 tokens"),
    ],
)
def test_another_grid_than_the_models_own(pixels, grid, message):
    with pytest.raises(ValueError, match=message):
        FeatureTaps(Patches(), f"block@{grid}")(images(pixels, pixels))


def test_tokens_without_a_grid_are_answered_with_the_form_to_write():
    with pytest.raises(ValueError, match=r"got tokens \[2, 17, 8\]\); to lay them out as a map, write 'block@auto' or 'block@4x4'"):
        FeatureTaps(Patches(), "block")(images())
    with pytest.raises(ValueError, match="write 'block@auto'"):
        FeatureTaps(Patches(), "block").shapes((3, 16, 16))


def test_auto_of_a_vector():
    with pytest.raises(ValueError, match=r"Expected tokens or a map at 'head@auto' \(got \[2, 3\]\); leave out what follows the @"):
        FeatureTaps(Patches(), "head@auto")(images())


@pytest.mark.parametrize(("width", "size"), [(8, (16, 16)), (4, (16, 16)), (8, (16, 32)), (4, (8, 16)), (8, (32, 16)), (8, (32, 64))])
@pytest.mark.parametrize("path", ["act", "block", "block@auto"])
def test_channels_that_stand_last_are_moved(width, size, path):
    # With 4 channels on 4x4 maps, and on 8x16 images where (4, 4) ... no axis tells by its length alone: another size is asked for.
    model = Last(width)
    x = images(*size)
    _, features = FeatureTaps(model, ["stem", path])(x)
    expected = features["stem"].relu() if path == "act" else model.block(features["stem"].movedim(1, -1).relu()).movedim(-1, 1)
    torch.testing.assert_close(features[path], expected)
    assert features[path].shape == (2, width, size[0] // 4, size[1] // 4)


def test_channels_first_with_as_many_channels_as_pixels():
    # 16 channels on 16x16 maps: nothing is moved, and nothing is asked twice of a network of convolutions.
    calls = []
    model = resnet8()
    model.register_forward_hook(lambda *_: calls.append(1))
    x = images()
    _, features = FeatureTaps(model, ["layer1", "layer1.-1.downsample"])(x)
    torch.testing.assert_close(features["layer1.-1.downsample"], model.bn1(model.conv1(x)).relu())
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())
    torch.testing.assert_close(FeatureTaps(model, "1")(x)[1]["1"], model(x))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(4))  # 4 channels, 4x4 pixels whatever the image
    torch.testing.assert_close(FeatureTaps(model, "1")(x)[1]["1"], model(x))


def test_network_of_one_size_whose_axes_cannot_be_told_apart():
    taps = FeatureTaps(Last(4, only=16), "block")
    with pytest.raises(ValueError, match=r"Expected to see which axes of the output of 'block' are height and width \(got \[2, 4, 4, 4\]"):
        taps(images())
    assert FeatureTaps(Last(8, only=16), "block").shapes((3, 16, 16))["block"] == (2, 8, 4, 4)
    assert FeatureTaps(Last(4, only=16), "stem").shapes((3, 16, 16))["stem"] == (2, 4, 4, 4)


def test_windows_are_no_map():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 2, 2)
            self.block = nn.Linear(8, 8)

        def forward(self, x):
            x = self.embed(x)  # [B, 8, 16, 16]: 64 windows of 4 pixels
            windows = x.unflatten(3, (8, 2)).unflatten(2, (8, 2)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 8)
            return self.block(windows).unflatten(0, (len(x), 64)).mean((1, 2))

    assert dict(list_taps(Windows(), (3, 32, 32))) == {"embed": (8, 16, 16)}
    with pytest.raises(ValueError, match=r"Expected one map for each of the 2 images at 'block@auto' \(got \[128, 4, 8\]\)"):
        FeatureTaps(Windows(), "block@auto")(images(32, 32))


def test_probing_leaves_modes_and_generators():
    model = nn.Sequential(Last(4), nn.Dropout())
    model[0].act.eval()
    generator = torch.get_rng_state()
    FeatureTaps(model, "0.act").shapes((3, 16, 16))
    assert torch.equal(generator, torch.get_rng_state())
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]


@pytest.mark.filterwarnings("ignore")
def test_compiled_in_one_graph():
    model = Patches()
    x = images()
    expected = FeatureTaps(Patches(), "block@auto").shapes((3, 16, 16))["block@auto"]
    taps = FeatureTaps(model, "block@auto")
    _, features = torch.compile(lambda x: taps(x), backend="aot_eager", fullgraph=True)(x)
    assert features["block@auto"].shape == expected
    last = Last()
    taps = FeatureTaps(last, "block")
    _, features = torch.compile(lambda x: taps(x), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(features["block"], FeatureTaps(last, "block")(x)[1]["block"])


def test_teacher_of_another_resolution():
    network = Patches()
    taps = FeatureTaps(Teacher(network, input_size=(16, 24)), ["block@auto"])
    assert taps.shapes((3, 8, 8))["block@auto"] == (2, 8, 4, 6)
    assert taps(images(8, 8))[1]["block@auto"].shape == (2, 8, 4, 6)


def test_fits():
    assert fits((1, 1), (224, 224))
    assert fits((14, 14), (224, 224))
    assert not fits((14, 13), (224, 224))
    assert fits((7, 10), (200, 300))  # 6.25 and 9.375 rounded up
    assert not fits((10, 7), (200, 300))


def test_list_of_taps():
    taps = dict(list_taps(Patches(), (3, 16, 24)))
    assert taps == {"embed": (8, 4, 6), "block@auto": (8, 4, 6), "head": (3,)}
    assert dict(list_taps(Last(4), (3, 16, 16))) == {"stem": (4, 4, 4), "act": (4, 4, 4), "block": (4, 4, 4)}
    model = resnet8(num_classes=7)
    taps = dict(list_taps(model, (3, 32, 32)))
    assert taps["layer2"] == (32, 16, 16)
    assert taps["avgpool"] == (64,)
    assert taps["fc"] == (7,)
    assert model.training


def test_every_listed_path_can_be_tapped():
    for model, size in ((Patches(), 16), (Last(4), 16), (resnet8(), 16)):
        listed = list_taps(model, (3, size, size))
        shapes = FeatureTaps(model, [tap.path for tap in listed]).shapes((3, size, size))
        assert {path: tuple(shape[1:]) for path, shape in shapes.items()} == dict(listed)


@pytest.mark.parametrize(
    ("build", "size", "expected"),
    [
        (lambda tv: tv.VisionTransformer(16, 4, 1, 2, 8, 8), 16, {"encoder.layers.encoder_layer_0@auto": (8, 4, 4)}),
        (
            lambda tv: tv.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2]),
            32,
            {"features.0": (8, 8, 8), "features.1": (8, 8, 8), "features.3.0.attn": (16, 4, 4), "permute": (16, 4, 4)},
        ),
        (
            lambda tv: tv.ConvNeXt([tv.convnext.CNBlockConfig(8, None, 2)]),
            32,
            {"features.1": (8, 8, 8), "features.1.0.block.2": (8, 8, 8), "features.1.0.block.3": (32, 8, 8)},
        ),
    ],
)
def test_networks_of_torchvision(build, size, expected):
    models = pytest.importorskip("torchvision").models
    model = build(models)
    taps = dict(list_taps(model, (3, size, size)))
    assert {path: taps[path] for path in expected} == expected
    shapes = FeatureTaps(model, list(expected)).shapes((3, size, size))
    assert {path: tuple(shape[1:]) for path, shape in shapes.items()} == expected


@pytest.mark.parametrize(
    ("name", "options", "size", "expected"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "embed_dim": 12, "depth": 1}, 32, {"blocks.0@auto": (12, 8, 8)}),
        ("vit_base_patch16_reg4_gap_256", {"img_size": 32, "embed_dim": 12, "depth": 1}, 32, {"blocks.0@auto": (12, 2, 2)}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 12, "depth": 1}, 32, {"blocks.0@auto": (12, 2, 2)}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (3, 3)},
            56,
            {"layers.1": (24, 7, 7)},
        ),
        (
            "convnext_atto",
            {"depths": (1,) * 4, "dims": (8,) * 4, "conv_mlp": False},
            64,
            {"stages.1": (8, 8, 8), "stages.0.blocks.0.mlp": (8, 16, 16)},
        ),
    ],
)
def test_networks_of_timm(name, options, size, expected):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3, **options)
    taps = dict(list_taps(model, (3, size, size)))
    assert {path: taps[path] for path in expected} == expected
