"""One task played to its end. The only episode loop: training, evaluation and serving all call `run_episode`."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from rl.chat import Codec
from rl.env import CutsTurns, Env, ManySpeakers, Message
from rl.policy import Completion, ContextFull, Policy, Sampling
from rl.task import BadTask, Task, derive_seed


class StopReason(StrEnum):
    DONE = "done"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"


@dataclass(frozen=True)
class Identity:
    """Which episode this is. `sample` numbers the episodes of one task, `attempt` the times it was played again."""

    stage: int
    step: int
    task: str
    sample: int = 0
    attempt: int = 0

    @property
    def session(self) -> str:
        return f"{self.stage}/{self.step}/{self.task}/{self.sample}"


@dataclass(frozen=True)
class GroupRequest:
    """A task to play `samples` times: the group that shares a baseline.

    max_turns: fewer than the environment allows (a horizon curriculum); condition: a text added to the prompt.
    """

    stage: int
    step: int
    task: Task
    samples: int
    attempt: int = 0
    max_turns: int | None = None
    condition: str | None = None


@dataclass(frozen=True)
class Limits:
    max_turns: int
    max_length: int
    """Tokens of a whole episode, prompt and observations included."""


@dataclass
class Turn:
    """One model message and the observation that answered it.

    For a turn that sampled N tokens: token_ids, logprobs and versions have length N. `supplied_end` says that the
    turn was cut short and its end-of-turn token was supplied; that token is in the context but is not trained on.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    supplied_end: bool
    text: str
    reward: float = 0.0
    flags: tuple[str, ...] = ()
    observation: Sequence[Message] = ()
    observation_ids: Sequence[int] = ()
    seed: int = 0


@dataclass
class Episode:
    identity: Identity
    task: Task
    prompt: Sequence[Message]
    prompt_ids: Sequence[int]
    end_of_turn: int
    turns: list[Turn] = field(default_factory=list)
    stop_reason: StopReason = StopReason.MAX_TURNS
    duration_s: float = 0.0
    tools: Sequence[dict[str, Any]] = ()

    @property
    def final_text(self) -> str:
        return self.turns[-1].text if self.turns else ""

    @property
    def turn_reward(self) -> float:
        """The sum of what the environment itself gave."""
        return sum(turn.reward for turn in self.turns)

    @property
    def context_ids(self) -> list[int]:
        """The tokens of the episode so far, exactly as the model saw and sampled them."""
        ids = list(self.prompt_ids)
        for turn in self.turns:
            ids += turn.token_ids
            if turn.supplied_end:
                ids.append(self.end_of_turn)
            ids += turn.observation_ids
        return ids


async def run_episode(
    env: Env,
    task: Task,
    policy: Policy,
    codec: Codec,
    *,
    sampling: Sampling,
    limits: Limits,
    identity: Identity,
    seed: int = 0,
    condition: str | None = None,
) -> Episode:
    """Play `task` in `env` with `policy` until the environment says done or a limit is reached.

    condition: a text added to the opening messages, such as the feedback that the answer is to earn.

    The sampling seed of a turn is a function of (seed, task, sample, turn). Raises what the environment or the
    policy raise, and BadTask when the question leaves no room for an answer; the environment is closed in every case.

    Where several speak (`ManySpeakers`), each other one's episode is played beside it: by the same policy under the
    same limits, in a context of its own. Only this one's is returned, and none is when any of them failed.
    """
    shared: dict[str, Any] = {"policy": policy, "codec": codec, "sampling": sampling, "limits": limits, "seed": seed}
    others = env.others(task) if isinstance(env, ManySpeakers) else ()
    own = _play(env, task, identity=identity, condition=condition, **shared)
    if not others:
        return await own
    beside = [_play(e, t, identity=replace(identity, task=t.id), condition=None, **shared) for t, e in others]
    speakers = [asyncio.ensure_future(speaker) for speaker in (own, *beside)]
    try:
        return (await asyncio.gather(*speakers))[0]
    finally:
        for speaker in speakers:
            if not speaker.cancelling():  # once, or it would not even close its environment
                speaker.cancel()
        await asyncio.gather(*speakers, return_exceptions=True)


async def _play(
    env: Env,
    task: Task,
    *,
    policy: Policy,
    codec: Codec,
    sampling: Sampling,
    limits: Limits,
    identity: Identity,
    seed: int,
    condition: str | None,
) -> Episode:
    """One speaker's episode."""
    started = time.perf_counter()
    try:
        observation = await env.reset(task)
        opening = conditioned(observation.messages, condition)
        context = codec.prompt(opening, observation.tools)
        check_fits(task, context, limits.max_length)
        episode = Episode(identity, task, opening, list(context), codec.end_of_turn, tools=observation.tools)
        if observation.over:
            episode.stop_reason = StopReason.DONE
        while not observation.over and len(episode.turns) < limits.max_turns:
            room = limits.max_length - len(context)
            turn_seed = derive_seed(seed, task.id, identity.sample, len(episode.turns))
            asked = sampling.with_(
                seed=turn_seed, max_tokens=min(sampling.max_tokens, room), stop=(codec.end_of_turn, *sampling.stop)
            )
            try:
                completion = await policy.act(context, asked, identity.session)
            except ContextFull:
                episode.stop_reason = StopReason.MAX_TOKENS
                break
            completion = _cut(completion, env, codec)
            cut = completion.finish_reason == "length"
            ids = completion.token_ids
            ended = bool(ids) and ids[-1] == codec.end_of_turn  # another stop token does not close the turn
            supplied = not ended and len(context) + len(ids) < limits.max_length
            action = codec.action(ids, truncated=cut)
            turn = Turn(
                completion.token_ids, completion.logprobs, completion.versions, supplied, action.text, seed=turn_seed
            )
            context += [*completion.token_ids, *([codec.end_of_turn] if supplied else [])]
            episode.turns.append(turn)
            step = await env.step(action)
            turn.reward = step.reward
            turn.flags = (*(["truncated"] if cut else []), *step.info.get("flags", ()))
            turn.observation = step.observation.messages
            if step.done:
                episode.stop_reason = StopReason.DONE
                break
            seen = codec.observation(step.observation.messages)
            if len(context) + len(seen) >= limits.max_length:
                episode.stop_reason = StopReason.MAX_TOKENS
                break
            if len(episode.turns) < limits.max_turns:
                turn.observation_ids = seen
                context += seen
        if episode.stop_reason == StopReason.MAX_TOKENS and episode.turns:
            last = episode.turns[-1]
            last.flags = tuple(dict.fromkeys(("truncated", *last.flags)))
        episode.duration_s = time.perf_counter() - started
        return episode
    finally:
        await env.close()


def check_fits(task: Task, prompt_ids: Sequence[int], max_length: int) -> None:
    """Raises BadTask, naming file and row where there are such, when the question leaves no room for an answer."""
    if len(prompt_ids) >= max_length:
        raise BadTask(
            f"{task.where or 'task ' + task.id}: the question takes {len(prompt_ids)} tokens, which leaves no room for "
            f"an answer in model.max_length = {max_length}"
        )


def _cut(completion: Completion, env: Env, codec: Codec) -> Completion:
    """The tokens of a turn up to where the environment ends it."""
    if not isinstance(env, CutsTurns):
        return completion
    text = codec.text(completion.token_ids, special=True).removesuffix(codec.end_text)
    end = env.cut(text)
    if end is None or not text[end:].strip():
        return completion
    count = codec.first(completion.token_ids, end)
    return replace(
        completion,
        token_ids=completion.token_ids[:count],
        logprobs=completion.logprobs[:count],
        versions=completion.versions[:count],
        finish_reason="stop",
    )


def conditioned(messages: Sequence[Message], text: str | None) -> list[Message]:
    """The opening messages with a text added to the last of them, on a line of its own."""
    if text is None:
        return list(messages)
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}\n{text}"}]
