from __future__ import annotations

from dataclasses import fields

import pytest
from torch import nn

from gkd.graphs import CompleteEdges, GraphBuilder, HeatKernelEncoding, PatchNodes, RegionNodes
from gkd.losses import (
    CRDLoss,
    DenseKDLoss,
    EdgeLoss,
    EncodingLoss,
    FGDLoss,
    GraphLoss,
    GraphTerm,
    KDLoss,
    MessageLoss,
    ReviewKDLoss,
    Term,
    VertexLoss,
)
from gkd.losses.term import BuildsLayers, RemembersSamples


class Plain(nn.Module):
    """What somebody else may bring: a module with a level."""

    level = "stage"


def plain(**attributes):
    module = Plain()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_a_level_is_enough():
    assert Term.of(plain()) == Term("stage")
    assert not isinstance(plain(), BuildsLayers)
    assert not isinstance(plain(), RemembersSamples)


def test_what_is_declared_is_read():
    declared = {
        "level": "stages",
        "matched_channels": True,
        "map_size": (2, 3),
        "parts": ["a", "b"],
        "needs_index": True,
        "needs_boxes": True,
        "needs_outputs": True,
        "true_boxes_only": True,
        "dense": True,
        "compares": "masks",
    }
    assert set(declared) == {field.name for field in fields(Term)}
    assert Term.of(plain(**declared)) == Term(**{**declared, "parts": ("a", "b")})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"level": "pixels"},
            r"Expected term 'mine' to have the attribute 'level', one of logits, stage, stages \(got 'pixels' of Plain\)",
        ),
        ({"parts": "edge"}, r"Expected term 'mine' to have a tuple of names as 'parts' \(got 'edge'\)"),
        ({"parts": (1,)}, "a tuple of names as 'parts'"),
        ({"map_size": 8}, r"a height and a width as 'map_size' \(got 8\)"),
        ({"needs_index": "yes"}, r"True or False as 'needs_index' \(got 'yes'\)"),
        ({"matched_channels": None}, r"True or False as 'matched_channels' \(got None\)"),
    ],
)
def test_other_declarations_are_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        Term.of(plain(**attributes), "mine")


def test_a_module_without_a_level_is_named():
    with pytest.raises(ValueError, match=r"Expected Identity to have the attribute 'level', .* \(got None of Identity\)"):
        Term.of(nn.Identity())


def test_losses_declare_what_they_are():
    builder = GraphBuilder(PatchNodes(grid=4), CompleteEdges())
    assert Term.of(KDLoss()) == Term("logits")
    assert Term.of(DenseKDLoss()) == Term("logits", dense=True)
    assert Term.of(CRDLoss()) == Term("stage", needs_index=True)
    assert Term.of(FGDLoss()) == Term("stage", needs_boxes=True, true_boxes_only=True)
    assert Term.of(GraphLoss(builder, {"vertex": VertexLoss()})) == Term("stage", matched_channels=True, map_size=(4, 4), parts=("vertex",))
    regions = GraphBuilder(RegionNodes(roi_align=nn.Identity()), CompleteEdges())
    assert Term.of(GraphLoss(regions, {"edge": EdgeLoss()})) == Term("stage", parts=("edge",), needs_boxes=True)
    assert isinstance(ReviewKDLoss(), BuildsLayers)
    assert isinstance(CRDLoss(), RemembersSamples)


def test_graph_terms():
    assert GraphTerm.of(nn.Identity()) == GraphTerm(matched_nodes=True, matched_features=True, reads_encoding=True)
    assert GraphTerm.of(EdgeLoss()) == GraphTerm(matched_nodes=True, matched_features=False, reads_encoding=False)
    assert GraphTerm.of(MessageLoss()) == GraphTerm(matched_nodes=True, matched_features=True, reads_encoding=False)
    assert GraphTerm.of(EncodingLoss()) == GraphTerm(matched_nodes=True, matched_features=False, reads_encoding=True)
    assert not GraphTerm.of(EncodingLoss(HeatKernelEncoding())).reads_encoding
