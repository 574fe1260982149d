"""Jobs are run once, in order, within a budget; what cannot be measured is named and stops no other."""

import dataclasses
import json
import os
import shutil
import signal
from unittest import mock

import pytest

from cpvt.config import TrainConfig, from_json, replace
from cpvt.data.loader import make_loader
from cpvt.errors import ConfigError, ResultsError, TrainingError
from cpvt.lab.experiments import KEPT, jobs, photograph_config, synthetic_config
from cpvt.lab.kept_models import load_kept
from cpvt.lab.metrics import score_synthetic
from cpvt.lab.results import append, complete, read, read_arrays, recorded, select
from cpvt.lab.runner import RUNNING, Job, _alone, run_job, run_missing, train_teacher, with_teacher
from cpvt.training.distributed import Stopped
from cpvt.training.train import TrainingRun, train


def job(name: str, seed: int = 0, lr: float = 3e-3, score=score_synthetic, **fields) -> Job:
    config = synthetic_config("where", "none", seed=seed)
    config = replace(config, model=replace(config.model, depth=1, width=8))
    optim = replace(config.optim, steps=2, global_batch_size=4, warmup_steps=0, lr=lr)
    kept = {"arrays": lambda run, cache: {"head": run.model.head.weight.detach()}}
    config = replace(config, optim=optim, data=replace(config.data, test_size=4))
    return Job("x", {"row": name}, "seconds", config, score, **kept | fields)


def names(folder) -> list[str]:
    return list(read("x", folder)["row"])


def test_a_new_folder_is_made_and_holds_rows_and_arrays(tmp_path, monkeypatch):
    folder, seen, commits = tmp_path / "new" / "results", [], iter(["before", "after", "later", "last"])
    monkeypatch.setattr("cpvt.lab.results.commit", lambda: next(commits))  # files change while a row trains
    report = lambda result, left: seen.append((result.columns["row"], left))  # noqa: E731
    assert run_missing([job("a"), job("b")], folder, report=report) == 0
    assert names(folder) == ["a", "b"] and seen == [("a", 1), ("b", 0)]
    assert read_arrays("x", "head", folder, row="a")[0].shape == (4, 8)
    assert [result.cpvt_commit for result in recorded("x", folder)] == ["before", "before"]
    size = (folder / "x.jsonl").stat().st_size
    assert run_missing([job("a"), job("b")], folder) == 0  # nothing is measured twice
    assert (folder / "x.jsonl").stat().st_size == size
    row = read("x", folder).iloc[0]
    assert row["device"] == "cpu" and row["steps"] == 2 and row["config"]["model"]["width"] == 8


def test_what_cannot_be_kept_is_refused_before_anything_is_trained(tmp_path):
    never = mock.Mock(side_effect=AssertionError("nothing is trained here"))
    (tmp_path / "file").touch()
    with pytest.raises((ResultsError, OSError), match="file"):
        run_missing([job("a", make_loader=never)], tmp_path / "file" / "results")
    run_missing([job("a")], tmp_path)
    with pytest.raises(ResultsError, match=r"row=a, seed=0.*another configuration.*optim.lr"):
        run_missing([job("a", lr=0.5, make_loader=never)], tmp_path)
    assert run_missing([job("a", seed=1, lr=0.5)], tmp_path) == 0


def test_what_fails_is_named_and_ctrl_c_ends_between_two_rows(tmp_path):
    diverged, stopped = (
        mock.Mock(side_effect=error) for error in (TrainingError("no finite loss"), KeyboardInterrupt)
    )
    with pytest.raises(ResultsError, match="not measured: row=b, seed=0: no finite loss"):
        run_missing([job("a"), job("b", score=diverged), job("c")], tmp_path)
    assert names(tmp_path) == ["a", "c"]

    assert run_missing([job("d"), job("e", score=stopped), job("f")], tmp_path) == 2
    assert names(tmp_path) == ["a", "c", "d"]


def test_a_signal_while_a_run_is_trained_leaves_no_row(tmp_path):
    def signalled(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return make_loader(*arguments, **options)

    with pytest.raises(Stopped, match="SIGTERM"):
        run_job(job("a", make_loader=signalled), "abc", {})
    assert run_missing([job("a", make_loader=signalled)], tmp_path) == 1


def test_a_job_begins_only_where_the_longest_so_far_would_fit(tmp_path):
    now = [0.0]

    def ten_minutes(run, cache):
        now[0] += 600
        return score_synthetic(run)

    plans, clock = [job(name, score=ten_minutes) for name in "abcd"], lambda: now[0]
    assert run_missing(plans, tmp_path, budget_minutes=25, clock=clock) == 2  # a third would end after 30
    assert run_missing(plans, tmp_path, budget_minutes=1, clock=clock) == 1  # one at least
    for minutes in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="budget_minutes"):
            run_missing(plans, tmp_path, budget_minutes=minutes)


def test_two_processes_share_a_list_and_what_another_measured_stays(tmp_path):
    """A row that another process is at is passed over; when that one died, the next call takes it."""
    (tmp_path / RUNNING).mkdir()
    with _alone(job("a"), tmp_path) as mine, _alone(job("a"), tmp_path) as other:
        assert mine and not other
        assert run_missing([job("a"), job("b")], tmp_path) == 0 and names(tmp_path) == ["b"]
    assert run_missing([job("a"), job("b")], tmp_path) == 0 and names(tmp_path) == ["b", "a"]

    tmp_path = tmp_path / "of another"

    def overtaken(run, cache):
        result, *_ = run_job(job("a"), "abc", {})
        append(dataclasses.replace(result, seconds=1.25), tmp_path)
        return score_synthetic(run)

    assert run_missing([job("a", score=overtaken)], tmp_path) == 0
    assert list(read("x", tmp_path)["seconds"]) == [1.25]
    assert read_arrays("x", "head", tmp_path, row="a") == {}  # those of the later run are not laid beside it


def test_weights_are_kept_small_and_come_back(tmp_path):
    def wide(name):
        one = job(name, keep_weights=True)
        model = replace(one.config.model, width=48, mlp_ratio=4.0, heads=2)
        return dataclasses.replace(one, config=replace(one.config, model=model))

    runs = []
    taken = dataclasses.replace(wide("a"), arrays=lambda run, cache: runs.append(run) or {})
    run_missing([taken], tmp_path)
    kept = load_kept("x", tmp_path, row="a")
    assert kept.config == runs[0].model.config and not kept.training
    exact = runs[0].model.state_dict()
    assert list(kept.state_dict()) == list(exact)
    for name, found in kept.state_dict().items():
        assert (found - exact[name]).abs().max() <= exact[name].abs().max() / 100 + 1e-6, name
    (file,) = (tmp_path / "models").iterdir()
    assert file.stat().st_size < 2 * sum(p.numel() for p in kept.parameters()) + 8192
    with pytest.raises(ResultsError, match="no weights are kept of x-b.*x-a"):
        load_kept("x", tmp_path, row="b")


@pytest.mark.parametrize("encoding", KEPT)
def test_kept_weights_have_the_scores_of_their_rows(encoding):
    """Of *where*, drawn anew; half precision may turn an answer or two of 256."""
    (row,) = select(read("pictures"), task="where", encoding=encoding).to_dict("records")
    model = load_kept("pictures", task="where", encoding=encoding)
    run = TrainingRun(model, from_json(TrainConfig, json.dumps(row["config"])))
    found, _, digest = score_synthetic(run)
    assert digest == row["dataset_sha256"]
    for name, value in found.items():
        assert value == pytest.approx(row[name], abs=1), name


@pytest.fixture
def own(tiny_imagenet, tmp_path):
    """Tiny-ImageNet in miniature, for this test alone: teachers are laid beside it."""
    shutil.copytree(tiny_imagenet / "tiny-imagenet-200", tmp_path / "tiny-imagenet-200")
    return tmp_path


def student(own, **optim):
    config = photograph_config(encoding="peg", distilled=True, teacher="resnet10t")
    optim = {"global_batch_size": 8, "epochs": 0, "warmup_epochs": 0, "steps": 2, "warmup_steps": 1, **optim}
    config = replace(config, model=replace(config.model, width=16, heads=2, depth=2))
    data = replace(config.data, root=str(own), stored_size=0, interpolation="bicubic")
    return replace(config, optim=replace(config.optim, **optim), data=data)


def test_a_teacher_is_trained_once_on_the_students_images(own):
    taught, metrics = with_teacher(student(own))
    file, _ = sorted((own / "teachers").iterdir(), key=lambda path: path.suffix == ".lock")
    assert taught.distill.weights == str(file) and 0 <= metrics["teacher_top1"] <= 100
    when = file.stat().st_mtime_ns
    assert with_teacher(student(own)) == (taught, metrics) and file.stat().st_mtime_ns == when
    assert train(taught).model.config.distilled
    other = replace(taught, distill=student(own).distill, run=replace(taught.run, seed=1))
    assert with_teacher(other)[0].distill.weights == str(file)  # students of all seeds have the same teacher
    longer = student(own, steps=3)
    assert with_teacher(longer)[0].distill.weights != str(file)
    assert with_teacher(photograph_config(encoding="peg")) == (photograph_config(encoding="peg"), {})
    model, top1 = train_teacher(student(own, steps=40, lr=3e-3))
    assert top1 > 50 and not model.training  # of two classes


def test_a_synthetic_row_as_it_is_planned(tmp_path):
    """It carries over to the other side what it learnt on one, as the recorded row does."""
    what = {"task": "what", "encoding": "peg"}
    planned = [job for job in jobs("synthetic") if job.columns == complete("synthetic", what)]
    run_missing(planned[:1], tmp_path)
    (row,) = select(read("synthetic", tmp_path), **what).iloc
    recorded_row = select(read("synthetic"), **what).iloc[0]
    for name in ("top1@8x12/unseen", "top1@8x12/trained"):
        assert row[name] > 95 and recorded_row[name] > 95
    for name in ("parameters", "dataset_sha256"):
        assert row[name] == recorded_row[name]
    configs = [from_json(TrainConfig, json.dumps(one["config"])) for one in (row, recorded_row)]
    assert configs[0] == configs[1]
