"""What the replica's and the proxy's middleware do in bare ASGI messages: receive and send in bounds, and refuse."""

import asyncio
import json
from contextlib import suppress

from starlette.types import Message, Receive, Scope, Send

from serve.errors import ApiError

Headers = list[tuple[bytes, bytes]]
_PIECE = 1 << 15
_TIME_TO_END_S = 1.0
_GOING_AWAY, _TOO_BIG = 1001, 1009


class StreamClosed(OSError):
    """Nothing more can be sent. An OSError, since that is how an ASGI server says that its client has left."""


def has_body(scope: Scope) -> bool:
    """Whether a request can have one. To ask for the body of one that has none costs a call to Serve's proxy."""
    named = {name for name, value in scope["headers"] if name != b"content-length" or value != b"0"}
    return scope["method"] not in ("GET", "HEAD") or bool(named & {b"content-length", b"transfer-encoding"})


async def read_body(scope: Scope, receive: Receive, max_bytes: int, timeout_s: float) -> bytes | None:
    """Read it whole; None when the client has gone.

    Raises ApiError 413 as soon as it is known to be too large, 408 when it takes too long.
    """
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    too_large = ApiError(413, "body_too_large", f"The request's body is larger than the {max_bytes} bytes allowed")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise ApiError(408, "body_timeout", f"The request's body did not arrive within {timeout_s:g} s") from None
    return b"".join(chunks)


def replayed(body: bytes, receive: Receive) -> Receive:
    """What gives an application a body that has been read, and then what comes after it."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


class Client:
    """Who asks, through a server's `receive` and `send`: one that has stopped reading has left.

    `send` waits while tens of kilobytes are unread, and goes on when most of them have been read. So a client that
    reads slowly is waited for at every message anew, and a large body, which would be one message, is sent in pieces.
    When nothing goes on for `timeout_s`, the client has left as far as an application can see: `receive` says so, and
    an application that listens ends by itself. For one that does not, `send` soon raises StreamClosed.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, timeout_s: float):
        self._receive, self._send, self._timeout_s = receive, send, timeout_s
        self._left: Message = {"type": f"{scope['type']}.disconnect", "code": 1006}
        self._left_at: float | None = None
        self._waiting: asyncio.Timeout | None = None

    @property
    def stalled(self) -> bool:
        """Whether it has stopped reading."""
        return self._left_at is not None

    async def receive(self) -> Message:
        if self.stalled:
            return self._left
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await self._receive()
        except TimeoutError:
            return self._left
        finally:
            self._waiting = None

    async def send(self, message: Message) -> None:
        now = asyncio.get_running_loop().time
        if self._left_at is not None:
            if now() > self._left_at + _TIME_TO_END_S:
                raise StreamClosed
            return await asyncio.sleep(0)
        for piece in _pieces(message):
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._send(piece)
            except TimeoutError:
                self._left_at = now()
                if self._waiting is not None and not self._waiting.expired():
                    self._waiting.reschedule(self._left_at)
                return  # a generator that is then cancelled where it waits is closed at once; here, when collected


def _pieces(message: Message) -> list[Message]:
    body = message.get("body", b"")
    if message["type"] != "http.response.body" or len(body) <= _PIECE:
        return [message]
    cuts = range(0, len(body), _PIECE)
    pieces: list[Message] = [{**message, "body": body[at : at + _PIECE], "more_body": True} for at in cuts]
    pieces[-1]["more_body"] = message.get("more_body", False)
    return pieces


class BoundedSocket:
    """A WebSocket that is closed when no message passes for `idle_s`, and when a client's is larger than allowed."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int, idle_s: float):
        self._receive, self._send, self._max_bytes, self._idle_s = receive, send, max_bytes, idle_s
        self._waiting: asyncio.Timeout | None = None
        self._ended: int | None = None

    async def receive(self) -> Message:
        if self._ended is not None:
            return {"type": "websocket.disconnect", "code": self._ended}
        try:
            async with asyncio.timeout(self._idle_s) as self._waiting:
                message = await self._receive()
        except TimeoutError:
            return await self._end(_GOING_AWAY, "idle")
        finally:
            self._waiting = None
        if message["type"] == "websocket.receive" and _size(message) > self._max_bytes:
            return await self._end(_TOO_BIG, "message_too_large")
        return message

    async def send(self, message: Message) -> None:
        if self._ended is not None:
            raise StreamClosed
        await self._send(message)
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time() + self._idle_s)

    async def _end(self, code: int, reason: str) -> Message:
        self._ended = code
        with suppress(OSError):
            await self._send({"type": "websocket.close", "code": code, "reason": reason})
        return {"type": "websocket.disconnect", "code": code, "reason": reason}


def _size(message: Message) -> int:
    text = message.get("text")
    return len(message.get("bytes") or b"") if text is None else len(text.encode("utf-8", "surrogatepass"))


async def refuse(scope: Scope, send: Send, error: ApiError) -> None:
    """Answer a request with an error; a WebSocket's handshake too, where the server can."""
    body = json.dumps(error.body()).encode()
    headers: Headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 408:  # or the connection would wait for the rest of the body
        headers.append((b"connection", b"close"))
    kind = "http.response"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": error.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


def server_sent_error(error: ApiError, *, resume: bool) -> bytes:
    """An error as a last event: a session's client knows it by its name and type, OpenAI's by its data's `error`."""
    inner = {**error.body()["error"], "resume": resume}
    data = {"type": "error", "code": error.code, "message": error.message, "resume": resume, "error": inner}
    return f"event: error\ndata: {json.dumps(data)}\n\n".encode()
