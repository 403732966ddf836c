"""Preference losses: by hand, against the papers' formulas written out again, and what a mask or a mean would break."""

import math

import pytest
import torch

from rl.algo.preference import gains, kto_kl, kto_loss, preference_loss, simpo_loss
from rl.algo.sequence import means_by, sums_by


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_a_gain_is_a_sum_over_every_turn_and_never_a_mean():
    """Episode 0 has three tokens with differences 1, -3, 0.5; episode 1 one token with 2; episode 2 none."""
    logprobs, reference = double(-1, -4, -0.5, -1), double(-2, -1, -1, -3)
    found = gains(logprobs, reference, torch.tensor([0, 0, 0, 1]), 3)
    assert found.tolist() == [-1.5, 2.0, 0.0]


@pytest.mark.parametrize(
    ("loss", "h", "expected", "slope"),
    [
        # beta 0.5; slope is d loss / d h
        ("sigmoid", 0.0, 0.693147, -0.25),  # log 2; -0.5 sigmoid(0)
        ("sigmoid", 2.0, 0.313262, -0.134471),  # log(1 + e^-1); -0.5 / (1 + e)
        ("sigmoid", -4.0, 2.126928, -0.440399),  # 2 + log(1 + e^-2); -0.5 sigmoid(2)
        ("hinge", 1.0, 0.5, -0.5),  # 1 - 0.5
        ("hinge", 3.0, 0.0, 0.0),  # past the margin 1 / beta = 2
        ("hinge", -2.0, 2.0, -0.5),
        ("ipo", 1.0, 0.0, 0.0),  # at 1 / (2 beta) = 1
        ("ipo", 3.0, 4.0, 4.0),  # beyond the target it pulls back: 2 (3 - 1)
        ("ipo", -1.0, 4.0, -4.0),
    ],
)
def test_one_pair_by_hand(loss, h, expected, slope):
    """The gains move together by any amount without changing the loss: here the rejected one is at -7."""
    chosen, rejected = double(h - 7).requires_grad_(), double(-7).requires_grad_()
    found = preference_loss(chosen, rejected, loss=loss, beta=0.5)
    to_chosen, to_rejected = torch.autograd.grad(found.sum(), (chosen, rejected))
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert to_chosen.item() == pytest.approx(slope, abs=1e-6)
    assert to_rejected.item() == pytest.approx(-slope, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # h = 2, beta = 0.5, a tenth of the labels wrong: 0.9 L(2) + 0.1 L(-2)
        ("sigmoid", 0.413262),  # 0.9 * 0.313262 + 0.1 * 1.313262
        ("hinge", 0.2),  # 0.9 * 0 + 0.1 * 2
        ("ipo", 1.8),  # 0.9 * (2 - 1)^2 + 0.1 * (-2 - 1)^2
    ],
)
def test_label_smoothing_by_hand(loss, expected):
    found = preference_loss(double(2), double(0), loss=loss, beta=0.5, label_smoothing=0.1)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_far_apart_gains_stay_finite():
    """A thousand tokens can put gains thousands of nats apart; log(sigmoid(x)) would be -inf there."""
    chosen = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    found = preference_loss(chosen, torch.zeros(2), loss="sigmoid", beta=1.0)
    found.sum().backward()
    assert found.tolist() == [5000.0, 0.0]
    assert chosen.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_m_dpo_on_padded_rows_agrees(loss):
    """M-DPO as it is usually coded: padded [P, T] rows, a mask that drops observations, sums, then the loss.

    The observations hold NaN, which must not leak.
    """
    generator = torch.Generator().manual_seed(0)
    model = torch.tensor([[[1, 1, 0, 1, 1], [1, 0, 0, 1, 0]], [[1, 0, 1, 0, 0], [1, 1, 0, 0, 1]]]).bool()
    policy, reference = (-torch.rand(2, 2, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    beta = 0.3

    (won, lost), (ref_won, ref_lost) = (x.where(model, 0).sum(-1) for x in (policy, reference))
    h = (won - lost) - (ref_won - ref_lost)
    theirs = {
        "sigmoid": torch.log1p(torch.exp(-beta * h)),
        "hinge": torch.clamp(1 - beta * h, min=0),
        "ipo": (h - 0.5 / beta) ** 2,
    }[loss]

    policy[~model], reference[~model] = math.nan, math.nan
    owner = torch.arange(4).repeat_interleave(model.flatten(0, 1).sum(-1))
    chosen, rejected = gains(policy[model], reference[model], owner, 4).view(2, 2)
    assert preference_loss(chosen, rejected, loss=loss, beta=beta).tolist() == pytest.approx(theirs.tolist())


def test_spin_is_the_preference_loss():
    """SPIN, equation 4.7: l(lambda log p(real) / p_opp(real) - lambda log p(gen) / p_opp(gen)), l(t) = log(1 + e^-t).

    By hand: real tokens -1, -2 (opponent -2, -3), generated -2 (opponent -0.5): t = 0.5 (2 - -1.5) = 1.75.
    """
    found = gains(double(-1, -2, -2), double(-2, -3, -0.5), torch.tensor([0, 0, 1]), 2)
    loss = preference_loss(found[:1], found[1:], loss="sigmoid", beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.75)))


def test_spin_begins_at_log_2():
    """The opponent is the policy that the iteration starts from, so its first loss knows nothing yet."""
    logprobs = torch.tensor([-0.3, -2.2, -5.1, -0.7])
    found = gains(logprobs, logprobs.clone(), torch.tensor([0, 0, 1, 1]), 2)
    loss = preference_loss(found[:1], found[1:], loss="sigmoid", beta=0.1)
    assert loss.item() == pytest.approx(math.log(2))


def test_simpo_by_hand():
    """Chosen tokens -1, -2, -3 (mean -2), rejected -4, -3 (mean -3.5); beta 2, gamma 1: -log sigmoid(3 - 1)."""
    means = means_by(double(-1, -2, -3, -4, -3), torch.tensor([0, 0, 0, 1, 1]), 2)
    loss = simpo_loss(means[:1], means[1:], beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_simpo_is_blind_to_length():
    """Each token twice: the same means and the same loss, where a sum would double."""
    owner = torch.tensor([0, 0, 1])
    tokens = double(-1, -2, -4)
    once = means_by(tokens, owner, 2)
    twice = means_by(tokens.repeat(2), owner.repeat(2), 2)
    losses = [simpo_loss(m[:1], m[1:], beta=2.5, gamma=0.5).item() for m in (once, twice)]
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] == pytest.approx(-math.log(sigmoid(2.5 * 2.5 - 0.5)))


def test_kto_by_hand():
    """beta 0.5, KL 1, gains 3, 3, -1, -1: scores beta (gain - KL) = 1, 1, -1, -1; weights 2 and 0.5."""
    found = kto_loss(
        double(3, 3, -1, -1),
        torch.tensor([True, False, True, False]),
        double(1).squeeze(),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=0.5,
    )
    # 2 (1 - sigmoid(1)), 0.5 (1 - sigmoid(-1)), 2 (1 - sigmoid(-1)), 0.5 (1 - sigmoid(1)); sigmoid(1) = 0.731059
    assert found.tolist() == pytest.approx([0.537883, 0.365529, 1.462117, 0.134471], abs=1e-6)


def test_kto_pushes_up_what_is_desirable_and_the_kl_stays_put():
    gain, kl = double(0.4, 0.4).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    kto_loss(gain, torch.tensor([True, False]), kl, beta=0.2).sum().backward()
    assert gain.grad.tolist() == pytest.approx([-0.05, 0.05])  # beta sigmoid'(0) = 0.2 / 4
    assert kl.grad is None


@pytest.mark.parametrize("far", [100.0, 1e4])
def test_kto_keeps_its_gradient_finite_far_out(far):
    gain = torch.tensor([far, -far], requires_grad=True)
    found = kto_loss(gain, torch.tensor([True, False]), torch.tensor(0.0), beta=1.0)
    found.sum().backward()
    assert torch.isfinite(gain.grad).all()
    assert found.max() < 1e-6


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([[1.0, 2.0], [3.0]], 2.0),
        ([[3.0, 1.0], [-2.0, -1.0]], 0.25),  # each part's clamped mean would give (2 + 0) / 2 = 1
        ([[1.0], [-4.0, 0.0]], 0.0),
        ([[], []], 0.0),
    ],
)
def test_kto_kl_is_bounded_after_the_whole_batch_is_added_up(parts, expected):
    total, count = sum(map(sum, parts)), sum(map(len, parts))
    assert kto_kl(total, count) == pytest.approx(expected)


def test_gains_send_the_gradient_to_their_own_tokens():
    """Minimising the loss raises every token of the chosen episode and lowers every one of the rejected, alike."""
    logprobs = double(-1, -2, -3).requires_grad_()
    found = gains(logprobs, double(-1, -2, -3), torch.tensor([1, 0, 1]), 2)
    preference_loss(found[:1], found[1:], loss="sigmoid", beta=0.4).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.2, -0.2, 0.2])  # beta / 2 at h = 0
    assert sums_by(logprobs.grad, torch.tensor([1, 0, 1]), 2).tolist() == pytest.approx([-0.2, 0.4])
