"""What is started when, what a step takes, what is drawn or played again. Groups finish when a test says so."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from actors.producer import Place, Producer


class Table:
    """A producer whose groups are finished by hand: `end(place)`. The n-th task that is drawn has the index n."""

    def __init__(self, size: int = 2, budget: int | None = None, staleness: int = 0):
        self.ends: dict[Place, asyncio.Future[str]] = {}
        count = itertools.count()
        self.producer: Producer[str] = Producer(
            self._play,
            lambda slot, n, before: [next(count) for _ in range(n)],
            size=size,
            budget=budget or size,
            staleness=staleness,
        )

    async def _play(self, place: Place) -> str:
        self.ends[place] = asyncio.get_running_loop().create_future()
        return await self.ends[place]

    async def end(self, *places: Place) -> None:
        await asyncio.sleep(0)
        for place in places:
            self.ends.pop(place).set_result(f"{place.slot}.{place.number}.{place.attempt}")
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def taken(self, step: int, version: int = 0, room: int = 1) -> str | None:
        """What `take` gives within a moment; "waits" when it has nothing yet."""
        try:
            found = await asyncio.wait_for(self.producer.take(step, version, room), 0.01)
        except TimeoutError:
            return "waits"
        return None if found is None else found[1]


def run(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scene())


A, B, C, D = Place(0, 0, 0), Place(0, 1, 1), Place(1, 0, 2), Place(1, 1, 3)


@pytest.mark.parametrize(("staleness", "ahead"), [(0, 0), (1, 1), (2, 1), (3, 2), (8, 4)])
def test_half_of_the_bound_is_for_starting_early(staleness, ahead):
    assert Table(staleness=staleness).producer.ahead == ahead


def test_a_step_waits_for_its_slot_and_no_longer():
    async def scene() -> None:
        table = Table()
        table.producer.open(0, version=0)
        assert await table.taken(0) == "waits"
        await table.end(B)
        assert await table.taken(0) == "0.1.0"
        assert await table.taken(0) == "waits"
        await table.end(A)
        assert await table.taken(0) == "0.0.0"
        assert await table.taken(0) is None

    run(scene)


def test_a_slot_is_opened_once():
    async def scene() -> None:
        table = Table()
        for last in (1, 0, 1):
            table.producer.open(last, version=0)
        await asyncio.sleep(0)
        assert sorted(table.ends) == [A, B, C, D]
        assert table.producer.depths == (4, 0)

    run(scene)


def test_the_oldest_slot_is_taken_first_and_a_long_episode_holds_nobody_up():
    async def scene() -> None:
        table = Table(staleness=2)
        table.producer.open(1, version=0)
        await table.end(D, B)
        assert table.producer.depths == (2, 2)
        assert [await table.taken(0), await table.taken(0)] == ["0.1.0", "1.1.0"], "A is not waited for"
        table.producer.open(2, version=1)
        await table.end(C, A)
        assert [await table.taken(1), await table.taken(1)] == ["0.0.0", "1.0.0"], "A goes before C"
        assert await table.taken(1) is None, "slot 2 is another step's"

    run(scene)


def test_what_a_filter_took_is_drawn_again_within_the_budget():
    async def scene() -> None:
        table = Table(budget=3)
        table.producer.open(0, version=0)
        await table.end(A, B)
        for drawn in (True, False):
            await table.taken(0)
            assert table.producer.refill(0, version=0) == drawn
        await asyncio.sleep(0)
        assert list(table.ends) == [Place(0, 2, 2)], "one more, with the next task, and not two"

    run(scene)


def test_a_stale_group_is_played_again_and_then_waited_for():
    """A, of version 0, is too stale at version 3; at version 5 its second attempt, of version 3, is just not."""

    async def scene() -> None:
        table = Table(size=1, staleness=2)
        table.producer.open(1, version=0)
        await table.end(A)
        assert await table.taken(0, version=3) == "0.0.0"
        table.producer.again(A, version=3)
        again = Place(0, 0, 0, attempt=1)
        other = Place(1, 0, 1)
        await table.end(other)
        assert await table.taken(1, version=5, room=1) == "waits", "the step's last place is kept for it"
        assert await table.taken(1, version=5, room=2) == "1.0.0", "there is room beside it"
        table.producer.open(2, version=5)
        await table.end(Place(2, 0, 2))
        assert await table.taken(2, version=4, room=1) == "2.0.0", "it may still be taken by the next step"
        await table.end(again)
        assert await table.taken(2, version=5, room=1) == "0.0.1"

    run(scene)


def test_a_resumed_stage_goes_on_with_what_was_under_way():
    async def scene() -> None:
        table = Table(budget=3, staleness=2)
        table.producer.open(1, version=0)
        await table.end(A, C)
        assert await table.taken(0) == "0.0.0"
        table.producer.refill(0, version=0)
        state = table.producer.state()

        later = Table(budget=3, staleness=2)
        later.producer.restore(state, version=7)
        later.producer.open(1, version=7)
        await asyncio.sleep(0)
        assert sorted(later.ends) == [B, Place(0, 2, 4), C, D], "finished or not, but for A, which was taken"
        later.producer.refill(0, version=7)
        later.producer.refill(1, version=7)
        await asyncio.sleep(0)
        assert len(later.ends) == 5, "slot 0's budget is spent, slot 1's is not"

    run(scene)


def test_slots_of_another_size_do_not_go_on_with_what_was_under_way():
    async def scene() -> None:
        table = Table(size=2)
        table.producer.open(0, version=0)
        with pytest.raises(ValueError, match="2 groups are under way in slots of tasks_per_step = 2, and it is 3 now"):
            Table(size=3).producer.restore(table.producer.state(), version=0)
        await table.producer.close()
        Table(size=3).producer.restore(table.producer.state(), version=0)

    run(scene)


def test_what_goes_wrong_in_playing_is_raised():
    async def scene() -> None:
        table = Table()
        table.producer.open(0, version=0)
        await asyncio.sleep(0)
        table.ends[A].set_exception(RuntimeError("lost"))
        with pytest.raises(RuntimeError, match="lost"):
            await table.producer.take(0, 0, 1)

    run(scene)


def test_closing_gives_up_what_is_under_way():
    async def scene() -> None:
        table = Table()
        table.producer.open(0, version=0)
        await asyncio.sleep(0)
        await table.producer.close()
        assert all(future.cancelled() for future in table.ends.values())
        assert table.producer.depths == (0, 0)

    run(scene)
