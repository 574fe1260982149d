"""The build's extension for paper: tables and answers, HTML in the notebooks, as nodes that LaTeX can set."""

import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from cpvt.lab.plots import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "book" / "_ext"))
book_pdf = pytest.importorskip("book_pdf", reason="needs sphinx: the book's packages")
nodes = pytest.importorskip("docutils.nodes")


def test_a_table_of_an_output_keeps_its_words_and_their_weight():
    frame = pandas.DataFrame({"a (%)": ["1.0 ± 0.1", "2.0"], "c": [None, "x < y & z"]}, index=["none", "PEG"])
    found = book_pdf.table(Table(frame, best=["a (%)"], baseline="none")._repr_html_())
    rows = [[entry.astext() for entry in row] for row in found.findall(nodes.row)]
    assert rows == [["", "a (%)", "c"], ["none", "1.0 ± 0.1", ""], ["PEG", "2.0", "x < y & z"]]
    assert [n.astext() for n in found.findall(nodes.strong)] == ["2.0"]
    assert [n.astext() for n in found.findall(nodes.emphasis)] == ["none"]


def test_an_answer_behind_a_click_becomes_a_box():
    def html(text):
        return nodes.raw("", text, format="html")

    def paragraph(text):
        return nodes.paragraph("", text)

    opening = html('<details class="answer"><summary>Answer</summary>\n')
    inside = [paragraph("Yes."), paragraph("And why.")]
    section = nodes.section(
        "", paragraph("Before."), opening, *inside, html("</details>"), paragraph("After.")
    )
    book_pdf.gather(opening, "Answer")
    before, space, box, after = section
    assert (before.astext(), after.astext(), space["format"]) == ("Before.", "After.", "latex")
    assert [child.astext() for child in box] == ["Answer", "Yes.", "And why."]


def test_an_answer_that_is_not_closed_is_not_lost():
    opening = nodes.raw("", "<details>", format="html")
    nodes.section("", opening, nodes.paragraph("", "Yes."))
    with pytest.raises(StopIteration):
        book_pdf.gather(opening, "Answer")


def test_the_whole_book_is_in_the_latex(tmp_path):
    """Without LaTeX itself: its text has each answer, table, figure and live view of the sources, no HTML."""
    command = Path(sys.executable).with_name("jupyter-book")
    if not command.exists():
        pytest.skip("jupyter-book is not installed, so there is no LaTeX to look at")
    arguments = [command, "build", ROOT, "--builder", "latex", "--path-output", tmp_path]
    build = subprocess.run(arguments, capture_output=True, text=True)
    log = build.stdout + build.stderr
    assert build.returncode == 0 and "build succeeded." in log, log[-3000:]
    book = (tmp_path / "_build/latex/position_in_vision_transformers.tex").read_text(encoding="utf-8")
    files = [path for path in ROOT.glob("book/*") if path.suffix in (".ipynb", ".md")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)

    for word in ("answer", "solution"):
        hidden = len(re.findall(rf'<details class=\\?"{word}\\?"', source))
        assert book.count(rf"{{note}}{{{word.capitalize()}}}") == hidden > 20
    tables = len(re.findall(r'<table [^>]*class=\\"dataframe', source))
    tables += len(re.findall(r'^ *"?\| ?:?--', source, flags=re.M))
    assert len(re.findall(r"\\begin{(?:tabular|tabulary|longtable)}", book)) == tables > 20
    assert book.count("a live model stands here") == source.count('class=\\"live\\"') > 0
    assert not re.search(r"Table of \d+ rows|</?(?:details|summary|table|div)\b", book)
    figures = re.findall(r"\\sphinxincludegraphics(?:\[[^]]*\])?{(.*)}", book)
    assert len(figures) == source.count('"image/png"') > 50
    assert not [name for name in figures if "dark" in name]  # the twins for dark pages
    contents = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    assert re.findall(r"\\part{(.*)}", book) == re.findall(r"caption: (.*)", contents)
    chapters = len(re.findall(r"^\\chapter{", book, flags=re.M)) + book.count(
        r"\begin{sphinxthebibliography}"
    )
    assert chapters == contents.count("- file:")
