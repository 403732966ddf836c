"""One optimizer step: its gradient must not depend on how the batch was cut, packed, filled or retried."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gradients import KeepsGradients, flat_gradient, gradient

from rl.algo.loss import token_weights
from rl.batch import Sample, spread_weights, turn_lengths
from rl.config_algo import AlgoConfig
from rl.gradient import OutOfDeviceMemory, TorchTrainer, optimizer_step
from rl.model import LogprobHead, TokenScorer, frozen_scores
from rl.objective import PolicyGradient, Supervised, add_sums, to_metrics

LENGTHS = [6, 40, 9, 25, 12, 33]
AGGREGATIONS = ["token", "sequence", "fixed_length"]


def algorithm(aggregation: Any = "token", **changes) -> AlgoConfig:
    fixed = 20 if aggregation == "fixed_length" else None
    kl: Any = {"coefficient": 0.1}
    return AlgoConfig(clip_high=0.28, aggregation=aggregation, fixed_length=fixed, kl=kl, **changes)


def grpo(algo: AlgoConfig, temperature: float = 0.7) -> PolicyGradient:
    return PolicyGradient.of(algo, temperature)


@pytest.fixture
def scorer(tiny_lm, plain_lm):
    """Made after the copy with transformers' own attention was."""
    return TokenScorer(tiny_lm)


@pytest.fixture
def samples(make_trajectory):
    """Sampled by a policy near the learner's; references near both. All begin alike, two of them for 20 tokens."""

    def make(algo: AlgoConfig, junk: float = 0.0) -> list[Sample]:
        trajectories = [make_trajectory(n, junk=junk) for n in LENGTHS]
        for t in trajectories:
            t.tokens[:4] = trajectories[0].tokens[:4]
        trajectories[3].tokens[:20] = trajectories[1].tokens[:20]
        weights = token_weights(
            [turn_lengths(t) for t in trajectories], aggregation=algo.aggregation, fixed_length=algo.fixed_length
        )
        made = []
        for t, w, advantage in zip(trajectories, weights, [1.0, -0.5, 2.0, -1.5, 0.0, 0.7], strict=True):
            columns = {"advantages": advantage, "reference": t.logprobs + 0.3}
            columns = {name: np.where(t.loss_mask, x, junk).astype(np.float32) for name, x in columns.items()}
            made.append(Sample(t, spread_weights(t, w), columns))
        return made

    return make


def demonstration(trajectory) -> Sample:
    """Alone in its batch."""
    (weights,) = token_weights([turn_lengths(trajectory)], aggregation="token")
    return Sample(trajectory, spread_weights(trajectory, weights))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_cutting_the_batch_changes_no_gradient_and_no_metric(scorer, samples, aggregation):
    algo = algorithm(aggregation)
    whole, metrics, _ = gradient(scorer, samples(algo), grpo(algo))
    cut, cut_metrics, _ = gradient(scorer, samples(algo), grpo(algo), budget=1)
    assert len(cut.forwards) == len(LENGTHS) > len(whole.forwards)
    assert whole.gradient.abs().max() > 1e-3
    assert torch.allclose(cut.gradient, whole.gradient, atol=1e-5)
    assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_is_that_of_the_formula(scorer, plain_lm, samples, monkeypatch, aggregation, whole):
    """The whole chain against GRPO written out on the raw model, one episode at a time, without rl/."""
    if not whole:
        monkeypatch.setattr("rl.model._LOGITS_HELD", {True: 350})  # the head at 7 positions at a time
    algo, batch = algorithm(aggregation), samples(algorithm(aggregation))
    ours, metrics, _ = gradient(scorer, batch, grpo(algo))
    per_episode, clipped, tokens = [], 0, 0
    for s in batch:
        ids, mask = torch.tensor(s.trajectory.tokens, dtype=torch.int64), torch.tensor(s.trajectory.loss_mask)
        logp = (plain_lm(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, ids[1:, None])[:, 0][mask[1:]]
        old, ref = torch.tensor(s.trajectory.logprobs)[mask], torch.tensor(s.columns["reference"])[mask]
        advantage = torch.tensor(s.columns["advantages"])[mask]
        ratio = torch.exp(logp - old)
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        per_episode.append(-surrogate + 0.1 * (torch.exp(ref - logp) - (ref - logp) - 1))
        clipped += int(((ratio > 1.28) & (advantage > 0) | (ratio < 0.8) & (advantage < 0)).sum())
        tokens += len(logp)
    loss = {
        "token": torch.cat(per_episode).mean(),
        "sequence": torch.stack([p.mean() for p in per_episode]).mean(),
        "fixed_length": torch.cat(per_episode).sum() / (len(batch) * 20),
    }[aggregation]
    loss.backward()
    expected = flat_gradient(plain_lm.parameters())
    assert torch.allclose(ours.gradient, expected, atol=5e-5)  # of numbers up to 20
    assert 0 < clipped < tokens
    assert metrics["actor/clip_fraction"] == pytest.approx(clipped / tokens)


def test_gradient_checkpointing_changes_no_gradient(scorer, tiny_lm, samples):
    algo = algorithm()
    plain, _, _ = gradient(scorer, samples(algo), grpo(algo))
    tiny_lm.train()  # transformers checkpoints in training only
    tiny_lm.gradient_checkpointing_enable()
    recomputed, _, _ = gradient(scorer, samples(algo), grpo(algo))
    assert tiny_lm.is_gradient_checkpointing
    assert torch.allclose(recomputed.gradient, plain.gradient, atol=1e-5)


def test_fillers_change_nothing(scorer, samples):
    """Ranks with fewer micro-batches run fillers to keep collectives in step; no gradient, no metric may notice."""
    algo = algorithm()
    plain, metrics, _ = gradient(scorer, samples(algo), grpo(algo), budget=50)
    filled, filled_metrics, _ = gradient(scorer, samples(algo), grpo(algo), budget=50, extra_fillers=3)
    assert len(filled.forwards) == len(plain.forwards) + 3
    assert torch.equal(filled.gradient, plain.gradient)
    assert filled_metrics == metrics


@pytest.mark.parametrize("objective", ["grpo", "sft"])
def test_nan_off_the_mask_does_not_leak(scorer, samples, objective):
    algo = algorithm()
    chosen = grpo(algo) if objective == "grpo" else Supervised()
    clean, metrics, _ = gradient(scorer, samples(algo), chosen)
    junk, junk_metrics, _ = gradient(scorer, samples(algo, junk=float("nan")), chosen)
    assert torch.equal(junk.gradient, clean.gradient)
    assert junk_metrics == metrics


def test_an_episode_without_a_trained_token_adds_nothing(scorer, samples, make_trajectory):
    batch = samples(algorithm())
    nothing = np.full(20, np.nan, np.float32)
    columns = {"advantages": nothing, "reference": nothing}
    empty = Sample(make_trajectory(20, mask=[False] * 20), nothing, columns)
    alone, _, _ = gradient(scorer, batch, grpo(algorithm()), budget=1)
    beside, _, _ = gradient(scorer, [*batch, empty], grpo(algorithm()), budget=1)
    assert torch.equal(beside.gradient, alone.gradient)


def test_sft_is_the_mean_negative_log_likelihood_of_the_assistants_tokens(scorer, plain_lm, make_trajectory):
    """transformers' own loss, with -100 as the label of every token that the assistant did not say."""
    mask = [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    trajectory = make_trajectory(10, mask=mask)
    ours, metrics, _ = gradient_at_one(scorer, trajectory)
    ids = torch.tensor(trajectory.tokens, dtype=torch.int64)[None]
    loss = plain_lm(input_ids=ids, labels=ids.masked_fill(~torch.tensor([mask], dtype=torch.bool), -100)).loss
    loss.backward()
    assert metrics["sft/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(ours.gradient, flat_gradient(plain_lm.parameters()), atol=1e-5)


def test_sft_has_no_observation_token_among_its_targets(scorer, make_trajectory):
    """Changing what follows the last assistant token changes no number at all: nothing there is predicted."""
    before = make_trajectory(10, mask=[0, 0, 0, 1, 1, 1, 0, 0, 0, 0])
    tokens = before.tokens.copy()
    tokens[6:] = (tokens[6:] + 7) % 50
    one, metrics, _ = gradient_at_one(scorer, before)
    other, other_metrics, _ = gradient_at_one(scorer, replace(before, tokens=tokens))
    assert torch.allclose(one.gradient, other.gradient, atol=1e-7)
    assert other_metrics == pytest.approx(metrics, abs=1e-6)


def gradient_at_one(scorer, trajectory):
    return gradient(scorer, [demonstration(trajectory)], Supervised(), budget=100)


# -- out of memory, and numbers that are not finite -------------------------------------------------------------


def test_out_of_memory_halves_the_budget_and_keeps_the_gradient(scorer, samples):
    algo = algorithm()
    roomy, metrics, kept = gradient(scorer, samples(algo), grpo(algo), budget=400)
    # 125 tokens in all: more than 50 stand together at a budget of 400, 200 and 100 alike.
    tight, tight_metrics, budget = gradient(scorer, samples(algo), grpo(algo), budget=400, memory_tokens=50)
    assert (kept, budget) == (400, 50)
    assert torch.allclose(tight.gradient, roomy.gradient, atol=1e-5)
    assert tight_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def test_memory_that_fails_late_leaves_no_gradient_behind(scorer, samples):
    """The first micro-batch goes through, a later and larger one does not: the retry must start from zero."""
    algo = algorithm()
    roomy, _, _ = gradient(scorer, samples(algo), grpo(algo))

    class FailsOnce(KeepsGradients):
        def forward(self, micro, objective):
            if len(self.forwards) == 2:
                self.forwards.append(0)
                raise torch.cuda.OutOfMemoryError("the third micro-batch does not fit")
            return super().forward(micro, objective)

    trainer = FailsOnce(scorer)
    _, budget = optimizer_step(trainer, samples(algo), grpo(algo), lr=0.0, token_budget=44)
    assert budget == 22
    assert torch.allclose(trainer.gradient, roomy.gradient, atol=1e-5)


def test_memory_too_small_for_one_row_names_the_setting(scorer, samples):
    with pytest.raises(OutOfDeviceMemory, match=r"learner\.micro_batch_tokens"):
        gradient(scorer, samples(algorithm()), grpo(algorithm()), budget=400, memory_tokens=5)


def test_a_trainer_that_cannot_retry_says_so_at_once(scorer, samples):
    trainer = KeepsGradients(scorer, memory_tokens=5)
    trainer.can_retry = False
    with pytest.raises(OutOfDeviceMemory, match="gradient_checkpointing"):
        optimizer_step(trainer, samples(algorithm()), Supervised(), lr=0.0, token_budget=400)
    assert len(trainer.forwards) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_step_before_the_weights(scorer, tiny_lm, samples, value):
    trainer = TorchTrainer(scorer, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0, device="cpu")
    before = [p.detach().clone() for p in tiny_lm.parameters()]
    bad = [
        replace(s, columns={**s.columns, "advantages": np.full(len(s.trajectory), value, np.float32)})
        for s in samples(algorithm())
    ]
    with pytest.raises(FloatingPointError):
        optimizer_step(trainer, bad, grpo(algorithm()), lr=1.0, token_budget=400)
    assert all(torch.equal(p, b) for p, b in zip(tiny_lm.parameters(), before, strict=True))


def test_a_gradient_that_is_not_finite_stops_the_run(scorer, samples):
    class Overflows(KeepsGradients):
        def step(self, lr):
            return float("inf")

    with pytest.raises(FloatingPointError, match="learning rate"):
        optimizer_step(Overflows(scorer), samples(algorithm()), Supervised(), lr=0.0, token_budget=400)


# -- the trainer and the numbers it reports ---------------------------------------------------------------------


def test_steps_of_the_trainer_learn_a_trajectory(scorer, make_trajectory):
    """Clipping, AdamW and the rate of each step, all real: the loss of one demonstration falls to almost nothing."""
    trainer = TorchTrainer(scorer, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0, device="cpu")
    sample = demonstration(make_trajectory(12))
    losses = [
        optimizer_step(trainer, [sample], Supervised(), lr=5e-3, token_budget=99)[0]["sft/loss"] for _ in range(40)
    ]
    assert losses[-1] < 0.1 * losses[0]


def test_an_epsilon_far_above_the_gradient_makes_the_first_step_follow_it(scorer, tiny_lm, samples):
    """Adam's first update is lr g / (|g| + eps): lr g / eps when eps is far larger, and not lr sign(g)."""
    kept = KeepsGradients(scorer)
    optimizer_step(kept, samples(algorithm()), Supervised(), lr=0.0, token_budget=400)
    before = torch.cat([p.detach().flatten() for p in tiny_lm.parameters()])
    trainer = TorchTrainer(scorer, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1e9, device="cpu", eps=1e4)
    optimizer_step(trainer, samples(algorithm()), Supervised(), lr=1e3, token_budget=400)
    moved = torch.cat([p.detach().flatten() for p in tiny_lm.parameters()]) - before
    torch.testing.assert_close(moved, -0.1 * kept.gradient, rtol=1e-2, atol=1e-5)


def test_a_rate_of_zero_moves_nothing(scorer, tiny_lm, samples):
    trainer = TorchTrainer(scorer, betas=(0.9, 0.95), weight_decay=0.1, grad_clip=1.0, device="cpu")
    before = [p.detach().clone() for p in tiny_lm.parameters()]
    optimizer_step(trainer, samples(algorithm()), Supervised(), lr=0.0, token_budget=400)
    assert all(torch.equal(p, b) for p, b in zip(tiny_lm.parameters(), before, strict=True))


def test_sums_become_means_and_maxima_stay():
    total = add_sums({"a/x": 3.0, "m/max": 2.0, "tokens": 2.0}, {"a/x": 5.0, "m/max": -1.0, "tokens": 6.0})
    assert total == {"a/x": 8.0, "m/max": 2.0, "tokens": 8.0}
    assert to_metrics(total) == {"a/x": 1.0, "m": 2.0}
    assert add_sums({}, {"m/max": -1.0}) == {"m/max": -1.0}  # an empty side is not a maximum of 0


def test_counts_of_other_things_than_tokens_have_names():
    sums = {"a/x": 6.0, "b/y@pairs": 6.0, "b/z@values": 1.0, "c/max": -2.0, "tokens": 3.0, "pairs": 2.0}
    assert to_metrics(sums) == {"a/x": 2.0, "b/y": 3.0, "b/z": 1.0, "c": -2.0}


def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(scorer, make_trajectory):
    """Log-probs recorded by the same weights at the same temperature: mismatch 0. At another temperature: not 0."""
    trajectory = make_trajectory(20)
    (recorded,) = frozen_scores(scorer, [trajectory], LogprobHead(0.7), 99)
    ones = np.ones(20, np.float32)
    batch = [Sample(replace(trajectory, logprobs=recorded), 0.1 * ones, {"advantages": ones})]
    _, metrics, _ = gradient(scorer, batch, grpo(AlgoConfig()))
    assert metrics["mismatch/max_logprob_diff"] < 1e-5
    assert metrics["mismatch/kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["actor/clip_fraction"] == 0
    assert metrics["actor/pg_loss"] == pytest.approx(-1.0, abs=1e-5)
    _, metrics, _ = gradient(scorer, batch, grpo(AlgoConfig(), temperature=1.0))
    assert metrics["mismatch/kl"] > 1e-3
