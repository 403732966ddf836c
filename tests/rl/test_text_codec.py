"""Episodes of a model that gives text: kept as characters while they are played, as counted tokens afterwards."""

import json
from collections.abc import Iterator

import pytest

from rl.env import Action, CutsTurns, Observation, Step
from rl.episode import Episode, Identity, Limits, StopReason, run_episode
from rl.policy import Completion, ContextFull, Sampling
from rl.task import Task
from rl.text_codec import END, TextCodec, Usage, counted
from rl.trajectory import to_trajectory

CODEC = TextCodec()
TOOL = {"type": "function", "function": {"name": "shout", "parameters": {"type": "object"}}}


class Echo:
    """Ends at `bye`; what follows a full stop does not count."""

    async def reset(self, task: Task) -> Observation:
        self.heard: list[Action] = []
        return Observation([{"role": "user", "content": "say é"}], [TOOL])

    async def step(self, action: Action) -> Step:
        self.heard.append(action)
        return Step(Observation([{"role": "user", "content": f"you said {action.text}"}]), done=action.text == "bye.")

    async def close(self) -> None: ...

    def cut(self, text: str) -> int | None:
        return text.find(".") + 1 or None


class Says:
    """A policy of texts; None: it has no room."""

    def __init__(self, texts: Iterator[str | None], ended: bool = True):
        self._texts, self._ended = texts, ended
        self.saw: list[list[dict]] = []

    async def act(self, token_ids, sampling, session) -> Completion:
        messages, tools = CODEC.conversation(token_ids)
        assert tools == [TOOL]
        self.saw.append(messages)
        if (text := next(self._texts)) is None:
            raise ContextFull
        ids = CODEC.reply(text, ended=self._ended)
        return Completion(ids, [0.0] * len(ids), [-1] * len(ids), "stop" if self._ended else "length")


async def play(policy: Says, env: Echo, turns: int = 5) -> Episode:
    assert isinstance(env, CutsTurns)
    limits = Limits(turns, 2**31)
    task = Task("t", {}, "")
    return await run_episode(env, task, policy, CODEC, sampling=Sampling(), limits=limits, identity=Identity(0, 0, "t"))


async def test_the_loop_cuts_and_continues_texts_to_the_letter():
    env, policy = Echo(), Says(iter(["two\nlines é. and more", 'a "quote"', "bye. really"]))
    episode = await play(policy, env)
    assert [t.text for t in episode.turns] == ["two\nlines é.", 'a "quote"', "bye."]
    assert [a.text for a in env.heard] == [t.text for t in episode.turns] and env.heard[0].token_ids == ()
    assert episode.stop_reason == StopReason.DONE
    assert policy.saw[2] == [
        {"role": "user", "content": "say é"},
        {"role": "assistant", "content": "two\nlines é."},
        {"role": "user", "content": "you said two\nlines é."},
        {"role": "assistant", "content": 'a "quote"'},
        {"role": "user", "content": 'you said a "quote"'},
    ]


async def test_a_turn_that_the_limit_cut_is_told_and_goes_on():
    env, policy = Echo(), Says(iter(["long", "longer"]), ended=False)
    episode = await play(policy, env, turns=2)
    assert [t.flags for t in episode.turns] == [("truncated",), ("truncated",)] and env.heard[0].truncated
    assert policy.saw[1][1] == {"role": "assistant", "content": "long"}


async def test_a_policy_without_room_ends_the_episode():
    episode = await play(Says(iter(["one", None])), Echo())
    assert episode.stop_reason == StopReason.MAX_TOKENS and episode.turns[-1].flags == ("truncated",)
    assert len(episode.turns) == 1


async def test_calls_are_read_and_what_no_file_takes_is_replaced():
    call = '<tool_call>{"name": "shout", "arguments": {"x": 1}}</tool_call>'
    env = Echo()
    await play(Says(iter([call, f"half \ud83d, end {END}", "bye."])), env)
    assert env.heard[0].tool_calls[0].arguments == {"x": 1}
    assert env.heard[1].text == "half ?, end \ufffd"
    json.dumps(env.heard[1].text).encode()


async def test_tokens_are_those_that_the_endpoint_counts():
    episode = await play(Says(iter(["one", "two", "bye."])), Echo())
    tokens = counted(episode, [Usage(10, 3), Usage(20, 4), Usage(31, 5)])
    t = to_trajectory(tokens)
    assert [len(turn.token_ids) for turn in tokens.turns] == [3, 4, 5]
    assert len(t) == 10 + 3 + 7 + 4 + 7 + 5 and t.loss_mask.sum() == 12 and set(t.tokens) == {-1}
    assert [turn.text for turn in tokens.turns] == ["one", "two", "bye."]
    assert to_trajectory(counted(episode, [Usage(None, None)] * 3)).loss_mask.sum() == 0


@pytest.mark.parametrize("text", ["", "a", "\n\n", "日本語 🙂", '{"messages": []}', "</tool_call>"])
def test_a_reply_is_read_back_as_it_was(text):
    assert CODEC.text(CODEC.reply(text, ended=True)) == CODEC.action(CODEC.reply(text, ended=False)).text == text
    assert CODEC.text(CODEC.reply(text, ended=True), special=True) == text + END
    assert all(CODEC.first(CODEC.reply(text, ended=True), n) == n for n in range(len(text)))
