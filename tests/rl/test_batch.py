"""Packing: padding and cuts that must not be visible in any number."""

import dataclasses

import numpy as np
import pytest
import torch

from rl.batch import Sample, balance, collate, filler, mini_batches, plan
from rl.model import TokenScorer, sequence_logprobs

LENGTHS = [5, 60, 7, 31, 30, 8, 55, 6, 5, 29]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_padding_changes_no_logprob_and_no_entropy(tiny_lm, make_trajectory, temperature):
    """A padded batch, scored at its masked positions, against the raw model's full softmax, one row at a time."""
    trajectories = [make_trajectory(n) for n in (5, 17, 11)]
    micro = collate([Sample(t, 1.0) for t in trajectories])
    with torch.no_grad():
        logprobs, entropy = TokenScorer(tiny_lm)(micro.tokens_BT, micro.mask_BT, temperature)
        expected_logprobs, expected_entropy = [], []
        for t in trajectories:
            tokens = torch.tensor(t.tokens, dtype=torch.int64)
            at_T = torch.distributions.Categorical(logits=tiny_lm(tokens[None]).logits[0] / temperature)
            entropies = at_T.entropy()
            for position in np.flatnonzero(t.loss_mask):
                expected_logprobs.append(torch.log(at_T.probs[position - 1, tokens[position]]))
                expected_entropy.append(entropies[position - 1])
    assert torch.allclose(logprobs, torch.stack(expected_logprobs), atol=2e-5)
    assert torch.allclose(entropy, torch.stack(expected_entropy), atol=2e-5)
    assert entropy.std() > 1e-3  # a model whose every distribution is alike would prove nothing


def test_the_probe_scores_every_token_but_the_first(tiny_lm):
    tokens = [3, 1, 4, 1, 5]
    with torch.no_grad():
        expected = tiny_lm(torch.tensor([tokens])).logits[0].log_softmax(-1)
    wanted = [expected[i, token].item() for i, token in enumerate(tokens[1:])]
    assert sequence_logprobs(TokenScorer(tiny_lm), tokens).tolist() == pytest.approx(wanted, abs=1e-5)


def test_collate_lines_values_up_with_their_tokens(make_trajectory):
    short, long = make_trajectory(3, mask=[0, 0, 1]), make_trajectory(5, mask=[0, 1, 0, 1, 1])
    micro = collate([Sample(short, 0.5, advantage=2.0), Sample(long, 0.25, advantage=-1.0)])
    assert micro.tokens_BT.tolist() == [[*short.tokens, 0, 0], [*long.tokens]]
    assert micro.mask_BT.tolist() == [[False, False, True, False, False], [False, True, False, True, True]]
    assert micro.weights_N.tolist() == [0.5, 0.25, 0.25, 0.25]
    assert micro.advantages_N.tolist() == [2.0, -1.0, -1.0, -1.0]
    assert micro.behaviour_N.tolist() == [*short.logprobs[[2]], *long.logprobs[[1, 3, 4]]]
    assert micro.reference_N is None


def test_collate_takes_nothing_from_off_the_mask(make_trajectory):
    """NaN beside the trained tokens, in the behaviour's log-probs and the reference's, stays there."""
    t = make_trajectory(6, mask=[0, 1, 0, 0, 1, 1], junk=float("nan"))
    assert np.isnan(t.logprobs[[0, 2, 3]]).all()
    reference = np.where(t.loss_mask, -1.0, np.nan).astype(np.float32)
    micro = collate([Sample(t, 1.0, 1.0, reference), Sample(make_trajectory(9), 1.0, 1.0, np.zeros(9, np.float32))])
    assert torch.isfinite(micro.behaviour_N).all()
    assert torch.isfinite(micro.reference_N).all()


def test_the_first_token_is_never_trained_on(make_trajectory):
    """It has no predecessor to be predicted from; its values must go with it, or all others would shift by one."""
    t = make_trajectory(4, mask=[1, 0, 1, 1])
    micro = collate([Sample(t, 1.0)])
    assert micro.mask_BT.tolist() == [[False, False, True, True]]
    assert micro.behaviour_N.tolist() == t.logprobs[2:].tolist()


def test_filler_weighs_nothing(make_trajectory):
    micro = filler(Sample(make_trajectory(9), 0.7, 3.0))
    assert len(micro.weights_N) > 0
    assert not micro.weights_N.any()
    assert not micro.advantages_N.any()


def test_a_batch_moves_with_all_its_tensors(make_trajectory):
    """`meta` stands for a second device, which a CPU has not."""
    micro = collate([Sample(make_trajectory(5), 1.0, 1.0, np.zeros(5, np.float32))]).to("meta")
    assert {getattr(micro, f.name).device.type for f in dataclasses.fields(micro)} == {"meta"}


@pytest.mark.parametrize("budget", [1, 30, 64, 130, 10_000])
def test_plan_covers_each_row_once_within_the_budget(budget):
    batches = plan(LENGTHS, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    for batch in batches:
        padded = len(batch) * max(LENGTHS[i] for i in batch)
        assert padded <= budget or len(batch) == 1
        # Rows of a micro-batch are of similar length: no row is mostly padding.
        assert min(LENGTHS[i] for i in batch) >= 0.75 * max(LENGTHS[i] for i in batch)


def test_plan_by_hand():
    # 60 and 55 fit into 130; 31, 30 and 29 into 93; 8, 7 and 6 stand within 3/4 of 8; 5 and 5 are left.
    assert plan(LENGTHS, 130) == [[1, 6], [3, 4, 9], [5, 2, 7], [0, 8]]
    assert plan([], 100) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_balance_covers_all_and_is_even(ranks):
    lengths = np.random.default_rng(0).integers(5, 300, 100).tolist()
    shares = balance(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(100))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
    assert max(loads) <= 1.05 * sum(lengths) / ranks


def test_balance_with_more_ranks_than_rows_leaves_some_empty():
    assert sorted(map(len, balance([9, 4], 4))) == [0, 0, 1, 1]


def test_mini_batches_pass_over_every_episode_once_an_epoch():
    assert mini_batches(6, 2, 1) == [[0, 2, 4], [1, 3, 5]]
    assert mini_batches(6, 2, 3) == mini_batches(6, 2, 1) * 3
    assert mini_batches(4, 1, 1) == [[0, 1, 2, 3]]
