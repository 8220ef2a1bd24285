"""A vision transformer teaches a convolutional network: tokens become maps by the transformer's own grid (`@auto`).

pip install 'gkd[timm]'
python examples/vit_to_cnn.py
"""

import itertools

import torch

from gkd.data import Digits
from gkd.distill import Distiller
from gkd.graphs import GraphBuilder, KNNEdges, PatchNodes
from gkd.losses import EdgeLoss, GraphLoss, KDLoss
from gkd.models import Teacher, build_classifier, list_taps

torch.manual_seed(0)
size = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
teacher = build_classifier("timm:vit_tiny_patch16_224", num_classes=10, **size)  # weights="DEFAULT" for the published ones
student = build_classifier("torchvision:resnet18", num_classes=10)

print("places of the transformer that can be tapped:")
for tap in list_taps(teacher, (3, 32, 32))[-4:]:
    print(" ", tap)

distiller = Distiller(
    student,
    Teacher(teacher),
    taps={"middle": ("layer2", "blocks.1@auto"), "last": ("layer3", "blocks.3@auto")},
    terms={"kd": KDLoss(), "graph": GraphLoss(GraphBuilder(PatchNodes(grid=2), KNNEdges(k=2)), terms={"edge": EdgeLoss()})},
    weights={"task": 0.1, "kd": 0.9, "graph": 1.0},
    input_size=(3, 32, 32),
)
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02, momentum=0.9)
batches = Digits(size=32).batches("train", 32, epoch=0, seed=0)
for step, (images, targets, _) in enumerate(itertools.islice(batches, 4)):
    losses = distiller(images, targets)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    print(f"step {step}  " + "  ".join(f"{name} {float(loss.detach()):.3f}" for name, loss in losses.items()))
