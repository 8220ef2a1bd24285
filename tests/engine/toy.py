"""A tiny distillation-like task for the engine: dropout draws random numbers, batch norm keeps statistics, a ramp moves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gkd.engine import SGD, Cosine, Trainer
from gkd.engine.folder import RunFolder

STEPS_PER_EPOCH, BATCH = 4, 6
TIMES = ("images_per_second",)


class Toy(nn.Module):
    """`hook` hears the number of each forward pass; `bad_call` is the one whose task loss is NaN."""

    def __init__(
        self, dropout: float = 0.2, norm: bool = True, bad_call: int = -1, hook: Callable[[int], object] = lambda call: None
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.ramp, self.bad_call, self.hook, self.calls = 0.0, bad_call, hook, 0

    def progress(self, epoch: float) -> None:
        self.ramp = min(1.0, epoch)

    def forward(self, inputs: Tensor, targets: Tensor, index: Tensor) -> dict[str, Tensor]:
        self.logits = self.net(inputs)
        losses = {"task": F.cross_entropy(self.logits, targets)}
        if self.ramp > 0:
            losses["size"] = self.ramp * 0.1 * self.logits.square().mean()
        if self.calls == self.bad_call:
            losses["task"] = losses["task"] * float("nan")
        self.hook(self.calls)
        self.calls += 1
        return losses


def batches(epoch: int, start: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    source = torch.Generator().manual_seed(epoch)
    inputs = torch.randn(STEPS_PER_EPOCH, BATCH, 5, generator=source)
    targets = torch.randint(0, 3, (STEPS_PER_EPOCH, BATCH), generator=source)
    index = torch.arange(STEPS_PER_EPOCH * BATCH).view(STEPS_PER_EPOCH, BATCH)
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    for step in range(start, STEPS_PER_EPOCH):
        yield inputs[step, share], targets[step, share], index[step, share]


class Task:
    """A toy as the trainer takes it.

    Args:
        model: The toy.
        stream: Gives the training batches.
        before_evaluation: Called when an evaluation begins.
        changes: Attributes that differ from those of the class.
    """

    steps_per_epoch, batch_size, splits, score = STEPS_PER_EPOCH, BATCH, ("test",), "top1"

    def __init__(
        self,
        model: nn.Module,
        stream: Callable[..., Iterator[tuple]] = batches,
        before_evaluation: Callable[[], object] = lambda: None,
        **changes: object,
    ) -> None:
        self.distiller, self.train_batches, self.before_evaluation = model, stream, before_evaluation
        vars(self).update(changes)

    @property
    def student(self) -> nn.Module:
        return getattr(self.distiller, "net", self.distiller)

    def evaluate(self, split: str) -> dict[str, object]:
        self.before_evaluation()
        modes = self.distiller.training
        self.distiller.eval()
        with torch.no_grad():
            hits = [(self.distiller.net(inputs).argmax(1) == targets).float().mean() for inputs, targets, _ in batches(99, 0)]
        self.distiller.train(modes)
        return {"split": split, "top1": 100 * float(torch.stack(hits).mean())}

    def metrics(self, batch: tuple) -> dict[str, Tensor]:
        if not isinstance(self.distiller, Toy):
            return {}
        return {"top1": 100 * (self.distiller.logits.argmax(1) == batch[1]).float().mean()}

    def describe(self, batch: tuple) -> str:
        return f"samples {batch[2].tolist()}"


def trainer(**settings) -> Trainer:
    defaults = {"epochs": 3, "optimizer": SGD(lr=0.1), "schedule": Cosine(), "device": "cpu", "log_every": 3, "loggers": ()}
    return Trainer(**{**defaults, **settings})


def fit(
    path: Path | None,
    resume: bool = False,
    make: Callable[[], Toy] = Toy,
    seed: int = 0,
    before_evaluation: Callable[[], object] = lambda: None,
    **settings,
):
    """Trains a toy in a folder; returns the model and the summary."""
    torch.manual_seed(seed)
    model = make()
    task = Task(model, before_evaluation=before_evaluation)
    summary = trainer(**settings).fit(task, None if path is None else RunFolder(path), resume)
    return model, summary


def log(path: Path) -> list[dict]:
    """The records without what depends on the clock."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]
