"""Which rollout worker plays the next group: the one with the least to do; a suspected group gets one for itself.

And which grader scores it: one that has nothing to do.
"""

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from actors.faults import backoff, is_death
from rl.env import InfraError


class Ended(InfraError):
    """The worker's process was killed, because its call did not return."""


class WorkerPool:
    """For one event loop. A worker that died gets nothing until it says that it is ready again.

    most: the calls that one has at a time; others wait. With 1 it is clear whose call a worker died of.
    """

    def __init__(self, workers: Sequence[Any], most: float = math.inf):
        self.workers = list(workers)
        self._most = most
        self._playing: Counter[Any] = Counter()
        self._reserved: set[Any] = set()
        self._down: dict[Any, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        self._alone = asyncio.Lock()

    async def use(self, workers: Sequence[Any]) -> None:
        """From now on these. Returns when the others have played what they have."""
        gone = set(self.workers) - set(workers)
        async with self._changed:
            self.workers = list(workers)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: not any(self._playing[w] for w in gone))

    @asynccontextmanager
    async def one(self, alone: bool) -> AsyncIterator[Any]:
        """A worker to do one thing with. alone: when that worker dies, no other group is to blame or to suffer."""
        async with self._alone if alone else _nothing():
            worker = await (self._take_alone() if alone else self._take())
            try:
                yield worker
            except Exception as error:
                if (is_death(error) or isinstance(error, Ended)) and worker not in self._down:
                    self._down[worker] = asyncio.ensure_future(self._return(worker))
                raise
            finally:
                async with self._changed:
                    self._playing[worker] -= 1
                    if alone:
                        self._reserved.discard(worker)
                    self._changed.notify_all()

    async def _take(self) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: self._free)
            worker = min(self._free, key=self._playing.__getitem__)
            self._playing[worker] += 1
            return worker

    @property
    def _free(self) -> list[Any]:
        out = self._reserved | self._down.keys()
        return [w for w in self.workers if w not in out and self._playing[w] < self._most]

    async def _take_alone(self) -> Any:
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self._free)
                worker = min(self._free, key=self._playing.__getitem__)
                self._reserved.add(worker)  # nobody else gets it while it is played empty
                await self._changed.wait_for(lambda w=worker: not self._playing[w])
                if worker in self.workers and worker not in self._down:
                    self._playing[worker] += 1
                    return worker
                self._reserved.discard(worker)

    async def _return(self, worker: Any) -> None:
        for attempt in itertools.count():
            await asyncio.sleep(backoff(attempt))
            try:
                await worker.ready.remote()
                break
            except Exception:
                if worker not in self.workers:
                    break
        async with self._changed:
            del self._down[worker]
            self._changed.notify_all()


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield
