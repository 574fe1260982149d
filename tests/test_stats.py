"""What a few seeds resolve, what many claims at once cost; predictions of the synthetic tasks."""

import math

import pandas
import pytest
import torch
from helpers import make_result

from cpvt.errors import ResultsError
from cpvt.lab import stats
from cpvt.lab.experiments import ENCODINGS, GRIDS, POOLS, jobs
from cpvt.lab.results import NOT_YET, append, complete, read

T = "top1@8"
A, B, C = ({"encoding": text} for text in ("none", "learned", "sine"))


def table(values: dict[str, list[float]], experiment="x", **columns) -> pandas.DataFrame:
    """Encoding -> values, one a seed."""
    same = {"experiment": experiment, "scale": "s", "dataset": "d", "dataset_sha256": "0" * 64, **columns}
    rows = [(encoding, seed, value) for encoding, found in values.items() for seed, value in enumerate(found)]
    return pandas.DataFrame(rows, columns=["encoding", "seed", T]).assign(**same)


def test_spread_of_known_values_and_a_line_for_each_row():
    found = stats.spread([70.0, 72.0, 74.0])
    assert (found.mean, found.min, found.max, found.n) == (72.0, 70.0, 74.0, 3)
    half = 4.302652729911275 * 2 / math.sqrt(3)  # the printed tables have 4.3027 for two degrees of freedom
    assert math.isclose(found.high - 72, half, rel_tol=1e-9) and math.isclose(72 - found.low, half)
    assert str(found) == "72.0 ± 5.0 (3 seeds)"
    assert stats.spread([70.0, 72.0]).low is None and str(stats.spread([70.0])) == "70.0 (one seed)"
    with pytest.raises(ResultsError):
        stats.spread([])
    rows = table({"none": [50, 60, 70], "sine": [1, 2], "peg": [math.nan, 5]})
    found = stats.over_seeds(rows, T, ["encoding"])
    assert found.loc["none"].tolist() == [60, 50, 70] and found.loc["peg"].tolist() == [5, 5, 5]
    assert list(stats.over_seeds(rows, "top1@99", ["encoding"])) == list(found)
    with pytest.raises(ResultsError, match="more than one row a seed"):
        stats.over_seeds(pandas.concat([rows, rows]), T, ["encoding"])


def test_p_values_and_intervals_say_the_same_and_hold_the_truth_95_times_in_100():
    draws = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spreads = [stats.spread(values) for values in draws.tolist()]
    for level, inside in ((0.05, 0.95), (0.5, 0.5)):
        share = sum(stats.p_value(one) > level for one in spreads) / len(draws)
        assert abs(share - inside) < 3 * math.sqrt(inside * (1 - inside) / len(draws))
    assert all((one.low <= 0 <= one.high) == (stats.p_value(one) > 0.05) for one in spreads)
    found = stats.spread([1.0, 2.0, 3.0, 4.0])
    half = found.high - found.mean
    at_the_edge = stats.spread([value - found.mean + half for value in (1.0, 2.0, 3.0, 4.0)])
    assert stats.p_value(at_the_edge) == pytest.approx(0.05, abs=1e-9)
    assert stats.p_value(found) < 0.05 < stats.p_value(stats.spread([-1.0, 2.0, 0.5]))
    assert stats.p_value(stats.spread([5.0, 5.1])) == 1.0


def test_differences_and_combinations_pair_by_seed():
    rows = table({"none": [5.0, 6.0, 9.0], "learned": [1.0, 2.0, 3.0], "sine": [0.0, 1.0]})
    found = stats.paired_difference(rows, A, B, T)
    assert (found.mean, found.n) == (pytest.approx(14 / 3), 3)
    assert found == stats.combination(rows, *stats.ahead(A, B))
    assert stats.paired_difference(rows, A, {"encoding": "peg"}, T) is None
    both = stats.combination(rows, *stats.ahead(A, B), (1, C, T))
    assert both.n == 2 and both.mean == pytest.approx((4 + 5) / 2)
    assert stats.paired_difference(rows, A, B, "top1@28") is None


def test_rows_of_different_origin_are_not_compared_or_joined():
    """Of the recorded ones, three runs of `synthetic` stand in `pooling` again, with the same seeds."""
    for column in ("experiment", "scale", "dataset", "dataset_sha256"):
        rows = table({"none": [5.0, 6.0], "learned": [1.0, 2.0]})
        rows.loc[0, column] = "another"
        with pytest.raises(ResultsError, match=f"seed 0: .*{column}"):
            stats.paired_difference(rows, A, B, T)
    both = pandas.concat([read("synthetic"), read("pooling")])
    five = {"task": "where", "encoding": "peg(positions=(0, 1, 2, 3, 4))"}
    with pytest.raises(ResultsError, match="more than one row a seed, of pooling, synthetic"):
        stats.paired_difference(both, five | {"global_pool": "avg"}, five, "top1@10")
    short, long = table({"peg": [1.0]}, "short"), table({"learned": [2.0]}, "long")
    together, terms = pandas.concat([short, long]), stats.ahead({"encoding": "peg"}, B)
    with pytest.raises(ResultsError, match="different experiment"):
        stats.combination(together, *terms)


def test_pairing_by_image_cancels_what_is_hard_for_both(tmp_path):
    hard = torch.arange(800) % 2 == 0
    other = hard.clone()
    other[:8] = False
    for encoding, hits in (("none", hard), ("learned", other)):
        bits = hits.view(-1, 8).int() @ (2 ** torch.arange(7, -1, -1)).int()
        row = make_result("x", columns={"encoding": encoding})
        append(row, tmp_path, arrays={"correct": bits.to(torch.uint8)})
    gap, half = stats.gap_by_image("x", A, B, 800, tmp_path)
    unpaired = 1.96 * 100 * math.sqrt(2 * 0.25 / 800)
    assert gap == pytest.approx(0.5) and half < unpaired / 5
    assert stats.gap_by_image("x", A, C, 800, tmp_path) is None


def test_verdicts_stop_at_the_first_that_fails_and_claims_are_judged_together():
    assert stats.holm([0.01, 0.04, 0.03]) == [True, False, False]
    assert stats.holm([0.01, 0.04, 0.02]) == [True, True, True] and stats.holm([]) == []
    clear, against = stats.spread([1.0, 1.1, 0.9]), stats.spread([-2.0, -2.1, -1.9, -2.0])
    noise = stats.spread([1.0, -1.0, 0.5])
    words = ["supported", "contradicted", "not resolved", NOT_YET]
    assert stats.verdicts([clear, against, noise, None]) == words
    weak = stats.spread([1.0, 1.3, 0.8])  # below 0.05 alone, above 0.05 / 4 among four
    assert stats.verdicts([weak]) == ["supported"]
    assert stats.verdicts([weak, None, None, None])[0] == "not resolved"
    values = {"none": [50.0 + seed for seed in range(5)]}
    values |= {"learned": [52.0 + seed + 0.01 * (seed % 2) for seed in range(5)]}
    values |= {"sine": [50.0 + seed + (-1) ** seed for seed in range(5)]}
    pairs = {"learned": (B, A), "none": (A, B), "sine": (C, A), "peg": ({"encoding": "peg"}, A)}
    reasons = zip(pairs.items(), "abcd", strict=True)
    claims = {name: stats.Claim(stats.ahead(*pair, T), reason) for (name, pair), reason in reasons}
    judged = stats.judge(table(values), claims)
    assert judged["verdict"].tolist() == ["supported", "contradicted", "not resolved", NOT_YET]
    assert judged.loc["learned", "difference"].mean == pytest.approx(2.004)
    assert judged["reason"].tolist() == [*"abcd"]


def test_every_claim_is_about_core_rows():
    planned = {(*job.columns.items(),): set() for job in jobs("photographs", only="core")}
    for job in jobs("photographs", only="core"):
        planned[(*job.columns.items(),)].add(job.config.run.seed)
    assert len(stats.CLAIMS) <= 12 and len({claim.reason for claim in stats.CLAIMS.values()}) > 8
    metrics = {"top1@8", "top1@16", "kept/window4", "map_error/window/interior/pattern"}
    for claim in stats.CLAIMS.values():
        assert sum(weight for weight, _, _ in claim.terms) == 0 and claim.reason
        for _, columns, metric in claim.terms:
            assert len(planned[(*complete("photographs", columns).items(),)]) == 5 and metric in metrics


def test_predictions_follow_the_theory_and_are_judged_by_all_seeds():
    assert stats.arrangement_ceiling(0, 2) == 50  # nothing spreads: a coin
    assert [stats.arrangement_ceiling(1, d) for d in (2, 3, 9)] == [100, 50, 50]
    # The borders help, though the order itself is out of reach.
    assert 50 < stats.arrangement_ceiling(2, 5) < 100
    prediction = stats.Prediction("solves", 95.0, 100.0)
    found = [prediction.verdict(values) for values in ([95, 100], [94.9, 50], [94.9, 95])]
    assert found == ["supported", "contradicted", "not resolved"]
    tops = [stats.predicted("where", f"peg(positions={tuple(range(k))})").high for k in (1, 2, 3)]
    assert tops == sorted(tops) and tops[0] < tops[2] == 100
    judged = stats.judge_predictions(read("synthetic"))
    assert len(judged) == len(GRIDS) * len(ENCODINGS) * len(POOLS)
    assert set(judged["verdict"]) == {"supported", "contradicted", "not resolved"}
    row = judged.query("task == 'where' and encoding == 'none' and global_pool == 'avg'").iloc[0]
    assert (row["word"], row["verdict"]) == ("chance", "supported") and len(row["values"]) == 3
    rotary = read("synthetic").query("task == 'what' and encoding == 'rotary'")
    untrained = rotary.assign(**{stats.TRAINED: 60})
    assert set(stats.judge_predictions(untrained)["verdict"]) == {"not resolved"}
    assert len(stats.judge_predictions(read("synthetic")[:0])) == 0
