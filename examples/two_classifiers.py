"""Distil one network of your own into another in a plain training loop: no gin, no trainer, no changed model.

python examples/two_classifiers.py
"""

import torch
from torch import nn

from gkd.data import Digits
from gkd.distill import Distiller, Ramp
from gkd.graphs import GraphBuilder, KNNEdges, PatchNodes
from gkd.losses import EdgeLoss, GraphLoss, KDLoss, SpectralLoss
from gkd.models import Teacher


def network(width: int) -> nn.Sequential:
    """Two convolutions and a linear layer."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(block(3, width), block(width, 2 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def train(model: nn.Module, losses_of, epochs: int) -> float:
    """Trains what `losses_of` has parameters of; returns the accuracy of the model on the test images, in per cent."""
    optimizer = torch.optim.AdamW(losses_of.parameters(), lr=5e-3)
    for epoch in range(epochs):
        losses_of.train()
        for images, targets, _ in digits.batches("train", 64, epoch=epoch, seed=0):
            if isinstance(losses_of, Distiller):
                losses_of.progress(epoch)
                loss = sum(losses_of(images, targets).values())
            else:
                loss = nn.functional.cross_entropy(losses_of(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        correct = [(model(images).argmax(1) == targets).float() for images, targets, *_ in digits.batches("test", 256)]
    return 100 * float(torch.cat(correct).mean())


torch.manual_seed(0)
digits = Digits(size=16)
teacher = network(32)
print(f"teacher               {train(teacher, teacher, epochs=15):.1f} %")

alone = network(8)
print(f"student alone         {train(alone, alone, epochs=12):.1f} %")

student = network(8)
graphs = GraphLoss(GraphBuilder(PatchNodes(), KNNEdges(k=3)), terms={"edge": EdgeLoss(), "spectral": SpectralLoss(form="heat")})
distiller = Distiller(
    student,
    Teacher(teacher),
    taps={"first": "0", "second": "1"},  # paths of modules, the same in both networks here
    terms={"kd": KDLoss(temperature=4.0), "graph": graphs},
    weights={"task": 0.5, "kd": 0.9, "graph": Ramp(1.0, up=1)},
    input_size=(3, 16, 16),
)
print(f"student, graphs + KD  {train(student, distiller, epochs=12):.1f} %")
