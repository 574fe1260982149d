"""The book as LaTeX, which `jupyter-book build . --builder pdflatex` sets: nothing of the pages is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> str:
    command = Path(sys.executable).with_name("jupyter-book")
    if not command.exists():
        pytest.skip("jupyter-book is not installed, so there is no LaTeX to look at")
    out = tmp_path_factory.mktemp("latex")
    arguments = [command, "build", ROOT, "--builder", "latex", "--path-output", out]
    build = subprocess.run(arguments, capture_output=True, text=True)
    log = build.stdout + build.stderr
    assert build.returncode == 0 and "build succeeded." in log, log[-3000:]
    return (out / "_build" / "latex" / "position_in_vision_transformers.tex").read_text(encoding="utf-8")


def test_what_is_html_in_the_pages_is_in_latex(book):
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("book/*.ipynb")))
    hidden = 0
    for word in ("answer", "solution"):
        found = len(re.findall(rf'<details class=\\"{word}\\"', source))
        assert book.count(rf"\sphinxstylestrong{{{word.capitalize()}.}}") == found > 20
        hidden += found
    assert book.count(r"\begin{sphinxuseclass}{answer}") == hidden
    tables = len(re.findall(r'<table [^>]*class=\\"dataframe', source))
    written = len(re.findall(r"^\| ?:?--", "\n".join(p.read_text() for p in ROOT.glob("book/*.md")), re.M))
    written += len(re.findall(r'"\| ?:?--', source))
    assert book.count(r"\begin{tabulary}") + book.count(r"\begin{longtable}") == tables + written > 20
    assert book.count("a live model stands here") == source.count('class=\\"live\\"') > 0
    assert not re.search(r"Table of \d+ rows|</?(details|summary|table|div)\b", book)


def test_figures_are_the_light_ones_and_parts_are_named(book):
    figures = re.findall(r"\\sphinxincludegraphics(?:\[[^]]*\])?\{(.*)\}", book)
    drawn = [p.read_text(encoding="utf-8").count('"image/png"') for p in ROOT.glob("book/*.ipynb")]
    assert len(figures) == sum(drawn) > 50 and not [name for name in figures if "dark" in name]
    contents = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    assert re.findall(r"\\part\{(.*)\}", book) == re.findall(r"caption: (.*)", contents)
    before, after = (len(re.findall(r"\\chapter\{", half)) for half in book.split(r"\appendix"))
    assert (before, after) == tuple(half.count("- file:") for half in contents.split("Beside the book"))
    assert r"\title{Position in Vision Transformers}" in book and "projectnamenotset" not in book
