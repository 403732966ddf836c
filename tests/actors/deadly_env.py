"""An environment that does as its tasks say: fine, ends its process, raises, loses its service once, never returns.

Of the last three kinds it is the grader that raises, ends its process, or never returns.
"""

import asyncio
import os
import time
from pathlib import Path

from rl.env import InfraError, Observation, Step
from rl.task import Task

KINDS = ("fine", "kills", "raises", "service", "never", "graded_raises", "graded_kills", "graded_never")


class Kinds:
    def __init__(self, args):
        self.args = args

    def size(self, split):
        return None

    def task(self, split, index):
        kind = KINDS[index % len(KINDS)]
        return Task(f"{kind}-{index}", {"kind": kind, "number": index}, str(index))


class Deadly:
    tasks = staticmethod(lambda args, seed: Kinds(args))

    def __init__(self, args):
        self.args = args

    async def reset(self, task):
        self.task = task
        return Observation([{"role": "user", "content": f"{task.answer}+{task.answer}"}])

    async def step(self, action):
        kind = self.task.prompt["kind"]
        if kind == "kills":
            await asyncio.sleep(0.2)
            os._exit(1)
        if kind == "raises":
            raise KeyError("a bad row")
        if kind == "never":
            await asyncio.Event().wait()
        mark = Path(self.args["folder"]) / self.task.id
        if kind == "service" and not mark.exists():
            mark.touch()
            raise InfraError("the service that it asks is gone")
        await asyncio.sleep(0.05)
        return Step(Observation([{"role": "user", "content": "."}]), done=True)

    async def close(self):
        pass


def slowly(task, episode):
    """A grader that takes its time, and gives each task a reward of its own."""
    time.sleep(0.05)
    kind = task.prompt["kind"]
    if kind == "graded_raises":
        raise RuntimeError("cannot tell")
    if kind == "graded_kills":
        os._exit(1)
    if kind == "graded_never":
        time.sleep(3600)
    return float(task.prompt["number"])
