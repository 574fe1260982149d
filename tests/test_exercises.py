"""What a reader is told whose exercise is not right yet."""

import pytest
import torch

from cpvt.lab.exercises import check, expect


@pytest.mark.parametrize(
    ("came", "expected", "said"),
    [
        (None, 0.5, "expected 0.5, got None"),
        (0.25, 0.5, "expected 0.5, got 0.25"),
        (torch.zeros(2, 3), torch.zeros(3, 2), "shape (3, 2), got a tensor of shape (2, 3)"),
        (None, torch.zeros(3), "shape (3,), got None"),
        (torch.ones(3), torch.zeros(3), "the shape is right, the values are up to 1 off"),
        ({1, 2}, {1}, "expected {1}, got {1, 2}"),
    ],
)
def test_a_wrong_answer_is_told_what_was_expected_what_came_and_a_hint(capsys, came, expected, said):
    check("name", lambda answer: expect("case", answer, expected, "Hint: look."), came)
    out = capsys.readouterr().out
    assert out.startswith("name: not yet. case: ") and said in out and out.endswith("Hint: look.\n")


def test_right_answers_and_broken_code_are_told_apart(capsys):
    for came, expected in ((0.5, 0.5), (torch.ones(2).double(), torch.ones(2)), ([1], [1])):
        check("name", lambda answer, e=expected: expect("case", answer, e, "Hint: none."), came)
    check("name", lambda answer: answer + 1, None)
    *right, broken = capsys.readouterr().out.splitlines()
    assert right == ["name: right"] * 3 and broken.startswith("name: not yet. Your code raised TypeError: ")
