"""The rows behind the claims on class token and pooling: fresh seeds, and nothing else that is new."""

import dataclasses

from cpvt.lab.experiments import HINTS, READOUTS, diagnostics, readouts
from cpvt.lab.results import read_rows
from cpvt.lab.tables import FIVE


def test_fresh_seeds_and_nothing_else_differ_from_the_matrix():
    matrix = {(p.row, p.config.run.seed): p.config for p in diagnostics()}
    short = [p for p in readouts(repeated=()) if "steps" not in p.row]
    assert {(p.row, p.config.run.seed) for p in short} == {
        (f"{task}, {encoding}, {global_pool}", seed)
        for task, encoding in HINTS
        for global_pool in READOUTS
        for seed in range(3, 8)
    }
    for plan in short:
        assert plan.experiment == "readouts" and (plan.row, plan.config.run.seed) not in matrix
        seeded = dataclasses.replace(plan.config, run=dataclasses.replace(plan.config.run, seed=0))
        assert seeded == matrix[plan.row, 0]


def test_what_is_repeated_stands_in_the_matrix_with_the_same_seed():
    matrix = {(p.row, p.config.run.seed): p.config for p in diagnostics()}
    repeated = list(readouts(seeds=(), long=()))
    assert [p.config.run.seed for p in repeated] == [0, 1, 2]
    for plan in repeated:
        assert plan.config == matrix[plan.row, plan.config.run.seed] and plan.row.endswith("gap")


def test_the_long_rows_differ_in_their_steps_alone():
    short = {p.config.run.seed: p.config for p in readouts(repeated=()) if p.row == f"where, {FIVE}, gap"}
    long = [p.config for p in readouts() if p.row == f"where, {FIVE}, gap, 2000 steps"]
    assert len(long) == 3
    for config in long:
        optim = dataclasses.replace(config.optim, steps=500)
        assert config.optim.steps == 2000
        assert dataclasses.replace(config, optim=optim) == short[config.run.seed]


def test_recorded_rows_are_those_that_were_planned():
    planned = {(p.row, p.config.run.seed): p.config for p in readouts()}
    for row in read_rows("readouts"):
        config = planned[row.row, row.seed]
        assert row.config["model"]["encoding"] == config.model.encoding
        assert row.config["model"]["global_pool"] == config.model.global_pool
        assert row.config["optim"]["steps"] == config.optim.steps
