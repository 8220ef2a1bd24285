from __future__ import annotations

from types import SimpleNamespace

import torch

from gkd.detection import DetectorNetwork
from gkd.detection.d2 import Detectron2Backend
from gkd.detection.d2.detector import Detectron2Detector

DATA = SimpleNamespace(num_classes=3, classes=("a", "b", "c"), category_ids=(1, 2, 3), min_size=(64,), max_size=128)
SMALL = {
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
}
DENSE = {"MODEL.FPN.OUT_CHANNELS": 16, "MODEL.RETINANET.NUM_CONVS": 1}


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes or ((64, 90), (70, 60))]


def target(*boxes: tuple[float, float, float, float]) -> dict:
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.arange(len(boxes)) % 3, "image_id": 1, "size": (64, 64)}


def student(
    architecture: str = "faster_rcnn", backbone: str = "resnet18", options: dict | None = None, **settings: object
) -> Detectron2Detector:
    options = (SMALL if architecture == "faster_rcnn" else DENSE if architecture == "retinanet" else {}) if options is None else options
    detector = Detectron2Backend().build_student(DetectorNetwork(architecture, backbone, options=options, **settings), DATA)
    detector.model.train()
    return detector


def draw_statistics(model: torch.nn.Module) -> None:
    """Gives batch norms what a training would leave, so that a map of wrong names is seen."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert set(theirs) <= set(ours)
    assert theirs
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
