"""Finished evaluation episodes -> a report, and what its figures are worth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

_Z = NormalDist().inv_cdf(0.975)
"""Of a 95 % interval."""


@dataclass(frozen=True)
class Outcome:
    """One evaluation episode: did it succeed, and what did it take. tokens: sampled ones; tool_errors: turns."""

    success: bool
    turns: int
    reward: float
    tokens: int = 0
    tool_errors: int = 0
    truncated: bool = False
    seconds: float = 0.0


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """Of an episode as its Parquet row has it (rl/trajectory.py: to_row)."""
    flags = [flag for turn in row["turn_flags"] for flag in turn]
    return Outcome(
        row["success"], len(row["turn_rewards"]), row["reward"], int(sum(row["loss_mask"])),
        flags.count("tool_error"), "truncated" in flags, row["duration_s"],
    )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Of n tasks, each played `samples` times.

    success: the share of all episodes; success_low, success_high: its 95 % interval. success_by_turn_budget[k]: the
    share that had succeeded within k turns (SR_k), and turn_slope what a turn more is worth by a line through them
    (MINT's delta_tools). pass_at[k]: the chance that one of k episodes of a task succeeds. tool_errors: of all turns;
    truncated: of all episodes; mean_seconds: of an episode, others played beside it.
    """

    n: int
    samples: int
    success: float
    success_low: float
    success_high: float
    success_by_turn_budget: dict[int, float]
    turn_slope: float
    pass_at: dict[int, float]
    mean_turns: float
    mean_tokens: float
    mean_reward: float
    tool_errors: float
    truncated: float
    mean_seconds: float


def report(tasks: Sequence[Sequence[Outcome]], max_turns: int) -> Report:
    """tasks: the outcomes of each, as many of one as of another."""
    assert tasks and all(len(t) == len(tasks[0]) > 0 for t in tasks), "as many episodes of each task"
    outcomes, samples = [o for t in tasks for o in t], len(tasks[0])
    successes = [[o.success for o in t] for t in tasks]
    low, high = success_interval(successes)
    by_budget = {k: fmean(o.success and o.turns <= k for o in outcomes) for k in range(1, max_turns + 1)}
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return Report(
        n=len(tasks),
        samples=samples,
        success=fmean(o.success for o in outcomes),
        success_low=low,
        success_high=high,
        success_by_turn_budget=by_budget,
        turn_slope=slope(by_budget),
        pass_at={k: fmean(pass_at_k(samples, sum(s), k) for s in successes) for k in ks},
        mean_turns=fmean(o.turns for o in outcomes),
        mean_tokens=fmean(o.tokens for o in outcomes),
        mean_reward=fmean(o.reward for o in outcomes),
        tool_errors=sum(o.tool_errors for o in outcomes) / max(1, sum(o.turns for o in outcomes)),
        truncated=fmean(o.truncated for o in outcomes),
        mean_seconds=fmean(o.seconds for o in outcomes),
    )


def success_interval(tasks: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """The 95 % interval of the success rate over tasks like these.

    One episode a task: Wilson's score interval (1927). Several are not independent, so that the tasks' own rates are
    what varies: the normal interval of their mean, within [0, 1].
    """
    n = len(tasks)
    rates = [fmean(t) for t in tasks]
    p = fmean(rates)
    if len(tasks[0]) > 1 and n > 1:
        half = _Z * stdev(rates) / math.sqrt(n)
        return max(0.0, p - half), min(1.0, p + half)
    middle, half = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    whole = 1 + _Z**2 / n
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n episodes, c of them successes, hold a success: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    Without bias, where 1 - (1 - c/n)^k is too low. Raises ValueError when k is above n.
    """
    if k > n:
        raise ValueError(f"pass@{k} of {n} episodes a task: play at least {k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def slope(values: Mapping[int, float]) -> float:
    """Of the least-squares line through (k, value). 0 for a single one."""
    if len(values) < 2:
        return 0.0
    k_mean, v_mean = fmean(values), fmean(values.values())
    return sum((k - k_mean) * (v - v_mean) for k, v in values.items()) / sum((k - k_mean) ** 2 for k in values)


@dataclass(frozen=True)
class Difference:
    """Of one evaluation's success to another's on the n tasks that both have played, with its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        return not self.low <= 0 <= self.high


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """second - first, task by task, which leaves out how hard the tasks are. Values: success rates by task.

    Raises ValueError without two tasks in common.
    """
    both = sorted(first.keys() & second.keys())
    if len(both) < 2:
        raise ValueError(f"{len(both)} tasks were played in both: nothing to compare. Evaluate the same split and seed")
    differences = [second[t] - first[t] for t in both]
    mean, half = fmean(differences), _Z * stdev(differences) / math.sqrt(len(both))
    return Difference(len(both), mean, mean - half, mean + half)
