"""The calculator as a slow tool: each step takes a time of its own, 0.2 to 2 s and long-tailed."""

import asyncio
import random
from typing import Any

from rl.config_env import CalculatorConfig
from rl.env import Action, Step
from rl.envs.calculator import Calculator, CalculatorTasks

SHORTEST_S, LONGEST_S = 0.2, 2.0


def duration(rng: random.Random) -> float:
    """Pareto, shape 1.2, cut off: half of the steps take less than 0.36 s, one in sixteen the whole 2 s."""
    return min(LONGEST_S, SHORTEST_S * rng.paretovariate(1.2))


class SlowCalculator(Calculator):
    @staticmethod
    def tasks(args: dict[str, Any], seed: int) -> CalculatorTasks:
        return CalculatorTasks(CalculatorConfig(name="calculator", **args), seed)

    def __init__(self, args: dict[str, Any]):
        super().__init__(CalculatorConfig(name="calculator", **args))
        self._rng = random.Random()

    async def step(self, action: Action) -> Step:
        await asyncio.sleep(duration(self._rng))
        return await super().step(action)
