"""The evaluation's report, by hand."""

import pytest

from rl.evaluate import Outcome, report

OUTCOMES = [Outcome(True, 1, 1.0), Outcome(True, 3, 1.0), Outcome(False, 2, 0.25), Outcome(False, 4, -0.25)]


def test_report_by_hand():
    found = report(OUTCOMES, max_turns=4)
    assert (found.n, found.success, found.mean_turns, found.mean_reward) == (4, 0.5, 2.5, 0.5)
    # one success within a turn, none more within two, the second one in the third
    assert found.success_by_turn_budget == {1: 0.25, 2: 0.25, 3: 0.5, 4: 0.5}


def test_the_full_budget_is_the_success_and_no_smaller_budget_is_above_it():
    found = report(OUTCOMES, max_turns=6)
    shares = list(found.success_by_turn_budget.values())
    assert shares == sorted(shares)
    assert shares[-1] == found.success


def test_an_evaluation_has_tasks():
    with pytest.raises(AssertionError):
        report([], 3)
