"""Which rollout worker plays the next group: the one with the least to do; a suspected group gets one for itself."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any


class WorkerPool:
    """For one event loop. Workers may die and come back: their handles stay valid."""

    def __init__(self, workers: Sequence[Any]):
        self.workers = list(workers)
        self._playing: Counter[Any] = Counter()
        self._reserved: set[Any] = set()
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
        """A worker to play a group with. alone: when that worker dies, no other group is to blame or to suffer."""
        async with self._alone if alone else _nothing():
            worker = await (self._take_alone() if alone else self._take())
            try:
                yield worker
            finally:
                async with self._changed:
                    self._playing[worker] -= 1
                    self._reserved.discard(worker)
                    self._changed.notify_all()

    async def _take(self) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: set(self.workers) - self._reserved)
            worker = min((w for w in self.workers if w not in self._reserved), key=self._playing.__getitem__)
            self._playing[worker] += 1
            return worker

    async def _take_alone(self) -> Any:
        async with self._changed:
            worker = min(self.workers, key=self._playing.__getitem__)
            self._reserved.add(worker)  # nobody else gets it while it is played empty
            await self._changed.wait_for(lambda: not self._playing[worker])
            self._playing[worker] += 1
            return worker


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield
