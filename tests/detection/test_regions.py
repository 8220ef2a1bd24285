"""Regions: what is background, what is shared, and which class a region has, against loops."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou as box_iou_of_one

from gkd.detection.regions import (
    BoxNodes,
    Regions,
    box_iou,
    grid_candidates,
    mine_background,
    padded_boxes,
    region_labels,
    shared_proposals,
)
from gkd.graphs import GraphBuilder, KNNEdges
from gkd.losses import EdgeLoss, GraphLoss, MessageLoss, SpectralLoss, VertexLoss


def random_boxes(number, size=64.0):
    low = torch.rand(number, 2) * size * 0.6
    return torch.cat((low, low + 2 + torch.rand(number, 2) * size * 0.35), dim=1)


def test_iou_is_that_of_torchvision_image_by_image():
    first, second = torch.stack([random_boxes(5), random_boxes(5)]), torch.stack([random_boxes(7), random_boxes(7)])
    expected = torch.stack([box_iou_of_one(a, b) for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(box_iou(first, second), expected)
    assert 0 < int((expected > 0).sum()) < expected.numel()


@pytest.mark.parametrize("counts", [(3, 0, 9), (0, 0, 0)])
def test_mined_background_against_a_loop(counts):
    true, candidates = [random_boxes(count) for count in counts], [random_boxes(30) for _ in counts]
    mined = mine_background(padded_boxes(candidates), padded_boxes(true), number=6, max_iou=0.1)
    for found, box, near in zip(mined, candidates, true, strict=True):
        free = box[(box_iou_of_one(box, near) <= 0.1).all(1)][:6]
        assert torch.equal(found[: len(free)], free)
        assert (found[len(free) :] < 0).all()  # outside the image
    assert mined.shape == (3, 6, 4)


def test_fewer_candidates_than_wanted_and_lines_at_the_edge():
    candidates = padded_boxes([torch.tensor([[0.0, 0.0, 0.0, 30.0], [5.0, 5.0, 9.0, 9.0]])])
    mined = mine_background(candidates, padded_boxes([torch.zeros(0, 4)]), number=3)
    assert mined[0, 0].tolist() == [5, 5, 9, 9]
    assert (mined[0, 1:] < 0).all()


def test_grid_candidates_begin_where_the_map_responds():
    features = torch.zeros(2, 4, 16, 16)
    features[0, :, 12, 2], features[1, :, 1, 14] = 5, -5
    found = grid_candidates(features, (64, 128))
    assert found.shape == (2, 8 * 8 * 3, 4)
    centres = (found[:, :3, :2] + found[:, :3, 2:]) / 2
    # Cells of 16 x 8 pixels: row 6, column 1 and row 0, column 7; larger squares are cut off at the edges.
    assert found[0, 0].tolist() == [24 - 4, 52 - 4, 24 + 4, 52 + 4]
    assert (centres[0] - torch.tensor([24.0, 52.0])).abs().max() < 10
    assert (centres[1] - torch.tensor([120.0, 4.0])).abs().max() < 10
    assert found.min() >= 0
    assert (found.amax((0, 1)) <= torch.tensor([128, 64, 128, 64])).all()
    assert (found[..., 2:] > found[..., :2]).all()


def test_shared_proposals_are_the_first_ones_then_the_whole_image():
    first = random_boxes(5)
    shared = shared_proposals([first, first[:1], first[:0]], 3, (40, 60))
    assert torch.equal(shared[0], first[:3])
    assert shared[1].tolist() == [first[0].tolist(), [0, 0, 60, 40], [0, 0, 60, 40]]
    assert shared[2].tolist() == [[0, 0, 60, 40]] * 3


def test_labels_of_regions():
    boxes = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]]), torch.zeros(0, 4)]
    labels = [torch.tensor([4, 2]), torch.zeros(0, dtype=torch.long)]
    regions = torch.tensor([[[0.0, 0.0, 10.0, 8.0], [21.0, 0.0, 30.0, 10.0], [8.0, 0.0, 22.0, 10.0]]]).repeat(2, 1, 1)
    assert region_labels(regions, padded_boxes(boxes), labels, num_classes=7).tolist() == [[4, 2, 7], [7, 7, 7]]
    assert region_labels(regions, padded_boxes(boxes[1:] * 2), labels[1:] * 2, num_classes=7).tolist() == [[7] * 3] * 2


def region_loss():
    terms = {"vertex": VertexLoss(), "edge": EdgeLoss(), "spectral": SpectralLoss(form="heat"), "message": MessageLoss()}
    return GraphLoss(GraphBuilder(BoxNodes(), KNNEdges(k=4)), terms)


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (3, 300)])
@pytest.mark.parametrize("background", [0, 4])
def test_region_graphs_of_no_box_one_box_and_300(counts, background):
    student, teacher = torch.rand(2, 8, 12, 12, requires_grad=True), torch.rand(2, 8, 12, 12)
    boxes = padded_boxes([random_boxes(count) for count in counts])
    if background:
        boxes = torch.cat((boxes, mine_background(grid_candidates(teacher, (64, 64)), boxes, background)), dim=1)
    losses = region_loss()(student, teacher, boxes=list(boxes.unbind()), image_size=(64, 64))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert student.grad.isfinite().all()
    assert bool(student.grad.any()) == bool(sum(counts) + background)


def test_filled_up_boxes_change_nothing():
    student, teacher = torch.rand(1, 8, 12, 12), torch.rand(1, 8, 12, 12)
    boxes = random_boxes(6)
    alone = region_loss()(student, teacher, boxes=[boxes], image_size=(64, 64))
    filled = padded_boxes([boxes, random_boxes(9)])[:1]
    for name, loss in region_loss()(student, teacher, boxes=list(filled.unbind()), image_size=(64, 64)).items():
        torch.testing.assert_close(loss, alone[name], msg=name)


@pytest.mark.parametrize("wrong", [{"background": -1}, {"proposals": 0}, {"max_iou": 0.0}])
def test_bad_numbers(wrong):
    with pytest.raises(ValueError, match="Expected background >= 0"):
        Regions(**wrong)
