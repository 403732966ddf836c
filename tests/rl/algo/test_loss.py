"""The losses and their aggregation: by hand, per episode, and against TRL's GRPO loss written out again."""

import math
from functools import partial

import pytest
import torch

from rl.algo.kl import kl_estimate
from rl.algo.loss import (
    cispo,
    clipped_surrogate,
    overlong_penalty,
    reinforce,
    sequence_surrogate,
    token_weights,
    value_loss,
)

LOW, HIGH = 0.2, 0.28
OLD = -1.5


def one_token(loss_of, ratio, advantage, **rule):
    """Loss, clip flag and d loss / d log pi of a token whose ratio is given; its old log-prob is OLD."""
    old = torch.tensor([OLD], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    loss, clipped = loss_of(logprobs, old, torch.tensor([advantage], dtype=torch.float64), **rule)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss.item(), clipped.item(), gradient.item()


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
    found = one_token(clipped_surrogate, ratio, advantage, low=LOW, high=HIGH)
    assert found == (pytest.approx(loss, abs=1e-9), clipped, pytest.approx(gradient, abs=1e-9))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        # c = 3: where A < 0, at most -3 A
        (4.0, -2.0, 6.0, True, 0.0),  # min(8, 6)
        (2.9, -2.0, 5.8, False, 5.8),  # min(5.8, 6)
        (0.5, -2.0, 1.6, True, 0.0),  # the low bound is still there
        (4.0, 2.0, -2.56, True, 0.0),  # a good token has the high bound only
        (1.1, 2.0, -2.2, False, -2.2),
        (4.0, 0.0, 0.0, False, 0.0),
    ],
)
def test_dual_clip_of_one_token_by_hand(ratio, advantage, loss, clipped, gradient):
    found = one_token(clipped_surrogate, ratio, advantage, low=LOW, high=HIGH, dual_clip=3.0)
    assert found == (pytest.approx(loss, abs=1e-9), clipped, pytest.approx(gradient, abs=1e-9))


@pytest.mark.parametrize("bound", [1 - LOW, 1 + HIGH])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_at_the_bound_has_the_bounds_loss(bound, advantage):
    found = one_token(clipped_surrogate, bound, advantage, low=LOW, high=HIGH)
    assert found[0] == pytest.approx(-bound * advantage, abs=1e-9)


def test_equal_logprobs_give_ratio_one_to_the_bit():
    """So that a first step on the generator's own tokens is plain policy gradient: loss -A, nothing clipped."""
    logprobs = torch.tensor([-0.1, -7.3, -31.7])
    advantages = torch.tensor([0.3, -1.7, 2.9])
    episode = torch.tensor([0, 1, 0])
    for loss, clipped in (
        clipped_surrogate(logprobs, logprobs.clone(), advantages, low=LOW, high=HIGH, dual_clip=3.0),
        sequence_surrogate(logprobs, logprobs.clone(), advantages, episode, 2, low=LOW, high=HIGH),
    ):
        assert torch.equal(loss, -advantages)
        assert not clipped.any()


@pytest.mark.parametrize(
    "loss_of",
    [
        clipped_surrogate,
        partial(sequence_surrogate, episode_N=torch.tensor([0, 1]), episodes=2),
        cispo,
    ],
)
def test_far_apart_logprobs_stay_finite(loss_of):
    far = torch.tensor([0.0, -500.0]), torch.tensor([-500.0, 0.0])
    loss, _ = loss_of(*far, torch.tensor([-1.0, -1.0]), low=LOW, high=HIGH)
    assert torch.isfinite(loss).all()


EPISODE = torch.tensor([0, 1, 0, 2, 1])


def sequence_example(advantages):
    """Log ratios 0.1 and 0.3, 0.6 and 0.4, -0.4: episodes with s = e^0.2 = 1.221403, e^0.5 and e^-0.4."""
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], dtype=torch.float64)
    logprobs = (old + torch.tensor([0.1, 0.6, 0.3, -0.4, 0.4], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor(advantages, dtype=torch.float64)
    loss, clipped = sequence_surrogate(logprobs, old, advantages, EPISODE, 3, low=LOW, high=HIGH)
    return logprobs, loss, clipped


def test_sequence_surrogate_by_hand():
    """Episode 0 is free: -s A, each of its two tokens has gradient -s A / 2. The others are held by a bound."""
    logprobs, loss, clipped = sequence_example([2.0, 1.0, 2.0, -1.0, 1.0])
    assert loss.tolist() == pytest.approx([-2.442806, -1.28, -2.442806, 0.8, -1.28], abs=1e-6)
    assert clipped.tolist() == [False, True, False, True, True]
    means = loss[[0, 2]].mean() + loss[[1, 4]].mean() + loss[3]
    (gradient,) = torch.autograd.grad(means, logprobs)
    assert gradient.tolist() == pytest.approx([-1.221403, 0.0, -1.221403, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("other", [1e9, math.nan])
def test_another_episodes_advantage_never_leaks(other):
    """Episode 1 with A < 0 is free: loss e^0.5, and its mean has gradient e^0.5 / 2 a token, whoever is beside it."""
    logprobs, loss, _ = sequence_example([other, -1.0, other, -other, -1.0])
    (gradient,) = torch.autograd.grad(loss.sum() / 2, logprobs)
    own = [1, 4]
    assert loss[own].tolist() == pytest.approx([1.648721, 1.648721], abs=1e-6)
    assert gradient[own].tolist() == pytest.approx([0.824361, 0.824361], abs=1e-6)


def test_the_sequence_ratio_resolves_bounds_of_a_few_ten_thousandths():
    """GSPO's own bounds are 3e-4 and 4e-4: over a long episode in float32, rounding has to stay far below them."""
    torch.manual_seed(0)
    old = -4 * torch.rand(20_000)
    episode = torch.zeros(20_000, dtype=torch.int64)
    loss, _ = sequence_surrogate(old + 1e-4, old, torch.ones(20_000), episode, 1, low=3e-4, high=4e-4)
    assert loss[0].item() == pytest.approx(-math.exp(1e-4), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "weight", "clipped"),
    [
        (1.1, 2.0, None, 1.1, False),
        (1.5, 2.0, None, 1.28, True),
        (1.5, -2.0, None, 1.28, True),  # by the ratio alone, whatever the sign
        (0.5, 2.0, None, 0.5, False),
        (0.01, -2.0, None, 0.01, False),
        (0.5, 2.0, LOW, 0.8, True),
        (0.9, -2.0, LOW, 0.9, False),
    ],
)
def test_cispo_of_one_token_by_hand(ratio, advantage, low, weight, clipped):
    """-w A log pi with log pi = OLD + log r. The gradient is -w A: no token loses it to the clip."""
    found = one_token(cispo, ratio, advantage, low=low, high=HIGH)
    loss = -weight * advantage * (OLD + math.log(ratio))
    assert found == (pytest.approx(loss, abs=1e-9), clipped, pytest.approx(-weight * advantage, abs=1e-9))


def test_reinforce_by_hand():
    logprobs = torch.tensor([-0.5, -2.0, -3.0], requires_grad=True)
    loss = reinforce(logprobs, torch.tensor([2.0, -1.0, 0.0]))
    assert loss.tolist() == [1.0, -2.0, 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist() == [-2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("value", "target", "clip", "loss", "clipped", "gradient"),
    [
        # old value 1, band 0.8 to 1.2
        (1.1, 2.0, 0.2, 0.405, False, -0.9),  # 0.9^2 / 2, inside the band
        (1.5, 2.0, 0.2, 0.32, True, 0.0),  # max(0.5^2, 0.8^2) / 2: it has moved far enough towards the return
        (0.5, 2.0, 0.2, 1.125, False, -1.5),  # max(1.5^2, 1.2^2) / 2: the wrong way, it is called back in full
        (1.5, 0.0, 0.2, 1.125, False, 1.5),  # max(1.5^2, 1.2^2) / 2
        (0.5, 0.0, 0.2, 0.32, True, 0.0),  # max(0.5^2, 0.8^2) / 2
        (1.5, 2.0, None, 0.125, False, -0.5),
    ],
)
def test_value_loss_by_hand(value, target, clip, loss, clipped, gradient):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([1.0], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    loss_N, clipped_N = value_loss(values, old, returns, clip=clip)
    (found,) = torch.autograd.grad(loss_N.sum(), values)
    assert loss_N.item() == pytest.approx(loss)
    assert clipped_N.tolist() == [clipped]
    assert found.item() == pytest.approx(gradient)


def test_values_inside_the_band_are_never_called_clipped():
    """V_old + (V - V_old) is not V in float32: a band built that way flags tokens at random."""
    torch.manual_seed(0)
    old = torch.randn(5000)
    values = old + torch.rand(5000) - 0.5
    assert not value_loss(values, old, torch.randn(5000), clip=0.6)[1].any()


# Two turns; one; none; two without a trained token; a silent turn before one of four. 10 tokens, 3 episodes that count.
TURNS = [[1, 3], [2], [], [0, 0], [0, 4]]
AGGREGATIONS = ["token", "sequence", "fixed_length", "sum", "turn", "turn_sum"]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", [[1 / 10, 1 / 10], [1 / 10], [], [0, 0], [0, 1 / 10]]),
        ("sequence", [[1 / 12, 1 / 12], [1 / 6], [], [0, 0], [0, 1 / 12]]),  # 1 / (3 x 4), 1 / (3 x 2), 1 / (3 x 4)
        ("fixed_length", [[1 / 30, 1 / 30], [1 / 30], [], [0, 0], [0, 1 / 30]]),  # 3 episodes x length 10
        ("sum", [[1 / 3, 1 / 3], [1 / 3], [], [0, 0], [0, 1 / 3]]),
        ("turn", [[1 / 6, 1 / 18], [1 / 6], [], [0, 0], [0, 1 / 12]]),  # 1 / (3 x 2 x 1), 1 / (3 x 2 x 3), ...
        ("turn_sum", [[1 / 2, 1 / 6], [1 / 2], [], [0, 0], [0, 1 / 4]]),
    ],
)
def test_token_weights_by_hand(aggregation, expected):
    weights = token_weights(TURNS, aggregation=aggregation, fixed_length=10)
    assert weights == [pytest.approx(turns) for turns in expected]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_without_any_trained_token_weighs_nothing(aggregation):
    assert token_weights([[], [0, 0]], aggregation=aggregation, fixed_length=10) == [[], [0.0, 0.0]]
    assert token_weights([], aggregation=aggregation, fixed_length=10) == []


def per_token(turn_lengths, **rule):
    """The weights, laid flat."""
    lengths = torch.tensor([n for turns in turn_lengths for n in turns])
    weights = [w for turns in token_weights(turn_lengths, **rule) for w in turns]
    return torch.tensor(weights, dtype=torch.float64).repeat_interleave(lengths)


@pytest.mark.parametrize(("aggregation", "over_episodes"), [("turn_sum", sum), ("turn", lambda terms: sum(terms) / 3)])
def test_turns_are_weighed_as_epo_does(aggregation, over_episodes):
    """Per episode -(1 / turns) sum over turns of A / len x sum over tokens of log pi."""
    torch.manual_seed(0)
    logprobs = -torch.rand(10, dtype=torch.float64)
    advantages = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.2, 0.2, 0.7, 0.7, 0.7, 0.7], dtype=torch.float64)
    terms = [
        -(1.0 * logprobs[0] + 0.5 / 3 * logprobs[1:4].sum()) / 2,
        -0.2 / 2 * logprobs[4:6].sum(),
        -0.7 / 4 * logprobs[6:].sum(),
    ]
    ours = (reinforce(logprobs, advantages) * per_token(TURNS, aggregation=aggregation)).sum()
    assert ours.item() == pytest.approx(float(over_episodes(terms)))


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (500, -1.0)]
)
def test_overlong_penalty_by_hand(length, penalty):
    assert overlong_penalty(length, limit=100, buffer=20) == pytest.approx(penalty)


LENGTHS = torch.tensor([2, 7, 4, 5])
WIDTH, FIXED = 7, 16
DELTA = 1.6


def trl(logp, old, ref, advantages, mask, *, loss_type, level="token", delta=None, beta=0.0):
    """TRL 1.x GRPOTrainer._compute_loss on padded [B, T] tensors, with exp(ref - logp) - (ref - logp) - 1 as KL.

    Returns the loss and where the clip was active. For CISPO TRL's epsilon_high is the bound itself, not its excess.
    """
    ratio = logp - old
    if level == "sequence":
        ratio = ((ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef = torch.exp(ratio)
    low_clipped = (coef < 1 - LOW) & (advantages[:, None] < 0)
    high_clipped = (coef > 1 + HIGH) & (advantages[:, None] > 0)
    if loss_type == "cispo":
        per_token = -torch.clamp(coef, max=1 + HIGH).detach() * advantages[:, None] * logp
    else:
        bounded = torch.clamp(coef, 1 - LOW, 1 + HIGH)
        coef = torch.clamp(coef, max=delta) if delta else coef
        per_token = -torch.min(coef * advantages[:, None], bounded * advantages[:, None])
    per_token = per_token + beta * (torch.exp(ref - logp) - (ref - logp) - 1)
    loss = {
        "dapo": (per_token * mask).sum() / mask.sum(),
        "cispo": (per_token * mask).sum() / mask.sum(),
        "grpo": ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean(),
        "dr_grpo": (per_token * mask).sum() / (per_token.size(0) * FIXED),
    }[loss_type]
    return loss, (low_clipped | high_clipped).expand_as(logp)


@pytest.mark.parametrize(
    ("loss_of", "aggregation", "theirs"),
    [
        (partial(clipped_surrogate, low=LOW), "token", {"loss_type": "dapo"}),
        (partial(clipped_surrogate, low=LOW), "sequence", {"loss_type": "grpo"}),
        (partial(clipped_surrogate, low=LOW), "fixed_length", {"loss_type": "dr_grpo"}),
        (partial(clipped_surrogate, low=LOW, dual_clip=DELTA), "token", {"loss_type": "dapo", "delta": DELTA}),
        (
            partial(sequence_surrogate, low=LOW, episode_N=torch.arange(4).repeat_interleave(LENGTHS), episodes=4),
            "sequence",
            {"loss_type": "grpo", "level": "sequence"},
        ),
        (partial(cispo, low=None), "token", {"loss_type": "cispo"}),
    ],
    ids=["dapo", "grpo", "dr_grpo", "delta", "gspo", "cispo"],
)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_batch_loss_agrees_with_trl(loss_of, aggregation, theirs, beta):
    """The loss, and its gradient with respect to every log-prob."""
    generator = torch.Generator().manual_seed(0)
    logp, old, ref = (torch.randn(4, WIDTH, generator=generator, dtype=torch.float64) * 0.7 - 3 for _ in range(3))
    logp.requires_grad_()
    advantages = torch.tensor([1.3, -0.7, 0.0, -2.1], dtype=torch.float64)
    picked = torch.arange(WIDTH) < LENGTHS[:, None]
    wanted, wanted_clipped = trl(logp, old, ref, advantages, picked.double(), beta=beta, **theirs)
    (wanted_gradient,) = torch.autograd.grad(wanted, logp)

    loss, clipped = loss_of(logp[picked], old[picked], advantages.repeat_interleave(LENGTHS), high=HIGH)
    loss = loss + beta * kl_estimate(logp[picked], ref[picked], "k3")
    weights = per_token([[2], [3, 4], [0, 4], [1, 1, 3]], aggregation=aggregation, fixed_length=FIXED)
    found = (loss * weights).sum()
    (gradient,) = torch.autograd.grad(found, logp)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(gradient, wanted_gradient, atol=1e-9)
    if theirs["loss_type"] != "cispo" and "delta" not in theirs:
        assert torch.equal(clipped, wanted_clipped[picked])
    assert 0 < clipped.sum() < len(clipped)
