"""Measured rows: what goes in comes out, and nothing else gets in."""

import dataclasses
import json
import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cpvt.config import ModelConfig, TrainConfig
from cpvt.errors import ResultsError
from cpvt.lab import results
from cpvt.lab.results import (
    NOT_YET,
    Published,
    Row,
    append_row,
    beside,
    commit,
    difference,
    fingerprint,
    over_seeds,
    published,
    read_rows,
    spread,
    t_quantile,
)


def row(**changes) -> Row:
    values = {
        "experiment": "diagnostics",
        "row": "where, peg, gap",
        "scale": "seconds",
        "dataset": "where",
        "dataset_sha256": "0" * 64,
        "seed": 0,
        "config": dataclasses.asdict(TrainConfig(model=ModelConfig(encoding="peg"))),
        "metrics": {"top1@14": 56.25, "top1@14/d3": 25.0, "images_per_s": 812.5},
        "weights": "raw",
        "seconds": 31.5,
        "device": "cpu",
        "torch": "2.14.1",
        "cpvt_commit": "abc",
        "date": "2026-01-31T12:00:00+00:00",
    }
    return Row(**{**values, **changes})


def test_a_row_has_exactly_the_fields_of_the_design():
    assert results.FIELDS == (
        *("experiment", "row", "scale", "dataset", "dataset_sha256", "seed", "config", "metrics"),
        *("weights", "seconds", "device", "torch", "cpvt_commit", "date"),
    )


def test_what_is_appended_is_read_back(tmp_path):
    rows = [row(seed=seed, metrics={"top1@14": 0.1 + seed}) for seed in range(3)]
    for one in rows:
        append_row(tmp_path / "diagnostics.jsonl", one)
    assert read_rows("diagnostics", tmp_path) == read_rows(folder=tmp_path) == rows
    assert read_rows("another", tmp_path) == []
    assert rows[0].encoding == "peg"
    lines = (tmp_path / "diagnostics.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [list(results.FIELDS)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"top1@14": 100.5}}, "top1@14.*0 to 100"),
        ({"metrics": {"top1@14/d3": -1}}, "top1@14/d3.*0 to 100"),
        ({"metrics": {"top1@14": math.nan}}, "finite"),
        ({"metrics": {"top1@14": math.inf}}, "finite"),
        ({"metrics": {"top1@14": True}}, "finite number"),
        ({"metrics": {"top1@14": "56"}}, "finite number"),
        ({"metrics": {"top1": 56.0}}, "resolution"),
        ({"metrics": {"Top 1": 56.0}}, "'Top 1'"),
        ({"metrics": {}}, "metrics={}"),
        ({"experiment": ""}, "experiment=''"),
        ({"row": None}, "row=None"),
        ({"seed": 1.0}, "seed=1.0"),
        ({"seed": True}, "seed=True"),
        ({"seed": -1}, "seed=-1"),
        ({"weights": "averaged"}, "'raw' or 'ema'"),
        ({"seconds": math.nan}, "seconds=nan"),
        ({"dataset_sha256": "abc"}, "64 hex digits"),
        ({"date": "yesterday"}, "ISO 8601"),
        ({"config": {"a": math.nan}}, "config"),
        ({"config": {"a": object()}}, "config"),
        ({"config": "peg"}, "config='peg'"),
    ],
)
def test_a_row_that_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(ResultsError, match=message) as caught:
        row(**changes)
    assert "\n" not in str(caught.value)


def test_a_duplicate_is_refused_unless_it_supersedes(tmp_path):
    path = tmp_path / "a.jsonl"
    append_row(path, row())
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="again=True"):
        append_row(path, row(seconds=1.0))
    assert path.read_bytes() == before
    append_row(path, row(seconds=1.0), again=True)
    assert [one.seconds for one in read_rows(folder=tmp_path)] == [1.0]
    assert len(path.read_text().splitlines()) == 2
    for change in ({"seed": 1}, {"scale": "minutes"}, {"row": "b"}, {"experiment": "b"}):
        append_row(path, row(**change))


def test_a_file_with_a_torn_end_is_left_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    append_row(path, row())
    torn = path.read_bytes()[:-20]
    path.write_bytes(torn)
    with pytest.raises(ResultsError, match=re.escape(str(path))):
        append_row(path, row(seed=1))
    assert path.read_bytes() == torn


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v.pop("seed"), "no seed"),
        (lambda v: v.update(accuracy=1.0), "unknown accuracy"),
        (lambda v: v["metrics"].update({"top1@14": 101}), "0 to 100"),
    ],
)
def test_a_bad_line_is_named(tmp_path, spoil, message):
    path = tmp_path / "a.jsonl"
    append_row(path, row())
    values = dataclasses.asdict(row(seed=1))
    spoil(values)
    path.write_text(path.read_text() + json.dumps(values) + "\n")
    with pytest.raises(ResultsError, match=f"{re.escape(str(path))}:2: .*{message}"):
        read_rows(folder=tmp_path)


@pytest.mark.parametrize("line", ["{", "[]", "", '{"metrics": NaN}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ResultsError, match=r"a\.jsonl:1: "):
        read_rows(folder=tmp_path)


def test_a_missing_folder_says_where_it_was_looked_for():
    with pytest.raises(ResultsError, match="data/nowhere was not found above .*cpvt"):
        read_rows(folder="data/nowhere")


def test_writers_at_the_same_time_do_not_mix_their_lines(tmp_path):
    def write(name: str) -> None:
        for seed in range(20):
            append_row(tmp_path / "a.jsonl", row(row=name, seed=seed))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    keys = {(one.row, one.seed) for one in read_rows(folder=tmp_path)}
    assert keys == {(name, seed) for name in "abcd" for seed in range(20)}


def test_commit_names_the_package_as_it_is():
    found = commit()
    assert found == "unknown" or re.fullmatch("[0-9a-f]{40}(-dirty)?", found)


def test_commit_turns_dirty_with_the_package_only(tmp_path, monkeypatch):
    package = tmp_path / "cpvt" / "lab"
    package.mkdir(parents=True)
    (package / "results.py").write_text("a = 1\n")
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    assert commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    assert re.fullmatch("[0-9a-f]{40}", commit())
    (tmp_path / "notes.md").write_text("outside the package\n")
    assert not commit().endswith("-dirty")
    (package / "results.py").write_text("a = 2\n")
    assert commit().endswith("-dirty")


def test_fingerprint_tells_values_shapes_and_types_apart():
    x = torch.arange(6)
    same, others = fingerprint(x), [x + 1, x.view(2, 3), x.int(), x.flip(0)]
    assert fingerprint(x.clone()) == same and len(same) == 64
    assert same not in {fingerprint(other) for other in others}
    assert fingerprint(x[::2]) == fingerprint(x[::2].contiguous())


# --------------------------------------------------------------------------- over seeds


@pytest.mark.parametrize(  # printed tables of Student's t, two-sided 95 %
    ("freedom", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_t_quantiles_are_the_printed_ones(freedom, t):
    assert abs(t_quantile(freedom) - t) < 5e-5


def test_spread_of_known_values():
    found = spread([70.0, 72.0, 74.0])
    assert (found.mean, found.min, found.max, found.n) == (72.0, 70.0, 74.0, 3)
    half = 4.302652729911275 * 2 / math.sqrt(3)
    assert math.isclose(found.high - 72, half, rel_tol=1e-9) and math.isclose(72 - found.low, half)
    assert str(found) == "72.0 ± 5.0 (3 seeds)"
    assert spread([70.0, 72.0]).low is None and str(spread([70.0])) == "70.0 (one seed)"
    with pytest.raises(ResultsError):
        spread([])


def test_the_interval_holds_the_truth_95_times_in_100():
    draws = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = sum(s.low <= 0 <= s.high for s in map(spread, draws.tolist())) / len(draws)
    assert abs(inside - 0.95) < 3 * math.sqrt(0.95 * 0.05 / len(draws))


def test_rows_over_seeds_and_differences_paired_by_seed():
    rows = [row(row="a", seed=s, metrics={"top1@14": 50 + 10.0 * s}) for s in range(3)]
    rows += [row(row="b", seed=s, metrics={"top1@14": 49 + 10.0 * s}) for s in range(4)]
    rows += [row(row="c", metrics={"top1@28": 1.0})]
    assert {name: s.n for name, s in over_seeds(rows, "top1@14").items()} == {"a": 3, "b": 4}
    paired = difference(rows, "a", "b", "top1@14")
    assert (paired.mean, paired.low, paired.high, paired.n) == (1.0, 1.0, 1.0, 3)
    assert difference(rows, "a", "c", "top1@14") is None


# --------------------------------------------------------------------------- published

HEAD = "table,model,encoding,setting,metric,value,unit,source,provenance\n"
LINE = "placement,DeiT-tiny,none,,top1,68.2,%,CPVT v2 Table 5,official figure\n"


def test_published_figures_are_read_and_filtered(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(HEAD + LINE + LINE.replace("placement", "padding").replace("68.2", "70.5"))
    found = published("placement", path)
    assert [(p.name, p.value, p.provenance) for p in found] == [("DeiT-tiny, none", 68.2, "official figure")]
    assert len(published(path=path)) == 2
    with pytest.raises(ResultsError, match="no published table 'place'; there are padding, placement"):
        published("place", path)


@pytest.mark.parametrize(
    "spoil", [("68.2", "much"), ("official figure", "rumour"), (",none", ""), ("%", "%,")]
)
def test_a_bad_published_line_is_named(tmp_path, spoil):
    path = tmp_path / "published.csv"
    path.write_text(HEAD + LINE + LINE.replace(*spoil))
    with pytest.raises(ResultsError, match=r"published\.csv:3: "):
        published(path=path)


def test_measured_beside_published(tmp_path):
    cited = [
        Published("t", "DeiT-tiny", name, "", "top1", value, "%", "s", "secondary")
        for name, value in (("none", 68.2), ("PEG", 72.4))
    ]
    rows = [row(row="peg", seed=s, metrics={"top1@14": 40.0 + s}) for s in range(3)]
    rows += [row(row="rotary", metrics={"top1@14": 41.0})]
    lines = beside(rows, cited, "top1@14", {"peg": "DeiT-tiny, PEG"})
    assert [line.texts() for line in lines] == [
        ("DeiT-tiny, none", NOT_YET, "68.2 %"),
        ("DeiT-tiny, PEG", "41.0 ± 2.5 (3 seeds)", "72.4 %"),
        ("rotary", "41.0 (one seed)", "not published"),
    ]
