"""Rewards and returns of turns, and the tokens they lie on: by hand, and the sums written out again with numpy."""

import numpy as np
import pytest
import torch

from rl.algo.returns import (
    dense_rewards,
    discounted_returns,
    epo_advantages,
    on_last_token,
    outcome_rewards,
    over_tokens,
    turn_rewards,
)

GIVEN = torch.tensor([0.25, -0.5, 1.0])


def test_the_outcome_and_all_turn_rewards_lie_on_the_last_turn():
    assert outcome_rewards(GIVEN, 2.0).tolist() == [0.0, 0.0, 2.75]


def test_each_turn_keeps_its_own_and_the_last_gets_the_outcome():
    given = GIVEN.clone()
    assert turn_rewards(given, 2.0).tolist() == [0.25, -0.5, 3.0]
    assert torch.equal(given, GIVEN)  # the caller's rewards are not written to


def test_an_episode_without_turns_is_given_nothing():
    nothing = torch.tensor([])
    for rule in (outcome_rewards, turn_rewards):
        assert rule(nothing, 1.0).shape == (0,)
    assert epo_advantages(nothing, 0.9).shape == (0,)


@pytest.mark.parametrize(
    ("gains", "won", "max_total", "expected"),
    [
        ([1.0, 0.0, 1.0, 2.0], True, 8.0, [1 / 3, 0.0, 1 / 3, 2 / 3]),  # three positive gains; the maximum is ignored
        ([1.0, -1.0, 1.0], True, 8.0, [0.5, -0.5, 0.5]),  # a loss is scaled too, but is no positive gain
        ([1.0, 0.0, 1.0, 2.0], False, 8.0, [0.125, 0.0, 0.125, 0.25]),
        ([0.5, 0.0], False, 0.25, [0.5, 0.0]),  # never divided by less than 1
        ([0.0, -2.0], True, 4.0, [0.0, -2.0]),  # won without any gain
    ],
)
def test_dense_rewards_by_hand(gains, won, max_total, expected):
    assert dense_rewards(torch.tensor(gains), won, max_total).tolist() == pytest.approx(expected)


def test_discounted_returns_by_hand():
    """4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3."""
    assert discounted_returns(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns_agree_with_their_sum(gamma):
    rewards = np.random.default_rng(0).normal(size=8)
    expected = [sum(gamma ** (j - k) * rewards[j] for j in range(k, 8)) for k in range(8)]
    np.testing.assert_allclose(discounted_returns(torch.tensor(rewards), gamma).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.0, 1.0, 0.0, 1.0], [0.5, 1.0, 0.4, 0.8]),  # returns 0.625, 1.25, 0.5, 1
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0, -4.0], [-0.25, -1.0]),  # returns -1, -4: divided by the largest size, so signs stay
    ],
)
def test_epo_at_gamma_one_half_by_hand(rewards, expected):
    assert epo_advantages(torch.tensor(rewards), 0.5).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        # turns 0..3 are given 1, 2, 4, 8
        ([0, 0, 1, 2, 2, 2, 3], [0, 1, 2, 0, 0, 4, 8]),
        ([0, 0, 2, 3], [0, 3, 4, 8]),  # turn 1 sampled nothing: its reward lies where turn 0 ends
        ([0, 1, 1], [1, 0, 14]),  # turns 2 and 3 sampled nothing: turn 1 is the nearest before both
        ([2, 2, 3], [0, 7, 8]),  # nothing before turn 2: the first later turn takes 1 + 2 beside its own 4
        ([1], [15]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_rewards_lie_on_the_last_trained_token_of_their_turn(turns, expected, dtype):
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    found = on_last_token(rewards, torch.tensor(turns, dtype=dtype))
    assert found.tolist() == expected
    assert found.dtype == torch.float32


def test_an_episode_without_trained_tokens_has_no_place_for_rewards():
    assert on_last_token(torch.tensor([1.0]), torch.tensor([], dtype=torch.int16)).shape == (0,)


def test_many_small_rewards_keep_their_sum():
    """In float32, added one by one to a large reward, they would vanish."""
    rewards = torch.tensor([1e8] + [1.0] * 64)
    assert on_last_token(rewards, torch.tensor([0])).tolist() == [1e8 + 64]
    assert outcome_rewards(rewards, 0.0)[-1].item() == 1e8 + 64


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_every_token_of_a_turn_has_the_turns_value(dtype):
    turns = torch.tensor([0, 0, 2, 2, 2], dtype=dtype)
    assert over_tokens(torch.tensor([5.0, 6.0, 7.0]), turns).tolist() == [5.0, 5.0, 7.0, 7.0, 7.0]
