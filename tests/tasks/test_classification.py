from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

from gkd.data import RandomImages
from gkd.distill import Distiller
from gkd.engine import SGD, Trainer
from gkd.engine.folder import RunFolder, read_description
from gkd.errors import UserError
from gkd.graphs import CompleteEdges, GraphBuilder, InstanceNodes, PatchNodes
from gkd.losses import EdgeLoss, GraphLoss, VertexLoss
from gkd.models import build_classifier
from gkd.tasks import Classification, Network, load_student
from gkd.tasks.export import export_onnx, export_program


def data(**settings) -> RandomImages:
    return RandomImages(**{"num_classes": 4, "num_train": 24, "num_test": 12, **settings})


def trainer(**settings) -> Trainer:
    return Trainer(
        **{"epochs": 2, "device": "cpu", "loggers": (), "check_teacher": False, "log_every": 2, "optimizer": SGD(lr=0.01), **settings}
    )


def graph_distiller(**wired) -> Distiller:
    patches = GraphLoss(GraphBuilder(PatchNodes(grid=2), CompleteEdges()), {"vertex": VertexLoss()})
    images = GraphLoss(GraphBuilder(InstanceNodes(), CompleteEdges()), {"edge": EdgeLoss()})
    taps = {"layer2": ("layer2", "layer2"), "layer3": ("layer3", "layer3")}
    return Distiller(taps=taps, terms={"patches": patches, "images": images}, **wired)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A teacher that gkd trained, on images with other statistics than the student's."""
    folder = RunFolder(tmp_path_factory.mktemp("teacher") / "run")
    other = data()
    other.mean, other.std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    Classification(Network("resnet8x4"), data=other, batch_size=12, trainer=trainer(epochs=1)).train(folder)
    return str(folder.student)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, teacher_file):
    folder = RunFolder(tmp_path_factory.mktemp("student") / "run")
    task = Classification(
        Network("resnet8"),
        teacher=Network("resnet8x4", weights=teacher_file),
        data=data(),
        distiller=graph_distiller,
        batch_size=12,
        trainer=trainer(),
    )
    results = task.train(folder, "A = 1\n")
    return task, folder, results


def test_run_folder_is_complete(distilled):
    _, folder, results = distilled
    assert {path.name for path in folder.path.iterdir()} == {
        "config.gin",
        "metrics.jsonl",
        "checkpoints",
        "student.safetensors",
        "results.json",
    }
    assert json.loads(folder.results.read_text()) == results
    assert {"final", "best", "seed", "versions", "device", "seconds", "images_per_second", "peak_memory", "parameters"} <= set(results)
    assert set(results["final"]) == {"kind", "split", "epoch", "step", "top1", "top5", "agreement", "loss"}
    # resnet8 and its 64 -> 256 and 32 -> 128 adapters are counted apart
    assert results["parameters"]["student"] == sum(
        parameter.numel() for parameter in build_classifier("resnet8", num_classes=4).parameters()
    )
    assert results["parameters"]["distillation"] >= 64 * 256 + 32 * 128


def test_student_file_is_the_ordinary_model_and_gives_the_logged_accuracy(distilled):
    task, folder, results = distilled
    model = build_classifier("resnet8", num_classes=4)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder.student), strict=True)  # no key of a teacher or an adapter
    loaded, description = load_student(folder.student)
    assert description["mean"] == list(task.data.mean)
    assert description["classes"] == list(task.data.classes)
    for network in (model.eval(), loaded):
        batches = list(task.data.batches("test", 5))
        hits = torch.cat([network(images).argmax(1) == targets for images, targets, _ in batches])
        assert 100 * hits.float().mean().item() == pytest.approx(results["final"]["top1"])


def test_checkpoint_holds_no_teacher(distilled):
    _, folder, _ = distilled
    state = torch.load(folder.last, weights_only=True)["model"]
    assert {name.split(".")[0] for name in state} >= {"student", "adapters"}
    assert not [name for name in state if "teacher" in name]


def test_teacher_sees_the_statistics_it_was_trained_with(distilled):
    task, _, _ = distilled
    images = next(task.data.batches("test", 4))[0]
    pixels = images * torch.tensor(task.data.std).view(3, 1, 1) + torch.tensor(task.data.mean).view(3, 1, 1)
    own = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    assert torch.allclose(task.teacher(images), task.teacher.model(own), atol=1e-4)
    assert not torch.allclose(task.teacher(images), task.teacher.model(images), atol=1e-2)


def test_statistics_that_are_said_win_over_those_of_the_file(teacher_file):
    images = data()
    images.mean, images.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    teacher, _ = Network("resnet8x4", weights=teacher_file, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).build_teacher(images)
    images = torch.rand(1, 3, 32, 32)
    assert teacher.normalize(images) is images
    assert read_description(teacher_file)["mean"] == [0.4, 0.5, 0.6]


def test_resumed_run_equals_the_uninterrupted_one(distilled, tmp_path, teacher_file):
    _, whole, _ = distilled

    def task(**settings) -> Classification:
        network = Network("resnet8x4", weights=teacher_file)
        return Classification(Network("resnet8"), network, data(), graph_distiller, trainer(**settings), batch_size=12)

    folder = RunFolder(tmp_path / "run")
    assert task(max_steps=3).train(folder) is None
    assert not folder.results.exists()
    task().train(folder, resume=True)
    states = [torch.load(each.last, weights_only=True)["model"] for each in (whole, folder)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert whole.student.read_bytes() == folder.student.read_bytes()


def test_held_out_images_choose_and_test_images_are_looked_at_in_the_end(tmp_path):
    task = Classification(Network("resnet8"), data=data(holdout=8), batch_size=8, trainer=trainer())
    folder = RunFolder(tmp_path / "run")
    results = task.train(folder)
    records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert {record["split"] for record in records if record["kind"] == "eval"} == {"val"}
    assert results["chosen_on"] == "val"
    assert results["final"]["split"] == results["best"]["split"] == "test"
    assert results["val"]["final"] == records[-1] | {"kind": "eval"}
    assert results["val"]["best"]["split"] == "val"
    # The weights that were written are the last ones, also after the best were looked at.
    last = torch.load(folder.last, weights_only=True)["model"]
    assert all(torch.equal(value, last[f"student.{name}"]) for name, value in task.student.state_dict().items())


@pytest.mark.parametrize("damage", [lambda best: best.unlink(), lambda best: best.write_bytes(best.read_bytes()[:1000])])
def test_without_the_best_checkpoint_there_are_a_student_and_results(tmp_path, damage):
    folder = RunFolder(tmp_path / "run")

    def task() -> Classification:
        return Classification(Network("resnet8"), data=data(holdout=8), batch_size=8, trainer=trainer())

    whole = task().train(folder)
    folder.results.unlink()
    damage(folder.best)
    with pytest.warns(UserWarning, match="Left the best epoch out of the results"):
        results = task().train(folder, resume=True)
    assert results["best"] is None
    assert whole["best"] is not None
    assert results["final"] == whole["final"]
    assert folder.student.is_file()
    assert json.loads(folder.results.read_text()) == results


def test_evaluation_needs_weights(tmp_path, teacher_file):
    with pytest.raises(UserError, match="Expected a checkpoint"):
        Classification(Network("resnet8"), data=data(), trainer=trainer(), batch_size=4).load(RunFolder(tmp_path))
    task = Classification(Network("resnet8x4", weights=teacher_file), data=data(), trainer=trainer(), batch_size=4)
    assert task.load(RunFolder(tmp_path)) == teacher_file
    assert set(task.evaluate()) == {"split", "top1", "top5", "loss"}


def test_checkpoint_of_the_folder_is_evaluated(distilled):
    _, folder, results = distilled
    task = Classification(Network("resnet8"), data=data(), trainer=trainer(), batch_size=4)
    with pytest.raises(UserError, match="Expected the networks of the configuration"):
        task.load(folder)  # distilled with adapters, which this configuration does not have
    del results


def test_a_teacher_needs_weights():
    with pytest.raises(UserError, match=r"Expected weights of the teacher resnet20 \(got none\)"):
        Classification(Network("resnet8"), teacher=Network("resnet20"), data=data(), trainer=trainer(), batch_size=4)


def test_batch_sizes_are_checked():
    with pytest.raises(UserError, match="Expected batch_size to be a multiple"):
        Classification(Network("resnet8"), data=data(), trainer=trainer(), batch_size=0)
    with pytest.raises(UserError, match="at least one batch of 25"):
        Classification(Network("resnet8"), data=data(), trainer=trainer(), batch_size=25)


def test_seed_decides_the_weights():
    states = [
        Classification(Network("resnet8"), data=data(), trainer=trainer(), batch_size=4, seed=seed).student.state_dict()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(states[0]["conv1.weight"], states[1]["conv1.weight"])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


def test_student_file_without_a_description(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_student(tmp_path / "student.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "student.safetensors")
    with pytest.raises(UserError, match="weights without a description"):
        load_student(tmp_path / "student.safetensors")


def test_torch_export(distilled, tmp_path):
    task, _, _ = distilled
    assert export_program(task.student, (3, 32, 32), tmp_path / "student.pt2") < 1e-4
    program = torch.export.load(tmp_path / "student.pt2").module()
    images = torch.randn(5, 3, 32, 32)
    assert torch.allclose(program(images), task.student.eval()(images), atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx is not installed")
def test_onnx_export(distilled, tmp_path):
    task, _, _ = distilled
    assert export_onnx(task.student, (3, 32, 32), tmp_path / "student.onnx") < 1e-4
    import onnx

    model = onnx.load(tmp_path / "student.onnx")
    onnx.checker.check_model(model)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    assert not model.graph.input[0].type.tensor_type.shape.dim[0].dim_value  # the batch size is free
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]


def test_export_of_something_else_is_noticed(tmp_path):
    class Chance(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :2] + torch.rand(images.shape[0], 2)

    with pytest.raises(UserError, match="to compute what the student does"):
        export_program(Chance(), (3, 4, 4), tmp_path / "student.pt2")
    assert list(tmp_path.iterdir()) == []
