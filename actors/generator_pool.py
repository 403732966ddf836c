"""The generators as one policy: the turns of many episodes travel in few messages.

A turn of a small model takes about as long as a Ray call, and every message that wakes a generator's event loop takes
the interpreter away from vLLM. So the turns that are asked for within one tick of the caller's event loop go out
together, and everything that has finished since the last answer comes back together:

    act ──► outbox ──► generator.submit(caller, turns)      act ◄── answers ◄── generator.collect(caller)
"""

import asyncio
import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl.policy import Completion, Sampling
from rl.task import derive_seed


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
    """A Policy over generator actors. A session sticks to the generator that holds its prefix.

    For one event loop. Raises what the generator raises; ray.exceptions.RayActorError when it died.
    """

    def __init__(self, generators: Sequence[Any]):
        self._lines = [_Line(generator) for generator in generators]

    async def act(self, token_ids: Sequence[int], sampling: Sampling, session: str) -> Completion:
        line = self._lines[derive_seed("session", session) % len(self._lines)]
        return await line.ask(token_ids, sampling)


class _Line:
    """What one caller has under way at one generator."""

    def __init__(self, generator: Any):
        self._generator = generator
        self._caller = uuid.uuid4().hex
        self._keys = itertools.count()
        self._outbox: list[AskedTurn] = []
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._collecting: asyncio.Task[None] | None = None

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
        self._generator.submit.remote(self._caller, turns)
        if self._collecting is None:
            self._collecting = asyncio.get_running_loop().create_task(self._collect())

    async def _collect(self) -> None:
        try:
            while self._waiting:
                for key, answer in await self._generator.collect.remote(self._caller):
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
