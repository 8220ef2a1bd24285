import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from gkd.graphs import ChannelNodes, GraphBuilder, InstanceNodes, KNNEdges, Nodes, PatchNodes, RegionNodes
from gkd.graphs.nodes import centered

MAP_NODES = [
    ChannelNodes(),
    ChannelNodes(grid=2, center=True),
    PatchNodes(),
    PatchNodes(grid=(2, 1)),
    InstanceNodes(),
    InstanceNodes(grid=1),
]


def crop_mean(features, rois, output_size, spatial_scale):
    """A RoIAlign for boxes on whole pixels: the mean over the box, repeated over the output."""
    rows = []
    for image, x1, y1, x2, y2 in (rois * torch.tensor([1.0] + [spatial_scale] * 4)).round().int().tolist():
        rows.append(features[image, :, y1:y2, x1:x2].mean(dim=(1, 2))[:, None, None].expand(-1, *output_size))
    return torch.stack(rows) if rows else features.new_zeros(0, features.shape[1], *output_size)


class TestMaps:
    def test_channel_nodes_are_maps(self):
        features = torch.rand(2, 3, 4, 5)
        x, pos, mask = ChannelNodes()(features)
        assert torch.equal(x[1, 2], features[1, 2].flatten())
        assert pos is None
        assert mask is None

    def test_channel_nodes_on_a_grid(self):
        # One channel [[0, 1], [2, 3]] on a 1 x 2 grid: the means of its columns, (0 + 2) / 2 and (1 + 3) / 2.
        assert ChannelNodes(grid=(1, 2))(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])).x.tolist() == [[[1.0, 2.0]]]

    @pytest.mark.parametrize("size", [(6, 6), (7, 5), (4, 4)])
    def test_grid_makes_maps_of_all_sizes_comparable(self, size):
        features = torch.rand(2, 3, *size)
        expected = F.adaptive_avg_pool2d(features, 4).flatten(2)
        torch.testing.assert_close(ChannelNodes(grid=4)(features).x, expected)
        torch.testing.assert_close(PatchNodes(grid=4)(features).x, expected.mT)

    def test_patch_nodes_and_their_places(self):
        features = torch.rand(2, 3, 2, 4)
        x, pos, _ = PatchNodes()(features)
        assert torch.equal(x[1, 1 * 4 + 2], features[1, :, 1, 2])
        # Row 1 of 2, column 2 of 4: centre at x = 2.5 / 4, y = 1.5 / 2.
        assert pos[1, 1 * 4 + 2].tolist() == [0.625, 0.75]
        assert x.is_contiguous()

    def test_instance_nodes_are_one_graph(self):
        features = torch.rand(5, 3, 2, 2)
        assert torch.equal(InstanceNodes()(features).x, features.flatten(1)[None])
        torch.testing.assert_close(InstanceNodes(grid=1)(features).x, features.mean(dim=(2, 3))[None])
        assert torch.equal(InstanceNodes(grid=1)(features[:, :, 0, 0]).x, features[None, :, :, 0, 0])

    def test_center_by_hand(self):
        # Channels (1, 2) and (3, 6): the mean row is (2, 4), and (-1, -2), (1, 2) are left.
        features = torch.tensor([[[[1.0, 2.0]], [[3.0, 6.0]]]])
        assert ChannelNodes(center=True)(features).x.tolist() == [[[-1.0, -2.0], [1.0, 2.0]]]

    def test_center_with_padding(self):
        x, mask = torch.tensor([[[1.0], [3.0], [1e6]]]), torch.tensor([[True, True, False]])
        assert centered(x, mask).tolist() == [[[-1.0], [1.0], [0.0]]]
        assert centered(x, torch.zeros_like(mask)).tolist() == [[[0.0], [0.0], [0.0]]]

    @pytest.mark.parametrize("nodes", MAP_NODES, ids=repr)
    def test_memory_format_does_not_matter(self, nodes):
        features = torch.rand(2, 3, 4, 4)
        torch.testing.assert_close(nodes(features.to(memory_format=torch.channels_last)).x, nodes(features).x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("nodes", MAP_NODES, ids=repr)
    def test_rows_are_float32_or_float64(self, nodes, dtype):
        with torch.autocast("cpu", torch.bfloat16):
            made = nodes(torch.rand(2, 3, 4, 4).to(dtype))
        assert made.x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    @pytest.mark.parametrize("nodes", MAP_NODES, ids=repr)
    def test_gradient(self, nodes):
        assert gradcheck(lambda f: nodes(f).x, torch.rand(2, 2, 4, 4, dtype=torch.float64, requires_grad=True))

    @pytest.mark.parametrize("nodes", MAP_NODES, ids=repr)
    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (1, 1, 4, 4)])
    def test_few_nodes(self, nodes, shape):
        x = nodes(torch.rand(shape)).x
        assert x.dim() == 3
        assert x.isfinite().all()

    @pytest.mark.parametrize("nodes", MAP_NODES, ids=repr)
    def test_bad_features(self, nodes):
        with pytest.raises(ValueError, match=r"Expected features of shape \[B, C, h, w\].*got \[2, 3, 4\]"):
            nodes(torch.rand(2, 3, 4))
        with pytest.raises(ValueError, match=r"at least one value a row \(got \[2, 3, 0, 4\]\)"):
            nodes(torch.rand(2, 3, 0, 4))
        with pytest.raises(ValueError, match=r"Expected floating-point features \(got torch.int64\)"):
            nodes(torch.ones(2, 3, 4, 4, dtype=torch.long))
        with pytest.raises(TypeError, match=r"Expected features to be a tensor \(got list\)"):
            nodes([1.0])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("nodes", MAP_NODES, ids=repr)
    def test_values_that_are_not_finite(self, nodes, value):
        features = torch.rand(2, 3, 4, 4)
        features[1, 2, 3, 0] = value
        with pytest.raises(ValueError, match=r"Expected finite features \(got NaN or infinity in 1 of 96 values\)"):
            nodes(features)

    def test_large_values_are_finite(self):
        assert ChannelNodes()(torch.full((1, 2, 8, 8), 3e38)).x.shape == (1, 2, 64)  # their sum is not

    def test_bad_options(self):
        with pytest.raises(ValueError, match=r"Expected the height of a grid to be a positive integer \(got 0\)"):
            ChannelNodes(grid=0)
        with pytest.raises(ValueError, match=r"Expected the width of a grid to be a positive integer \(got 0\)"):
            InstanceNodes(grid=(2, 0))
        for grid in (2.0, "4", True, (2.5, 2), (2, 2, 2)):
            with pytest.raises(ValueError, match=r"Expected the .*grid to be .*\(got"):
                PatchNodes(grid=grid)
        with pytest.raises(ValueError, match=r"Expected center to be True or False \(got 'False'\)"):
            ChannelNodes(center="False")

    def test_a_grid_larger_than_the_map(self):
        for nodes in (ChannelNodes(grid=4), PatchNodes(grid=(2, 4)), InstanceNodes(grid=(2, 4))):
            with pytest.raises(ValueError, match=r"Expected a grid no larger than the map, \[2, 3\] \(got \[., 4\]\): take a smaller grid"):
                nodes(torch.rand(2, 3, 2, 3))


class TestRegions:
    boxes = (torch.tensor([[0.0, 0.0, 16.0, 8.0], [8.0, 16.0, 32.0, 32.0]]), torch.tensor([[16.0, 16.0, 24.0, 24.0]]))

    def test_by_hand(self):
        features = torch.rand(2, 3, 4, 4)
        x, pos, mask = RegionNodes(crop_mean)(features, self.boxes, (32, 32))
        # Image pixels are 8 to a feature: the first box covers columns 0, 1 of row 0, the last one (2, 2) alone.
        torch.testing.assert_close(x[0, 0], features[0, :, 0, :2].mean(dim=1))
        torch.testing.assert_close(x[1, 0], features[1, :, 2, 2])
        assert mask.tolist() == [[True, True], [True, False]]
        assert x[1, 1].tolist() == [0.0] * 3
        # (0, 0)-(16, 8) of 32 x 32: centre (8, 4), size (16, 8).
        assert pos[0, 0].tolist() == [0.25, 0.125, 0.5, 0.25]

    def test_axes_may_have_unequal_strides(self):
        features = torch.rand(1, 2, 4, 2)  # strides: 8 pixels down, 16 across
        x, _, _ = RegionNodes(crop_mean)(features, [torch.tensor([[16.0, 8.0, 32.0, 24.0]])], (32, 32))
        torch.testing.assert_close(x[0, 0], features[0, :, 1:3, 1].mean(dim=1))

    def test_output_size(self):
        assert RegionNodes(crop_mean, output_size=(3, 2))(torch.rand(2, 5, 4, 4), self.boxes, (32, 32)).x.shape == (2, 2, 30)

    def test_with_torchvision(self):
        ops = pytest.importorskip("torchvision.ops")
        features = torch.rand(2, 3, 4, 4, dtype=torch.float64)
        boxes = [b.double() + 0.3 for b in self.boxes]
        align = functools.partial(ops.roi_align, aligned=True, sampling_ratio=2)
        x = RegionNodes(align, output_size=2)(features, boxes, (40, 40)).x
        expected = ops.roi_align(features, boxes, 2, spatial_scale=0.1, aligned=True, sampling_ratio=2).flatten(1)
        torch.testing.assert_close(x.flatten(0, 1)[:3], expected)

    def test_half_precision_keeps_coordinates(self):
        ops = pytest.importorskip("torchvision.ops")
        features = torch.rand(1, 3, 32, 32).bfloat16()
        boxes = [torch.tensor([[300.7, 100.3, 500.2, 301.9]])]  # bfloat16 would move these corners by a pixel
        x = RegionNodes(ops.roi_align)(features, boxes, (512, 512)).x
        torch.testing.assert_close(x[0], ops.roi_align(features.float(), boxes, 1, spatial_scale=1 / 16).flatten(1))

    def test_boxes_are_clipped(self):
        features = torch.rand(1, 3, 4, 4)
        inside = RegionNodes(crop_mean)(features, [torch.tensor([[0.0, 8.0, 16.0, 32.0]])], (32, 32))
        across = RegionNodes(crop_mean)(features, [torch.tensor([[-9.0, 8.0, 16.0, 99.0]])], (32, 32))
        assert torch.equal(inside.x, across.x)
        assert torch.equal(inside.pos, across.pos)

    def test_boxes_outside_make_no_node(self):
        features = torch.rand(1, 3, 4, 4, requires_grad=True)
        boxes = [torch.tensor([[-9.0, 0.0, 0.0, 8.0], [0.0, 0.0, 8.0, 8.0], [0.0, 40.0, 8.0, 50.0]])]
        nodes = RegionNodes(crop_mean)(features, boxes, (32, 32))
        assert nodes.mask.tolist() == [[False, True, False]]
        assert nodes.x.isfinite().all()  # the mean of an empty box is not
        graph = GraphBuilder(RegionNodes(crop_mean), KNNEdges(k=2))(features, boxes, (32, 32))
        assert graph.x.shape == (1, 3)

    @pytest.mark.parametrize(
        "box", [[8.0, 8.0, 4.0, 16.0], [8.0, 8.0, 8.0, 16.0], [8.0, 16.0, 16.0, 8.0], [0.0, 0.0, math.nan, 4.0], [0.0, 0.0, math.inf, 4.0]]
    )
    def test_malformed_boxes_are_named(self, box):
        boxes = [self.boxes[0], torch.tensor([[0.0, 0.0, 4.0, 4.0], box])]
        with pytest.raises(ValueError, match=r"Expected boxes \(x1, y1, x2, y2\) with x1 < x2 and y1 < y2 \(got .*, box 1 of image 1\)"):
            RegionNodes(crop_mean)(torch.rand(2, 3, 4, 4), boxes, (32, 32))

    def test_images_without_boxes(self):
        nodes = RegionNodes(crop_mean)
        features = torch.rand(2, 3, 4, 4)
        x, pos, mask = nodes(features, [torch.zeros(0, 4), self.boxes[1]], (32, 32))
        assert mask.tolist() == [[False], [True]]
        x, pos, mask = nodes(features, [torch.zeros(0, 4)] * 2, (32, 32))
        assert (x.shape, pos.shape, mask.shape) == ((2, 0, 3), (2, 0, 4), (2, 0))
        x, pos, mask = nodes(features[:0], [], (32, 32))
        assert (x.shape, pos.shape, mask.shape) == ((0, 0, 3), (0, 0, 4), (0, 0))

    def test_gradient(self):
        features = torch.rand(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda f: RegionNodes(crop_mean, center=True)(f, self.boxes, (32, 32)).x, features)

    def test_bad_arguments(self):
        features = torch.rand(2, 3, 4, 4)
        with pytest.raises(ValueError, match=r"Expected one tensor of boxes for each of the 2 images \(got 1\)"):
            RegionNodes(crop_mean)(features, self.boxes[:1], (32, 32))
        with pytest.raises(ValueError, match=r"Expected boxes of shape \[n, 4\] for image 1 \(got \[2, 5\]\)"):
            RegionNodes(crop_mean)(features, [self.boxes[0], torch.rand(2, 5)], (32, 32))
        with pytest.raises(ValueError, match=r"Expected image_size \(height, width\) in pixels \(got \(32, 0\)\)"):
            RegionNodes(crop_mean)(features, self.boxes, (32, 0))
        with pytest.raises(TypeError, match=r"Expected roi_align to be callable.*got int"):
            RegionNodes(7)


def test_nodes_need_only_rows():
    assert Nodes(torch.ones(1, 1, 1)) == (torch.ones(1, 1, 1), None, None)
