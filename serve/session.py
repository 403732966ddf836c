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
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.episode import Identity, run_episode
from rl.policy import Sampling
from serve.ask import Ask, check, retried_from
from serve.attended import UNWRITTEN, ending
from serve.errors import ApiError, not_found, places
from serve.journal import Event, History, Journal, TurnUnderWay, fold
from serve.live import Feed, Live
from serve.voice import Voice

if TYPE_CHECKING:
    from serve.service import Service

log = logging.getLogger("repertory.serve")

_LOOK_S = 0.2
"""How often a journal that another process writes is read, and a wish that another was told is looked for."""

_UNWRITTEN = {"type": "error", "code": "storage_failed", "message": UNWRITTEN, "resume": True}
_DELETED = {"type": "error", "code": "session_not_found", "message": "the session was deleted", "resume": False}
_UNSEEN_S = 10.0
"""How long a turn goes on whose events nobody has begun to read."""


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
        self._voice: Voice | None = None
        self._streams, self._version = True, 0
        self.followers = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

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

    def begin(self, ask: Ask, place: contextlib.ExitStack) -> int:
        """Have the agent go on. Returns the seq after which its events come. Raises ApiError.

        place: what is given back when the turn has ended.
        """
        try:
            self._lease.enter_context(self.journal.lease())
        except TurnUnderWay:
            raise ApiError(
                409, "turn_under_way", "a turn of this session is under way: wait for it, or stop it"
            ) from None
        except FileNotFoundError:  # deleted meanwhile
            raise not_found(self.id) from None
        try:
            self._wish.unlink(missing_ok=True)  # one that came when the turn before had ended
            after = len(self.journal.events) - 1
            self._prepare(ask)
        except BaseException:
            self._lease.close()
            raise
        self.at_work_here = True
        self._lease.push(place.pop_all())
        self._arm("deadline", self._service.config.http.deadline_s, self._late)
        self._arm("abandoned", _UNSEEN_S, self._abandoned)
        self._arm("look", _LOOK_S, self._look_for_wishes)
        return after

    def _prepare(self, ask: Ask) -> None:
        """Write what is asked for, and wake the episode, or play it up to here."""
        if self._known != len(self.journal.events):
            self._drop()
        history = fold(self.journal.events)
        check(self._service, self.created, ask, history)
        interrupted = self._voice is not None and self._voice.interrupted
        if ask.retry or (interrupted and ask.content is not None):
            self._drop()
        if ask.retry:
            self._tell("retry", turn=retried_from(ask, history), sample=history.sample + 1)
        self._version = history.version if history.version is not None else 0
        self._streams = ask.stream
        if ask.content is not None:
            self._tell("user", content=ask.content)
            self._words.append(ask.content)
        if self._episode is None:
            self._words.clear()
            self._episode = asyncio.ensure_future(self._play(fold(self.journal.events)))
        elif self._voice is not None:
            self._voice.go_on()
        self._go.set()

    def _now(self) -> tuple[int, bool]:
        """The version of the next turn, and whether it is streamed. A session stays on its own while that is there."""
        version = self._service.kept_version(self._version, self.id)
        if version != self._version:
            self._tell("version", **{"from": self._version, "to": version, "reason": "no longer served"})
            self._version = version
        return version, self._streams

    async def _play(self, history: History) -> None:
        """The episode, from its beginning: what the journal holds first, then live."""
        this = asyncio.current_task()
        try:
            end = await self._played(history)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            end = self._failure(error)
        if self._episode is this:  # or it was let go, and another one has taken its place
            self._episode = None
            self._rest(**end)

    async def _played(self, history: History) -> dict[str, Any]:
        """What ends the session: `done`, with the stop reason and the reward."""
        created, service = self.created, self._service
        self._feed = Feed(history)
        self._voice = voice = Voice(service, history.turns, self._tell, self._now)
        env, task, limits = service.played(created)
        prompted = any(event["type"] == "prompt" for event in self.journal.events)
        live = Live(env, history.turns, self._tell, voice.sampled, self._heard, prompted, self._took)
        episode = await run_episode(
            live,
            task,
            voice,
            service.codec,
            sampling=Sampling(**created["sampling"]),
            limits=limits,
            identity=Identity(0, 0, task.id, history.sample),
            seed=created["seed"],
        )
        score = await service.scored(created, episode)
        return {"kind": "done", "stop_reason": episode.stop_reason.value, **score}

    def _failure(self, error: Exception) -> dict[str, Any]:
        end = ending(error)
        if end["code"] in ("env_failed", "storage_failed"):  # without the text, which may be what somebody has written
            log.error("session %s: %s\n%s", self.id, type(error).__name__, places(error))
        self._service.metrics.error(end["code"])
        return end

    # -- what the episode asks of it ---------------------------------------------------------------------------------

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
        self._wake()
        return event

    def _rest(self, kind: str, **data: Any) -> None:
        """The last event of a turn. Others may go on with the session from here, also when it cannot be written."""
        for name in list(self._timers):
            self._disarm(name)
        if self.at_work_here:
            try:
                self._tell(kind, **data)
            except OSError:
                log.exception("session %s: its journal cannot be written", self.id)
                self._drop()
            finally:
                self.at_work_here = False
                self._lease.close()
                self._wake()
        self._known = len(self.journal.events)

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(self, after: int) -> AsyncGenerator[Event]:
        """Events from after a seq on, and on while a turn is under way. Who leaves early has lost the connection."""
        self.followers += 1
        self._disarm("abandoned")
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
                try:
                    await self._wait(news)
                except OSError as error:  # no event can be written: this one is nowhere but here
                    ended = True
                    told = _DELETED if isinstance(error, FileNotFoundError) else _UNWRITTEN
                    yield {**told, "seq": at - 1, "time": time.time()}
                    return
        finally:
            self.followers -= 1
            if not ended and not self.followers and self.at_work_here:
                self._arm("abandoned", self._service.config.sessions.disconnect_grace_s, self._abandoned)

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

    def _arm(self, name: str, seconds: float, ring: Callable[[], None]) -> None:
        self._disarm(name)
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, ring)

    def _disarm(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()

    def _late(self) -> None:
        self._end("error", code="deadline_exceeded", message="the turn took longer than http.deadline_s", resume=True)

    def _abandoned(self) -> None:
        if not self.followers:
            self._end("stopped", reason="disconnected")

    def _look_for_wishes(self) -> None:
        """What another process was asked for: that the turn be stopped, or the session deleted."""
        if not self.journal.path.exists():
            self.close()
        elif self._wish.exists():
            self._wish.unlink(missing_ok=True)
            self._end("stopped", reason="asked")
        else:
            self._arm("look", _LOOK_S, self._look_for_wishes)

    @property
    def _wish(self) -> Path:
        """A file that asks whoever plays the turn to stop it."""
        return self.journal.path.with_suffix(".stop")

    def stop(self) -> bool:
        """End the turn under way, wherever it is played. Whether there was one."""
        if self.at_work_here:
            self._end("stopped", reason="asked")
            return True
        if self.journal.at_work:
            self._wish.touch()
        return self.journal.at_work

    def _end(self, kind: str, **data: Any) -> None:
        """The turn is over; while the agent spoke, its episode waits, and the environment with it."""
        if not self.at_work_here:
            return
        if self._voice is None or not self._voice.interrupt():
            self._drop()
        self._rest(kind, **data)

    def _drop(self) -> None:
        """Let the episode go: the journal has all that is needed to play it again."""
        episode, self._episode, self._voice = self._episode, None, None
        if episode is not None:
            episode.cancel()
        self._words.clear()

    def close(self) -> None:
        self._end("stopped", reason="closed")
        self._drop()

    @property
    def in_use(self) -> bool:
        return self.at_work_here or self.followers > 0

    @property
    def idle_s(self) -> float:
        return time.time() - self.journal.events[-1]["time"]

    def note(self, **feedback: Any) -> None:
        """Keep what a person thinks of a turn with the session. Raises ApiError while a turn is under way."""
        try:
            with self.journal.lease():
                fresh = self._known == len(self.journal.events)
                self._tell("feedback", **feedback)
        except TurnUnderWay:
            raise ApiError(409, "turn_under_way", "a turn of this session is under way: rate it afterwards") from None
        except FileNotFoundError:
            raise not_found(self.id) from None
        if fresh:
            self._known = len(self.journal.events)

    def expire(self) -> None:
        """End it for good: nobody has used it for too long."""
        self._drop()
        with contextlib.suppress(TurnUnderWay), self.journal.lease():
            told = "nobody has used this session for too long"
            self._tell("error", code="session_expired", message=told, resume=False)
