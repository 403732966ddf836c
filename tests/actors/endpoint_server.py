"""An OpenAI-compatible server whose models are the calculator's demonstrator, with the faults of real ones."""

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rl.env import Message
from rl.envs.calculator import CalculatorConfig, CalculatorTasks, Expression
from rl.task import Task

PROMPT_TOKENS, TURN_TOKENS, SEEN_TOKENS = 50, 7, 3


def expression(text: str) -> Expression:
    first, *others = re.findall(r"[+\-*]|\d+", text)
    return Expression((int(first), *map(int, others[1::2])), tuple(others[::2]))


def demonstrated(question: str, turn: int) -> Message:
    """What the demonstrator says in a turn, from 0 on."""
    shown = expression(question)
    answer = str(eval(question))  # digits and operators alone, by the pattern of the caller's task
    task = Task("", {"expression": shown}, answer)
    messages = CalculatorTasks(CalculatorConfig(name="calculator"), 0).demonstrate(task, None, guess=False)  # type: ignore[arg-type]
    return list(messages)[turn]


@dataclass
class Server:
    """says: (question, turn, body) -> a message, or a whole response; fault: (number of the request) -> a response, or
    none. bodies and headers hold what came in, faults how many requests had one, played how often
    each (model, question, turn, temperature, seed) was answered, most how many were under way at once."""

    says: Callable[[str, int, dict[str, Any]], Any] = lambda question, turn, body: demonstrated(question, turn)
    fault: Callable[[int], Response | None] = lambda number: None
    models: tuple[str, ...] = ("scripted",)
    key: str | None = None
    delay_s: float = 0.0
    usage: bool = True
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    played: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    flying: int = 0
    most: int = 0
    requests: int = 0
    faults: int = 0

    async def answer(self, request: Request) -> Response:
        self.requests += 1
        number = self.requests  # others come in while this one's body is read
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            self.headers.append(dict(request.headers))
            body = json.loads(await request.body())
            self.bodies.append(body)
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                told = f"Incorrect API key provided: {request.headers.get('authorization')}"
                return JSONResponse({"error": {"message": told}}, 401)
            if body["model"] not in self.models:
                return JSONResponse({"error": {"message": f"The model `{body['model']}` does not exist"}}, 404)
            if (wrong := self.fault(number)) is not None:
                self.faults += 1
                return wrong
            await asyncio.sleep(self.delay_s)
            question = next(m["content"] for m in body["messages"] if m["role"] == "user")
            turn = sum(m["role"] == "assistant" for m in body["messages"])
            said = self.says(question, turn, body)
            if isinstance(said, Response):
                return said
            self.played[body["model"], question, turn, body["temperature"], body["seed"]] += 1
            return JSONResponse(self.completion(said, turn))
        finally:
            self.flying -= 1

    def completion(self, message: Message, turn: int) -> dict[str, Any]:
        finish = message.pop("finish_reason", "stop")
        calls = [
            {
                "id": f"from-the-server-{i}",
                "type": "function",
                "function": {**c["function"], "arguments": as_text(c["function"]["arguments"])},
            }
            for i, c in enumerate(message.get("tool_calls", ()))
        ]
        told = {"role": "assistant", "content": message["content"] or None, **({"tool_calls": calls} if calls else {})}
        answer: dict[str, Any] = {"object": "chat.completion", "choices": [{"message": told, "finish_reason": finish}]}
        if self.usage:
            prompt = PROMPT_TOKENS + turn * (TURN_TOKENS + SEEN_TOKENS)
            answer["usage"] = {"prompt_tokens": prompt, "completion_tokens": TURN_TOKENS}
        return answer


def as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def broken_off() -> Response:
    """An answer that ends before its end: the connection is closed in the middle."""

    async def part() -> Any:
        yield b'{"choices": ['

    return StreamingResponse(part(), headers={"content-length": "1000"}, media_type="application/json")


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    app = Starlette(routes=[Route("/v1/chat/completions", server.answer, methods=["POST"])])
    # Configuring logs would close the handlers of whatever the other tests import, one of them with pytest's stderr.
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, log_level="critical", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not running.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join(10)
