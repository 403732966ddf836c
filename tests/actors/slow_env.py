"""An environment of one's own whose steps take their time, some much longer than others."""

import asyncio
import random

from rl.env import Observation, Step
from rl.task import Task


class Numbers:
    def __init__(self, args):
        self.args = args

    def size(self, split):
        return None

    def task(self, split, index):
        return Task(f"{split}-{index}", {"seed": index}, str(index))


class Slow:
    """Three turns about numbers; each takes up to `seconds`, and one in eight four times that."""

    tasks = staticmethod(lambda args, seed: Numbers(args))

    def __init__(self, args):
        self.args, self.turns = args, 0

    async def reset(self, task):
        self.random = random.Random(task.prompt["seed"])
        return Observation([{"role": "user", "content": f"{task.answer}+{task.answer}"}])

    async def step(self, action):
        self.turns += 1
        slow = 4 if self.random.random() < 0.125 else 1
        await asyncio.sleep(self.random.random() * self.args["seconds"] * slow)
        return Step(Observation([{"role": "user", "content": f"{self.turns}-1"}]), done=self.turns == 3)

    async def close(self):
        pass
