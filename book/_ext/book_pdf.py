"""The book by LaTeX, `jupyter-book build . --builder pdflatex`: what is HTML in its source, said in LaTeX.

Folded code stays out of it; answers and solutions to predictions and exercises stand open.
"""

import re
from pathlib import Path

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

FONTS = Path(__file__).parents[2] / "cpvt" / "lab" / "fonts"
# Sphinx's own class in place of jupyterBook.cls, which needs half a gigabyte of fonts; so its two frames stand
# here. Cells of tables are not stretched to both sides. Line blocks are the headings of the front page: they stay
# with what follows. The list of sources belongs to the chapter of that name, and brings no second heading.
PREAMBLE = r"""
\setsansfont{SourceSans3-Regular.ttf}[BoldFont=SourceSans3-SemiBold.ttf,
  ItalicFont=SourceSans3-Regular.ttf, ItalicFeatures={FakeSlant=0.2},
  BoldItalicFont=SourceSans3-SemiBold.ttf, BoldItalicFeatures={FakeSlant=0.2}]
\setmonofont{DejaVuSansMono}[Extension=.ttf, BoldFont=*-Bold, ItalicFont=*-Oblique, Scale=0.8]
\titleformat{\part}[display]{\centering\Huge\sffamily\bfseries}{}{0pt}{}
\titleformat{\chapter}{\Huge\sffamily\bfseries}{\thechapter.}{0.4em}{}
\titlespacing*{\chapter}{0pt}{0pt}{1.5em}
\newenvironment{sphinxVerbatimInput}{}{}
\newenvironment{sphinxVerbatimOutput}{}{}
\newenvironment{sphinxclassanswer}{%
  \def\FrameCommand{{\color[gray]{0.6}\vrule width 1.5pt}\hspace{8pt}}%
  \MakeFramed{\advance\hsize-\width\FrameRestore}}{\endMakeFramed}
\newcolumntype{T}{L}
\AtBeginEnvironment{DUlineblock}{\needspace{6\baselineskip}}
\AtBeginEnvironment{sphinxthebibliography}{%
  \renewcommand\chapter[2]{}\renewcommand\addcontentsline[3]{}\let\clearpage\relax\let\cleardoublepage\relax}
"""
SETUP = "VerbatimColor={rgb}{1,1,1}, VerbatimBorderColor={rgb}{0.8,0.8,0.8}, verbatimforcewraps=true"


class SayHtmlInLatex(SphinxPostTransform):
    default_priority = 3  # before MyST-NB picks one of the forms of an output, which for LaTeX is never HTML
    formats = ("latex",)

    def run(self, **settings) -> None:
        self.name_parts()
        for raw in [node for node in self.document.findall(nodes.raw) if node.get("format") == "html"]:
            html = BeautifulSoup(raw.astext(), "html.parser")
            if found := html.find("table"):
                bundle(raw).replace_self(table(found))
            elif found := html.find("details"):
                self.open(raw, found.summary.get_text())
            elif found := html.find("div", class_="live"):
                raw.replace_self(nodes.paragraph("", "", nodes.emphasis(text=said(found))))

    def name_parts(self) -> None:
        """The front page has a title, and pages without a number are appendices."""
        front = self.document.next_node(nodes.section)
        front.insert(1, latex(rf"\chapter*{{{front[0].astext()}}}\markboth{{}}{{}}"))
        files = self.document.findall(addnodes.start_of_file)
        beside = next(file for file in files if file["docname"] not in self.env.toc_secnumbers)
        beside.parent.insert(beside.parent.index(beside), latex(r"\appendix"))

    def open(self, raw: nodes.raw, word: str) -> None:
        """What lies between <details> and </details> becomes a box that begins with its summary."""
        inside, after = nodes.container(classes=["answer"]), raw.next_node(descend=False, siblings=True)
        while "</details>" not in after.astext() or not isinstance(after, nodes.raw):
            following = after.next_node(descend=False, siblings=True)
            after.parent.remove(after)
            inside += after
            after = following
        inside[0].insert(0, [nodes.strong(text=f"{word}."), nodes.Text(" ")])
        after.parent.remove(after)
        raw.replace_self(inside)


def bundle(node: nodes.Node) -> nodes.Element:
    """All forms of the output that the node is one of."""
    while node.get("nb_element") != "mime_bundle":
        node = node.parent
    return node


def latex(text: str) -> nodes.raw:
    return nodes.raw("", text, format="latex")


def said(tag) -> str:
    return re.sub(r"\s+", " ", tag.get_text()).strip()


def table(tag) -> nodes.table:
    """A table of pandas or of `cpvt.lab.plots.Table`, with what is bold or in italics in it."""
    rows = [row.find_all(["th", "td"]) for row in tag.find_all("tr")]
    group = nodes.tgroup(cols=len(rows[0]))
    group += [nodes.colspec(colwidth=1) for _ in rows[0]]
    for kind, part in ((nodes.thead, "thead"), (nodes.tbody, "tbody")):
        found = kind()
        for row in tag.find(part).find_all("tr"):
            found += nodes.row("", *(entry(cell) for cell in row.find_all(["th", "td"])))
        group += found
    return nodes.table("", group, classes=["colwidths-auto"])


def entry(cell) -> nodes.entry:
    if not said(cell):
        return nodes.entry()  # an empty paragraph would make a line
    kind = nodes.strong if cell.strong else nodes.emphasis if cell.em else nodes.inline
    return nodes.entry("", nodes.paragraph("", "", kind(text=said(cell))))


def set_latex(app, config) -> None:
    """After sphinx-jupyterbook-latex, which sets its own class."""
    config.latex_theme = "manual"
    config.latex_additional_files += [str(font) for font in FONTS.glob("*.ttf")]
    config.today = config.copyright
    config.latex_elements |= {
        "papersize": "a4paper",
        "pointsize": "11pt",
        "extraclassoptions": "openany,oneside",
        "figure_align": "H",  # where the text speaks of it
        "fncychap": "",
        "sphinxsetup": SETUP,
        "preamble": PREAMBLE + config.latex_elements.get("preamble", ""),
    }


def setup(app) -> dict:
    app.add_post_transform(SayHtmlInLatex)
    app.connect("config-inited", set_latex, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
