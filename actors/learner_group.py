"""The learner's ranks as one: every call on all of them, and a group that is made again when one of them dies.

A rank's death breaks the group: the others wait for it in a collective. So all are started again, from the newest
checkpoint, and are told once more what they were told since:

    checkpoint ──► journal: begin_stage, hold, step, step, ...     each is a call that changes what the ranks hold
    a death    ──► kill all ──► open ──► restore the checkpoint ──► the journal again ──► the call that failed

The journal holds references to batches, which the buffer and the controller own, never their tokens.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import ObjectLostError

from actors.faults import Stuck, backoff, cause_of, is_infra, within
from actors.supervisor import Lost, Supervisor, end
from rl.config import FaultsConfig

log = logging.getLogger("repertory")
_PING_EVERY_S = 5.0
_GRACE_S = 5.0
"""How long the others' answers are waited for when one rank's was an error."""

COMPARED = -1
"""The number of weights that nobody gets."""

Call = tuple[str, tuple[Any, ...]]


class LearnerGroup:
    """For one event loop. `lives` counts how often the group was made."""

    def __init__(self, ranks: Sequence[Any], faults: FaultsConfig, supervisor: Supervisor):
        self.ranks, self._faults, self._supervisor = list(ranks), faults, supervisor
        self.lives = 0
        self._opening: tuple[str, list[int]] | None = None
        self._used: set[str] = set()
        """The lives of ranks that have joined a group, or tried to."""
        self._joined: list[str] = []
        self._journal: list[Call] = []
        self._changing = 0
        self._lock = asyncio.Lock()
        self._published: tuple[int, tuple[str, ...], Any] | None = None
        """Where in the journal, and with which checksums, the weights were last published."""

    async def open(self, model: str, probe: Sequence[int]) -> None:
        """Every rank joins, on a model folder."""
        self._opening = model, list(probe)
        joining = [await self._fresh(rank) for rank in self.ranks]
        self._used |= set(joining)
        host, port = await self.ranks[0].address.remote()
        await asyncio.gather(*(rank.open.remote(model, list(probe), host, port) for rank in self.ranks))
        self._joined = joining

    def reopens_on(self, model: str) -> None:
        """The folder that a group which is made again starts from, before a checkpoint is restored into it."""
        assert self._opening is not None
        self._opening = model, self._opening[1]

    async def _fresh(self, rank: Any) -> str:
        """A life of the rank that has joined no group yet: one that has is ended."""
        for attempt in itertools.count():
            try:
                life = await within(self._faults.start_s, rank.ping.remote())
                if life not in self._used:
                    return life
                end(rank)
            except Exception as error:
                if not is_infra(error):
                    raise
                if isinstance(error, Stuck):
                    end(rank)
            await asyncio.sleep(min(1.0, backoff(attempt)))
        raise AssertionError("the loop does not end")

    async def ask(self, method: str, *arguments: Any) -> list[Any]:
        """A call that leaves the ranks as they are."""
        return (await self._call(method, arguments))[1]

    async def tell(self, method: str, *arguments: Any) -> list[Any]:
        """A call that changes what the ranks hold: a group that is made again is told it again."""
        self._changing += 1
        try:
            _, results = await self._call(method, arguments)
            self._journal.append((method, arguments))
        finally:
            self._changing -= 1
        return results

    async def refs(self, method: str, *arguments: Any) -> list[Any]:
        """The first of the two return values of each rank's `method`, unread, when the second says that it is there."""
        return [first for first, _ in (await self._call(method, arguments, returns=2))[0]]

    async def _call(self, method: str, arguments: tuple[Any, ...], returns: int = 1) -> tuple[list[Any], list[Any]]:
        """Each rank's refs, and its last return value."""
        while True:
            async with self._lock:
                lives = self.lives
            calls = [getattr(rank, method).options(num_returns=returns).remote(*arguments) for rank in self.ranks]
            try:
                return calls, await self._all([call[-1] if returns > 1 else call for call in calls])
            except Exception as error:
                await self.mend(lives, error)

    async def _all(self, calls: Sequence[Any]) -> list[Any]:
        """Raises the error that is ours where several ranks raise: the others' only follow from it."""

        async def result(call: Any) -> Any:
            return await call

        waiting = [asyncio.ensure_future(result(call)) for call in calls]
        try:
            done, rest = await self._first_error(waiting)
            if rest:
                more, _ = await asyncio.wait(rest, timeout=_GRACE_S)
                done |= more
            errors = [task.exception() for task in done if task.exception()]
            for error in sorted(filter(None, errors), key=lambda e: not is_infra(e)):
                raise error
            return [task.result() for task in waiting]
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _first_error(self, waiting: Sequence[Any]) -> tuple[set[Any], set[Any]]:
        """Those that have ended when one had an error, or all. Raises Stuck."""
        deadline = time.monotonic() + self._faults.deadline_s
        while True:
            done, rest = await asyncio.wait(waiting, timeout=_PING_EVERY_S, return_when=asyncio.FIRST_EXCEPTION)
            if not rest or any(task.exception() for task in done):
                return done, rest
            if time.monotonic() > deadline:
                raise Stuck(f"the learner did not return within faults.deadline_s = {self._faults.deadline_s:g} s")
            await within(self._faults.heartbeat_s, asyncio.gather(*(rank.ping.remote() for rank in self.ranks)))

    # -- a group that is made again ------------------------------------------------------------------------------

    async def mend(self, lives: int, error: BaseException) -> None:
        """Make the group again if it is broken; else raise `error`. lives: of the group that `error` is from."""
        async with self._lock:
            if self.lives != lives:
                return
            if not isinstance(error, Stuck) and await self._whole():
                raise error
            for attempt in itertools.count():
                self._supervisor.count("learner", error)
                await asyncio.sleep(backoff(attempt))
                try:
                    await self._make()
                    break
                except Exception as again:
                    if isinstance(cause_of(again), ObjectLostError):
                        raise Lost("batches since the newest checkpoint were lost with a node") from again
                    if not is_infra(again) and await self._whole():
                        raise
                    error = again
            self.lives += 1

    async def mend_if_broken(self, lives: int, error: BaseException) -> None:
        """The same, for an error that may be another's."""
        try:
            await self.mend(lives, error)
        except Exception as unmended:
            if unmended is not error:
                raise

    async def _whole(self) -> bool:
        """Whether every rank is in the life in which it joined the group."""
        try:
            lives = await within(self._faults.heartbeat_s, asyncio.gather(*(r.ping.remote() for r in self.ranks)))
        except Exception:
            return False
        return list(lives) == self._joined

    async def _make(self) -> None:
        assert self._opening is not None
        await within(self._faults.start_s, self.open(*self._opening))
        for position, (method, arguments) in enumerate([*self._journal, ("", ())]):
            if self._published and position == self._published[0]:
                await self._compare(self._published[1], self._published[2])
            if method:
                await self._all([getattr(rank, method).remote(*arguments) for rank in self.ranks])
        log.info("the learner is back: %d calls made again", len(self._journal))

    async def _compare(self, expected: tuple[str, ...], what: Any) -> None:
        """Log whether the weights are bit by bit those that were published: the next ones have a new number anyway."""
        manifests = await self._all([rank.prepare.remote(COMPARED, 0, what) for rank in self.ranks])
        count = len(manifests[0][0].buckets)
        calls = [
            self.ranks[i % len(self.ranks)].bucket.options(num_returns=4).remote(COMPARED, i)[1] for i in range(count)
        ]
        reached = tuple(await self._all(calls)) == expected
        log.info("the learner made again %s the published checksum", "reached" if reached else "did not reach")

    # -- what the journal starts from ----------------------------------------------------------------------------

    def published(self, checksums: tuple[str, ...], what: Any) -> None:
        self._published = len(self._journal), checksums, what

    @property
    def holds_the_published(self) -> bool:
        """Whether nothing has changed the weights since they were published."""
        return self._published is not None and self._published[0] == len(self._journal) and not self._changing

    def saved(self, folder: Path, *goes_on: Call) -> None:
        """A checkpoint holds what the journal has led to. goes_on: what makes of it again what the ranks are."""
        journal: list[Call] = [("restore", (str(folder),)), *goes_on]
        if self._published and self._published[0] == len(self._journal):
            self._published = len(journal), *self._published[1:]
        else:
            self._published = None
        self._journal = journal


