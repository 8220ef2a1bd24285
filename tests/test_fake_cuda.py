"""No step of a training waits for a GPU or leaves it: recipes, methods and all kinds of graphs on fake CUDA tensors."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from torchvision.ops import roi_align

from gkd.config import configure
from gkd.detection.regions import grid_candidates, mine_background, padded_boxes, region_labels, shared_proposals
from gkd.graphs import GraphBuilder, RegionNodes
from gkd.losses import CWDLoss, EdgeLoss, EncodingLoss, GraphLoss, MessageLoss, MGDLoss, PKDLoss, SpectralLoss, VertexLoss
from gkd.losses.regions import DsigLoss, FGDLoss
from tests.fake_cuda import move, problems_of
from tests.graphs.test_combinations import EDGES, ENCODINGS, NODES, SENSE
from tests.test_gin_files import METHODS, PAIR, RUNS, names, overrides

pytestmark = pytest.mark.fake_cuda

LOSSES = {
    "vertex": VertexLoss,
    "guided": partial(VertexLoss, guidance=0.5, distance="standardized"),
    "edge": EdgeLoss,
    "kl": partial(EdgeLoss, distance="kl"),
    "residual": partial(SpectralLoss, num_eig=2),
    "heat": partial(SpectralLoss, form="heat"),
    "signature": partial(SpectralLoss, form="heat", kernel="signature"),
    "message": MessageLoss,
    **{f"encoding_{name}": partial(lambda make: EncodingLoss(make()), make) for name, make in ENCODINGS.items()},
}
DETECTION_TERMS = {"cwd": CWDLoss, "pkd": PKDLoss, "mgd": MGDLoss, "fgd": FGDLoss, "dsig": partial(DsigLoss, roi_align)}
# What may wait for the GPU, by file and operator, and why.
MAY_WAIT = {
    ("gkd/models/heads.py", "_local_scalar_dense"): "a look at the first batch alone: is the mean of the map what the last layer sees?",
    ("gkd/graphs/perturbation.py", "_linalg_eigh"): "the exact eigensolver: torch asks the GPU whether it converged",
    ("gkd/graphs/builder.py", "nonzero"): "regions: images have unequally many, so their graphs are compacted",
}


def unexpected(problems: list[str]) -> list[str]:
    return [line for line in problems if not any(line.startswith(file) and operator in line for file, operator in MAY_WAIT)]


def planted(x):
    return {"item": lambda: x().sum().item(), "cpu": lambda: x().cpu(), "zeros": lambda: x() + torch.zeros(3)}


@pytest.mark.parametrize(("name", "problem"), [("item", "waits"), ("cpu", "to the host"), ("zeros", "mixes")])
def test_planted_faults_are_caught(name, problem):
    (line,) = problems_of(planted(lambda: torch.randn(3, device="cuda"))[name])
    assert line.startswith("tests/test_fake_cuda.py:")
    assert problem in line


def step_of(files, tmp_path, batch_size, device="cuda"):
    """A training step of a recipe on fake tensors: its ramps, losses and metrics."""
    task = configure(files, overrides(files, tmp_path, batch_size)).build("Classification")
    distiller = task.distiller.train()
    move(distiller, *([] if distiller.teacher is None else [distiller.teacher]), device=device)

    def run():
        images = torch.empty(batch_size, *task.data.input_size, device=device)
        targets = torch.empty(batch_size, dtype=torch.long, device=device)
        distiller.progress(3.0)
        losses = distiller(images, targets, targets)
        task.metrics((images, targets, targets))
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    return run


def graph_loss_of(nodes, edges, device="cuda"):
    """All losses of a kind of graph on fake maps."""
    term = GraphLoss(GraphBuilder(nodes_of(nodes), EDGES[edges]), {name: make() for name, make in LOSSES.items()})
    move(term, device=device)

    def run():
        student, teacher = (torch.empty(5, 6, 4, 4, device=device, requires_grad=needs) for needs in (True, False))
        boxes = [torch.empty(count, 4, device=device) for count in (5, 2, 3, 1, 4)]
        options = {"boxes": boxes, "image_size": (32, 32)} if nodes == "region" else {}
        losses = term(student, teacher, **options)
        assert losses.keys() == LOSSES.keys()
        return torch.stack(list(losses.values())).sum()

    return run


def nodes_of(name):
    """Regions are cut out by torchvision's operator, which has a kernel for CUDA."""
    return RegionNodes(partial(roi_align, aligned=True, sampling_ratio=2)) if name == "region" else NODES[name][0]


def detection_term_of(make, device="cuda"):
    """A term of detectors on fake maps."""
    term = make()
    if hasattr(term, "build"):
        term.build(torch.Size((2, 8, 4, 4)), torch.Size((2, 8, 4, 4)))
    move(term, device=device)

    def run():
        student, teacher = (torch.empty(2, 8, 4, 4, device=device, requires_grad=needs) for needs in (True, False))
        boxes = [torch.empty(count, 4, device=device) for count in (5, 2)]
        options = {"boxes": boxes, "image_size": (32, 32)} if getattr(term, "needs_boxes", False) else {}
        return term(student, teacher, **options)

    return run


def mined_regions():
    """Regions of images without proposals, their classes, and proposals that both networks share."""
    features, labels = torch.empty(2, 8, 4, 4, device="cuda"), [torch.empty(5, dtype=torch.long, device="cuda")] * 2
    boxes = padded_boxes([torch.empty(count, 4, device="cuda") for count in (5, 2)])
    candidates = grid_candidates(features, (32, 32), grid=2)
    regions = torch.cat((boxes, mine_background(candidates, boxes, number=100)), dim=1)
    region_labels(regions, boxes, labels, num_classes=3)
    shared_proposals(list(candidates.unbind()), 4, (32, 32))


@pytest.mark.parametrize("file", names(RUNS))
def test_recipes(file, tmp_path):
    assert unexpected(problems_of(step_of([f"gin/{file}"], tmp_path, 4))) == []


@pytest.mark.parametrize("file", names(METHODS))
def test_methods(file, tmp_path):
    assert unexpected(problems_of(step_of([PAIR, f"gin/{file}"], tmp_path, 10))) == []


@pytest.mark.parametrize(("nodes", "edges"), SENSE)
def test_graphs(nodes, edges):
    assert unexpected(problems_of(graph_loss_of(nodes, edges))) == []


@pytest.mark.parametrize("name", DETECTION_TERMS)
def test_detection_terms(name):
    assert unexpected(problems_of(detection_term_of(DETECTION_TERMS[name]))) == []


def test_mined_regions():
    assert problems_of(mined_regions) == []


BACKWARD = """
import sys
from pathlib import Path
from tests.fake_cuda import make_backward_possible, problems_of
from tests.test_fake_cuda import PAIR, step_of, unexpected

device = make_backward_possible()
for file in sys.argv[2:]:
    step = step_of([PAIR, file], Path(sys.argv[1]), 10, device)
    for line in unexpected(problems_of(lambda: step().backward(), device)):
        print(file, line)
"""


@pytest.mark.slow
def test_backward_of_methods(tmp_path, repository):
    """In a process of its own, which the private device stays registered in."""
    files = ["gin/base/graph_kd.gin", *(f"gin/{file}" for file in names(METHODS))]
    command = [sys.executable, "-W", "ignore", "-c", BACKWARD, str(tmp_path), *files]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
