"""Every shipped file of a classification run builds, with its own networks, and takes a step on small made-up images."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from gkd.config import configure
from gkd.models import FeatureTaps, build_classifier
from gkd.sources import RECIPES

FOLDER = RECIPES
RUNS = sorted([*FOLDER.glob("classification/*.gin"), FOLDER / "quickstart_classification.gin"])
DETECTION = ("crosskd", "cwd", "dsig", "fgd", "ld", "mask_kd", "mgd", "pkd", "sekd_detection")
METHODS = sorted(path for path in FOLDER.glob("methods/*.gin") if path.stem not in DETECTION)
PAIR = "gin/quickstart_classification.gin"

# The made-up images have the size and the classes of the real ones, so that the networks are those of the file.
IMAGES = {
    "CIFAR100": (100, (3, 32, 32)),
    "ImageNet": (1000, (3, 128, 128)),
    "ImageFolder": (10, (3, 224, 224)),
    "Digits": (10, (3, 16, 16)),
}


def names(files) -> list[str]:
    return [str(file.relative_to(FOLDER)) for file in files]


def overrides(files: list[str], tmp_path, batch_size: int) -> list[str]:
    """Bindings that leave everything of the files as it is but the data, the weights and the length."""
    bound = {binding.name: binding for binding in configure(files)._history}
    data = next(name for name in IMAGES if f"@{name}()" in repr(bound["Classification.data"].value))
    classes, size = IMAGES[data]
    settings = [
        "Classification.data = @RandomImages()",
        f"RandomImages.num_classes = {classes}",
        f"RandomImages.input_size = {size}",
        f"RandomImages.num_train = {max(classes, batch_size)}",
        "RandomImages.num_test = 4",
        f"BATCH_SIZE = {batch_size}",
        "Trainer.device = 'cpu'",
        "Trainer.max_steps = 1",
        "Trainer.loggers = ()",
    ]
    for macro, network in (("TEACHER_WEIGHTS", "TEACHER"), ("WEIGHTS", "STUDENT")):
        if macro in bound:
            weights = tmp_path / f"{macro}.safetensors"
            save_file(build_classifier(bound[network].value, num_classes=classes).state_dict(), weights)
            settings.append(f"{macro} = '{weights}'")
    return settings


def take_a_step(files: list[str], tmp_path, batch_size: int) -> set[str]:
    """Names of the losses of a step in the midst of the ramps; the trainer sees to it that they are finite."""
    task = configure(files, overrides(files, tmp_path, batch_size)).build("Classification")
    before = {name: value.clone() for name, value in task.student.state_dict().items()}
    distiller, names = task.distiller, set()
    progress, forward = distiller.progress, distiller.forward
    distiller.progress = lambda epoch: progress(3.0)
    distiller.forward = lambda *batch: names.update(losses := forward(*batch)) or losses
    task.trainer.fit(task)
    after = task.student.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    return names


def test_there_are_files():
    assert len(RUNS) >= 15
    assert len(METHODS) >= 15


@pytest.mark.parametrize("file", names(RUNS))
def test_runs(file, tmp_path):
    assert "task" in take_a_step([f"gin/{file}"], tmp_path, batch_size=2)


@pytest.mark.parametrize("file", [*names(METHODS), "base/alone.gin"])
def test_methods_combine_with_a_pair(file, tmp_path):
    losses = take_a_step([PAIR, f"gin/{file}"], tmp_path, batch_size=10)  # more than the neighbours of any graph of images
    assert (losses == {"task"}) == (file == "base/alone.gin")


@pytest.mark.parametrize("file", names(sorted(FOLDER.rglob("*.gin"))))
def test_headers_say_what_the_file_is_for(file):
    text = (FOLDER / file).read_text()
    assert text.startswith("# ")
    assert max(map(len, text.splitlines())) <= 180
    if file.startswith("classification/"):
        assert f"--gin gin/{file}" in text
        assert "Here: " in text or "Expected: " in text


def test_the_classifications_are_those_that_issue_and_paper_name():
    pairs = {"resnet56_resnet20", "resnet32x4_resnet8x4", "wrn_40_2_wrn_16_2", "vgg13_vgg8", "ResNet50_MobileNetV2", "resnet32x4_ShuffleV2"}
    teachers = {"resnet56", "resnet32x4", "wrn_40_2", "vgg13", "ResNet50"}
    stems = {path.stem for path in RUNS}
    assert {f"cifar100_{name}" for name in pairs | teachers} | {"imagenet_resnet34_resnet18", "cifar100_resnet56_resnet20_cpu"} <= stems


def test_the_crd_recipe(tmp_path):
    files = ["gin/cifar100_r32x4_r8x4.gin"]
    settings = [line for line in overrides(files, tmp_path, 64) if not line.startswith("BATCH_SIZE")]
    task = configure(files, settings).build("Classification")
    assert (task.batch_size, task.trainer.epochs, task.trainer.precision) == (64, 240, "32-true")
    sgd = task.trainer.optimizer
    assert (sgd.lr, sgd.momentum, sgd.weight_decay, sgd.nesterov, sgd.decay_norm_and_bias) == (0.05, 0.9, 5e-4, False, True)
    factors = [task.trainer.schedule(epoch * 782, 240 * 782, 782) for epoch in (0, 149, 150, 179, 180, 210)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("file", names(path for path in sorted(FOLDER.glob("models/*_*.gin")) if "Distiller.taps" in path.read_text()))
def test_every_pair_has_the_places_that_methods_look_at(file):
    bound = {
        binding.name: binding.value
        for binding in configure(
            [f"gin/{file}"], ["TEACHER_WEIGHTS = ''", "EPOCHS = 1", "LR = 1.0", "WEIGHT_DECAY = 0.0", "BATCH_SIZE = 1"]
        )._history
    }
    taps = {**bound["Distiller.taps"], **bound["Distiller.extra_taps"]}
    assert {"last", "pool"} <= taps.keys()
    for place, network in enumerate((bound["STUDENT"], bound["TEACHER"])):
        options = bound.get(f"{('student', 'teacher')[place]}/Network.options") or {}
        size = 224 if network.startswith(("timm:vit", "timm:swin")) and not options else 32
        if network.startswith("timm:"):
            pytest.importorskip("timm")
        with torch.device("meta"):
            model = build_classifier(network, num_classes=10, **options)
        shapes = FeatureTaps(model, [paths[place] for paths in taps.values()]).shapes((3, size, size))
        assert list(shapes[taps["pool"][place]][2:]) in ([], [1, 1])


def test_methods_look_where_the_published_ones_do():
    places = {}
    for file in METHODS:
        bound = {binding.name: binding.value for binding in configure([str(file)])._history}
        places |= {file.stem: bound["Distiller.stages"]}
    expected = {"crd": "pool", "rkd": "pool", "pkt": "pool", "cc": "pool", "hkd": "pool", "sp": "last", "ickd": "last"}
    assert {method: places[method][method] for method in expected} == {method: [place] for method, place in expected.items()}
    assert places["ofd"] == {"ofd": ["pre1", "pre2", "pre3"]}
    assert places["reviewkd"] == {"reviewkd": ["pre1", "pre2", "pre3", "pool"]}
