"""The agent's side of a session: the policy of its episode (rl/policy.py). Recorded turns come first, then live ones.

A turn that is ended while the agent speaks leaves the episode, and its environment, where they are: the same turn can
be asked for again.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rl.env import Action
from rl.policy import Completion, Sampling
from serve.journal import Event, Played
from serve.versions import TRIES, UnknownVersion

if TYPE_CHECKING:
    from serve.service import Service


class Voice:
    """Of one episode.

    now: the weight version to sample with, and whether what is sampled is told as it comes.
    """

    def __init__(
        self,
        service: "Service",
        recorded: Sequence[Played],
        tell: Callable[..., Event],
        now: Callable[[], tuple[int, bool]],
    ):
        self._service, self._recorded, self._tell, self._now = service, recorded, tell, now
        self._turn = self._context = 0
        self._last = Completion([], [], [], "stop")
        self._sampling: asyncio.Future[Completion] | None = None
        self._go = asyncio.Event()
        self.interrupted = False
        """Whether it waits to be asked for the same turn again."""

    async def act(self, token_ids: Sequence[int], sampling: Sampling, session: str) -> Completion:
        k, self._turn = self._turn, self._turn + 1
        if k < len(self._recorded):
            turn = self._recorded[k].turn
            return Completion(turn["token_ids"], turn["logprobs"], turn["versions"], turn["finish_reason"])
        self._context = len(token_ids)
        tried = 1
        while True:
            version, streams = self._now()
            self._tell("turn_start", turn=k, version=version, seed=sampling.seed)
            sample = (
                self._streamed(k, token_ids, sampling, version)
                if streams
                else self._whole(token_ids, sampling, version)
            )
            self._sampling = asyncio.ensure_future(sample)
            try:
                self._last = await self._sampling
                return self._last
            except UnknownVersion:  # it was given up while this turn waited for it: there is another
                if tried == TRIES:
                    raise
                tried += 1
                continue
            except asyncio.CancelledError:
                this = asyncio.current_task()
                if not self.interrupted or (this is not None and this.cancelling()):  # the episode itself is ended
                    raise
            finally:
                self._sampling = None
            await self._go.wait()
            self.interrupted = False

    async def _whole(self, token_ids: Sequence[int], sampling: Sampling, version: int) -> Completion:
        return await self._service.versions.generate(token_ids, sampling, version)

    async def _streamed(self, k: int, token_ids: Sequence[int], sampling: Sampling, version: int) -> Completion:
        decoder = self._service.decoder()
        async with self._service.versions.stream(token_ids, sampling, version) as stream:
            async for chunk in stream:
                ids = list(chunk.token_ids)
                ended = bool(ids) and ids[-1] == self._service.codec.end_of_turn
                text = decoder.add(ids[:-1] if ended else ids)
                self._tell("tokens", turn=k, text=text, token_ids=ids, version=chunk.version)
            return await stream.completion()

    def interrupt(self) -> bool:
        """End what is being sampled. Whether anything was: else there is nothing that could go on."""
        if self._sampling is None or self._sampling.done():
            return self.interrupted
        self.interrupted = True
        self._go.clear()
        self._sampling.cancel()
        return True

    def go_on(self) -> None:
        """Sample the turn that was interrupted again."""
        self._go.set()

    def sampled(self, action: Action) -> dict[str, Any]:
        """What the journal keeps of the turn last sampled, as far as the environment has let it count."""
        count, last = len(action.token_ids), self._last
        return {
            "token_ids": list(action.token_ids),
            "logprobs": [round(p, 6) for p in last.logprobs[:count]],
            "versions": list(last.versions[:count]),
            "finish_reason": "length" if action.truncated else "stop",
            "context": self._context + count,
        }
