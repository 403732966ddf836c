"""`repertory bench-serve`: as many conversations at once as asked for, timed, and each checked to be its own.

    conversation: question ──► answer ──► question ...   chat completions, or a session of the server
                     └── two numbers that no other conversation has at the time: an answer with another's is crossed

Any server with OpenAI's chat completions will do. Of a session, the journal is read at the end: it has to hold what
this client has said and nothing else, and what came over the wire in the same order.
"""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from rl.config_file import ConfigError
from serve.bench_report import Report, Tally, show
from serve.bench_talk import Talk, server_sent

_PAUSE_S = 0.2
"""After an answer that is an error, unless the server says how long."""
_LONGEST_PAUSE_S = 5.0
_NUMBER = re.compile(r"(?<!\d)\d{4}(?!\d)")


@dataclass(frozen=True)
class Load:
    """What the server is asked for.

    url: http://host:port; model: what it is called there, by default the first that it lists; requests: end after so
    many, or after `duration_s`, whichever is first; env: sessions play tasks of this environment, without a person.
    """

    url: str
    model: str | None = None
    kind: Literal["chat", "sessions"] = "chat"
    env: str | None = None
    concurrency: int = 64
    turns: int = 4
    duration_s: float = 30.0
    requests: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stream: bool = False
    key: str | None = None
    seed: int = 0


def run_bench(
    url: str, console: Console, *, sessions: bool, key_variable: str | None, json_path: Path | None, **asked: Any
) -> None:
    """The command. asked: settings of the load. Raises ConfigError for a server that cannot be asked."""
    if key_variable is not None and not os.environ.get(key_variable):
        raise ConfigError(f"--api-key-env {key_variable}: this environment variable is not set")
    if asked.get("env") is not None and not sessions:
        raise ConfigError("--env: environments are played in sessions: add --sessions")
    key = os.environ[key_variable].strip() if key_variable else None
    report = asyncio.run(bench(Load(url, kind="sessions" if sessions else "chat", key=key, **asked), console))
    show(report, console)
    if json_path is not None:
        json_path.write_text(json.dumps(report.as_json(), indent=1))


async def bench(load: Load, console: Console | None = None) -> Report:
    """Put the load on the server. Raises ConfigError for one that cannot be reached, or does not let us in."""
    parts = urlsplit(load.url if "://" in load.url else f"http://{load.url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{load.url}: give a URL like http://localhost:8000")
    load = replace(load, url=f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}")
    secured = httpx.create_ssl_context()

    def connection() -> httpx.AsyncClient:
        """One for each conversation: a pool looks at all its connections at every request."""
        return httpx.AsyncClient(
            base_url=load.url,
            headers={"Authorization": f"Bearer {load.key}"} if load.key else {},
            timeout=httpx.Timeout(600.0, connect=10.0),
            verify=secured,
            # A proxy of the environment's cannot reach a server of this machine.
            trust_env=parts.hostname not in ("localhost", "127.0.0.1", "::1"),
        )

    async with connection() as http:
        model, tools = await _model(load, http), await _tools(load, http)
        return await _Driver(load, http, connection, model, tools).drive(console)


async def _model(load: Load, http: httpx.AsyncClient) -> str:
    """The model's name. Raises ConfigError where there is no such server, key or model."""
    answer = await _asked(load, http, "/v1/models")
    try:
        names = [entry["id"] for entry in answer.json()["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    if not names:
        raise ConfigError(f"{load.url}/v1/models lists no model: this is no server with OpenAI's API")
    if load.model is None or load.model in names:
        return load.model or names[0]
    raise ConfigError(f"{load.url} does not serve {load.model!r}; it serves {', '.join(names)}: --model")


async def _tools(load: Load, http: httpx.AsyncClient) -> str | None:
    """The tool set of sessions: questions are sums. Raises ConfigError where there are none, or not of this env."""
    if load.kind == "chat":
        return None
    found = (await _asked(load, http, "/v1/envs")).json()
    names = [env["name"] for env in found["envs"]]
    if load.env is not None and load.env not in names:
        raise ConfigError(f"{load.url} has no environment {load.env!r}; it has {', '.join(names) or 'none'}: --env")
    return "calculator" if load.env is None and "calculator" in found["tools"] else None


async def _asked(load: Load, http: httpx.AsyncClient, path: str) -> httpx.Response:
    try:
        answer = await http.get(path)
    except httpx.TransportError as error:
        raise ConfigError(f"nothing answers at {load.url} ({type(error).__name__}). Is the server running?") from None
    if answer.status_code in (401, 403):
        what = "does not take this key" if load.key else "wants a key: --api-key-env VARIABLE"
        raise ConfigError(f"{load.url} {what}")
    if answer.status_code != 200:
        raise ConfigError(f"{load.url}{path} answers {answer.status_code}: this is no server for such a load")
    return answer


class _Failed(Exception):
    """The conversation has ended with an error of the server's, which is counted."""


class _Driver:
    def __init__(
        self,
        load: Load,
        http: httpx.AsyncClient,
        connection: Callable[[], httpx.AsyncClient],
        model: str,
        tools: str | None,
    ):
        self._load, self._http, self._connection, self._model, self._tools = load, http, connection, model, tools
        self._tally = Tally()
        self._rng = random.Random(load.seed)
        self._live: dict[int, Talk] = {}
        """Conversations under way, by their first number."""
        self._sessions: list[Talk] = []
        self._begun = 0
        self._until = 0.0

    async def drive(self, console: Console | None) -> Report:
        started, cpu = time.perf_counter(), time.process_time()
        self._until = started + self._load.duration_s
        watching = asyncio.ensure_future(self._watch(console, started)) if console else None
        try:
            await asyncio.gather(*(self._talk_on() for _ in range(self._load.concurrency)))
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        finally:
            if watching:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
        await self._hold_against_journals()
        return Report.of(self._tally, seconds, cpu / seconds)

    async def _watch(self, console: Console, started: float) -> None:
        load, t = self._load, self._tally
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(f"{load.concurrency} at once", total=1.0, facts="")
            while True:
                passed, done = time.perf_counter() - started, len(t.latency_s)
                share = max(passed / load.duration_s, done / load.requests if load.requests else 0.0)
                errors = f", {sum(t.errors.values())} errors" if t.errors else ""
                progress.update(task, completed=share, facts=f"{done / passed:.0f} requests/s{errors}")
                await asyncio.sleep(0.25)

    @property
    def _over(self) -> bool:
        enough = self._load.requests is not None and self._begun >= self._load.requests
        return enough or time.perf_counter() > self._until

    # -- conversations -----------------------------------------------------------------------------------------------

    async def _talk_on(self) -> None:
        """One conversation after another, until the time is up."""
        async with self._connection() as http:
            while not self._over:
                talk = self._new()
                try:
                    await (self._chat(http, talk) if self._load.kind == "chat" else self._session(http, talk))
                except _Failed:
                    talk.unsure = True
                except httpx.TransportError as error:
                    talk.unsure = True
                    self._tally.errors[type(error).__name__] += 1
                    await asyncio.sleep(_PAUSE_S)
                finally:
                    del self._live[talk.numbers[0]]

    def _new(self) -> Talk:
        while (first := self._rng.randint(1000, 9999)) in self._live:
            pass
        talk = self._live[first] = Talk((first, self._rng.randint(1000, 9999)))
        self._tally.sessions += 1
        return talk

    async def _chat(self, http: httpx.AsyncClient, talk: Talk) -> None:
        messages: list[dict[str, str]] = []
        while len(talk.said) < self._load.turns and not self._over:
            messages.append({"role": "user", "content": talk.question()})
            body = {"model": self._model, "messages": messages, **self._sampling()}
            if self._load.stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            text = await self._timed(http, talk, "/v1/chat/completions", body)
            messages.append({"role": "assistant", "content": text})

    async def _session(self, http: httpx.AsyncClient, talk: Talk) -> None:
        about: dict[str, Any] = {"tools": self._tools}
        if self._load.env is not None:
            about = {"env": self._load.env, "task": {"split": "train", "index": self._tally.sessions}}
        answer = await http.post("/v1/sessions", json={"model": self._model, **about, **self._sampling()})
        if answer.status_code != 201:
            await self._refused(talk, answer)
        talk.id = answer.json()["id"]
        self._sessions.append(talk)
        for _ in range(self._load.turns if self._load.env is None else 1):
            if self._over:
                return
            content = talk.question() if self._load.env is None else None
            body = {"content": content, "stream": self._load.stream}
            await self._timed(http, talk, f"/v1/sessions/{talk.id}/turns", body)
            if talk.events[-1][1] != "waiting":
                return  # the context is full, or the episode has ended

    def _sampling(self) -> dict[str, Any]:
        asked = {"max_tokens": self._load.max_tokens, "temperature": self._load.temperature}
        return {name: value for name, value in asked.items() if value is not None}

    # -- one request -------------------------------------------------------------------------------------------------

    async def _timed(self, http: httpx.AsyncClient, talk: Talk, path: str, body: dict[str, Any]) -> str:
        """Ask, count, and return what the agent has said."""
        self._begun += 1
        headers = {"x-session-id": talk.id} if talk.id else {}
        started = time.perf_counter()
        parts: list[str] = []
        async with http.stream("POST", path, json=body, headers=headers) as answer:
            if answer.status_code != 200:
                await answer.aread()
                await self._refused(talk, answer)
            if self._load.stream:
                tokens = await self._streamed(talk, answer, started, parts)
            else:
                tokens = self._taken(talk, json.loads(await answer.aread()), parts)
        t = self._tally
        t.latency_s.append(time.perf_counter() - started)
        t.tokens += tokens
        if (version := answer.headers.get("x-weight-version")) is not None:
            t.versions.append(int(version))
        text = "".join(parts)
        self._hold_against_others(talk, text)
        return text

    async def _streamed(self, talk: Talk, answer: httpx.Response, started: float, parts: list[str]) -> int:
        """Take what comes, and when; `parts` gets the text. Returns how many tokens it was."""
        last, tokens, ended = None, 0, False
        async for events in server_sent(answer):
            told = len(parts)
            for data in events:
                if "error" in data:
                    self._tally.errors[str(data["error"].get("code"))] += 1
                    raise _Failed
                ended = ended or "end" in data
                tokens += self._taken(talk, data, parts)
            if len(parts) > told:
                now = time.perf_counter()
                (self._tally.first_token_s if last is None else self._tally.between_s).append(now - (last or started))
                last = now
        if not (talk.ended if talk.id else ended):
            self._tally.lost.append(f"{talk.said[-1:]}: the stream ended before the answer did")
        return tokens

    def _taken(self, talk: Talk, data: dict[str, Any], parts: list[str]) -> int:
        """A body, or what one server-sent event holds. Returns its tokens."""
        if "events" in data:
            return sum(self._taken(talk, event, parts) for event in data["events"])
        if "seq" in data:
            talk.events.append((data["seq"], data["type"]))
            if data["type"] == "error":
                self._tally.errors[data["code"]] += 1
            if data["type"] == ("tokens" if self._load.stream else "turn"):
                parts.append(data["text"])
            return len(data["token_ids"]) if data["type"] == "turn" else 0
        for choice in data.get("choices", ()):
            said = choice.get("delta") or choice.get("message") or {}
            if said.get("content"):
                parts.append(said["content"])
        return (data.get("usage") or {}).get("completion_tokens", 0)

    async def _refused(self, talk: Talk, answer: httpx.Response) -> NoReturn:
        """Count it, wait as long as the server asks for, and give the conversation up."""
        try:
            code = answer.json()["error"]["code"]
        except (ValueError, KeyError, TypeError):
            code = "?"
        if code == "context_length_exceeded" and len(talk.said) > 1:
            raise _Failed  # no failure of the server's: this conversation is as long as one can be
        self._tally.errors[f"{answer.status_code} {code}"] += 1
        told = answer.headers.get("retry-after", "")
        await asyncio.sleep(min(float(told) if told.isdigit() else _PAUSE_S, _LONGEST_PAUSE_S))
        raise _Failed

    # -- whose is what -----------------------------------------------------------------------------------------------

    def _hold_against_others(self, talk: Talk, text: str) -> None:
        numbers = {int(n) for n in _NUMBER.findall(text)}
        self._tally.own += numbers.issuperset(talk.numbers)
        for first in numbers & self._live.keys():
            other = self._live[first]
            if other is not talk and other.numbers[1] in numbers:
                self._tally.crossed.append(f"an answer to {talk.said[-1:]} holds the numbers of {other.said[-1:]}")

    async def _hold_against_journals(self) -> None:
        places = asyncio.Semaphore(16)

        async def check(talk: Talk) -> None:
            path, headers = f"/v1/sessions/{talk.id}", {"x-session-id": talk.id or ""}
            try:
                async with places:
                    answer = await self._http.get(f"{path}/events", params={"stream": "false"}, headers=headers)
                    answer.raise_for_status()
                    await self._http.delete(path, headers=headers)
            except httpx.HTTPError as error:
                self._tally.lost.append(f"session {talk.id} cannot be read: {str(error) or type(error).__name__}")
                return
            journal = answer.json()["events"]
            self._tally.crossed += talk.crossed_in(journal)
            self._tally.lost += talk.lost_in(journal)

        await asyncio.gather(*(check(talk) for talk in self._sessions))
