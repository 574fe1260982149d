"""Every row of every table is a configuration; the recorded rows are those that are planned."""

import json
from itertools import product

import pytest
import torch

from cpvt.config import TrainConfig, from_json, replace, to_json
from cpvt.data.transforms import crop_boxes
from cpvt.errors import ConfigError, ResultsError
from cpvt.lab import experiments as lab
from cpvt.lab.experiments import EXPERIMENTS, jobs, synthetic_config, table_config, table_rows
from cpvt.lab.results import COLUMNS, recorded
from cpvt.model.vit import VisionTransformer
from cpvt.training.optim import resolve

COUNTS = {"synthetic": 252, "padding": 18, "pooling": 26, "pipelines": 6, "tuning": 24, "tables": 204}
COUNTS |= {"fashion-tuning": 15, "fashion": 80, "fashion-length": 24}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_is_one_configuration_that_builds_and_recorded_rows_are_planned(name):
    planned = jobs(name)
    assert len({job.key for job in planned}) == len(planned) == COUNTS[name]
    different = {to_json(replace(job.config, run=replace(job.config.run, seed=0))) for job in planned}
    rows = {tuple(job.columns.items()) for job in planned}
    assert len(rows) == len(different) or name == "pipelines"  # there the loader differs
    for job in planned:
        assert job.experiment == name and list(job.columns) == list(COLUMNS[name])
        assert job.columns.get("encoding", "peg") == job.config.model.encoding  # in its one spelling
        assert from_json(TrainConfig, to_json(job.config)) == job.config
    with torch.device("meta"):
        for model in {job.config.model for job in planned}:
            VisionTransformer(model)
    configs = {job.key: job.config for job in planned}
    for result in recorded(name):
        assert configs[result.key] == from_json(TrainConfig, json.dumps(result.config)), result.label


def test_first_seeds_come_first_and_what_claims_rest_on():
    seeds = [job.config.run.seed for job in jobs("synthetic")]
    assert seeds == sorted(seeds)
    ranks = {tuple(row.items()): rank for rank, rows in table_rows().items() for row in rows}
    planned = [(ranks[tuple(job.columns.items())], job.config.run.seed) for job in jobs("tables")]
    assert planned == sorted(planned, key=lambda job: (list(lab.TABLE_SEEDS).index(job[0]), job[1]))
    assert {seed for rank, seed in planned if rank == "claim"} == set(range(5))


def test_parts_of_the_images_keep_the_number_of_steps():
    whole = table_config(encoding="learned")
    for images in (5_000, 15_000):
        part = table_config(encoding="learned", epochs=0, limit=images)
        both = resolve(whole, 50_000 // 1024).optim, resolve(part, images // 1024).optim
        assert both[0].steps == both[1].steps and both[0].warmup_steps == both[1].warmup_steps


def test_rows_without_scale_jitter_still_see_images_shifted():
    augment = table_config(encoding="none", scale_jitter=False).augment
    sides = torch.full((64,), 64)
    boxes = crop_boxes(augment, 0, 0, torch.arange(64), sides, sides)
    assert (boxes[:, 2:] == 56).all() and boxes[:, 0].unique().tolist() == boxes[:, 1].unique().tolist()
    assert set(boxes[:, 0].tolist()) == set(range(9))


def test_every_padding_differs_from_zero_padding_in_the_encoding_alone():
    zero = synthetic_config("where", "peg")
    for job in jobs("padding"):
        model = replace(job.config.model, encoding="peg")
        assert replace(job.config, model=model, run=zero.run) == zero
    assert {job.columns["encoding"] for job in jobs("padding")} == set(lab.PADDINGS)
    cells = {tuple(job.columns.values()) for job in jobs("synthetic")}
    assert cells == set(product(lab.GRIDS, lab.ENCODINGS, lab.POOLS))


def test_pooling_asks_again_on_fresh_seeds_and_pipelines_change_the_loader_alone():
    matrix = {job.key[2:]: job.config for job in jobs("synthetic")}
    for job in jobs("pooling"):
        row, config = dict(job.columns), job.config
        assert config.optim.steps == row.pop("max_steps")
        first = matrix[tuple(row.items()), 0]
        same = replace(config, run=first.run, optim=replace(config.optim, steps=500))
        assert same == first and (config.run.seed in range(3, 8) or row["encoding"] == lab.FIVE)
    planned = jobs("pipelines")
    for ours, theirs in zip(planned[::2], planned[1::2], strict=True):
        assert ours.config == theirs.config and ours.make_loader != theirs.make_loader
        assert (ours.columns["pipeline"], theirs.columns["pipeline"]) == ("cpvt", "timm")


def test_learning_rates_are_tuned_alike_and_without_a_look_at_the_validation_images():
    for name, rates in (("tuning", lab.TABLE_RATES), ("fashion-tuning", lab.FASHION_RATES)):
        cells = {(job.columns["encoding"], job.config.optim.lr) for job in jobs(name)}
        assert cells == {(job.columns["encoding"], lr) for job in jobs(name) for lr in rates}
        assert all(job.config.data.hold_out == 10 for job in jobs(name))
        assert all(job.config.optim.lr == job.columns["lr"] for job in jobs(name))


def test_a_table_alone_a_root_and_what_an_experiment_has_not():
    alone = jobs("tables", table="padding")
    assert len(alone) == 34
    assert {job.columns["encoding"] for job in alone} >= {"none", "peg", "peg(skip=False)"}
    for name in ("tables", "tuning", "fashion", "fashion-tuning", "fashion-length"):
        assert jobs(name, root="/images")[0].config.data.root == "/images"
    for name, options, message in (
        ("tables", {"table": "pading"}, "'pading'.*padding"),
        ("synthetic", {"root": "/images"}, "no root"),
        ("fashon", {}, "'fashon'.*fashion"),
    ):
        with pytest.raises(ConfigError, match=message):
            jobs(name, **options)
    with pytest.raises(ConfigError, match="'when'"):
        synthetic_config("when", "peg")
    with pytest.raises(ResultsError, match="'pool'"):
        table_config(encoding="peg", pool="avg")
