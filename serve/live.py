"""What an episode is played against when a person is there: an environment, or nobody but the person, watched.

    run_episode ──► Live.step ──► the environment, or the tools ──► what it says, told as it happens
                        └── the agent has addressed the person ──► their next words

A session that another process has begun is played again from its journal: `Live` then steps the environment with what
was sampled, tells nothing, and holds what it says against what it said.
"""

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rl.config_env import PythonConfig, SandboxConfig
from rl.env import Action, CutsTurns, Env, Message, Observation, Step
from rl.envs.rows import Question
from rl.task import Task
from serve.journal import Event, History, Played

CONVERSATION = Task(id="conversation", prompt={"prompt": [{"role": "user", "content": ""}]}, answer="")
"""What a free conversation is played as: nothing is asked, and nothing is right."""

Tell = Callable[..., Event]


class NotReplayable(RuntimeError):
    """The environment does not say again what it has said: the session cannot be taken up."""


def tool_set(name: str | None, sandbox: SandboxConfig) -> Env | None:
    """The environment whose tools a free conversation may call."""
    if name == "python":
        from rl.envs.python import Python

        return Python(PythonConfig(name="python", prompts="-", style="tool", sandbox=sandbox))
    return Question("calculator") if name == "calculator" else None


class Conversation:
    """Nobody but the person, and tools. A turn that calls one is answered by it, any other goes to the person."""

    def __init__(self, system: str | None, tools: Env | None):
        self._system, self._tools = system, tools

    async def reset(self, task: Task) -> Observation:
        shown = (await self._tools.reset(task)).tools if self._tools else ()
        return Observation([{"role": "system", "content": self._system}] if self._system else [], shown)

    def addresses_person(self, action: Action) -> bool:
        return self._tools is None or not (action.tool_calls or action.error)

    async def step(self, action: Action) -> Step:
        if self._tools is None or self.addresses_person(action):
            return Step(Observation([]))
        return await self._tools.step(action)

    async def close(self) -> None:
        if self._tools is not None:
            await self._tools.close()


class Live:
    """An environment that tells what happens in it, and asks the person for the next words where it is their turn.

    heard: the person's words that have come since they were last asked for; with `wait`, once there are some.
    """

    def __init__(
        self,
        env: Env,
        recorded: Sequence[Played],
        tell: Tell,
        sampled: Callable[[Action], dict[str, Any]],
        heard: Callable[[bool], Awaitable[list[str]]],
        prompted: bool,
        took: Callable[[float], None],
    ):
        """took: is told the seconds of a call of a tool."""
        self._env, self._recorded, self._tell = env, recorded, tell
        self._sampled, self._heard, self._prompted, self._took = sampled, heard, prompted, took
        self._turn = 0

    async def reset(self, task: Task) -> Observation:
        observation = await self._env.reset(task)
        if not self._prompted:
            self._tell("prompt", messages=list(observation.messages), tools=list(observation.tools))
        words = await self._heard(True) if isinstance(self._env, Conversation) else []
        return Observation([*observation.messages, *_said(words)], observation.tools, observation.over)

    def cut(self, text: str) -> int | None:
        return self._env.cut(text) if isinstance(self._env, CutsTurns) else None

    async def step(self, action: Action) -> Step:
        k, self._turn = self._turn, self._turn + 1
        known = self._recorded[k] if k < len(self._recorded) else None
        person = self._env if isinstance(self._env, Conversation) else None
        asks = person is not None and person.addresses_person(action)
        if known is None:
            calls = [{"name": c.name, "arguments": dict(c.arguments)} for c in action.tool_calls]
            self._tell("turn", turn=k, text=action.text, asks=asks, **self._sampled(action))
            for call in calls:
                self._tell("tool_call", turn=k, **call)
        began = time.perf_counter()
        step = await self._env.step(action)
        if action.tool_calls:
            self._took(time.perf_counter() - began)
        messages = self._observed(k, known, step, last=known is None or k == len(self._recorded) - 1)
        words = await self._heard(asks) if person is not None and not step.done else []
        return Step(Observation([*messages, *_said(words)]), step.reward, step.done, step.info)

    def _observed(self, k: int, known: Played | None, step: Step, last: bool) -> Sequence[Message]:
        """Tell what the environment has said; or hold it against what it said before, which is what counts.

        A tool may say another thing each time, such as the hour: the agent goes on from what it was told. An
        environment that does is another one than the episode was played in.
        """
        messages, flags = list(step.observation.messages), list(step.info.get("flags", ()))
        if known is not None and known.observation is not None:
            recorded = known.observation["messages"]
            if _plain(messages) != recorded and not isinstance(self._env, Conversation):
                raise NotReplayable(f"the environment answers turn {k} otherwise than it did")
            return recorded
        if last:
            if messages or flags:
                self._tell("observation", turn=k, messages=messages, flags=flags)
            if step.reward:
                self._tell("reward", turn=k, reward=step.reward)
        return messages

    async def close(self) -> None:
        await self._env.close()


def _said(words: Sequence[str]) -> list[Message]:
    return [{"role": "user", "content": text} for text in words]


def _plain(messages: list[Message]) -> Any:
    """As they come back from a journal."""
    return json.loads(json.dumps(messages))


class Feed:
    """The person's words of a journal, as the episode comes to ask for them."""

    def __init__(self, history: History):
        self._runs: list[list[str]] = [[]]
        for item in history.items:
            if isinstance(item, Played):
                self._runs.append([])
            else:
                self._runs[-1].append(item["content"])
        self._at = 0

    def next(self) -> list[str]:
        """What was said before the next turn."""
        words = self._runs[self._at] if self._at < len(self._runs) else []
        self._at += 1
        return words

    @property
    def live(self) -> bool:
        """Whether the journal has been used up."""
        return self._at >= len(self._runs)
