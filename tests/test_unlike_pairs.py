"""Transformers and convolutional networks teach each other: every method takes a step on every such pair, with small networks."""

from __future__ import annotations

import pytest
import torch

from gkd.config import configure
from gkd.models import build_classifier
from gkd.sources import RECIPES

pytest.importorskip("timm")

# Widths and depths that are small; the paths in the files stay what they are.
VIT = {"embed_dim": 24, "num_heads": 2}
PAIRS = {
    "vit_resnet18": (64, {}, {**VIT, "img_size": 64, "patch_size": 8}),
    "swin_mobilenet": (
        64,
        {"width_mult": 0.35},
        {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)},
    ),
    "convnext_vit": (32, {**VIT, "img_size": 32, "patch_size": 4}, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
}
DETECTION = ("crosskd", "cwd", "dsig", "fgd", "ld", "mask_kd", "mgd", "pkd", "sekd_detection")
METHODS = sorted(path.stem for path in RECIPES.glob("methods/*.gin") if path.stem not in DETECTION)
CLASSES, BATCH = 5, 10
REST = ["EPOCHS = 1", "LR = 0.01", "WEIGHT_DECAY = 0.0", f"BATCH_SIZE = {BATCH}"]
# What a method is short of on so small a scale.
SETTINGS = {"crd": ["NEGATIVES = 4"], "sekd": ["NUM_EIG = 4"]}
# No map of these networks has the classifier's input as its mean: a class token, a norm, or hidden layers come in between.
NEEDS_AVERAGED_MAP = ("catkd", "sdd")


def settings(pair: str, tmp_path) -> list[str]:
    size, student, teacher = PAIRS[pair]
    bound = {binding.name: binding.value for binding in configure([f"gin/models/{pair}.gin"], ["TEACHER_WEIGHTS = ''", *REST])._history}
    weights = tmp_path / "teacher.pt"
    torch.save(build_classifier(bound["TEACHER"], num_classes=CLASSES, **teacher).state_dict(), weights)
    return [
        f"TEACHER_WEIGHTS = {str(weights)!r}",
        f"student/Network.options = {student}",
        f"teacher/Network.options = {teacher}",
        f"teacher/Network.input_size = {64 if pair == 'convnext_vit' else size}",
        "Classification.data = @RandomImages()",
        f"RandomImages.num_classes = {CLASSES}",
        f"RandomImages.input_size = (3, {size}, {size})",
        f"RandomImages.num_train = {BATCH}",
        "RandomImages.num_test = 4",
        "Trainer.device = 'cpu'",
        *REST,
    ]


@pytest.fixture(scope="module")
def bindings(tmp_path_factory):
    return {pair: settings(pair, tmp_path_factory.mktemp(pair)) for pair in PAIRS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_method_takes_a_step(pair, method, bindings):
    files = [f"gin/models/{pair}.gin", f"gin/methods/{method}.gin"]
    task = configure(files, [*bindings[pair], *SETTINGS.get(method, [])]).build("Classification")
    task.distiller.progress(30.0)  # after the ramps
    task.distiller.train()
    if method in NEEDS_AVERAGED_MAP:
        with pytest.raises(ValueError, match="Expected the map whose mean the last layer of"):
            task.distiller(*next(iter(task.train_batches(0))))
        return
    losses = task.distiller(*next(iter(task.train_batches(0))))
    assert set(losses) - {"task"}
    torch.stack(list(losses.values())).sum().backward()
    gradients = [parameter.grad for parameter in task.student.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
