"""What stands before Ray Serve's HTTP proxy: bodies come whole, and every answer ends as a client can understand.

The proxy's process finds it by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH="serve.proxy_guard:middlewares" in its
environment. Without it, a replica that dies cuts its streams in the middle; Serve's own errors are plain text; and the
proxy passes a body on as fast as it comes, into a queue without bounds, while a slow one holds a replica's place. Here
a body is read first, within REPERTORY_MAX_BODY_BYTES and REPERTORY_BODY_TIMEOUT_S, and a client that reads nothing of
its answer for as long has left. And Serve's router is told which session a path is about, or which conversation a chat
is, so that all of its requests come to the same replica.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.asgi import Client, has_body, read_body, refuse, replayed, server_sent_error
from serve.errors import ApiError
from serve.request_id import request_id_of, with_request_id

_log = logging.getLogger("ray.serve")
_UNAVAILABLE = ApiError(503, "unavailable", "No replica could answer; try again", retry_after_s=1)
_DIED = ApiError(503, "replica_died", "The replica that was answering is gone; what it began can be gone on with")
_SERVICE_RESTART = 1012
_SESSION = re.compile(r"/v1/sessions/([A-Za-z0-9._\-]{1,128})(?:/|$)")
_CHAT = "/v1/chat/completions"
_MOST_BODIES = 256
"""That are read at a time."""
_SESSION_ID = b"x-session-id"
"""What Serve's ConsistentHashRouter looks for."""


def middlewares() -> list[Middleware]:
    """What Serve's proxy asks for when it starts."""
    largest = int(os.environ.get("REPERTORY_MAX_BODY_BYTES", 1 << 20))
    return [Middleware(ProxyGuard, largest, float(os.environ.get("REPERTORY_BODY_TIMEOUT_S", 20)))]


class ProxyGuard:
    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float):
        self._app, self._max_bytes, self._timeout_s = app, max_body_bytes, body_timeout_s
        self._reading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"].startswith("/-/"):  # Serve's own
            return await self._app(scope, receive, send)
        name = request_id_of(scope)
        scope = {**scope, "headers": _with_session_id(scope["path"], with_request_id(scope["headers"], name))}
        client = Client(scope, receive, send, self._timeout_s)
        receive, send = client.receive, client.send
        if scope["type"] == "websocket":
            socket = _Socket(scope, receive, send)
            await self._ask(scope, socket.receive, socket.send)
            return await socket.finish()
        answer = _Answer(scope, send, name)
        try:
            if has_body(scope):
                with self._place_for_body():
                    whole = await read_body(scope, receive, self._max_bytes, self._timeout_s)
                if whole is None:
                    return
                receive = replayed(whole, receive)
                if scope["path"] == _CHAT and (conversation := _conversation(whole)) is not None:
                    scope["headers"] = _routed(scope["headers"], conversation)
        except ApiError as error:
            return await refuse(scope, answer.send, error)
        await self._ask(scope, receive, answer.send)
        await answer.finish()

    @contextmanager
    def _place_for_body(self) -> Iterator[None]:
        """Raises ApiError 429: whose bodies these are nobody knows yet, and together they must not fill the memory."""
        if self._reading >= _MOST_BODIES:
            told = "The server reads all the requests that it can take"
            raise ApiError(429, "overloaded", told, retry_after_s=1)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # the answer is finished all the same
            _log.error("the proxy failed: %s", type(error).__name__)


class _Answer:
    """An HTTP answer on its way out."""

    def __init__(self, scope: Scope, send: Send, name: str):
        self._scope, self._send, self._name = scope, send, name
        self._started = self._ended = self._replaced = self._is_events = False

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self._started = True
            kind = next((v for n, v in message["headers"] if n.lower() == b"content-type"), b"")
            self._is_events = kind.startswith(b"text/event-stream")
            if message["status"] >= 400 and kind.startswith(b"text/plain"):
                error = _of_serve(message)
                await refuse(self._scope, self.send, error)
                self._replaced = True
                return
            message = {**message, "headers": with_request_id(message["headers"], self._name)}
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def finish(self) -> None:
        """Once Serve has nothing more to say. To a client that has gone, the server sends nothing."""
        if not self._started:
            await refuse(self._scope, self.send, _UNAVAILABLE)
        elif self._is_events and not self._ended:
            # An event that was cut off ends with the empty line, and is one that no client can read.
            last = b"\n\n" + server_sent_error(_DIED, resume=True)
            await self._send({"type": "http.response.body", "body": last})


class _Socket:
    """A WebSocket whose other end may be a replica that dies."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self._scope, self._receive, self._send = scope, receive, send
        self._accepted = self._ended = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = self._ended or message["type"] == "websocket.disconnect"
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind.startswith("http."):  # Serve's own answer, which is none for a WebSocket
            return
        self._accepted = self._accepted or kind == "websocket.accept"
        self._ended = self._ended or kind in ("websocket.close", "websocket.http.response.start")
        await self._send(message)

    async def finish(self) -> None:
        if self._ended:
            return
        if not self._accepted:
            return await refuse(self._scope, self._send, _UNAVAILABLE)
        event = {"type": "error", "code": _DIED.code, "message": _DIED.message, "resume": True}
        await self._send({"type": "websocket.send", "text": json.dumps(event)})
        await self._send({"type": "websocket.close", "code": _SERVICE_RESTART, "reason": _DIED.code})


def _with_session_id(path: str, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The path's own session, whatever the client says: another one's replica would have to make it again."""
    found = _SESSION.search(path)
    if found is None:
        return headers
    others = [(n, v) for n, v in headers if not _is_session_id(n)]
    return [*others, (_SESSION_ID, found[1].encode())]


def _routed(headers: list[tuple[bytes, bytes]], conversation: str) -> list[tuple[bytes, bytes]]:
    """By the client's own header, where it sends one: it knows better what belongs together."""
    named = any(_is_session_id(name) for name, _ in headers)
    return headers if named else [*headers, (_SESSION_ID, conversation.encode())]


def _is_session_id(name: bytes) -> bool:
    return name.lower().replace(b"_", b"-") == _SESSION_ID


def _conversation(body: bytes) -> str | None:
    """What all requests of a chat have in common: only the replica that said its turns remembers their tokens.

    The client's prompt_cache_key, or the first thing that the user has said. None where the body is no chat.
    """
    try:
        asked = json.loads(body)
        first = next(m["content"] for m in asked["messages"] if m["role"] == "user")
        what = json.dumps(asked.get("prompt_cache_key") or first)
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration, RecursionError):
        return None
    return blake2b(what.encode(), digest_size=16).hexdigest()


def _of_serve(start: Message) -> ApiError:
    """Serve's own answer, in plain text, as an error of ours: the app's are JSON."""
    headers = {name.lower(): value for name, value in start["headers"]}
    retry_s = float(headers.get(b"retry-after", 1))
    if start["status"] == 404:
        return ApiError(404, "not_found", "There is nothing at this path")
    if start["status"] == 408:
        return ApiError(408, "deadline_exceeded", "The request took longer than the server allows")
    if start["status"] == 429:
        return ApiError(429, "overloaded", "The server has all the requests that it can take", retry_after_s=retry_s)
    return ApiError(503, _UNAVAILABLE.code, _UNAVAILABLE.message, retry_after_s=retry_s)
