"""What one client can hold of a server: silent WebSockets, messages without end, answers that nobody reads."""

import asyncio
import socket as sockets
import time
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from test_protection import Server, empty, raw, until

from serve.errors import ApiError
from serve.keys_command import create_key, revoke_key
from serve.proxy_guard import ProxyGuard

PATH = "/v1/sessions/a/ws"


def talking() -> FastAPI:
    """Every message is a turn, as long as `go_on` is not set."""
    app = FastAPI()
    app.state.go_on, app.state.codes = asyncio.Event(), []
    app.state.go_on.set()

    @app.websocket("/v1/sessions/{name}/ws")
    async def speak(socket: WebSocket, name: str) -> None:
        await socket.accept()
        try:
            while True:
                await socket.receive_text()
                try:
                    async with socket.scope["state"]["turn"]():
                        await socket.send_text("begun")
                        await app.state.go_on.wait()
                        await socket.send_text("ended")
                except ApiError as error:
                    await socket.send_text(error.code)
        except WebSocketDisconnect as left:
            app.state.codes.append(left.code)

    return app


class Talk:
    """A WebSocket's client."""

    def __init__(self, server: Server, key: str = ""):
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.inbox.put_nowait({"type": "websocket.connect"})
        headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "websocket", "subprotocols": [], "extensions": {}, "headers": headers}
        self.task = asyncio.ensure_future(raw(server, "GET", PATH, self.inbox.get, scope, self.keep))

    async def keep(self, message: Any) -> None:
        self.sent.append(message)

    def say(self, text: str = "x", **more: Any) -> None:
        self.inbox.put_nowait({"type": "websocket.receive", "text": text, **more})

    async def says(self, text: str = "x") -> str:
        """The next answer."""
        count = len(self.sent)
        self.say(text)
        await until(lambda: len(self.sent) > count)
        return self.sent[count]["text"]

    async def open(self) -> "Talk":
        await until(lambda: self.sent)
        assert self.sent[0]["type"] == "websocket.accept"
        return self

    async def leave(self) -> None:
        self.inbox.put_nowait({"type": "websocket.disconnect", "code": 1005})
        await self.task


async def test_an_idle_websocket_takes_no_place_and_a_turn_of_it_does(tmp_path):
    key, other = create_key(tmp_path, "one"), create_key(tmp_path, "other")
    server = Server(tmp_path, app=talking(), limits={"in_flight": 2, "in_flight_per_key": 1})
    talks = [await Talk(server, key).open() for _ in range(5)]
    others = [await Talk(server, other).open() for _ in range(2)]
    server.app.state.go_on.clear()
    assert await talks[0].says() == "begun"
    assert server.metrics.told[-1] == ("in_flight", 1)
    assert await talks[1].says() == "too_many_in_flight"
    assert await others[0].says() == "begun"
    assert await others[1].says() == "too_many_in_flight"
    assert ("error", "too_many_in_flight") in server.metrics.told
    server.app.state.go_on.set()
    await until(lambda: talks[0].sent[-1]["text"] == others[0].sent[-1]["text"] == "ended")
    assert await talks[1].says() == "begun"
    await until(lambda: talks[1].sent[-1]["text"] == "ended")
    server.app.state.go_on.clear()
    assert await talks[2].says() == "begun"
    talks[2].task.cancel()  # as when the server ends: its place is free again
    await asyncio.gather(talks[2].task, return_exceptions=True)
    assert await talks[3].says() == "begun"
    server.app.state.go_on.set()
    for talk in (talks[0], talks[1], talks[3], talks[4], *others):
        await talk.leave()
    assert [told for told in server.metrics.told if told[0] == "in_flight"][-1] == ("in_flight", 0)


async def test_every_turn_of_a_websocket_is_checked_and_counted_as_a_request_is(tmp_path):
    now = [100.0]
    key = create_key(tmp_path, "mine")
    server = Server(tmp_path, lambda: now[0], app=talking(), limits={"requests_per_minute": 3})
    talk = await Talk(server, key).open()  # a request too
    for expected in ("begun", "begun", "rate_limited"):
        assert await talk.says() == expected
        await until(lambda: talk.sent[-1]["text"] in ("ended", "rate_limited"))
    now[0] += 60
    assert await talk.says() == "begun"
    await until(lambda: talk.sent[-1]["text"] == "ended")
    revoke_key(tmp_path, "mine")
    now[0] += 1.1
    assert await talk.says() == "invalid_key"
    assert ("error", "invalid_key") in server.metrics.told
    await talk.leave()


async def test_how_many_websockets_may_be_open(tmp_path):
    keys = [create_key(tmp_path, f"k{i}") for i in range(3)]
    server = Server(tmp_path, app=talking(), limits={"sockets": 3, "sockets_per_key": 2})
    talks = [await Talk(server, keys[i]).open() for i in (0, 0, 1)]
    for key, expected in ((keys[0], "too_many_in_flight"), (keys[2], "overloaded")):
        refused = Talk(server, key)
        await refused.task
        assert [(m["type"], m["reason"]) for m in refused.sent] == [("websocket.close", expected)]
    await talks[0].leave()
    await (await Talk(server, keys[0]).open()).leave()
    for talk in talks[1:]:
        await talk.leave()


async def test_a_websocket_on_which_nothing_passes_is_ended_and_not_before(tmp_path):
    server = Server(tmp_path, app=talking(), sessions={"idle_s": 0.3})
    start = time.perf_counter()
    silent, busy = await Talk(server).open(), await Talk(server).open()
    for _ in range(4):
        await asyncio.sleep(0.15)
        assert await busy.says() == "begun"
    assert silent.sent[-1] == {"type": "websocket.close", "code": 1001, "reason": "idle"}
    assert silent.task.done() and not busy.task.done() and server.app.state.codes == [1001]
    await asyncio.wait_for(busy.task, 5)
    assert busy.sent[-1]["code"] == 1001 and 0.85 < time.perf_counter() - start < 3


async def test_what_an_app_sends_keeps_a_websocket_open(tmp_path):
    async def telling(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        waiting = asyncio.ensure_future(receive())
        for _ in range(4):
            await asyncio.sleep(0.15)
            await send({"type": "websocket.send", "text": "x"})
        assert (await waiting)["code"] == 1001
        with pytest.raises(OSError):  # as where a client has left
            await send({"type": "websocket.send", "text": "x"})

    server = Server(tmp_path, app=telling, sessions={"idle_s": 0.3})  # type: ignore[arg-type]
    talk = Talk(server)
    await asyncio.wait_for(talk.task, 5)
    assert [m["type"].partition(".")[2] for m in talk.sent] == ["accept", *["send"] * 4, "close"]


@pytest.mark.parametrize("more", [{"text": "ä" * 51}, {"text": "x" * 101}, {"text": None, "bytes": b"x" * 101}])
async def test_a_message_of_a_websocket_is_no_larger_than_a_body(tmp_path, more):
    server = Server(tmp_path, app=talking(), http={"max_body_bytes": 100})
    talk = await Talk(server).open()
    assert await talk.says("ä" * 50) == "begun"
    await until(lambda: talk.sent[-1]["text"] == "ended")
    talk.say(**more)
    await asyncio.wait_for(talk.task, 5)
    assert talk.sent[-1] == {"type": "websocket.close", "code": 1009, "reason": "message_too_large"}
    assert server.app.state.codes == [1009]


# -- clients that do not read ------------------------------------------------------------------------------------------


def endless() -> FastAPI:
    """Answers that go on until they are ended."""
    app = FastAPI()
    app.state.ended = 0

    @app.post("/v1/chat/completions")
    async def generate() -> StreamingResponse:
        async def chunks():
            try:
                while True:
                    yield b"x" * 50_000
                    await asyncio.sleep(0.01)
            finally:
                app.state.ended += 1

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.websocket("/v1/sessions/{name}/ws")
    async def speak(socket: WebSocket, name: str) -> None:
        await socket.accept()
        try:
            async with socket.scope["state"]["turn"]():
                while True:
                    await socket.send_text("x" * 50_000)
        except WebSocketDisconnect:
            app.state.ended += 1

    return app


@asynccontextmanager
async def listening(app: Any):
    """Its port. Uvicorn with the kernel's buffers small, so that a test need not fill megabytes."""
    listener = sockets.socket()
    _like_ethernet(listener, sockets.SO_SNDBUF)
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    serving = asyncio.ensure_future(server.serve([listener]))
    await until(lambda: server.started)
    yield listener.getsockname()[1]
    server.should_exit = server.force_exit = True
    await serving


def _like_ethernet(made: sockets.socket, buffer: int) -> None:
    made.setsockopt(sockets.SOL_SOCKET, buffer, 16_000)
    made.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_MAXSEG, 1400)  # one of 64 KB would wait for as much room


def asking(port: int, more: str = "") -> sockets.socket:
    """A connection with a request on it, and nothing read."""
    made = sockets.socket()
    _like_ethernet(made, sockets.SO_RCVBUF)
    made.connect(("127.0.0.1", port))
    made.setblocking(False)
    method, path = ("GET", PATH) if more else ("POST", "/v1/chat/completions")
    length = "" if more else "Content-Length: 0\r\n"
    made.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}{more}\r\n".encode())
    return made


UPGRADE = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
UPGRADE += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


@pytest.mark.parametrize("more", ["", UPGRADE], ids=["http", "websocket"])
async def test_a_client_that_does_not_read_frees_its_place_and_one_that_reads_slowly_keeps_it(tmp_path, more):
    server = Server(tmp_path, app=endless(), http={"body_timeout_s": 0.5}, limits={"in_flight": 2})
    async with listening(server.asgi) as port:
        loop = asyncio.get_running_loop()
        slow, stuck = asking(port, more), asking(port, more)
        for _ in range(60):  # at 400 KB/s
            await loop.sock_recv(slow, 16_000)
            await asyncio.sleep(0.04)
        assert server.app.state.ended == 1 and server.metrics.told.count(("error", "client_stalled")) == 1
        assert [told for told in server.metrics.told if told[0] == "in_flight"][-1] == ("in_flight", 1)
        slow.close()
        stuck.close()
        await until(lambda: server.app.state.ended == 2)
        assert server.metrics.told.count(("error", "client_stalled")) == 1


async def test_a_large_body_is_waited_for_as_long_as_it_is_read(tmp_path):
    body = bytes(range(256)) * 1000

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    server = Server(tmp_path, app=answering, http={"body_timeout_s": 0.3})  # type: ignore[arg-type]
    got: list[dict[str, Any]] = []

    async def slowly(message: dict[str, Any]) -> None:
        await asyncio.sleep(len(message.get("body", b"")) / 250_000)  # a second for all
        got.append(message)

    await raw(server, "POST", "/v1/chat/completions", empty, send=slowly)
    assert b"".join(m.get("body", b"") for m in got) == body
    assert [m.get("more_body", False) for m in got[1:]] == [True] * (len(got) - 2) + [False]


async def test_the_proxy_tells_serve_that_a_client_which_does_not_read_has_left(tmp_path):
    left: list[dict[str, Any]] = []

    async def serve_proxy(scope: Any, receive: Any, send: Any) -> None:
        """Ends an answer when its client has left, as Ray Serve's does, and otherwise goes on."""
        await receive()
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        leaving = asyncio.ensure_future(receive())
        while not leaving.done():
            if scope["type"] == "websocket":
                await send({"type": "websocket.send", "text": "x" * 50_000})
            else:
                await send({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True})
            await asyncio.sleep(0)
        left.append(leaving.result())

    async with listening(ProxyGuard(serve_proxy, 1000, 0.3)) as port:
        stuck = [asking(port), asking(port, UPGRADE)]
        await until(lambda: len(left) == 2)
        assert {m["type"] for m in left} == {"http.disconnect", "websocket.disconnect"}
        for one in stuck:
            one.close()
