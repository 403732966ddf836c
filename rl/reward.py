"""Scoring a finished episode: rule rewards, and how their parts add up."""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rl.config import Config
from rl.env import World, load_object
from rl.episode import Episode, StopReason
from rl.task import Task

RewardFunction = Callable[[Task, Episode], float | Mapping[str, float]]
"""A rule: the score of an episode, or its named parts. Pure; may be called again after a failure."""


@dataclass(frozen=True)
class Score:
    """`parts` are logged by name; `total` is their sum plus what the environment gave turn by turn."""

    total: float
    parts: Mapping[str, float]
    success: bool

    @property
    def outcome(self) -> float:
        """What the rule gave at the end, without what the environment gave turn by turn."""
        return sum(self.parts.values())

    @staticmethod
    def of(function: RewardFunction, episode: Episode, success_at: float = 1.0) -> "Score":
        """Success is a total of at least `success_at`.

        Raises ValueError when the rule returns something that is not a finite number.
        """
        result = function(episode.task, episode)
        parts = dict(result) if isinstance(result, Mapping) else {"outcome": result}
        if not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in parts.values()):
            name = getattr(function, "__name__", function)
            raise ValueError(f"the reward function {name} returned {result!r}: expected a finite number")
        parts = {k: float(v) for k, v in parts.items()}
        total = sum(parts.values()) + episode.turn_reward
        return Score(total, parts, total >= success_at)


def reward_function(config: Config) -> RewardFunction:
    """The configured function, or the environment's own rule, or nothing beyond what the environment gave."""
    path = config.reward.function or World(config.env, config.run.seed).default_reward
    return load_object(path) if path else lambda task, episode: 0.0


def final_answer(task: Task, episode: Episode) -> float:
    """1 when the episode ended with an answer, and that answer is the ground truth to the letter."""
    return float(episode.stop_reason == StopReason.DONE and episode.final_text.strip() == task.answer)


def math_answer(task: Task, episode: Episode) -> float:
    """1 when the final message is the ground truth to the letter, or equals it as mathematics (by math-verify).

    math-verify bounds its own time with an alarm signal, so this runs in a main thread only.
    """
    return same_answer(task.answer, episode.final_text) if episode.stop_reason == StopReason.DONE else 0.0


def same_answer(truth: str, answer: str) -> float:
    """1 when the answer is the truth to the letter, or equals it as mathematics. In a main thread only: see above."""
    from math_verify import parse, verify

    if answer.strip() == truth.strip():
        return 1.0
    return float(verify(parse(truth), parse(answer)))
