"""The build's extension for paper: tables and answers, HTML in the notebooks, as nodes that LaTeX can set."""

import sys
from pathlib import Path

import pandas
import pytest

from cpvt.lab.plots import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "book" / "_ext"))
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
