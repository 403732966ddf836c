"""One session: an episode that goes on over many requests, with a person or a client in the place of the task.

    POST turns ──► begin: lease, `user` written ──► run_episode ──► turn_start tokens turn tool_call ... waiting
                                                        └── suspended in Live until the next words come

The episode of a session that this process does not hold is played again from the journal: the recorded turns stand in
for the policy, and the environment is stepped with them. From where the journal ends the agent goes on by itself.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from rl.env import Action, InfraError
from rl.episode import Episode, Identity, run_episode
from rl.policy import Completion, Sampling
from rl.task import BadTask
from serve.ask import Ask, check, retried_from
from serve.errors import ApiError
from serve.journal import Event, History, Journal, Played, TurnUnderWay, fold
from serve.live import Feed, Live, NotReplayable

if TYPE_CHECKING:
    from serve.service import Service

log = logging.getLogger("repertory.serve")

_LOOK_S = 0.2
"""How often a journal that another process writes is read."""


class Session:
    """Played by this process, or read from what another one writes. Use it on one event loop."""

    def __init__(self, service: "Service", journal: Journal):
        self._service, self.journal = service, journal
        self._episode: asyncio.Task[None] | None = None
        self._lease = contextlib.ExitStack()
        self.at_work_here = False
        """Whether this process plays a turn, and holds the lease."""
        self._words: list[str] = []
        self._go, self._news = asyncio.Event(), asyncio.Event()
        self._known = -1
        """Events when the episode here was suspended: with more, somebody else has gone on."""
        self._streams, self._last = True, Completion([], [], [], "stop")
        self._recorded: Sequence[Played] = ()
        self._asked, self._context = 0, 0
        self._version = 0
        self._followers = 0
        self._ending: asyncio.TimerHandle | None = None

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self.journal.path.stem

    @property
    def at_work(self) -> bool:
        """Whether a turn is under way, here or elsewhere."""
        return self.at_work_here or self.journal.at_work

    @property
    def created(self) -> Event:
        return self.journal.events[0]

    @property
    def version(self) -> int:
        """The weight version that its next turn is sampled with, as far as it is known."""
        version = fold(self.journal.events).version
        assert version is not None
        return version

    def shown(self) -> dict[str, Any]:
        """The session as clients see it."""
        created, events = self.created, self.journal.events
        history = fold(events)
        over = history.over
        status = "running" if self.at_work else "waiting"
        if over is not None:
            status = "done" if over["type"] == "done" else "failed"
        return {
            "id": self.id,
            "object": "session",
            "created": int(created["time"]),
            "status": status,
            **{name: created[name] for name in ("env", "task", "tools", "system", "seed", "collect")},
            "sample": history.sample,
            "model": self._service.name,
            "version": history.version,
            "turns": len(history.turns),
            "seq": events[-1]["seq"],
            "expires_at": int(events[-1]["time"] + self._service.config.sessions.idle_s),
            "stop_reason": over.get("stop_reason") if over else None,
            "error": {"code": over["code"], "message": over["message"]} if over and over["type"] == "error" else None,
        }

    # -- a turn ----------------------------------------------------------------------------------------------------

    def begin(self, ask: Ask) -> int:
        """Have the agent go on. Returns the seq after which its events come. Raises ApiError."""
        try:
            self._lease.enter_context(self.journal.lease())
        except TurnUnderWay:
            raise ApiError(
                409, "turn_under_way", "a turn of this session is under way: wait for it, or stop it"
            ) from None
        try:
            after = len(self.journal.events) - 1
            self._prepare(ask)
        except BaseException:
            self._lease.close()
            raise
        self.at_work_here = True
        self._arm(self._service.config.http.deadline_s, self._late)
        return after

    def _prepare(self, ask: Ask) -> None:
        """Write what is asked for, and wake the episode, or play it up to here."""
        if self._known != len(self.journal.events):
            self._drop()
        history = fold(self.journal.events)
        check(self._service, self.created, ask, history)
        if ask.retry:
            self._drop()
            at = retried_from(ask, history)
            self._tell("retry", turn=at, sample=history.sample + 1)
        self._move(history)
        self._streams = ask.stream
        if ask.content is not None:
            self._tell("user", content=ask.content)
            self._words.append(ask.content)
        if self._episode is None:
            self._words.clear()
            self._episode = asyncio.ensure_future(self._play(fold(self.journal.events)))
        self._go.set()

    def _move(self, history: History) -> None:
        """A session stays on its version for as long as that is there."""
        assert history.version is not None
        self._version = self._service.kept_version(history.version, self.id)
        if self._version != history.version:
            self._tell("version", **{"from": history.version, "to": self._version, "reason": "no longer served"})

    async def _play(self, history: History) -> None:
        """The episode, from its beginning: what the journal holds first, then live."""
        created, service = self.created, self._service
        self._recorded, self._asked = history.turns, 0
        self._feed = Feed(history)
        env, task, limits = service.played(created)
        live = Live(env, history.turns, self._tell, self._sampled, self._heard, self._was_prompted(), self._took)
        try:
            episode = await run_episode(
                live,
                task,
                self,
                service.codec,
                sampling=Sampling(**created["sampling"]),
                limits=limits,
                identity=Identity(0, 0, task.id, history.sample),
                seed=created["seed"],
            )
            await self._finish(episode)
        except asyncio.CancelledError:
            raise
        except BadTask as error:
            self._fail("context_length_exceeded", str(error), resume=False)
        except NotReplayable as error:
            self._fail("env_not_replayable", str(error), resume=False)
        except (InfraError, ConnectionError, TimeoutError, LookupError) as error:
            log.warning("session %s: %s", self.id, type(error).__name__)
            self._fail(
                "unavailable", f"{type(error).__name__}: the turn was not finished; ask for it again", resume=True
            )
        except Exception as error:
            log.exception("session %s failed", self.id)
            self._fail("env_failed", f"the environment failed: {type(error).__name__}", resume=False)

    def _was_prompted(self) -> bool:
        return any(event["type"] == "prompt" for event in self.journal.events)

    async def _finish(self, episode: Episode) -> None:
        score = await self._service.scored(self.created, episode)
        self._rest("done", stop_reason=episode.stop_reason.value, **score)
        self._episode = None

    def _fail(self, code: str, message: str, *, resume: bool) -> None:
        self._service.metrics.error(code)
        self._rest("error", code=code, message=message, resume=resume)
        self._episode = None

    # -- the agent: recorded turns, then live ones -------------------------------------------------------------------

    async def act(self, token_ids: Sequence[int], sampling: Sampling, session: str) -> Completion:
        """The policy of the episode (rl/policy.py)."""
        k, self._asked = self._asked, self._asked + 1
        if k < len(self._recorded):
            turn = self._recorded[k].turn
            return Completion(turn["token_ids"], turn["logprobs"], turn["versions"], turn["finish_reason"])
        self._tell("turn_start", turn=k, version=self._version, seed=sampling.seed)
        self._context = len(token_ids)
        if self._streams:
            self._last = await self._streamed(k, token_ids, sampling)
        else:
            self._last = await self._service.versions.generate(token_ids, sampling, self._version)
        return self._last

    async def _streamed(self, k: int, token_ids: Sequence[int], sampling: Sampling) -> Completion:
        decoder = self._service.decoder()
        async with self._service.versions.stream(token_ids, sampling, self._version) as stream:
            async for chunk in stream:
                ids = list(chunk.token_ids)
                ended = bool(ids) and ids[-1] == self._service.codec.end_of_turn
                text = decoder.add(ids[:-1] if ended else ids)
                self._tell("tokens", turn=k, text=text, token_ids=ids, version=chunk.version)
            return await stream.completion()

    def _sampled(self, action: Action) -> dict[str, Any]:
        """What the journal keeps of a turn, as far as the environment has let it count."""
        count, last = len(action.token_ids), self._last
        return {
            "token_ids": list(action.token_ids),
            "logprobs": [round(p, 6) for p in last.logprobs[:count]],
            "versions": list(last.versions[:count]),
            "finish_reason": "length" if action.truncated else "stop",
            "context": self._context + count,
        }

    async def _heard(self, wait: bool) -> list[str]:
        """The person's words since they were last asked for: the journal's first, then those that come."""
        recorded = self._feed.next()
        if recorded or not self._feed.live:
            return recorded
        while wait and not self._words:
            self._go.clear()
            self._rest("waiting")
            await self._go.wait()
        words, self._words = self._words, []
        return words

    def _took(self, seconds: float) -> None:
        self._service.metrics.tool(self.created["env"] or self.created["tools"], seconds)

    # -- telling -----------------------------------------------------------------------------------------------------

    def _tell(self, kind: str, **data: Any) -> Event:
        event = self.journal.append(kind, **data)
        news, self._news = self._news, asyncio.Event()
        news.set()
        return event

    def _rest(self, kind: str, **data: Any) -> None:
        """The last event of a turn. Others may go on with the session from here."""
        self._disarm()
        if self.at_work_here:
            self._tell(kind, **data)
            self.at_work_here = False
            self._lease.close()
        self._known = len(self.journal.events)

    async def follow(self, after: int) -> AsyncGenerator[Event]:
        """Events from after a seq on, and on while a turn is under way. Who leaves early has lost the connection."""
        self._followers += 1
        ended = False
        try:
            at = after + 1
            while True:
                news = self._news
                for event in self.journal.events[at:]:
                    at += 1
                    ended = not self.at_work and at == len(self.journal.events)
                    yield event
                if not self.at_work:
                    ended = True
                    return
                await self._wait(news)
        finally:
            self._followers -= 1
            if not ended and not self._followers and self.at_work_here:
                self._arm(self._service.config.sessions.disconnect_grace_s, self._abandoned)

    async def _wait(self, news: asyncio.Event) -> None:
        if self.at_work_here:
            await news.wait()
            return
        await asyncio.sleep(_LOOK_S)
        self.look()

    def look(self) -> None:
        """Read what another process has written; a turn whose process has died is ended, and said to be."""
        self.journal.catch_up()
        if not self.journal.at_work or self.at_work_here:
            return
        with contextlib.suppress(TurnUnderWay), self.journal.lease():
            if self.journal.at_work:
                self._tell(
                    "error",
                    code="replica_died",
                    message="the process that played this turn has died: post a turn without content to go on",
                    resume=True,
                )

    # -- ending ------------------------------------------------------------------------------------------------------

    def _arm(self, seconds: float, ring: Any) -> None:
        self._disarm()
        self._ending = asyncio.get_running_loop().call_later(seconds, ring)

    def _disarm(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def _late(self) -> None:
        self._end("error", code="deadline_exceeded", message="the turn took longer than http.deadline_s", resume=True)

    def _abandoned(self) -> None:
        if not self._followers:
            self._end("stopped", reason="disconnected")

    def stop(self) -> bool:
        """End the turn under way here. Whether there was one."""
        if not self.at_work_here:
            return False
        self._end("stopped", reason="asked")
        return True

    def _end(self, kind: str, **data: Any) -> None:
        if self.at_work_here:
            self._drop()
            self._rest(kind, **data)

    def _drop(self) -> None:
        """Let the episode go: the journal has all that is needed to play it again."""
        episode, self._episode = self._episode, None
        if episode is not None:
            episode.cancel()
        self._words.clear()

    def close(self) -> None:
        self._end("stopped", reason="closed")
        self._drop()

    @property
    def idle_s(self) -> float:
        return time.time() - self.journal.events[-1]["time"]

    def note(self, **feedback: Any) -> None:
        """Keep what a person thinks of a turn with the session. Raises ApiError while a turn is under way."""
        fresh = self._known == len(self.journal.events)
        try:
            with self.journal.lease():
                self._tell("feedback", **feedback)
        except TurnUnderWay:
            raise ApiError(409, "turn_under_way", "a turn of this session is under way: rate it afterwards") from None
        if fresh:
            self._known = len(self.journal.events)

    def expire(self) -> None:
        """End it for good: nobody has used it for too long."""
        with contextlib.suppress(TurnUnderWay), self.journal.lease():
            self._tell(
                "error", code="session_expired", message="nobody has used this session for too long", resume=False
            )
