from __future__ import annotations

import argparse
import copy
import os
import pickle
import subprocess
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gkd.models import build_classifier, load_weights, read_weights
from gkd.models.cifar import resnet8, resnet20, resnet56, vgg8

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
RESNET56 = DATA / "weights" / "cifar100_resnet56-f2eff4c8.pt"


@pytest.fixture(scope="module")
def trained():
    return resnet8(num_classes=10)


def agree(model, trained):
    return all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(not RESNET56.is_file(), reason=f"no published ResNet-56 at {RESNET56}")
def test_published_resnet56():
    model = resnet56(num_classes=100)
    load_weights(model, RESNET56)
    published = torch.load(RESNET56, weights_only=True)
    assert list(published) == list(model.state_dict())
    model.load_state_dict(published, strict=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in published.items())


def renamed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"student": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}},
        lambda state: {"net": state, "acc": 72.3, "epoch": 3},
        lambda state: {"model_ema": renamed(state, "module.")},
        lambda state: {"state_dict_ema": state},
        lambda state: {"ema": state, "updates": 3},
        lambda state: {"state_dict": state, "state_dict_ema": {name: torch.zeros_like(value) for name, value in state.items()}},
        lambda state: {"anything": state, "epoch": 3},
        lambda state: renamed(state, "module."),
        lambda state: {"model": renamed(state, "module._orig_mod.")},
        lambda state: renamed(state, "_orig_mod.module."),
        lambda state: renamed(state, "student."),
        lambda state: renamed(state, "net."),
        lambda state: renamed(state, "backbone."),
        lambda state: {"state_dict": renamed(state, "module.model."), "pytorch-lightning_version": "2.4"},
        # A distiller's: student, teacher of the same architecture, and layers of its own.
        lambda state: {
            **renamed({name: torch.zeros_like(value) for name, value in state.items()}, "teacher."),
            **renamed(state, "student."),
            "adapter.weight": torch.zeros(3),
        },
        # torch.optim.swa_utils.AveragedModel
        lambda state: {"n_averaged": torch.tensor(3), **renamed(state, "module.")},
        # As the CRD zoo writes its checkpoints, and with the numbers and paths that training programs leave.
        lambda state: {"opt": argparse.Namespace(lr=0.05, steps=[1, 2]), "model": state, "best_acc": torch.tensor(72.3)},
        lambda state: {"state_dict": state, "best": np.float64(72.3), "epoch": np.int64(3), "folder": Path("runs")},
    ],
)
def test_forms_of_a_checkpoint(wrap, trained, tmp_path):
    content = wrap(trained.state_dict())
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    for weights in (str(path), path, content):
        model = resnet8(num_classes=10)
        load_weights(model, weights)
        assert agree(model, trained)


def test_home_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    assert agree(build_classifier("resnet8", num_classes=10, weights="~/weights.pth"), trained)
    with pytest.raises(FileNotFoundError, match=f"at {tmp_path}/absent.pth"):
        read_weights("~/absent.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverged(value, trained):
    state = copy.deepcopy(trained.state_dict())
    state["layer2.0.conv1.weight"][0, 0] = value
    model = resnet8(num_classes=10)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Expected finite weights in a dict \(got NaN or infinity in 1 of \d+ entries: layer2.0"):
        load_weights(model, state)
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())


def test_infinite_buffers_are_masks():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("mask", torch.full((2, 2), float("-inf")))

    load_weights(Masked(), Masked().state_dict())


def test_last_layer_for_other_classes(trained):
    model = resnet8(num_classes=4)
    head = {name: value.clone() for name, value in model.fc.state_dict().items()}
    assert load_weights(model, trained.state_dict(), new_head=True) == ["fc.weight", "fc.bias"]
    for name, value in model.state_dict().items():
        expected = head[name.removeprefix("fc.")] if name.startswith("fc.") else trained.state_dict()[name]
        assert torch.equal(value, expected), name
    assert load_weights(resnet8(num_classes=10), trained.state_dict(), new_head=True) == []
    state = {name: value for name, value in trained.state_dict().items() if name != "fc.bias"}
    with pytest.raises(ValueError, match=r"1 missing: fc\.bias"):
        load_weights(model, state, new_head=True)


def test_safetensors(trained, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "student.safetensors"
    save_file(trained.state_dict(), path)
    model = build_classifier("resnet8", num_classes=10, weights=path)
    assert agree(model, trained)
    path.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="Expected a safetensors file"):
        load_weights(model, path)


def test_checkpoint_from_before_the_batch_counters(trained):
    state = OrderedDict((name, value) for name, value in trained.state_dict().items() if "num_batches" not in name)
    for weights in (state, {f"module.{name}": value for name, value in state.items()}):
        model = resnet8(num_classes=10)
        load_weights(model, weights)
        assert agree(model, trained)
    state_with_version = copy.copy(trained.state_dict())
    del state_with_version["bn1.num_batches_tracked"]
    load_weights(model, state_with_version)


def test_wrapped_model(trained):
    model = torch.compile(resnet8(num_classes=10), backend="eager")
    load_weights(model, {f"module.{name}": value for name, value in trained.state_dict().items()})
    assert agree(model._orig_mod, trained)


def test_own_names_that_look_like_a_prefix():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    model, other = Outer(), Outer()
    load_weights(model, other.state_dict())
    assert torch.equal(model.module.weight, other.module.weight)
    load_weights(model, {f"module.{name}": value for name, value in Outer().state_dict().items()})
    assert not torch.equal(model.module.weight, other.module.weight)


def test_mismatch_lists_both_directions_and_changes_nothing(trained):
    state = dict(trained.state_dict())
    state["fc.scale"] = state.pop("fc.bias")
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    model = resnet8(num_classes=10)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Expected the weights of ResNet") as caught:
        load_weights(model, state)
    text = str(caught.value)
    assert "1 missing: fc.bias" in text
    assert "1 unexpected: fc.scale" in text
    assert "1 of another shape: conv1.weight [16, 1, 3, 3] where the model has [16, 3, 3, 3]" in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_long_lists_are_cut(trained):
    with pytest.raises(ValueError, match=r"missing: layer1.1.conv1.weight, .* and \d+ more\)"):
        load_weights(resnet20(num_classes=10), trained.state_dict())


def test_weights_of_another_network(trained):
    with pytest.raises(ValueError, match="no name agrees: these are the weights of another network"):
        load_weights(vgg8(num_classes=10), trained.state_dict())


def test_weights_of_other_classes_say_how_many(trained):
    with pytest.raises(ValueError, match="the weights are for 10 classes: build the network with num_classes=10"):
        load_weights(resnet8(num_classes=4), trained.state_dict())


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a file of weights at .*none.pt \(got no such file, .*correct the path"):
        load_weights(resnet8(), tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="got a folder"):
        load_weights(resnet8(), tmp_path)


class Payload:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("function", [print, exec, eval, os.system, subprocess.check_output, getattr, __import__])
def test_files_cannot_run_code(function, tmp_path, capfd):
    torch.save({"model": Payload(function, "print('code was run')")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="Expected tensors and plain values only"):
        read_weights(tmp_path / "bad.pt")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"model": Payload(function, "print('code was run')")}))
    with pytest.raises(ValueError, match="Expected tensors and plain values only"):
        read_weights(tmp_path / "bad.pkl")
    assert "code was run" not in capfd.readouterr().out


def test_whole_modules_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"if you trust the file, read it with torch.load\(..., weights_only=False\)"):
        read_weights(tmp_path / "module.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "got a pointer of Git LFS; run git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "got a web page; download the file itself"),
        (b"<html><head></head></html>", "got a web page"),
        (b"text, not a checkpoint", "Expected tensors and plain values only"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_file_of_something_else(tmp_path, content, message, suffix):
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Expected a safetensors file" if suffix == "safetensors" and content[:4] == b"text" else message):
        read_weights(path)


def test_safetensors_under_another_name(trained, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(trained.state_dict(), tmp_path / "weights.bin", metadata={"model": "os:system", "options": "{}"})
    model = resnet8(num_classes=10)
    load_weights(model, tmp_path / "weights.bin")
    assert agree(model, trained)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"epoch": 3, "optimizer": {}}, "the entries epoch, optimizer"),
        ([1, 2], "list"),
        ({}, "the entries "),
        ({"model": 3}, "the entries model"),
    ],
)
def test_file_without_weights(tmp_path, content, got):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"Expected a state_dict, alone or as one of model, .*\(got {got}\)"):
        read_weights(tmp_path / "other.pt")
