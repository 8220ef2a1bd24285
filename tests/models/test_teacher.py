from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from gkd.models import FeatureTaps, Teacher
from gkd.models.cifar import resnet8

STUDENT = {"student_mean": [0.5, 0.4, 0.3], "student_std": [0.2, 0.25, 0.3]}


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def normalized(pixels, mean, std):
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def for_student(pixels):
    return normalized(pixels, STUDENT["student_mean"], STUDENT["student_std"])


def test_sees_its_own_statistics(pixels):
    mean, std = [0.1, 0.6, 0.9], [1.0, 0.5, 0.125]
    teacher = Teacher(nn.Identity(), mean, std, **STUDENT)
    torch.testing.assert_close(teacher(for_student(pixels)), normalized(pixels, mean, std))


def test_sees_its_own_order_of_channels(pixels):
    # In the teacher's order: blue, green, red.
    mean, std = [0.9, 0.6, 0.1], [0.125, 0.5, 1.0]
    teacher = Teacher(nn.Identity(), mean, std, reverse_channels=True, **STUDENT)
    expected = normalized(pixels[:, [2, 1, 0]], mean, std)
    torch.testing.assert_close(teacher(for_student(pixels)), expected)
    # The well-known mistake: statistics in the student's order.
    wrong = Teacher(nn.Identity(), mean[::-1], std[::-1], reverse_channels=True, **STUDENT)
    assert not torch.allclose(wrong(for_student(pixels)), expected)


def test_reversal_without_statistics(pixels):
    teacher = Teacher(nn.Identity(), reverse_channels=True, **STUDENT)
    assert torch.equal(teacher(pixels), pixels.flip(1))
    equal = Teacher(nn.Identity(), STUDENT["student_mean"][::-1], STUDENT["student_std"][::-1], reverse_channels=True, **STUDENT)
    assert torch.equal(equal(pixels), pixels.flip(1))


@pytest.mark.parametrize("own", [{}, {"mean": STUDENT["student_mean"], "std": STUDENT["student_std"]}])
def test_equal_statistics_change_nothing(pixels, own):
    assert Teacher(nn.Identity(), **own, **STUDENT)(pixels) is pixels
    assert Teacher(nn.Identity())(pixels) is pixels


def test_statistics_of_the_student_may_come_later(pixels):
    mean, std = torch.tensor([0.1, 0.6, 0.9]), torch.tensor([1.0, 0.5, 0.125])
    teacher = Teacher(nn.Identity(), mean, std)
    with pytest.raises(ValueError, match="Expected student_mean and student_std"):
        teacher(pixels)
    teacher.match_student(STUDENT["student_mean"], STUDENT["student_std"])
    torch.testing.assert_close(teacher(for_student(pixels)), normalized(pixels, mean.tolist(), std.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_layout_are_kept(pixels, dtype):
    images = pixels.to(dtype).to(memory_format=torch.channels_last)
    for reverse in (False, True):
        teacher = Teacher(nn.Identity(), [0.0] * 3, [1.0] * 3, reverse_channels=reverse, **STUDENT)
        output = teacher.normalize(images)
        assert output.dtype == dtype
        assert output.is_contiguous(memory_format=torch.channels_last)


def test_never_leaves_eval(pixels):
    teacher = Teacher(resnet8(), **STUDENT)
    parent = nn.ModuleDict({"teacher": teacher, "student": resnet8()})
    parent.train()
    assert parent["student"].training
    assert not any(module.training for module in teacher.modules())
    assert teacher.train(True) is teacher
    teacher.model.train()
    statistics = teacher.model.bn1.running_mean.clone()
    teacher(pixels)
    assert torch.equal(statistics, teacher.model.bn1.running_mean)
    assert not any(module.training for module in teacher.modules())


def test_gives_and_takes_no_gradient(pixels):
    teacher = Teacher(resnet8(), **STUDENT)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = pixels.clone().requires_grad_()
    output = teacher(images)
    assert not output.requires_grad
    # Tensors of inference mode could not be saved for this backward pass.
    student = torch.ones_like(output, requires_grad=True)
    (student * output).sum().backward()
    assert torch.equal(student.grad, output)


def test_state_is_the_models(pixels):
    model = resnet8()
    teacher = Teacher(model, [0.0] * 3, [1.0] * 3, **STUDENT)
    assert set(teacher.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        torch.testing.assert_close(twin(pixels), teacher(pixels))
    assert teacher.to(torch.float64)(pixels.double()).dtype == torch.float64


def test_plain_callable(pixels):
    teacher = Teacher(lambda images, factor=1.0: factor * images.mean((2, 3)), [0.0] * 3, [1.0] * 3, **STUDENT)
    torch.testing.assert_close(teacher(for_student(pixels), factor=2.0), 2 * pixels.mean((2, 3)))
    with pytest.raises(ValueError, match=r"Expected a torch.nn.Module to load weights into \(got function\)"):
        Teacher(lambda images: images, weights="some.pt")


def test_weights(pixels):
    source = resnet8()
    teacher = Teacher(resnet8(), weights={"model": source.state_dict()})
    assert torch.equal(teacher(pixels), source.eval()(pixels))
    with pytest.raises(FileNotFoundError, match="Expected a file of weights"):
        Teacher(resnet8(), weights="no/such/file.pt")


def test_features(pixels):
    teacher = Teacher(resnet8(), [0.0] * 3, [1.0] * 3, **STUDENT)
    output, features = FeatureTaps(teacher, ["layer3"])(for_student(pixels))
    torch.testing.assert_close(teacher.model.fc(features["layer3"].mean((2, 3))), output)
    torch.testing.assert_close(output, teacher.model(pixels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [0.5] * 3}, "Expected both mean and std, or neither"),
        ({"student_std": [0.5] * 3}, "Expected both student_mean and student_std, or neither"),
        ({"mean": [0.5] * 3, "std": [0.5] * 2}, r"for the same channels \(got 3 and 2\)"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}, "every deviation positive"),
        ({"mean": [0.5, 0.5, float("nan")], "std": [0.5] * 3}, "finite"),
        ({"mean": [0.5], "std": [0.5], **STUDENT}, r"as many channels .* 3 \(got 1\)"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Teacher(nn.Identity(), **arguments)


def test_images_of_other_channels():
    teacher = Teacher(nn.Identity(), [0.0] * 3, [1.0] * 3, **STUDENT)
    with pytest.raises(ValueError, match=r"Expected images of 3 channels \(got \[2, 1, 4, 4\]\)"):
        teacher(torch.zeros(2, 1, 4, 4))
