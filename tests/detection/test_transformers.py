"""Hugging Face's detectors: maps, losses, inference, evaluation, distillation from another library's maps."""

from __future__ import annotations

import importlib.util
from functools import partial
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed: pip install 'gkd[transformers]'", allow_module_level=True)

from gkd.data import DigitScenes
from gkd.detection import DetectorNetwork, load_detector
from gkd.detection.transformers import TransformersBackend
from gkd.distill import Distiller
from gkd.engine import RunFolder, Trainer
from gkd.errors import UserError
from gkd.graphs import GraphBuilder, KNNEdges, PatchNodes
from gkd.losses import DenseKDLoss, EdgeLoss, GraphLoss
from gkd.tasks.detection import Detection

DATA = SimpleNamespace(num_classes=3, classes=("ant", "bee", "cow"), category_ids=(1, 2, 3), min_size=(64,), max_size=64)
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
COMMON = {"image_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 10}
OPTIONS = {
    "rt_detr": {
        "backbone_config": {"model_type": "rt_detr_resnet", **STAGES, "out_features": ["stage2", "stage3", "stage4"]},
        "encoder_hidden_dim": 16,
        "encoder_in_channels": [16, 32, 64],
        "decoder_in_channels": [16, 16, 16],
        "num_denoising": 4,
        **COMMON,
        **HEADS,
    },
    "detr": {
        "use_timm_backbone": False,
        "backbone_config": {"model_type": "resnet", **STAGES, "out_features": ["stage4"]},
        **COMMON,
        **HEADS,
    },
}


def network(kind: str, **settings) -> DetectorNetwork:
    return DetectorNetwork(kind, options=OPTIONS[kind], **settings)


def images() -> list[torch.Tensor]:
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 64), (40, 60))]


@pytest.mark.parametrize(("kind", "levels"), [("rt_detr", ("p3", "p4", "p5")), ("detr", ("p5",))])
def test_maps_losses_and_boxes(kind, levels):
    detector = TransformersBackend().build_student(network(kind), DATA)
    assert detector.levels == levels
    assert detector.classes == DATA.classes
    pictures = images()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    targets = [{"boxes": torch.tensor([[4.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([2])}, nothing]
    detector.model.train()
    output = detector.forward(pictures, targets)
    assert output.image_size == (64, 64)
    loss = sum(output.losses.values()) + sum(map_.square().mean() for map_ in output.features.values())
    loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in detector.model.parameters())
    # Maps lie where the images do: beyond the smaller image there is padding.
    deepest = output.features[levels[0]]
    assert not deepest[1, :, -1].any()
    assert deepest[0, :, -1].any()
    detector.model.eval()
    with torch.no_grad():
        maps = detector.features(pictures)
        outputs = detector.model(**detector.processor(images=pictures, return_tensors="pt"))
    assert list(maps) == list(levels)
    seen = detector.detect(pictures)
    assert not any(parameter.requires_grad for one in seen for parameter in one[:3])
    library = detector.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(64, 64), (40, 60)])
    for ours, theirs in zip(seen, library, strict=True):
        assert len(ours.boxes) > 0
        torch.testing.assert_close(ours.scores, theirs["scores"].sort(descending=True).values)
    with pytest.raises(UserError, match="box head on proposals"):
        detector.class_logits(maps, [], (64, 64))


def test_graphs_of_another_librarys_teacher(tmp_path):
    """RT-DETR learns 4 steps from a Faster R-CNN of torchvision, is judged, written, and built again."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    data = DigitScenes(size=64, num_train=4, num_test=2)
    builder = GraphBuilder(PatchNodes(grid=2), KNNEdges(k=2))
    from gkd.detection.torchvision import TorchvisionBackend

    options = {"fpn_channels": 32, "box_channels": 16, "norm": "batch"}
    teacher = DetectorNetwork("faster_rcnn", "resnet10", options=options)
    TorchvisionBackend().build_student(teacher, data).save(tmp_path / "teacher.pth")
    task = Detection(
        student=network("rt_detr"),
        teacher=DetectorNetwork("faster_rcnn", "resnet10", weights=str(tmp_path / "teacher.pth"), options=options),
        data=data,
        backend="transformers",
        teacher_backend="torchvision",
        distiller=partial(Distiller, taps={"p4": "p4"}, terms={"patches": GraphLoss(builder, {"edge": EdgeLoss()})}),
        trainer=Trainer(steps=4, device="cpu", loggers=(), log_every=1, check_teacher=False),
        batch_size=2,
    )
    folder = RunFolder(tmp_path / "run")
    folder.prepare()
    results = task.train(folder)
    assert {"AP", "AP50"} <= set(results["final"])
    assert "loss/patches/p4/edge" in (folder.path / "metrics.jsonl").read_text()
    pictures = images()
    model, description = load_detector(folder.path)
    assert description["network"]["architecture"] == "rt_detr"
    again = TransformersBackend().build_teacher(DetectorNetwork(weights=str(folder.student)), data)
    task.student.eval()
    for level, map_ in task.detector.features(pictures).items():
        torch.testing.assert_close(again.features(pictures)[level], map_)
    from transformers import AutoModelForObjectDetection

    plain = AutoModelForObjectDetection.from_pretrained(folder.path / "student").eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(pixel_values=x).pred_boxes, model(pixel_values=x).pred_boxes, atol=1e-4, rtol=0)


def test_terms_that_need_scores_at_all_places_say_so(tmp_path):
    data = DigitScenes(size=64, num_train=4, num_test=2)
    detector = TransformersBackend().build_student(network("rt_detr"), data)
    detector.save(tmp_path / "teacher")
    task = Detection(
        student=network("rt_detr"),
        teacher=DetectorNetwork(weights=str(tmp_path / "teacher"), options={"image_size": 64}),
        data=data,
        backend="transformers",
        distiller=partial(Distiller, terms={"kd": DenseKDLoss()}),
        trainer=Trainer(steps=1, device="cpu", loggers=(), check_teacher=False),
        batch_size=2,
    )
    with pytest.raises(UserError, match="scores at all places"):
        task.distiller(*next(task.batches("train", 2)))
