"""What detectors detect, in pictures: boxes beside the true ones, precision of every class, graphs of patches and regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from gkd.graphs import RegionNodes
from gkd.viz import page
from gkd.viz.graphs import draw_graph_pair
from gkd.viz.style import BLUE, GREEN, ORANGE, bare, figure_to_svg, grid_of, styled

LEAST_SCORE = 0.3  # of what is drawn
MOST_OVERLAP = 0.6  # of boxes beside each other
PANEL = 3.4  # inches: boxes of dense scenes can be told apart
Boxes = Sequence[tuple[Any, Any, Any]]
"""Of every image the boxes [n, 4], their labels [n], and their scores [n] or None."""


def class_section(final: Mapping[str, Any]) -> str:
    """Average precision of every class, from a record with ``NAME/CLASS`` numbers."""
    figure = figure_to_svg(draw_classes(final), "Average precision of every class")
    return page.section("Classes", page.captioned(figure, "Average precision of every class, in %."))


def box_section(images: Any, targets: Any, detections: Mapping[str, Sequence[Any]], classes: Sequence[str]) -> str:
    """True boxes and those that each network detects."""
    drawn = {name: [kept(detected) for detected in of_images] for name, of_images in detections.items()}
    figure = figure_to_svg(draw_detections(images, targets, drawn, classes), "True and detected boxes")
    return page.section("Detections", page.captioned(figure, f"Detected with a score of {LEAST_SCORE} or more, and the truth."))


def kept(found: Any) -> tuple[Any, Any, Any]:
    """What of the detections of an image is drawn: where boxes of several classes lie over each other, the one of the highest score."""
    from torchvision.ops import nms  # drawing other things needs no torchvision

    best = nms(found.boxes, found.scores, MOST_OVERLAP)
    best = best[found.scores[best] >= LEAST_SCORE]
    return found.boxes[best], found.labels[best], found.scores[best]


@styled
def draw_classes(final: Mapping[str, Any]) -> Any:
    """A bar for the average precision of every class."""
    known = {name.split("/", 1)[1]: value for name, value in final.items() if name.startswith(("AP/", "AP50/")) and value is not None}
    figure, (panel,) = grid_of(1, 1, max(4.0, 0.28 * len(known)), 2.4)
    panel.bar(range(len(known)), list(known.values()), color=BLUE)
    panel.set_xticks(range(len(known)), list(known), rotation=0 if max(map(len, known), default=0) < 3 else 90)
    panel.set_ylim(0, 100)
    panel.grid(False, axis="x")
    return figure


@styled
def draw_detections(images: Any, targets: Any, found: Mapping[str, Boxes], classes: Sequence[str]) -> Any:
    """A row for each image: its true boxes, then those that each network finds."""
    from matplotlib.patches import Rectangle

    columns: dict[str, Boxes] = {"truth": [(target["boxes"], target["labels"], None) for target in targets], **found}
    figure, panels = grid_of(len(images) * len(columns), len(columns), PANEL, PANEL)
    for place, panel in enumerate(panels):
        row, (name, boxes) = place // len(columns), list(columns.items())[place % len(columns)]
        height, width = images[row].shape[1:]
        bare(panel).imshow(images[row].permute(1, 2, 0).cpu().numpy(), extent=(0, width, height, 0))  # pixels from corner to corner
        if row == 0:
            panel.set_title(name)
        colour = GREEN if name == "truth" else ORANGE
        corners, labels, scores = boxes[row]
        texts = [classes[label] for label in labels.tolist()]
        if scores is not None:
            texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist(), strict=True)]
        for (left, top, right, bottom), text in zip(corners.tolist(), texts, strict=True):
            panel.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.0))
            panel.text(left, top, text, color="white", fontsize=6, va="bottom", bbox={"fc": colour, "ec": "none", "pad": 0.4})
    return figure


@torch.no_grad()
def graph_section(distiller: Any, images: Any, targets: Any) -> str:
    """The graphs of patches and regions on some images, of every term at its deepest level."""
    terms = {
        name: (stage, term, adapted) for name, stage, term, adapted in distiller.stage_terms() if callable(getattr(term, "graphs", None))
    }
    if not terms:
        return ""
    output, student, teacher, matched = distiller.features(images, targets)
    height, width = output.image_size
    shown = torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]).float() / 255
    pictures = []
    for name, (stage, term, adapted) in terms.items():
        places = distiller.networks.regions(images, targets, output) if isinstance(term.builder.nodes, RegionNodes) else ()
        graphs = term.graphs((matched if adapted else student)[stage].float(), teacher[stage].float(), *places)
        own, goal = (graph.detach().to("cpu") for graph in graphs)
        drawn = draw_graph_pair(own, goal, shown.cpu(), 3)
        caption = f"{type(term.builder.nodes).__name__}, {type(term.builder.edges).__name__}; the wider an edge, the larger its weight."
        pictures.append(page.captioned(figure_to_svg(drawn, f"{name}/{stage}: both graphs"), caption, f"{name}/{stage}"))
    return page.section("Graphs of student and teacher", *pictures)
