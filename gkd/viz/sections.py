"""Sections of a report that pictures of one batch make: graphs, attention, confusion. Tasks name the ones that they want."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gkd.viz import page
from gkd.viz.collect import GraphPair, Views
from gkd.viz.graphs import draw_graph_pair, draw_spectra
from gkd.viz.images import draw_attention, draw_confusion
from gkd.viz.style import figure_to_svg

NUMBER = 3  # of images that graphs and masks are drawn for
NODES = {
    "PatchNodes": "A node is a place in the feature map of one image",
    "ChannelNodes": "A node is a channel of the feature map of one image",
    "InstanceNodes": "A node is one image of the batch",
    "RegionNodes": "A node is a region of one image",
}


def graphs(views: Views, number: int = NUMBER) -> str:
    """Graphs and spectra of student and teacher, of every graph loss at its deepest stage; nothing where there is none."""
    if not views.pairs:
        return ""
    terms: dict[str, list[GraphPair]] = {}
    for pair in views.pairs:
        terms.setdefault(pair.name.split("/")[0], []).append(pair)
    content = []
    for pairs in terms.values():
        *others, deepest = pairs
        content.append(_pair(deepest, views, number))
        if others:
            names = ", ".join(pair.name for pair in others)
            content.append(page.collapsed(f"The same at other stages: {names}", "\n".join(_pair(pair, views, number) for pair in others)))
    return page.section("Graphs of student and teacher", *content)


def _pair(pair: GraphPair, views: Views, number: int) -> str:
    titles = _titles(views)
    each = getattr(pair.student, "num_graphs", 1) > 1
    titled = titles if each else ()
    graphs = figure_to_svg(
        draw_graph_pair(pair.student, pair.teacher, views.images, number, titled),
        f"{pair.name}: student's and teacher's graphs",
    )
    spectra = figure_to_svg(
        draw_spectra(pair.student, pair.teacher, number, titles=titled), f"{pair.name}: eigenvalues of student and teacher"
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


def attention(views: Views, number: int = NUMBER) -> str:
    """Where the features of student and teacher are strong."""
    if not views.attention:
        return ""
    figure = draw_attention(views.images, views.attention, number, _titles(views))
    return page.section(
        "Attention",
        page.captioned(
            figure_to_svg(figure, "Attention masks of student and teacher over images"),
            "Where the features are strong: the mean absolute value over the channels at every place, bright over the dark image. "
            "Each mask is stretched to its own range, so compare shapes, not strengths.",
        ),
    )


def confusion(counts: Tensor, classes: Sequence[str] = ()) -> str:
    """What is taken for what, from counts of (true class, answer)."""
    total, right = int(counts.sum()), int(counts.diag().sum())
    names = list(classes) if len(classes) == len(counts) else [str(number) for number in range(len(counts))]
    wrong = counts.clone().fill_diagonal_(0)
    worst = [divmod(int(place), len(counts)) for place in wrong.flatten().argsort(descending=True, stable=True)[:3]]
    often = "; ".join(
        f"{names[true]} taken for {names[answer]} ({int(wrong[true, answer])})" for true, answer in worst if wrong[true, answer]
    )
    caption = (
        f"{right:,} of {total:,} test images are named right (blue, the diagonal). Orange: what the others are taken for, "
        "stronger the more often. " + (f"Most often: {often}." if often else "There is no mistake.")
    )
    svg = figure_to_svg(draw_confusion(counts, names), f"Confusion matrix of {len(names)} classes")
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
