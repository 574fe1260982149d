"""The repository as a thing: commands, pins, contract, recorded figures."""

import csv
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```\n(.*?)\n```$", flags=re.M | re.S)
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def tracked(*patterns: str) -> list[Path]:
    """Files under version control; outside a clone, every file that is there."""
    listing = subprocess.run(["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]
    return [path for pattern in patterns for path in ROOT.rglob(pattern) if "_build" not in path.parts]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-e"))]
    return {requirement.name: requirement for requirement in found}


def test_readme_has_the_two_commands_that_ci_runs():
    section = README.split("## Two commands")[1].split("\n## ")[0]
    assert FENCE.findall(section)[:2] == [
        "pip install -r requirements.txt && jupyter-book build .",
        "pytest --nbval",
    ]


def test_ci_reads_the_commands_and_does_not_repeat_them():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    assert "pip install -r" not in script
    for path in tracked("*.md", "*.yml", "*.toml", "*.ipynb"):
        if path != ROOT / "README.md":
            assert "pip install -r requirements.txt" not in path.read_text(encoding="utf-8"), path


def test_readme_points_at_files_that_exist():
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if not t.startswith("http")]
    assert len(targets) > 5
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
    tree = README.split("## The map")[1].split("```")[1]
    named = re.findall(r"^(\S+)/ ", tree, flags=re.M) + [
        "cpvt/" + n for n in re.findall(r"^  (\S+)", tree, flags=re.M)
    ]
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


def test_pins_are_exact_and_within_the_ranges():
    exact = pins()
    assert "-e ." in (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for requirement in exact.values():
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    ranges = [Requirement(text) for text in PROJECT["dependencies"] + extras]
    for wanted in ranges:
        version = str(exact[wanted.name].specifier).removeprefix("==")
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted} does not allow {version}"
    assert {r.name for r in ranges} == set(exact)


def test_only_the_package_is_installed():
    assert PROJECT["scripts"] == {"cpvt": "cpvt.cli:main"}
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tools["setuptools"]["packages"]["find"]["include"] == ["cpvt", "cpvt.*"]


def test_imports_go_one_way():
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip("lint-imports is not installed")
    run = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_files_stay_small_and_free_of_local_paths():
    for path in tracked("cpvt/*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
    for path in tracked("*.py", "*.md", "*.yml", "*.toml", "*.ipynb", "*.jsonl"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.\"'(/])/(?:root|home|Users|tmp)/\w", text), (
            f"{path} names a local folder"
        )
    assert not [path for path in tracked() if path.stat().st_size > 1_500_000]


def test_published_figures_are_complete():
    with open(ROOT / "data" / "published.csv", newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 75
    for row in rows:
        assert None not in row and None not in row.values(), row
        assert float(row["value"]) > 0 and row["unit"] and row["source"], row
        assert row["provenance"] in {"official figure", "secondary", "digitised"}, row
        assert row["unit"] != "%" or 60 < float(row["value"]) < 90, row
    where = [(r["table"], r["model"], r["encoding"], r["setting"], r["metric"]) for r in rows]
    assert len(set(where)) == len(where)
    documented = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for name in [
        *rows[0],
        *{r["table"] for r in rows},
        *{r["metric"] for r in rows},
        *{r["provenance"] for r in rows},
    ]:
        assert f"`{name}`" in documented, f"data/README.md does not explain {name}"
