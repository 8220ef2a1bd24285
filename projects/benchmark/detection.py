"""What the graph terms add to a training step of a detector that has a teacher's backbone beside it.

Networks start from random weights, images are noise with random boxes: neither changes the cost much. A step is what the engine does:
forward of the student, the teacher's maps, losses, backward, optimiser.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from measure import Run, machine, time_in_turns, write_json
from torch import Tensor

from gkd.config import configure
from gkd.detection import DetectorNetwork, choose_backend

__all__ = ["DetectionBenchmark"]


def noise(number: int, size: int, boxes: int, classes: int, device: str) -> tuple[list[Tensor], list[dict[str, Any]], Tensor]:
    """A batch of images with random boxes."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator).to(device) for _ in range(number)]
    targets = []
    for index in range(number):
        corners = torch.rand(boxes, 2, generator=generator) * size * 0.6
        located = torch.cat((corners, corners + size * (0.1 + 0.3 * torch.rand(boxes, 2, generator=generator))), dim=1)
        labels = torch.randint(0, classes, (boxes,), generator=generator)
        targets.append({"boxes": located.to(device), "labels": labels.to(device), "image_id": index, "size": (size, size)})
    return images, targets, torch.arange(number)


def training_step(files: list[str], bindings: list[str], batch: tuple, with_teacher: bool) -> Run:
    """A function that takes one step; `with_teacher` adds the teacher's maps to a step that does without."""
    task = configure(files, bindings).build("Detection")
    trainer, distiller, teacher = task.trainer, task.distiller, task.teacher_detector
    if trainer.channels_last:
        distiller.to(memory_format=torch.channels_last)
    module, optimizer = trainer.fabric.setup(distiller, trainer.optimizer(distiller))
    distiller.progress(1e6)  # past every ramp
    module.train()

    def run() -> None:
        optimizer.zero_grad()
        if with_teacher:
            with torch.no_grad(), trainer.fabric.autocast():
                teacher.features(batch[0])
        trainer.fabric.backward(torch.stack(list(module(*batch).values())).sum())
        optimizer.step()

    return run


def table(result: Mapping[str, Any]) -> str:
    """The rows as text."""
    first = result["rows"][0]["ms"]
    lines = [", ".join(f"{name} {value}" for name, value in result["machine"].items())]
    lines += [f"{row['step']:40} {row['ms']:9.1f} ms {row['ms'] / first:8.3f} x" for row in result["rows"]]
    return "\n".join(lines)


@dataclass(frozen=True)
class DetectionBenchmark:
    """Times a step with the teacher's maps, and one with the terms on top of them, in turns; prints their ratio.

    Args:
        files: gin files of the pair and its terms.
        teacher: Backbone of the teacher.
        architecture: Of both.
        bindings: Further bindings.
        terms: Bindings by name of a row: what is timed beside the step without terms.
        num_classes: Classes of the boxes.
        size: Height and width of the images.
        boxes: True boxes of an image.
        batch_size: Images of a step.
        precision: As of the trainer.
        repeats: Timed steps of each row, in turns; the median counts.
        threads: CPU threads of torch.
        device: 'cpu' or 'cuda'.
        output: JSON file of the result; None writes none.
    """

    files: tuple[str, ...]
    teacher: str
    terms: Mapping[str, tuple[str, ...]]
    architecture: Literal["faster_rcnn", "retinanet", "fcos"] = "faster_rcnn"
    bindings: tuple[str, ...] = ()
    num_classes: int = 10
    size: int = 320
    boxes: int = 6
    batch_size: int = 4
    precision: str = "32-true"
    repeats: int = 8
    threads: int = 2
    device: str = "cpu"
    output: str | None = "runs/benchmark/detection.json"

    def run(self) -> dict[str, Any]:
        """Measures, prints the table and writes the JSON file.

        Returns:
            ``machine`` and ``rows``: step and ms.
        """
        torch.set_num_threads(self.threads)
        batch = noise(self.batch_size, self.size, self.boxes, self.num_classes, self.device)
        backend, _ = choose_backend("torchvision")
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "teacher.pth"
            numbers = range(1, self.num_classes + 1)
            names = tuple(map(str, numbers))
            classes = SimpleNamespace(num_classes=self.num_classes, category_ids=numbers, classes=names, min_size=(64,), max_size=64)
            backend.build_student(DetectorNetwork(self.architecture, self.teacher), classes).save(weights)
            settings = [
                "Detection.backend = 'torchvision'",
                "Detection.data = @DigitScenes()",
                f"DigitScenes.num_train = {self.batch_size}",
                "DigitScenes.num_test = 1",
                "student/DetectorNetwork.backbone_weights = None",
                f"ARCHITECTURE = '{self.architecture}'",
                f"TEACHER = '{self.teacher}'",
                f"TEACHER_WEIGHTS = '{weights}'",
                f"BATCH_SIZE = {self.batch_size}",
                f"Trainer.device = '{self.device}'",
                f"Trainer.precision = '{self.precision}'",
                *self.bindings,
            ]
            no_terms = [*settings, "Distiller.terms = {}", "Distiller.weights = {}", "Distiller.stages = {}"]
            steps = {"with teacher's maps": training_step(list(self.files), no_terms, batch, with_teacher=True)}
            for name, bindings in self.terms.items():
                steps[name] = training_step(list(self.files), [*settings, *bindings], batch, with_teacher=False)
        seconds = time_in_turns(steps, self.repeats, self.device)
        rows = [{"step": name, "ms": 1000 * value} for name, value in seconds.items()]
        result = {"machine": machine(self.device, self.threads), "options": asdict(self), "rows": rows}
        print(table(result))
        write_json(result, self.output)
        return result
