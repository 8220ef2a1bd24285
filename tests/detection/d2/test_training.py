from __future__ import annotations

from functools import partial

import pytest
import torch

from gkd.data import DigitScenes
from gkd.detection import DetectorNetwork
from gkd.detection.d2 import Detectron2Backend, Detectron2Optimizer, Detectron2Schedule
from gkd.detection.d2.config import INSTALL_PAGE, is_available, read_config, update_config
from gkd.distill import Distiller
from gkd.engine import RunFolder, Trainer
from gkd.errors import UserError
from gkd.graphs import GraphBuilder, KNNEdges, PatchNodes
from gkd.losses import EdgeLoss, GraphLoss, KDLoss
from gkd.tasks.detection import Detection
from tests.detection.d2.toy import DENSE, SMALL
from tests.engine import toy

if not is_available():
    pytest.skip(f"Detectron2 is not installed: {INSTALL_PAGE}", allow_module_level=True)


def test_solver_is_that_of_detectron2():
    from detectron2.solver import build_lr_scheduler, build_optimizer

    options = {"SOLVER.STEPS": (60, 80), "SOLVER.MAX_ITER": 100, "SOLVER.WARMUP_ITERS": 10, "SOLVER.BASE_LR": 0.02}
    module = torch.nn.Linear(2, 2)
    config = read_config("faster_rcnn")
    update_config(config, options)
    optimizer = build_optimizer(config, module)
    scheduler = build_lr_scheduler(config, optimizer)
    schedule = Detectron2Schedule(options=options)
    for step in range(100):
        assert 0.02 * schedule(step, 100, 10) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        scheduler.step()
    # Half the length: the milestones at their share of it, 30 and 40.
    half = [schedule(step, 50, 10) for step in (29, 30, 39, 40)]
    assert half == pytest.approx([1, 0.1, 0.1, 0.01])

    clip = {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0}
    clipped = Detectron2Optimizer(options={**clip, "SOLVER.BASE_LR": 1.0, "SOLVER.WEIGHT_DECAY": 0.0})(module)
    before = module.weight.detach().clone()
    module.weight.grad = torch.full_like(module.weight, 100.0)
    clipped.step()
    assert float((before - module.weight).norm().detach()) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(UserError, match="YAML"):
        Detectron2Optimizer(config="fcos")(module)


class TaskOnly(torch.nn.Module):
    """The library's losses of a detector, as the trainer wants them."""

    def __init__(self, detector) -> None:
        super().__init__()
        self.detector, self.student = detector, detector.model

    def forward(self, images, targets, index):
        return self.detector.forward(images, targets).losses


@pytest.mark.parametrize(("architecture", "precision"), [("retinanet", "32-true"), ("faster_rcnn", "bf16-mixed")])
def test_a_resumed_training_is_the_uninterrupted_one(architecture, precision, tmp_path):

    clip = {"SOLVER.CLIP_GRADIENTS.ENABLED": True}
    data = DigitScenes(size=64, num_train=8, num_test=2)
    network = DetectorNetwork(architecture, "mobilenet_v2", options=SMALL if architecture == "faster_rcnn" else DENSE)

    def run(name: str, max_steps: int | None = None, resume: bool = False):
        torch.manual_seed(0)
        detector = Detectron2Backend().build_student(network, data)
        trainer = Trainer(
            steps=4,
            optimizer=Detectron2Optimizer(options=clip),
            schedule=Detectron2Schedule(options=clip),
            precision=precision,
            device="cpu",
            max_steps=max_steps,
            loggers=(),
            log_every=1,
        )
        folder = RunFolder(tmp_path / name)
        folder.prepare(resume=resume)
        batches = partial(data.batches, "train", 2)
        trainer.fit(toy.Task(TaskOnly(detector), batches, batch_size=2, splits=()), folder, resume)
        return detector.model.state_dict()

    whole = run("whole")
    run("parts", max_steps=2)
    parts = run("parts", resume=True)
    # The gradient of a bias is a sum whose order depends on where the tensor lies in memory: two uninterrupted runs differ by 1e-17 too.
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-15)
    assert (tmp_path / "whole/metrics.jsonl").read_text().count('"kind": "train"') == 4


def test_distillation_through_the_task(tmp_path):
    """From the interface to the run folder; the teacher's heads are asked for class logits only."""

    data = DigitScenes(size=64, num_train=4, num_test=2)
    teacher = Detectron2Backend().build_student(DetectorNetwork(backbone="resnet18", options={**SMALL, "MODEL.FPN.OUT_CHANNELS": 32}), data)
    teacher.save(tmp_path / "teacher.pth")
    called = []
    for weight in (0, 1):
        task = Detection(
            student=DetectorNetwork(backbone="mobilenet_v2", options=SMALL),
            teacher=DetectorNetwork(weights=str(tmp_path / "teacher.pth")),
            data=data,
            backend=Detectron2Backend(evaluator="detectron2"),
            distiller=partial(
                Distiller,
                taps={"p4": "p4"},
                terms={"edge": GraphLoss(GraphBuilder(PatchNodes(grid=4), KNNEdges(k=2)), {"edge": EdgeLoss()}), "kd": KDLoss()},
                weights={"kd": weight},
            ),
            trainer=Trainer(steps=1, device="cpu", loggers=()),
            batch_size=2,
        )
        called.clear()
        heads = [task.teacher.model.proposal_generator, task.teacher.model.roi_heads.box_head]
        for head in heads:
            head.register_forward_hook(lambda module, inputs, output: called.append(type(module).__name__))
        folder = RunFolder(tmp_path / str(weight))
        folder.prepare()
        results = task.train(folder)
        assert called == ["FastRCNNConvFCHead"] * weight
        record = (folder.path / "metrics.jsonl").read_text()
        assert ('"loss/kd"' in record, '"loss/edge/p4/edge"' in record) == (bool(weight), True)
        assert results["backend"] == "detectron2"
        assert "AP" in results["final"]
        assert {"student.pth", "student.yaml", "student.safetensors"} <= {file.name for file in folder.path.iterdir()}
        assert not any("normalizer" in name or "teacher" in name for name in torch.load(folder.path / "student.pth")["model"])
