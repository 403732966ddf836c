"""The load command: its figures are right, it finds what is lost or crossed, and says at once what it cannot reach."""

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from rich.console import Console
from running import repertory
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rl.config_file import ConfigError
from serve.bench import Load, bench
from serve.bench_report import Report, Tally, percentiles, show
from serve.bench_talk import Talk


def test_percentiles_by_hand():
    """Linear between the two values around: at 0.9 of the way through five, 0.6 of the way from the fourth."""
    found = percentiles([5.0, 1.0, 4.0, 2.0, 3.0])
    assert found == pytest.approx({"p50": 3.0, "p90": 4.6, "p99": 4.96, "max": 5.0})
    assert percentiles([0.25]) == {"p50": 0.25, "p90": 0.25, "p99": 0.25, "max": 0.25}
    assert percentiles([]) is None


def test_a_report_by_hand():
    tally = Tally([0.1, 0.3], tokens=40, versions=[1, 1, 2, 2, 1], errors=Counter({"429 overloaded": 3}), own=1)
    report = Report.of(tally, seconds=4.0, client_cpu=0.5)
    assert (report.requests, report.requests_per_s, report.tokens_per_s) == (2, 0.5, 10.0)
    assert report.versions == {"1": 3, "2": 2} and report.version_changes == 2
    assert report.own_number == 0.5 and report.first_token_s is None
    assert json.loads(json.dumps(report.as_json()))["latency_s"]["p50"] == pytest.approx(0.2)
    console = Console(record=True, width=120)
    show(report, console)
    text = console.export_text()
    parts = "0.5 requests/s, 10 tokens/s", "200", "3 x 429 overloaded", "1: 3, 2: 2 (changed 2 times)", "lost: none"
    for part in parts:
        assert part in text


JOURNAL: list[dict[str, Any]] = [
    {"seq": 0, "type": "created"},
    {"seq": 1, "type": "user", "content": "12+34"},
    {"seq": 2, "type": "turn"},
    {"seq": 3, "type": "waiting"},
]


def talk(said: list[str], events: list[tuple[int, str]], unsure: bool = False) -> Talk:
    return Talk((12, 34), said, "s", events, unsure)


@pytest.mark.parametrize(
    ("talk", "lost", "crossed"),
    [
        (talk(["12+34"], [(1, "user"), (2, "turn"), (3, "waiting")]), None, None),
        (talk(["12+34"], []), None, None),
        (talk(["12+34", "34+12"], [(1, "user")]), "was told", None),
        (talk(["12+34", "34+12"], [(1, "user")], unsure=True), None, None),
        (talk([], []), "was told", "said elsewhere"),
        (talk(["12+34"], [(1, "user"), (3, "waiting")]), "only 2 came", None),
        (talk(["12+34"], [(1, "user"), (2, "waiting")]), None, "waiting 2"),
        (talk(["12+34"], [(3, "waiting"), (4, "user")]), None, "user 4"),
    ],
)
def test_a_session_is_held_against_its_journal(talk, lost, crossed):
    for found, says in ((talk.lost_in(JOURNAL), lost), (talk.crossed_in(JOURNAL), crossed)):
        assert bool(found) == bool(says), found
        assert says is None or says in found[0]


def test_questions_hold_both_numbers():
    asks = Talk((1234, 5678))
    assert [asks.question() for _ in range(4)] == ["1234+5678", "5678+1234", "1234-5678", "5678-1234"]


class Stub:
    """A server with OpenAI's chat completions that can be told to go wrong."""

    def __init__(self) -> None:
        self.wrong = self.url = ""
        self._heard: list[str] = []
        self._seen = 0

    async def models(self, request: Request) -> Response:
        if request.headers.get("authorization") != "Bearer right" and self.wrong == "key":
            return JSONResponse({"error": {"code": "invalid_api_key"}}, 401)
        if self.wrong == "page":
            return Response("<html>", media_type="text/html")
        return JSONResponse({"data": [{"id": "agent"}, {"id": "agent@2"}]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self._seen += 1
        headers = {"x-weight-version": str(self._seen % 2)}
        if self.wrong == "busy" and self._seen % 2:
            error = {"error": {"code": "overloaded"}}
            return JSONResponse(error, 429, headers={"retry-after": "0"})
        if self.wrong == "full" and len(body["messages"]) > 1:
            return JSONResponse({"error": {"code": "context_length_exceeded"}}, 400)
        question = body["messages"][-1]["content"]
        self._heard.append(question)
        await asyncio.sleep(0.02)  # others come meanwhile
        said = self._heard[-1] if self.wrong == "crossed" else question
        if not body.get("stream"):
            usage = {"completion_tokens": 7}
            return JSONResponse({"choices": [{"message": {"content": said}}], "usage": usage}, headers=headers)
        return StreamingResponse(self._streamed(said), media_type="text/event-stream", headers=headers)

    async def _streamed(self, said: str) -> Any:
        for part in re.split(r"(?<=\D)", said):
            yield f"data: {json.dumps({'choices': [{'delta': {'content': part}}]})}\n\n: still here\n\n"
            await asyncio.sleep(0.05)
        if self.wrong == "broken":
            return
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 7}})}\n\ndata: [DONE]\n\n"


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    routes = [Route("/v1/models", made.models), Route("/v1/chat/completions", made.chat, methods=["POST"])]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    made.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield made
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_is_counted_and_its_own(stub, stream):
    report = await bench(Load(stub.url, concurrency=4, turns=2, requests=12, stream=stream))
    assert 12 <= report.requests <= 16 and not report.errors and not report.lost and not report.crossed
    assert report.tokens == 7 * report.requests and report.own_number == 1.0
    assert set(report.versions) == {"0", "1"} and report.version_changes > 0
    assert report.latency_s is not None and report.latency_s["p50"] > (0.1 if stream else 0.02)
    assert 0 < report.client_cpu < 2
    if stream:
        assert report.first_token_s is not None and report.between_s is not None
        assert report.first_token_s["p50"] < 0.05 < report.between_s["max"] < 0.2
    else:
        assert report.first_token_s is None


async def test_the_time_ends_it(stub):
    report = await bench(Load(stub.url, concurrency=2, duration_s=0.3))
    assert 0.3 < report.seconds < 1 and report.requests > 4


async def test_a_conversation_that_is_full_is_followed_by_another(stub):
    stub.wrong = "full"
    report = await bench(Load(stub.url, concurrency=2, turns=3, requests=12))
    assert not report.errors and 6 <= report.requests <= 8


@pytest.mark.parametrize(
    ("wrong", "stream", "field", "says"),
    [
        ("crossed", False, "crossed", "holds the numbers of"),
        ("broken", True, "lost", "the stream ended before the answer did"),
        ("busy", False, "errors", "429 overloaded"),
    ],
)
async def test_what_goes_wrong_is_found(stub, wrong, stream, field, says):
    stub.wrong = wrong
    report = await bench(Load(stub.url, concurrency=4, turns=2, requests=12, stream=stream))
    assert any(says in what for what in getattr(report, field))


@pytest.mark.parametrize(
    ("wrong", "load", "says"),
    [
        ("", {"model": "other"}, "does not serve 'other'; it serves agent, agent@2"),
        ("key", {}, "wants a key: --api-key-env"),
        ("key", {"key": "wrong"}, "does not take this key"),
        ("page", {}, "lists no model"),
        ("", {"kind": "sessions"}, "/v1/envs answers 404"),
    ],
)
async def test_a_server_that_cannot_be_asked_is_told_in_one_line(stub, wrong, load, says):
    stub.wrong = wrong
    with pytest.raises(ConfigError, match=says) as refused:
        await bench(Load(stub.url, **load))
    assert "\n" not in str(refused.value)


async def test_the_right_key_is_let_in(stub):
    stub.wrong = "key"
    assert (await bench(Load(stub.url, concurrency=1, requests=1, key="right"))).requests >= 1


@pytest.mark.parametrize(("url", "says"), [("http://127.0.0.1:9", "nothing answers"), ("ftp://x", "give a URL")])
async def test_a_url_without_a_server(url, says):
    with pytest.raises(ConfigError, match=says):
        await bench(Load(url))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("env", [None, "calculator"])
async def test_sessions_of_a_real_server_are_all_there(server, env, stream):
    load = Load(server.url, kind="sessions", env=env, concurrency=6, turns=2, requests=12, stream=stream, max_tokens=24)
    report = await bench(load)
    assert report.requests >= 12 and report.tokens > 0
    assert not report.errors and not report.lost and not report.crossed
    assert set(report.versions) == {"1"}
    with server.client() as client:
        assert client.get("/v1/sessions").json()["data"] == [], "it cleans up"


async def test_chat_completions_of_a_real_server(server):
    report = await bench(Load(server.url, concurrency=6, turns=2, requests=12, stream=True, max_tokens=24))
    assert report.requests >= 12 and not report.errors and not report.lost and not report.crossed
    assert report.first_token_s is not None and report.tokens > 0


def test_the_command(server, tmp_path):
    figures = tmp_path / "figures.json"
    done = repertory("bench-serve", server.url, "--concurrency", "2", "--duration", "0.5", "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "requests/s" in done.stdout and "whole request" in done.stdout
    assert json.loads(figures.read_text())["requests"] > 0
    for arguments, says in ((["--env", "calculator"], "--sessions"), (["--model", "x"], "does not serve 'x'")):
        done = repertory("bench-serve", server.url, *arguments)
        told = done.stdout + done.stderr
        assert done.returncode != 0 and says in told and "Traceback" not in told
