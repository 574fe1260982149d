"""The chapters as files: their form, run in order, exercises that fail unsolved; corrections computed again."""

import base64
import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from nbval.plugin import comment_markers, metadata_tags

from cpvt.config import Peg
from cpvt.lab.results import published
from cpvt.model.encodings import PEG

BOOK = Path(__file__).parent.parent / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
PAGES = sorted(BOOK.glob("*.md"))
CONTENTS = (BOOK.parent / "_toc.yml").read_text(encoding="utf-8").partition("parts:")[2]
chapters = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@cache
def cells(path: Path) -> list[dict]:
    """Cells of a notebook, with the source as one string."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found]


def code(path: Path) -> list[dict]:
    return [cell for cell in cells(path) if cell["cell_type"] == "code" and cell["source"].strip()]


def tags(cell: dict) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def prose(path: Path) -> str:
    """Everything of a page that Sphinx reads as text: markdown and captions."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    captions = [c["metadata"].get("mystnb", {}).get("figure", {}).get("caption", "") for c in cells(path)]
    return "\n\n".join([c["source"] for c in cells(path) if c["cell_type"] == "markdown"] + captions)


@chapters
def test_cells_were_run_in_order_and_hide_nothing_from_comparison(path):
    assert [cell["execution_count"] for cell in code(path)] == list(range(1, len(code(path)) + 1))
    for cell in code(path):
        comments = {line.strip().lstrip("#").strip() for line in cell["source"].splitlines() if "#" in line}
        assert not tags(cell) & set(metadata_tags) and not comments & set(comment_markers), cell["source"]
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", cell["source"]
            shown = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if "text" in k)]
            told = re.search(r"\b0x[0-9a-f]{6,}|site-packages|\bcuda:\d", str(shown))
            assert not told, f"another machine shows another {told[0]}: {cell['source']}"
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert "widgets" not in metadata, "stored widget state makes the page load scripts from elsewhere"


@chapters
def test_title_and_figures_are_there(path):
    assert cells(path)[0]["source"].startswith("# ")
    assert len(re.findall(r"^# ", prose(path), flags=re.M)) == 1
    for cell in code(path):
        images = [out for out in cell["outputs"] if any(k.startswith("image/") for k in out.get("data", {}))]
        if images:
            figure = cell["metadata"].get("mystnb", {}).get("figure", {})
            assert len(images) == 1, f"one figure a cell: {cell['source']}"
            assert len(figure.get("caption", "")) >= 20, f"no caption: {cell['source']}"
            assert figure.get("name", "").startswith("fig-"), f"no name: {cell['source']}"


# The form of a chapter: what a reader meets, and how much of it.

CHAPTERS = [BOOK / f"{name}.ipynb" for name in re.findall(r"file: book/(\w+)", CONTENTS)[:14]]
FOLDED = {"hide-cell", "hide-input", "remove-cell", "remove-input"}


def words(path: Path) -> int:
    """Of the text, without code, tags and captions."""
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else ""
    text += "\n\n".join(c["source"] for c in cells(path) if c["cell_type"] == "markdown") if not text else ""
    text = re.sub(r"```.*?```|<[^>]*>", "", text, flags=re.S)
    return len(re.findall(r"\b[\w'’-]+\b", text))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_one_story_that_fits_an_evening(path):
    first, *others = code(path)
    assert "README" in first["source"] and "hide-cell" in tags(first), "first, folded: what to install"
    assert re.match(r"# .+\n\n\*.*\bminutes\b.*\*\n", cells(path)[0]["source"]), "how long, what it needs"
    assert 1_200 <= words(path) <= 2_500
    shown = [cell["source"] for cell in others if not tags(cell) & FOLDED]
    assert len(shown) <= 12
    for source in shown:
        assert len(source.splitlines()) <= 15, source
        assert not re.search(r"\._[a-z]|register_\w*hook", source), f"the package's inside: {source}"
    assert not [source for source in shown if source.startswith(("import ", "from ")) and "\n" not in source]
    figures = [c for c in code(path) if c["metadata"].get("mystnb", {}).get("figure")]
    assert 1 <= len(figures) <= 6
    assert all(c["metadata"]["mystnb"]["figure"]["caption"].startswith("**") for c in figures)
    asked = prose(path).count("**Predict.**")
    assert asked == prose(path).count('<details class="answer"') == 3
    assert len(re.findall(r"^> \*\*How sure", prose(path), flags=re.M)) == 1


def test_the_book_can_be_read_in_a_few_evenings():
    assert sum(words(path) for path in [*NOTEBOOKS, *PAGES]) <= 32_000


@chapters
def test_a_notebook_reads_without_extensions(path):
    """Standard Markdown: no roles, no directives, no labels that plain JupyterLab would show raw."""
    raw = re.findall(r"\{[a-z:]+\}`|^:::|^\(\S+\)=$|^`{3,}\{", prose(path), flags=re.M)
    assert not raw


# An exercise NAME is a heading "### Exercise: ...", then a stub, a check and a solution cell tagged exercise:NAME;
# between check and solution its worded solution, folded. That the stub fails and the solution passes is what
# these print, as nbval compares; the page hides what a check says of a stub.

TAGS = {path: dict.fromkeys(t for cell in code(path) for t in tags(cell) if ":" in t) for path in NOTEBOOKS}
EXERCISES = [
    pytest.param(path, tag.removeprefix("exercise:"), id=f"{path.stem}-{tag}")
    for path in TAGS
    for tag in TAGS[path]
]


@pytest.mark.parametrize("path, name", EXERCISES)
def test_the_stub_fails_with_a_hint_and_the_solution_passes(path, name):
    mine = [cell for cell in code(path) if f"exercise:{name}" in tags(cell)]
    kinds = [{t for t in tags(cell) if t.startswith("exercise-")} for cell in mine]
    assert kinds == [{"exercise-stub"}, {"exercise-check"}, {"exercise-solution"}]
    stub, checked, solution = (cell["source"] for cell in mine)
    for source in (stub, solution):
        assert re.search(rf"^(def|class) {name}\b|^{name} = ", source, flags=re.M), source
    assert "raise" not in stub, "what answers nothing, and does not raise, must fail by the check"
    call = f'check("{name}", check_{name}, {name})'
    assert checked.endswith(call) and solution.endswith(call)
    said = [cell["outputs"] and "".join(cell["outputs"][0]["text"]) for cell in mine]
    assert said[0] == [] and said[2] == f"{name}: right\n"
    assert said[1].startswith(f"{name}: not yet. ") and "Hint: " in said[1] and "raised" not in said[1]
    assert {"hide-input", "remove-output"} <= tags(mine[1]) and "hide-cell" in tags(mine[2])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_exercises_have_question_and_worded_solution(path):
    asked = len(re.findall(r"^### Exercise: ", prose(path), flags=re.M))
    answered = prose(path).count('<details class="solution"')
    assert asked == answered == len([e for e in EXERCISES if e.values[0] == path]) >= 1


def test_the_picture_of_the_readme_and_of_previews_is_the_front_page_s():
    outputs = [out["data"] for cell in code(BOOK / "index.ipynb") for out in cell["outputs"]]
    [drawn] = [base64.b64decode("".join(data["image/png"])) for data in outputs if "image/png" in data]
    assert (BOOK / "_static" / "idea.png").read_bytes() == drawn, "copy the front page's picture there"


# The page of corrections: its numbers are computed again from the published figures.


def value(table: str, model: str, encoding: str, setting: str = "") -> float:
    rows = published(table)
    rows = rows[(rows["model"] == model) & (rows["encoding"] == encoding)]
    [found] = rows[rows["setting"].str.contains(setting, regex=False)]["value"]
    return found


def corrected(section: int, *numbers) -> str:
    """The text of a section, in which these numbers and phrases stand."""
    page = (BOOK / "corrections.md").read_text(encoding="utf-8").replace("{,}", ",")
    text = page.split(f"\n## {section}. ")[1].split("\n## ")[0]
    for number in numbers:
        shown = f"{number:.1f}" if isinstance(number, float) else number
        shown = f"{shown:,}" if isinstance(number, int) else shown
        assert re.search(rf"(?<![\d.,]){re.escape(shown)}(?!\d)", text), f"{shown} in {text}"
    return text


def test_corrections_are_computed_from_the_published_figures():
    def rows(*key):
        return [value("resolution", *key, size) for size in ("224", "384", "448", "512")]

    table, one, five = rows("DeiT-tiny", "learned"), rows("CPVT-Ti", "1 PEG"), rows("CPVT-Ti", "5 PEGs")
    margin = [a - b for a, b in zip(five, table, strict=True)]
    assert five.index(max(five)) == 1 and five[3] < five[0]  # peaks at 384, ends below where it began
    assert margin == sorted(margin)
    corrected(2, *five[:2], *one[:2], five[1] - five[0], one[1] - one[0])
    text = corrected(3, round(448 / 0.875))
    for row in (table, one, five, margin):
        assert "| " + " | ".join(f"{number:.1f}" for number in row) + " |" in text

    def weights(**options):
        return sum(p.numel() for p in PEG(192, config=Peg(bias=False, **options)).parameters())

    separable, depthwise, table = weights(convolution="separable"), weights(), 192 * 14**2
    assert separable == 192**2 + 9 * 192 == value("complexity", "CPVT-Ti", "1 PEG separable k=3")
    assert table == value("complexity", "DeiT-tiny", "learned", "class slot")
    corrected(4, 192**2, depthwise, separable, table, separable - table)
    names = ("learned", "2-D sine", "relative 2-D K=8", "1 PEG", "5 PEGs at positions 0-4")
    learned, sine, relative, one, five = (value("encodings", "DeiT-tiny", name) for name in names)
    error = 100 * math.sqrt(learned / 100 * (1 - learned / 100) / 50_000)
    gap = f"stands at {relative}, so the gap is ${learned} - {relative} = {learned - relative:.1f}$ points"
    corrected(5, f"Sine reaches {sine}; {learned} is the learned table.", gap, error)
    padded, bare = (value("padding", "CPVT-Ti", "1 PEG", kind) for kind in ("zero padding", "no padding"))
    none = value("imagenet", "DeiT-tiny", "none")
    three = f"the paper reports {bare}, against {padded} with it, and against {none} for no encoding"
    corrected(6, three, f"still gains {bare - none:.1f} points")
    pooled = value("imagenet", "CPVT-Ti-GAP", "5 PEGs")
    first = f"{one - learned:.1f} points above the learned table ({one} against {learned})"
    second = f"in place of one table ({five}, so {five - learned:.1f} points)"
    corrected(8, first, second, f"on top of that ({pooled}, another {pooled - five:.1f} points)")

    class Demo(torch.nn.Module):
        def __init__(self):
            self.proj = torch.nn.Conv2d(3, 8, 16, 16)

    with pytest.raises(AttributeError) as refusal:
        Demo()
    assert f"`{refusal.value}`" in corrected(7)
