"""Rows are measured once, in order, within a budget; what cannot be measured is named and stops no other."""

import dataclasses
import os
import signal

import pytest

from cpvt.errors import ConfigError, ResultsError
from cpvt.lab import measuring
from cpvt.lab.arrays import read_arrays
from cpvt.lab.experiments import diagnostic, score_diagnostic
from cpvt.lab.results import append_row, read_rows
from cpvt.lab.runner import Planned, measure_missing
from cpvt.lab.tables import changed
from cpvt.training.distributed import Stopped


def plan(name: str, seed: int = 0, score=score_diagnostic, **optim) -> Planned:
    config = changed(
        diagnostic("where", "none", seed=seed, steps=2, batch=4, warmup_steps=0, **optim),
        {"model": {"depth": 1, "width": 8}, "data": {"test_size": 4}},
    )
    return Planned(
        "x", name, "seconds", config, score, arrays=lambda run: {"head": run.model.head.weight.detach()}
    )


def names(folder) -> list[str]:
    return [row.row for row in read_rows("x", folder)]


def test_a_new_folder_is_made_and_holds_rows_and_arrays(tmp_path):
    folder = tmp_path / "new" / "results"
    assert measure_missing([plan("a"), plan("b")], folder / "x.jsonl") == 0
    assert names(folder) == ["a", "b"]
    assert read_arrays("x", "head", folder)["a", 0].shape == (4, 8)
    assert sorted(path.name for path in folder.iterdir()) == ["x.jsonl", "x.safetensors"]


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "train", None)
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="cannot be written to"):
        measure_missing([plan("a")], tmp_path / "file" / "x.jsonl")


def test_a_row_of_another_configuration_does_not_count_as_done(tmp_path):
    path = tmp_path / "x.jsonl"
    measure_missing([plan("a")], path)
    assert measure_missing([plan("a")], path) == 0
    with pytest.raises(ResultsError, match=r"'a', seed 0, of another configuration: optim.lr"):
        measure_missing([plan("a", rate=0.5)], path)
    assert measure_missing([plan("a", seed=1, rate=0.5)], path) == 0


def test_a_row_that_does_not_come_about_is_named_and_the_others_are_measured(tmp_path):
    def diverged(run):
        raise FloatingPointError("no finite loss")

    plans = [plan("a"), plan("b", score=diverged), plan("c")]
    with pytest.raises(ResultsError, match="not measured: b, seed 0: no finite loss"):
        measure_missing(plans, tmp_path / "x.jsonl")
    assert names(tmp_path) == ["a", "c"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_a_row_is_scored_ends_between_two_rows(tmp_path, number):
    def signalled(run):
        os.kill(os.getpid(), number)
        raise AssertionError("nothing is scored behind a signal")

    before = signal.getsignal(number)
    plans = [plan("a"), plan("b", score=signalled), plan("c")]
    assert measure_missing(plans, tmp_path / "x.jsonl") == 2
    assert names(tmp_path) == ["a"] and signal.getsignal(number) is before


def test_a_row_begins_only_where_the_longest_so_far_would_fit(tmp_path, monkeypatch):
    clock, own = [0.0], measuring.measured

    def ten_minutes(planned):
        clock[0] += 600
        return own(planned)

    monkeypatch.setattr(measuring, "measured", ten_minutes)
    monkeypatch.setattr(measuring.time, "monotonic", lambda: clock[0])
    plans = [plan(name) for name in "abcd"]
    assert measure_missing(plans, tmp_path / "x.jsonl", budget_minutes=25) == 2  # a third would end after 30
    assert measure_missing(plans, tmp_path / "x.jsonl", budget_minutes=1) == 1  # one at least
    for minutes in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="budget_minutes"):
            measure_missing(plans, tmp_path / "x.jsonl", budget_minutes=minutes)


def test_a_row_that_another_process_measured_meanwhile_stays_as_it_is(tmp_path, monkeypatch):
    path, own = tmp_path / "x.jsonl", measuring.measured

    def overtaken(planned):
        row, arrays = own(planned)
        append_row(path, dataclasses.replace(row, seconds=1.25))
        return row, arrays

    monkeypatch.setattr(measuring, "measured", overtaken)
    assert measure_missing([plan("a")], path) == 0
    assert [row.seconds for row in read_rows("x", tmp_path)] == [1.25]
    # Arrays of the later run are not laid over those of the row.
    assert read_arrays("x", "head", tmp_path) == {}


def test_a_stopped_run_is_no_row(monkeypatch):
    def stopped(config, open_data):
        run = own(config, open_data=open_data)
        run.interrupted = "SIGTERM"
        return run

    own = measuring.train
    monkeypatch.setattr(measuring, "train", stopped)
    with pytest.raises(Stopped, match="SIGTERM"):
        measuring.measure(plan("a"))
