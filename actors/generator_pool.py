"""The generators as one policy: the turns of many episodes travel in few messages.

A turn of a small model takes about as long as a Ray call, and every message that wakes a generator's event loop takes
the interpreter away from vLLM. So the turns that are asked for within one tick of the caller's event loop go out
together, and everything that has finished since the last answer comes back together:

    act ──► outbox ──► generator.submit(caller, turns)      act ◄── answers ◄── generator.collect(caller)
"""

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.faults import Stuck, backoff, is_infra, named
from rl.policy import Completion, Sampling
from rl.task import derive_seed

log = logging.getLogger("repertory")


@dataclass(frozen=True)
class AskedTurn:
    """`key` names the turn between one caller and one generator."""

    key: int
    token_ids: np.ndarray
    """int32: one array pickles in one piece, a list of ints does not."""
    sampling: Sampling


Answers = list[tuple[int, Completion | BaseException]]
"""Finished turns by key, or why a turn was not sampled."""


class GeneratorPool:
    """A Policy over generator actors. A session sticks to the generator that holds its prefix, while that one lives.

    For one event loop. A turn that was lost with its generator is asked for again, at another or at the one that takes
    its place: that costs a prefill. Raises what the generator raises of itself; Stuck after `patience_s` without any.
    """

    def __init__(self, generators: Sequence[Any], patience_s: float):
        self._patience_s = patience_s
        self._lines: list[_Line] = []
        self._someone = asyncio.Event()
        self.use(generators)

    def use(self, generators: Sequence[Any]) -> None:
        """From now on these. Turns under way at others end there."""
        known = {line.generator: line for line in self._lines}
        self._lines = [known.pop(g, None) or _Line(g, self._someone) for g in generators]
        for gone in known.values():
            gone.leave()
        self._someone.set()

    async def act(self, token_ids: Sequence[int], sampling: Sampling, session: str) -> Completion:
        while True:
            line = await self._line(session)
            try:
                return await line.ask(token_ids, sampling)
            except Exception as error:
                if not is_infra(error):
                    raise
                line.lost()

    async def _line(self, session: str) -> "_Line":
        """The session's own generator, or where it is down another, always the same one; waits until there is one."""
        own = derive_seed("session", session)
        deadline = time.monotonic() + self._patience_s
        while True:
            self._someone.clear()
            line = self._lines[own % len(self._lines)]
            if line.up:
                return line
            others = [line for line in self._lines if line.up]
            if others:
                return others[own % len(others)]
            try:
                await asyncio.wait_for(self._someone.wait(), deadline - time.monotonic())
            except TimeoutError:
                raise Stuck(f"no generator came back within faults.patience_s = {self._patience_s:g} s") from None


class _Line:
    """What one caller has under way at one generator."""

    def __init__(self, generator: Any, someone: asyncio.Event):
        self.generator = generator
        self.up = True
        self._someone = someone
        self._caller = uuid.uuid4().hex
        self._keys = itertools.count()
        self._outbox: list[AskedTurn] = []
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._collecting: asyncio.Task[None] | None = None
        self._returning: asyncio.Task[None] | None = None

    def lost(self) -> None:
        """Ask nothing of it until it says that it is ready."""
        if self.up:
            self.up = False
            self._returning = asyncio.get_running_loop().create_task(self._return())

    def leave(self) -> None:
        if self._returning is not None:
            self._returning.cancel()

    async def _return(self) -> None:
        for attempt in itertools.count():
            await asyncio.sleep(backoff(attempt))
            try:
                await self.generator.ready.remote()
            except Exception as error:
                log.warning("a generator is not back yet: %s", named(error))
            else:
                break
        self.up = True
        self._someone.set()

    async def ask(self, token_ids: Sequence[int], sampling: Sampling) -> Completion:
        loop = asyncio.get_running_loop()
        key = next(self._keys)
        future = self._waiting[key] = loop.create_future()
        if not self._outbox:
            loop.call_soon(self._send)
        self._outbox.append(AskedTurn(key, np.asarray(token_ids, np.int32), sampling))
        try:
            return await future
        finally:
            self._waiting.pop(key, None)

    def _send(self) -> None:
        turns, self._outbox = self._outbox, []
        # What goes wrong with the message shows in `collect`: both end at the same actor.
        self.generator.submit.remote(self._caller, turns)
        if self._collecting is None:
            self._collecting = asyncio.get_running_loop().create_task(self._collect())

    async def _collect(self) -> None:
        try:
            while self._waiting:
                for key, answer in await self.generator.collect.remote(self._caller):
                    future = self._waiting.get(key)
                    if future is None or future.done():
                        continue
                    if isinstance(answer, BaseException):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
                await asyncio.sleep(0)  # let who was answered take itself off the list
        except Exception as error:  # whoever waits on this generator must hear of it, whatever it is
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
        finally:
            self._collecting = None
