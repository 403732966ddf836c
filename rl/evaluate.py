"""Finished evaluation episodes -> a report."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One evaluation episode: did it succeed, and in how many turns."""

    success: bool
    turns: int
    reward: float


@dataclass(frozen=True)
class Report:
    """success_by_turn_budget[k]: the share of all tasks that had succeeded within k turns (SR_k)."""

    n: int
    success: float
    success_by_turn_budget: dict[int, float]
    mean_turns: float
    mean_reward: float


def report(outcomes: Sequence[Outcome], max_turns: int) -> Report:
    n = len(outcomes)
    assert n, "an evaluation has at least one task"
    return Report(
        n=n,
        success=sum(o.success for o in outcomes) / n,
        success_by_turn_budget={
            k: sum(o.success and o.turns <= k for o in outcomes) / n for k in range(1, max_turns + 1)
        },
        mean_turns=sum(o.turns for o in outcomes) / n,
        mean_reward=sum(o.reward for o in outcomes) / n,
    )
