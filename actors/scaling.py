"""Actors that join a run which goes on, and actors that leave it."""

import asyncio
import logging
from typing import Any

import ray

from actors.company import Company
from actors.faults import named, tried, within

log = logging.getLogger("repertory")


class Scaling:
    """The sizes of a company's elastic roles. One change at a time."""

    def __init__(self, company: Company):
        self._company, self._lock = company, asyncio.Lock()

    @property
    def sizes(self) -> dict[str, int]:
        """How many actors each elastic role has."""
        return {role: len(actors) for role, actors in self._elastic.items()}

    @property
    def _elastic(self) -> dict[str, list[Any]]:
        c = self._company
        roles = {"generator": c.generators, "rollout": c.workers, "reward": c.rewards, "reference": c.references}
        return {role: actors for role, actors in roles.items() if actors}

    async def scale(self, role: str, count: int) -> None:
        """Have `count` actors of a role. A generator that joins has the newest version before it takes turns; who
        leaves ends what it has first.

        Raises ValueError for a role that cannot be scaled, ClusterTooSmall (with those that found room still there).
        """
        if role not in self._elastic or count < 1:
            names = ", ".join(self._elastic)
            raise ValueError(
                f"{role}={count}: at least 1 of {names}. The learner's size is that of its optimizer's shards"
            )
        actors = self._elastic[role]
        async with self._lock:
            while len(actors) < count:
                await self._join(role, actors)
            while len(actors) > count:
                await self._leave(role, actors)

    async def _join(self, role: str, actors: list[Any]) -> None:
        index = len(actors)
        await self._company.placement.add(role, index)
        actor = self._company.make(role, index)
        actors.append(actor)  # first: what is published from now on reaches it, what was before it asks for
        try:
            if role == "generator":
                await within(self._company.config.faults.start_s, self._company.open_generator(actor))
                self._company.keep_generator(actor)
            elif role == "rollout":
                await self._company.open_worker(actor)
                self._company.keep_worker(actor)
            else:
                await actor.status.remote()
        except BaseException:
            actors.remove(actor)
            ray.kill(actor)
            self._company.placement.leave(role, index)
            raise
        await self._announce(role)

    async def _leave(self, role: str, actors: list[Any]) -> None:
        actor = actors.pop()
        await self._announce(role)
        if role in ("generator", "rollout"):
            self._company.supervisor.let_go(actor)
        try:
            # A generator says when it has no turn any more, a replica answers after the call that runs.
            last = actor.drained if role == "generator" else actor.ping
            await within(self._company.config.faults.deadline_s, last.remote())
        except Exception as error:
            log.warning("a %s that was to leave: %s", role, named(error))
        finally:
            ray.kill(actor)
            self._company.placement.leave(role, len(actors))

    async def _announce(self, role: str) -> None:
        """Returns when nothing new goes to who has left."""
        c = self._company
        if role == "generator":
            calls = [tried(lambda _, w=w: w.use.remote(c.generators), c.config.faults) for w in c.workers]
            await asyncio.gather(*calls)
        if role in ("reference", "reward") and self._company.health is not None:
            self._company.health.use(role, self._elastic[role])
        if role in ("rollout", "reward"):
            await self._company.buffer.use.remote(self._company.workers, self._company.rewards)
