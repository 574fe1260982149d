"""What the book needs to be set by LaTeX: `jupyter-book build . --builder pdflatex`.

LaTeX has no use for HTML. Tables, answers behind a click and live views are HTML in the notebooks; here they become
what any builder can set. HTML that is none of these raises a warning: nothing is lost in silence.
"""

import re
from xml.etree import ElementTree

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)


class HtmlForPaper(SphinxPostTransform):
    """Tables of outputs, answers and solutions, and live views, as nodes that LaTeX can set."""

    default_priority = 3  # before myst-nb chooses the plain text of a table
    formats = ("latex",)

    def run(self, **settings) -> None:
        for bundle in list(self.document.findall(nodes.container)):
            if bundle.get("nb_element") == "mime_bundle":
                html = [c for c in bundle.children if c.get("mime_type") == "text/html"]
                if html:
                    bundle.replace_self(table(html[0].astext()))
        for cell in self.document.findall(nodes.container):
            if "tag_exercise-solution" in cell["classes"]:
                cell["classes"].remove("tag_hide-cell")
        for raw in list(self.document.findall(nodes.raw)):
            if raw.get("format") != "html":
                continue
            text = raw.astext().strip()
            if opening := re.fullmatch(r"<details[^>]*><summary>(.*)</summary>", text):
                gather(raw, opening[1])
            elif re.match(r'<div class="live"', text):
                sentence = re.search(r"<p>(.*)</p>", text)[1]
                raw.replace_self(nodes.paragraph("", "", nodes.emphasis("", sentence)))
            elif text != "</details>":
                logger.warning("HTML that is not in the PDF: %s", text, location=raw)


def table(html: str) -> nodes.table:
    """A table as pandas writes it -> the same for every builder."""

    def row(line: ElementTree.Element) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *words(cell))) for cell in line))

    found = ElementTree.fromstring(html)
    head, body = ([row(line) for line in found.find(part)] for part in ("thead", "tbody"))
    width = len(body[0])
    columns = [nodes.colspec(colwidth=1) for _ in range(width)]
    group = nodes.tgroup("", *columns, nodes.thead("", *head), nodes.tbody("", *body), cols=width)
    return nodes.table("", group)


def words(cell: ElementTree.Element) -> list[nodes.Node]:
    """Text of a cell, with what stands bold or in italics in it."""
    kinds = {"strong": nodes.strong, "em": nodes.emphasis}
    parts = [nodes.Text(cell.text or "")]
    for child in cell:
        parts += [kinds[child.tag]("", child.text), nodes.Text(child.tail or "")]
    return parts


def gather(opening: nodes.raw, title: str) -> None:
    """All from <details> to </details> -> one box under its title."""
    parent, start = opening.parent, opening.parent.index(opening)
    end = next(i for i in range(start, len(parent)) if parent[i].astext().strip() == "</details>")
    box = nodes.admonition("", nodes.title("", title), *parent[start + 1 : end])
    parent[start : end + 1] = [box]


class Appendix(SphinxPostTransform):
    """Chapters of a part without numbers are counted by letters, so that their figures have names of their own."""

    default_priority = 750  # after the captions of the contents became parts
    formats = ("latex",)

    def run(self, **settings) -> None:
        parts = self.config.external_site_map.root.subtrees
        plain = {part.caption for part in parts if not part.numbered}
        for section in self.document.findall(nodes.section):
            if section.get("docname") in plain:
                section.insert(1, nodes.raw("", r"\appendix", format="latex"))


def choose_class(app, config) -> None:
    """Sphinx's own: that of sphinx-jupyterbook-latex wants packages of 1.4 GB for letters that the book has not."""
    config.latex_theme = "manual"


def setup(app) -> dict:
    app.add_post_transform(HtmlForPaper)
    app.add_post_transform(Appendix)
    app.connect("config-inited", choose_class, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
