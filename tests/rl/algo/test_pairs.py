"""Mined pairs: right sides, no needless reuse, margins."""

from collections import Counter
from random import Random

import pytest

from rl.algo.pairs import by_margin, right_against_wrong


@pytest.mark.parametrize("seed", range(20))
def test_a_success_is_chosen_and_a_failure_rejected(seed):
    successes = [False, True, False, True, True]
    pairs = right_against_wrong(successes, Random(seed), per_task=6)
    assert len(pairs) == 6
    assert all(successes[chosen] and not successes[rejected] for chosen, rejected in pairs)


@pytest.mark.parametrize("successes", [[True, True], [False, False, False], []])
def test_a_task_that_is_always_or_never_solved_has_no_pair(successes):
    assert right_against_wrong(successes, Random(0), per_task=3) == []


@pytest.mark.parametrize(("right", "wrong"), [(1, 1), (1, 4), (4, 1), (2, 2), (2, 3), (2, 4), (3, 3), (4, 6)])
def test_every_pair_comes_once_and_no_side_is_reused_early(right, wrong):
    """After any number of pairs, the uses of two episodes of one side differ by at most one."""
    pairs = right_against_wrong([True] * right + [False] * wrong, Random(0), per_task=1000)
    assert len(set(pairs)) == len(pairs) == right * wrong
    for count in range(len(pairs) + 1):
        chosen, rejected = (Counter(pair[side] for pair in pairs[:count]) for side in (0, 1))
        for uses, size in ((chosen, right), (rejected, wrong)):
            assert max(uses.values(), default=0) <= -(-count // size)


def test_one_pair_a_task_unless_more_are_asked_for():
    assert len(right_against_wrong([True, True, False, False], Random(0))) == 1


def test_pairs_are_random_and_the_generator_decides_them():
    """1,000 single pairs of 2 x 2: each of the four about 250 times (standard deviation 14)."""
    successes = [True, False, True, False]
    seen = Counter(right_against_wrong(successes, Random(seed))[0] for seed in range(1000))
    assert set(seen) == {(0, 1), (0, 3), (2, 1), (2, 3)}
    assert all(180 < n < 320 for n in seen.values())
    again = [right_against_wrong(successes, Random(7), per_task=4) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("margin", "per_task", "expected"),
    [
        # rewards 0.5, -1, 3, 0, 2, 1.5: sorted 3 (2), 2 (4), 1.5 (5), 0.5 (0), 0 (3), -1 (1)
        (0.0, 1, [(2, 1)]),
        (0.0, 9, [(2, 1), (4, 3), (5, 0)]),  # differences 4, 2, 1
        (1.0, 9, [(2, 1), (4, 3)]),  # a difference of the margin is dropped
        (0.99, 9, [(2, 1), (4, 3), (5, 0)]),
        (3.0, 9, [(2, 1)]),
        (4.0, 9, []),
    ],
)
def test_margins_by_hand(margin, per_task, expected):
    rewards = [0.5, -1.0, 3.0, 0.0, 2.0, 1.5]
    assert by_margin(rewards, Random(0), margin=margin, per_task=per_task) == expected


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0, 1.0], [2.0], []])
def test_equal_rewards_or_a_single_episode_make_no_pair(rewards):
    assert by_margin(rewards, Random(0), margin=0.0, per_task=3) == []


def test_ties_are_broken_at_random():
    """Coming first in the group is no merit: each of the three best is chosen about 167 times of 500."""
    chosen = Counter(by_margin([1.0, 1.0, 1.0, 0.0], Random(seed), margin=0.5)[0] for seed in range(500))
    assert set(chosen) == {(0, 3), (1, 3), (2, 3)}
    assert all(120 < n < 215 for n in chosen.values())
