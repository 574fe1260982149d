"""What the book needs to be set by LaTeX: `jupyter-book build . --builder pdflatex`.

LaTeX has no use for HTML. Tables, answers behind a click and live views are HTML in the notebooks; here they
become what any builder can set. HTML that is none of these raises a warning: nothing is lost in silence.
"""

import re
from xml.etree import ElementTree

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.texescape import escape

logger = logging.getLogger(__name__)

LEFT_OUT = "On paper, cells that the pages fold away are left out, but not solutions. The notebooks have all."


def latex(text: str) -> nodes.raw:
    return nodes.raw("", text, format="latex")


class HtmlForPaper(SphinxPostTransform):
    """Tables of outputs, answers and solutions, and live views, as nodes that LaTeX can set."""

    default_priority = 3  # before myst-nb chooses the plain text of a table
    formats = ("latex",)

    def run(self, **settings) -> None:
        for bundle in list(self.document.findall(nodes.container)):
            if bundle.get("nb_element") == "mime_bundle":
                html = [part for part in bundle if part.get("mime_type") == "text/html"]
                if html:
                    bundle.replace_self(table(html[0].astext()))
        for cell in self.document.findall(nodes.container):
            if "tag_exercise-solution" in cell["classes"]:
                cell["classes"].remove("tag_hide-cell")
        for raw in [raw for raw in self.document.findall(nodes.raw) if raw["format"] == "html"]:
            text = raw.astext().strip()
            if opening := re.fullmatch(r"<details[^>]*><summary>(.*)</summary>", text):
                gather(raw, opening[1])
            elif text.startswith('<div class="live"'):
                sentence = re.search(r"<p>(.*)</p>", text)[1]
                raw.replace_self(nodes.paragraph("", "", nodes.emphasis("", sentence)))
            elif text != "</details>":
                logger.warning("HTML that is not in the PDF: %s", text, location=raw)
        for found in list(self.document.findall(nodes.table)):
            columns = next(found.findall(nodes.tgroup))["cols"]
            spec = addnodes.tabular_col_spec(spec="L" * columns)  # lines of a narrow cell start at its left
            found.parent.insert(found.parent.index(found), spec)


def table(html: str) -> nodes.table:
    """A table as pandas writes it -> the same for every builder."""

    def entry(cell: ElementTree.Element) -> nodes.entry:
        found = words(cell)
        return nodes.entry("", nodes.paragraph("", "", *found)) if found else nodes.entry()

    found = ElementTree.fromstring(html)
    head, body = ([nodes.row("", *map(entry, r)) for r in found.find(part)] for part in ("thead", "tbody"))
    columns = [nodes.colspec(colwidth=1) for _ in body[0]]
    group = nodes.tgroup("", *columns, nodes.thead("", *head), nodes.tbody("", *body), cols=len(columns))
    return nodes.table("", group)


def words(cell: ElementTree.Element) -> list[nodes.Node]:
    """Text of a cell, with what stands bold or in italics in it."""
    kinds = {"strong": nodes.strong, "em": nodes.emphasis}
    parts = [nodes.Text(cell.text or "")]
    for child in cell:
        parts += [kinds[child.tag]("", child.text), nodes.Text(child.tail or "")]
    return [part for part in parts if part.astext()]


def gather(opening: nodes.raw, title: str) -> None:
    """All from <details> to </details> -> one box under its title, which does not end a page."""
    parent, start = opening.parent, opening.parent.index(opening)
    end = next(i for i in range(start, len(parent)) if parent[i].astext().strip() == "</details>")
    box = nodes.admonition("", nodes.title("", title), *parent[start + 1 : end])
    parent[start : end + 1] = [latex(r"\needspace{8\baselineskip}"), box]


class OneBook(SphinxPostTransform):
    """The book as one document: heads of the front page, appendices, one bibliography."""

    default_priority = 750  # after sphinx-jupyterbook-latex has put the pages together
    formats = ("latex",)

    def run(self, **settings) -> None:
        front = next(self.document.findall(nodes.section))
        front.insert(1, latex(r"\markboth{}{}"))  # or its pages have "Contents" at their foot
        for head in list(front.findall(lambda node: node.tagname == "RootHeader")):
            words_of_head = escape(head.astext(), "xelatex")
            head.replace_self(latex(rf"\section*{{{words_of_head}}}"))
        front.append(nodes.paragraph("", "", nodes.emphasis("", LEFT_OUT)))
        # A part without numbers counts its chapters by letters, so that figures have names of their own.
        plain = {part.caption for part in self.config.external_site_map.root.subtrees if not part.numbered}
        for section in list(self.document.findall(nodes.section)):
            if section.get("docname") in plain:
                section.insert(1, latex(r"\appendix\renewcommand{\thefigure}{\thechapter.\arabic{figure}}"))
        # LaTeX sets a bibliography as a chapter, with its head: the page around it would be a second one.
        for page in list(self.document.findall(addnodes.start_of_file)):
            if page["docname"].endswith("/bibliography"):
                page.parent.remove(page)


def choose_class(app, config) -> None:
    """Sphinx's own: that of sphinx-jupyterbook-latex wants 1.4 GB of fonts for letters never used."""
    config.latex_theme = "manual"


def setup(app) -> dict:
    app.add_post_transform(HtmlForPaper)
    app.add_post_transform(OneBook)
    app.connect("config-inited", choose_class, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
