"""Each rank's share of a batch: its weights are the whole batch's, a pair stays a pair, and thoughts are masked where
the model reads them."""

from typing import Any

import numpy as np
import pytest

from actors.learner_batch import Held, RlBatch, example_samples, with_masked_thoughts
from rl.batch import Sample, turn_lengths
from rl.config_algo import AlgoConfig
from rl.config_stage import SftStage
from rl.data_stage import Example
from rl.trajectory import Trajectory

RANKS = 2


def spoken(mask: list[int], turn: list[int], tokens: list[int] | None = None) -> Trajectory:
    n = len(mask)
    ids = np.asarray(tokens if tokens else range(n), np.int32)
    loss_mask = np.asarray(mask, bool)
    return Trajectory(ids, loss_mask, np.asarray(turn, np.int16), np.zeros(n, np.float32), np.zeros(n, np.int32))


SHORT = spoken([0, 0, 1, 1], [-1, -1, 0, 0])
TURNS = spoken([0, 1, 1, 1, 0, 1, 1], [-1, 0, 0, 0, 0, 1, 1])
SILENT_TURN = spoken([0, 0, 1, 0, 0, 1, 1, 0], [-1, -1, 0, 0, 1, 2, 2, 2])
SILENT = spoken([0, 0, 0], [-1, -1, 0])


def reference(trajectory: Trajectory, number: float) -> np.ndarray:
    return np.full(len(trajectory), number, np.float32)


# -- examples ---------------------------------------------------------------------------------------------------------


def test_a_demonstrations_tokens_weigh_one_over_the_batchs_on_whichever_rank():
    held = [Held(Example((t,))) for t in (SHORT, TURNS, SILENT_TURN)]
    shares = [example_samples(held, rank, RANKS) for rank in range(RANKS)]
    assert [[s.trajectory for s in share] for share in shares] == [[SHORT, TURNS], [SILENT_TURN]]
    for sample in [s for share in shares for s in share]:
        assert sample.weights.tolist() == pytest.approx((sample.trajectory.loss_mask / 10).tolist())
        assert (sample.unit, sample.label, sample.columns) == (None, 0.0, {})


def test_a_pairs_two_sides_weigh_one_over_the_batchs_pairs_and_stay_one_unit():
    """Also on the rank that has one pair of three. The mismatched answer, which only KTO's estimate reads, is left
    out, and does not shift the references of the others."""
    labels = [(1.0, -1.0), (-1.0, 0.0, 1.0), (1.0, -1.0)]
    both = [(SHORT, TURNS), (SHORT, SILENT_TURN, TURNS), (SILENT_TURN, SHORT)]
    held = [
        Held(Example(ts, ls, "pair"), [reference(t, 10 * k + i) for i, t in enumerate(ts)])
        for k, (ts, ls) in enumerate(zip(both, labels, strict=True))
    ]
    shares = [example_samples(held, rank, RANKS) for rank in range(RANKS)]
    assert [[s.unit for s in share] for share in shares] == [[0, 0, 1, 1], [2, 2]]
    found = [s for share in shares for s in share]
    assert [s.label for s in found] == [1.0, -1.0, -1.0, 1.0, 1.0, -1.0]
    assert [s.trajectory for s in found] == [SHORT, TURNS, SHORT, TURNS, SILENT_TURN, SHORT]
    assert [s.columns["reference"][0] for s in found] == [0, 1, 10, 12, 20, 21]
    for s in found:
        assert s.weights.tolist() == pytest.approx([1 / 3] * len(s.trajectory))


def test_without_references_there_is_no_such_column():
    (one, other) = example_samples([Held(Example((SHORT, TURNS), (1.0, -1.0)))], 0, 1)
    assert one.columns == other.columns == {}


# -- masked thought ---------------------------------------------------------------------------------------------------

WORDS = np.arange(10, 60)
END = 2
"""A special token that the assistant says: the end of its turns."""


@pytest.fixture
def thoughts():
    """A prompt of 100 words, then five turns of 39 words and an end each, between them observations of ten words."""
    rng = np.random.default_rng(0)
    tokens, mask, turn = rng.choice(WORDS, 100).tolist(), [0] * 100, [-1] * 100
    for k in range(5):
        tokens += [*rng.choice(WORDS, 39), END, *rng.choice(WORDS, 10)]
        mask, turn = mask + [1] * 40 + [0] * 10, turn + [k] * 50
    t = spoken(mask, turn, tokens)
    columns = {"reference": reference(t, 1.0)}
    return [Sample(t, np.full(len(t), 0.5, np.float32), columns, unit=3, label=1.0)]


def masked(samples, step: int = 5, seed: int = 0, **settings: Any) -> list[Sample]:
    thought = {"rate": 0.4, "warmup": 0.0, **settings}
    stage = SftStage.model_validate({"kind": "sft", "steps": 10, "masked_thought": thought})
    return with_masked_thoughts(samples, stage, step, seed, WORDS, mask_token=5)


def test_what_is_read_changes_and_the_labels_stay(thoughts):
    (before,), (after,) = thoughts, masked(thoughts)
    assert after.trajectory is before.trajectory
    assert (after.weights is before.weights, after.columns is before.columns) == (True, True)
    assert (after.unit, after.label) == (3, 1.0)
    assert after.read is after.inputs and before.read is before.trajectory.tokens
    assert after.read.dtype == np.int32


@pytest.mark.parametrize("replacement", ["random", "mask"])
def test_only_words_of_the_assistant_are_corrupted_and_no_special_token_is(thoughts, replacement):
    """At a rate of 0.99, where anything that can be hit would be."""
    (sample,) = masked(thoughts, rate=0.99, replacement=replacement)
    tokens, mask = sample.trajectory.tokens, sample.trajectory.loss_mask
    changed = sample.read != tokens
    assert not changed[~mask].any(), "neither the prompt nor an observation"
    assert not changed[tokens == END].any(), "the end of a turn has to be learned, and read, as it is"
    assert changed[mask & (tokens != END)].mean() > 0.9
    assert set(sample.read[changed]) <= (set(WORDS) if replacement == "random" else {5})


def test_the_rate_rises_over_the_first_steps_of_the_stage(thoughts):
    """Ten steps, a warm-up of half of them: 0 at the first, half the rate at the third and the rate from the sixth."""
    (sample,) = thoughts
    words = sample.trajectory.loss_mask & (sample.trajectory.tokens != END)
    shares = [
        np.mean([(masked(thoughts, step, seed, warmup=0.5)[0].read != sample.trajectory.tokens)[words].mean()
                 for seed in range(20)])
        for step in (0, 2, 5, 9)
    ]  # fmt: skip
    # A random replacement is the old token once in 50 times; 3,900 draws: a standard error below 0.01.
    assert shares == pytest.approx([0.0, 0.16 * 0.98, 0.4 * 0.98, 0.4 * 0.98], abs=0.03)
    assert shares[0] == 0


def test_the_corruption_is_the_seeds_the_steps_and_the_tokens(thoughts):
    """And not of the place in a rank's share: the same on any number of ranks."""
    here = masked(thoughts)[0].read
    assert np.array_equal(here, masked([Sample(SHORT, np.ones(len(SHORT))), *thoughts])[1].read)
    others = [here, masked(thoughts, step=6)[0].read, masked(thoughts, seed=1)[0].read]
    assert len({o.tobytes() for o in others}) == 3


# -- groups -----------------------------------------------------------------------------------------------------------

GROUPS = [[SHORT, TURNS], [SILENT_TURN, SILENT]]


def batch(algo: dict[str, Any], chosen=((0, 0), (0, 1), (1, 0), (1, 1))) -> RlBatch:
    columns = [
        [{"advantages": reference(t, 10 * g + s)} for s, t in enumerate(group)] for g, group in enumerate(GROUPS)
    ]
    return RlBatch(
        GROUPS, [[len(t) for t in g] for g in GROUPS], [[turn_lengths(t) for t in g] for g in GROUPS],
        columns, chosen, AlgoConfig.model_validate(algo), 20, 1.0, 0.0,
    )  # fmt: skip


@pytest.fixture
def fetched(monkeypatch):
    """References that are what they refer to, and how many groups were asked for each time."""
    asked: list[int] = []

    def get(refs):
        asked.append(len(refs))
        return refs

    monkeypatch.setattr("actors.learner_batch.ray.get", get)
    return asked


def weights_of(samples) -> list[float]:
    """On the trained tokens."""
    return [w for s in samples for w in s.weights[s.trajectory.loss_mask].tolist()]


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ({"name": "dapo"}, [1 / 10] * 10),
        ({"name": "grpo"}, [1 / 6] * 2 + [1 / 15] * 5 + [1 / 9] * 3),
        ({"name": "dr_grpo"}, [1 / 60] * 10),  # the model's 20 tokens
        ({"name": "dr_grpo", "fixed_length": 5}, [1 / 15] * 10),
        ({"name": "rloo"}, [1 / 3] * 10),
        ({"name": "epo"}, [1 / 6] * 2 + [1 / 18] * 3 + [1 / 12] * 2 + [1 / 6] + [1 / 12] * 2),
    ],
    ids=str,
)
def test_a_ranks_share_has_the_weights_of_the_whole_batch(fetched, algo, expected):
    """Three of the four episodes say something, and one of those is silent for a turn."""
    whole = batch(algo).share(0, 1)
    assert [s.trajectory for s in whole] == [SHORT, TURNS, SILENT_TURN, SILENT]
    assert weights_of(whole) == pytest.approx(expected)
    assert all(not s.weights[~s.trajectory.loss_mask].any() for s in whole)
    assert [s.columns["advantages"][0] for s in whole] == [0, 1, 10, 11]
    shares = [batch(algo).share(rank, RANKS) for rank in range(RANKS)]
    assert [[s.trajectory for s in share] for share in shares] == [[SHORT, TURNS], [SILENT_TURN, SILENT]]
    assert weights_of([s for share in shares for s in share]) == pytest.approx(expected)
    assert fetched == [2, 2, 1, 2, 1, 2], "groups, of which a rank fetches its own alone, then the columns"


def test_a_mini_batch_is_weighed_by_itself(fetched):
    """Of two episodes with seven tokens."""
    samples = batch({"name": "dapo"}, chosen=((0, 1), (0, 0))).share(0, 1)
    assert [s.trajectory for s in samples] == [TURNS, SHORT]
    assert weights_of(samples) == pytest.approx([1 / 7] * 7)


@pytest.mark.parametrize("rank", range(RANKS))
def test_the_critics_loss_is_a_mean_over_the_batchs_values(fetched, rank):
    """Of tokens; or of turns, whose value is that of their first token. A silent turn has none."""
    by_token = batch({"name": "ppo"})
    by_turn = batch({"name": "ppo", "advantage": "turn_gae"})
    share = [b.for_critic(b.share(rank, RANKS)) for b in (by_token, by_turn)]
    assert weights_of(share[0]) == pytest.approx(([1 / 10] * 7, [1 / 10] * 3)[rank])
    fifth = 1 / 5
    assert weights_of(share[1]) == pytest.approx(([fifth, 0, fifth, 0, 0, fifth, 0], [fifth, fifth, 0])[rank])
    assert all(not s.weights[~s.trajectory.loss_mask].any() for samples in share for s in samples)
    assert [s.columns["advantages"][0] for s in share[0]] == ([0, 1], [10, 11])[rank]


def test_a_rank_without_a_share_has_a_sample_without_weight():
    """Fewer examples than ranks, or one that is longer than all others together: nothing is trained twice."""
    held = [Held(Example((SHORT,)))]
    shares = [example_samples(held, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    assert sorted(bool(share[0].weights.any()) for share in shares) == [False, False, True]
    pairs = [Held(Example((SHORT, TURNS), (1.0, -1.0)))]
    idle = [s for rank in range(2) for s in example_samples(pairs, rank, 2) if not s.label]
    assert len(idle) == 2 and not any(s.weights.any() for s in idle)
