"""One engine that answers in several weight versions, which take turns.

    generate, stream ──► of the version in the engine ────────────────────────────────────► engine
                    └──► of another ──► held back until its turn ──► drain ──► load ──► prove ──►

A request's tokens are all of the version that it named. Only while somebody waits for another version are there turns:
the one in the engine goes on for at most `slice_s` from its load, or until it has nothing to do. Then its new requests
are held back, its running ones finish, and the version that has waited longest is loaded.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.env import InfraError
from rl.policy import Completion, Sampling
from serve.release_files import PROBE, Shapes, shapes, weight_files
from serve.token_stream import Inbox, Request, TokenStream

if TYPE_CHECKING:
    from rl.engine import Engine
    from rl.vllm_io import Chunk, Sink

log = logging.getLogger("repertory.serve")

CHUNK_S = 0.15
TRIES = 3
"""Versions that something is tried with whose own is given up while it waits."""
_STUCK_S = 300.0
"""A step or a load that takes longer is none that will end."""


class UnknownVersion(LookupError):
    """A version that was never offered, has been forgotten, or could not be loaded."""


@dataclass(frozen=True)
class _Offer:
    """Where a version's weights are, and what an engine that has loaded them must say."""

    updates: Sequence[dict[str, Any]]
    probe: dict[str, Any] | None

    @staticmethod
    def of(folder: Path) -> "_Offer":
        probe = folder / PROBE
        files = [{"folder": str(folder.resolve()), "file": name} for name in weight_files(folder)]
        return _Offer(files, json.loads(probe.read_text()) if probe.is_file() else None)


class _Timed:
    """When a request's first tokens came. Its sink, where it has one."""

    def __init__(self, sink: "Sink | None"):
        self._sink, self._began = sink, time.perf_counter()
        self.first_s: float | None = None

    def take(self, chunk: "Chunk") -> None:
        if self.first_s is None:
            self.first_s = self.whole_s
        assert self._sink is not None
        self._sink(chunk)

    @property
    def whole_s(self) -> float:
        return time.perf_counter() - self._began


class Versions:
    """Made on the event loop on which it is used, for an engine with the weight transfer FROM_FOLDER."""

    def __init__(
        self,
        engine: "Engine",
        folder: Path,
        *,
        slice_s: float,
        chunk_s: float = CHUNK_S,
        sampled: Callable[[int, int, float | None, float], None] | None = None,
    ):
        """folder: what the engine was started on, as the version `engine.version`.

        sampled: is told of each completion: the tokens of its prompt and its own, the seconds until the first of them,
        where they were streamed, and until the last.
        """
        self._sampled = sampled
        self._engine, self._slice_s, self._chunk_s = engine, slice_s, chunk_s
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(self._loop)
        self._shapes: Shapes = shapes(folder)
        self._offers = {engine.version: _Offer.of(folder)}
        self.broken: dict[int, str] = {}
        """Versions that could not be loaded, and why."""
        self._serving: int | None = engine.version
        """Whose requests go straight into the engine. None: a version is being loaded, or none could be."""
        self._began = self._loop.time()
        self._running: set[Request] = set()
        self._waiting: dict[int, dict[Request, None]] = {}
        """The version that has waited longest is the first."""
        self._turn_may_end = asyncio.Event()
        self._turns: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Ends what runs and waits."""
        if self._turns is not None:
            self._turns.cancel()
        for request in [*self._running, *(r for waiting in self._waiting.values() for r in waiting)]:
            request.done.cancel()
        await asyncio.to_thread(self._engine.close)

    # -- asking ------------------------------------------------------------------------------------------------------

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, version: int) -> Completion:
        """Sample one turn with a version. Cancelling frees the engine's place. Raises UnknownVersion."""
        return await self._ask(token_ids, sampling, version).done

    def stream(self, token_ids: Sequence[int], sampling: Sampling, version: int) -> TokenStream:
        """The same, told as it is sampled. Raises UnknownVersion, before anything is sampled."""
        return TokenStream(lambda sink: self._ask(token_ids, sampling, version, sink), self._inbox, self._chunk_s)

    def _ask(
        self, token_ids: Sequence[int], sampling: Sampling, version: int, sink: "Sink | None" = None
    ) -> Request:
        if version not in self._offers:
            raise self._unknown(version)
        timed = _Timed(sink)
        request = Request(token_ids, sampling, timed.take if sink is not None else None)
        request.done.add_done_callback(lambda _: self._over(version, request))
        if self._sampled is not None:
            request.done.add_done_callback(lambda done: self._measure(len(token_ids), timed, done))
        if version == self._serving:
            self._start(request)
        else:
            self._waiting.setdefault(version, {})[request] = None
            if self._turns is None:
                self._turns = self._loop.create_task(self._take_turns())
        return request

    def _measure(self, prompt: int, timed: "_Timed", done: asyncio.Future[Completion]) -> None:
        if self._sampled is not None and not done.cancelled() and done.exception() is None:
            self._sampled(prompt, len(done.result().token_ids), timed.first_s, timed.whole_s)

    def _start(self, request: Request) -> None:
        self._running.add(request)
        request.start(self._engine, self._inbox)

    def _over(self, version: int, request: Request) -> None:
        """It has ended, or nobody waits for it any longer."""
        request.leave()
        self._running.discard(request)
        waiting = self._waiting.get(version)
        if waiting is not None:
            waiting.pop(request, None)
            if not waiting:
                del self._waiting[version]
        if not self._running or not self._waiting:
            self._turn_may_end.set()

    def _unknown(self, version: int) -> UnknownVersion:
        if version in self.broken:
            return UnknownVersion(f"version {version} could not be loaded: {self.broken[version]}")
        return UnknownVersion(f"version {version} is not served here")

    # -- what can be asked for ---------------------------------------------------------------------------------------

    async def offer(self, version: int, folder: Path) -> None:
        """It can be asked for from now on. One whose files are not of this model's kind is noted in `broken` instead.

        One that is known, or noted there, is left as it is.
        """
        if version in self._offers or version in self.broken:
            return
        try:
            found = await asyncio.to_thread(shapes, folder)
            if found != self._shapes:
                raise ValueError(_other_shapes(self._shapes, found))
            self._offers[version] = _Offer.of(folder)
        except (OSError, ValueError) as error:
            self._give_up(version, error)

    async def forget(self, version: int) -> None:
        """It cannot be asked for any longer. Its running requests finish, those that wait raise UnknownVersion."""
        self._offers.pop(version, None)
        self.broken.pop(version, None)
        self._end_waiting(version, self._unknown(version))

    def _give_up(self, version: int, error: Exception) -> None:
        """It cannot be loaded."""
        log.warning("version %d cannot be served: %s", version, error)
        self._offers.pop(version, None)
        self.broken[version] = str(error) or type(error).__name__
        self._end_waiting(version, self._unknown(version))

    def _end_waiting(self, version: int, error: Exception) -> None:
        for request in self._waiting.pop(version, {}):
            if not request.done.done():
                request.done.set_exception(error)

    # -- how it stands -----------------------------------------------------------------------------------------------

    @property
    def known(self) -> set[int]:
        return set(self._offers)

    @property
    def current(self) -> int:
        """The version in the engine."""
        return self._engine.version

    @property
    def in_flight(self) -> int:
        return len(self._running) + self._held_back

    @property
    def waiting(self) -> int:
        """Requests that are held back for their version's turn, or wait in the engine for a place."""
        return self._held_back + self._engine.waiting

    @property
    def _held_back(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def trouble(self) -> str | None:
        """Why nothing can be sampled any more; None when it can."""
        if self._engine.died.done():
            return str(self._engine.died.exception())
        if self._serving is None and self._turns is None:
            return "no version could be loaded"
        if self._engine.stuck_s > _STUCK_S:
            return f"the engine has not made a step for {self._engine.stuck_s:.0f} s"
        return None

    # -- turns -------------------------------------------------------------------------------------------------------

    async def _take_turns(self) -> None:
        try:
            while self._waiting:
                await self._until_turn_ends()
                if self._waiting:
                    await self._next_turn()
        except Exception as error:  # the engine has died, or holds nothing: nobody's turn will come
            for version in list(self._waiting):
                self._end_waiting(version, error)
        finally:
            self._turns = None

    async def _until_turn_ends(self) -> None:
        """The version in the engine has had its time, or has nothing to do; or nobody waits any longer."""
        while self._running and self._waiting and (left := self._began + self._slice_s - self._loop.time()) > 0:
            self._turn_may_end.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._turn_may_end.wait(), left)

    async def _next_turn(self) -> None:
        before, self._serving = self._serving, None
        version = next(iter(self._waiting))
        if not await self._loaded(version):
            await self._restore(before)
        self._serving, self._began = self._engine.version, self._loop.time()
        for request in self._waiting.pop(self._serving, {}):
            self._start(request)

    async def _loaded(self, version: int) -> bool:
        """Drain, load and prove. Raises what has killed the engine; any other failure is the version's."""
        offer = self._offers[version]
        try:
            # Not to be cancelled with this task: the engine would find nobody to tell that it has loaded.
            await asyncio.shield(asyncio.wrap_future(self._engine.load(version, offer.updates, "drain")))
            if offer.probe is not None:
                await self._prove(offer.probe)
        except Exception as error:
            if self._engine.died.done():
                raise
            self._give_up(version, error)
            return False
        return True

    async def _prove(self, probe: dict[str, Any]) -> None:
        """Raises ValueError when the engine does not compute with the weights that the learner published."""
        scored = await asyncio.wrap_future(self._engine.score(probe["tokens"]))
        off = float(np.abs(scored - np.asarray(probe["logprobs"], np.float32)).mean())
        if not off <= probe["bound"]:
            bound = f"{probe['bound']:g}"
            raise ValueError(f"its log-probs of the probe differ from the learner's by {off:.3g}, above {bound}")

    async def _restore(self, before: int | None) -> None:
        """After a load that failed: the version before, or any that can be loaded. Raises InfraError when none can."""
        for version in (before, *sorted(self._offers, reverse=True)):
            if version in self._offers and await self._loaded(version):
                return
        raise InfraError("no version could be loaded")


def _other_shapes(known: Shapes, found: Shapes) -> str:
    different = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
    return f"its weights are not of this model's shape: {different[0]} and {len(different) - 1} others differ"
