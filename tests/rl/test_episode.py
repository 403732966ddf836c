"""The one episode loop, played with the calculator, real tokens and policies that can be told what to sample."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from rl.env import Observation, Step
from rl.envs.calculator import TOOL, Calculator, CalculatorTasks, Expression
from rl.episode import Identity, Limits, StopReason, conditioned, run_episode
from rl.policy import Completion, Sampling, ScriptedPolicy
from rl.task import Task, derive_seed
from rl.trajectory import summarise, to_trajectory

TASK = Task("calc:17+4-9", {"expression": Expression((17, 4, 9), ("+", "-"))}, "12")
IDENTITY = Identity(stage=1, step=2, task=TASK.id, sample=3)
WIDE = Limits(max_turns=8, max_length=400)


def call(a, op, b):
    function = {"name": "calculator", "arguments": {"a": a, "op": op, "b": b}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


SOLUTION = [call(17, "+", 4), call(21, "-", 9), {"role": "assistant", "content": "12"}]


@dataclass
class SaysThese:
    """Samples the given turns: ids with falling log-probs, a version a turn, cut at the token limit as vLLM does."""

    turns: list[list[int]]
    asked: list[tuple[list[int], Sampling, str]] = field(default_factory=list)

    async def act(self, token_ids, sampling, session):
        turn = len(self.asked)
        self.asked.append((list(token_ids), sampling, session))
        ids = self.turns[turn][: sampling.max_tokens]
        stopped = ids[-1] in sampling.stop
        logprobs = [-0.5 * (i + 1) for i in range(len(ids))]
        return Completion(ids, logprobs, [turn + 5] * len(ids), "stop" if stopped else "length")


class ClosesOnce(Calculator):
    """The calculator, counting its closes."""

    closed = 0

    async def close(self):
        self.closed += 1


@pytest.fixture
def play(codec, world):
    async def play(policy, limits=WIDE, env=None, task=TASK, identity=IDENTITY, seed=0, condition=None, **sampling):
        env = env or Calculator(world.settings)
        asked = {"sampling": Sampling(**sampling), "limits": limits, "identity": identity, "seed": seed}
        return await run_episode(env, task, policy, codec, **asked, condition=condition)

    return play


async def test_a_demonstration_is_played_to_its_answer(play, codec):
    episode = await play(ScriptedPolicy(codec, iter(SOLUTION)))
    assert episode.stop_reason == StopReason.DONE
    assert [t.observation[0]["content"] for t in episode.turns[:2]] == ["21", "12"]
    assert episode.final_text == "12"
    assert {v for t in episode.turns for v in t.versions} == {-1}  # no weights sampled this


async def test_tokens_are_the_prompt_the_sampled_ids_and_the_observations(play, codec):
    """And each turn's prompt is the last one's, plus what was sampled, plus the observation: nothing encoded anew."""
    sampled = [codec.reply(m) for m in SOLUTION]
    policy = SaysThese(sampled)
    episode = await play(policy)
    seen = [codec.observation([{"role": "tool", "content": c}]) for c in ("21", "12")]
    prompt = policy.asked[0][0]
    assert policy.asked[1][0] == [*prompt, *sampled[0], *seen[0]]
    assert policy.asked[2][0] == [*prompt, *sampled[0], *seen[0], *sampled[1], *seen[1]]
    assert episode.context_ids == [*policy.asked[2][0], *sampled[2]]
    opening = await Calculator(None).reset(TASK)
    messages = [*opening.messages, SOLUTION[0], {"role": "tool", "content": "21"}]
    messages += [SOLUTION[1], {"role": "tool", "content": "12"}, SOLUTION[2]]
    rendered = codec.text(codec.messages(messages, opening.tools), special=True)
    assert rendered == codec.text(episode.context_ids, special=True) + "\n"


async def test_a_condition_stands_under_the_question(play, codec):
    policy = SaysThese([codec.reply(m) for m in SOLUTION])
    episode = await play(policy, condition="Feedback: right.")
    assert episode.prompt == [{"role": "user", "content": "17+4-9\nFeedback: right."}]
    assert list(episode.prompt_ids) == codec.prompt(episode.prompt, [TOOL])
    assert policy.asked[0][0] == list(episode.prompt_ids)
    assert "17+4-9\nFeedback: right." in codec.text(episode.context_ids)


async def test_without_a_condition_the_prompt_is_the_environments(play, codec):
    opening = await Calculator(None).reset(TASK)
    episode = await play(ScriptedPolicy(codec, iter(SOLUTION)))
    assert (episode.prompt, episode.tools) == (opening.messages, opening.tools)
    assert list(episode.prompt_ids) == codec.prompt(opening.messages, opening.tools)


def test_a_condition_is_added_to_the_last_message_of_a_copy():
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "question", "name": "me"}]
    added = conditioned(messages, "two\nlines")
    assert added == [messages[0], {"role": "user", "content": "question\ntwo\nlines", "name": "me"}]
    assert messages[1]["content"] == "question"
    assert conditioned(messages, None) == messages


async def test_sampled_ids_are_kept_even_where_encoding_would_give_others(play, codec, tokenizer):
    """A policy may spell a text in another way than the tokenizer: what was sampled is what is trained on."""
    spelled = [codec._encode(letter)[0] for letter in "calculator"]
    assert spelled != codec._encode("calculator")
    episode = await play(SaysThese([[*spelled, codec.end_of_turn]]))
    assert episode.final_text == "calculator"
    assert to_trajectory(episode).tokens[-len(spelled) - 1 :].tolist() == [*spelled, codec.end_of_turn]


async def test_trajectory_arrays_by_hand(play, codec):
    sampled = [codec.reply(m) for m in SOLUTION]
    episode = await play(SaysThese(sampled))
    t = to_trajectory(episode)
    n, (a, b, c) = len(episode.prompt_ids), map(len, sampled)
    o1, o2 = (len(turn.observation_ids) for turn in episode.turns[:2])
    assert min(n, a, o1, o2) > 0
    parts = [
        (n, False, -1, -1),
        (a, True, 0, 5),
        (o1, False, 0, -1),
        (b, True, 1, 6),
        (o2, False, 1, -1),
        (c, True, 2, 7),
    ]
    assert t.tokens.tolist() == episode.context_ids
    assert t.loss_mask.tolist() == [m for k, m, _, _ in parts for _ in range(k)]
    assert t.turn.tolist() == [turn for k, _, turn, _ in parts for _ in range(k)]
    assert t.versions.tolist() == [v for k, _, _, v in parts for _ in range(k)]
    falling = [-0.5 * (i + 1) for i in range(max(a, b, c))]
    assert t.logprobs[t.loss_mask].tolist() == falling[:a] + falling[:b] + falling[:c]
    assert not t.logprobs[~t.loss_mask].any()
    dtypes = [np.int32, np.bool_, np.int16, np.float32, np.int32]
    assert [x.dtype for x in (t.tokens, t.loss_mask, t.turn, t.logprobs, t.versions)] == dtypes
    assert t.oldest_version == 5
    summary = summarise(episode, t)
    assert (summary.tokens, summary.turn_tokens, summary.turns) == (len(t), (a, b, c), 3)
    assert (summary.stop_reason, summary.oldest_version, summary.identity) == ("done", 5, IDENTITY)


async def test_a_turn_cut_short_gets_its_end_supplied_and_masked(play, codec):
    long = codec._encode("1+2+3+4+5+6+7+8+9")
    assert len(long) > 5
    episode = await play(SaysThese([long]), max_tokens=5)
    (turn,) = episode.turns
    assert (turn.supplied_end, turn.flags, list(turn.token_ids)) == (True, ("truncated",), long[:5])
    t = to_trajectory(episode)
    assert t.tokens[-6:].tolist() == [*long[:5], codec.end_of_turn]
    assert t.loss_mask[-6:].tolist() == [True] * 5 + [False]
    assert (t.logprobs[-1], t.versions[-1]) == (0, -1)


async def test_a_cut_call_is_answered_with_an_error_and_the_episode_goes_on(play, codec):
    sampled = codec.reply(SOLUTION[0])
    policy = SaysThese([sampled, codec.reply(SOLUTION[2])])
    episode = await play(policy, max_tokens=len(sampled) - 2)
    first = episode.turns[0]
    assert set(first.flags) == {"truncated", "tool_error"}
    assert "error" in first.observation[0]["content"]
    # The context the second turn saw has the supplied end between the cut turn and the observation.
    prefix = [*episode.prompt_ids, *sampled[:-2], codec.end_of_turn, *first.observation_ids]
    assert policy.asked[1][0] == prefix
    assert summarise(episode, to_trajectory(episode)).flags == first.flags


async def test_another_stop_token_does_not_pass_for_the_end_of_the_turn(play, codec, tokenizer):
    """A model that ends with its own EOS, or with a configured stop token, has still to be closed for the template."""
    other = tokenizer.pad_token_id
    policy = SaysThese([[*codec._encode('<tool_call>{"name"'), other], codec.reply(SOLUTION[2])])
    episode = await play(policy, stop=(other,))
    assert policy.asked[0][1].stop == (codec.end_of_turn, other)
    conversation = codec.text(policy.asked[1][0], special=True)
    assert "<|im_end|>\n<|im_start|>tool" in conversation
    assert to_trajectory(episode).loss_mask[len(episode.prompt_ids) :][: len(policy.turns[0])].all()


async def test_max_turns(play, codec):
    policy = SaysThese([codec.reply(SOLUTION[0])] * 2)
    episode = await play(policy, Limits(max_turns=2, max_length=400))
    assert (episode.stop_reason, len(episode.turns)) == (StopReason.MAX_TURNS, 2)
    # The last observation is recorded for readers, but no model ever saw it.
    assert episode.turns[1].observation[0]["content"] == "21"
    assert list(episode.turns[1].observation_ids) == []
    assert to_trajectory(episode).tokens[-1] == codec.end_of_turn


async def test_max_tokens_stops_before_an_observation_that_does_not_fit(play, codec):
    sampled = codec.reply(SOLUTION[0])
    opening = await play(SaysThese([codec.reply(SOLUTION[2])]))
    room = len(opening.prompt_ids) + len(sampled)
    episode = await play(SaysThese([sampled]), Limits(8, room + 3))
    assert (episode.stop_reason, len(episode.turns)) == (StopReason.MAX_TOKENS, 1)
    assert len(episode.context_ids) == room


async def test_a_turn_may_ask_for_no_more_than_is_left(play, codec):
    """And the whole episode, supplied end included, keeps to max_length: the learner's positions end there too."""
    opening = await play(SaysThese([codec.reply(SOLUTION[2])]))
    n = len(opening.prompt_ids)
    policy = SaysThese([codec._encode("1+2+3+4+5+6+7+8+9")])
    episode = await play(policy, Limits(8, n + 6), max_tokens=64)
    assert policy.asked[0][1].max_tokens <= 6
    assert len(to_trajectory(episode)) <= n + 6


async def test_nothing_is_appended_after_done(play, codec, world):
    class SaysGoodbye(Calculator):
        async def step(self, action):
            return Step(Observation([{"role": "tool", "content": "goodbye"}]), reward=0.5, done=True)

    sampled = codec.reply(SOLUTION[0])
    episode = await play(SaysThese([sampled]), env=SaysGoodbye(world.settings))
    assert episode.stop_reason == StopReason.DONE
    assert to_trajectory(episode).tokens[-len(sampled) :].tolist() == sampled
    assert episode.turn_reward == 0.5


async def test_rewards_and_flags_belong_to_their_turn(play, codec, world):
    class Pays(Calculator):
        async def step(self, action):
            step = await super().step(action)
            return Step(step.observation, float(len(action.tool_calls)), step.done, {"flags": ["seen"]})

    episode = await play(SaysThese([codec.reply(m) for m in SOLUTION]), env=Pays(world.settings))
    assert [t.reward for t in episode.turns] == [1.0, 1.0, 0.0]
    assert summarise(episode, to_trajectory(episode)).turn_rewards == (1.0, 1.0, 0.0)
    assert episode.turn_reward == 2.0
    assert [t.flags for t in episode.turns] == [("seen",)] * 3


@pytest.mark.parametrize("breaks", ["reset", "step", "act"])
async def test_the_environment_is_closed_whatever_fails(play, codec, world, breaks):
    class Breaks(ClosesOnce):
        async def reset(self, task):
            if breaks == "reset":
                raise RuntimeError("in reset")
            return await super().reset(task)

        async def step(self, action):
            if breaks == "step":
                raise RuntimeError("in step")
            return await super().step(action)

    class Fails(SaysThese):
        async def act(self, *args):
            if breaks == "act":
                raise RuntimeError("in act")
            return await super().act(*args)

    env = Breaks(world.settings)
    with pytest.raises(RuntimeError, match=f"in {breaks}"):
        await play(Fails([codec.reply(SOLUTION[0])]), env=env)
    assert env.closed == 1


async def test_the_environment_is_closed_once_at_the_end(play, codec, world):
    env = ClosesOnce(world.settings)
    await play(ScriptedPolicy(codec, iter(SOLUTION)), env=env)
    assert env.closed == 1


async def test_the_seed_is_a_function_of_seed_task_sample_and_turn(play, codec):
    async def seeds(seed=0, sample=0, task=TASK, step=0, attempt=0):
        policy = SaysThese([codec.reply(m) for m in SOLUTION])
        episode = await play(policy, task=task, identity=Identity(0, step, task.id, sample, attempt), seed=seed)
        found = [sampling.seed for _, sampling, _ in policy.asked]
        assert [t.seed for t in episode.turns] == found  # recorded
        return found

    first = await seeds()
    assert first == [derive_seed(0, TASK.id, 0, turn) for turn in range(3)]
    assert len(set(first)) == 3
    # The same episode played again after a failure draws the same numbers.
    assert await seeds(attempt=1) == first
    other = Task("calc:other", TASK.prompt, TASK.answer)
    for changed in (await seeds(seed=1), await seeds(sample=1), await seeds(task=other)):
        assert not set(changed) & set(first)


async def test_what_the_policy_is_asked(play, codec):
    policy = SaysThese([codec.reply(m) for m in SOLUTION])
    await play(policy, temperature=0.6, max_tokens=50)
    _, sampling, _ = policy.asked[1]
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0.6, 50, (codec.end_of_turn,))
    assert {s for _, _, s in policy.asked} == {IDENTITY.session}  # sessions stick to a generator


async def test_demonstrated_tasks_play_in_order_and_alike(play, codec, world):
    """Two plays of one task by one script are the same arrays: an episode has no hidden state."""
    task = CalculatorTasks(world.settings, seed=3).task("train", 0)

    async def tokens():
        policy = ScriptedPolicy(codec, world.source.demonstrate(task, random.Random(0), False))
        return to_trajectory(await play(policy, task=task)).tokens.tolist()

    assert await tokens() == await tokens()
