"""Importance ratios and weights: by hand, per episode in plain Python, and unbiasedness by enumeration."""

import math

import pytest
import torch

from rl.algo.importance import importance_weights, log_ratio, mismatch_kl

RATIOS = [2.0, 0.25, 0.4, 1.5, 3.0, 1.0]
EPISODE = torch.tensor([0, 1, 0, 2, 1, 2])  # products: 2 x 0.4 = 0.8, 0.25 x 3 = 0.75, 1.5 x 1 = 1.5
LOW, HIGH = 0.78, 1.4


def weights(ratios, episode, *, level, kind, low=LOW, high=HIGH):
    log_ratios = torch.tensor(ratios, dtype=torch.float64).log()
    return importance_weights(log_ratios, episode, 3, level=level, kind=kind, low=low, high=high)


def test_log_ratio_and_mismatch_by_hand():
    """Generator at -1 and -2, learner at -1 and -1: ratios 0 and 1; k3 = 0 and e - 1 - 1 = 0.718282; mean 0.359141."""
    learner, generator = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0])
    assert log_ratio(learner, generator).tolist() == [0.0, 1.0]
    assert mismatch_kl(generator, learner).item() == pytest.approx(0.359141, abs=1e-6)


@pytest.mark.parametrize(
    ("level", "kind", "expected", "cut"),
    [
        # A small ratio is no reason to truncate: 0.25 stays 0.25.
        ("token", "truncated", [1.4, 0.25, 0.4, 1.4, 1.4, 1.0], [1, 0, 0, 1, 1, 0]),
        ("token", "masked", [0, 0, 0, 0, 0, 1.0], [1, 1, 1, 1, 1, 0]),
        ("sequence", "truncated", [0.8, 0.75, 0.8, 1.4, 0.75, 1.4], [0, 0, 0, 1, 0, 1]),
        ("sequence", "masked", [0.8, 0, 0.8, 0, 0, 0], [0, 1, 0, 1, 1, 1]),
    ],
)
def test_weights_by_hand(level, kind, expected, cut):
    found, cut_N = weights(RATIOS, EPISODE, level=level, kind=kind)
    assert found.tolist() == pytest.approx(expected)
    assert cut_N.tolist() == [bool(c) for c in cut]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncated", "masked"])
def test_agrees_with_each_episode_written_out(level, kind):
    generator = torch.Generator().manual_seed(0)
    episode = torch.randint(5, (40,), generator=generator)
    log_ratios = torch.randn(40, generator=generator, dtype=torch.float64) * 0.3
    found, cut = importance_weights(log_ratios, episode, 5, level=level, kind=kind, low=0.7, high=1.3)
    for e in range(5):
        own = log_ratios[episode == e].tolist()
        ratios = [math.exp(r) for r in own] if level == "token" else [math.prod(map(math.exp, own))] * len(own)
        wanted = [min(r, 1.3) for r in ratios] if kind == "truncated" else [r * (0.7 <= r <= 1.3) for r in ratios]
        assert found[episode == e].tolist() == pytest.approx(wanted)
    assert 0 < cut.sum() < 40


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_bounds_themselves_are_kept(level):
    found, cut = weights([1.0, 1.0], torch.tensor([0, 0]), level=level, kind="masked", low=1.0, high=1.0)
    assert found.tolist() == [1.0, 1.0]
    assert not cut.any()


def test_equal_policies_weigh_one_to_the_bit_however_long_the_episode():
    found, _ = weights([1.0] * 5000, torch.zeros(5000, dtype=torch.int64), level="sequence", kind="masked")
    assert (found == 1.0).all()


@pytest.mark.parametrize("kind", ["truncated", "masked"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_carry_no_gradient(level, kind):
    log_ratios = torch.zeros(2, requires_grad=True)
    found, cut = importance_weights(log_ratios, torch.tensor([0, 0]), 1, level=level, kind=kind, low=0.5, high=2.0)
    assert not found.requires_grad
    assert cut.dtype == torch.bool


@pytest.mark.parametrize(("kind", "far_up"), [("truncated", HIGH), ("masked", 0.0)])
def test_products_beyond_what_a_float_holds(kind, far_up):
    """e^1000 and e^-1000, fifty tokens of e^20 and of e^-20 each."""
    log_ratios, episode = torch.tensor([20.0, -20.0]).repeat(50), torch.tensor([0, 1]).repeat(50)
    found, _ = importance_weights(log_ratios, episode, 2, level="sequence", kind=kind, low=LOW, high=HIGH)
    assert found[episode == 0].tolist() == pytest.approx([far_up] * 50)
    assert found[episode == 1].tolist() == [0.0] * 50


def test_without_cuts_the_weighted_mean_is_the_old_policys_by_enumeration():
    """Two tokens an episode, all nine episodes: sum over mu of mu(y) w(y) f(y) = sum of pi_old(y) f(y)."""
    old, mu = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3]))
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # [9, 2]
    worth = torch.arange(9, dtype=torch.float64).square()
    found, _ = importance_weights(
        (old / mu).log()[pairs].flatten(),
        torch.arange(9).repeat_interleave(2),
        9,
        level="sequence",
        kind="truncated",
        low=0.0,
        high=1e9,
    )
    estimate = (mu[pairs].prod(-1) * found[::2] * worth).sum()
    assert estimate.item() == pytest.approx((old[pairs].prod(-1) * worth).sum().item())
