"""How the Markdown of this folder, and README.md, CONTRIBUTING.md and CHANGELOG.md, become a site: `make docs`.

The pages know nothing of the site: what it needs besides, its navigation, is added here, in the order in which
a folder's README.md links its pages. Everything is in the site itself: it is read offline, from a folder.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

import ziamath
from docutils import nodes

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs")

project = "Curvlab"
copyright = "the Curvlab developers"
(release,) = re.findall(r'^__version__ = "(.*)"$', (ROOT / "curvlab" / "__init__.py").read_text(), re.MULTILINE)

extensions = ["myst_parser"]
root_doc = "docs/README"
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in PAGES] + ["docs/_build"]
source_suffix = {".md": "markdown"}
nitpicky = True

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = {"math"}  # as GitHub has it
myst_heading_anchors = 6  # what GitHub makes of headings
myst_update_mathjax = False

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_math_renderer = "svg"
ziamath.config.svg2 = False  # outlines without names, which formulas of one page would share
highlight_language = "none"

#: Pixels that a formula is drawn in, of no consequence.
SIZE = 20

#: Caption, folder and pages from elsewhere of each part of the navigation.
PARTS = (("", "", ["/README"]), ("Guides", "docs", []), ("Optimizers", "docs/optimizers", []),
         ("Results", "docs/results", []), ("The project", "", ["/CONTRIBUTING", "/CHANGELOG"]))  # fmt: skip


def _navigation() -> str:
    """Tables of contents of all folders, as directives that nobody sees but the site."""
    blocks = []
    for caption, folder, others in PARTS:
        entries = list(others)
        if folder:
            text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
            titles = {name: title for title, name in reversed(re.findall(r"\[([^\]]+)\]\(([\w.-]+)\.md[)#]", text))}
            there = sorted(path.stem for path in (ROOT / folder).glob("*.md"))
            for name in dict.fromkeys(["README", *reversed(titles), *there]):
                place = f"/{folder}/{name}"
                if place != f"/{root_doc}":
                    entries.append(f"{' '.join(titles[name].split())} <{place}>" if name in titles else place)
        blocks.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"]))
    return "\n\n" + "\n\n".join(block.replace(":caption: \n", "") for block in blocks) + "\n"


def _add_navigation(app: Any, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += _navigation()


def _drawn(latex: str, inline: bool) -> str:
    """A formula as an SVG in the colour and size of the text around it, its baseline on the text's."""
    drawing = ziamath.Latex(latex.replace("\n", " "), size=SIZE, color="currentColor", inline=inline).svg()
    tag, _, outlines = drawing.partition(">")
    (box,) = re.findall(r'viewBox="([^"]+)"', tag)
    _, top, width, height = (float(number) / SIZE for number in box.split())
    style = f"width: {width:.3f}em; height: {height:.3f}em; vertical-align: {-height - top:.3f}em"
    return f'<svg role="img" aria-label="{escape(latex)}" style="{style}" viewBox="{box}">{outlines}'


def _inline(translator: Any, node: nodes.Element) -> None:
    translator.body.append(_drawn(node.astext(), inline=True))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.Element) -> None:
    parts = [_drawn(part.strip(), inline=False) for part in node.astext().split(r"\qquad")]  # wrapped if narrow
    translator.body.append(f'<div class="math">{"".join(parts)}</div>')
    raise nodes.SkipNode


def _add_entrance(app: Any, error: Exception | None) -> None:
    """index.html, where everybody looks first."""
    if error is None:
        target = f'<meta charset="utf-8"><meta http-equiv="refresh" content="0; url={root_doc}.html">'
        page = f'<!doctype html><title>{project}</title>{target}<a href="{root_doc}.html">{project}</a>\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("svg", inline_renderers=(_inline, None), block_renderers=(_block, None))
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _add_entrance)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
