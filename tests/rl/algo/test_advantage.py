"""Advantages: hand-worked numbers, and TRL's, OpenRLHF's and the papers' formulas written out again with numpy."""

import numpy as np
import pytest
import torch

from rl.algo.advantage import (
    EPSILON,
    gae,
    group_advantages,
    group_turn_advantages,
    remax_advantages,
    whiten,
)

BASELINES, NORMALISERS = ("group_mean", "leave_one_out", "none"), ("group_std", "none")
RULES = [(baseline, normalise) for baseline in BASELINES for normalise in NORMALISERS]


@pytest.mark.parametrize(
    ("baseline", "normalise", "expected"),
    [
        # rewards 1, 0, 0, 3: mean 1; squared deviations 0 + 1 + 1 + 4 = 6; sample variance 6 / 3 = 2; std 1.414214
        ("group_mean", "group_std", [0.0, -0.707107, -0.707107, 1.414214]),
        ("group_mean", "none", [0.0, -1.0, -1.0, 2.0]),
        # the others' means: 3 / 3, 4 / 3, 4 / 3, 1 / 3
        ("leave_one_out", "group_std", [0.0, -0.942809, -0.942809, 1.885618]),
        ("leave_one_out", "none", [0.0, -1.333333, -1.333333, 2.666667]),
        ("none", "group_std", [0.707107, 0.0, 0.0, 2.121320]),
        ("none", "none", [1.0, 0.0, 0.0, 3.0]),
    ],
)
def test_by_hand(baseline, normalise, expected):
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 3.0]), baseline=baseline, normalise=normalise)
    assert torch.allclose(advantages, torch.tensor(expected), atol=3e-4)  # room for any epsilon up to TRL's 1e-4


def test_agrees_with_trl():
    """TRL: (rewards - grouped.mean) / (grouped.std(ddof=1) + eps), the groups as rows."""
    rewards = np.random.default_rng(0).normal(size=(5, 8))
    rule = {"baseline": "group_mean", "normalise": "group_std"}
    ours = np.stack([group_advantages(torch.tensor(group), **rule).numpy() for group in rewards])
    std = rewards.std(axis=1, ddof=1, keepdims=True)
    np.testing.assert_allclose(ours, (rewards - rewards.mean(axis=1, keepdims=True)) / (std + EPSILON), rtol=1e-9)


def test_leave_one_out_agrees_with_rloo_written_out():
    rewards = np.random.default_rng(1).normal(size=7)
    ours = group_advantages(torch.tensor(rewards), baseline="leave_one_out", normalise="none").numpy()
    np.testing.assert_allclose(ours, [r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)], rtol=1e-9)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_adding_a_constant_and_scaling_change_nothing(baseline):
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    rule = {"baseline": baseline, "normalise": "group_std"}
    moved = group_advantages(10 * rewards - 7, **rule)
    assert torch.allclose(moved, group_advantages(rewards, **rule), atol=1e-4)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1000.3])
def test_a_group_of_equal_rewards_teaches_nothing(reward, baseline):
    """The float32 mean of eight times 0.1 is not 0.1; divided by a tiny epsilon the rounding would become a signal."""
    for normalise in NORMALISERS:
        advantages = group_advantages(torch.full((8,), reward), baseline=baseline, normalise=normalise)
        assert not advantages.any()


def test_equal_rewards_without_a_baseline_are_not_divided_by_epsilon_alone():
    assert not group_advantages(torch.ones(4), baseline="none", normalise="group_std").any()


@pytest.mark.parametrize(
    ("baseline", "normalise", "expected"),
    [
        # counted: 1 and 3, mean 2, squared deviations 1 + 1, sample std sqrt(2); the 100 and the 0 do not count
        ("group_mean", "none", [-1.0, 98.0, 1.0, -2.0]),
        ("group_mean", "group_std", [-0.707107, 69.296465, 0.707107, -1.414214]),
        ("leave_one_out", "none", [-2.0, 98.0, 2.0, -2.0]),  # against the other counted one, or against both
        ("leave_one_out", "group_std", [-1.414214, 69.296465, 1.414214, -1.414214]),
        ("none", "none", [1.0, 100.0, 3.0, 0.0]),
        ("none", "group_std", [0.707107, 70.710678, 2.121320, 0.0]),
    ],
)
def test_episodes_that_do_not_count_are_measured_by_those_that_do(baseline, normalise, expected):
    rewards, counted = torch.tensor([1.0, 100.0, 3.0, 0.0]), torch.tensor([True, False, True, False])
    advantages = group_advantages(rewards, baseline=baseline, normalise=normalise, counted_G=counted)
    assert torch.allclose(advantages, torch.tensor(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("counted", "baseline", "normalise", "expected"),
    [
        ([0, 0, 0], "group_mean", "none", [0.0, 0.0, 0.0]),
        ([0, 0, 0], "leave_one_out", "none", [0.0, 0.0, 0.0]),
        ([0, 0, 0], "none", "group_std", [0.0, 0.0, 0.0]),
        ([0, 0, 0], "none", "none", [1.0, 3.0, 2.0]),  # asks the group for nothing
        ([0, 1, 0], "group_mean", "none", [-2.0, 0.0, -1.0]),
        ([0, 1, 0], "leave_one_out", "none", [-2.0, 0.0, -1.0]),  # the counted one has no other; the rest have it
        ([0, 1, 0], "group_mean", "group_std", [0.0, 0.0, 0.0]),
        ([0, 1, 0], "leave_one_out", "group_std", [0.0, 0.0, 0.0]),
        ([0, 1, 0], "none", "group_std", [0.0, 0.0, 0.0]),
    ],
)
def test_a_statistic_with_too_few_counted_episodes_gives_zero(counted, baseline, normalise, expected):
    rewards, counted = torch.tensor([1.0, 3.0, 2.0]), torch.tensor(counted, dtype=torch.bool)
    advantages = group_advantages(rewards, baseline=baseline, normalise=normalise, counted_G=counted)
    assert advantages.tolist() == expected


def test_counted_episodes_that_agree_give_no_scale_for_the_rest():
    """Their std is 0: the one left out, which differs, must not be divided by epsilon."""
    rewards, counted = torch.tensor([0.1, 0.1, 0.1, 1.0]), torch.tensor([True, True, True, False])
    for baseline in BASELINES:
        assert not group_advantages(rewards, baseline=baseline, normalise="group_std", counted_G=counted).any()


# Three episodes of 2, 1 and 3 turns. All six turn rewards: mean 9 / 6 = 1.5, squared deviations
# 0.25 + 2.25 + 6.25 + 2.25 + 0.25 + 2.25 = 13.5, sample variance 13.5 / 5 = 2.7, std 1.643168
TURNS = [torch.tensor([1.0, 0.0]), torch.tensor([4.0]), torch.tensor([0.0, 1.0, 3.0])]


@pytest.mark.parametrize(
    ("baseline", "normalise", "gamma", "expected"),
    [
        # centred: (-0.5, -1.5), (2.5), (-1.5, -0.5, 1.5); then summed from the back
        ("group_mean", "none", 1.0, [[-2.0, -1.5], [2.5], [-0.5, 1.0, 1.5]]),
        ("group_mean", "none", 0.5, [[-1.25, -1.5], [2.5], [-1.375, 0.25, 1.5]]),
        ("group_mean", "group_std", 1.0, [[-1.217161, -0.912871], [1.521452], [-0.304290, 0.608581, 0.912871]]),
        # the others' means: 8 / 4 = 2, 5 / 5 = 1, 5 / 3; centred (-1, -2), (3), (-5/3, -2/3, 4/3)
        ("leave_one_out", "none", 1.0, [[-3.0, -2.0], [3.0], [-1.0, 0.666667, 1.333333]]),
        ("none", "none", 0.5, [[1.0, 0.0], [4.0], [1.25, 2.5, 3.0]]),
        ("none", "group_std", 1.0, [[0.608581, 0.0], [2.434322], [2.434322, 2.434322, 1.825742]]),
    ],
)
def test_turn_advantages_by_hand(baseline, normalise, gamma, expected):
    found = group_turn_advantages(TURNS, gamma=gamma, baseline=baseline, normalise=normalise)
    for advantages, row in zip(found, expected, strict=True):
        assert advantages.dtype == torch.float32
        assert advantages.tolist() == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize(
    ("baseline", "normalise", "expected"),
    [
        # counted: the turns 1, 0 and 4; mean 5 / 3, squared deviations 4/9 + 25/9 + 49/9 = 26/3, std sqrt(13 / 3)
        ("group_mean", "none", [[-7 / 3, -5 / 3], [7 / 3], [-1.0, 2 / 3, 4 / 3]]),
        ("group_mean", "group_std", [[-1.120897, -0.800641], [1.120897], [-0.480384, 0.320256, 0.640513]]),
        ("leave_one_out", "none", [[-7.0, -4.0], [3.5], [-1.0, 2 / 3, 4 / 3]]),  # 4; 1 / 2; 5 / 3 for the third
    ],
)
def test_turns_of_episodes_that_do_not_count_stay_out_of_the_statistics(baseline, normalise, expected):
    counted = torch.tensor([True, True, False])
    found = group_turn_advantages(TURNS, gamma=1.0, baseline=baseline, normalise=normalise, counted_G=counted)
    for advantages, row in zip(found, expected, strict=True):
        assert advantages.tolist() == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize(("baseline", "normalise"), RULES)
def test_one_turn_an_episode_is_the_outcome_rule(baseline, normalise):
    rewards, counted = torch.tensor([1.0, 0.0, 0.5, 3.0]), torch.tensor([True, True, False, True])
    by_turn = group_turn_advantages(
        list(rewards[:, None]), gamma=0.9, baseline=baseline, normalise=normalise, counted_G=counted
    )
    whole = group_advantages(rewards, baseline=baseline, normalise=normalise, counted_G=counted)
    assert torch.equal(torch.cat(by_turn), whole)


def test_turns_of_equal_rewards_teach_nothing():
    turns = [torch.full((3,), 0.1), torch.full((5,), 0.1)]
    for baseline in ("group_mean", "leave_one_out"):
        for normalise in NORMALISERS:
            found = group_turn_advantages(turns, gamma=1.0, baseline=baseline, normalise=normalise)
            assert not torch.cat(found).any()


def test_an_episode_without_turns_takes_its_place_in_the_group():
    found = group_turn_advantages(
        [torch.tensor([1.0, 2.0]), torch.tensor([]), torch.tensor([3.0])],
        gamma=1.0,
        baseline="leave_one_out",
        normalise="none",
    )
    # 1 and 2 against 3; 3 against their mean 1.5
    assert [advantages.tolist() for advantages in found] == [[-3.0, -1.0], [], [1.5]]


def test_remax_by_hand():
    assert remax_advantages(torch.tensor([1.0, 0.0, 0.25]), 0.25).tolist() == [0.75, -0.25, 0.0]


def test_whiten_by_hand():
    """1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, population variance 3.5, std 1.870829."""
    whitened = whiten(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert whitened.tolist() == pytest.approx([-1.069045, -0.534522, 0.0, 1.603567], abs=1e-5)


def test_whiten_agrees_with_openrlhf_on_counted_tokens():
    """OpenRLHF: masked mean, masked population variance, (A - mean) * rsqrt(variance)."""
    random = np.random.default_rng(2)
    advantages, mask = random.normal(3.0, 2.0, size=50), random.random(50) < 0.6
    mean = (advantages * mask).sum() / mask.sum()
    variance = ((advantages - mean) ** 2 * mask).sum() / mask.sum()
    ours = whiten(torch.tensor(advantages), torch.tensor(mask)).numpy()
    np.testing.assert_allclose(ours, (advantages - mean) / np.sqrt(variance), rtol=1e-5)


def test_whiten_far_from_zero_is_not_rounded():
    advantages = torch.tensor(np.random.default_rng(5).normal(1000.0, 0.01, size=20_000), dtype=torch.float32)
    whitened = whiten(advantages).double()
    assert abs(whitened.mean().item()) < 1e-6
    assert whitened.std(correction=0).item() == pytest.approx(1.0, abs=2e-4)  # 1e-6 beside a std of 0.01


@pytest.mark.parametrize("counted", [None, [True, True, False], [False, True, False], [False, False, False]])
def test_whitening_what_does_not_vary_gives_zero(counted):
    advantages = torch.tensor([0.1, 0.1, 0.1 if counted is None else 5.0])
    assert whiten(advantages, None if counted is None else torch.tensor(counted)).tolist() == [0.0, 0.0, 0.0]


def test_gae_by_hand():
    """Rewards 0, 0, 1; values 0.5, 0.4, 0.8; gamma 0.9, lambda 0.5.

    deltas: 0.9 * 0.4 - 0.5 = -0.14; 0.9 * 0.8 - 0.4 = 0.32; 1 + 0.9 * 0 - 0.8 = 0.2
    advantages: 0.2; 0.32 + 0.45 * 0.2 = 0.41; -0.14 + 0.45 * 0.41 = 0.0445
    """
    advantages, returns = gae(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.4, 0.8]), gamma=0.9, lam=0.5)
    assert advantages.tolist() == pytest.approx([0.0445, 0.41, 0.2], abs=1e-6)
    assert returns.tolist() == pytest.approx([0.5445, 0.81, 1.0], abs=1e-6)
    assert advantages.dtype == returns.dtype == torch.float32


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (0.9, 0.0), (0.8, 1.0)])
def test_gae_agrees_with_its_sum_written_out(gamma, lam):
    random = np.random.default_rng(3)
    rewards, values = random.normal(size=9), random.normal(size=9)
    deltas = rewards + gamma * np.append(values[1:], 0.0) - values
    expected = [sum((gamma * lam) ** j * deltas[t + j] for j in range(9 - t)) for t in range(9)]
    advantages, returns = gae(torch.tensor(rewards), torch.tensor(values), gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(returns.numpy(), expected + values, rtol=1e-9)


def test_gae_of_trained_tokens_skips_observations():
    """The masked form: over all tokens, an observation hands on the next value and the running advantage untouched."""
    gamma, lam = 0.95, 0.8
    random = np.random.default_rng(4)
    mask = np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0], dtype=bool)  # three turns, observations between and after
    rewards, values = random.normal(size=12) * mask, random.normal(size=12)
    expected, running, following = np.zeros(12), 0.0, 0.0
    for t in reversed(range(12)):
        if mask[t]:
            running = rewards[t] + gamma * following - values[t] + gamma * lam * running
            expected[t], following = running, values[t]
    advantages, _ = gae(torch.tensor(rewards[mask]), torch.tensor(values[mask]), gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages.numpy(), expected[mask], rtol=1e-9)
