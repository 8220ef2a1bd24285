"""One self-contained HTML page: text, tables and pictures; no script, and nothing is fetched."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root{color-scheme:light dark;--ink:#25292f;--muted:#6b7280;--line:#d9dce1;--paper:#fdfdfc;--card:#f4f4f1;--accent:#3b78d8}
@media (prefers-color-scheme:dark){:root{--ink:#e6e7ea;--muted:#9aa2ae;--line:#3a3f47;--paper:#16181c;--card:#1f2227;--accent:#7aa7ee}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:64rem;margin:0 auto;padding:3rem 1.5rem 5rem}
h1,h2,h3{line-height:1.2;letter-spacing:-.012em;font-weight:650;text-wrap:balance}
h1{font-size:2.1rem;margin:0}
h2{font-size:1.3rem;margin:3.2rem 0 .3rem;padding-top:1.1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.8rem 0 .2rem}
p{max-width:44rem;margin:.5rem 0}
.lead{color:var(--muted);font-size:1.06rem;margin:.5rem 0 1.8rem}
.note,figcaption{color:var(--muted);font-size:.875rem}
figcaption{max-width:44rem;margin-top:.5rem}
figure{margin:1.1rem 0 2rem;break-inside:avoid}
svg,img{display:block;width:100%;height:auto}
svg text{font-family:inherit}
.wide{overflow-x:auto}
dl.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.2rem,1fr));gap:.7rem;margin:0}
dl.figures div{background:var(--card);border-radius:.6rem;padding:.75rem .95rem .7rem;break-inside:avoid}
dt{color:var(--muted);font-size:.8rem}
dl.figures dd{margin:0;font-size:1.5rem;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
dl.figures dd small{display:block;font-size:.8rem;font-weight:400;letter-spacing:0;color:var(--muted)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1rem 0 .4rem;font-size:.92rem}
th,td{padding:.38rem .8rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:400;color:var(--muted)}
thead th{font-size:.8rem;vertical-align:bottom}
tbody th{white-space:nowrap}
table.numbers tbody th{color:var(--ink);font-weight:600}
table.numbers{font-size:.86rem}
table.numbers :is(th,td){padding:.38rem .55rem}
table.numbers td{text-align:right;white-space:nowrap}
table.numbers thead th:not(:first-child){text-align:right}
td.clear{font-weight:650;color:var(--accent)}
details{margin:1rem 0}
summary{cursor:pointer;color:var(--accent)}
summary:focus-visible{outline:2px solid var(--accent);outline-offset:3px;border-radius:3px}
pre{overflow-x:auto;background:var(--card);border-radius:.6rem;padding:1rem 1.2rem;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media print{main{max-width:none;padding:0}body{font-size:11pt}pre{white-space:pre-wrap;overflow:visible}.wide{overflow:visible}}
"""

# A browser refuses whatever is not in the file, should anything ever slip in.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """The whole document.

    Args:
        title: Heading, and name of the window.
        lead: A sentence under it.
        sections: HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p></header>\n'
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *content: str) -> str:
    """A section with its heading; nothing where there is no content."""
    inner = "\n".join(part for part in content if part)
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{inner}\n</section>" if inner else ""


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def captioned(picture: str, caption: str, title: str = "") -> str:
    """A picture (an ``<svg>`` or ``<img>``), what is seen on it below and a heading above."""
    head = f"<h3>{html.escape(title)}</h3>\n" if title else ""
    return f"{head}<figure>\n{picture}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>"


def collapsed(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details>\n<summary>{html.escape(summary)}</summary>\n{content}\n</details>"


def code(text: str) -> str:
    """Text as it stands."""
    return f'<pre tabindex="0">{html.escape(text)}</pre>'


def figures(facts: Sequence[tuple[str, str, str]]) -> str:
    """The numbers that count, large: what, how much, and a remark."""
    cells = ""
    for name, value, remark in facts:
        small = f"<small>{html.escape(remark)}</small>" if remark else ""
        cells += f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}{small}</dd></div>\n"
    return f'<dl class="figures">\n{cells}</dl>' if cells else ""


def facts_table(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values below each other."""
    rows = "".join(f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>\n' for name, value in facts)
    return f"<table><tbody>\n{rows}</tbody></table>" if rows else ""
