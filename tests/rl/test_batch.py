"""Packing: shared beginnings, padding and cuts that must not be visible in any number."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from rl.batch import (
    Sample,
    balance,
    collate,
    filler,
    mini_batches,
    pack,
    plan,
    shared_length,
    spread_weights,
    trained_positions,
    turn_lengths,
)
from rl.model import LogprobHead, TokenScorer, frozen_scores, sequence_logprobs

LENGTHS = [5, 60, 7, 31, 30, 8, 55, 6, 5, 29]


def sample(trajectory, weight: float = 1.0, **columns) -> Sample:
    """One weight, and one number of each column, on every trained token; NaN everywhere else."""
    trained = np.zeros(len(trajectory), bool)
    trained[trained_positions(trajectory)] = True

    def on_trained(value: float) -> np.ndarray:
        return np.where(trained, value, np.nan).astype(np.float32)

    return Sample(trajectory, on_trained(weight), {name: on_trained(value) for name, value in columns.items()})


def sharing(make_trajectory):
    """Trajectories that share their beginnings as a group's do: 4 tokens by all, 9 by two, everything by two."""
    a, b, c, d = (make_trajectory(n, seed) for n, seed in ((17, 0), (5, 0), (11, 0), (12, 1)))
    for t in (b, c, d):
        t.tokens[:4] = a.tokens[:4]
    c.tokens[:9] = a.tokens[:9]
    return [a, b, c, d, make_trajectory(6), dataclasses.replace(c)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("whole", [True, False])
def test_packing_changes_no_logprob_and_no_entropy(tiny_lm, plain_lm, make_trajectory, monkeypatch, temperature, whole):
    """Packed, scored at the trained positions, against the raw model's full softmax, one row at a time."""
    if not whole:
        monkeypatch.setattr("rl.model._SCORES_HELD", 0)  # the kernel for long rows
        monkeypatch.setattr("rl.model._LOGITS_HELD", {True: 350})  # the head at 7 positions at a time
    trajectories = sharing(make_trajectory)
    micro = collate([sample(t) for t in trajectories])
    with torch.no_grad():
        head = LogprobHead(temperature)
        logprobs, entropy = TokenScorer(tiny_lm)(micro.packed, micro.before_N, micro.targets_N, head)
        expected_logprobs, expected_entropy = [], []
        for t in trajectories:
            tokens = torch.tensor(t.tokens, dtype=torch.int64)
            at_T = torch.distributions.Categorical(logits=plain_lm(tokens[None]).logits[0] / temperature)
            entropies = at_T.entropy()
            for position in np.flatnonzero(t.loss_mask):
                expected_logprobs.append(torch.log(at_T.probs[position - 1, tokens[position]]))
                expected_entropy.append(entropies[position - 1])
    assert torch.allclose(logprobs, torch.stack(expected_logprobs), atol=2e-5)
    assert torch.allclose(entropy, torch.stack(expected_entropy), atol=2e-5)
    assert entropy.std() > 1e-3  # a model whose every distribution is alike would prove nothing


@pytest.mark.parametrize("short", [True, False])
def test_a_sliding_window_is_kept(make_trajectory, monkeypatch, short):
    """Mistral sees 4 tokens back: packed rows must see no more and no less."""
    from transformers import MistralConfig, MistralForCausalLM

    if not short:
        monkeypatch.setattr("rl.model._SCORES_HELD", 0)
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**small, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    lm = MistralForCausalLM(config).eval()
    trajectories = sharing(make_trajectory)
    expected = []
    with torch.no_grad():
        for t in trajectories:
            ids = torch.tensor(t.tokens, dtype=torch.int64)
            logprobs = lm(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            expected.append(logprobs[torch.tensor(t.loss_mask[1:])])
    scored = frozen_scores(TokenScorer(lm), trajectories, LogprobHead(), 100)
    for t, logprobs, wanted in zip(trajectories, scored, expected, strict=True):
        assert np.abs(logprobs[t.loss_mask] - wanted.numpy()).max() < 1e-5


def test_a_model_with_a_state_across_tokens_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    lm = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"MambaForCausalLM has .* would mix"):
        TokenScorer(lm)


def test_the_probe_scores_every_token_but_the_first(tiny_lm, plain_lm):
    tokens = [3, 1, 4, 1, 5]
    with torch.no_grad():
        expected = plain_lm(torch.tensor([tokens])).logits[0].log_softmax(-1)
    wanted = [expected[i, token].item() for i, token in enumerate(tokens[1:])]
    assert sequence_logprobs(TokenScorer(tiny_lm), tokens).tolist() == pytest.approx(wanted, abs=1e-5)


def test_common_beginnings_are_computed_once():
    sequences = [np.array(s) for s in ([7, 8, 9], [7, 8, 1, 2, 3, 4], [5], [7, 8, 9])]
    packed, places = pack(sequences)
    # The prefix tree: 5 | 7 8 (1 2 3 4 | 9).
    assert packed.tokens_U.tolist() == [5, 7, 8, 1, 2, 3, 4, 9]
    assert packed.positions_U.tolist() == [0, 0, 1, 2, 3, 4, 5, 2]
    assert [p.tolist() for p in places] == [[1, 2, 7], [1, 2, 3, 4, 5, 6], [0], [1, 2, 7]]
    # Rows stand with others of 3/4 of their length or more.
    assert [rows.tolist() for rows in packed.rows] == [[[1, 2, 3, 4, 5, 6]], [[1, 2, 7], [1, 2, 7]], [[0]]]
    laid_out = torch.cat([rows.flatten() for rows in packed.rows])
    assert laid_out[packed.home_U].tolist() == list(range(8))


def test_collate_lines_values_up_with_their_tokens(make_trajectory):
    short, long = make_trajectory(3, mask=[0, 0, 1]), make_trajectory(5, mask=[0, 1, 0, 1, 1])
    long = dataclasses.replace(long, turn=np.array([-1, 0, 0, 1, 1], np.int16))
    weights = np.array([9, 0.25, 9, 0.5, 0.125], np.float32)
    values = np.array([9, 1, 9, 2, 3], np.float32)
    one = dataclasses.replace(sample(short, 0.75, advantages=2.0, values=4.0), unit=7, label=-1.0)
    micro = collate([one, Sample(long, weights, {"advantages": -values, "values": values, "reference": values})])
    assert micro.targets_N.tolist() == [*short.tokens[[2]], *long.tokens[[1, 3, 4]]]
    assert micro.packed.tokens_U[micro.before_N].tolist() == [*short.tokens[[1]], *long.tokens[[0, 2, 3]]]
    assert micro.packed.tokens_U[micro.at_N].tolist() == micro.targets_N.tolist()
    assert micro.packed.positions_U[micro.before_N].tolist() == [1, 0, 2, 3]
    assert micro.packed.positions_U[micro.at_N].tolist() == [2, 1, 3, 4]
    assert micro.episode_N.tolist() == [0, 1, 1, 1]
    assert micro.turn_N.tolist() == [0, 0, 1, 1]
    assert micro.weights_N.tolist() == [0.75, 0.25, 0.5, 0.125]
    assert micro.columns["advantages"].tolist() == [2.0, -1.0, -2.0, -3.0]
    assert micro.columns["values"].tolist() == [4.0, 1.0, 2.0, 3.0]
    assert micro.columns["behaviour"].tolist() == [*short.logprobs[[2]], *long.logprobs[[1, 3, 4]]]
    assert set(micro.columns) == {"advantages", "values", "behaviour"}, "one of the two has no reference"
    assert (micro.units_E.tolist(), micro.labels_E.tolist(), micro.episodes) == ([7, -1], [-1.0, 0.0], 2)


def test_what_the_model_reads_is_not_what_it_is_to_say(make_trajectory):
    """Corrupted inputs are packed, and shared with whoever reads the same; the targets stay the tokens."""
    t = make_trajectory(6, mask=[0, 0, 1, 1, 1, 1])
    read = t.tokens.copy()
    read[3] = (read[3] + 1) % 50
    micro = collate([dataclasses.replace(sample(t), inputs=read), sample(t)])
    assert micro.targets_N.tolist() == [*t.tokens[2:], *t.tokens[2:]]
    assert micro.packed.tokens_U[micro.before_N].tolist() == [*read[1:5], *t.tokens[1:5]]
    assert len(micro.packed.tokens_U) == 3 + 3 + 3  # alike up to the corrupted one


def test_collate_takes_nothing_from_off_the_mask(make_trajectory):
    """NaN beside the trained tokens, in the behaviour's log-probs, the weights and the columns, stays there."""
    t = make_trajectory(6, mask=[0, 1, 0, 0, 1, 1], junk=float("nan"))
    assert np.isnan(t.logprobs[[0, 2, 3]]).all()
    one = sample(t, reference=-1.0, advantages=1.0)
    assert np.isnan(one.columns["reference"][[0, 2, 3]]).all() and np.isnan(one.weights[[0, 2, 3]]).all()
    micro = collate([one, sample(make_trajectory(9), reference=0.0, advantages=1.0)])
    assert {"behaviour", "reference", "advantages"} == set(micro.columns)
    assert all(torch.isfinite(column).all() for column in micro.columns.values())
    assert torch.isfinite(micro.weights_N).all()


def test_the_first_token_is_never_trained_on(make_trajectory):
    """It has no predecessor to be predicted from; its values must go with it, or all others would shift by one."""
    t = make_trajectory(4, mask=[1, 0, 1, 1])
    micro = collate([Sample(t, np.array([5, 6, 7, 8], np.float32), {"returns": np.arange(4, dtype=np.float32)})])
    assert micro.targets_N.tolist() == t.tokens[2:].tolist()
    assert micro.columns["behaviour"].tolist() == t.logprobs[2:].tolist()
    assert (micro.weights_N.tolist(), micro.columns["returns"].tolist()) == ([7, 8], [2, 3])


def test_a_turns_weight_is_on_its_trained_tokens(make_trajectory):
    """Two turns of two and one tokens, an observation between them; a turn that sampled nothing has none to weigh."""
    t = make_trajectory(8, mask=[0, 0, 1, 1, 0, 0, 1, 0])
    t = dataclasses.replace(t, turn=np.array([-1, -1, 0, 0, 0, 1, 2, 3], np.int16))
    assert turn_lengths(t) == [2, 0, 1, 0]
    assert spread_weights(t, [0.5, 0.0, 2.0, 0.0]).tolist() == [0, 0, 0.5, 0.5, 0, 0, 2, 0]
    silent = make_trajectory(3, mask=[0, 0, 0])
    assert turn_lengths(silent) == []
    assert spread_weights(silent, []).tolist() == [0, 0, 0]


def test_filler_weighs_nothing_and_is_no_side_of_a_pair(make_trajectory):
    micro = filler(dataclasses.replace(sample(make_trajectory(9), 0.7, advantages=3.0), unit=2, label=1.0))
    assert len(micro.weights_N) > 0
    assert not micro.weights_N.any()
    assert not micro.labels_E.any()


def test_a_batch_moves_with_all_its_tensors(make_trajectory):
    """`meta` stands for a second device, which a CPU has not."""
    micro = collate([sample(make_trajectory(5), reference=1.0, advantages=1.0)]).to("meta")
    values = [*vars(micro).values(), *micro.columns.values(), *vars(micro.packed).values()]
    flat = [x for v in values for x in (v if isinstance(v, tuple) else [v]) if isinstance(x, torch.Tensor)]
    assert len(flat) == 8 + 3 + 5
    assert {t.device.type for t in flat} == {"meta"}


@pytest.mark.parametrize("budget", [1, 30, 64, 130, 10_000])
def test_plan_covers_each_row_once_within_the_budget(make_trajectory, budget):
    sequences = [make_trajectory(n).tokens for n in LENGTHS]
    batches = plan(sequences, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    for batch in batches:
        packed, _ = pack([sequences[i] for i in batch])
        assert len(packed.tokens_U) <= budget or len(batch) == 1


def test_plan_counts_a_common_beginning_once_and_bounds_what_attention_holds():
    # Ten tokens in common, one of one's own: 10 + n tokens are computed for n sequences, 11 n held by attention.
    sequences = [np.array([*range(10), 50 + k]) for k in range(12)]
    assert [len(b) for b in plan(sequences, 15)] == [5, 5, 2]  # 15 computed each
    assert [len(b) for b in plan(sequences, 22)] == [8, 4]  # 88 held each, not 12 for 22 computed
    assert plan(sequences[::-1], 15)[0] == [11, 10, 9, 8, 7]  # neighbours in the tree, whatever order they came in
    assert plan([], 100) == []


@pytest.mark.parametrize("budget", [1, 30, 64, 130, 10_000])
def test_a_unit_is_never_split_over_micro_batches(make_trajectory, budget):
    """Pairs whose sides lie far apart in the prefix tree, beside sequences of no unit."""
    sequences = [make_trajectory(n, seed).tokens for seed, n in enumerate(LENGTHS)]
    sequences[3][:20] = sequences[1][:20]
    units = [0, 1, 2, 1, None, 2, 0, None, 3, 3]
    batches = plan(sequences, budget, units)
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    home = {i: b for b, batch in enumerate(batches) for i in batch}
    for a, b in ((0, 6), (1, 3), (2, 5), (8, 9)):
        assert home[a] == home[b]
    for batch in batches:
        packed, _ = pack([sequences[i] for i in batch])
        owners = {units[i] if units[i] is not None else -1 - i for i in batch}
        assert len(packed.tokens_U) <= budget or len(owners) == 1
    assert len(batches) == {1: 6, 10_000: 1}.get(budget, len(batches))


def test_a_units_common_beginning_counts_once():
    """A pair of 10 tokens in common and 5 of each one's own is 20 to compute: two pairs of one prompt are 30."""
    sequences = [np.array([*range(10), *[50 + k] * 5]) for k in range(4)]
    assert [shared_length(sequences[0], s) for s in sequences] == [15, 10, 10, 10]
    assert plan(sequences, 30, [0, 0, 1, 1]) == [[0, 1, 2, 3]]
    assert plan(sequences, 29, [0, 0, 1, 1]) == [[0, 1], [2, 3]]
    assert plan(sequences, 29, [0, 1, 0, 1]) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_balance_covers_all_in_order_and_is_even(ranks):
    lengths = np.random.default_rng(0).integers(5, 300, 100).tolist()
    shares = balance(lengths, ranks)
    assert [i for share in shares for i in share] == list(range(100))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 2 * max(lengths)
    assert max(loads) <= sum(lengths) / ranks + max(lengths)


def test_balance_with_more_ranks_than_rows_leaves_some_empty():
    assert sorted(map(len, balance([9, 4], 4))) == [0, 0, 1, 1]


def test_mini_batches_pass_over_every_episode_once_an_epoch():
    assert mini_batches(6, 2, 1) == [[0, 2, 4], [1, 3, 5]]
    assert mini_batches(6, 2, 3) == mini_batches(6, 2, 1) * 3
    assert mini_batches(4, 1, 1) == [[0, 1, 2, 3]]
