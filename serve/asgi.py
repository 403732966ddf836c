"""What the replica's and the proxy's middleware both do in bare ASGI messages: read a body in bounds, and refuse."""

import asyncio
import json

from starlette.types import Message, Receive, Scope, Send

from serve.errors import ApiError

Headers = list[tuple[bytes, bytes]]


def has_body(scope: Scope) -> bool:
    """Whether a request can have one. To ask for the body of one that has none costs a call to Serve's proxy."""
    named = {name for name, value in scope["headers"] if name != b"content-length" or value != b"0"}
    return scope["method"] not in ("GET", "HEAD") or bool(named & {b"content-length", b"transfer-encoding"})


async def read_body(scope: Scope, receive: Receive, max_bytes: int, timeout_s: float) -> Receive | None:
    """Read it whole, and return the `receive` that gives it to an application; None when the client has gone.

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
    waiting = [b"".join(chunks)]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


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
