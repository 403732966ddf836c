"""A model behind an OpenAI-compatible endpoint (`/v1/chat/completions`) as a policy, or as who gives feedback.

    ids of characters ──► messages ──► HTTP, tried again ──► text and tool calls ──► ids of characters
                                             └── lasting: EndpointError, which ends the evaluation

The key is read from the environment when the client is made, and goes into one header; no error text holds it.
"""

import asyncio
import itertools
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from rl.chat import BLOCK, parse_calls, shortened
from rl.config_env import FeedbackConfig
from rl.config_file import ConfigError
from rl.env import InfraError, Message
from rl.policy import Completion, ContextFull, Sampling
from rl.text_codec import TextCodec, Usage

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_FULL = re.compile(r"context_length_exceeded|context length|maximum context|max_model_len|too many tokens", re.I)
_UNHEARD_S = 8.0
"""How long a server that has never answered is tried: most likely the URL is wrong."""
_CONNECT_S = 10.0
_LONGEST_WAIT_S = 60.0
_FEEDBACK_PATIENCE_S = 60.0
"""Feedback that stays away for longer ends the episode, which is played again for faults.patience_s."""
_CHARACTERS = 3
"""Of a token, at least, in what feedback is asked by: the endpoint's tokenizer is not here."""


class EndpointError(RuntimeError):
    """The endpoint cannot be used, now or at all: the text says why and what to change."""


class Refused(RuntimeError):
    """The endpoint takes requests, and not this one."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served.

    key_variable: the environment variable that holds the key, and key_setting: where a user names it; patience_s: how
    long a call is tried again, from its first failure on; answer_s: how long one answer may take.
    """

    url: str
    model: str
    key_variable: str | None = None
    patience_s: float = 900.0
    answer_s: float = 600.0
    key_setting: str = "--api-key-env"

    @staticmethod
    def at(url: str, model: str, key_variable: str | None, patience_s: float, answer_s: float) -> "Endpoint":
        """Raises ConfigError for a URL that cannot be one, or a variable that is not set."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--endpoint {url}: give a URL like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError("--endpoint: leave user, password and query out, the URL is written down: --api-key-env")
        if key_variable is not None and not os.environ.get(key_variable):
            raise ConfigError(f"--api-key-env {key_variable}: this environment variable is not set")
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        return Endpoint(f"{parts.scheme}://{parts.netloc}{path}", model, key_variable, patience_s, answer_s)

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"


@dataclass(frozen=True)
class Reply:
    """text: what was said, tool calls as <tool_call> blocks; truncated: the token limit cut it."""

    text: str
    truncated: bool
    usage: Usage


class Client:
    """Speaks to one endpoint, with as many requests at a time as the callers have. Use it as an async context."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self._key = os.environ.get(endpoint.key_variable or "", "").strip()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx.Timeout(endpoint.answer_s, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=None)
        # A proxy of the environment's cannot reach a server of this machine.
        proxied = urlsplit(endpoint.url).hostname not in ("localhost", "127.0.0.1", "::1")
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=proxied)
        self._limit_name = "max_tokens"
        self.requests = self.retries = 0
        self._heard = False
        self._answered = False

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._http.aclose()

    async def chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], sampling: Sampling) -> Reply:
        """One turn. Raises EndpointError, or Refused when it is this conversation that is not taken."""
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": list(messages),
            "temperature": sampling.temperature,
            self._limit_name: sampling.max_tokens,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if tools:
            body["tools"] = list(tools)
        return await self._tried(body)

    async def _tried(self, body: dict[str, Any]) -> Reply:
        failing_since: float | None = None
        for attempt in itertools.count():
            self.requests += 1
            wait = 0.0
            try:
                response = await self._http.post(f"{self.endpoint.url}/chat/completions", json=body)
                self._heard = True
                if response.status_code == 200:
                    reply = read_reply(response.json())
                    self._answered = True
                    return reply
                if response.status_code not in _AGAIN or "insufficient_quota" in response.text:
                    if self._renamed_limit(body, response):
                        continue
                    raise self._refusal(response)
                why, wait = self._told(response), _retry_after(response)
            except (httpx.RequestError, UnreadableReply) as error:
                why = f"{type(error).__name__}: {error}".rstrip(": ")
            except ValueError:
                why = "its answer is no JSON"
            patience_s = self.endpoint.patience_s if self._heard else min(_UNHEARD_S, self.endpoint.patience_s)
            failing_since = failing_since or time.monotonic()
            if (failed_s := time.monotonic() - failing_since) > patience_s:
                raise EndpointError(self._clean(f"{self.endpoint} has failed for {failed_s:.0f} s: {why}"))
            self.retries += 1
            # At random, so that the many do not return as one.
            backoff_s = min(_LONGEST_WAIT_S, 0.25 * 2**attempt) * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(_LONGEST_WAIT_S, max(wait, backoff_s)))
        raise AssertionError("the loop does not end")

    def _renamed_limit(self, body: dict[str, Any], response: httpx.Response) -> bool:
        """Whether the endpoint wants the newer name of the limit, which others do not know."""
        wanted = "max_completion_tokens"
        if response.status_code != 400 or "max_tokens" not in body or wanted not in response.text:
            return False
        if _FULL.search(response.text):
            return False
        self._limit_name = wanted
        body[wanted] = body.pop("max_tokens")
        return True

    def _refusal(self, response: httpx.Response) -> Exception:
        told, where, code = self._told(response), self.endpoint, response.status_code
        if code in (401, 403):
            wrong = f"it does not take the key in {where.key_variable}"
            how = wrong if self._key else f"it wants a key: name its variable by {where.key_setting}"
            return EndpointError(f"{where}: {how}. {told}")
        if code in (404, 405) or 300 <= code < 400:
            return EndpointError(f"{where}: no such model, or no chat completions there. {told}")
        if code in (400, 413, 422) and (self._answered or _FULL.search(response.text)):
            return Refused(told)
        return EndpointError(f"{where} refuses: {told}")

    def _told(self, response: httpx.Response) -> str:
        """The status and the server's own words, in short."""
        text = response.text
        try:
            error = response.json().get("error", response.json())
            text = error if isinstance(error, str) else str(error.get("message") or error.get("detail") or error)
        except (ValueError, AttributeError):
            pass
        return self._clean(f"HTTP {response.status_code}: {' '.join(text.split())[:300]}")

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class EndpointPolicy:
    """One episode's. usage: of each of its calls that was answered."""

    def __init__(self, client: Client, codec: TextCodec):
        self._client, self._codec = client, codec
        self.usage: list[Usage] = []

    async def act(self, token_ids: Sequence[int], sampling: Sampling, session: str) -> Completion:
        messages, tools = self._codec.conversation(token_ids)
        try:
            reply = await self._client.chat(wire_messages(messages, bool(tools)), tools, sampling)
        except Refused as refusal:
            if self.usage and _FULL.search(str(refusal)):
                raise ContextFull from None
            raise
        self.usage.append(reply.usage)
        ids = self._codec.reply(reply.text, ended=not reply.truncated)
        return Completion(ids, [0.0] * len(ids), [-1] * len(ids), "length" if reply.truncated else "stop")


class EndpointTeacher:
    """Gives language feedback (rl/feedback.py). For one event loop.

    Raises ValueError when made where the key's variable is not set.
    """

    def __init__(self, config: FeedbackConfig, patience_s: float):
        if config.key_variable and not os.environ.get(config.key_variable):
            raise ValueError(missing_key(config.key_variable))
        assert config.url and config.model, "the configuration has checked that"
        self._config = config
        self._endpoint = Endpoint(
            config.url, config.model, config.key_variable, min(_FEEDBACK_PATIENCE_S, patience_s), config.timeout_s,
            "env.feedback.key_variable",
        )  # fmt: skip
        self._slots = asyncio.Semaphore(config.parallel)
        self._client: Client | None = None

    async def answer(self, prompt: str, session: str, seed: int) -> str:
        """Raises InfraError when the endpoint cannot be used, ValueError when it refuses this prompt."""
        c = self._config
        text = shortened(prompt, _CHARACTERS * (c.max_length - c.max_tokens))
        sampling = Sampling(temperature=c.temperature, max_tokens=c.max_tokens, seed=seed if c.temperature else None)
        async with self._slots:
            self._client = self._client or Client(self._endpoint)
            try:
                return (await self._client.chat([{"role": "user", "content": text}], (), sampling)).text
            except EndpointError as error:
                raise InfraError(f"env.feedback: {error}") from None
            except Refused as error:
                raise ValueError(f"env.feedback: {self._endpoint} refused a prompt: {error}") from None


def missing_key(name: str) -> str:
    return (
        f"env.feedback.key_variable: the environment variable {name} is not set. Set it where the run starts; for "
        "a cluster at RAY_ADDRESS, on its nodes, before Ray starts there"
    )


class UnreadableReply(Exception):
    """An answer that holds no message."""


def read_reply(answer: Any) -> Reply:
    """A chat completion's first choice. Raises UnreadableReply."""
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message = choice["message"]
        text = message.get("content") or ""
        if not isinstance(text, str):
            text = "".join(part.get("text", "") for part in text)
        text += "".join(_block(call["function"]) for call in message.get("tool_calls") or ())
        counts = Usage(usage.get("prompt_tokens"), usage.get("completion_tokens"))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UnreadableReply(f"no chat completion ({type(error).__name__}: {error})") from None
    return Reply(text, choice.get("finish_reason") == "length", counts)


def _block(function: Mapping[str, Any]) -> str:
    """A structured call in the form that environments read. What is no JSON stays so: the environment says so."""
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    # Inside JSON a tag stands in a text, where it may be spelled otherwise.
    arguments = arguments.replace("<tool_call>", "\\u003ctool_call>").replace("</tool_call>", "\\u003c/tool_call>")
    return f'<tool_call>{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}</tool_call>'


def wire_messages(messages: Sequence[Message], tools: bool) -> list[Message]:
    """Messages as the API takes them. tools: calls in the model's own text are sent as calls.

    Every call gets an id and is answered: one that the environment left without an answer by its last one to that turn.
    An answer to no call, such as to a malformed one, is sent as the user's.
    """
    sent: list[Message] = []
    waiting: list[str] = []
    last = ""

    def answer(call: str, text: str) -> None:
        sent.append({"role": "tool", "tool_call_id": call, "content": text})

    for number, message in enumerate(messages):
        if message["role"] == "tool" and waiting:
            last = message["content"]
            answer(waiting.pop(0), last)
            continue
        if message["role"] == "tool":
            sent.append({"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"})
            continue
        while waiting:
            answer(waiting.pop(0), last)
        last = ""
        if message["role"] == "assistant":
            message = _with_calls(message, number) if tools or message.get("tool_calls") else message
            waiting = [call["id"] for call in message.get("tool_calls", ())]
        sent.append(message)
    while waiting:
        answer(waiting.pop(0), last)
    return sent


def _with_calls(message: Message, number: int) -> Message:
    """An assistant message with its calls structured, each with an id."""
    functions = [dict(call["function"]) for call in message.get("tool_calls") or ()]
    content = message.get("content") or ""
    if not functions:
        functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in parse_calls(content)[0]]
        content = BLOCK.sub("", content) if functions else content
    for function in functions:
        if not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    calls = [{"id": f"call_{number}_{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to be left alone; a date is not read."""
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0
