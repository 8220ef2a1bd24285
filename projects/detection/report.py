"""The pages of detectors: curves, average precision of every class, boxes found beside the true ones, graphs of patches and regions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torchvision.ops import nms

from gkd.engine.run import RunFolder
from gkd.graphs import RegionNodes
from gkd.viz import draw_graph_pair, draw_losses, draw_method_curves, page
from gkd.viz.report import format_seconds, read_metrics
from gkd.viz.style import BLUE, GREEN, ORANGE, bare, can_draw, figure_to_svg, grid_of, styled
from gkd.viz.table import Run

LEAST_SCORE = 0.3  # of what is drawn
MOST_OVERLAP = 0.6  # of boxes beside each other
Boxes = Sequence[tuple[Any, Any]]
"""Of every image the boxes [n, 4] and their labels [n]."""


def write_report(folder: RunFolder, task: Any, number: int = 4) -> Path:
    """Writes ``report.html`` into the folder of a run that has ended.

    Args:
        folder: The run folder.
        task: The `gkd.detection.Detection` that was trained, with the weights that the results are of.
        number: Of images to draw.

    Returns:
        Path of the page.
    """
    results, metrics = json.loads(folder.results.read_text()), read_metrics(folder.metrics)
    final, keys = results["final"], (f"-{position}" for position in itertools.count())
    score = task.score
    facts = [(name, f"{final[name]:.2f}", f"{final['split']} images") for name in ("AP", "AP50", "AP75") if final.get(name) is not None]
    facts.append(("training time", format_seconds(results["seconds"]), f"{results['images_per_second']:.1f} images/s"))
    facts.append(("parameters", f"{results['parameters']['student']:,}", ""))
    sections = [page.figures(facts)]
    if can_draw():
        per_epoch = results["steps"] / results["epochs"]
        run = Run(str(results["student"]), results["seed"], results, metrics)
        sections.append(
            page.section(
                "Learning curves",
                page.captioned(
                    figure_to_svg(draw_method_curves([run], score), f"{score} of the evaluations", next(keys)), f"{score} in %."
                ),
                page.captioned(
                    figure_to_svg(draw_losses(metrics, per_epoch), "Every loss term over the training", next(keys)),
                    "The loss and its terms as they were added up, weights and ramps included; scales differ from panel to panel.",
                ),
            )
        )
        classes = figure_to_svg(draw_classes(final), "Average precision of every class", next(keys))
        sections.append(page.section("Classes", page.captioned(classes, "Average precision of every class, in %.")))
        images, targets, _ = next(iter(task.batches("test", number)))
        found = {"student": [kept(detections) for detections in task.detector.detect(images)]}
        seen = figure_to_svg(draw_detections(images, targets, found, task.data.classes), "True and found boxes", next(keys))
        sections.append(page.section("Detections", page.captioned(seen, f"Found with a score of {LEAST_SCORE} or more, and the truth.")))
        sections.append(page.section("Graphs of student and teacher", *_graphs(task, images, targets, keys)))
    rows = [(name, str(results[name])) for name in ("backend", "seed", "steps", "unreadable_images", "processes")]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())))
    sections.append(page.section("The run", page.facts_table(rows)))
    config = page.collapsed("The operative bindings (config.gin)", page.code(folder.config.read_text().strip()))
    sections.append(page.section("Configuration", config))
    folder.report.write_text(page.page(folder.path.resolve().name, str(results["student"]), sections))
    return folder.report


def kept(found: Any) -> tuple[Any, Any]:
    """What of the detections of an image is drawn: where boxes of several classes lie over each other, the one of the highest score."""
    best = nms(found.boxes, found.scores, MOST_OVERLAP)
    best = best[found.scores[best] >= LEAST_SCORE]
    return found.boxes[best], found.labels[best]


@styled
def draw_classes(final: Mapping[str, Any]) -> Any:
    """A bar for the average precision of every class."""
    known = {name.split("/", 1)[1]: value for name, value in final.items() if "/" in name and value is not None}
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

    columns: dict[str, Boxes] = {"truth": [(target["boxes"], target["labels"]) for target in targets], **found}
    figure, panels = grid_of(len(images) * len(columns), len(columns), 2.0, 2.0)
    for place, panel in enumerate(panels):
        row, (name, boxes) = place // len(columns), list(columns.items())[place % len(columns)]
        height, width = images[row].shape[1:]
        bare(panel).imshow(images[row].permute(1, 2, 0).cpu().numpy(), extent=(0, width, height, 0))  # pixels from corner to corner
        if row == 0:
            panel.set_title(name)
        colour = GREEN if name == "truth" else ORANGE
        for (left, top, right, bottom), label in zip(boxes[row][0].tolist(), boxes[row][1].tolist(), strict=True):
            panel.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.4))
            panel.text(left, top, classes[label], color="white", fontsize=7, va="bottom", bbox={"fc": colour, "ec": "none", "pad": 0.6})
    return figure


@torch.no_grad()
def _graphs(task: Any, images: Any, targets: Any, keys: Any) -> list[str]:
    """The graphs of patches and regions on some images, of every term at its deepest level."""
    distiller = task.distiller
    terms = {
        name: (stage, term, adapted) for name, stage, term, adapted in distiller.stage_terms() if callable(getattr(term, "graphs", None))
    }
    if not terms:
        return []
    output, student, teacher, matched = distiller.features(images, targets)
    height, width = output.image_size
    shown = torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]).float() / 255
    pictures = []
    for name, (stage, term, adapted) in terms.items():
        places = distiller.networks.regions(images, targets, output, term) if isinstance(term.builder.nodes, RegionNodes) else ()
        graphs = term.graphs((matched if adapted else student)[stage].float(), teacher[stage].float(), *places)
        own, goal = (graph.detach().to("cpu") for graph in graphs)
        drawn = draw_graph_pair(own, goal, shown.cpu(), 3)
        caption = f"{type(term.builder.nodes).__name__}, {type(term.builder.edges).__name__}; the wider an edge, the larger its weight."
        pictures.append(page.captioned(figure_to_svg(drawn, f"{name}/{stage}: both graphs", next(keys)), caption, f"{name}/{stage}"))
    return pictures
