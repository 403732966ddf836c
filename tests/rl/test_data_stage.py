"""Data stages: what is selected, what is relabelled behind which prompt, what is paired; decided by seed and round."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rl.config_stage import PairsConfig, PreferenceStage, SftStage
from rl.data_stage import (
    BUILT_IN,
    RIGHT,
    WRONG,
    Example,
    Material,
    build,
    data_stage,
    feedback,
    pairs,
    s3ft,
    successes,
    with_mismatched,
    with_prompt,
)
from rl.envs.calculator import TOOL, Calculator, Expression
from rl.episode import Episode, Identity, Limits, Turn, conditioned, run_episode
from rl.policy import Sampling, ScriptedPolicy
from rl.reward import Score
from rl.task import Task
from rl.trajectory import Trajectory, to_trajectory

CALL = '<tool_call>{"name": "calculator", "arguments": {"a": 3, "op": "+", "b": 9}}</tool_call>'
ARRAYS = ("tokens", "loss_mask", "turn", "logprobs", "versions")


def task(question="3+9"):
    return Task(f"calc:{question}", {"expression": question}, "12")


def sft(name):
    return SftStage(kind="sft", steps=1, sample={}, data_stage=name)


def preference(**given):
    return PreferenceStage(kind="preference", steps=1, sample={}, **given)


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


@pytest.fixture
def say(codec):
    """An episode: a question, perhaps with a condition, a call, the tool's answer (cut in front of it), a reply."""

    def say(reply, question="3+9", condition=None):
        prompt = conditioned([{"role": "user", "content": question}], condition)
        seen = codec.observation([{"role": "tool", "content": "12"}])
        called, replied = codec.reply({"content": CALL})[:-1], codec.reply({"content": reply})
        turns = [
            Turn(called, [-0.5] * len(called), [3] * len(called), True, CALL, observation_ids=seen),
            Turn(replied, [-0.25] * len(replied), [4] * len(replied), False, reply),
        ]
        ids = codec.prompt(prompt, [TOOL])
        return Episode(Identity(0, 0, "calc"), task(question), prompt, ids, codec.end_of_turn, turns, tools=[TOOL])

    return say


@pytest.fixture
def material(say):
    """A task's episodes, each (reply, total reward), right from a reward of 1 on."""

    def material(*said, question="3+9", demonstration=None, paraphrases=()):
        def scored(both):
            return [Score(total, {"outcome": total}, total >= 1) for _, total in both]

        return Material(
            task(question),
            [say(reply, question) for reply, _ in said],
            scored(said),
            demonstration and to_trajectory(say(demonstration, question)),
            [say(reply, question, "As in: 12") for reply, _ in paraphrases],
            scored(paraphrases),
        )

    return material


@pytest.fixture
def replies(codec):
    """What the last turn of each trajectory says."""

    def replies(example):
        said = [t.tokens[(t.turn == t.turn.max()) & t.loss_mask][:-1] for t in example.trajectories]
        return tuple(codec.text(ids.tolist()) for ids in said)

    return replies


def test_successes_are_all_of_them_as_they_were_sampled(material):
    m = material(("12", 1.0), ("13", 0.0), ("it is 12", 1.0), ("14", 0.5))
    found = successes(m, random.Random(0))
    assert [(e.labels, e.source) for e in found] == [((1.0,), "self")] * 2
    for example, i in zip(found, (0, 2), strict=True):
        assert same(example.trajectories[0], to_trajectory(m.episodes[i]))


@pytest.mark.parametrize(
    ("own", "paraphrase", "demonstration", "source", "reply"),
    [
        (1.0, 1.0, "gold", "self", "own"),
        (1.0, None, None, "self", "own"),
        (0.5, 1.0, "gold", "paraphrase", "again"),
        (0.5, 0.0, "gold", "gold", "gold"),
        (0.5, None, "gold", "gold", "gold"),
        (0.5, 0.0, None, None, None),
    ],
)
def test_s3ft_takes_its_own_answer_then_its_paraphrase_then_the_demonstration(
    material, replies, own, paraphrase, demonstration, source, reply
):
    repeated = [("no", 0.0), ("again", paraphrase)] if paraphrase is not None else []
    m = material(("bad", 0.0), ("own", own), demonstration=demonstration, paraphrases=repeated)
    found = s3ft(m, random.Random(0))
    assert [(e.source, *replies(e)) for e in found] == ([(source, reply)] if source else [])
    assert all(e.labels == (1.0,) for e in found)


def test_s3ft_takes_any_of_its_right_answers(material, replies):
    m = material(("bad", 0.0), ("one", 1.0), ("two", 1.0), ("bad", 0.0))
    taken = Counter(replies(e) for seed in range(60) for e in s3ft(m, random.Random(seed)))
    assert taken.total() == 60
    assert set(taken) == {("one",), ("two",)}


def test_a_paraphrase_is_learned_behind_the_question_alone(material):
    """It was sampled behind a prompt that shows the demonstration, which is not there at inference."""
    m = material(("bad", 0.0), paraphrases=[("again", 1.0)])
    ((learned,),) = (e.trajectories for e in s3ft(m, random.Random(0)))
    plain, sampled = m.episodes[0].prompt_ids, to_trajectory(m.paraphrases[0])
    assert learned.tokens[learned.turn < 0].tolist() == list(plain)
    assert len(plain) < len(m.paraphrases[0].prompt_ids)
    for name in ARRAYS:
        assert np.array_equal(getattr(learned, name)[learned.turn >= 0], getattr(sampled, name)[sampled.turn >= 0])


def test_feedback_changes_the_prompt_and_nothing_else(material, codec):
    m = material(("12", 1.0), ("13", 0.0))
    found = feedback(codec)(m, random.Random(0))
    assert [(e.labels, e.source) for e in found] == [((1.0,), "right"), ((1.0,), "wrong")]
    for example, episode, line in zip(found, m.episodes, (RIGHT, WRONG), strict=True):
        (learned,) = example.trajectories
        sampled = to_trajectory(episode)
        after, was_after = learned.turn >= 0, sampled.turn >= 0
        assert codec.text(learned.tokens[~after].tolist()).count(f"3+9\n{line}") == 1
        assert "calculator" in codec.text(learned.tokens[~after].tolist())  # the tools are still told
        assert not learned.loss_mask[~after].any()
        for name in ARRAYS:
            assert np.array_equal(getattr(learned, name)[after], getattr(sampled, name)[was_after]), name
            assert getattr(learned, name).dtype == getattr(sampled, name).dtype


async def test_a_prompt_that_asks_for_the_best_is_the_one_that_was_learned(codec, world):
    """Token by token: an evaluation with this condition asks what training answered."""
    asked = Task("calc:3+9", {"expression": Expression((3, 9), ("+",))}, "12")

    async def play(condition):
        policy = ScriptedPolicy(codec, iter([{"content": "12"}]))
        return await run_episode(
            Calculator(world.settings), asked, policy, codec, sampling=Sampling(), limits=Limits(4, 400),
            identity=Identity(0, 0, asked.id), condition=condition,
        )  # fmt: skip

    m = Material(asked, [await play(None)], [Score(1.0, {}, True)], None)
    (example,) = feedback(codec)(m, random.Random(0))
    assert np.array_equal(example.trajectories[0].tokens, to_trajectory(await play(RIGHT)).tokens)


def test_a_right_answer_is_chosen_over_a_wrong_one(material, replies):
    m = material(("bad", 0.9), ("good", 1.0), ("worse", 0.0), ("fine", 2.0))
    for seed in range(20):
        found = pairs(PairsConfig(rule="right_wrong", per_task=3))(m, random.Random(seed))
        assert [(e.labels, e.source) for e in found] == [((1.0, -1.0), "pair")] * 3
        assert len({replies(e) for e in found}) == 3
        assert all(replies(e)[0] in ("good", "fine") and replies(e)[1] in ("bad", "worse") for e in found)


def test_the_best_is_chosen_over_the_worst_by_more_than_the_margin(material, replies):
    m = material(("c", 2.0), ("a", 4.0), ("d", 0.5), ("b", 3.0))

    def found(**rule):
        return [replies(e) for e in pairs(PairsConfig(rule="margin", **rule))(m, random.Random(0))]

    assert found(margin=0.9, per_task=4) == [("a", "d"), ("b", "c")]
    assert found(margin=1.0, per_task=4) == [("a", "d")]
    assert found(margin=0.9) == [("a", "d")]


def test_the_demonstration_is_chosen_over_samples(material, replies):
    said = [("one", 1.0), ("two", 0.0), ("three", 0.0)]
    m = material(*said, demonstration="gold")
    rule = PairsConfig(rule="demonstration", per_task=2)
    seen = Counter()
    for seed in range(30):
        found = pairs(rule)(m, random.Random(seed))
        assert [(e.labels, e.source) for e in found] == [((1.0, -1.0), "pair")] * 2
        assert [replies(e)[0] for e in found] == ["gold", "gold"]
        assert len({replies(e)[1] for e in found}) == 2
        seen.update(replies(e)[1] for e in found)
    assert set(seen) == {"one", "two", "three"}  # whether it was right is not asked
    assert len(pairs(rule.model_copy(update={"per_task": 9}))(m, random.Random(0))) == 3
    assert pairs(rule)(replace(m, demonstration=None), random.Random(0)) == []


@pytest.mark.parametrize(
    ("rule", "said", "kept"),
    [
        ("demonstration", [("gold", 1.0), ("other", 1.0)], [("gold", "other")]),
        ("right_wrong", [("same", 1.0), ("same", 0.0)], []),
        ("margin", [("same", 4.0), ("b", 3.0), ("c", 2.0), ("same", 0.0)], [("b", "c")]),
    ],
)
def test_a_pair_of_the_same_tokens_prefers_nothing(material, replies, rule, said, kept):
    m = material(*said, demonstration="gold")
    found = pairs(PairsConfig(rule=rule, per_task=4))(m, random.Random(0))
    assert [replies(e) for e in found] == kept


@pytest.mark.parametrize(
    ("stage", "sources"),
    [
        (sft("successes"), ["self"] * 2),
        (sft("s3ft"), ["self"]),
        (sft("feedback"), ["right", "right", "wrong"]),
        (preference(), ["pair"]),
        (preference(pairs={"rule": "demonstration", "per_task": 3}), ["pair"] * 3),
        (preference(data_stage="successes"), ["self"] * 2),
    ],
)
def test_a_stage_says_what_becomes_of_its_episodes(material, codec, stage, sources):
    m = material(("12", 1.0), ("it is 12", 1.0), ("13", 0.0), demonstration="gold")
    assert sorted(e.source for e in build(stage, [m], codec, 0, 0, 320)) == sources


def test_a_data_stage_of_ones_own(material, codec, tmp_path, monkeypatch):
    (tmp_path / "own_stage.py").write_text(
        "from rl.data_stage import Example\n"
        "from rl.trajectory import to_trajectory\n"
        "def shortest(material, rng):\n"
        "    episode = min(material.episodes, key=lambda e: len(e.final_text))\n"
        "    return [Example((to_trajectory(episode),), source=f'{material.task.id} {rng.random() < 1}')]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    m = material(("it is 12", 1.0), ("12", 0.0))
    (example,) = build(sft("own_stage.shortest"), [m], codec, 0, 0, 320)
    assert example.source == "calc:3+9 True"
    assert same(example.trajectories[0], to_trajectory(m.episodes[1]))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sucesses", "'sucesses' is not a dotted path"),
        ("rl.data_stage.no_such", "module 'rl.data_stage' has no 'no_such'"),
        ("no_such_module.stage", "cannot import 'no_such_module'"),
    ],
)
def test_a_name_that_is_no_data_stage(codec, name, says):
    with pytest.raises(ValueError, match=says):
        data_stage(sft(name), codec)


def test_seed_and_round_decide_the_examples_and_the_task_by_itself(material, codec, replies):
    """The draws of a task are its own: another task beside it changes nothing."""
    said = [(f"good {i}", 1.0) for i in range(4)] + [(f"bad {i}", 0.0) for i in range(4)]
    materials = [material(*said, question=f"{n}+9") for n in range(8)]

    def made(which=slice(None), seed=0, round_number=0):
        return [replies(e) for e in build(preference(), materials[which], codec, seed, round_number, 320)]

    first = made()
    assert len(first) == 8
    assert made() == first
    assert made(slice(3, 6)) == first[3:6]
    assert len(set(first)) > 1  # tasks do not all draw alike
    assert made(seed=1) != first
    assert made(round_number=1) != first


def test_examples_without_a_token_to_train_on_are_left_out(material, codec, make_trajectory, monkeypatch):
    """Of a pair, either will do. A first token has nothing before it that could predict it."""
    trained, silent = make_trajectory(6), make_trajectory(6, mask=[0] * 6)
    first = make_trajectory(6, mask=[1, 0, 0, 0, 0, 0])
    made = [
        Example((trained,), source="kept"),
        Example((silent,)),
        Example((first,)),
        Example((trained, trained), (1.0, -1.0), "kept"),
        Example((trained, silent), (1.0, -1.0)),
        Example((silent, trained), (1.0, -1.0)),
    ]
    monkeypatch.setitem(BUILT_IN, "made", lambda codec: lambda material, rng: made)
    assert [e.source for e in build(sft("made"), [material()], codec, 0, 0, 320)] == ["kept", "kept"]


def test_with_prompt_by_hand():
    t = Trajectory(
        np.asarray([1, 2, 3, 4, 5], np.int32),
        np.asarray([0, 0, 1, 0, 1], bool),
        np.asarray([-1, -1, 0, 0, 1], np.int16),
        np.asarray([0.0, 0.0, -0.5, 0.0, -0.25], np.float32),
        np.asarray([-1, -1, 7, -1, 8], np.int32),
    )
    moved = with_prompt(t, [9, 8, 7])
    assert moved.tokens.tolist() == [9, 8, 7, 3, 4, 5]
    assert moved.loss_mask.tolist() == [False] * 3 + [True, False, True]
    assert moved.turn.tolist() == [-1, -1, -1, 0, 0, 1]
    assert moved.logprobs.tolist() == [0.0, 0.0, 0.0, -0.5, 0.0, -0.25]
    assert moved.versions.tolist() == [-1, -1, -1, 7, -1, 8]
    assert all(getattr(moved, name).dtype == getattr(t, name).dtype for name in ARRAYS)


@pytest.fixture
def pair(say):
    def pair(question, chosen, rejected):
        both = (to_trajectory(say(chosen, question)), to_trajectory(say(rejected, question)))
        return Example(both, (1.0, -1.0), "pair")

    return pair


def test_every_pair_gets_an_answer_to_another_prompt(pair, replies):
    """The next other prompt's, past pairs of one's own, chosen and rejected in turn, and around the end."""
    given = [pair("1+1", "a", "b"), pair("1+1", "c", "d"), pair("123+456", "eeee", "ffff"), pair("1+1", "g", "h")]
    found = with_mismatched(given, 320)
    assert [replies(e)[2] for e in found] == ["eeee", "ffff", "g", "ffff"]
    for before, after in zip(given, found, strict=True):
        assert after.labels == (1.0, -1.0, 0.0)
        assert after.source == "pair"
        assert after.trajectories[:2] == before.trajectories
        own, strange = before.trajectories[0], after.trajectories[2]
        assert np.array_equal(strange.tokens[strange.turn < 0], own.tokens[own.turn < 0])
    # The turns keep their length, mask and place, whatever prompt stands before them.
    source, strange = given[2].trajectories[0], found[0].trajectories[2]
    assert len(strange) == len(source) - (source.turn < 0).sum() + (strange.turn < 0).sum()
    assert len(strange) < len(source)
    for name in ARRAYS:
        assert np.array_equal(getattr(strange, name)[strange.turn >= 0], getattr(source, name)[source.turn >= 0])


def test_two_that_were_judged_alone_lend_the_one_whose_prompt_is_another(pair, replies):
    """KTO's chosen and rejected may answer different questions."""
    first, second, third = pair("1+1", "a", "b"), pair("2+2", "c", "d"), pair("3+3", "e", "f")
    crossed = [
        replace(x, trajectories=(x.trajectories[0], y.trajectories[1]))
        for x, y in ((first, third), (second, first), (third, second))
    ]
    assert [replies(e)[2] for e in with_mismatched(crossed, 320)] == ["c", "f", "a"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_single_prompt_is_left_as_it_is(pair, count):
    given = [pair("1+1", f"{i}", "no") for i in range(count)]
    assert with_mismatched(given, 320) == given


@pytest.mark.parametrize(("loss", "labels"), [("kto", (1.0, -1.0, 0.0)), ("sigmoid", (1.0, -1.0))])
def test_only_kto_estimates_on_mismatched_answers(material, codec, loss, labels):
    materials = [material(("12", 1.0), ("13", 0.0), question=q) for q in ("1+1", "2+2")]
    found = build(preference(loss=loss), materials, codec, 0, 0, 320)
    assert [e.labels for e in found] == [labels] * 2


def test_what_a_longer_prompt_made_too_long_is_left_out(pair, material, codec):
    """The model has max_length positions: a pair, or its strange answer, that needs more is not trained on."""
    materials = [material(("12", 1.0), ("13", 0.0), question=q) for q in ("1+1", "2+2")]
    longest = max(len(t) for e in build(preference(), materials, codec, 0, 0, 320) for t in e.trajectories)
    assert len(build(preference(), materials, codec, 0, 0, longest)) == 2
    assert build(preference(), materials, codec, 0, 0, longest - 1) == []
    short, long = pair("1+1", "a", "b"), pair("123+456", "eeeeeeee", "ffffffff")
    found = with_mismatched([short, long], len(long.trajectories[0]) - 1)
    assert [len(e.trajectories) for e in found] == [3, 3]
    assert [len(e.trajectories) for e in with_mismatched([short, long], len(short.trajectories[0]))] == [2, 2]
