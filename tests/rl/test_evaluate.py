"""The evaluation's report, by hand and against simulation."""

import random
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest

from rl.evaluate import Outcome, paired_difference, pass_at_k, report, slope, success_interval

OUTCOMES = [
    [Outcome(True, 1, 1.0, 10, 0, False, 1.0)],
    [Outcome(True, 3, 1.0, 20, 1, False, 2.0)],
    [Outcome(False, 2, 0.25, 30, 0, True, 3.0)],
    [Outcome(False, 4, -0.25, 40, 1, False, 6.0)],
]


def test_report_by_hand():
    found = report(OUTCOMES, max_turns=4)
    assert (found.n, found.samples, found.success, found.mean_turns, found.mean_reward) == (4, 1, 0.5, 2.5, 0.5)
    # one success within a turn, none more within two, the second one in the third
    assert found.success_by_turn_budget == {1: 0.25, 2: 0.25, 3: 0.5, 4: 0.5}
    assert found.turn_slope == pytest.approx(0.1)  # (-1.5 * -.125 - .5 * -.125 + .5 * .125 + 1.5 * .125) / 5
    assert (found.mean_tokens, found.tool_errors, found.truncated, found.mean_seconds) == (25, 0.2, 0.25, 3)
    assert found.pass_at == {1: 0.5}


def test_the_full_budget_is_the_success_and_no_smaller_budget_is_above_it():
    found = report(OUTCOMES, max_turns=6)
    shares = list(found.success_by_turn_budget.values())
    assert shares == sorted(shares)
    assert shares[-1] == found.success


def test_several_episodes_a_task():
    rows = [[True, True, False, False], [True, False, False, False], [False] * 4]
    found = report([[Outcome(s, 1, float(s)) for s in row] for row in rows], max_turns=1)
    assert (found.n, found.samples, found.success) == (3, 4, 0.25)
    # two successes in four: of the six pairs one holds none; one in four: three of six hold it
    assert found.pass_at == pytest.approx({1: 0.25, 2: (5 / 6 + 3 / 6) / 3, 4: 2 / 3})


@pytest.mark.parametrize("tasks", [[], [[]], [[Outcome(True, 1, 1.0)], []]])
def test_an_evaluation_has_tasks_and_the_same_number_of_episodes_each(tasks):
    with pytest.raises(AssertionError):
        report(tasks, 3)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (8, 3, 8)])
def test_pass_at_k_is_the_share_of_all_choices_of_k(n, c, k):
    choices = [any(chosen) for chosen in combinations([True] * c + [False] * (n - c), k)]
    assert pass_at_k(n, c, k) == pytest.approx(fmean(choices))


def test_pass_at_more_than_was_played_is_refused():
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at_k(2, 1, 3)


def test_wilsons_interval_by_its_published_figures():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                                    (1, 29, 0.0061, 0.1718)):  # fmt: skip
        found = success_interval([[i < successes] for i in range(n)])
        assert found == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("samples", [1, 8])
def test_an_interval_holds_the_truth_as_often_as_it_says(samples):
    """Tasks of unlike difficulty, whose mean success is one half: also where episodes of a task are alike."""
    rng, held = random.Random(samples), 0
    for _ in range(1000):
        tasks = [[rng.random() < p for _ in range(samples)] for p in (rng.random() for _ in range(60))]
        low, high = success_interval(tasks)
        held += low <= 0.5 <= high
    assert 0.93 <= held / 1000 <= 0.97


def test_the_slope_is_numpys():
    values = {1: 0.1, 2: 0.4, 3: 0.35, 4: 0.6}
    assert slope(values) == pytest.approx(np.polyfit(list(values), list(values.values()), 1)[0])
    assert slope({1: 0.3}) == 0


def test_a_paired_difference_by_hand():
    first, second = {"a": 0.0, "b": 0.5, "c": 1.0, "x": 0.0}, {"a": 1.0, "b": 0.5, "c": 1.0, "y": 1.0}
    found = paired_difference(first, second)
    # 1, 0, 0: mean 1/3, standard deviation sqrt(1/3), half-width 1.96 / 3
    assert (found.n, found.mean) == (3, pytest.approx(1 / 3))
    assert (found.low, found.high) == pytest.approx((1 / 3 - 1.959964 / 3, 1 / 3 + 1.959964 / 3))
    assert not found.beyond_noise
    assert paired_difference({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}).beyond_noise
    with pytest.raises(ValueError, match="1 tasks were played in both"):
        paired_difference({"a": 0.0}, {"a": 1.0, "b": 0.0})


def test_pairing_finds_what_the_tasks_difficulty_hides():
    """The same rise of 0.05 on tasks between 0 and 1: found with pairs, lost in the noise of two samples."""
    rng = random.Random(0)
    first = {str(i): rng.uniform(0, 0.9) for i in range(100)}
    second = {task: p + 0.05 + rng.uniform(-0.05, 0.05) for task, p in first.items()}
    assert paired_difference(first, second).beyond_noise
    apart = {f"{task}'": p for task, p in second.items()}
    shuffled = dict(zip(first, rng.sample(list(apart.values()), 100), strict=True))
    assert not paired_difference(first, shuffled).beyond_noise
