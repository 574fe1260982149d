"""The chapters as files: run in order, cited, described, with exercises that can be failed and solved."""

import contextlib
import io
import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from nbval.plugin import comment_markers, metadata_tags

from cpvt.config import Peg
from cpvt.lab.results import published
from cpvt.model.encodings import PEG

BOOK = Path(__file__).parent.parent / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
PAGES = sorted(BOOK.glob("*.md"))
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


def test_contents_list_every_page():
    contents = yaml.safe_load((BOOK.parent / "_toc.yml").read_text(encoding="utf-8"))
    listed = [contents["root"]] + [c["file"] for part in contents["parts"] for c in part["chapters"]]
    assert sorted(listed) == sorted(f"book/{path.stem}" for path in NOTEBOOKS + PAGES)


@chapters
def test_cells_were_run_in_order(path):
    assert [cell["execution_count"] for cell in code(path)] == list(range(1, len(code(path)) + 1))
    for cell in code(path):
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", cell["source"]
            shown = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if "text" in k)]
            told = re.search(r"\b0x[0-9a-f]{6,}|site-packages|\bcuda:\d", str(shown))
            assert not told, f"another machine shows another {told[0]}: {cell['source']}"


@chapters
def test_nothing_hides_from_comparison(path):
    for cell in code(path):
        assert not tags(cell) & set(metadata_tags), cell["source"]
        comments = {line.strip().lstrip("#").strip() for line in cell["source"].splitlines() if "#" in line}
        assert not comments & set(comment_markers), cell["source"]
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert "widgets" not in metadata, "stored widget state makes the page load scripts from elsewhere"


@chapters
def test_title_and_figures_are_there_and_described(path):
    assert cells(path)[0]["source"].startswith("# ")
    text = prose(path)
    assert len(re.findall(r"^# ", text, flags=re.M)) == 1
    for cell in code(path):
        images = [out for out in cell["outputs"] if any(k.startswith("image/") for k in out.get("data", {}))]
        options = cell["metadata"].get("mystnb", {})
        if images:
            assert len(images) == 1, f"one figure a cell: {cell['source']}"
            assert len(options.get("image", {}).get("alt", "")) >= 20, f"no alt text: {cell['source']}"
            assert len(options.get("figure", {}).get("caption", "")) >= 20, f"no caption: {cell['source']}"
            assert options["figure"].get("name", "").startswith("fig-"), f"no name: {cell['source']}"
    assert not re.findall(r"!\[\s*\]\(|<img(?![^>]*\balt=\"[^\"]{20})", text), "an image without alt text"
    for directive in re.findall(r"\{(?:figure|image)\}.*?(?=\n\n|\n```|\n:::)", text, flags=re.S):
        assert re.search(r":alt: .{20}", directive), directive


def test_citations_have_their_entry():
    bibliography = (BOOK / "references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{([^,]+),", bibliography, flags=re.M)
    assert len(entries) == len(set(entries)) > 30
    text = "\n".join(map(prose, NOTEBOOKS + PAGES))
    cited = {
        key.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in keys.split(",")
    }
    assert cited and cited <= set(entries), cited - set(entries)


# An exercise NAME is a markdown cell with the label exercise-NAME, then a stub, a check and a solution cell
# tagged exercise:NAME; what they need stands in cells tagged `setup`.

EXERCISES = [
    (path, tag.removeprefix("exercise:"))
    for path in NOTEBOOKS
    for tag in dict.fromkeys(
        t for cell in code(path) for t in sorted(tags(cell)) if t.startswith("exercise:")
    )
]


def exercise_cells(path: Path, name: str) -> dict[str, dict]:
    mine = [cell for cell in code(path) if f"exercise:{name}" in tags(cell)]
    kinds = ["stub", "check", "solution"]
    found = {kind: [c for c in mine if f"exercise-{kind}" in tags(c)] for kind in kinds}
    assert {k: len(v) for k, v in found.items()} == dict.fromkeys(kinds, 1), f"{name}: one cell of each kind"
    order = [mine.index(found[kind][0]) for kind in kinds]
    assert order == sorted(order), f"{name}: stub, then check, then solution"
    return {kind: found[kind][0] for kind in kinds}


def run(source: str, names: dict) -> str:
    """Execute a cell and return what it prints; figures are thrown away."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "<cell>", "exec"), names)
    return printed.getvalue()


@cache
def prepared(path: Path) -> dict:
    """Names after the chapter's setup cells, which run once for all of its exercises."""
    names = {"__name__": "exercise"}
    for cell in code(path):
        if "setup" in tags(cell):
            run(cell["source"], names)
    return names


@pytest.fixture
def names(path, monkeypatch):
    """What an exercise finds; what it leaves behind is taken away."""
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = prepared(path)
    before = dict(names)
    yield names
    names.clear()
    names.update(before)


@pytest.mark.parametrize("path, name", EXERCISES, ids=[f"{p.stem}-{n}" for p, n in EXERCISES])
def test_exercise_fails_on_the_stub_and_passes_on_the_solution(path, name, names):
    stub, check, solution = exercise_cells(path, name).values()
    assert "hide-cell" in tags(solution), f"{name}: the solution is not hidden"
    stored = ["".join("".join(o.get("text", "")) for o in cell["outputs"]) for cell in (check, solution)]
    before = set(names)
    run(stub["source"], names)
    defined = set(names) - before - {"__builtins__"}
    assert defined, f"{name}: the stub defines nothing"
    handed_in = {key: names[key] for key in defined}
    assert run(check["source"], names).strip().endswith(f"{name}: not yet") and "not yet" in stored[0]

    signature = names[f"check_{name}"].__code__
    wanted = signature.co_varnames[: signature.co_argcount]
    assert wanted and set(wanted) <= defined, f"check_{name} takes {wanted}; the stub defines {defined}"
    with pytest.raises(Exception):  # noqa: B017  (an assertion, NotImplementedError, a wrong shape: all are failures)
        names[f"check_{name}"](*[handed_in[key] for key in wanted])
    assert run(solution["source"], names).strip().endswith(f"{name}: right") and "right" in stored[1]
    for key in wanted:
        assert names[key] is not handed_in[key], f"{name}: the solution does not define {key}"
    names[f"check_{name}"](*[names[key] for key in wanted])


@chapters
def test_exercises_have_question_and_worded_solution(path):
    text = prose(path)
    asked = re.findall(r"\{exercise\}.*?\n:label: exercise-(\w+)", text)
    answered = re.findall(r"\{solution\} exercise-(\w+)\n(?::.*\n)*:class: dropdown", text)
    assert sorted(asked) == sorted(answered) == sorted(name for p, name in EXERCISES if p == path)
    assert asked, "a chapter ends with exercises"


# The page of corrections: its numbers are computed again from the published figures.


def value(table: str, model: str, encoding: str, setting: str = "") -> float:
    rows = published(table)
    rows = rows[(rows["model"] == model) & (rows["encoding"] == encoding)]
    [found] = rows[rows["setting"].str.contains(setting, regex=False)]["value"]
    return found


def corrected(section: int, *numbers) -> str:
    """The text of a section, in which these numbers stand."""
    page = (BOOK / "corrections.md").read_text(encoding="utf-8").replace("{,}", ",")
    text = page.split(f"\n## {section}. ")[1].split("\n## ")[0]
    for number in numbers:
        shown = f"{number:,}" if isinstance(number, int) else f"{number:.1f}"
        assert re.search(rf"(?<![\d.,]){re.escape(shown)}(?!\d)", text), f"{shown} in {text}"
    return text


def test_corrections_about_test_sizes():
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


def test_corrections_about_parameters():
    def weights(**options):
        return sum(p.numel() for p in PEG(192, config=Peg(bias=False, **options)).parameters())

    separable, depthwise, table = weights(convolution="separable"), weights(), 192 * 14**2
    assert separable == 192**2 + 9 * 192 == value("complexity", "CPVT-Ti", "1 PEG separable k=3")
    assert table == value("complexity", "DeiT-tiny", "learned", "class slot")
    corrected(4, 192**2, depthwise, separable, table, separable - table)


def test_corrections_about_encodings_padding_and_gain():
    names = ("learned", "2-D sine", "relative 2-D K=8", "1 PEG", "5 PEGs at positions 0-4")
    learned, sine, relative, one, five = (value("encodings", "DeiT-tiny", name) for name in names)
    error = 100 * math.sqrt(learned / 100 * (1 - learned / 100) / 50_000)
    corrected(5, sine, learned, relative, learned - relative, error)
    padded, bare = (value("padding", "CPVT-Ti", "1 PEG", kind) for kind in ("zero padding", "no padding"))
    none = value("imagenet", "DeiT-tiny", "none")
    corrected(6, padded, bare, none, bare - none)
    pooled = value("imagenet", "CPVT-Ti-GAP", "5 PEGs")
    corrected(8, one - learned, one, learned, five, five - learned, pooled, pooled - five)


def test_corrections_about_the_listing():
    class Demo(torch.nn.Module):
        def __init__(self):
            self.proj = torch.nn.Conv2d(3, 8, 16, 16)

    with pytest.raises(AttributeError) as refusal:
        Demo()
    assert f"`{refusal.value}`" in corrected(7)
