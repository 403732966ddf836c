"""Scoring a finished episode: rule rewards, and how their parts add up."""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rl.config import Config
from rl.env import World, load_object
from rl.episode import Episode, StopReason
from rl.task import Task

RewardFunction = Callable[[Task, Episode], float | Mapping[str, float]]
"""A rule: the score of an episode, or its named parts. Pure; may be called again after a failure."""


class Undecided(RuntimeError):
    """A rule ran out of time on an answer. It is held against the task, which is dropped and counted.

    No TimeoutError: that is a failure of ours, whose call is made again, and an answer like 9**9**9**9 would make it
    fail each time, until the run gives up.
    """


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
    """1 when the answer is the truth to the letter, or equals it as mathematics. In a main thread only: see above.

    Raises Undecided when math-verify ran out of time and found nothing equal: that says nothing of the answer.
    """
    if answer.strip() == truth.strip():
        return 1.0
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    def tried(call: Callable[..., Any], *values: Any) -> Any:
        """What it returns; None where it cannot read or compare them. Unasked, it would take a timeout for that."""
        try:
            return call(*values, raise_on_error=True)
        except TimeoutException as error:
            late.append(error)
        except (MemoryError, OSError):  # the machine's failure, and not the answer's
            raise
        except Exception:
            pass
        return None

    late: list[BaseException] = []
    known, given = tried(parse, truth) or [], tried(parse, answer) or []
    if any(tried(verify, [k], [g]) for k in known for g in given):
        return 1.0
    if late:
        raise Undecided(f"math-verify: {str(late[0])[:200]}") from late[0]
    return 0.0
