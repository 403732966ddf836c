"""One optimizer step: its gradient must not depend on how the batch was cut, packed, filled or retried."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.batch import Sample
from rl.config import GrpoConfig, KlConfig
from rl.gradient import (
    OutOfDeviceMemory,
    TorchTrainer,
    add_sums,
    grpo_objective,
    optimizer_step,
    sft_objective,
    to_metrics,
    weigh,
)
from rl.model import TokenScorer, frozen_logprobs

LENGTHS = [6, 40, 9, 25, 12, 33]
AGGREGATIONS = ["token", "sequence", "fixed_length"]


def algorithm(aggregation: str = "token", **changes) -> GrpoConfig:
    fixed = 20 if aggregation == "fixed_length" else None
    return GrpoConfig(aggregation=aggregation, fixed_length=fixed, kl=KlConfig(coefficient=0.1), **changes)


class KeepsGradients(TorchTrainer):
    """A trainer that stops before the optimizer: what is compared is the gradient itself."""

    def __init__(self, lm, extra_fillers: int = 0, memory_tokens: int | None = None):
        super().__init__(TokenScorer(lm), betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1e9, device="cpu")
        self._extra_fillers, self._memory_tokens = extra_fillers, memory_tokens
        self.forwards: list[int] = []

    def forward(self, micro, temperature):
        self.forwards.append(len(micro.packed.tokens_U))
        if self._memory_tokens is not None and self.forwards[-1] > self._memory_tokens:
            raise torch.cuda.OutOfMemoryError("a device that holds few tokens")
        return super().forward(micro, temperature)

    def largest(self, number: int) -> int:
        return number + self._extra_fillers

    def step(self, lr: float) -> float:
        self.gradient = torch.cat([p.grad.flatten() for p in self.scorer.parameters()])
        self.zero_grad()
        return float(self.gradient.norm())


@pytest.fixture
def samples(make_trajectory):
    """Sampled by a policy near the learner's; references near both. All begin alike, two of them for 20 tokens."""

    def make(algo: GrpoConfig | None, junk: float = 0.0) -> list[Sample]:
        trajectories = [make_trajectory(n, junk=junk) for n in LENGTHS]
        for t in trajectories:
            t.tokens[:4] = trajectories[0].tokens[:4]
        trajectories[3].tokens[:20] = trajectories[1].tokens[:20]
        weights = weigh([int(t.loss_mask[1:].sum()) for t in trajectories], algo)
        references = [np.where(t.loss_mask, t.logprobs + 0.3, junk).astype(np.float32) for t in trajectories]
        advantages = [1.0, -0.5, 2.0, -1.5, 0.0, 0.7]
        return [Sample(t, w, a, r) for t, w, a, r in zip(trajectories, weights, advantages, references, strict=True)]

    return make


def gradient(lm, samples, objective, budget=10_000, **trainer):
    keeps = KeepsGradients(lm, **trainer)
    sums, budget = optimizer_step(keeps, samples, objective, lr=0.0, temperature=0.7, token_budget=budget)
    return keeps, to_metrics(sums), budget


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_cutting_the_batch_changes_no_gradient_and_no_metric(tiny_lm, samples, aggregation):
    algo = algorithm(aggregation)
    whole, metrics, _ = gradient(tiny_lm, samples(algo), grpo_objective(algo))
    cut, cut_metrics, _ = gradient(tiny_lm, samples(algo), grpo_objective(algo), budget=1)
    assert len(cut.forwards) == len(LENGTHS) > len(whole.forwards)
    assert whole.gradient.abs().max() > 1e-3
    assert torch.allclose(cut.gradient, whole.gradient, atol=1e-5)
    assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_is_that_of_the_formula(tiny_lm, plain_lm, samples, monkeypatch, aggregation, whole):
    """The whole chain against GRPO written out on the raw model, one episode at a time, without rl/."""
    if not whole:
        monkeypatch.setattr("rl.model._LOGITS_HELD", {True: 350})  # the head at 7 positions at a time
    algo, batch = algorithm(aggregation), samples(algorithm(aggregation))
    ours, metrics, _ = gradient(tiny_lm, batch, grpo_objective(algo))
    per_episode, clipped, tokens = [], 0, 0
    for s in batch:
        ids, mask = torch.tensor(s.trajectory.tokens, dtype=torch.int64), torch.tensor(s.trajectory.loss_mask)
        logp = (plain_lm(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, ids[1:, None])[:, 0][mask[1:]]
        old, ref = torch.tensor(s.trajectory.logprobs)[mask], torch.tensor(s.reference)[mask]
        ratio = torch.exp(logp - old)
        surrogate = torch.min(ratio * s.advantage, ratio.clamp(0.8, 1.28) * s.advantage)
        per_episode.append(-surrogate + 0.1 * (torch.exp(ref - logp) - (ref - logp) - 1))
        clipped += int(((ratio > 1.28) & (s.advantage > 0) | (ratio < 0.8) & (s.advantage < 0)).sum())
        tokens += len(logp)
    loss = {
        "token": torch.cat(per_episode).mean(),
        "sequence": torch.stack([p.mean() for p in per_episode]).mean(),
        "fixed_length": torch.cat(per_episode).sum() / (len(batch) * 20),
    }[aggregation]
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in plain_lm.parameters()])
    assert torch.allclose(ours.gradient, expected, atol=5e-5)  # of numbers up to 20
    assert 0 < clipped < tokens
    assert metrics["actor/clip_fraction"] == pytest.approx(clipped / tokens)


def test_gradient_checkpointing_changes_no_gradient(tiny_lm, samples):
    algo = algorithm()
    plain, _, _ = gradient(tiny_lm, samples(algo), grpo_objective(algo))
    tiny_lm.train()  # transformers checkpoints in training only
    tiny_lm.gradient_checkpointing_enable()
    recomputed, _, _ = gradient(tiny_lm, samples(algo), grpo_objective(algo))
    assert tiny_lm.is_gradient_checkpointing
    assert torch.allclose(recomputed.gradient, plain.gradient, atol=1e-5)


def test_fillers_change_nothing(tiny_lm, samples):
    """Ranks with fewer micro-batches run fillers to keep collectives in step; no gradient, no metric may notice."""
    algo = algorithm()
    plain, metrics, _ = gradient(tiny_lm, samples(algo), grpo_objective(algo), budget=50)
    filled, filled_metrics, _ = gradient(tiny_lm, samples(algo), grpo_objective(algo), budget=50, extra_fillers=3)
    assert len(filled.forwards) == len(plain.forwards) + 3
    assert torch.equal(filled.gradient, plain.gradient)
    assert filled_metrics == metrics


@pytest.mark.parametrize("objective", ["grpo", "sft"])
def test_nan_off_the_mask_does_not_leak(tiny_lm, samples, objective):
    algo = algorithm()
    chosen = grpo_objective(algo) if objective == "grpo" else sft_objective
    clean, metrics, _ = gradient(tiny_lm, samples(algo), chosen)
    junk, junk_metrics, _ = gradient(tiny_lm, samples(algo, junk=float("nan")), chosen)
    assert torch.equal(junk.gradient, clean.gradient)
    assert junk_metrics == metrics


def test_an_episode_without_a_trained_token_adds_nothing(tiny_lm, samples, make_trajectory):
    batch = samples(None)
    empty = Sample(make_trajectory(20, mask=[False] * 20), 1.0, 1.0, np.zeros(20, np.float32))
    alone, _, _ = gradient(tiny_lm, batch, grpo_objective(algorithm()), budget=1)
    beside, _, _ = gradient(tiny_lm, [*batch, empty], grpo_objective(algorithm()), budget=1)
    assert torch.equal(beside.gradient, alone.gradient)


def test_sft_is_the_mean_negative_log_likelihood_of_the_assistants_tokens(tiny_lm, plain_lm, make_trajectory):
    """transformers' own loss, with -100 as the label of every token that the assistant did not say."""
    mask = [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    trajectory = make_trajectory(10, mask=mask)
    ours, metrics, _ = gradient_at_one(tiny_lm, trajectory)
    ids = torch.tensor(trajectory.tokens, dtype=torch.int64)[None]
    loss = plain_lm(input_ids=ids, labels=ids.masked_fill(~torch.tensor([mask], dtype=torch.bool), -100)).loss
    loss.backward()
    assert metrics["sft/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(ours.gradient, torch.cat([p.grad.flatten() for p in plain_lm.parameters()]), atol=1e-5)


def test_sft_has_no_observation_token_among_its_targets(tiny_lm, make_trajectory):
    """Changing what follows the last assistant token changes no number at all: nothing there is predicted."""
    before = make_trajectory(10, mask=[0, 0, 0, 1, 1, 1, 0, 0, 0, 0])
    tokens = before.tokens.copy()
    tokens[6:] = (tokens[6:] + 7) % 50
    one, metrics, _ = gradient_at_one(tiny_lm, before)
    other, other_metrics, _ = gradient_at_one(tiny_lm, replace(before, tokens=tokens))
    assert torch.allclose(one.gradient, other.gradient, atol=1e-7)
    assert other_metrics == pytest.approx(metrics, abs=1e-6)


def gradient_at_one(lm, trajectory):
    keeps = KeepsGradients(lm)
    (weight,) = weigh([int(trajectory.loss_mask[1:].sum())], None)
    arguments = {"lr": 0.0, "temperature": 1.0, "token_budget": 100}
    sums, budget = optimizer_step(keeps, [Sample(trajectory, weight)], sft_objective, **arguments)
    return keeps, to_metrics(sums), budget


# -- out of memory, and numbers that are not finite -------------------------------------------------------------


def test_out_of_memory_halves_the_budget_and_keeps_the_gradient(tiny_lm, samples):
    algo = algorithm()
    roomy, metrics, kept = gradient(tiny_lm, samples(algo), grpo_objective(algo), budget=400)
    # 125 tokens in all: more than 50 stand together at a budget of 400, 200 and 100 alike.
    tight, tight_metrics, budget = gradient(tiny_lm, samples(algo), grpo_objective(algo), budget=400, memory_tokens=50)
    assert (kept, budget) == (400, 50)
    assert torch.allclose(tight.gradient, roomy.gradient, atol=1e-5)
    assert tight_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def test_memory_that_fails_late_leaves_no_gradient_behind(tiny_lm, samples):
    """The first micro-batch goes through, a later and larger one does not: the retry must start from zero."""
    algo = algorithm()
    roomy, _, _ = gradient(tiny_lm, samples(algo), grpo_objective(algo))

    class FailsOnce(KeepsGradients):
        def forward(self, micro, temperature):
            if len(self.forwards) == 2:
                self.forwards.append(0)
                raise torch.cuda.OutOfMemoryError("the third micro-batch does not fit")
            return super().forward(micro, temperature)

    trainer = FailsOnce(tiny_lm)
    _, budget = optimizer_step(trainer, samples(algo), grpo_objective(algo), lr=0.0, temperature=0.7, token_budget=44)
    assert budget == 22
    assert torch.allclose(trainer.gradient, roomy.gradient, atol=1e-5)


def test_memory_too_small_for_one_row_names_the_setting(tiny_lm, samples):
    with pytest.raises(OutOfDeviceMemory, match=r"learner\.micro_batch_tokens"):
        gradient(tiny_lm, samples(algorithm()), grpo_objective(algorithm()), budget=400, memory_tokens=5)


def test_a_trainer_that_cannot_retry_says_so_at_once(tiny_lm, samples):
    trainer = KeepsGradients(tiny_lm, memory_tokens=5)
    trainer.can_retry = False
    with pytest.raises(OutOfDeviceMemory, match="gradient_checkpointing"):
        optimizer_step(trainer, samples(None), sft_objective, lr=0.0, temperature=1.0, token_budget=400)
    assert len(trainer.forwards) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_step_before_the_weights(tiny_lm, samples, value):
    trainer = TorchTrainer(TokenScorer(tiny_lm), betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0, device="cpu")
    before = [p.detach().clone() for p in tiny_lm.parameters()]
    bad = [replace(s, advantage=value) for s in samples(algorithm())]
    with pytest.raises(FloatingPointError):
        optimizer_step(trainer, bad, grpo_objective(algorithm()), lr=1.0, temperature=1.0, token_budget=400)
    assert all(torch.equal(p, b) for p, b in zip(tiny_lm.parameters(), before, strict=True))


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_lm, samples):
    class Overflows(KeepsGradients):
        def step(self, lr):
            return float("inf")

    with pytest.raises(FloatingPointError, match="learning rate"):
        optimizer_step(Overflows(tiny_lm), samples(None), sft_objective, lr=0.0, temperature=1.0, token_budget=400)


# -- the trainer and the numbers it reports ---------------------------------------------------------------------


def test_steps_of_the_trainer_learn_a_trajectory(tiny_lm, make_trajectory):
    """Clipping, AdamW and the rate of each step, all real: the loss of one demonstration falls to almost nothing."""
    trainer = TorchTrainer(TokenScorer(tiny_lm), betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0, device="cpu")
    sample = Sample(make_trajectory(12), weight=1 / 8)
    losses = [
        optimizer_step(trainer, [sample], sft_objective, lr=5e-3, temperature=1.0, token_budget=99)[0]["sft/loss"]
        for _ in range(40)
    ]
    assert losses[-1] < 0.1 * losses[0]


def test_an_epsilon_far_above_the_gradient_makes_the_first_step_follow_it(tiny_lm, samples):
    """Adam's first update is lr g / (|g| + eps): lr g / eps when eps is far larger, and not lr sign(g)."""
    kept = KeepsGradients(tiny_lm)
    optimizer_step(kept, samples(None), sft_objective, lr=0.0, temperature=1.0, token_budget=400)
    before = torch.cat([p.detach().flatten() for p in tiny_lm.parameters()])
    trainer = TorchTrainer(
        TokenScorer(tiny_lm), betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1e9, device="cpu", eps=1e4
    )
    optimizer_step(trainer, samples(None), sft_objective, lr=1e3, temperature=1.0, token_budget=400)
    moved = torch.cat([p.detach().flatten() for p in tiny_lm.parameters()]) - before
    torch.testing.assert_close(moved, -0.1 * kept.gradient, rtol=1e-2, atol=1e-5)


def test_a_rate_of_zero_moves_nothing(tiny_lm, samples):
    trainer = TorchTrainer(TokenScorer(tiny_lm), betas=(0.9, 0.95), weight_decay=0.1, grad_clip=1.0, device="cpu")
    before = [p.detach().clone() for p in tiny_lm.parameters()]
    optimizer_step(trainer, samples(None), sft_objective, lr=0.0, temperature=1.0, token_budget=400)
    assert all(torch.equal(p, b) for p, b in zip(tiny_lm.parameters(), before, strict=True))


def test_sums_become_means_and_maxima_stay():
    total = add_sums({"a": 3.0, "m/max": 2.0, "tokens": 2.0}, {"a": 5.0, "m/max": -1.0, "tokens": 6.0})
    assert total == {"a": 8.0, "m/max": 2.0, "tokens": 8.0}
    assert to_metrics(total) == {"a": 1.0, "m": 2.0}
    assert add_sums({}, {"m/max": -1.0}) == {"m/max": -1.0}  # an empty side is not a maximum of 0


def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(tiny_lm, make_trajectory):
    """Log-probs recorded by the same weights at the same temperature: mismatch 0. At another temperature: not 0."""
    trajectory = make_trajectory(20)
    (recorded,) = frozen_logprobs(TokenScorer(tiny_lm), [trajectory], 0.7, 99)
    batch = [Sample(replace(trajectory, logprobs=recorded), 0.1, 1.0)]
    _, metrics, _ = gradient(tiny_lm, batch, grpo_objective(GrpoConfig()))
    assert metrics["mismatch/max_logprob_diff"] < 1e-5
    assert metrics["mismatch/kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["actor/clip_fraction"] == 0
    assert metrics["actor/pg_loss"] == pytest.approx(-1.0, abs=1e-5)
    trainer = KeepsGradients(tiny_lm)
    sums, _ = optimizer_step(trainer, batch, grpo_objective(GrpoConfig()), lr=0.0, temperature=1.0, token_budget=99)
    assert to_metrics(sums)["mismatch/kl"] > 1e-3
