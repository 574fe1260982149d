"""Verdicts: what three seeds resolve, and what many claims at once cost."""

import random
from types import SimpleNamespace

import pytest

from cpvt.errors import ResultsError
from cpvt.lab.results import NOT_YET, difference, spread
from cpvt.lab.stats import combination, holm, p_value, verdicts

T = "top1@14"


def test_a_p_value_is_005_where_the_interval_ends_at_zero():
    found = spread([1.0, 2.0, 3.0, 4.0])
    half = found.high - found.mean
    at_the_edge = spread([value - found.mean + half for value in (1.0, 2.0, 3.0, 4.0)])
    assert p_value(at_the_edge) == pytest.approx(0.05, abs=1e-9)
    assert p_value(found) < 0.05 < p_value(spread([-1.0, 2.0, 0.5]))


def test_chance_is_resolved_as_often_as_the_level_says():
    draw = random.Random(0)
    p = [p_value(spread([draw.gauss(0, 1) for _ in range(5)])) for _ in range(400)]
    assert abs(sum(value < 0.05 for value in p) / 400 - 0.05) < 0.0436  # 4 standard errors
    assert abs(sum(value < 0.5 for value in p) / 400 - 0.5) < 0.1


def test_two_seeds_resolve_nothing():
    assert p_value(spread([5.0, 5.1])) == 1.0
    assert verdicts([spread([5.0, 5.1])]) == ["not resolved"]


def test_holm_stops_at_the_first_that_fails():
    assert holm([0.01, 0.04, 0.03]) == [True, False, False]
    assert holm([0.01, 0.04, 0.02]) == [True, True, True]
    assert holm([]) == []


def test_verdicts_and_what_is_not_measured():
    clear, against = spread([1.0, 1.1, 0.9]), spread([-2.0, -2.1, -1.9, -2.0])
    noise = spread([1.0, -1.0, 0.5])
    assert verdicts([clear, against, noise, None]) == ["supported", "contradicted", "not resolved", NOT_YET]
    weak = spread([1.0, 1.3, 0.8])  # below 0.05 alone, above 0.05 / 4 among four
    assert verdicts([weak]) == ["supported"] and verdicts([weak, None, None, None])[0] == "not resolved"


def test_combinations_pair_by_seed():
    rows = [
        SimpleNamespace(
            row=name,
            seed=seed,
            experiment="x",
            scale="s",
            dataset_sha256="0" * 64,
            metrics={"top1@14": value},
        )
        for name, values in {"a": [5.0, 6.0, 9.0], "b": [1.0, 2.0, 3.0], "c": [0.0, 1.0]}.items()
        for seed, value in enumerate(values)
    ]
    assert combination(rows, (1, "a", T), (-1, "b", T)) == difference(rows, "a", "b", T)
    both = combination(rows, (1, "a", T), (-1, "b", T), (1, "c", T))
    assert both.n == 2 and both.mean == pytest.approx((4 + 5) / 2)
    assert combination(rows, (1, "a", T), (-1, "d", T)) is None
    rows[0].dataset_sha256 = "1" * 64
    for compare in (
        lambda: difference(rows, "a", "b", T),
        lambda: combination(rows, (1, "a", T), (-1, "b", T)),
    ):
        with pytest.raises(ResultsError, match="different images"):
            compare()
