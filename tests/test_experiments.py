"""Every row of every table is a configuration; the recorded rows are those that are planned."""

import json
from itertools import product

import pytest
import torch

from cpvt.config import TrainConfig, from_json, replace, to_json
from cpvt.data.transforms import crop_boxes
from cpvt.errors import ConfigError, ResultsError
from cpvt.lab import experiments as lab
from cpvt.lab.experiments import EXPERIMENTS, jobs, photograph_config, synthetic_config
from cpvt.lab.photographs import TRAINED_ON
from cpvt.lab.results import COLUMNS, read, recorded
from cpvt.model.vit import VisionTransformer

COUNTS = {"synthetic": 252, "padding": 18, "pooling": 26, "pictures": 6, "pipelines": 6, "pilot": 30}
COUNTS |= {"photographs": 158, "precision": 1}


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


def test_first_seeds_of_the_core_come_first_then_row_by_row():
    seeds = [job.config.run.seed for job in jobs("synthetic")]
    assert seeds == sorted(seeds)
    first = jobs("photographs")[: 5 * len(lab.TABLES["core"])]
    assert [job.config.run.seed for job in first] == sorted(5 * [*range(5)] + 3 * [*range(5)])
    last = [job.columns for job in first if job.config.run.seed == 4]
    assert [row["encoding"] for row in last if not row["mlp_only_blocks"]] == list(lab.CORE)
    padding = [job.config.run.seed for job in jobs("photographs", only="padding")]
    assert padding == 4 * [0, 1, 2]  # row by row


def test_rows_differ_in_their_columns_alone():
    """The same images, length, rate and augmentation; shifted rows have their squares elsewhere."""
    base = photograph_config(encoding="none")
    for job in jobs("photographs"):
        own = {name: getattr(base.model, name) for name in COLUMNS["costs"] if name != "again"}
        model = replace(job.config.model, **own)
        place = "random" if job.columns["shifted"] else "centre"
        assert replace(model, distilled=False) == base.model and job.config.augment.crop_place == place
        augment = replace(job.config.augment, crop_place="centre")
        assert (job.config.data, augment, job.config.optim) == (base.data, base.augment, base.optim)
    other = photograph_config(encoding="none", grid=14)
    assert (base.model.grid, other.model.grid, other.optim) == ((8, 8), (14, 14), base.optim)
    sides, configs = (
        torch.full((256,), 64),
        (photograph_config(encoding="none", shifted=s) for s in (False, True)),
    )
    boxes = [crop_boxes(c.augment, 0, 0, torch.arange(256), sides, sides) for c in configs]
    assert torch.equal(boxes[0][:, 2:], boxes[1][:, 2:]) and (boxes[0][:, 2] == boxes[0][:, 3]).all()
    assert boxes[0][:, 2].min() == 48 and boxes[0][:, 2].max() == 64
    assert torch.equal(boxes[0][:, :2], (64 - boxes[0][:, 2:]) // 2)
    top, left = boxes[1][:, :2].T
    assert set(top.tolist()) == set(range(17)) and not torch.equal(top, left)


def test_paddings_and_the_row_in_float32_differ_in_that_alone():
    zero = synthetic_config("where", "peg")
    for job in jobs("padding"):
        model = replace(job.config.model, encoding="peg")
        assert replace(job.config, model=model, run=zero.run) == zero
    assert {job.columns["encoding"] for job in jobs("padding")} == set(lab.PADDINGS)
    cells = {tuple(job.columns.values()) for job in jobs("synthetic")}
    assert cells == set(product(lab.GRIDS, lab.ENCODINGS, lab.POOLS))
    (job,) = jobs("precision")
    assert job.columns["precision"] == job.config.run.precision == "fp32"
    same = replace(job.config, run=replace(job.config.run, precision="bf16"))
    assert same in [other.config for other in jobs("photographs", only="core")]


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
    planned = jobs("pilot")
    cells = {(job.columns["encoding"], job.config.optim.lr) for job in planned if job.columns["epochs"] == 2}
    assert cells == set(product(lab.CORE, lab.PILOT_RATES))
    assert all(job.config.data.hold_out == 10 for job in planned)
    assert all(job.config.optim.lr == job.columns["lr"] for job in planned)
    short = read("pilot").query("epochs == 2")
    assert short.groupby("lr")["top1@8"].mean().idxmax() == lab.LR and len(short) == len(cells)


def test_a_table_alone_a_root_and_what_an_experiment_has_not():
    alone = jobs("photographs", only="padding")
    assert len(alone) == 12 and len(jobs("photographs", grid=14)) == 158
    for name in TRAINED_ON:
        assert jobs(name, root="/images")[0].config.data.root == "/images"
    wrong = [
        ("photographs", {"only": "pading"}, "'pading'.*padding"),
        ("synthetic", {"root": "/i"}, "no root"),
    ]
    wrong += [
        ("photographs", {"grid": 9}, "grid=9.*8 or of 14"),
        ("photografs", {}, "'photografs'.*photographs"),
    ]
    for name, options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            jobs(name, **options)
    with pytest.raises(ConfigError, match="'when'"):
        synthetic_config("when", "peg")
    with pytest.raises(ResultsError, match="'pool'"):
        photograph_config(encoding="peg", pool="avg")
