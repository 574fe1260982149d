"""The repository as a thing: commands, map, pins, published figures, nothing of one machine."""

import csv
import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def tracked(*patterns: str) -> list[Path]:
    """Files under version control; outside a clone, every file that is there."""
    listing = subprocess.run(["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]
    return [path for pattern in patterns for path in ROOT.rglob(pattern) if "_build" not in path.parts]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_ci_runs_the_two_commands_and_nothing_repeats_them():
    fenced = re.findall(r"^```\n(.*?)\n```$", section("Two commands"), flags=re.M | re.S)
    build, check = "pip install -r requirements.txt && jupyter-book build .", "pytest --nbval"
    assert fenced[:2] == [build, check]
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for path in [ROOT / ".ci" / "run", *tracked("*.md", "*.yml", "*.toml", "*.ipynb")]:
        assert path == ROOT / "README.md" or "pip install -r" not in path.read_text(encoding="utf-8"), path


def test_the_readme_leads_to_every_file_and_name():
    """Its links exist, its map names the package's files and no other; each `name` in `file` is defined there."""
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    assert len(targets) > 15
    assert not [target for target in targets if not (ROOT / target).exists()]
    named, folder = set(), ""
    for line in section("The map").split("\ncpvt/")[1].split("\ndata/")[0].splitlines()[1:]:
        if not line.startswith("    "):
            folder = line.split()[0] if "/" in line.split()[0] else ""
        named |= {Path("cpvt", folder, file) for file in re.findall(r"\w+\.py", line)}
    assert named == {p.relative_to(ROOT) for p in tracked("cpvt/*.py") if not p.name.startswith("__")}
    found = re.findall(r"`([\w.]+)` in \[`(\S+?\.py)`\]", section("Where to look"))
    assert len(found) >= 10
    for name, file in found:
        text = (ROOT / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^\s*(?:def|class) {part}\b|^{part}\b.* = ", text, flags=re.M), (name, file)


def test_pins_are_exact_and_within_the_ranges():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "-e ." in lines
    pins = [Requirement(line) for line in lines if line and not line.startswith(("#", "-e"))]
    exact = {pin.name: pin.specifier for pin in pins}
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    ranges = [Requirement(text) for text in PROJECT["dependencies"] + extras]
    assert {wanted.name for wanted in ranges} == set(exact)
    for wanted in ranges:
        [pin] = exact[wanted.name]
        assert pin.operator == "==", f"{wanted.name}{pin}"
        assert wanted.specifier.contains(pin.version, prereleases=True), f"{wanted} has no {pin}"


def test_files_name_no_folder_of_one_machine_and_stay_small():
    for path in tracked("*.py", "*.md", "*.yml", "*.toml", "*.ipynb", "*.jsonl"):
        local = re.search(r"(?<![\w.\"'(/])/(?:root|home|Users|tmp)/\w\S*", path.read_text(encoding="utf-8"))
        assert not local, f"{path} names {local[0]}"
    assert not [path for path in tracked() if path.stat().st_size > 1_500_000]


def test_published_figures_are_complete_and_have_their_origin():
    with open(ROOT / "data" / "published.csv", newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 75
    for row in rows:
        assert None not in row and None not in row.values(), row
        assert float(row["value"]) > 0 and row["unit"] and row["source"], row
        assert row["provenance"] in {"official figure", "secondary", "digitised"}, row
        assert row["unit"] != "%" or 60 < float(row["value"]) < 90, row
    where = {tuple(row[key] for key in ("table", "model", "encoding", "setting", "metric")) for row in rows}
    assert len(where) == len(rows)
    explained = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    names = {*rows[0], *(row[key] for row in rows for key in ("table", "metric", "provenance"))}
    assert not [name for name in names if f"`{name}`" not in explained]
