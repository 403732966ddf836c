"""Group advantages: hand-worked numbers, and TRL's formula written out again with numpy."""

import numpy as np
import pytest
import torch

from rl.algo.advantage import EPSILON, batch_advantages, group_advantages

RULES = [("group_mean", "group_std"), ("group_mean", "none"), ("none", "group_std"), ("none", "none")]


@pytest.mark.parametrize(
    ("baseline", "normalise", "expected"),
    [
        # rewards 1, 0, 0, 3: mean 1; squared deviations 0 + 1 + 1 + 4 = 6; sample variance 6 / 3 = 2; std 1.414214
        ("group_mean", "group_std", [0.0, -0.707107, -0.707107, 1.414214]),
        ("group_mean", "none", [0.0, -1.0, -1.0, 2.0]),
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
    ours = batch_advantages(torch.tensor(rewards), baseline="group_mean", normalise="group_std").numpy()
    std = rewards.std(axis=1, ddof=1, keepdims=True)
    np.testing.assert_allclose(ours, (rewards - rewards.mean(axis=1, keepdims=True)) / (std + EPSILON), rtol=1e-9)


@pytest.mark.parametrize(("baseline", "normalise"), RULES)
def test_groups_do_not_mix(baseline, normalise):
    rewards = torch.tensor([[1.0, 0.0, 0.5], [5.0, 7.0, 9.0]])
    together = batch_advantages(rewards, baseline=baseline, normalise=normalise)
    alone = group_advantages(rewards[1], baseline=baseline, normalise=normalise)
    assert together.shape == (2, 3)
    assert torch.equal(together[1], alone)


def test_adding_a_constant_and_scaling_change_nothing():
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    rule = {"baseline": "group_mean", "normalise": "group_std"}
    moved = group_advantages(10 * rewards - 7, **rule)
    assert torch.allclose(moved, group_advantages(rewards, **rule), atol=1e-4)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1000.3])
def test_a_group_of_equal_rewards_teaches_nothing(reward):
    """The float32 mean of eight times 0.1 is not 0.1; divided by a tiny epsilon the rounding would become a signal."""
    advantages = group_advantages(torch.full((8,), reward), baseline="group_mean", normalise="group_std")
    assert advantages.abs().max() < 1e-3
