"""Before and behind a real proxy of Serve: replicas that die, bodies, Serve's own errors; and an actor's metrics."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray import serve as ray_serve
from ray.serve._private.http_util import parse_session_id_header
from ray.serve.config import HTTPOptions
from websockets.asyncio.client import connect as ws_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from actors.launch import connect
from serve.config import ServeConfig
from serve.keys import KeyRing
from serve.keys_command import create_key
from serve.metrics import Metrics, endpoints
from serve.proxy_guard import ProxyGuard

ROOT = Path(__file__).parent.parent.parent
MAX_BODY, BODY_TIMEOUT_S = 50_000, 1.0
USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
GUARD = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy_guard:middlewares",
    "REPERTORY_MAX_BODY_BYTES": str(MAX_BODY),
    "REPERTORY_BODY_TIMEOUT_S": str(BODY_TIMEOUT_S),
    "RAY_metrics_report_interval_ms": "1000",
}


def build(service: Any) -> Any:
    """What a replica serves here, with its protection around it."""
    from fastapi import FastAPI, Request, WebSocket
    from fastapi.responses import JSONResponse, StreamingResponse

    from serve.protection import Protection

    app, left = FastAPI(), []

    @app.post("/v1/chat/completions")
    async def stream(request: Request) -> StreamingResponse:
        asked = await request.json()

        async def chunks():
            for i in range(asked["chunks"]):
                yield f"data: {json.dumps({'i': i})}\n\n".encode()
            if asked.get("hang"):
                try:
                    await asyncio.Event().wait()
                finally:
                    left.append(1)
            yield b"data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type=asked.get("type", "text/event-stream"))

    @app.post("/echo")
    async def echo(request: Request) -> JSONResponse:
        service.metrics.sampled(10, 5, 0.2, 1.0)
        service.metrics.version(7)
        service.metrics.sessions(3)
        service.metrics.tool("calculator", 0.01)
        return JSONResponse({"bytes": len(await request.body()), "headers": dict(request.headers)})

    @app.get("/refused")
    async def refused() -> JSONResponse:
        return JSONResponse({"error": "its own"}, 429, headers={"retry-after": "7"})

    @app.get("/v1/models")
    async def wait(seconds: float = 0) -> dict[str, Any]:
        await asyncio.sleep(seconds)
        return {"left": len(left)}

    @app.websocket("/v1/sessions/{name}/ws")
    async def speak(socket: WebSocket, name: str) -> None:
        await socket.accept()
        while True:
            text = await socket.receive_text()
            if text == "die":
                os._exit(1)
            if text == "bye":
                return await socket.close(4000)
            await socket.send_text(text)

    return Protection(app, service)


@ray_serve.ingress()
class Replica:
    """Makes its application where Ray is, as the agent's replicas do."""

    def __init__(self, keys_file: str):
        config = ServeConfig.model_validate({"model": "m", "http": {"max_body_bytes": 10 * MAX_BODY}})
        keys = KeyRing(Path(keys_file) if keys_file else None)
        self._service = SimpleNamespace(config=config, keys=keys, metrics=Metrics("tiny"))

    def __serve_build_asgi_app__(self) -> Any:
        return build(self._service)


def serve(keys_file: str) -> None:
    """In a process of its own, with a cluster of its own: whose proxy has the guard in its environment."""
    os.environ.update(GUARD)
    connect()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    made: Any = ray_serve.deployment(name="Replica", ray_actor_options={"num_cpus": 0.1})(Replica)
    ray_serve.run(made.options(max_ongoing_requests=50).bind(keys_file), name="main", route_prefix="/main")
    narrow = made.options(max_ongoing_requests=1, max_queued_requests=1).bind("")
    ray_serve.run(narrow, name="narrow", route_prefix="/narrow")
    print(json.dumps({"port": port, "metrics": endpoints()}), flush=True)
    sys.stdin.read()


@dataclass(frozen=True)
class Served:
    port: int
    metrics: str
    key: str

    def client(self, app: str = "main") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}/{app}", headers=headers, timeout=30)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    key = create_key(folder, "k")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder / "keys.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            told = next((line for line in process.stdout if line.startswith("{")), "")
            assert told, (folder / "log").read_text()
            where = json.loads(told)
            yield Served(where["port"], where["metrics"][0], key)
        finally:
            process.communicate(timeout=60)  # its input ends, and with that it does


async def events(response: httpx.Response) -> list[tuple[str, Any]]:
    """(event, data) of a stream that ended properly: else httpx raises."""
    text = (await response.aread()).decode()
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line)
        if "data" in fields:
            data = fields["data"]
            found.append((fields.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
    return found


async def test_errors_of_serve_itself_have_the_shape_of_ours(served):
    async with served.client("nowhere") as client:
        missing = await client.get("/v1/models")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    async with served.client("narrow") as client:
        many = await asyncio.gather(*(client.get("/v1/models", params={"seconds": 1}) for _ in range(6)))
        refused = [r for r in many if r.status_code == 503]
        assert {r.status_code for r in many} == {200, 503} and len(refused) >= 3
        assert all(r.json()["error"]["code"] == "unavailable" and r.headers["retry-after"] == "1" for r in refused)
    async with served.client() as client:
        own = await client.get("/refused")  # the app's go through
        assert own.status_code == 429 and own.json() == {"error": "its own"} and own.headers["retry-after"] == "7"
        assert (await client.get(f"http://127.0.0.1:{served.port}/-/healthz")).text == "success"


async def test_bodies_are_read_before_a_replica_is_asked(served):
    async def chunks(count: int):
        for _ in range(count):
            yield b"x" * 1000

    async with served.client() as client:
        for content in (b"x" * MAX_BODY, chunks(50)):
            response = await client.post("/echo", content=content)
            assert response.json()["bytes"] == MAX_BODY
            assert "authorization" not in response.json()["headers"]  # the app never sees a key
        for content in (b"x" * (MAX_BODY + 1), chunks(51), b"x" * 20_000_000):
            response = await client.post("/echo", content=content)
            assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    start = time.perf_counter()
    writer.write(b"POST /main/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf")
    text = (await asyncio.wait_for(reader.read(), 10)).decode()  # to the end: the connection is closed
    writer.close()
    assert text.startswith("HTTP/1.1 408 ") and '"code": "body_timeout"' in text
    assert BODY_TIMEOUT_S * 0.9 < time.perf_counter() - start < BODY_TIMEOUT_S + 2


async def test_a_client_that_leaves_ends_the_work_behind_the_proxy(served):
    async with served.client() as client:
        before = (await client.get("/v1/models")).json()["left"]
        async with client.stream("POST", "/v1/chat/completions", json={"chunks": 1, "hang": True}) as response:
            assert await anext(response.aiter_bytes()) == b'data: {"i": 0}\n\n'
        async with asyncio.timeout(10):
            while (await client.get("/v1/models")).json()["left"] != before + 1:
                await asyncio.sleep(0.05)


async def test_one_request_id_through_proxy_and_replica(served):
    async with served.client() as client:
        for given, kept in (("abc-1", True), ("no good", False), (None, False)):
            response = await client.get("/v1/models", headers={"x-request-id": given} if given else {})
            (named,) = response.headers.get_list("x-request-id")
            assert (named == given) == kept and len(named) in (5, 32)


async def test_a_websocket_through_proxy_and_protection(served):
    address = f"ws://127.0.0.1:{served.port}/main/v1/sessions/a/ws"
    protocol: Any = f"repertory-key.{served.key}"
    async with ws_connect(address, subprotocols=[protocol]) as socket:
        assert socket.subprotocol == protocol
        await socket.send("hello")
        assert await socket.recv() == "hello"
        await socket.send("bye")
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 4000
    with pytest.raises(InvalidStatus) as refused:
        await ws_connect(address)
    assert refused.value.response.status_code == 401 and b"missing_key" in (refused.value.response.body or b"")


async def test_what_was_counted_is_at_the_nodes_metrics_port(served):
    async with served.client() as client, asyncio.timeout(40):
        assert (await client.post("/echo")).status_code == 200
        while True:
            text = (await client.get(served.metrics)).text
            if "ray_repertory_tool_seconds_count" in text and 'code="missing_key"' in text:
                break
            await client.get("/v1/models", headers={"Authorization": ""})
            await asyncio.sleep(0.5)
    lines = [line for line in text.splitlines() if line.startswith("ray_repertory_")]
    assert all('model="tiny"' in line for line in lines)

    def value(name: str, *labels: str) -> float:
        found = [line for line in lines if line.startswith(f"ray_repertory_{name}{{")]
        return max(float(line.split()[-1]) for line in found if all(label in line for label in labels))

    assert value("version", 'role="stable"') == 7 and value("sessions") == 3
    assert value("requests_total", 'route="/echo"', 'status="200"') >= 1
    assert value("tokens_total", 'kind="sampled"') * 2 == value("tokens_total", 'kind="prompt"')
    assert value("time_to_first_token_seconds_count") == value("time_per_output_token_seconds_count") >= 1
    assert value("time_per_output_token_seconds_bucket", 'le="0.1"') == 0
    assert value("time_per_output_token_seconds_bucket", 'le="0.2"') == value("time_per_output_token_seconds_count")
    assert value("tool_seconds_bucket", 'tool="calculator"', 'le="0.025"') >= 1
    assert value("in_flight_requests") == 0


async def test_what_clients_get_when_the_replica_that_answers_them_dies(served):
    """All of it at once, from one death: a stream, OpenAI's client, a WebSocket, and what could not be told."""
    openai = pytest.importorskip("openai")
    asked = {"chunks": 3, "hang": True}
    address = f"ws://127.0.0.1:{served.port}/main/v1/sessions/a/ws"
    base = f"http://127.0.0.1:{served.port}/main/v1"
    key: Any = f"repertory-key.{served.key}"
    openais = openai.AsyncOpenAI(base_url=base, api_key=served.key, max_retries=0)
    async with served.client() as client, openais, ws_connect(address, subprotocols=[key]) as ws:
        whole = await events(await client.post("/v1/chat/completions", json={"chunks": 3}))
        assert [data for _, data in whole] == [{"i": 0}, {"i": 1}, {"i": 2}, "[DONE]"]

        async def through_openai() -> str | None:
            stream = await openais.chat.completions.create(model="m", messages=[], stream=True, extra_body=asked)
            with pytest.raises(openai.APIError) as caught:
                async for _ in stream:
                    pass
            return caught.value.code

        streamed = asyncio.ensure_future(client.post("/v1/chat/completions", json=asked))
        raising = asyncio.ensure_future(through_openai())
        plain = asyncio.ensure_future(client.post("/v1/chat/completions", json={**asked, "type": "application/json"}))
        headers = {"x-request-id": "mine"}
        unanswered = asyncio.ensure_future(client.get("/v1/models", params={"seconds": 60}, headers=headers))
        await asyncio.sleep(1.5)
        await ws.send("die")

        broken = await events(await streamed)
        assert [data for _, data in broken[:3]] == [{"i": 0}, {"i": 1}, {"i": 2}]
        ((name, data),) = broken[3:]
        assert name == "error" and data["error"]["code"] == "replica_died" and data["error"]["resume"] is True
        assert data["code"] == "replica_died" and data["resume"] is True  # where a session's events have them
        assert await raising == "replica_died"
        with pytest.raises(httpx.RemoteProtocolError):  # what is no stream of events cannot say so, and is cut
            await plain
        response = await unanswered
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "unavailable"
        assert response.headers.get_list("x-request-id") == ["mine"]
        told = json.loads(await ws.recv())
        assert told["type"] == "error" and told["code"] == "replica_died" and told["resume"] is True
        with pytest.raises(ConnectionClosed) as closed:
            await ws.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012  # service restart
        assert (await client.get("/v1/models")).status_code == 200  # from the next replica


def test_metrics_outside_of_ray_are_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # other tests of this process may have started one
    metrics = Metrics()
    metrics.request("/", 200, 0.1)
    metrics.sampled(1, 2, 0.1, 0.2)
    assert type(metrics._requests).__name__ == "_Nothing"


async def guarded(app: Any, path: str = "/x") -> list[dict[str, Any]]:
    """What the guard sends for an app, without a server."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    await ProxyGuard(app, 10, 1.0)({"type": "http", "method": "GET", "path": path, "headers": []}, receive, send)
    return sent


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (503, [], (503, "unavailable", b"1")),
        (429, [(b"retry-after", b"3")], (429, "overloaded", b"3")),
        (408, [], (408, "deadline_exceeded", None)),
        (404, [], (404, "not_found", None)),
        (500, [], (503, "unavailable", b"1")),
    ],
)
async def test_each_plain_answer_of_serve_is_named(status, headers, expected):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers_ = [(b"content-type", b"text/plain; charset=utf-8"), *headers]
        await send({"type": "http.response.start", "status": status, "headers": headers_})
        await send({"type": "http.response.body", "body": b"Internal details"})

    start, body = await guarded(app)
    told = dict(start["headers"])
    code = json.loads(body["body"])["error"]["code"]
    assert (start["status"], code, told.get(b"retry-after")) == expected
    assert told[b"content-type"] == b"application/json" and len(told[b"x-request-id"]) == 32
    assert [m.get("body") for m in await guarded(app, "/-/routes")][1] == b"Internal details"  # Serve's own paths


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("path", "sent", "expected"),
    [
        ("/v1/sessions/ab-1/turns", None, "ab-1"),
        ("/v1/sessions/ab-1", "another", "ab-1"),
        ("/v1/sessions", "mine", "mine"),
        ("/v1/chat/completions", None, ""),
        ("/v1/sessions/a b\n/turns", None, ""),
    ],
)
async def test_serves_router_hears_which_session_a_path_is_about(kind, path, sent, expected):
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await send({"type": "websocket.close"} if kind == "websocket" else {"type": "http.response.body"})

    async def nothing(*_: Any) -> Any:
        return {"type": "http.disconnect"}

    headers = [(b"host", b"h")] + ([(b"X_Session_Id", sent.encode())] if sent else [])
    await ProxyGuard(app, 10, 1.0)({"type": kind, "method": "GET", "path": path, "headers": headers}, nothing, nothing)
    assert parse_session_id_header(dict(seen[0]["headers"])) == expected
    assert (b"host", b"h") in seen[0]["headers"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"messages": [USER]}, {"messages": [{"role": "system", "content": "s"}, USER, REPLY, USER]}, True),
        ({"messages": [USER]}, {"messages": [{"role": "user", "content": "other"}, USER]}, False),
        ({"messages": [USER], "prompt_cache_key": "a"}, {"messages": [REPLY], "prompt_cache_key": "a"}, False),
        ({"messages": [USER], "prompt_cache_key": "a"}, {"messages": [REPLY, USER], "prompt_cache_key": "b"}, False),
        ({"messages": [USER, REPLY], "prompt_cache_key": "a"}, {"messages": [USER], "prompt_cache_key": "a"}, True),
    ],
)
async def test_a_chats_requests_come_to_the_replica_that_remembers_it(one, other, same):
    first, second = [await routed(json.dumps(body).encode()) for body in (one, other)]
    assert first and (first == second) == same
    assert await routed(json.dumps(one).encode(), sent=b"mine") == "mine"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'{"messages": 3}', b'{"messages": [[]]}', b"[" * 99_999])
async def test_what_is_no_chat_goes_anywhere(body):
    assert await routed(body) == ""



async def routed(body: bytes, sent: bytes | None = None) -> str:
    """What Serve's router takes for the session of a chat."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, await receive()))

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(_: Any) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
    headers = [] if sent is None else [(b"x-session-id", sent)]
    await ProxyGuard(app, 1 << 20, 1.0)({**scope, "headers": headers}, receive, send)
    ((scope, message),) = seen
    assert message["body"] == body
    return parse_session_id_header(dict(scope["headers"]))


async def test_bodies_that_are_read_at_a_time_are_bounded(monkeypatch):
    """Whose they are nobody knows yet."""
    monkeypatch.setattr("serve.proxy_guard._MOST_BODIES", 2)
    goes_on, statuses = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def receive() -> Any:
        await goes_on.wait()
        return {"type": "http.request", "body": b"x"}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    guard = ProxyGuard(app, 10, 5.0)
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
    asked = [asyncio.ensure_future(guard({**scope}, receive, send)) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert statuses == [429, None]
    goes_on.set()
    await asyncio.gather(*asked)
    assert statuses.count(200) == 2


if __name__ == "__main__":
    serve(sys.argv[1])
