"""A request's tokens on their way from the engine's thread to the event loop: few wake-ups, chunks worth sending."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rl.policy import Completion, Sampling

if TYPE_CHECKING:
    from rl.engine import Engine
    from rl.vllm_io import Chunk, Sink


class Inbox:
    """What another thread wants called on the event loop: however many calls there are, one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._calls, self._woken = loop, deque[Callable[[], Any]](), False

    def put(self, call: Callable[[], Any]) -> None:
        """From any thread. The call must not raise."""
        self._calls.append(call)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._make_calls)

    def _make_calls(self) -> None:
        self._woken = False
        while self._calls:
            self._calls.popleft()()


class Request:
    """One that is held back, or runs in the engine. `done` ends with its completion; cancel that to end the request."""

    def __init__(self, token_ids: Sequence[int], sampling: Sampling, sink: "Sink | None"):
        self._asked = token_ids, sampling, sink
        self.done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._running: Future[Completion] | None = None

    def start(self, engine: "Engine", inbox: Inbox) -> None:
        if self.done.done():
            return
        try:
            self._running = engine.submit(*self._asked)
        except Exception as error:  # whatever it is, who asked must hear of it
            self.done.set_exception(error)
        else:
            self._running.add_done_callback(lambda ended: inbox.put(partial(self._settle, ended)))

    def _settle(self, ended: "Future[Completion]") -> None:
        if self.done.done():
            return
        if ended.cancelled():
            self.done.cancel()
        elif (error := ended.exception()) is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(ended.result())

    def leave(self) -> None:
        """Free the engine's place, if it is still taken."""
        if self._running is not None:
            self._running.cancel()


class TokenStream:
    """A request's chunks as they are sampled: the first at once, then all of `every_s` as one.

    Iterate it once, inside `async with`, whose end cancels what is not finished. Every chunk has come before the
    iteration ends; an error ends it with that error.
    """

    def __init__(self, ask: "Callable[[Sink], Request]", inbox: Inbox, every_s: float):
        self._inbox, self._every_s = inbox, every_s
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[Chunk] = deque()
        self._news = asyncio.Event()
        self._hungry = False
        """Whether the next chunk is waited for. Read and reset in the engine's thread."""
        self._due = 0.0
        self._request = ask(self._take)
        self._request.done.add_done_callback(lambda _: self._news.set())

    def _take(self, chunk: "Chunk") -> None:
        """In the engine's thread, at every step: it wakes the event loop only for who waits for this chunk."""
        self._chunks.append(chunk)
        if self._hungry:
            self._hungry = False
            self._inbox.put(self._news.set)

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> "Chunk":
        done = self._request.done
        while True:
            ended = done.done()
            if self._chunks and (ended or self._loop.time() >= self._due):
                self._due = self._loop.time() + self._every_s
                return _merged([self._chunks.popleft() for _ in range(len(self._chunks))])
            if ended:
                if not done.cancelled():
                    done.result()
                raise StopAsyncIteration
            await self._wait()

    async def _wait(self) -> None:
        """Until the next chunk may be sent and is there, or the request has ended."""
        self._news.clear()
        if self._loop.time() < self._due:
            timer = self._loop.call_at(self._due, self._news.set)
        else:
            timer, self._hungry = None, True
            if self._chunks:  # it came before the engine's thread saw that it was waited for
                return
        try:
            await self._news.wait()
        finally:
            if timer is not None:
                timer.cancel()

    async def completion(self) -> Completion:
        """The whole, when it is finished."""
        return await self._request.done

    def cancel(self) -> None:
        """End the request: the engine's place is free at once, and the iteration over. Later than its end: nothing."""
        self._request.done.cancel()

    async def __aenter__(self) -> "TokenStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


def _merged(chunks: "Sequence[Chunk]") -> "Chunk":
    """One chunk of several of the same version."""
    return replace(
        chunks[0],
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        logprobs=[logprob for chunk in chunks for logprob in chunk.logprobs],
        top=[top for chunk in chunks for top in chunk.top],
    )
