"""What a request must pass before an app sees it, and what is told of it. A small app behind, and no engine."""

import asyncio
import json
import logging
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse

from serve.config import ServeConfig
from serve.errors import ApiError
from serve.keys import KeyRing
from serve.keys_command import create_key, revoke_key
from serve.metrics import Metrics
from serve.protection import Protection

SECRET = "what somebody wrote"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Seen(Metrics):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.told: list[tuple[Any, ...]] = []

    def request(self, route: str, status: int, seconds: float) -> None:
        self.told.append(("request", route, status))

    def error(self, code: str) -> None:
        self.told.append(("error", code))

    def in_flight(self, count: int) -> None:
        self.told.append(("in_flight", count))


def an_app() -> FastAPI:
    app = FastAPI()

    @app.get("/")
    @app.get("/web/app.js")
    @app.get("/health/live")
    @app.get("/v1/models")
    async def read(request: Request) -> dict[str, Any]:
        return {"caller": request.scope["state"]["caller"].name, "id": request.scope["state"]["request_id"]}

    @app.post("/v1/chat/completions")
    @app.post("/v1/sessions/{name}/turns")
    async def generate(request: Request) -> Any:
        app.state.bodies.append(await request.body())

        async def chunks():
            try:
                yield b"data: 1\n\n"
                await app.state.go_on.wait()
                yield b"data: 2\n\n"
            finally:
                app.state.ended += 1

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.websocket("/v1/sessions/{name}/ws")
    async def speak(socket: WebSocket, name: str) -> None:
        await socket.accept()
        await socket.send_json({"caller": socket.scope["state"]["caller"].name, "headers": repr(socket.headers)})
        await app.state.go_on.wait()
        await socket.close()

    app.state.bodies, app.state.ended = [], 0
    app.state.go_on = asyncio.Event()
    app.state.go_on.set()
    return app


class Server:
    def __init__(self, folder, clock=time.monotonic, app=None, **settings: Any):
        config = ServeConfig.model_validate({"model": "m", **settings})
        self.keys = KeyRing(folder / "keys.json", clock=clock)
        self.metrics = Seen()
        self.app = app or an_app()
        service: Any = SimpleNamespace(config=config, keys=self.keys, metrics=self.metrics)
        self.asgi = Protection(self.app, service, clock)

    @asynccontextmanager
    async def client(self, key: str = "", base: str = "http://localhost"):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(self.asgi)
        async with httpx.AsyncClient(transport=transport, base_url=base, headers=headers) as client:
            yield client


def code(response: httpx.Response) -> tuple[int, str]:
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.status_code, response.json()["error"]["code"]


async def test_no_key_wrong_key_and_revoked_key_are_401_everywhere_but_on_the_page_and_health(tmp_path):
    good, revoked = create_key(tmp_path, "good"), create_key(tmp_path, "revoked")
    revoke_key(tmp_path, "revoked")
    server = Server(tmp_path)
    texts = set()
    for key, expected in (("", "missing_key"), ("wrong", "invalid_key"), (revoked, "invalid_key")):
        async with server.client(key) as client:
            for method, path in (
                ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/openapi.json"), ("POST", "/"),
                ("GET", "/healthy"), ("GET", "/web/"), ("GET", "/web/../v1/models"), ("OPTIONS", "/v1/models"),
            ):  # fmt: skip
                response = await client.request(method, path)
                assert code(response) == (401, expected)
                assert response.headers["www-authenticate"] == "Bearer"
                texts.add(response.json()["error"]["message"])
            for path in ("/", "/web/app.js", "/health/live"):
                assert (await client.get(path)).json()["caller"] == "anonymous"
    assert len(texts) == 2 and not server.app.state.bodies
    async with server.client(good) as client:
        assert (await client.get("/v1/models")).json()["caller"] == "good"


async def test_a_body_is_measured_before_the_app_sees_any_of_it(tmp_path):
    server = Server(tmp_path, http={"max_body_bytes": 1000})

    async def chunks(count):
        for _ in range(count):
            yield b"x" * 100

    async with server.client() as client:
        assert code(await client.post("/v1/chat/completions", content=b"x" * 1001)) == (413, "body_too_large")
        assert code(await client.post("/v1/chat/completions", content=chunks(11))) == (413, "body_too_large")
        assert server.app.state.bodies == []
        assert (await client.post("/v1/chat/completions", content=chunks(10))).status_code == 200
        assert (await client.post("/v1/chat/completions", content=b"y" * 1000)).status_code == 200
    assert server.app.state.bodies == [b"x" * 1000, b"y" * 1000]


async def test_a_body_that_never_ends_is_408_and_one_whose_client_leaves_is_nothing(tmp_path):
    server = Server(tmp_path, http={"body_timeout_s": 0.2})
    start = time.perf_counter()
    sent = await raw(server, "POST", "/v1/chat/completions", drip)
    assert 0.15 < time.perf_counter() - start < 2
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_timeout"
    assert await raw(server, "POST", "/v1/chat/completions", gone) == []
    assert server.app.state.bodies == []


async def drip() -> dict[str, Any]:
    await asyncio.sleep(0.05)
    return {"type": "http.request", "body": b"x", "more_body": True}


async def empty() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def raw(server: Server, method: str, path: str, receive: Any, scope: Any = None, send: Any = None):
    """What an app answers to bare ASGI. scope: what is other than usual."""
    sent: list[dict[str, Any]] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    default = {
        "type": "http", "method": method, "path": path, "root_path": "", "query_string": b"", "http_version": "1.1",
        "headers": [(b"host", b"localhost")], "scheme": "http", "server": ("localhost", 80), "client": ("::1", 9),
    }  # fmt: skip
    await server.asgi({**default, **(scope or {})}, receive, send or keep)
    return sent


async def test_the_rate_of_a_key_and_when_to_come_back(tmp_path):
    clock = Clock()
    one, other = create_key(tmp_path, "one"), create_key(tmp_path, "other")
    server = Server(tmp_path, clock, limits={"requests_per_minute": 4})
    async with server.client(one) as client:
        assert [(await client.get("/v1/models")).status_code for _ in range(5)] == [200] * 4 + [429]
        clock.now += 4.5  # of the 15 s that one takes
        response = await client.get("/v1/models")
        assert code(response) == (429, "rate_limited")
        assert response.headers["retry-after"] == "11"  # 10.5 s; 10 would be refused again
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {other}"})).status_code == 200
        clock.now += 10
        assert (await client.get("/v1/models")).status_code == 429
        clock.now += 1
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 429
        clock.now += 3600  # saves up no more than a minute's
        assert [(await client.get("/v1/models")).status_code for _ in range(5)] == [200] * 4 + [429]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/sessions/a/turns"])
async def test_how_many_may_generate_at_a_time(tmp_path, path):
    keys = [create_key(tmp_path, f"k{i}") for i in range(3)]
    server = Server(tmp_path, limits={"in_flight": 3, "in_flight_per_key": 2})
    server.app.state.go_on.clear()
    async with server.client() as client:

        async def post(key: str) -> httpx.Response:
            return await client.post(path, headers={"Authorization": f"Bearer {key}"})

        waiting = [asyncio.ensure_future(post(keys[i])) for i in (0, 0, 1)]
        await until(lambda: len(server.app.state.bodies) == 3)
        per_key = await post(keys[0])
        assert code(per_key) == (429, "too_many_in_flight") and per_key.headers["retry-after"] == "1"
        assert code(await post(keys[2])) == (429, "overloaded")
        assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {keys[0]}"})).status_code == 200
        server.app.state.go_on.set()
        assert [r.status_code for r in await asyncio.gather(*waiting)] == [200] * 3
        assert (await post(keys[2])).status_code == 200
    assert ("in_flight", 3) in server.metrics.told and server.metrics.told.count(("error", "overloaded")) == 1
    assert [t for t in server.metrics.told if t[0] == "in_flight"][-1] == ("in_flight", 0)


async def test_an_app_that_fails_frees_its_place_and_tells_nothing(tmp_path, caplog):
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        if scope["query_string"] == b"refuse":
            raise ApiError(409, "turn_under_way", "wait")
        if scope["query_string"] == b"late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"1", "more_body": True})
        raise RuntimeError(SECRET)

    server = Server(tmp_path, app=failing, limits={"in_flight": 1})
    with caplog.at_level(logging.DEBUG):
        async with server.client() as client:
            for _ in range(2):
                assert code(await client.post("/v1/chat/completions", content=SECRET)) == (500, "internal_error")
                assert code(await client.post("/v1/chat/completions?refuse")) == (409, "turn_under_way")
        sent = await raw(server, "POST", "/v1/chat/completions", empty, {"query_string": b"late"})
        assert [m.get("status", m.get("body")) for m in sent] == [200, b"1"]  # and the server cuts the connection
    assert SECRET not in caplog.text
    assert "RuntimeError" in caplog.text and "in failing" in caplog.text  # where, all the same


async def test_the_place_is_free_again_after_a_disconnect(tmp_path):
    server = Server(tmp_path, limits={"in_flight": 1})
    async with server.client() as client:
        server.app.state.go_on.clear()
        started = asyncio.Event()
        asked = 0

        async def leaving() -> dict[str, Any]:
            nonlocal asked
            asked += 1
            if asked == 1:
                return {"type": "http.request", "body": b"", "more_body": False}
            await started.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                started.set()

        await asyncio.wait_for(raw(server, "POST", "/v1/chat/completions", leaving, send=send), 5)
        assert server.app.state.ended == 1
        cancelled = asyncio.ensure_future(client.post("/v1/chat/completions"))
        await until(lambda: len(server.app.state.bodies) == 2)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        server.app.state.go_on.set()
        assert (await client.post("/v1/chat/completions")).status_code == 200


async def until(true: Any) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


async def spoken(server: Server, protocols: list[str], path="/v1/sessions/a/ws", headers=(), extensions=None):
    """What a WebSocket's client gets."""
    messages = [{"type": "websocket.connect"}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    scope = {
        "type": "websocket", "subprotocols": protocols, "extensions": extensions or {},
        "headers": [(b"host", b"localhost"), (b"sec-websocket-protocol", ", ".join(protocols).encode()), *headers],
    }  # fmt: skip
    return await raw(server, "GET", path, receive, scope)


async def test_a_websocket_brings_its_key_as_a_subprotocol(tmp_path):
    key = create_key(tmp_path, "browser")
    server = Server(tmp_path)
    named = f"repertory-key.{key}"
    accept, hello, close = await spoken(server, [named])
    assert accept["subprotocol"] == named  # a browser goes on only with one that it offered
    assert json.loads(hello["text"])["caller"] == "browser" and key not in hello["text"]
    assert close["type"] == "websocket.close"
    accept, *_ = await spoken(server, [named, "repertory"])
    assert accept["subprotocol"] == "repertory"  # rather than to say the key again
    accept, *_ = await spoken(server, [], headers=[(b"authorization", f"Bearer {key}".encode())])
    assert accept["subprotocol"] is None
    for protocols in ([], [named + "x"], ["repertory"]):
        assert [m["type"] for m in await spoken(server, protocols)] == ["websocket.close"]
        start, body = await spoken(server, protocols, extensions={"websocket.http.response": {}})
        assert start["status"] == 401 and b"_key" in body["body"]


async def test_a_browser_cannot_be_led_to_a_server_without_keys(tmp_path):
    server = Server(tmp_path)
    for base in ("http://localhost", "http://127.0.0.1:8000", "http://[::1]:8000"):
        async with server.client(base=base) as client:
            assert (await client.get("/v1/models")).status_code == 200
            own = await client.post("/v1/chat/completions", headers={"Origin": base})
            assert own.status_code == 200
            for origin in ("http://evil.example", "null", "http://localhost:3000", base + ".evil.example"):
                other = await client.post("/v1/chat/completions", headers={"Origin": origin})
                assert code(other) == (403, "origin_not_allowed")
            assert (await client.get("/v1/models", headers={"Origin": "http://evil.example"})).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "10.0.0.4", "", "[::", "a@b"):
        for path in ("/v1/models", "/", "/health"):
            scope = {"headers": [(b"host", host.encode())] if host else []}
            start, body = await raw(server, "GET", path, gone, scope)
            assert start["status"] == 403 and b"host_not_allowed" in body["body"]
    refused = await spoken(server, [], headers=[(b"origin", b"http://evil.example")])
    assert [m["type"] for m in refused] == ["websocket.close"]
    assert len(await spoken(server, [], headers=[(b"origin", b"http://localhost")])) == 3
    key = create_key(tmp_path, "now")  # with keys, no page has what it would need
    async with Server(tmp_path).client(key, base="http://agent.example") as client:
        response = await client.post("/v1/chat/completions", headers={"Origin": "http://evil.example"})
        assert response.status_code == 200 and "access-control-allow-origin" not in response.headers


async def test_other_sites_may_call_where_the_configuration_says_so(tmp_path):
    key = create_key(tmp_path, "k")
    preflight = {"Origin": "http://site.example", "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type,x-session-id"
    closed, opened = Server(tmp_path), Server(tmp_path, http={"cors_origins": ("http://site.example",)})
    async with closed.client() as client:
        response = await client.options("/v1/chat/completions", headers=preflight)
        assert response.status_code == 401 and "access-control-allow-origin" not in response.headers
    async with opened.client() as client:
        response = await client.options("/v1/chat/completions", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "http://site.example"
        refused = await client.get("/v1/models", headers={"Origin": "http://site.example"})
        assert code(refused) == (401, "missing_key")  # in a form that the page can read
        assert refused.headers["access-control-allow-origin"] == "http://site.example"
        other = await client.options("/v1/chat/completions", headers={**preflight, "Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    async with opened.client(key) as client:
        response = await client.post("/v1/chat/completions", headers={"Origin": "http://site.example"})
        assert response.headers["access-control-allow-origin"] == "http://site.example"
    (tmp_path / "none").mkdir()
    without = Server(tmp_path / "none", http={"cors_origins": ("http://site.example",)})
    async with without.client() as client:
        response = await client.post("/v1/chat/completions", headers={"Origin": "http://site.example"})
        assert response.status_code == 200
        response = await client.post("/v1/chat/completions", headers={"Origin": "http://evil.example"})
        assert code(response) == (403, "origin_not_allowed")


async def test_one_line_a_request_without_what_anybody_wrote(tmp_path, caplog):
    clock = Clock()
    key = create_key(tmp_path, "k")
    server = Server(tmp_path, clock)
    identity = server.keys.check(f"Bearer {key}").id
    with caplog.at_level(logging.INFO, "repertory.serve"):
        async with server.client(key) as client:
            path, named = f"/v1/sessions/abc/turns?q={SECRET}", {"x-request-id": "a-1"}
            response = await client.post(path, content=SECRET, headers=named)
            assert response.headers["x-request-id"] == "a-1"
            for bad in ("a b", "x" * 129, 'a"b', "a\tb"):
                made = (await client.get("/v1/models", headers={"x-request-id": bad})).headers["x-request-id"]
                assert made != bad and len(made) == 32
            await client.get("/no/%0Asuch%1b/path?q=1")
        async with server.client("wrong") as client:
            await client.get("/v1/models")
    lines = [record.getMessage() for record in caplog.records if record.name == "repertory.serve"]
    assert lines[0] == f"POST /v1/sessions/{{name}}/turns 200 0.000s {identity} a-1"
    assert lines[5].startswith(f"GET /no/%0Asuch%1B/path 404 0.000s {identity} ")
    assert lines[6].startswith("GET /v1/models 401 0.000s anonymous ")
    assert len(lines) == 7 and SECRET not in caplog.text and key not in caplog.text
    told = [t for t in server.metrics.told if t[0] == "request"]
    assert told[0] == ("request", "/v1/sessions/{name}/turns", 200) and told[5] == ("request", "other", 404)


async def test_headers_that_keep_a_browser_from_being_misled(tmp_path):
    server = Server(tmp_path)
    async with server.client() as client:
        for path in ("/", "/web/app.js", "/v1/models", "/nothing"):
            headers = (await client.get(path)).headers
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"


async def test_a_stream_goes_through_piece_by_piece(tmp_path):
    server = Server(tmp_path)
    server.app.state.go_on.clear()
    pieces: list[bytes] = []

    messages = [await empty()]

    async def whole() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            pieces.append(message["body"])

    done = asyncio.ensure_future(raw(server, "POST", "/v1/chat/completions", whole, send=send))
    await until(lambda: pieces)
    assert pieces == [b"data: 1\n\n"]
    server.app.state.go_on.set()
    await done
    assert pieces == [b"data: 1\n\n", b"data: 2\n\n", b""]


def test_a_method_that_a_path_does_not_have_is_the_clients_mistake():
    assert ApiError(405, "method_not_allowed", "no").body()["error"]["type"] == "invalid_request_error"
