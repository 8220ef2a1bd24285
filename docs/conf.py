"""Settings of the site, and the pages that are made from the code: the table of methods."""

from __future__ import annotations

import re
from pathlib import Path

from pygments.lexers import PythonLexer
from sphinx.highlighting import lexers

import gkd

ROOT = Path(__file__).resolve().parent.parent
GENERATED = Path(__file__).resolve().parent / "_generated"

project, author, release = "gkd", "the gkd authors", gkd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated", "_torture.md"]
html_theme = "furo"
html_title = f"gkd {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autosummary_generate = False
napoleon_custom_sections = [("Shapes", "notes_style"), ("Gradient", "notes_style")]
# Pages link to files of the repository, which are no pages of the site.
suppress_warnings = ["myst.xref_missing", "ref.myst", "autodoc.mocked_object"]
mathjax_path = "mathjax.js"  # nothing is fetched while the site is built; a host may serve MathJax under this name
nitpicky = False


def method_table() -> str:
    """One row for each file of gin/methods, from its header."""
    rows = ["| file | method | source | published |", "|-|-|-|-|"]
    for path in sorted((ROOT / "gin" / "methods").glob("*.gin")):
        lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
        published = next((line.removeprefix("Published:").strip() for line in lines if line.startswith("Published:")), "")
        cells = [f"`gin/methods/{path.name}`", lines[0].rstrip("."), lines[1].rstrip("."), published]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def losses_table() -> str:
    """One entry for each loss of gkd.losses, with its docstring."""
    import gkd.losses

    names = [name for name in gkd.losses.__all__ if re.match(r"[A-Z]", name)]
    return "".join(f"```{{eval-rst}}\n.. autoclass:: gkd.losses.{name}\n```\n\n" for name in names)


lexers["gin"] = PythonLexer()  # its syntax is all but Python's
GENERATED.mkdir(exist_ok=True)
(GENERATED / "methods.md").write_text(method_table())
(GENERATED / "losses.md").write_text(losses_table())
