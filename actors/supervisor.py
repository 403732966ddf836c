"""The supervisor: hears of a process's death, or notices that it no longer answers, and has it opened again.

Ray starts a dead actor's process again by itself; its handle stays valid. What it held is opened anew by who made it:

    until_dead ──► raises ┐                       ┌──► reopen ──► until_dead ...
    ping ────────► late ──┴──► ledger ──► backoff ┘
                                 └──► budget spent: `failed`

Each actor's loop waits for its own actor alone. RLlib's manager does the same for the pools of stateless replicas, from
a thread of its own (actors/replica_health.py).
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import ray

from actors.faults import BudgetSpent, Ledger, Stuck, backoff, is_death, is_infra, named, tried, within
from rl.config import FaultsConfig
from rl.env import InfraError

log = logging.getLogger("repertory")
_PING_EVERY_S = 5.0


class Lost(InfraError):
    """A process died that nothing but the newest checkpoint can replace."""


class Reborn(InfraError):
    """An actor is in another life than the one that it was opened in."""


class Supervisor:
    """For one event loop. `failed` ends with the error that nobody could make good."""

    def __init__(self, faults: FaultsConfig, say: Callable[[str], None]):
        self.ledger, self._faults, self._say = Ledger(faults), faults, say
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loops: dict[Any, asyncio.Task[None]] = {}

    def keep(self, role: str, actor: Any, reopen: Callable[[], Awaitable[Any]] | None, life: str | None = None) -> None:
        """From now on `reopen` is called whenever the actor has been started again. None: nothing could replace it.

        life: the one in which it was opened, where that is not certainly the one that it is in now.
        """
        self._loops[actor] = asyncio.get_running_loop().create_task(self._keep(role, actor, reopen, life))

    def let_go(self, actor: Any) -> None:
        """The actor is to end."""
        self._loops.pop(actor).cancel()

    def close(self) -> None:
        for loop in self._loops.values():
            loop.cancel()
        self._loops.clear()

    def fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    def noticed(self, role: str, error: BaseException) -> None:
        """An actor was started again by others. Ends the run when that was once too often."""
        with suppress(BudgetSpent):
            self.count(role, error)

    def count(self, role: str, error: BaseException) -> None:
        """An actor has to be started again. Ends the run, and raises BudgetSpent, when that is once too often."""
        self._say(f"{role}: {named(error)}; it is started again")
        try:
            self.ledger.infra(role, error)
        except BudgetSpent as spent:
            self.fail(spent)
            raise

    async def _keep(self, role: str, actor: Any, reopen: Callable[[], Awaitable[Any]] | None, life: str | None) -> None:
        try:
            while True:
                error = await death(actor, self._faults, life)
                if reopen is None:
                    raise Lost(f"the {role} died, and with it what no other process has") from error
                life = await self._restart(role, actor, reopen, error)
                log.info("%s is back", role)
        except Exception as error:
            self.fail(error)

    async def _restart(self, role: str, actor: Any, reopen: Callable[[], Awaitable[Any]], error: BaseException) -> str:
        """Returns the life in which it was opened."""
        for attempt in itertools.count():
            self.count(role, error)
            if not is_death(error) and not isinstance(error, Reborn):
                end(actor)
            await asyncio.sleep(backoff(attempt))
            try:
                life = await within(self._faults.start_s, tried(lambda _: actor.ping.remote(), self._faults))
                await within(self._faults.start_s, reopen())
                return life
            except Exception as again:
                if not is_infra(again):
                    raise
                error = again
        raise AssertionError("the loop does not end")


def end(actor: Any) -> None:
    """Kill the process; Ray starts it again."""
    with suppress(ValueError):
        ray.kill(actor, no_restart=False)


async def death(actor: Any, faults: FaultsConfig, life: str | None) -> BaseException:
    """What ended the actor: its death, an error that it says it cannot live with, or no answer for heartbeat_s.

    life: the one that it was opened in; another one was not.
    """

    async def dead() -> None:
        await actor.until_dead.remote()

    watching = asyncio.ensure_future(dead())
    try:
        while True:
            try:
                now = await within(faults.heartbeat_s, actor.ping.remote())
            except Stuck:
                return Stuck(f"it did not answer within faults.heartbeat_s = {faults.heartbeat_s:g} s")
            except Exception as error:
                return error
            if life is not None and now != life:
                return Reborn("its process died, and another is there")
            done, _ = await asyncio.wait({watching}, timeout=_PING_EVERY_S)
            if done:
                return watching.exception() or AssertionError("until_dead returned")
    finally:
        watching.cancel()
        with suppress(BaseException):
            await watching
