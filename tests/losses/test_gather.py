"""Relations between the images of several processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gkd.graphs import CompleteEdges, GraphBuilder, InstanceNodes, PatchNodes
from gkd.losses import CCLoss, CRDLoss, EdgeLoss, GraphLoss, HKDLoss, IRGLoss, PKTLoss, RKDLoss, SpectralLoss, SPLoss

IMAGES = 32  # of each of two processes


def losses(gather):
    instances = GraphBuilder(InstanceNodes(center=True), CompleteEdges())
    return {
        "sp": SPLoss(gather=gather),
        "rkd": RKDLoss(gather=gather),
        "cc": CCLoss(embedding_dim=8, gather=gather),
        "pkt": PKTLoss(gather=gather),
        "irg": IRGLoss(gather=gather),
        "crd": CRDLoss(num_samples=80, num_negatives=16, embedding_dim=8, gather=gather),
        "hkd": HKDLoss(k=3, embedding_dim=8, gather=gather),
        "graph": GraphLoss(instances, {"edge": EdgeLoss("kl"), "spectral": SpectralLoss(num_eig=3)}, gather=gather),
    }


class Step(nn.Module):
    """A student of one layer and the losses that compare its maps with given ones."""

    def __init__(self, gather):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Conv2d(3, 4, 3, stride=2, bias=False)  # translations of all images change none of these relations
        self.losses = nn.ModuleDict(losses(gather))
        shapes = torch.Size([IMAGES, 4, 3, 3]), torch.Size([IMAGES, 6, 3, 3])
        for loss in self.losses.values():
            if hasattr(loss, "build"):
                loss.build(*shapes)

    def forward(self, images, teacher, index):
        student, values = self.student(images), {}
        for name, loss in self.losses.items():
            torch.manual_seed(1)  # the negatives of CRD
            if name == "irg":
                values[name] = loss({"a": student, "b": student.square()}, {"a": teacher, "b": teacher.square()})
            elif name == "graph":
                values.update({f"graph/{part}": value for part, value in loss(student, teacher).items()})
            else:
                values[name] = loss(student, teacher, index=index) if name == "crd" else loss(student, teacher)
        return values


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * IMAGES, 3, 7, 7, generator=generator)
    return images, torch.randn(2 * IMAGES, 6, 3, 3, generator=generator), torch.randperm(80, generator=generator)[: 2 * IMAGES]


def gradients(step, values):
    by_loss = {}
    for name, value in values.items():
        step.zero_grad()
        value.backward(retain_graph=True)
        by_loss[name] = {parameter: p.grad.clone() for parameter, p in step.named_parameters() if p.grad is not None}
    return by_loss


def _rank(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    step = Step(gather=True)
    part = [values[rank * IMAGES : (rank + 1) * IMAGES] for values in batch()]
    values = step(*part)
    by_loss = gradients(step, values)
    for of_parameters in by_loss.values():
        for gradient in of_parameters.values():  # as DistributedDataParallel does
            torch.distributed.all_reduce(gradient)
            gradient /= 2
    memory = step.losses["crd"].student_memory
    results[rank] = ({name: value.item() for name, value in values.items()}, by_loss, memory)
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(_rank, (tmp_path / "store", results), nprocs=2, start_method="fork")
        ranks = [results[0], results[1]]
    step = Step(gather=False)
    values = step(*batch())
    expected = gradients(step, values)
    assert set(values) == {"sp", "rkd", "cc", "pkt", "irg", "crd", "hkd", "graph/edge", "graph/spectral"}
    for numbers, by_loss, memory in ranks:
        assert numbers == pytest.approx({name: value.item() for name, value in values.items()}, rel=1e-4)
        torch.testing.assert_close(memory, step.losses["crd"].student_memory)
        for name, of_parameters in expected.items():
            assert of_parameters["student.weight"].abs().sum() > 0
            for parameter, gradient in of_parameters.items():
                torch.testing.assert_close(by_loss[name][parameter], gradient, rtol=1e-3, atol=1e-6, msg=f"{name}: {parameter}")


def test_a_single_process_keeps_its_images():
    together, alone = Step(gather=True), Step(gather=False)
    together.load_state_dict(copy.deepcopy(alone.state_dict()))
    first, second = together(*batch()), alone(*batch())
    assert {name: value.item() for name, value in first.items()} == {name: value.item() for name, value in second.items()}


def test_graphs_inside_an_image_have_nothing_to_gather():
    with pytest.raises(ValueError, match="Expected gather=True with InstanceNodes"):
        GraphLoss(GraphBuilder(PatchNodes(), CompleteEdges()), {"edge": EdgeLoss()}, gather=True)
