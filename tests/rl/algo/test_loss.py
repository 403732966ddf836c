"""The clipped surrogate and its aggregation: by hand, and against TRL's GRPO loss written out again."""

import math

import pytest
import torch

from rl.algo.loss import clipped_surrogate, token_weights

LOW, HIGH = 0.2, 0.28


def surrogate(ratios, advantages):
    """Loss, clip flags and d loss / d log pi for tokens whose ratios are given."""
    behaviour = torch.full((len(ratios),), -1.5, dtype=torch.float64)
    logprobs = (behaviour + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    advantages = torch.tensor(advantages, dtype=torch.float64)
    loss, clipped = clipped_surrogate(logprobs, behaviour, advantages, low=LOW, high=HIGH)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss.detach(), clipped, gradient


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        # loss = -min(r A, clip(r, 0.8, 1.28) A); d(-r A) / d log pi = -r A, and 0 where the clip is active
        (1.0, 2.0, -2.0, False, -2.0),
        (1.1, 2.0, -2.2, False, -2.2),
        (1.5, 2.0, -2.56, True, 0.0),  # min(3, 1.28 * 2)
        (0.5, 2.0, -1.0, False, -1.0),  # min(1, 0.8 * 2): the low bound does not hold back a good token's return
        (1.0, -2.0, 2.0, False, 2.0),
        (0.9, -2.0, 1.8, False, 1.8),
        (0.5, -2.0, 1.6, True, 0.0),  # min(-1, 0.8 * -2)
        (1.5, -2.0, 3.0, False, 3.0),  # min(-3, 1.28 * -2): a bad token that grew is pushed down in full
        (1.27, 2.0, -2.54, False, -2.54),  # just inside the bounds
        (1.29, 2.0, -2.56, True, 0.0),  # just outside
        (0.81, -2.0, 1.62, False, 1.62),
        (0.79, -2.0, 1.6, True, 0.0),
        (3.0, 0.0, 0.0, False, 0.0),
    ],
)
def test_one_token_by_hand(ratio, advantage, loss, clipped, gradient):
    found = surrogate([ratio], [advantage])
    assert found[0].item() == pytest.approx(loss, abs=1e-9)
    assert found[1].item() is clipped
    assert found[2].item() == pytest.approx(gradient, abs=1e-9)


@pytest.mark.parametrize("bound", [1 - LOW, 1 + HIGH])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_at_the_bound_has_the_bounds_loss(bound, advantage):
    assert surrogate([bound], [advantage])[0].item() == pytest.approx(-bound * advantage, abs=1e-9)


def test_equal_logprobs_give_ratio_one_to_the_bit():
    """So that a first step on the generator's own tokens is plain policy gradient: loss -A, nothing clipped."""
    logprobs = torch.tensor([-0.1, -7.3, -31.7])
    advantages = torch.tensor([0.3, -1.7, 2.9])
    loss, clipped = clipped_surrogate(logprobs, logprobs.clone(), advantages, low=LOW, high=HIGH)
    assert torch.equal(loss, -advantages)
    assert not clipped.any()


def test_far_apart_logprobs_stay_finite():
    far = torch.tensor([0.0, -500.0]), torch.tensor([-500.0, 0.0])
    loss, _ = clipped_surrogate(*far, torch.tensor([-1.0, -1.0]), low=LOW, high=HIGH)
    assert torch.isfinite(loss).all()


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # lengths 1, 3, 0 (an episode without trained tokens still counts as an episode)
        ("token", [1 / 4, 1 / 4, None]),
        ("sequence", [1 / 3, 1 / 9, None]),
        ("fixed_length", [1 / 30, 1 / 30, None]),  # 3 episodes x length 10
    ],
)
def test_token_weights_by_hand(aggregation, expected):
    weights = token_weights(torch.tensor([1, 3, 0]), aggregation=aggregation, fixed_length=10)
    assert weights[:2].tolist() == pytest.approx(expected[:2])
    assert torch.isfinite(weights).all()


def test_a_batch_without_any_trained_token_has_finite_weights():
    assert torch.isfinite(token_weights(torch.zeros(2, dtype=torch.int64), aggregation="token")).all()


@pytest.mark.parametrize(
    ("aggregation", "loss_type"), [("token", "dapo"), ("sequence", "grpo"), ("fixed_length", "dr_grpo")]
)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_batch_loss_agrees_with_trl(aggregation, loss_type, beta):
    """TRL 1.x GRPOTrainer._compute_loss on padded [B, T] tensors, with exp(ref - logp) - (ref - logp) - 1 as KL."""
    generator = torch.Generator().manual_seed(0)
    lengths, width, fixed = torch.tensor([2, 7, 4, 5]), 7, 16
    logp, old, ref = (torch.randn(4, width, generator=generator, dtype=torch.float64) * 0.4 - 2 for _ in range(3))
    advantages = torch.tensor([1.3, -0.7, 0.0, -2.1], dtype=torch.float64)
    mask = (torch.arange(width) < lengths[:, None]).double()

    coef = torch.exp(logp - old)
    clipped = torch.clamp(coef, 1 - LOW, 1 + HIGH)
    per_token = -torch.min(coef * advantages[:, None], clipped * advantages[:, None])
    per_token = per_token + beta * (torch.exp(ref - logp) - (ref - logp) - 1)
    theirs = {
        "dapo": (per_token * mask).sum() / mask.sum(),
        "grpo": ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean(),
        "dr_grpo": (per_token * mask).sum() / (per_token.size(0) * fixed),
    }[loss_type]

    from rl.algo.kl import kl_estimate

    picked = mask.bool()
    ours, _ = clipped_surrogate(logp[picked], old[picked], advantages.repeat_interleave(lengths), low=LOW, high=HIGH)
    ours = ours + beta * kl_estimate(logp[picked], ref[picked], "k3")
    weights = token_weights(lengths, aggregation=aggregation, fixed_length=fixed).repeat_interleave(lengths)
    assert (ours * weights).sum().item() == pytest.approx(theirs.item(), rel=1e-6)
    assert math.isfinite(theirs.item())
