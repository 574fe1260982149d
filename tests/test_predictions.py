"""Predictions of the diagnostics: ceilings that the drawn pictures have, and verdicts that can go either way."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cpvt.data.synthetic import draw
from cpvt.lab.experiments import ENCODINGS, GRIDS, READOUTS
from cpvt.lab.predictions import Prediction, arrangement_ceiling, judge, predicted, where_ceiling
from cpvt.lab.results import read_rows

CHAPTER = Path(__file__).parent.parent / "book" / "where_and_how_many.ipynb"


@pytest.mark.parametrize("reach", [-1, 0, 1, 3, 5])
def test_the_drawn_pictures_have_these_ceilings(reach):
    for distance in range(5):
        sample = draw("where", range(4096), grid=(10, 10), split="val", distances=(distance,))
        drawn = 100 * float((0.5 ** (sample.border > reach).sum(1)).mean())
        assert abs(drawn - where_ceiling(reach, distance)) < 2.5


def test_order_is_known_up_to_two_spreads():
    assert arrangement_ceiling(0, 2) == 50  # nothing spreads: a coin
    assert [arrangement_ceiling(1, d) for d in (2, 3, 9)] == [100, 50, 50]
    assert 50 < arrangement_ceiling(2, 5) < 100  # the borders help, though the order itself is out of reach


def test_verdicts():
    prediction = Prediction("solves", 95.0, 100.0)
    assert prediction.verdict([95, 100]) == "supported"
    assert prediction.verdict([94.9, 50]) == "contradicted"
    assert prediction.verdict([94.9, 95]) == "not resolved"


def test_wider_reach_never_predicts_less():
    tops = [predicted("where", f"peg(positions={tuple(range(k))})").high for k in (1, 2, 3)]
    assert tops == sorted(tops) and tops[0] < tops[2] == 100


def test_the_recorded_rows_are_judged_as_in_the_chapter():
    """Which has the same rule written out, and prints how often each verdict fell."""
    rows = read_rows("diagnostics")
    tally = Counter(
        judge(rows, task, encoding, global_pool)[0]
        for task in GRIDS
        for encoding in ENCODINGS
        for global_pool in READOUTS
    )
    printed = "".join(
        "".join(output.get("text", ""))
        for cell in json.loads(CHAPTER.read_text())["cells"]
        for output in cell.get("outputs", ())
    )
    assert set(tally) == {"supported", "contradicted", "not resolved"}
    for word, count in tally.items():
        assert f"{word:14s}{count:3d}\n" in printed


def test_a_row_that_is_missing_has_no_verdict():
    assert judge([], "where", "peg", "class") is None
