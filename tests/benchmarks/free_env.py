"""What costs nothing: an environment of three turns, a reward, and a generator that has its answer ready."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from actors.role import AsyncRole
from rl.env import Observation, Step
from rl.policy import Completion
from rl.task import Task

TURNS = 3
SAID = 12


class Numbers:
    def size(self, split):
        return None

    def task(self, split, index):
        return Task(f"{split}-{index}", {}, str(index))


class Free:
    tasks = staticmethod(lambda args, seed: Numbers())

    def __init__(self, args):
        self.turns = 0

    async def reset(self, task):
        return Observation([{"role": "user", "content": f"{task.answer}+1"}])

    async def step(self, action):
        self.turns += 1
        return Step(Observation([{"role": "user", "content": "go on"}]), done=self.turns == TURNS)

    async def close(self):
        pass


def reward(task, episode):
    return float(int(task.answer) % 2)


class ScriptedGenerator(AsyncRole):
    """Answers every turn with the same tokens, at once."""

    role = "generator"

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[str, asyncio.Queue[Any]] = defaultdict(asyncio.Queue)
        self._completion = Completion(list(range(40, 40 + SAID)), [-1.0] * SAID, [0] * SAID, "length")

    async def submit(self, caller: str, turns: Sequence[Any]) -> None:
        self._answers[caller].put_nowait([(turn.key, self._completion) for turn in turns])

    async def collect(self, caller: str) -> Any:
        return await self._answers[caller].get()

    async def ready(self) -> None:
        pass
