"""Supervised losses: one-token rollout given its draws and in expectation; masked thought's counts, places and rate."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rl.algo.sft import draw_candidates, masked_thought, masked_thought_rate, negative_log_likelihood, one_token_rollout


def test_negative_log_likelihood_is_cross_entropy():
    logits, targets = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 0, 2, 2])
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    assert torch.allclose(negative_log_likelihood(logprobs), F.cross_entropy(logits, targets, reduction="none"))


def seeded_logits(positions, vocabulary, scale=2.0):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64) * scale


def test_one_token_rollout_given_its_draws():
    """The same seed draws the same candidates: the loss over them one by one, with untempered log-probs."""
    logits, targets = seeded_logits(3, 5), torch.tensor([1, 4, 0])
    torch.manual_seed(11)
    candidates = draw_candidates(logits, samples=40, temperature=1.7)
    logprobs = torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
    expected = [
        -sum((1.0 if a == target else -0.3) * logprobs[n, a].item() for a in candidates[n].tolist()) / 40
        for n, target in enumerate(targets.tolist())
    ]
    torch.manual_seed(11)
    found = one_token_rollout(logits, targets, samples=40, temperature=1.7, wrong_reward=-0.3)
    assert (candidates == targets[:, None]).any() and (candidates != targets[:, None]).any()
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_one_token_rollout_in_expectation():
    """With q = softmax(logits / temperature): E[loss] = -sum_a q(a) R(a) log pi(a), and the gradient is that one's
    with q held constant. 200,000 draws: standard error of the loss below 0.002."""
    logits, targets = seeded_logits(3, 5, scale=1.5).requires_grad_(), torch.tensor([1, 4, 0])
    torch.manual_seed(0)
    found = one_token_rollout(logits, targets, samples=200_000, temperature=1.3, wrong_reward=-0.1)
    (gradient,) = torch.autograd.grad(found.sum(), logits)

    q = F.softmax(logits.detach() / 1.3, dim=-1)
    rewards = F.one_hot(targets, 5) * 1.1 - 0.1
    closed = -(q * rewards * F.log_softmax(logits, dim=-1)).sum(-1)
    (wanted,) = torch.autograd.grad(closed.sum(), logits)
    assert found.tolist() == pytest.approx(closed.tolist(), abs=0.008)
    assert torch.allclose(gradient, wanted, atol=0.006)
    assert wanted.abs().max() > 0.05


def test_the_papers_constants_are_the_defaults():
    logits, targets = seeded_logits(2, 7), torch.tensor([3, 6])
    torch.manual_seed(5)
    plain = one_token_rollout(logits, targets)
    torch.manual_seed(5)
    assert torch.equal(plain, one_token_rollout(logits, targets, samples=256, temperature=1.3, wrong_reward=-0.1))


def test_a_target_that_is_never_drawn_teaches_nothing_without_a_reward_for_the_wrong():
    logits = torch.tensor([[0.0, 1.0, -1000.0], [2.0, 0.0, 0.5]], requires_grad=True)
    one_token_rollout(logits, torch.tensor([2, 0]), wrong_reward=0.0).sum().backward()
    assert logits.grad[0].abs().max() == 0
    assert logits.grad[1, 0] < 0  # the other position's target is drawn, and pushed up


def test_wrong_draws_are_pushed_down():
    """So cold a draw is token 0 every time, which is wrong: the gradient is 0.1 (one_hot - pi), pi at temperature 1.

    pi(0) = e^2 / (e^2 + 2) = 0.786986, the others 0.106507 each.
    """
    logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    one_token_rollout(logits, torch.tensor([1]), temperature=0.02).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([0.0213014, -0.0106507, -0.0106507], abs=1e-6)


def test_activations_computed_again_have_the_same_draws():
    """Or the backward pass of a checkpointed head would be that of other candidates."""
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(6, 4, generator=generator), torch.randn(9, 4, generator=generator).requires_grad_()
    targets = torch.arange(6)

    def loss(hidden_ND):
        return one_token_rollout(hidden_ND @ head.T, targets, samples=5)

    gradients = []
    for run in (loss, lambda hidden_ND: checkpoint(loss, hidden_ND, use_reentrant=False)):
        torch.manual_seed(2)
        scored = run(hidden).sum()
        torch.rand(100)  # what else happens before the backward pass
        gradients.append(torch.autograd.grad(scored, head)[0])
    assert torch.allclose(*gradients, atol=1e-6)


def test_one_token_rollout_survives_far_logits():
    logits = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    loss = one_token_rollout(logits, torch.tensor([0]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(logits.grad).all()


VOCABULARY = np.arange(100, 150)


def read(rate, *, eligible=None, mask_token=None, seed=0, length=1000):
    tokens = np.arange(length, dtype=np.int32) + 1000
    eligible = np.ones(length, bool) if eligible is None else eligible
    kept = tokens.copy()
    rng = np.random.default_rng(seed)
    found = masked_thought(tokens, eligible, rate=rate, vocabulary=VOCABULARY, rng=rng, mask_token=mask_token)
    assert np.array_equal(tokens, kept)  # the caller's tokens, from which it takes the labels
    assert found.dtype == np.int32
    return tokens, found


@pytest.mark.parametrize("mask_token", [None, 7])
def test_only_eligible_positions_change(mask_token):
    eligible = np.arange(1000) % 3 == 1
    tokens, found = read(1.0, eligible=eligible, mask_token=mask_token)
    assert np.array_equal(found != tokens, eligible)


def test_random_ids_come_from_all_of_the_vocabulary():
    _, found = read(1.0)
    assert set(found.tolist()) == set(VOCABULARY.tolist())
    counts = np.bincount(found - 100)
    assert counts.max() < 45  # 20 expected; standard deviation 4.4


def test_a_mask_token_is_the_only_replacement():
    tokens, found = read(0.5, mask_token=7)
    assert set(found[found != tokens].tolist()) == {7}


def test_the_count_is_binomial():
    """Of 50 eligible positions at rate 0.4: mean 20, variance 50 * 0.4 * 0.6 = 12; a fixed count would have none."""
    eligible = np.arange(100) < 50
    counts = []
    for seed in range(2000):
        tokens, found = read(0.4, eligible=eligible, mask_token=7, seed=seed, length=100)
        counts.append(int((found != tokens).sum()))
    assert np.mean(counts) == pytest.approx(20, abs=0.4)
    assert np.var(counts) == pytest.approx(12, abs=1.5)


def test_every_eligible_position_is_as_likely():
    """2,000 draws at rate 0.4: each position 800 times, standard deviation 22."""
    changed = np.zeros(20)
    for seed in range(2000):
        tokens, found = read(0.4, mask_token=7, seed=seed, length=20)
        changed += found != tokens
    assert changed.min() > 690 and changed.max() < 910


@pytest.mark.parametrize("eligible", [None, np.zeros(1000, bool)])
def test_rate_0_or_nothing_eligible_reads_the_tokens_as_they_are(eligible):
    tokens, found = read(0.0 if eligible is None else 1.0, eligible=eligible)
    assert np.array_equal(tokens, found)


def test_the_generator_decides():
    assert np.array_equal(read(0.3, seed=4)[1], read(0.3, seed=4)[1])
    assert not np.array_equal(read(0.3, seed=4)[1], read(0.3, seed=5)[1])


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (10, 0.1), (20, 0.2), (39, 0.39), (40, 0.4), (59, 0.4)],  # 60 steps: up to 0.4 over the first 40
)
def test_the_rate_by_hand(step, expected):
    assert masked_thought_rate(step, 60, rate=0.4) == pytest.approx(expected)


def test_without_a_warm_up_the_rate_is_there_at_once():
    assert [masked_thought_rate(s, 5, rate=0.2, warmup=0.0) for s in range(5)] == [0.2] * 5
    assert math.isclose(masked_thought_rate(1, 4, rate=0.2, warmup=1.0), 0.05)
