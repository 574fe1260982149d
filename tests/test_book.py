"""The chapters as files: run in order, cited, described, with exercises that can be failed and solved."""

import contextlib
import csv
import io
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from nbval.plugin import comment_markers, metadata_tags

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
            assert output["output_type"] != "error", cell["source"]
            assert output.get("name") != "stderr", cell["source"]


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
def test_figures_are_described(path):
    for cell in code(path):
        images = [out for out in cell["outputs"] if any(k.startswith("image/") for k in out.get("data", {}))]
        options = cell["metadata"].get("mystnb", {})
        if images:
            assert len(images) == 1, f"one figure a cell: {cell['source']}"
            assert len(options.get("image", {}).get("alt", "")) >= 20, f"no alt text: {cell['source']}"
            assert len(options.get("figure", {}).get("caption", "")) >= 20, f"no caption: {cell['source']}"
            assert options["figure"].get("name", "").startswith("fig-"), f"no name: {cell['source']}"
    text = prose(path)
    assert not re.findall(r"!\[\s*\]\(|<img(?![^>]*\balt=\"[^\"]{20})", text), "an image without alt text"
    for directive in re.findall(r"\{(?:figure|image)\}.*?(?=\n\n|\n```|\n:::)", text, flags=re.S):
        assert re.search(r":alt: .{20}", directive), directive


@chapters
def test_opening_and_title(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown" and first["source"].startswith("# ")
    assert len(re.findall(r"^# ", prose(path), flags=re.M)) == 1


def test_citations_have_their_entry():
    entries = re.findall(
        r"^@\w+\{([^,]+),", (BOOK / "references.bib").read_text(encoding="utf-8"), flags=re.M
    )
    assert len(entries) == len(set(entries)) > 30
    cited = set()
    for path in NOTEBOOKS + PAGES:
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose(path)):
            for key in keys.split(","):
                assert key.strip() in entries, f"{path.name} cites {key.strip()}, which references.bib lacks"
                cited.add(key.strip())
    assert cited


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


@pytest.mark.parametrize("path, name", EXERCISES, ids=[f"{p.stem}-{n}" for p, n in EXERCISES])
def test_exercise_fails_on_the_stub_and_passes_on_the_solution(path, name, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("MPLBACKEND", "agg")
    stub, check, solution = exercise_cells(path, name).values()
    assert "hide-cell" in tags(solution), f"{name}: the solution is not hidden"
    stored = ["".join("".join(o.get("text", "")) for o in cell["outputs"]) for cell in (check, solution)]
    names = {"__name__": "exercise"}
    for cell in code(path):
        if "setup" in tags(cell):
            run(cell["source"], names)
    before = set(names)
    run(stub["source"], names)
    defined = set(names) - before - {"__builtins__"}
    assert defined, f"{name}: the stub defines nothing"
    handed_in = {key: names[key] for key in defined}
    assert run(check["source"], names).strip().endswith(f"{name}: not yet") and "not yet" in stored[0]

    assert f"check_{name}" in names, f"the check cell defines no check_{name}"
    parameters = names[f"check_{name}"].__code__
    wanted = parameters.co_varnames[: parameters.co_argcount]
    assert wanted and set(wanted) <= defined, (
        f"check_{name} takes {wanted}; the stub defines {sorted(defined)}"
    )
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


def published(table: str, model: str, encoding: str, setting: str = "") -> float:
    with open(BOOK.parent / "data" / "published.csv", newline="", encoding="utf-8") as lines:
        found = [
            float(row["value"])
            for row in csv.DictReader(lines)
            if (row["table"], row["model"], row["encoding"]) == (table, model, encoding)
            and setting in row["setting"]
        ]
    assert len(found) == 1, (table, model, encoding, setting)
    return found[0]


def corrections() -> str:
    return " ".join((BOOK / "corrections.md").read_text(encoding="utf-8").split())


def test_corrections_about_test_sizes():
    page = corrections()
    sizes = ["224", "384", "448", "512"]
    models = {
        "DeiT-Ti, learned table": ("DeiT-tiny", "learned"),
        "CPVT-Ti, one PEG": ("CPVT-Ti", "1 PEG"),
        "CPVT-Ti, five PEGs": ("CPVT-Ti", "5 PEGs"),
    }
    rows = {label: [published("resolution", *key, size) for size in sizes] for label, key in models.items()}
    five, table = rows["CPVT-Ti, five PEGs"], rows["DeiT-Ti, learned table"]
    rows["margin of five PEGs"] = [round(a - b, 1) for a, b in zip(five, table, strict=True)]
    for label, values in rows.items():
        assert f"| {label} | " + " | ".join(f"{v:.1f}" for v in values) + " |" in page
    assert five.index(max(five)) == 1 and five[3] < five[0]  # peaks at 384, ends below where it began
    assert rows["margin of five PEGs"] == sorted(rows["margin of five PEGs"])
    one = rows["CPVT-Ti, one PEG"]
    assert f"With one PEG the same step leads from {one[0]} to {one[1]}." in page
    assert "belongs to five PEGs" in page and f"from {five[0]} to {five[1]}" in page
    assert (
        round(one[1] - one[0], 1) == round(five[1] - five[0], 1) == 0.8
        and "The gain is 0.8 points in both" in page
    )
    assert f"is {448 / 0.875:.0f} pixels" in page


def test_corrections_about_parameters():
    from cpvt.config import Peg
    from cpvt.model.encodings import PEG

    page = corrections()
    separable, table = 192**2 + 9 * 192, 192 * 14**2
    assert separable == published("complexity", "CPVT-Ti", "1 PEG separable k=3")
    assert table == published("complexity", "DeiT-tiny", "learned", "class slot")
    assert separable == sum(
        p.numel() for p in PEG(192, config=Peg(convolution="separable", bias=False)).parameters()
    )
    assert 9 * 192 == sum(p.numel() for p in PEG(192, config=Peg(bias=False)).parameters())
    assert f"A separable convolution has {separable:,} parameters" in page
    assert f"parameters: {separable - table} more than the learned table" in page
    for number in (192**2, 9 * 192, separable, table):
        assert f"{number:,}".replace(",", "{,}") in page


def test_corrections_about_encodings_padding_and_gain():
    from cpvt.config import parse_encoding

    page = corrections()
    learned, sine, relative, one, five = (
        published("encodings", "DeiT-tiny", name)
        for name in ("learned", "2-D sine", "relative 2-D K=8", "1 PEG", "5 PEGs at positions 0-4")
    )
    assert f"Sine reaches {sine}; {learned} is the learned table." in page
    assert f"${learned} - {relative} = {learned - relative:.1f}$" in page
    padded, unpadded = (
        published("padding", "CPVT-Ti", "1 PEG", kind) for kind in ("zero padding", "no padding")
    )
    none = published("imagenet", "DeiT-tiny", "none")
    assert f"reports {unpadded}, against {padded} with it, and against {none} for no encoding" in page
    assert f"still gains {unpadded - none:.1f} points" in page
    assert "`peg(padding='circular')`" in page
    circular = parse_encoding("peg(padding='circular')")[0]
    assert circular.skip and circular == replace(parse_encoding("peg")[0], padding="circular")
    assert (
        f"one PEG stands {one - learned:.1f} points above the learned table ({one} against {learned})" in page
    )
    pooled = published("imagenet", "CPVT-Ti-GAP", "5 PEGs")
    assert f"({five}, so {five - learned:.1f} points)" in page
    assert f"({pooled}, another {pooled - five:.1f} points)" in page
    error = 100 * math.sqrt(learned / 100 * (1 - learned / 100) / 50_000)
    assert f"of {learned} % on 50,000 images alone is {error:.1f} points" in page


def test_corrections_about_the_listing():
    class Demo(torch.nn.Module):
        def __init__(self):
            self.proj = torch.nn.Conv2d(3, 8, 16, 16)

    with pytest.raises(AttributeError) as refusal:
        Demo()
    assert f"`{refusal.value}`" in corrections()
