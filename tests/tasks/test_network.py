"""Networks of a classification: classes in another order, weights of others, and files that cannot be trusted."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from gkd.data import RandomImages
from gkd.distill import Distiller
from gkd.engine import SGD, RunFolder, Trainer
from gkd.errors import UserError
from gkd.losses import ATLoss, KDLoss
from gkd.models import build_classifier
from gkd.tasks import Classification, Network, load_student
from gkd.tasks.export import export_program

CLASSES = ["ant", "bee", "cat", "dog"]


def data(classes=CLASSES) -> RandomImages:
    images = RandomImages(num_classes=len(classes), num_train=16, num_test=8)
    images.classes = list(classes)
    return images


def write(path, classes, model="resnet8", options=None, **description):
    """A student.safetensors as a training leaves it."""
    torch.manual_seed(1)
    source = build_classifier("resnet8", num_classes=len(classes)).eval()
    about = {"model": model, "options": options or {}, "classes": list(classes), "num_classes": len(classes), **description}
    save_file(source.state_dict(), path, {"gkd": json.dumps(about)})
    return source


def task(student, teacher=None, terms=None, classes=CLASSES) -> Classification:
    def distiller(**networks):
        return Distiller(taps={"layer3": "layer3"}, terms=terms, **networks)

    trainer = Trainer(epochs=1, device="cpu", loggers=(), check_teacher=False, optimizer=SGD(lr=0.01))
    return Classification(student, teacher, data(classes), distiller, trainer, batch_size=8)


def test_teacher_with_its_classes_in_another_order(tmp_path):
    order = ["dog", "ant", "cat", "bee"]
    source = write(tmp_path / "teacher.safetensors", order)
    run = task(Network("resnet8"), Network("resnet8", weights=str(tmp_path / "teacher.safetensors")), {"kd": KDLoss()})
    images = torch.randn(2, 3, 32, 32)
    theirs = dict(zip(order, source(images).unbind(1), strict=True))
    torch.testing.assert_close(run.teacher(images), torch.stack([theirs[name] for name in CLASSES], 1))
    assert "agreement" in run.evaluate()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["ant", "bee", "cat", "elk"], r"it alone has elk; the data alone has dog"),
        (["ant", "bee", "cat"], r"the teacher has 3 classes, the data have 4"),
    ],
)
def test_teacher_for_other_classes(classes, message, tmp_path):
    source = write(tmp_path / "teacher.safetensors", classes)
    teacher = Network("resnet8", weights=str(tmp_path / "teacher.safetensors"))
    with pytest.raises(UserError, match=rf"(?s)Expected a teacher for the classes of the data.* kd can compare \(got: .*{message}"):
        task(Network("resnet8"), teacher, {"kd": KDLoss()})
    # Its features can be learned from, and it keeps its own last layer.
    run = task(Network("resnet8"), teacher, {"at": ATLoss()})
    assert torch.equal(run.teacher.model.fc.weight, source.fc.weight)
    assert "agreement" not in run.evaluate()


def test_classes_that_are_said_win_over_those_of_the_file(tmp_path):
    write(tmp_path / "teacher.safetensors", ["1", "2", "3", "4"])
    run = task(Network("resnet8"), Network("resnet8", weights=str(tmp_path / "teacher.safetensors"), classes=CLASSES), {"kd": KDLoss()})
    assert run.teacher.logit_order is None


def test_student_with_its_classes_in_another_order(tmp_path):
    order = ["dog", "ant", "cat", "bee"]
    source = write(tmp_path / "student.safetensors", order)
    with pytest.warns(UserWarning, match="are put into the order of the data's: ant, bee, cat"):
        run = task(Network("resnet8", weights=str(tmp_path / "student.safetensors")))
    images = torch.randn(2, 3, 32, 32)
    theirs = dict(zip(order, source(images).unbind(1), strict=True))
    torch.testing.assert_close(run.student.eval()(images), torch.stack([theirs[name] for name in CLASSES], 1))
    assert run.load(RunFolder(tmp_path / "run")) == str(tmp_path / "student.safetensors")


def test_student_for_other_classes(tmp_path):
    write(tmp_path / "student.safetensors", ["ant", "bee", "cat", "elk"])
    with pytest.raises(ValueError, match="it alone has elk; the data alone has dog"):
        task(Network("resnet8", weights=str(tmp_path / "student.safetensors")))
    write(tmp_path / "student.safetensors", ["ant", "bee", "cat"])
    with pytest.warns(UserWarning, match="is new, for 4 classes: .* have 3 classes"):
        run = task(Network("resnet8", weights=str(tmp_path / "student.safetensors")))
    with pytest.raises(UserError, match=r"Expected weights for the 4 classes of the data .* would be random numbers\)"):
        run.load(RunFolder(tmp_path / "run"))


def test_run_of_data_in_another_order_is_not_evaluated(tmp_path):
    folder = RunFolder(tmp_path / "run")
    task(Network("resnet8")).train(folder)
    assert task(Network("resnet8")).load(folder) == folder.last
    with pytest.raises(UserError, match=r"Expected the classes of the data in the order that .* was trained with, ant, bee, cat"):
        task(Network("resnet8"), classes=["bee", "ant", "cat", "dog"]).load(folder)


def test_teacher_of_another_resolution(tmp_path):
    write(tmp_path / "teacher.safetensors", CLASSES, input_size=[3, 48, 48], mean=[0.5] * 3, std=[0.5] * 3)
    run = task(Network("resnet8"), Network("resnet8", weights=str(tmp_path / "teacher.safetensors")), {"kd": KDLoss(), "at": ATLoss()})
    assert run.teacher.input_size == (48, 48)
    _, _, teacher, _ = run.distiller.features(torch.randn(2, 3, 32, 32))
    assert teacher["layer3"].shape[2:] == (12, 12)


@pytest.mark.parametrize("said", [{}, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.4, 0.4), "input_size": 16}])
def test_weights_of_timm_bring_their_own_statistics(said, tmp_path):
    pytest.importorskip("timm")
    options = {"img_size": 16, "embed_dim": 12, "depth": 1}
    name = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    torch.save(build_classifier(name, **options).state_dict(), tmp_path / "weights.pt")
    teacher, difference = Network(name, str(tmp_path / "weights.pt"), options, **said).build_teacher(data())
    assert [value.tolist() for value in teacher.statistics] == [list(said.get("mean", (0.5,) * 3)), list(said.get("std", (0.5,) * 3))]
    assert teacher.input_size == (16, 16)
    assert difference == "the teacher has 1000 classes, the data have 4"


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("os:system", {}),
        ("torch.hub:load", {"repo_or_dir": "somebody/something"}),
        ("hostile_module:run", {}),
        ("timm:hf-hub:somebody/something", {}),
        ("transformers:somebody/something", {}),
        ("timm:resnet18", {"pretrained": True}),
        ("resnet18", {"weights": "DEFAULT"}),
    ],
)
def test_hostile_descriptions_run_nothing(model, options, tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\ndef run(num_classes): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "student.safetensors", CLASSES, model, options)
    with pytest.raises(UserError, match=r"Expected a network of gkd, torchvision or timm in .* or trust=True"):
        load_student(tmp_path / "student.safetensors")
    assert not (tmp_path / "was_run").exists()


def test_networks_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(
        "from gkd.models.cifar import resnet8\ndef build(num_classes): return resnet8(num_classes=num_classes)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = write(tmp_path / "student.safetensors", CLASSES, "own_module:build")
    images = torch.randn(2, 3, 32, 32)
    for permission in ({"trust": True}, {"factory": lambda num_classes: build_classifier("resnet8", num_classes)}):
        model, description = load_student(tmp_path / "student.safetensors", **permission)
        assert description["classes"] == CLASSES
        assert torch.equal(model(images), source(images))


def test_transformers_train_and_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
    config = transformers.ViTConfig(num_labels=4, num_hidden_layers=1, num_attention_heads=2, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = Network(f"transformers:{tmp_path / 'vit'}", weights="DEFAULT")
        run = task(Network("resnet8"), network, {"kd": KDLoss()})
        results = run.train(RunFolder(tmp_path / "run"))
        assert 0 <= results["final"]["agreement"] <= 100
        student = Classification(network, None, data(), trainer=run.trainer, batch_size=8)
        assert set(student.evaluate()) >= {"top1", "loss"}
        export_program(student.student, (3, 32, 32), tmp_path / "student.pt2")
