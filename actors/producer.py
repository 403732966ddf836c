"""Groups played ahead of the learner: drawn for a slot, started within the bound on staleness, taken as they finish.

Slot s is the groups that step s would train on if all finished in order. When step s begins, the slots up to s + ahead
are started; the step takes what has finished, the oldest slots first, so that a long episode holds nobody up:

    open(s + ahead) ──► play ──► finished ──► take(s) ──► the step's batch
                          ▲                     │
                          └─── again (stale), refill (a filter took it whole) ◄──┘

`take` waits for a group of a slot up to s to finish; it is unblocked by the players. What is under way is bounded by
the slots that are open: nobody else waits, and nothing polls.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, order=True)
class Place:
    """Where a group stands: its slot, its number among the slot's draws, its task's index, and which attempt it is."""

    slot: int
    number: int
    index: int
    attempt: int = 0


@dataclass(frozen=True)
class _UnderWay(Generic[Result]):
    version: int
    """The weights' version when it was started."""
    playing: "asyncio.Task[Result]"


class Producer(Generic[Result]):
    """play: has a place's group played. draw(slot, count, before): indices of `count` tasks after `before` others.

    size: groups a slot; budget: the most that may be drawn for a slot, refills included; staleness: the bound.
    """

    def __init__(
        self,
        play: Callable[[Place], Awaitable[Result]],
        draw: Callable[[int, int, int], Sequence[int]],
        *,
        size: int,
        budget: int,
        staleness: int,
    ):
        self._play, self._draw = play, draw
        self._size, self._budget, self._staleness = size, budget, staleness
        self._opened = 0
        self._drawn: dict[int, int] = {}
        self._under_way: dict[Place, _UnderWay[Result]] = {}

    @property
    def ahead(self) -> int:
        """Half of the bound is for starting early, the other half for finishing late."""
        return (self._staleness + 1) // 2

    @property
    def depths(self) -> tuple[int, int]:
        """How many groups are being played, and how many are finished and not taken."""
        finished = sum(x.playing.done() for x in self._under_way.values())
        return len(self._under_way) - finished, finished

    def open(self, last: int, version: int) -> None:
        """Start every slot up to `last` that is not open yet."""
        for slot in range(self._opened, last + 1):
            self._start_new(slot, self._size, version)
        self._opened = max(self._opened, last + 1)

    def refill(self, slot: int, version: int) -> bool:
        """Draw one more for a slot, if its budget allows. Returns whether it did."""
        allowed = self._drawn[slot] < self._budget
        if allowed:
            self._start_new(slot, 1, version)
        return allowed

    def again(self, place: Place, version: int) -> None:
        """Play a task once more: what came of it was too stale."""
        self._start(replace(place, attempt=place.attempt + 1), version)

    async def take(self, step: int, version: int, room: int) -> tuple[Place, Result] | None:
        """A finished group of the oldest slot. None when no group of a slot up to `step` is under way.

        room: how many the step still takes. The last of it is kept for groups that were too stale before and would be
        once more in the next step: a task that takes long comes to be trained on all the same. Raises what `play` does.
        """
        while any(place.slot <= step for place in self._under_way):
            last_chance = {
                place
                for place, x in self._under_way.items()
                if place.attempt and version - x.version >= self._staleness
            }
            wanted = self._under_way if room > len(last_chance) else last_chance
            finished = [place for place in wanted if self._under_way[place].playing.done()]
            if finished:
                place = min(finished)
                return place, self._under_way.pop(place).playing.result()
            await asyncio.wait([self._under_way[p].playing for p in wanted], return_when=asyncio.FIRST_COMPLETED)
        return None

    def state(self) -> dict[str, Any]:
        """What a resumed stage needs to draw and play what an uninterrupted one would have."""
        places = sorted(self._under_way)
        slots = sorted({place.slot for place in places})
        return {
            "size": self._size,
            "opened": self._opened,
            "drawn": [[slot, self._drawn[slot]] for slot in slots],
            "under_way": [[p.slot, p.number, p.index, p.attempt] for p in places],
        }

    def restore(self, state: dict[str, Any], version: int) -> None:
        """Go on from a state: what was under way, finished or not, is played once more.

        Raises ValueError when groups are under way and the slots were of another size.
        """
        if state["under_way"] and state["size"] != self._size:
            raise ValueError(
                f"{len(state['under_way'])} groups are under way in slots of tasks_per_step = {state['size']}, and it "
                f"is {self._size} now: change it when the stage has ended, or start again"
            )
        self._opened = state["opened"]
        self._drawn = dict(state["drawn"])
        for fields in state["under_way"]:
            self._start(Place(*fields), version)

    async def close(self) -> None:
        """Give up what is under way."""
        playing = [x.playing for x in self._under_way.values()]
        self._under_way.clear()
        for task in playing:
            task.cancel()
        await asyncio.gather(*playing, return_exceptions=True)

    def _start_new(self, slot: int, count: int, version: int) -> None:
        before = self._drawn.get(slot, 0)
        for i, index in enumerate(self._draw(slot, count, before)):
            self._start(Place(slot, before + i, index), version)
        self._drawn[slot] = before + count

    def _start(self, place: Place, version: int) -> None:
        self._under_way[place] = _UnderWay(version, asyncio.ensure_future(self._play(place)))
