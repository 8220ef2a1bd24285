"""The report of a run: one page with its figures, curves, graphs and configuration."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gkd.errors import UserError
from gkd.viz import page
from gkd.viz.collect import GraphPair, Views, collect_views, count_confusion
from gkd.viz.curves import draw_accuracies, draw_losses
from gkd.viz.graphs import draw_graph_pair, draw_spectra
from gkd.viz.images import draw_attention, draw_confusion
from gkd.viz.style import can_draw, figure_to_svg
from gkd.viz.table import Run, finite, format_bytes

if TYPE_CHECKING:
    from gkd.engine.run import RunFolder

MAX_CONFUSED = 50_000  # images that the confusion matrix is counted from, about
NO_PICTURES = "The pictures need matplotlib: pip install 'gkd[viz]'."

NODES = {
    "PatchNodes": "A node is a place in the feature map of one image",
    "ChannelNodes": "A node is a channel of the feature map of one image",
    "InstanceNodes": "A node is one image of the batch",
    "RegionNodes": "A node is a region of one image",
}


def write_report(
    run_folder: Path | str | RunFolder,
    distiller: Any = None,
    data: Any = None,
    batch: Sequence[Any] | None = None,
    title: str | None = None,
    number: int = 3,
) -> Path:
    """Writes ``report.html`` into a run folder: one file that opens without a network and runs no script.

    What the folder holds is shown as far as it is there: results.json, metrics.jsonl, config.gin. With the distiller and images there
    are pictures of the graphs, spectra and attention masks, and with the data the confusion matrix on the test images. The distiller is
    run as it is, so it should hold the weights that the results are of. Without matplotlib the page has no pictures.

    Args:
        run_folder: Where a training has written.
        distiller: The :class:`~gkd.distill.Distiller` that was trained.
        data: A data object of gkd.data, for images, names of classes and the statistics that images are normalised with.
        batch: Images and targets to draw; None takes test images of the data.
        title: Heading; None is the folder's name.
        number: Of images that graphs and masks are drawn for.

    Returns:
        Path of the report.

    Raises:
        UserError: If the folder holds neither results nor metrics.
    """
    from gkd.engine.run import RunFolder  # brings lightning along, which drawing does not need

    folder = run_folder if isinstance(run_folder, RunFolder) else RunFolder(run_folder)
    results = json.loads(folder.results.read_text()) if folder.results.is_file() else {}
    metrics = read_metrics(folder.metrics)
    if not results and not metrics:
        raise UserError(f"Expected results.json or metrics.jsonl in {folder.path} (got neither). Give the folder of a run, or train first.")
    config = folder.config.read_text() if folder.config.is_file() else ""
    views, confusion = None, None
    if distiller is not None and can_draw():
        views, confusion = _look(distiller, data, batch)
    folder.report.write_text(render_report(title or folder.path.resolve().name, results, metrics, config, views, confusion, number))
    return folder.report


def render_report(
    title: str,
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    config: str = "",
    views: Views | None = None,
    confusion: Tensor | None = None,
    number: int = 3,
) -> str:
    """The page of :func:`write_report`, from what it shows.

    Args:
        title: Heading.
        results: What results.json holds; may be empty.
        metrics: Records of metrics.jsonl; may be empty.
        config: The operative configuration.
        views: What the networks make of some images.
        confusion: Counts of (true class, answer).
        number: Of images to draw.
    """
    keys = (f"-{position}" for position in itertools.count())
    sections = [page.figures(_key_figures(results))]
    if not results:
        sections.append(page.paragraph("This run has no results yet: it was interrupted or is still going on."))
    if can_draw():
        sections += [_curves(results, metrics, keys)]
        if views is not None:
            sections += [_graphs(views, number, keys), _attention(views, number, keys)]
        if confusion is not None:
            sections.append(_confusion(confusion, views.classes if views else (), keys))
    else:
        sections.append(page.paragraph(NO_PICTURES))
    sections.append(page.section("The run", page.facts_table(_details(results))))
    if config:
        sections.append(page.section("Configuration", page.collapsed("The operative bindings (config.gin)", page.code(config.strip()))))
    return page.page(title, _lead(results, config), sections)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl, without a last line that was cut off; an absent file has no records."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_run(path: Path | str, method: str, seed: int | None = None) -> Run:
    """Reads a run folder for a comparison; one without results counts as a run that failed.

    Args:
        path: The run folder.
        method: What the run is compared by.
        seed: None takes that of the results.
    """
    from gkd.engine.run import RunFolder

    folder = RunFolder(path)
    results = json.loads(folder.results.read_text()) if folder.results.is_file() else {}
    return Run(method, int(results.get("seed", 0)) if seed is None else seed, results, read_metrics(folder.metrics))


def _look(distiller: Any, data: Any, batch: Sequence[Any] | None) -> tuple[Views | None, Tensor | None]:
    device = next((parameter.device for parameter in distiller.parameters()), torch.device("cpu"))
    confusion = None
    if data is not None:
        batch = next(iter(data.batches("test", 32, device=device)), None) if batch is None else batch
        size = 256
        confusion = count_confusion(
            distiller.student, data.batches("test", size, device=device), data.num_classes, -(-MAX_CONFUSED // size)
        )
    if batch is None:
        return None, confusion
    classes = getattr(data, "classes", ())
    return collect_views(distiller, batch, getattr(data, "mean", None), getattr(data, "std", None), classes), confusion


def _lead(results: Mapping[str, Any], config: str) -> str:
    student = results.get("student") or _bound(config, "student")
    teacher = results.get("teacher") or (_bound(config, "teacher") if (results.get("parameters") or {}).get("teacher", 1) else None)
    words = [f"{student}, taught by {teacher}" if student and teacher else str(student) if student else "A training"]
    if results.get("seed") is not None:
        words.append(f"seed {results['seed']}")
    if finite(results.get("epochs")) is not None:
        words.append(f"{results['epochs']:g} epochs")
    return " · ".join(words)


def _bound(config: str, network: str) -> str | None:
    """Name of a network, as the configuration binds it."""
    found = re.search(rf"^{network}/Network\.name = \\?\s*['\"](.+?)['\"]", config, re.MULTILINE)
    macro = re.search(rf"^{network.upper()} = \\?\s*['\"](.+?)['\"]", config, re.MULTILINE)
    return found[1] if found else macro[1] if macro else None


def _key_figures(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    final, best = results.get("final") or {}, results.get("best") or {}
    split = f"{final['split']} images" if "split" in final else ""
    facts = []
    for name, title in (("top1", "top-1"), ("top5", "top-5"), ("agreement", "agreement"), ("AP", "AP")):
        value, other = finite(final.get(name)), finite(best.get(name))
        if value is not None:
            remark = f"best {other:.2f} at epoch {best.get('epoch', '?')}" if other is not None else split
            if name == "agreement":
                remark = "with the teacher"
            facts.append((title, f"{value:.2f}", remark))
    seconds, speed, memory = (finite(results.get(name)) for name in ("seconds", "images_per_second", "peak_memory"))
    if seconds is not None:
        facts.append(("training time", format_seconds(seconds), "" if speed is None else f"{speed:,.0f} images/s"))
    if memory is not None:
        facts.append(("peak memory", format_bytes(memory), (results.get("device") or {}).get("type", "")))
    parameters = results.get("parameters") or {}
    if "student" in parameters:
        teacher = f"teacher {parameters['teacher']:,}" if parameters.get("teacher") else "no teacher"
        facts.append(("parameters", f"{parameters['student']:,}", teacher))
    return facts


def _details(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    final, device = results.get("final") or {}, results.get("device") or {}
    parameters = results.get("parameters") or {}
    facts = [
        ("seed", results.get("seed")),
        ("steps", f"{results['steps']:,}" if "steps" in results else None),
        (
            "test loss" if final.get("split") == "test" else "loss",
            f"{final['loss']:.4g}" if finite(final.get("loss")) is not None else None,
        ),
        ("best epoch chosen on", f"{results['chosen_on']} images" if "chosen_on" in results else None),
        ("parameters used in training alone", f"{parameters['distillation']:,}" if "distillation" in parameters else None),
        ("processes", results.get("processes")),
        ("device", ", ".join(str(part) for part in (device.get("type"), device.get("name")) if part)),
        ("threads", device.get("threads")),
        ("versions", ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items())),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _curves(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], keys: Any) -> str:
    if not metrics:
        return ""
    steps, epochs = finite(results.get("steps")), finite(results.get("epochs"))
    per_epoch = steps / epochs if steps and epochs else None
    accuracies = figure_to_svg(draw_accuracies(metrics, per_epoch), "Accuracy and learning rate over the training", next(keys))
    losses = figure_to_svg(draw_losses(metrics, per_epoch), "Every loss term over the training", next(keys))
    return page.section(
        "Learning curves",
        page.captioned(
            accuracies,
            "Left: the share of images that the student names right, on the training images (as augmented, on the way) and in "
            "the evaluations, and how often it agrees with its teacher. Right: the learning rate.",
        ),
        page.captioned(
            losses,
            "The loss and its terms as they were added up, weights and ramps included: a panel for each term, a line for each stage. "
            "Values are means between two log points. Scales differ from panel to panel.",
        ),
    )


def _graphs(views: Views, number: int, keys: Any) -> str:
    terms: dict[str, list[GraphPair]] = {}
    for pair in views.pairs:
        terms.setdefault(pair.name.split("/")[0], []).append(pair)
    content = []
    for pairs in terms.values():
        *others, deepest = pairs
        content.append(_pair(deepest, views, number, keys))
        if others:
            names = ", ".join(pair.name for pair in others)
            content.append(
                page.collapsed(f"The same at other stages: {names}", "\n".join(_pair(pair, views, number, keys) for pair in others))
            )
    return page.section("Graphs of student and teacher", *content)


def _pair(pair: GraphPair, views: Views, number: int, keys: Any) -> str:
    titles = _titles(views)
    each = getattr(pair.student, "num_graphs", 1) > 1
    titled = titles if each else ()
    graphs = figure_to_svg(
        draw_graph_pair(pair.student, pair.teacher, views.images, number, titled),
        f"{pair.name}: student's and teacher's graphs",
        next(keys),
    )
    spectra = figure_to_svg(
        draw_spectra(pair.student, pair.teacher, number, titles=titled), f"{pair.name}: eigenvalues of student and teacher", next(keys)
    )
    whose = {"teacher": "over the teacher's edges", "student": "over the student's edges", "each": "each over its own edges"}
    colors = (
        " A node has one colour in all panels of its row, by its place in the image."
        if each and pair.student.get("pos") is not None
        else ""
    )
    caption = (
        f"{NODES.get(pair.nodes, 'Nodes: ' + pair.nodes)}; edges: {pair.edges}, {whose.get(pair.topology, pair.topology)}. "
        "Both graphs are laid out by the first two eigenvectors of their Laplacians, the student's turned towards the teacher's; "
        f"the wider and stronger an edge the larger its weight (of a dense graph the strongest edges are "
        f"drawn).{colors} The more alike the drawings, the more the student relates as its teacher does."
    )
    about = (
        "Eigenvalues of the normalised Laplacians, ascending: as many zeros as components; "
        "small ones mean clusters that hang together loosely."
    )
    return page.captioned(graphs, caption, pair.name) + page.captioned(spectra, about)


def _attention(views: Views, number: int, keys: Any) -> str:
    if not views.attention:
        return ""
    figure = draw_attention(views.images, views.attention, number, _titles(views))
    return page.section(
        "Attention",
        page.captioned(
            figure_to_svg(figure, "Attention masks of student and teacher over images", next(keys)),
            "Where the features are strong: the mean absolute value over the channels at every place, bright over the dark image. "
            "Each mask is stretched to its own range, so compare shapes, not strengths.",
        ),
    )


def _confusion(confusion: Tensor, classes: Sequence[str], keys: Any) -> str:
    total, right = int(confusion.sum()), int(confusion.diag().sum())
    names = list(classes) if len(classes) == len(confusion) else [str(number) for number in range(len(confusion))]
    wrong = confusion.clone().fill_diagonal_(0)
    worst = [divmod(int(place), len(confusion)) for place in wrong.flatten().argsort(descending=True, stable=True)[:3]]
    often = "; ".join(
        f"{names[true]} taken for {names[answer]} ({int(wrong[true, answer])})" for true, answer in worst if wrong[true, answer]
    )
    caption = (
        f"{right:,} of {total:,} test images are named right (blue, the diagonal). Orange: what the others are taken for, "
        "stronger the more often. " + (f"Most often: {often}." if often else "There is no mistake.")
    )
    svg = figure_to_svg(draw_confusion(confusion, names), f"Confusion matrix of {len(names)} classes", next(keys))
    return page.section("Confusion", page.captioned(svg, caption))


def _titles(views: Views) -> list[str]:
    if views.targets is None:
        return [f"image {number + 1}" for number in range(len(views.images))]
    answers = views.targets if views.answers is None else views.answers
    titles = []
    for target, answer in zip(views.targets.tolist(), answers.tolist(), strict=True):
        true, read = (views.classes[number] if number < len(views.classes) else str(number) for number in (target, answer))
        titles.append(f"{'class ' if true.isdigit() else ''}{true}{'' if target == answer else f', taken for {read}'}")
    return titles


def format_seconds(seconds: float) -> str:
    """In seconds, minutes or hours.

    Examples:
        >>> format_seconds(12.34), format_seconds(75), format_seconds(7300)
        ('12.3 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
