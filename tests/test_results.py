"""Measured results: what goes in comes out by its columns, and nothing else gets in."""

import json
import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import make_result
from safetensors.torch import save_file

from cpvt.errors import ConfigError, ResultsError
from cpvt.lab import results
from cpvt.lab.results import append, complete, fingerprint, published, read, read_arrays, recorded, select


def test_what_is_appended_is_read_back_and_a_duplicate_refused_unless_it_supersedes(tmp_path):
    written = [make_result(seed=seed, metrics={"top1@14": 0.1 + seed}) for seed in range(3)]
    for one in written:
        append(one, tmp_path)
    assert recorded("x", tmp_path) == recorded(folder=tmp_path) == written
    rows = read("x", tmp_path)
    assert list(rows)[:5] == ["experiment", "encoding", "global_pool", "seed", "scale"]
    assert list(rows["top1@14"]) == [0.1, 1.1, 2.1] and rows["encoding"].eq("peg").all()
    assert rows["config"][0]["model"]["encoding"] == "peg"
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [list(results.FIELDS)] * 3
    tmp_path = tmp_path / "twice"
    append(make_result(), tmp_path)
    before = (tmp_path / "x.jsonl").read_bytes()
    with pytest.raises(results.AlreadyMeasured, match="encoding=peg"):
        append(make_result(seconds=1.0), tmp_path)
    assert (tmp_path / "x.jsonl").read_bytes() == before
    append(make_result(seconds=1.0), tmp_path, again=True)
    assert list(read("x", tmp_path)["seconds"]) == [1.0]
    others = {"seed": 1}, {"scale": "minutes"}, {"columns": {"encoding": "none", "global_pool": "avg"}}
    for change in (*others, {"experiment": "y"}):
        append(make_result(**change), tmp_path)
    assert len(read("x", tmp_path)) == 4 and len(read(folder=tmp_path)) == 5


def test_what_cannot_be_is_refused_in_one_line():
    wrong = {
        "top1@14/d3.*0 to 100": {"metrics": {"top1@14/d3": 100.5}},
        "'top1'": {"metrics": {"top1": 56.0}},
    }
    wrong |= {
        "finite": {"metrics": {"top1@14": math.nan}},
        "columns={}": {"columns": {}},
        "seed=-1": {"seed": -1},
    }
    wrong |= {"columns": {"columns": {"seed": 1}}, "columns.*task": {"experiment": "padding"}}
    wrong |= {"seconds": {"seconds": math.nan}, "config": {"config": {"a": math.nan}}}
    for message, changes in (wrong | {"64 hex digits": {"dataset_sha256": "abc"}}).items():
        with pytest.raises(ResultsError, match=message) as caught:
            make_result(**changes)
        assert "\n" not in str(caught.value)


def test_a_bad_line_is_named_and_a_torn_end_left_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    append(make_result(), tmp_path)
    whole, values = path.read_text(), json.loads(path.read_text())
    values["seed"] = 1
    for bad in (values | {"accuracy": 1.0}, values | {"metrics": {"top1@14": 101}}, [], {"experiment": "y"}):
        path.write_text(whole + json.dumps(bad) + "\n")
        with pytest.raises(ResultsError, match=rf"{re.escape(str(path))}:2: "):
            read("x", tmp_path)
    listed = values | {"columns": {"encoding": ["peg"], "global_pool": "avg"}}
    foreign = b"{", b"\xff\xfe\x00", '{"caf\u00e9": 1}'.encode("latin-1"), b"[" * 100_000, b"3", b"null"
    for bad in (*foreign, json.dumps(listed).encode(), json.dumps(values | {"scale": ["seconds"]}).encode()):
        path.write_bytes(whole.encode() + bad + b"\n")
        with pytest.raises(ResultsError, match=r"x\.jsonl:2: .*mend or remove"):
            read("x", tmp_path)
    path.write_text(whole[:-20])
    with pytest.raises(ResultsError, match="cut off"):
        append(make_result(seed=1), tmp_path)
    assert path.read_text() == whole[:-20]


def test_writers_at_the_same_time_do_not_mix_their_lines(tmp_path):
    def write(encoding: str) -> None:
        for seed in range(10):
            arrays = {"a": torch.tensor([seed])}
            append(make_result(columns={"encoding": encoding}, seed=seed), tmp_path, arrays=arrays)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, ("none", "peg", "sine")))
    rows = read("x", tmp_path)
    assert len(rows) == 30 and not rows.duplicated(["encoding", "seed"]).any()
    for encoding in ("none", "peg", "sine"):
        kept = read_arrays("x", "a", tmp_path, encoding=encoding)
        assert {seed: int(array) for seed, array in kept.items()} == {seed: seed for seed in range(10)}


def test_an_experiment_without_rows_is_an_empty_frame_and_an_unknown_one_an_error(tmp_path, monkeypatch):
    default = results.results_folder()  # whatever the working directory
    monkeypatch.chdir(tmp_path)
    assert results.results_folder() == default and (default / "synthetic.jsonl").is_file()
    rows = read("pilot", tmp_path)
    assert len(rows) == len(select(rows, encoding="peg")) == 0 and set(results.COLUMNS["pilot"]) <= set(rows)
    with pytest.raises(ResultsError, match="'pilots'.*pilot"):
        read("pilots", tmp_path)
    with pytest.raises(ResultsError, match="no folder"):
        read("pilot", tmp_path / "nowhere")


def test_selecting_takes_the_usual_values_of_what_is_not_named(tmp_path):
    for row in ({}, {"global_pool": "avg"}, {"shifted": True}, {"encoding": "sine"}):
        row = complete("photographs", {"encoding": "peg"} | row)
        append(make_result("photographs", columns=row), tmp_path)
    rows = read("photographs", tmp_path)
    assert select(rows, encoding="peg").index.tolist() == [0]
    assert select(rows, encoding="peg(positions=(0,))", global_pool="avg").index.tolist() == [1]
    assert select(rows).index.tolist() == [0, 3]  # an encoding has no usual value
    with pytest.raises(ResultsError, match="'pool'.*global_pool"):
        select(rows, pool="avg")
    with pytest.raises(ConfigError, match="'pge'"):
        select(rows, encoding="pge")


def test_commit_turns_dirty_with_the_package_only(tmp_path, monkeypatch):
    package = tmp_path / "cpvt" / "lab"
    package.mkdir(parents=True)
    (package / "results.py").write_text("a = 1\n")
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    assert results.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    assert re.fullmatch("[0-9a-f]{40}", results.commit())
    (tmp_path / "notes.md").write_text("outside the package\n")
    assert not results.commit().endswith("-dirty")
    (package / "results.py").write_text("a = 2\n")
    assert results.commit().endswith("-dirty")
    monkeypatch.setenv("CPVT_COMMIT", "abc")
    assert results.commit() == "abc"


def test_arrays_are_found_by_the_columns_of_their_row(tmp_path):
    for seed in (1, 0):
        row = make_result("photographs", seed, columns=complete("photographs", {"encoding": "peg"}))
        append(row, tmp_path, arrays={"peg0": torch.full((2,), seed), "table": torch.ones(3)})
    found = read_arrays("photographs", "peg0", tmp_path, encoding="peg")
    assert list(found) == [0, 1] and found[1].tolist() == [1, 1]
    assert read_arrays("photographs", "peg0", tmp_path, encoding="peg", global_pool="avg") == {}
    assert read_arrays("padding", "peg0", tmp_path) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"photographs.jsonl", "photographs.safetensors"}
    for result in results.recorded("photographs"):  # every recorded row has its arrays
        hits = results.unpack(read_arrays("photographs", "correct", **result.columns)[result.seed], 5000)
        top1 = result.metrics[f"top1@{result.columns['grid']}"]
        # Rows of earlier code count an image whose right class shares the largest logit here and not there.
        assert 100 * hits.double().mean().item() == pytest.approx(top1, abs=0.5), result.label
    (tmp_path / "photographs.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ResultsError, match="photographs.safetensors is damaged"):
        read_arrays("photographs", "peg0", tmp_path, encoding="peg")
    with pytest.raises(ResultsError, match="photographs.safetensors is damaged"):
        append(make_result("photographs", 2, columns=row.columns), tmp_path, arrays={"a": torch.ones(1)})
    save_file({"of nobody": torch.ones(1)}, tmp_path / "photographs.safetensors")
    with pytest.raises(ResultsError, match="photographs.safetensors is damaged"):
        read_arrays("photographs", "peg0", tmp_path, encoding="peg")
    packed = torch.tensor([0b10100000], dtype=torch.uint8)
    assert results.unpack(packed, 4).tolist() == [True, False, True, False]
    with pytest.raises(ResultsError, match="13"):
        results.unpack(packed, 100)  # bits of another number of images


def test_published_figures_and_fingerprints_of_values_shapes_and_types():
    rows, placement = published(), published("placement")
    assert rows["value"].dtype == float and rows["value"].notna().all()
    assert set(placement["table"]) == {"placement"} and 0 < len(placement) < len(rows)
    assert "none" in set(placement["encoding"])  # and not what pandas takes for a missing value
    with pytest.raises(ResultsError, match="'place'.*placement"):
        published("place")
    x = torch.arange(6)
    assert fingerprint(x[::2]) == fingerprint(x[::2].contiguous())
    assert len({fingerprint(other) for other in (x, x + 1, x.view(2, 3), x.int(), x.flip(0))}) == 5
