"""What one replica is made of, from the engine to the keys, and what routes ask of it."""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version as version_of_package
from pathlib import Path
from typing import Any

from actors.grader import Grader, NotGraded
from rl.chat import ChatCodec
from rl.config import Config
from rl.config_env import EnvConfig
from rl.config_file import ConfigError
from rl.engine import Engine
from rl.engine_options import FROM_FOLDER, EngineOptions
from rl.env import Env, World
from rl.episode import Episode, Limits
from rl.pretrained import load_tokenizer
from rl.task import Task
from serve.config import ServeConfig
from serve.errors import ApiError, not_taken
from serve.feedback import Feedback
from serve.journal import Event, fold
from serve.keys import KeyRing
from serve.live import CONVERSATION, Conversation, tool_set
from serve.metrics import Metrics
from serve.release import Releases
from serve.releases import Book
from serve.resolve import Source, source_of
from serve.schema import FeedbackRequest, SessionRequest
from serve.session import Session
from serve.sessions import Sessions
from serve.text_stream import Decoder
from serve.versions import Versions

log = logging.getLogger("repertory.serve")

_LOOK_S = 0.25
"""How often the releases are read."""


class Service:
    """Everything of a replica. Make it with `Service.start`, on the event loop that it is used on."""

    def __init__(
        self,
        config: ServeConfig,
        source: Source,
        codec: ChatCodec,
        max_length: int,
        versions: Versions,
        book: Book,
        metrics: Metrics,
    ):
        self.config, self.source, self.codec, self.max_length = config, source, codec, max_length
        self.versions, self.book, self.metrics = versions, book, metrics
        self.name, self.software = source.name, version_of_package("repertory")
        self.keys = KeyRing.of(config.keys, source.dir)
        self.feedback = Feedback(source.dir)
        self.sessions = Sessions(self, source.dir / "sessions")
        self.envs: dict[str, EnvConfig] = {**_own_env(source), **config.envs}
        self.releases = Releases()
        """What is answered with: the book's, as far as this replica has heard of it."""
        self._trouble = ""
        self._worlds: dict[str, World] = {}
        self._graders: dict[str, Grader] = {}
        self._chores = [asyncio.ensure_future(chore) for chore in (self.sessions.sweep(), self._look_for_releases())]

    @staticmethod
    async def start(config: ServeConfig) -> "Service":
        """Load the stable version into an engine. Takes seconds to minutes."""
        source = source_of(config)
        book = Book(source.dir, config.versions.keep)
        await asyncio.to_thread(book.begin, source.model)
        releases = book.read()
        assert releases.stable is not None
        folder = Path(releases.release(releases.stable).folder)
        trained, e = source.trained, config.engine
        max_length = e.max_length or trained.model.max_length
        tokenizer = load_tokenizer(folder, trust_remote_code=e.trust_remote_code or trained.model.trust_remote_code)
        keep = e.keep_sampled_turns or trained.model.keep_sampled_turns
        codec = ChatCodec(tokenizer, keep_sampled_turns=keep)
        options = EngineOptions.of(
            e,
            dtype=trained.generator_dtype,
            max_length=max_length,
            device=device_of(config),
            max_batched_tokens=e.max_batched_tokens,
            trust_remote_code=e.trust_remote_code or trained.model.trust_remote_code,
            transfer=FROM_FOLDER,
        )
        engine = await asyncio.to_thread(Engine, str(folder), options, releases.stable)
        metrics = Metrics(source.name)
        versions = Versions(engine, folder, slice_s=config.versions.slice_s, sampled=metrics.sampled)
        service = Service(config, source, codec, max_length, versions, book, metrics)
        await asyncio.to_thread(service._make_worlds)
        await service._take(releases)
        return service

    async def close(self) -> None:
        for chore in self._chores:
            chore.cancel()
        self.sessions.close()
        for grader in self._graders.values():
            await grader.__aexit__()
        await self.versions.close()

    # -- releases ----------------------------------------------------------------------------------------------------

    async def _look_for_releases(self) -> None:
        """Serve what the book says, as it changes; it hears of versions that cannot be loaded. Never returns."""
        while True:
            try:
                releases = self.book.read()
                if releases.stable is not None or self.releases.stable is None:  # or somebody has deleted the book
                    await self._take(releases)
                self._measure(releases)
                for version, why in list(self.versions.broken.items()):
                    await asyncio.to_thread(self.book.refuse, version, why)
            except Exception as error:
                if str(error) != self._trouble:
                    log.error("the releases cannot be read or changed, what is served goes on: %s", error)
                self._trouble = str(error)
            else:
                self._trouble = ""
            await asyncio.sleep(_LOOK_S)

    def _measure(self, releases: Releases) -> None:
        self.metrics.sessions(self.sessions.count)
        self.metrics.queued(self.versions.waiting)
        for role, version in (("stable", releases.stable), ("canary", releases.canary)):
            if version is not None:
                self.metrics.version(version, role)

    async def _take(self, releases: Releases) -> None:
        """Offer what is ready, answer with what the book says, forget the rest: in this order nobody is refused."""
        ready = {release.version: Path(release.folder) for release in releases.ready}
        for version, folder in ready.items():
            await self.versions.offer(version, folder)
        if releases.stable in self.versions.known:
            self.releases = releases
        for version in (self.versions.known | set(self.versions.broken)) - set(ready):
            await self.versions.forget(version)

    def version_of(self, model: str | None, key: str) -> int:
        """The version that a request or a session named `key` is to be answered with. Raises ApiError 404."""
        version = self.releases.named(model or self.name, self.name, key)
        if version in self.versions.known or self.releases.stable is None or "@" in (model or ""):
            return version
        return self.releases.stable  # a canary that could not be loaded

    def kept_version(self, version: int, key: str) -> int:
        """A session's own version while it is there, else what a new session would get."""
        return version if version in self.versions.known else self.version_of(None, key)

    def releases_shown(self) -> dict[str, Any]:
        return {"model": self.name, "current": self.versions.current, **self.releases.shown()}

    # -- what sessions are about ---------------------------------------------------------------------------------------

    def _make_worlds(self) -> None:
        """Raises ConfigError for an environment that cannot be made."""
        for name, env in self.envs.items():
            try:
                self._worlds[name] = World(env, self.source.trained.run.seed)
            except ValueError as error:
                raise ConfigError(f"the environment {name!r} cannot be served: {error}") from None

    def world(self, name: str) -> World:
        """An environment by its name. Raises ApiError 404."""
        if name not in self._worlds:
            known = ", ".join(self._worlds) or "none"
            told = f"there is no environment {name!r} here; there is: {known}"
            raise ApiError(404, "env_not_found", told, param="env")
        return self._worlds[name]

    def check_session(self, created: Mapping[str, Any]) -> None:
        """Raises ApiError when a session is to be about what is not here."""
        if created["env"] is None:
            if created["task"] is not None:
                raise ApiError(400, "task_without_env", "a task is one of an environment: name that too", param="task")
            if created["tools"] is not None and created["tools"] not in self.config.tools:
                known = ", ".join(self.config.tools) or "none"
                raise ApiError(
                    404,
                    "tools_not_found",
                    f"there is no tool set {created['tools']!r}; there is: {known}",
                    param="tools",
                )
            return
        for other in ("tools", "system"):
            if created[other] is not None:
                raise ApiError(400, "env_has_its_own", f"an environment brings its own {other}", param=other)
        self.task(created["env"], created["task"])

    async def check_system(self, asked: SessionRequest) -> None:
        """Raises ApiError when a system text alone leaves no room for a word."""
        if asked.system is None:
            return
        opening = [{"role": "system", "content": asked.system}, {"role": "user", "content": ""}]
        try:
            tokens = len(await asyncio.to_thread(self.codec.prompt, opening, self.tools_shown(asked.tools)))
        except Exception as error:
            raise not_taken(error, "system") from error
        if tokens >= self.max_length:
            told = f"it takes {tokens} tokens, {tokens + 1 - self.max_length} more than the model's context leaves"
            raise ApiError(400, "context_length_exceeded", told, param="system")

    def task(self, env: str, asked: Mapping[str, Any] | None) -> Task:
        asked = asked or {"split": "held_out", "index": 0}
        source = self.world(env).source
        size = source.size(asked["split"])
        if size is not None and asked["index"] >= size:
            raise ApiError(404, "task_not_found", f"{env} has {size} tasks in {asked['split']}", param="task")
        return source.task(asked["split"], asked["index"])

    def played(self, created: Event) -> tuple[Env, Task, Limits]:
        """A fresh environment for a session, its task, and what bounds the episode."""
        if created["env"] is None:
            env: Env = Conversation(created["system"], tool_set(created["tools"], self.config.sandbox))
            task, most = CONVERSATION, self.config.sessions.max_turns
        else:
            env, task = self.world(created["env"]).env(), self.task(created["env"], created["task"])
            most = self.envs[created["env"]].max_turns
        return env, task, Limits(min(most, created["max_turns"] or most), self.max_length)

    def tools_shown(self, name: str | None) -> Sequence[dict[str, Any]]:
        """The schemas of a tool set."""
        from rl.envs.calculator import TOOL as CALCULATOR
        from rl.envs.python_styles import TOOL as PYTHON

        return {"calculator": [CALCULATOR], "python": [PYTHON]}.get(name or "", [])

    def sampling_of(self, asked: SessionRequest) -> dict[str, Any]:
        rollout, most = self.source.trained.rollout, self.config.limits.max_tokens
        default = self.config.max_turn_tokens or rollout.max_turn_tokens
        if asked.max_tokens is not None and asked.max_tokens > most:
            raise ApiError(400, "max_tokens_too_large", f"a turn may have {most} tokens here", param="max_tokens")
        temperature = self.config.temperature if self.config.temperature is not None else rollout.temperature
        return {
            "temperature": temperature if asked.temperature is None else asked.temperature,
            "top_p": asked.top_p or 1.0,
            "top_k": asked.top_k or 0,
            "max_tokens": asked.max_tokens or default,
        }

    def decoder(self) -> Decoder:
        return Decoder(self.codec)

    async def scored(self, created: Event, episode: Episode) -> dict[str, Any]:
        """What the episode is worth under the environment's own rule, as in training; no reward for a conversation."""
        if created["env"] is None:
            return {"reward": None}
        try:
            score = await self._grader(created["env"]).score(episode)
        except NotGraded as error:
            kind, _, _ = str(error).partition(":")  # the rest may be what somebody has said
            log.warning("an episode of %s was not graded: %s", created["env"], kind)
            return {"reward": None, "not_graded": True}
        return {"reward": score.total, "success": score.success}

    def _grader(self, env: str) -> Grader:
        if env not in self._graders:
            trained = self.source.trained
            own = self.envs[env] == trained.env
            changes: dict[str, Any] = (
                {} if own else {"env": self.envs[env], "reward": Config.model_fields["reward"].default}
            )
            self._graders[env] = Grader(
                trained.model_copy(update=changes), self.source.dir / "logs" / "grader.log", self.config.keys.variable
            )
        return self._graders[env]

    async def question(self, name: str, split: str, index: int) -> dict[str, Any]:
        """A task as its environment shows it."""
        env, task = self.world(name).env(), self.task(name, {"split": split, "index": index})
        try:
            observation = await env.reset(task)
        finally:
            await env.close()
        return {"id": task.id, "messages": list(observation.messages), "tools": list(observation.tools)}

    def envs_shown(self) -> dict[str, Any]:
        def sizes(name: str) -> dict[str, int | None]:
            return {split: self.world(name).source.size(split) for split in ("train", "held_out")}

        shown = [{"name": n, "kind": c.name, "tasks": sizes(n)} for n, c in self.envs.items()]
        return {"envs": shown, "tools": list(self.config.tools)}

    # -- feedback and health -------------------------------------------------------------------------------------------

    async def rate(self, session: Session, asked: FeedbackRequest) -> dict[str, Any]:
        """Keep what a person thinks of a turn. Raises ApiError."""
        if not session.created["collect"]:
            raise ApiError(409, "not_collected", "this session was made without `collect`: nothing of it is kept")
        if asked.turn >= len(fold(session.journal.events).turns):
            raise ApiError(400, "no_such_turn", "the agent has not had this turn", param="turn")
        session.note(**asked.model_dump())
        events = list(session.journal.events)
        known = await asyncio.to_thread(
            self.feedback.record, session.id, events, asked.turn, asked.rating, asked.correction
        )
        if not session.journal.path.exists():  # deleted meanwhile
            self.feedback.delete(session.id)
        return known

    def not_ready(self) -> str | None:
        """Why it cannot take a turn; None when it can."""
        return self.versions.trouble

    def health(self) -> dict[str, Any]:
        return {
            "status": "unready" if self.not_ready() else "ready",
            "model": self.name,
            "pid": os.getpid(),
            "version": self.versions.current,
            "stable": self.releases.stable,
            "canary": self.releases.canary,
            # Who may read this has no key, and what is noted may name this machine's folders.
            "note": "" if self.keys.needed else self._trouble or self.releases.note,
            "sessions": self.sessions.count,
            "in_flight": self.versions.in_flight,
            "reason": self.not_ready(),
        }


def _own_env(source: Source) -> dict[str, EnvConfig]:
    env = source.trained.env
    if not source.own_env or env.name == "multi_agent":  # whose other speakers nobody plays here
        return {}
    return {source.trained.run.name if env.name == "custom" else env.name: env}


def device_of(config: ServeConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if config.engine.gpus > 0 else "cpu"
