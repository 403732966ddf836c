"""The environment protocol: what an episode is played against.

An environment is single-use: one object plays one episode. Its observations are chat messages, its actions are
the model's turns. A class that also implements `TaskSource` and (optionally) `demonstrate` can be trained on:

    class MyEnv:
        def __init__(self, settings): ...
        async def reset(self, task) -> Observation: ...
        async def step(self, action) -> Step: ...
        async def close(self) -> None: ...
"""

import importlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

from rl.config_env import CustomEnvConfig, EnvConfig
from rl.task import Task, TaskSource


class InfraError(RuntimeError):
    """A failure of the machinery that a task is played with, and not of the task: it is played again, elsewhere.

    An environment or a reward function raises it, ConnectionError or TimeoutError when a service that it needs is gone.
    Any other exception is held against the task. Neither ever becomes a reward.
    """


Message = dict[str, Any]
"""A chat message: {"role": ..., "content": ...} and, on demonstrations, "tool_calls"."""


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Observation:
    """What the model sees next: messages, and at reset the tools it may call (OpenAI's function schema).

    over, at reset: the episode is one without a turn. Another speaker has ended it before the model's first.
    """

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    over: bool = False


@dataclass(frozen=True)
class Action:
    """The model's turn as the environment sees it.

    `error` says what was wrong with a malformed tool call; the environment answers it with an error observation.
    """

    text: str
    token_ids: Sequence[int] = ()
    tool_calls: Sequence[ToolCall] = ()
    error: str | None = None
    truncated: bool = False


@dataclass(frozen=True)
class Step:
    """The answer to one action. `reward` belongs to that turn; `info["flags"]` become the turn's flags."""

    observation: Observation
    reward: float = 0.0
    done: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


class Env(Protocol):
    async def reset(self, task: Task) -> Observation: ...

    async def step(self, action: Action) -> Step: ...

    async def close(self) -> None: ...


@runtime_checkable
class Demonstrator(Protocol):
    """A task source that can also show how a task is done; SFT plays its messages through the episode loop."""

    def demonstrate(self, task: Task, rng: random.Random, guess: bool) -> Iterator[Message]:
        """Assistant messages for a task, in order. `guess`: the low-quality kind found in logs."""
        ...


@runtime_checkable
class CutsTurns(Protocol):
    """An environment whose turns end where it says, whatever the model has said past that."""

    def cut(self, text: str) -> int | None:
        """How many characters of a turn count; None: all."""
        ...


@dataclass(frozen=True)
class Hint:
    """How a turn went, in a word and in a sentence or two."""

    good: bool
    text: str


@runtime_checkable
class Hints(Protocol):
    """An environment that can say how the turn that it has just answered went: feedback by rules."""

    def hint(self, truth: bool) -> Hint:
        """truth: held against the task's answer, which the text must not hold; else by the turn alone."""
        ...


@runtime_checkable
class ManySpeakers(Protocol):
    """An environment that several speakers share, one of whom is the episode's. The same policy plays the others."""

    def others(self, task: Task) -> Sequence[tuple[Task, Env]]:
        """Each other speaker's task, of an id of its own, and its own view of the same game, still to be reset."""
        ...


_BUILT_IN = {
    "calculator": "rl.envs.calculator.Calculator",
    "gymnasium": "rl.envs.gymnasium.Gymnasium",
    "multi_agent": "actors.multi_agent.MultiAgent",  # the one that needs Ray, and so lies where Ray is
    "python": "rl.envs.python.Python",
    "reasoning_gym": "rl.envs.reasoning.ReasoningGym",
    "rows": "rl.envs.rows.Rows",
}


def load_object(path: str) -> Any:
    """The object at a dotted path.

    Raises ValueError with the part that could not be found.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{path!r} is not a dotted path like package.module.name")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"cannot import {module!r} of {path!r}: {error}. Is its folder on PYTHONPATH?") from error
    if not hasattr(found, name):
        raise ValueError(f"module {module!r} has no {name!r}")
    return getattr(found, name)


def load_env(path: str) -> Any:
    """An environment's class by its dotted path, or by the name of an entry point of `repertory.envs`.

    Raises ValueError with what could not be found.
    """
    if "." in path:
        return load_object(path)
    installed = {point.name: point for point in entry_points(group="repertory.envs")}
    if path not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise ValueError(
            f"env.path: {path!r} is neither a dotted path like package.module.Class nor an entry point of "
            f"repertory.envs (installed: {known})"
        )
    try:
        return installed[path].load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"env.path: cannot load {installed[path].value!r} of the entry point {path!r}: {error}"
        ) from error


class World:
    """An environment family under one configuration: its tasks, its demonstrations, and fresh environments."""

    def __init__(self, config: EnvConfig, seed: int):
        path = config.path if isinstance(config, CustomEnvConfig) else _BUILT_IN[config.name]
        self._cls: Any = load_env(path)
        if not hasattr(self._cls, "tasks"):
            raise ValueError(
                f"env.path: {path} has no `tasks`, a function of settings and a seed that returns the tasks to be "
                "trained on (rl/env.py)"
            )
        self.feedback = config.feedback
        if self.feedback.on and self.feedback.source == "rules" and not hasattr(self._cls, "hint"):
            raise ValueError(
                f"env.feedback.source: rules are an environment's own, and {config.name} has none (a method `hint`, "
                "rl/env.py: Hints): use checkpoint or endpoint"
            )
        self.settings: Any = dict(config.args) if isinstance(config, CustomEnvConfig) else config
        self.source: TaskSource = self._cls.tasks(self.settings, seed)
        self.default_reward: str | None = getattr(self._cls, "reward", None)

    def env(self) -> Env:
        return self._cls(self.settings)
