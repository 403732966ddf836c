"""Any Gymnasium environment whose actions are a few choices or a text, and whose observations can be written down.

    env: {name: gymnasium, id: FrozenLake-v1, args: {is_slippery: false}, actions: [left, down, right, up]}

The model answers with the name or the number of a choice, or with the text itself. Each turn is given what the
environment rewards it with; an episode succeeds at `reward.success_at` of them together.
"""

import asyncio
import re
from typing import Any

import gymnasium
from gymnasium import spaces
from gymnasium.error import Error

from rl.config_env import GymnasiumConfig
from rl.env import Action, Observation, Step
from rl.episode import Episode
from rl.task import Task, derive_seed


def make(config: GymnasiumConfig) -> Any:
    """The environment. Raises ValueError naming what it cannot be played by."""
    try:
        drawn = {"render_mode": "ansi"} if _draws_text(config) else {}
        env = gymnasium.make(config.id, **{**drawn, **config.args})
    except (Error, TypeError, ValueError) as error:
        raise ValueError(f"env.id: gymnasium does not make {config.id!r}: {error}") from None
    space = env.action_space
    if not isinstance(space, spaces.Discrete | spaces.Text):
        raise ValueError(f"env.id: the actions of {config.id} are {space}: expected Discrete or Text")
    if config.actions and (not isinstance(space, spaces.Discrete) or len(config.actions) != space.n):
        raise ValueError(f"env.actions names {len(config.actions)} actions, and {config.id} has {space}")
    return env


def _draws_text(config: GymnasiumConfig) -> bool:
    """Whether the environment's class can draw itself as text."""
    env = gymnasium.make(config.id, **config.args)
    try:
        return "ansi" in env.metadata.get("render_modes", ())
    finally:
        env.close()


class GymnasiumTasks:
    """A task is a seed. Held-out seeds are odd and the others even; what they lead to is the environment's affair."""

    def __init__(self, config: GymnasiumConfig, seed: int):
        make(config).close()
        self._config, self._seed = config, seed

    def size(self, split: str) -> None:
        return None

    def task(self, split: str, index: int) -> Task:
        seed = derive_seed("gymnasium", self._seed, split, index) // 2 * 2 + (split == "held_out")
        return Task(f"{self._config.id}:{seed}", {"id": self._config.id}, "", seed)


def nothing_more(task: Task, episode: Episode) -> float:
    """The reward is what the environment gave turn by turn."""
    return 0.0


class Gymnasium:
    """One episode. A turn that names no action is flagged `void`, answered with what can be named, and takes a turn."""

    reward = "rl.envs.gymnasium.nothing_more"
    tasks = GymnasiumTasks

    def __init__(self, config: GymnasiumConfig):
        self._config = config
        self._env: Any = None

    async def reset(self, task: Task) -> Observation:
        # In threads: an environment may compute for long, and other episodes are played on this event loop.
        self._env = await asyncio.to_thread(make, self._config)
        seen, _ = await asyncio.to_thread(self._env.reset, seed=task.seed)
        text = "\n".join(filter(None, [self._config.instructions, self._choices(), self._shown(seen)]))
        return Observation([{"role": "user", "content": text}])

    async def step(self, action: Action) -> Step:
        chosen = self._chosen(action.text)
        if chosen is None:
            return Step(Observation([{"role": "user", "content": self._choices()}]), info={"flags": ["void"]})
        seen, reward, terminated, truncated, _ = await asyncio.to_thread(self._env.step, chosen)
        message = {"role": "user", "content": self._shown(seen)}
        return Step(Observation([message]), float(reward), done=terminated or truncated)

    async def close(self) -> None:
        if self._env is not None:
            await asyncio.to_thread(self._env.close)

    def _names(self) -> list[str]:
        space = self._env.action_space
        return list(self._config.actions) or [str(int(space.start) + i) for i in range(int(space.n))]

    def _choices(self) -> str:
        if isinstance(self._env.action_space, spaces.Text):
            return ""
        return f"Answer with one of: {', '.join(self._names())}."

    def _chosen(self, text: str) -> Any:
        """The action that a turn names: the last one, so that it may think aloud; None where it names none."""
        space = self._env.action_space
        if isinstance(space, spaces.Text):
            return text.strip() if space.contains(text.strip()) else None
        names = self._names()
        either = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
        found = re.findall(rf"(?<!\w)({either})(?!\w)", text, re.IGNORECASE)
        lower = [n.lower() for n in names]
        return int(space.start) + lower.index(found[-1].lower()) if found else None

    def _shown(self, seen: Any) -> str:
        drawn = self._env.render() if self._env.render_mode == "ansi" else None
        if drawn is None:
            return f"Observation: {seen}"
        # What a terminal would colour is put in brackets.
        return re.sub(r"\x1b\[[\d;]*m(.*?)\x1b\[0m", r"[\1]", drawn, flags=re.DOTALL).strip("\n")
