"""Schedules: pure functions of the step, so that a resumed run continues on the same curve."""

import math
import random
from collections.abc import Sequence

from rl.task import derive_seed


def learning_rate(step: int, *, base: float, total: int, warmup: int, schedule: str) -> float:
    """The learning rate of step 0..total-1: linear warm-up, then one of three curves.

    schedule: constant; linear, a straight line to 0; cosine, to a tenth of `base`. Both ends are reached at step
    `total`, the first that is not taken.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return base * (1 - progress)
    return base * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def coefficient(step: int, *, start: float, final: float | None, total: int) -> float:
    """A straight line from `start` at step 0 to `final` at step total-1; `start` throughout when `final` is None."""
    if final is None:
        return start
    return start + (final - start) * step / max(1, total - 1)


def horizon(step: int, *, every: int, turns: Sequence[int]) -> int:
    """The most turns of an episode: the next of `turns` after every `every` steps, then the last one.

    ScalingInter-RL (AgentGym-RL, https://arxiv.org/abs/2509.08755). The authors' code counts rounds instead, and its
    counter moves on again when a run resumes at a boundary.
    """
    return turns[min(step // every, len(turns) - 1)]


def potential(success: float) -> float:
    """What a task can still teach a policy that succeeds in a share p of attempts: 4 p (1 - p), between 0 and 1.

    R1-Code-Interpreter (https://arxiv.org/abs/2505.21668).
    """
    return 4 * success * (1 - success)


def curriculum_order(successes: Sequence[float], *, order: str) -> list[int]:
    """Task indices, the first to be opened first; ties keep their order. successes: the share of attempts that succeed.

    order: potential, the highest first; easy_to_hard, the highest success first.
    """
    # 4 p (1 - p) of 0.1 and of 0.9 differ in their last digit, and are a tie.
    keys = [round(potential(p), 9) for p in successes] if order == "potential" else successes
    return sorted(range(len(successes)), key=lambda i: -keys[i])


def open_tasks(step: int, *, total: int, parts: int, count: int) -> int:
    """How many of `count` ordered tasks are open: each `parts`-th of the steps opens one more `parts`-th of the tasks.

    Rounded up, so never none. Fewer steps than parts skip parts, and end before all tasks are open.
    """
    part = min(step * parts // total, parts - 1)
    return -(-count * (part + 1) // parts)


def draw(step: int, *, tasks: int, open_count: int, seed: int) -> list[int]:
    """Which tasks a step plays: `tasks` positions in the order, uniform over the first `open_count`.

    No task comes again before all open ones have come.
    """
    rng = random.Random(derive_seed("draw", seed, step))
    rounds = -(-tasks // open_count)
    drawn = [task for _ in range(rounds) for task in rng.sample(range(open_count), open_count)]
    return drawn[:tasks]
