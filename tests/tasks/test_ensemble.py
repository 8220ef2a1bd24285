from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from gkd.config import configure
from gkd.errors import UserError
from gkd.models import build_classifier
from gkd.tasks import Network, TeacherEnsemble

SETTINGS = [
    "Classification.data = @RandomImages()",
    "RandomImages.num_train = 4",
    "RandomImages.num_test = 2",
    "RandomImages.num_classes = 3",
    "Classification.batch_size = 4",
    "Classification.student = @student/Network()",
    "student/Network.name = 'resnet8'",
    "Classification.teacher = @TeacherEnsemble()",
    "TeacherEnsemble.networks = [@first/Network(), @second/Network()]",
    "TeacherEnsemble.shares = (3, 1)",
    "first/Network.name = 'resnet8'",
    "second/Network.name = 'resnet14'",
    "second/Network.mean = (0.2, 0.3, 0.4)",
    "second/Network.std = (0.5, 0.5, 0.5)",
    "Distiller.terms = {'kd': @KDLoss(), 'fitnet': @FitNetLoss()}",
    "Distiller.taps = {'layer2': ('layer2', 'members.0.model.layer2')}",
    "Classification.distiller = @Distiller",
    "Classification.trainer = @Trainer()",
    "Trainer.device = 'cpu'",
    "Trainer.loggers = ()",
]


@pytest.fixture
def settings(tmp_path):
    lines = list(SETTINGS)
    for scope, name in (("first", "resnet8"), ("second", "resnet14")):
        save_file(build_classifier(name, num_classes=3).state_dict(), tmp_path / f"{scope}.safetensors")
        lines.append(f"{scope}/Network.weights = {str(tmp_path / f'{scope}.safetensors')!r}")
    return lines


def test_the_weighted_mean_of_what_each_sees_its_own_way(settings):
    task = configure([], ["Classification.seed = 0", *settings]).build("Classification")
    images, targets, index = next(iter(task.train_batches(0)))
    first, second = task.teacher.model.members
    expected = 0.75 * first.model(images) + 0.25 * second.model(
        (
            images * torch.tensor(task.data.std).view(3, 1, 1)
            + torch.tensor(task.data.mean).view(3, 1, 1)
            - torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        )
        / 0.5
    )
    torch.testing.assert_close(task.teacher(images), expected)
    losses = task.distiller(images, targets, index)
    assert set(losses) == {"task", "kd", "fitnet/layer2"}
    sum(losses.values()).backward()
    task.distiller.train()
    assert not any(module.training for module in task.teacher.modules())
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())


def test_members_of_other_classes_are_refused(settings):
    with pytest.raises(UserError, match="whose logits can be averaged"):
        configure([], [*settings, "RandomImages.num_classes = 4"]).build("Classification")


def test_shares_fit_the_networks():
    with pytest.raises(UserError, match=r"Expected 1 numbers above 0 as TeacherEnsemble.shares \(got \[1, 2\]\)"):
        TeacherEnsemble([Network("resnet8")], (1, 2))
    with pytest.raises(UserError, match="Expected at least one network"):
        TeacherEnsemble([])
