"""Failures told apart, tried again, and counted against a budget.

INFRA  a process, a node, a connection or a deadline of ours: done again, elsewhere or by whoever takes its place
DATA   a task that fails wherever it is played: dropped after a few attempts, and named

Neither becomes a reward.
"""

import asyncio
import itertools
import logging
import math
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from rl.config import FaultsConfig
from rl.env import InfraError

log = logging.getLogger("repertory")
T = TypeVar("T")

DEAD = (RayActorError, NodeDiedError, WorkerCrashedError)
_INFRA = (*DEAD, ObjectLostError, GetTimeoutError, RaySystemError, InfraError, ConnectionError, TimeoutError)


class BudgetSpent(RuntimeError):
    """More failures than the configuration lets a run survive; the text has the last one's cause."""


class Stuck(InfraError):
    """A call that did not return before its deadline."""


def cause_of(error: BaseException) -> BaseException:
    """What went wrong at the bottom of Ray's wrapping."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def is_infra(error: BaseException) -> bool:
    return isinstance(cause_of(error), _INFRA)


def is_death(error: BaseException) -> bool:
    """Whether it was the called process itself that died, and not one that it depends on."""
    return isinstance(error, DEAD) and not isinstance(error, RayTaskError)


def named(error: BaseException) -> str:
    cause = cause_of(error)
    if isinstance(cause, DEAD):  # Ray's text is a paragraph, and the same for all
        return f"its process died ({type(cause).__name__})"
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}".rstrip(": ")


def backoff(attempt: int) -> float:
    """Seconds to wait after the attempt of that number, from 0 on; at random, so that the many do not return as one."""
    return min(10.0, 0.2 * 2**attempt) * random.uniform(0.5, 1.5)


async def tried(call: Callable[[int], Awaitable[T]], faults: FaultsConfig) -> T:
    """`call(attempt)` until it ends without a failure of ours, each with its deadline.

    Raises what else it raises; a failure of ours faults.patience_s after the first.
    """
    given_up = math.inf
    for attempt in itertools.count():
        try:
            return await within(faults.deadline_s, call(attempt))
        except Exception as error:
            if not is_infra(error) or time.monotonic() > given_up:
                raise
            given_up = min(given_up, time.monotonic() + faults.patience_s)
            log.warning("a call failed, and is made again: %s", named(error))
            await asyncio.sleep(backoff(attempt))
    raise AssertionError("the loop does not end")


async def within(seconds: float, call: Awaitable[T], setting: str = "deadline_s") -> T:
    """Raises Stuck, naming the setting of `faults` that says how long, when the call takes longer."""

    async def result() -> T:
        return await call  # a Ray ref is awaitable, and no coroutine

    try:
        return await asyncio.wait_for(result(), seconds)
    except TimeoutError as error:
        if isinstance(error, RayTaskError):
            raise
        raise Stuck(f"a call did not return within faults.{setting} = {seconds:g} s") from None


class Ledger:
    """Failures by name since they were last told, and whether there have been too many."""

    def __init__(self, faults: FaultsConfig):
        self._faults = faults
        self._when: dict[str, deque[float]] = {"infra": deque(), "data": deque()}
        self._counts: Counter[str] = Counter()
        self._progress = 0.0

    def progress(self) -> None:
        """A training step was done."""
        self._progress = time.monotonic()

    def infra(self, who: str, error: BaseException) -> None:
        """A process of ours had to be started again. Raises BudgetSpent."""
        self.count(who)
        self._spend("infra", self._faults.infra_budget, f"the {who} failed: {named(error)}")

    def count(self, who: str) -> None:
        self._counts["restarts"] += 1
        self._counts[f"restarts_{who}"] += 1

    def data(self, task: str, cause: str) -> None:
        """A task was dropped. Raises BudgetSpent."""
        self._spend("data", self._faults.data_budget, f"task {task} was dropped: {cause}")

    def _spend(self, kind: str, budget: int, what: str) -> None:
        when, now = self._when[kind], time.monotonic()
        when.append(now)
        # Failures that let no step come between them do not age.
        while when[0] < min(now - self._faults.window_s, self._progress):
            when.popleft()
        if len(when) > budget:
            raise BudgetSpent(
                f"{len(when)} failures within {now - when[0]:.0f} s are more than faults.{kind}_budget = "
                f"{budget}. The last one: {what}"
            )

    def told(self) -> dict[str, float]:
        """The counts since the last time, as metrics."""
        counts, self._counts = self._counts, Counter()
        return {f"faults/{name}": float(count) for name, count in {"restarts": 0, **counts}.items()}
