from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gkd.models import FeatureTaps, Teacher
from gkd.models.cifar import resnet8, resnet20, wrn_16_1


class Overwriting(nn.Module):
    """Norms whose outputs are overwritten by an in-place ReLU and, in training only, by an in-place dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 4, 1)
        self.dropout = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        return self.dropout(self.last(self.relu(self.bn(self.conv(x)))))


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_output_and_features_are_the_models_own(images):
    model = resnet8(num_classes=10).eval()
    taps = FeatureTaps(model, ["layer3", "layer1", "layer1"])
    output, features = taps(images)
    assert list(features) == ["layer3", "layer1"]
    torch.testing.assert_close(output, model(images), rtol=0, atol=0)
    stem = F.relu(model.bn1(model.conv1(images)))
    torch.testing.assert_close(features["layer1"], model.layer1(stem), rtol=0, atol=0)
    assert not hasattr(taps, "parameters")


def test_gradient_flows_through_a_tap(images):
    model = resnet8()
    _, features = FeatureTaps(model, "layer2")(images)
    features["layer2"].sum().backward()
    assert model.conv1.weight.grad.any()
    assert model.fc.weight.grad is None


@pytest.mark.parametrize("training", [False, True])
def test_map_that_is_overwritten_in_place(images, training):
    model = Overwriting().train(training)
    taps = FeatureTaps(model, ["conv", "bn", "relu", "last"])
    reference = Overwriting().train(training)
    reference.load_state_dict(model.state_dict())
    norm = reference.bn(reference.conv(images))
    last = reference.last(norm.relu())
    for _ in range(3):
        _, features = taps(images)
        torch.testing.assert_close(features["bn"], norm)
        torch.testing.assert_close(features["relu"], norm.relu())
        torch.testing.assert_close(features["last"], last)
    features["bn"].sum().backward()


def test_only_overwritten_maps_are_copied(images):
    model = Overwriting().eval()
    taps = FeatureTaps(model, ["bn", "last"])
    outputs = {}
    for name in ("bn", "last"):
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output, name=name: outputs.update({name: output}))
    taps(images)
    _, features = taps(images)
    assert features["last"] is outputs["last"]
    assert features["bn"] is not outputs["bn"]


def test_probing_in_eval_does_not_spoil_training(images):
    taps = FeatureTaps(Overwriting(), "last")
    taps.shapes((3, 16, 16))
    _, features = taps(images)
    # Dropout would have zeroed about half of the entries.
    assert float((features["last"] == 0).float().mean()) < 0.01


def test_module_that_is_overwritten_only_later_is_an_error(images):
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 1)
            self.spoil = False

        def forward(self, x):
            x = self.inner(x)
            return F.relu(x, inplace=self.spoil)

    model = Fickle()
    taps = FeatureTaps(model, "inner")
    taps(images)
    model.spoil = True
    with pytest.raises(RuntimeError, match="Expected the output of 'inner' to stay as it is"):
        taps(images)
    _, features = taps(images)
    assert float(features["inner"].detach().min()) < 0


def test_shared_module_gives_its_last_output(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    output, features = FeatureTaps(Twice(), "conv")(images)
    assert features["conv"] is not None
    torch.testing.assert_close(features["conv"], output)


@pytest.mark.parametrize("path", ["layer9", "", "layer1.", "fc.weight", "Layer1"])
def test_unknown_path_lists_the_near_ones(path):
    with pytest.raises(ValueError, match=r"Expected the path of a module of ResNet, such as .*(layer|conv).* \(got '"):
        FeatureTaps(resnet8(), ["layer1", path])


def test_module_that_is_not_reached(images):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Conv2d(3, 3, 1)
            self.idle = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"got no call of idle\)"):
        FeatureTaps(Idle(), ["used", "idle"])(images)


def test_output_that_is_no_tensor():
    model = nn.Sequential(nn.LSTM(4, 4))
    taps = FeatureTaps(model, "0")
    with pytest.raises(TypeError, match=r"Expected the module at '0' to return a tensor \(got tuple\)"):
        taps(torch.randn(3, 4))
    assert isinstance(model(torch.randn(3, 4)), tuple)


def test_shapes_leave_no_trace():
    model = wrn_16_1()
    model.block1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    shapes = FeatureTaps(model, ["block2", "relu"]).shapes((3, 16, 16), batch=5)
    assert shapes == {"block2": (5, 32, 8, 8), "relu": (5, 64, 4, 4)}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_shapes_restore_the_generator_and_modes_after_a_failure():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            torch.rand(3)
            if x.size(-1) == 4:
                raise KeyError("too small")
            return self.conv(x)

    model = Noisy()
    taps = FeatureTaps(model, "conv")
    generator = torch.get_rng_state()
    with pytest.raises(KeyError):
        taps.shapes((3, 4, 4))
    assert taps.shapes((3, 5, 5)) == {"conv": (2, 3, 5, 5)}
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training


def test_shapes_follow_the_dtype_and_are_remembered():
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).double()
    model.register_forward_hook(lambda _module, args, _output: calls.append(args[0].dtype))
    taps = FeatureTaps(model, "0")
    assert taps.shapes((3, 4, 4)) == taps.shapes((3, 4, 4))
    assert calls == [torch.float64]


def test_nothing_is_kept_outside_a_call(images):
    model = resnet8()
    taps = FeatureTaps(model, ["layer1"])
    taps(images)
    model(images)
    copy.deepcopy(model)  # fails if a hook held a tensor of the graph
    pickle.dumps(model)
    assert taps._recorder.maps == {}
    assert taps._recorder.seen == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_work_on_the_copied_model(images, duplicate):
    model = resnet8().eval()
    taps = FeatureTaps(model, ["layer2"])
    expected = taps(images)[1]["layer2"]
    twin, twin_taps = duplicate((model, taps))
    assert twin_taps.model is twin
    with torch.no_grad():
        twin.conv1.weight.zero_()
    assert not torch.equal(twin_taps(images)[1]["layer2"], expected)
    torch.testing.assert_close(taps(images)[1]["layer2"], expected, rtol=0, atol=0)
    twin_taps.close()
    assert not twin.layer2._forward_hooks
    assert model.layer2._forward_hooks


def test_closed_taps():
    model = resnet8()
    taps = FeatureTaps(model, ["layer1", "layer2"])
    taps.close()
    taps.close()
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="closed"):
        taps(torch.zeros(2, 3, 8, 8))


def test_two_taps_on_one_model_are_independent(images):
    model = resnet8()
    first, second = FeatureTaps(model, ["layer1"]), FeatureTaps(model, ["layer1", "layer2"])
    assert list(first(images)[1]) == ["layer1"]
    assert list(second(images)[1]) == ["layer1", "layer2"]
    second.close()
    assert list(first(images)[1]) == ["layer1"]


def test_inference_mode(images):
    taps = FeatureTaps(Overwriting().eval(), ["bn", "relu"])
    with torch.inference_mode():
        for _ in range(2):
            _, features = taps(images)
            torch.testing.assert_close(features["bn"].relu(), features["relu"])
            assert float(features["bn"].min()) < 0


def test_paths_inside_a_teacher(images):
    network = resnet8()
    taps = FeatureTaps(Teacher(network, mean=[0.5] * 3, std=[1.0] * 3), ["layer1"])
    # The shapes do not depend on the statistics, which are given last.
    assert taps.shapes((3, 16, 16)) == {"layer1": (2, 16, 16, 16)}
    taps.model.match_student([0.0] * 3, [1.0] * 3)
    _, features = taps(images)
    torch.testing.assert_close(features["layer1"], FeatureTaps(network, ["layer1"])(images - 0.5)[1]["layer1"].detach())
    assert not features["layer1"].requires_grad
    with pytest.raises(ValueError, match="module of ResNet, such as layer"):
        FeatureTaps(taps.model, "layer0")


def test_distributed_data_parallel(images, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = resnet8()
        taps = FeatureTaps(DistributedDataParallel(model), ["layer2"])
        assert taps.shapes((3, 16, 16)) == {"layer2": (2, 32, 8, 8)}
        output, features = taps(images)
        (output.sum() + features["layer2"].sum()).backward()
        assert model.conv1.weight.grad.any()
    finally:
        torch.distributed.destroy_process_group()


def test_own_child_called_module_is_no_wrapper(images):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.AvgPool2d(2)
            self.module = nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return self.module(self.pool(x))

    assert FeatureTaps(Outer(), ["pool", "module"]).shapes((3, 16, 16)) == {"pool": (2, 3, 8, 8), "module": (2, 5, 8, 8)}


@pytest.mark.filterwarnings("ignore")
def test_compiled_model(images):
    model = Overwriting().eval()
    expected = FeatureTaps(copy.deepcopy(model), ["bn", "relu"])(images)
    compiled = torch.compile(model, backend="aot_eager")
    taps = FeatureTaps(compiled, ["bn", "relu"])
    compiled(images)
    # Probing does not run the compiled code, whose guards a batch of 2 zeros would widen.
    assert taps.shapes((3, 16, 16))["bn"] == (2, 4, 16, 16)
    for _ in range(2):
        output, features = taps(images)
        torch.testing.assert_close((output, features), expected)
        compiled(images)
        assert taps._recorder.maps == {}

    whole = torch.compile(lambda x: taps(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(images), expected)


def test_saved_model_with_taps_loads(images):
    model = resnet8().eval()
    taps = FeatureTaps(model, ["layer1"])
    expected = taps(images)[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(images), expected)


@pytest.mark.parametrize(("path", "module"), [("layer2.-1.bn2", "layer2.2.bn2"), ("-1", "fc"), ("layer1.-3", "layer1.0")])
def test_negative_numbers_count_from_the_end(images, path, module):
    model = resnet20().eval()
    _, features = FeatureTaps(model, [path, module])(images)
    assert torch.equal(features[path], features[module])


@pytest.mark.parametrize("path", ["layer1.-4", "layer1.-0", "-99"])
def test_negative_numbers_beyond_the_start(path):
    with pytest.raises(ValueError, match="Expected the path of a module of ResNet"):
        FeatureTaps(resnet20(), path)


def test_tuple_of_one_tensor(images):
    class Layer(nn.Module):
        def forward(self, x):
            return (x + 1,)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, x):
            return self.layer(x)[0]

    torch.testing.assert_close(FeatureTaps(Network(), "layer")(images)[1]["layer"], images + 1)
