"""Credit: five short episodes worked by hand under every objective, and loops over all tokens written out again."""

import numpy as np
import pytest

from rl.config_algo import AlgoConfig
from rl.credit import GroupFacts, assign_credit, first_tokens
from rl.trajectory import Trajectory


def flat(*turns, prompt=2):
    """A trajectory of (sampled tokens, tokens seen after them) for each turn."""
    mask, turn_of = [False] * prompt, [-1] * prompt
    for k, (sampled, seen) in enumerate(turns):
        mask += [True] * sampled + [False] * seen
        turn_of += [k] * (sampled + seen)
    n = len(mask)
    mask = np.asarray(mask, bool)
    logprobs = np.where(mask, -1.0, 0.0).astype(np.float32)
    versions = np.where(mask, 0, -1).astype(np.int32)
    return Trajectory(np.arange(n, dtype=np.int32), mask, np.asarray(turn_of, np.int16), logprobs, versions)


# a ends with two tokens of an observation; b's second turn sampled nothing; lengths 8, 8, 6, 3, 5, 18.
EPISODES = {
    "a": flat((2, 1), (1, 2)),
    "b": flat((1, 1), (0, 1), (2, 1)),
    "c": flat((3, 0), prompt=3),
    "d": flat((1, 0)),
    "e": flat((2, 1)),
    "l": flat((1, 15)),
    "-": flat(),
}
# What the environment gave each turn, the outcome, success. Totals: a 5, b 1, c 0, d 4, e 2, l 0.
GIVEN = {
    "a": ([1.0, 2.0], 2.0, True),
    "b": ([0.0, 2.0, 0.0], -1.0, False),
    "c": ([1.0], -1.0, False),
    "d": ([1.0], 3.0, True),
    "e": ([0.0], 2.0, True),
    "l": ([0.0], 0.0, False),
    "-": ([], 0.0, False),
}
GREEDY = {"a": 1.5, "b": 1.5, "c": 0.5, "d": 4.0, "e": 0.0, "-": 0.0}
VALUES = {"a": [1.0, 2.0, 3.0], "b": [0.0, 0.0, 1.0], "c": [1.0, 0.0, 0.0], "d": [2.0], "e": [1.0, 2.0], "-": []}
GROUPS = ("abc", "de")
ALONE = ("a", "b", "c", "d", "e")


def spread(name, values):
    """float32 [T]: the values on the episode's sampled tokens."""
    out = np.zeros(len(EPISODES[name]), np.float32)
    out[EPISODES[name].loss_mask] = values
    return out


def credit(groups, algo, *, uncounted="", scored=None, max_length=1000, kl_coefficient=0.0):
    """Each episode's columns on its sampled tokens, by name; everything else must be 0.

    scored: by column, then episode, the values that the columns start from.
    """
    facts = [
        GroupFacts(
            *(list(x) for x in zip(*(GIVEN[n] for n in group), strict=True)),
            [n not in uncounted for n in group],
            GREEDY[group[0]] if algo.baseline == "greedy" else None,
        )
        for group in groups
    ]
    known = [[{c: spread(n, v[n]) for c, v in (scored or {}).items()} for n in group] for group in groups]
    made = assign_credit(
        [[EPISODES[n] for n in group] for group in groups],
        facts,
        algo,
        max_length=max_length,
        kl_coefficient=kl_coefficient,
        scored=known if scored else None,
    )
    out = {}
    for name, columns in zip("".join(groups), [c for group in made for c in group], strict=True):
        mask = EPISODES[name].loss_mask
        for column in columns.values():
            assert column.dtype == np.float32
            assert column.shape == mask.shape
            assert not column[~mask].any()
        out[name] = {c: v[mask].tolist() for c, v in columns.items()}
    return out


def advantages(groups, algo, **given):
    return {name: columns["advantages"] for name, columns in credit(groups, algo, **given).items()}


def same(found, expected):
    assert found == {name: pytest.approx(values, abs=1e-5) for name, values in expected.items()}


def whitened(expected, counted="abcde"):
    """(A - mean) / population std over the tokens of the counted episodes."""
    kept = np.concatenate([expected[n] for n in expected if n in counted])
    return {n: list((np.asarray(v) - kept.mean()) / kept.std()) for n, v in expected.items()}


# Totals 5, 1, 0: mean 2, deviations 3, -1, -2, sample variance 14 / 2 = 7. Totals 4, 2: mean 3, variance 2.
CENTRED = {"a": [3.0] * 3, "b": [-1.0] * 3, "c": [-2.0] * 3, "d": [1.0], "e": [-1.0] * 2}
STANDARD = {"a": [1.133893] * 3, "b": [-0.377964] * 3, "c": [-0.755929] * 3, "d": [0.707107], "e": [-0.707107] * 2}
# The mean of the others: 0.5, 2.5, 3; 2, 4.
LEFT_OUT = {"a": [4.5] * 3, "b": [-1.5] * 3, "c": [-3.0] * 3, "d": [2.0], "e": [-2.0] * 2}
# The whole reward lies on the last model token, and gamma is 1: every token has it before it.
TO_COME = {"a": [5.0] * 3, "b": [1.0] * 3, "c": [0.0] * 3, "d": [4.0], "e": [2.0] * 2}
# Less 1.5, 1.5, 0.5, 4 and 0, the greedy rewards.
REMAX = {"a": [3.5] * 3, "b": [-0.5] * 3, "c": [-0.5] * 3, "d": [0.0], "e": [2.0] * 2}
# Lambda 0.95. a: deltas 1, 1, 5 - 3 = 2: 2, 1 + 0.95 * 2 = 2.9, 1 + 0.95 * 2.9 = 3.755. b: deltas 0, 1, 1 - 1 = 0.
# c: deltas -1, 0, 0. d: 4 - 2. e: deltas 1, 2 - 2 = 0.
PPO = {"a": [3.755, 2.9, 2.0], "b": [0.95, 1.0, 0.0], "c": [-1.0, 0.0, 0.0], "d": [2.0], "e": [1.0, 0.0]}
# Gamma 0.99. a: returns 1 + 0.99 * 4 = 4.96 and 4. b: 0.99 * 1.01 = 0.9999, 2 - 0.99 = 1.01 and -1, over 1.01; the
# second turn has no token for its 1. c was given 1 - 1 = 0.
EPO = {"a": [1.0, 1.0, 4 / 4.96], "b": [0.99, -1 / 1.01, -1 / 1.01], "c": [0.0] * 3, "d": [1.0], "e": [1.0] * 2}


@pytest.mark.parametrize(
    ("name", "groups", "expected"),
    [
        ("grpo", GROUPS, STANDARD),
        ("dr_grpo", GROUPS, CENTRED),
        ("dapo", GROUPS, STANDARD),  # far from its overlong limit
        ("gspo", GROUPS, STANDARD),
        ("cispo", GROUPS, STANDARD),
        ("rloo", GROUPS, LEFT_OUT),
        ("reinforce_pp", ALONE, whitened(TO_COME)),
        ("reinforce_pp_baseline", GROUPS, whitened(CENTRED)),
        ("remax", ALONE, REMAX),
        ("ppo", ALONE, whitened(PPO)),
        ("epo", ALONE, EPO),
    ],
)
def test_the_papers_by_hand(name, groups, expected):
    algo = AlgoConfig(name=name)
    same(advantages(groups, algo, scored={"values": VALUES} if algo.critic else None), expected)


def test_a_critic_learns_returns_that_are_not_whitened():
    found = credit(ALONE, AlgoConfig(name="ppo"), scored={"values": VALUES})
    expected = {n: list(np.add(PPO[n], VALUES[n])) for n in ALONE}
    same({n: found[n]["returns"] for n in ALONE}, expected)
    assert all(found[n]["values"] == VALUES[n] for n in ALONE)


def by_turn(**rule):
    whole = {"name": "dr_grpo", "advantage": "turn", "credit": "turn", "baseline": "none", **rule}
    return AlgoConfig.model_validate(whole)


# The six turns of a, b and c are given 1, 4; 0, 2, -1; 0: mean 1, squared deviations 0, 9, 1, 1, 4, 1, sample
# variance 16 / 5. Centred 0, 3; -1, 1, -2; -1, summed from the back at gamma 0.5.
CENTRED_TURNS = {"a": [1.5, 1.5, 3.0], "b": [-1.0, -2.0, -2.0], "c": [-1.0] * 3}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"baseline": "group_mean"}, CENTRED_TURNS),
        (
            {"baseline": "group_mean", "normalise": "group_std"},
            {n: [v / 3.2**0.5 for v in row] for n, row in CENTRED_TURNS.items()},
        ),
        ({"baseline": "group_mean", "normalise": "batch_std"}, whitened(CENTRED_TURNS)),
        # Against the others' turns: a 1 / 4, b 5 / 3, c 6 / 5.
        (
            {"baseline": "leave_one_out"},
            {"a": [2.625, 2.625, 3.75], "b": [-13 / 6, -8 / 3, -8 / 3], "c": [-1.2] * 3},
        ),
        # With the outcome alone, the turns before the last are given nothing. 0, 5; 0, 0, 1; 0: mean 1.
        (
            {"baseline": "group_mean", "credit": "outcome"},
            {"a": [1.0, 1.0, 4.0], "b": [-1.5, 0.0, 0.0], "c": [-1.0] * 3},
        ),
    ],
)
def test_turns_are_credited_within_the_group(rule, expected):
    same(advantages(["abc"], by_turn(gamma=0.5, **rule)), expected)


def test_turns_outside_the_statistics_are_measured_by_the_others():
    """Without b: 1, 4 and 0, mean 5 / 3. Centred -2/3, 7/3; -5/3, 1/3, -8/3; -5/3."""
    found = advantages(["abc"], by_turn(gamma=0.5, baseline="group_mean"), uncounted="b")
    same(found, {"a": [0.5, 0.5, 7 / 3], "b": [-13 / 6, -8 / 3, -8 / 3], "c": [-5 / 3] * 3})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("outcome", {"a": [1.25, 2.5, 5.0], "b": [0.25, 0.5, 1.0], "d": [4.0]}),
        # a: 1 where its first turn ends, 4 where its second does. b: the 2 of the silent turn where the first ends.
        ("turn", {"a": [1.5, 3.0, 4.0], "b": [1.75, -0.5, -1.0], "d": [4.0]}),
    ],
)
def test_rewards_lie_on_the_last_model_token_and_only_those_are_steps(given, expected):
    algo = AlgoConfig(name="reinforce_pp", credit=given, gamma=0.5, normalise="none")
    same(advantages("abd", algo), expected)


def test_dense_credit_is_scaled_by_whether_the_episode_was_won():
    """a was won: 1 and 2 over its two gains. b was not: 2 over the most the task gives. Outcomes are left aside."""
    found = advantages(["a", "b", "c"], by_turn(credit="dense", max_total_reward=4.0))
    same(found, {"a": [1.5, 1.5, 1.0], "b": [0.5, 0.0, 0.0], "c": [0.25] * 3})


def test_dense_credit_adds_up_for_whole_episodes():
    """1.5, 0.5 and 0.25 against the mean of the others."""
    found = advantages(["abc"], AlgoConfig(name="rloo", credit="dense", max_total_reward=4.0))
    same(found, {"a": [1.125] * 3, "b": [-0.375] * 3, "c": [-0.75] * 3})


# Log-probs are -1: k1 = log-prob - reference is 1, -0.5, 2; 0.5, 1, 1; 0, 0, 1; 4; -1, -1. Half of it is taken off.
REFERENCE = {"a": [-2.0, -0.5, -3.0], "b": [-1.5, -2.0, -2.0], "c": [-1.0, -1.0, -2.0], "d": [-5.0], "e": [0.0, 0.0]}
K1 = {"place": "reward", "estimator": "k1"}


@pytest.mark.parametrize(
    ("algo", "groups", "expected"),
    [
        # totals 5 - 1.25, 1 - 1.25, 0 - 0.5; 4 - 2, 2 + 1
        (
            AlgoConfig(name="rloo"),
            GROUPS,
            {"a": [4.125] * 3, "b": [-1.875] * 3, "c": [-2.25] * 3, "d": [-1.0], "e": [1.0] * 2},
        ),
        (
            AlgoConfig(name="remax"),
            ALONE,
            {"a": [2.25] * 3, "b": [-1.75] * 3, "c": [-1.0] * 3, "d": [-2.0], "e": [3.0] * 2},
        ),
        # a: 5 - 1 = 4, 4 + 0.25, 4.25 - 0.5. b: 1 - 0.5 = 0.5, 0.5 - 0.5, 0 - 0.25.
        (
            AlgoConfig(name="reinforce_pp", normalise="none"),
            ALONE,
            {"a": [3.75, 4.25, 4.0], "b": [-0.25, 0.0, 0.5], "c": [-0.5] * 3, "d": [2.0], "e": [3.0, 2.5]},
        ),
        # Lambda 1: what is still to come, less the value.
        (
            AlgoConfig(name="ppo", normalise="none", lam=1.0),
            ALONE,
            {"a": [2.75, 2.25, 1.0], "b": [-0.25, 0.0, -0.5], "c": [-1.5, -0.5, -0.5], "d": [0.0], "e": [2.0, 0.5]},
        ),
        # a's turns: 1 - 0.25 = 0.75 and 4 - 1 = 3. b's: -0.25, 2, -1 - 1.
        (
            by_turn(kl=K1, gamma=0.5),
            ALONE,
            {"a": [2.25, 2.25, 3.0], "b": [0.25, -2.0, -2.0], "c": [-0.5] * 3, "d": [2.0], "e": [3.0] * 2},
        ),
        # Lambda 0.95. a's turns: -0.25 and 5 - 1, values 1 and 3: deltas -0.25 + 3 - 1 and 1. b's: -0.25 and 1 - 1.
        (
            AlgoConfig(name="ppo", advantage="turn_gae", normalise="none"),
            ALONE,
            {"a": [2.7, 2.7, 1.0], "b": [-0.25, 0.0, 0.0], "c": [-1.5] * 3, "d": [0.0], "e": [2.0] * 2},
        ),
    ],
    ids=["rloo", "remax", "token", "gae", "turn", "turn_gae"],
)
def test_the_kl_penalty_in_the_reward_by_hand(algo, groups, expected):
    scored = {"reference": REFERENCE} | ({"values": VALUES} if algo.critic else {})
    same(advantages(groups, algo, scored=scored, kl_coefficient=0.5), expected)


@pytest.mark.parametrize(("estimator", "gain"), [("k1", 1.0), ("k2", 0.5), ("k3", np.exp(-1.0))])
def test_the_kl_penalty_is_the_estimator_asked_for(estimator, gain):
    """d's one token: log-ratio 1 to the reference; r - 1 - log r = 1 / e - 1 + 1."""
    algo = AlgoConfig(name="remax", kl={"place": "reward", "estimator": estimator})
    found = advantages(["d"], algo, scored={"reference": {"d": [-2.0]}}, kl_coefficient=0.5)
    same(found, {"d": [-0.5 * gain]})


@pytest.mark.parametrize(("name", "rule"), [("grpo", {}), ("ppo", {"kl": {"place": "loss"}}), ("epo", {})])
def test_a_kl_term_in_the_loss_takes_nothing_off_the_reward(name, rule):
    algo = AlgoConfig(name=name, **rule)
    groups = GROUPS if algo.group_size > 1 else ALONE
    plain = advantages(groups, algo, scored={"values": VALUES})
    assert advantages(groups, algo, scored={"values": VALUES, "reference": REFERENCE}, kl_coefficient=0.5) == plain


def test_gae_skips_observations():
    """Against a loop over all tokens, in which one that was not sampled hands on what follows it."""
    gamma, lam, beta = 0.95, 0.8, 0.3
    random = np.random.default_rng(0)
    t = flat((2, 3), (1, 2), (0, 2), (3, 2))
    reference, values = (random.normal(size=len(t)).astype(np.float32) for _ in range(2))  # off the mask too
    given, outcome = [1.0, -2.0, 4.0, 0.5], 3.0
    # Turns end at tokens 3, 7 and 14; the third sampled nothing, and what it was given lies where the second ends.
    rewards = np.zeros(len(t))
    rewards[[3, 7, 14]] = 1.0, -2.0 + 4.0, 0.5 + 3.0
    rewards -= beta * (t.logprobs - reference)
    advantages, returns, running, following = np.zeros(len(t)), np.zeros(len(t)), 0.0, 0.0
    for i in reversed(range(len(t))):
        if t.loss_mask[i]:
            running = rewards[i] + gamma * following - values[i] + gamma * lam * running
            advantages[i], returns[i], following = running, running + values[i], values[i]
    algo = AlgoConfig(name="ppo", credit="turn", gamma=gamma, lam=lam, normalise="none")
    facts = [GroupFacts([given], [outcome], [True], [True])]
    scored = [[{"reference": reference, "values": values}]]
    ((found,),) = assign_credit([[t]], facts, algo, max_length=99, kl_coefficient=beta, scored=scored)
    np.testing.assert_allclose(found["advantages"], advantages, atol=1e-5)
    np.testing.assert_allclose(found["returns"], returns, atol=1e-5)
    assert t.loss_mask[14] and not t.loss_mask[15:].any() and len(t) == 17


def test_gae_by_turn_by_hand():
    """Gamma 0.9, lambda 0.5; a turn's value is the one before its first token, and the others are not asked.

    a is given 1 and 4 at values 2 and 3: deltas 1 + 2.7 - 2 = 1.7 and 1; advantages 1.7 + 0.45 and 1.
    b is given 0 + 2, for the silent turn joins the first, and -1 at values 1 and 0.5: deltas 2 + 0.45 - 1 = 1.45 and
    -1.5; advantages 1.45 - 0.675 and -1.5.
    """
    algo = AlgoConfig(name="ppo", credit="turn", advantage="turn_gae", gamma=0.9, lam=0.5, normalise="none")
    found = credit("ab", algo, scored={"values": {"a": [2.0, 99.0, 3.0], "b": [1.0, 0.5, 99.0]}})
    assert found["a"]["advantages"] == pytest.approx([2.15, 2.15, 1.0])
    assert found["a"]["returns"] == pytest.approx([4.15, 4.15, 4.0])
    assert found["b"]["advantages"] == pytest.approx([0.775, -1.5, -1.5])
    assert found["b"]["returns"] == pytest.approx([1.775, -1.0, -1.0])


def test_first_tokens():
    assert first_tokens(np.array([0, 0, 2, 3, 3])).tolist() == [True, False, True, True, False]
    assert first_tokens(np.array([], np.int16)).tolist() == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # a and c: 5 and 0, mean 2.5, sample variance 12.5; d alone has no scale
        ("grpo", {"a": [0.707107] * 3, "b": [-0.424264] * 3, "c": [-0.707107] * 3, "d": [0.0], "e": [0.0] * 2}),
        ("dr_grpo", {"a": [2.5] * 3, "b": [-1.5] * 3, "c": [-2.5] * 3, "d": [0.0], "e": [-2.0] * 2}),
        ("rloo", {"a": [5.0] * 3, "b": [-1.5] * 3, "c": [-5.0] * 3, "d": [0.0], "e": [-2.0] * 2}),
    ],
)
def test_episodes_outside_the_statistics_are_measured_by_the_others(name, expected):
    same(advantages(GROUPS, AlgoConfig(name=name), uncounted="be"), expected)


def test_whitening_leaves_episodes_outside_the_statistics_out_of_them():
    """The batch's mean and std are those of all groups' counted tokens, and measure the rest."""
    found = advantages(ALONE, AlgoConfig(name="reinforce_pp"), uncounted="be")
    same(found, whitened(TO_COME, counted="acd"))
    # Both statistics at once: b against the mean of a and c, then over the tokens of a, c and d.
    found = advantages(GROUPS, AlgoConfig(name="reinforce_pp_baseline"), uncounted="be")
    group = {"a": [2.5] * 3, "b": [-1.5] * 3, "c": [-2.5] * 3, "d": [0.0], "e": [-2.0] * 2}
    same(found, whitened(group, counted="acd"))


@pytest.mark.parametrize(
    ("overlong", "max_length", "costs"),
    [
        (None, 4, {"a": 0.0, "c": 0.0, "e": 0.0, "d": 0.0}),
        ({"limit": 8, "buffer": 4}, 1000, {"a": 1.0, "c": 0.5, "e": 0.25, "d": 0.0}),  # 8, 6, 5 and 3 tokens
        ({"limit": 6, "buffer": 2}, 1000, {"a": 1.0, "c": 1.0, "e": 0.5, "d": 0.0}),
        ({"limit": 10}, 1000, {"a": 0.0, "c": 0.0, "e": 0.0, "d": 0.0}),  # a buffer of 2, up to 8
        ({"buffer": 4}, 8, {"a": 1.0, "c": 0.5, "e": 0.25, "d": 0.0}),
        ({}, 7, {"a": 1.0, "c": 0.0, "e": 0.0, "d": 0.0}),  # a fifth of 7: 1
        ({}, 4, {"a": 1.0, "c": 1.0, "e": 1.0, "d": 0.0}),  # less than 1: 1
    ],
)
@pytest.mark.parametrize("given", ["outcome", "turn", "dense"])
def test_the_overlong_penalty_by_hand(overlong, max_length, costs, given):
    """On the last turn, and by the whole episode: c has a longer prompt than e and no observation."""
    rule = {"credit": given, "gamma": 0.5}
    plain = advantages("aced", by_turn(**rule))
    found = advantages("aced", by_turn(**rule, overlong=overlong), max_length=max_length)
    last = {n: plain[n][-1] - cost for n, cost in costs.items()}
    assert {n: row[-1] for n, row in found.items()} == pytest.approx(last)
    assert found["a"][0] == pytest.approx(plain["a"][0] - 0.5 * costs["a"])  # a turn earlier


def test_the_last_fifth_below_max_length_is_the_buffer():
    """18 tokens: halfway from 16 to 20."""
    same(advantages("l", by_turn(overlong={}), max_length=20), {"l": [-0.5]})


def test_the_overlong_penalty_counts_in_the_group():
    """5 - 1, 1 - 1 and 0 - 0.5."""
    found = advantages(["abc"], AlgoConfig(name="dr_grpo", overlong={"limit": 8, "buffer": 4}))
    same(found, {"a": [17 / 6] * 3, "b": [-7 / 6] * 3, "c": [-10 / 6] * 3})


@pytest.mark.parametrize("name", ["grpo", "reinforce_pp_baseline", "ppo"])
def test_what_was_scored_stays_beside_what_is_made(name):
    """The very arrays, each on its own episode, also where whitening writes the advantages again."""
    algo = AlgoConfig(name=name)
    groups = [list("abc"), list("de")]
    scored = [[{c: spread(n, v[n]) for c, v in SCORED.items()} for n in group] for group in groups]
    facts = [GroupFacts(*zip(*(GIVEN[n] for n in group), strict=True), [True] * len(group)) for group in groups]
    trajectories = [[EPISODES[n] for n in group] for group in groups]
    made = assign_credit(trajectories, facts, algo, max_length=99, kl_coefficient=0.1, scored=scored)
    added = {"advantages", "returns"} if algo.critic else {"advantages"}
    for group, known_group in zip(made, scored, strict=True):
        for columns, known in zip(group, known_group, strict=True):
            assert set(columns) == set(SCORED) | added
            assert set(known) == set(SCORED)  # the caller's own mapping is left as it was
            assert all(columns[c] is known[c] for c in SCORED)


SCORED = {"reference": REFERENCE, "values": VALUES, "proximal": VALUES}
RULES = [
    (["-a", "d"], AlgoConfig(name="grpo")),
    (["-a", "d"], AlgoConfig(name="dapo")),
    (["-a", "d"], AlgoConfig(name="reinforce_pp_baseline")),
    (["-a", "d"], by_turn(baseline="group_mean")),
    ("-ad", AlgoConfig(name="reinforce_pp")),
    ("-ad", AlgoConfig(name="epo")),
    ("-ad", AlgoConfig(name="ppo")),
    ("-ad", AlgoConfig(name="ppo", advantage="turn_gae")),
]


@pytest.mark.parametrize(("groups", "algo"), RULES, ids=[f"{algo.name}-{algo.advantage}" for _, algo in RULES])
def test_an_episode_without_turns_has_empty_columns(groups, algo):
    """Its prompt filled the context. Where there is no group, the others are credited as if it were not there."""
    scored = {"reference": {**REFERENCE, "-": []}, "values": VALUES}
    found = credit(groups, algo, scored=scored)
    assert set(found["-"]) == {"reference", "values", "advantages", *(["returns"] if algo.critic else [])}
    assert any(found["a"]["advantages"])
    if algo.group_size == 1:
        assert {n: found[n] for n in "ad"} == credit("ad", algo, scored=scored)
