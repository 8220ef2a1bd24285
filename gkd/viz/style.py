"""How all pictures look, and how a picture becomes a part of a page that follows the reader's light or dark theme."""

from __future__ import annotations

import base64
import functools
import html
import importlib.util
import io
import re
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from gkd.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#25292f", "#6b7280", "#d9dce1", "#fdfdfc"
BLUE, ORANGE, GREEN, PINK, PURPLE, GOLD, CYAN, RED = "#3b78d8", "#e0792f", "#2f9e6e", "#cf5c97", "#8664d0", "#b3921a", "#2fa3bd", "#d04a4a"
SERIES = (BLUE, ORANGE, GREEN, PINK, PURPLE, GOLD, CYAN, RED)
STUDENT, TEACHER = ORANGE, BLUE

# What the page gives another value in the dark. The colours of series are read on both grounds.
THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}

SETTINGS: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that draws: it draws in gkd's style, whatever the user's matplotlib is set to.

    Raises:
        UserError: On calling, if matplotlib is not installed.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        if not can_draw():
            raise UserError("Expected matplotlib to draw pictures (got none). Install it: pip install 'gkd[viz]'")
        import matplotlib as mpl

        with mpl.rc_context(SETTINGS):
            return draw(*args, **kwargs)

    return drawn


def can_draw() -> bool:
    """Says whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def grid_of(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Makes a figure with ``count`` panels, row by row.

    Args:
        count: Number of panels.
        columns: Panels in a row, at most.
        width: Inches of a panel.
        height: Inches of a panel.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no window, nothing to close

    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(columns * width, rows * height))
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def bare(axes: Axes) -> Axes:
    """Takes ticks, grid and frame off a panel that shows a picture."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return axes


def whole_ticks(axes: Axes) -> None:
    """Puts the ticks of the x axis at whole numbers: epochs, steps, places."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def veil(color: str) -> Colormap:
    """A colour map from transparent to a colour: it is read on a light ground and on a dark one."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    return LinearSegmentedColormap.from_list("veil", [(*to_rgb(color), 0.0), (*to_rgb(color), 1.0)])


@styled
def figure_to_svg(figure: Figure, alt: str, key: str = "") -> str:
    """Writes a figure as an element of a page: text stays text, neutral colours follow the page's theme.

    Args:
        figure: The figure.
        alt: What is seen, for those who cannot see it.
        key: Makes the names inside the drawing differ from those of the page's other drawings; by default it follows from `alt`.
    """
    import matplotlib as mpl

    key = key or f"-{zlib.crc32(alt.encode()):08x}"
    file = io.StringIO()
    salt: Any = {"svg.hashsalt": f"gkd{key}"}
    with mpl.rc_context(salt):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{found[1]}{key}"' if found[1] in used else "", text)
    text = re.sub(r"(href=\"|url\()#([^\")]+)", rf"\1#\2{key}", text)
    for color, value in THEMED.items():
        text = text.replace(color, value)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)  # the page's
    text = re.sub(r'<path d="[^"]*" style="fill: none"/>|<g/>', "", text)  # nothing to be seen
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag[0]), text)
    text = re.sub(r"data:image/png;base64,([^\"]+)", _shrink, text)
    text = re.sub(r"\n\s*", "\n", text)
    head = f'<svg role="img" aria-label="{html.escape(alt)}" '
    size = re.search(r'<svg[^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None  # what matplotlib writes
    body = text[text.index(">") + 1 :]
    return f'{head}viewBox="0 0 {size[1]} {size[2]}" style="max-width:{float(size[1]) / 72 * 96:.0f}px">{body.strip()}'


def _shrink(found: re.Match[str]) -> str:
    """A picture inside a drawing with a palette of its own instead of 32 bits a pixel, if that is smaller."""
    from PIL import Image  # comes with matplotlib

    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as picture:
        picture.convert("RGBA").quantize(96, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    smaller = base64.b64encode(file.getvalue()).decode()
    return f"data:image/png;base64,{min(found[1], smaller, key=len)}"
