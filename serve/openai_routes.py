"""OpenAI's routes: /v1/models, /v1/chat/completions and /v1/completions."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Send

from serve.attended import SSE_HEADERS, ClientGone, attended, refusal
from serve.completions import Asked, Completions, Turn
from serve.errors import REFUSALS, ApiError
from serve.openai_answers import JSON, Answer
from serve.openai_schema import ChatRequest, CompletionRequest, parse, schema, text_of
from serve.versions import TRIES, UnknownVersion

if TYPE_CHECKING:
    from serve.service import Service

_RESPONSES: dict[int | str, Any] = {
    200: {"description": "OpenAI's answer, with `weight_version`; server-sent events when `stream` is true"},
    **REFUSALS,
}


def router(service: "Service") -> APIRouter:
    """The routes, and what this replica remembers of what it has said."""
    routes = APIRouter(prefix="/v1", responses=_RESPONSES)
    work = Completions(service)

    @routes.get("/models")
    async def list_models() -> Response:
        """The model under its name, and every version that can be asked for."""
        return _json({"object": "list", "data": _models(service)})

    @routes.get("/models/{model}")
    async def show_model(model: str) -> Response:
        for shown in _models(service):
            if shown["id"] == model:
                return _json(shown)
        raise ApiError(404, "model_not_found", "there is no such model here; GET /v1/models lists them", param="model")

    @routes.post("/chat/completions", openapi_extra=schema(ChatRequest))
    async def chat(request: Request) -> Response:
        """The assistant's next turn in a conversation."""
        raw = await request.body()
        body = parse(ChatRequest, raw)
        opening = next((text_of(m.content) for m in body.messages if m.role == "user"), "")
        key = _key(request, body.prompt_cache_key or body.user, opening)
        version = service.version_of(body.model, key)
        asked = await work.chat(body, len(raw))
        tells = (body.top_logprobs or 0) if body.logprobs else None
        return await answer(request, body, asked, version, key, tells)

    @routes.post("/completions", openapi_extra=schema(CompletionRequest))
    async def complete(request: Request) -> Response:
        """How texts go on. A text is no more than text: control tokens in it can only be given as ids."""
        raw = await request.body()
        body = parse(CompletionRequest, raw)
        key = _key(request, body.user, json.dumps(body.prompt))
        version = service.version_of(body.model, key)
        asked = await work.texts(body, len(raw))
        return await answer(request, body, asked, version, key, body.logprobs)

    async def answer(
        request: Request, body: Any, asked: list[Asked], version: int, key: str, tells: int | None
    ) -> Response:
        tried = 1
        while True:
            try:
                return await answered(request, body, asked, version, tells)
            except UnknownVersion:  # it was given up while this waited for it, and nothing has been said: take another
                if tried == TRIES or "@" in body.model:
                    raise
                tried, version = tried + 1, service.version_of(body.model, key)

    async def answered(request: Request, body: Any, asked: list[Asked], version: int, tells: int | None) -> Response:
        shape = Answer(service.codec, service.name, version, asked, tells=tells)
        echo = bool(getattr(body, "echo", False))
        deadline_s = service.config.http.deadline_s
        headers = {"x-weight-version": str(version)}
        try:
            if not body.stream:
                turns = await attended(request, work.turns(asked, version), deadline_s)
                return _json(shape.whole(turns, echo), headers)
            deadline = asyncio.get_running_loop().time() + deadline_s
            events = _events(work, shape, asked, version, deadline, echo, body.usage_wanted)
            try:
                # An error that comes before the first token has a status of its own.
                first = await attended(request, anext(events), deadline_s)
            except BaseException:
                await events.aclose()
                raise
            return _Events(_sent(first, events), media_type="text/event-stream", headers={**SSE_HEADERS, **headers})
        except ClientGone:
            return Response(status_code=499)

    return routes


# -- streams -----------------------------------------------------------------------------------------------------------


async def _events(
    work: Completions,
    shape: Answer,
    asked: Sequence[Asked],
    version: int,
    deadline: float,
    echo: bool,
    usage: bool,
) -> AsyncGenerator[JSON]:
    """The chunks of an answer, the first of them when something has been sampled."""
    turns: dict[int, Turn] = {}
    opened = False
    async with contextlib.aclosing(work.pieces(asked, version, deadline)) as pieces:
        async for index, item in pieces:
            if not opened:
                opened = True
                for chunk in shape.opening(echo):
                    yield chunk
            if isinstance(item, Turn):
                turns[index] = item
                for chunk in shape.closing(index, item):
                    yield chunk
            elif (chunk := shape.piece(index, item)) is not None:
                yield chunk
    if usage:
        yield shape.usage([turns[a.index] for a in asked])


async def _sent(first: JSON, events: AsyncGenerator[JSON]) -> AsyncGenerator[bytes]:
    """As server-sent events. An error is the last of them."""
    async with contextlib.aclosing(events):
        yield _event(first)
        try:
            async for event in events:
                yield _event(event)
        except Exception as error:  # the status has been sent: it can only be told in the stream
            yield _event(refusal(error).body())
        else:
            yield b"data: [DONE]\n\n"


def _event(data: JSON) -> bytes:
    return b"data: " + _encoded(data) + b"\n\n"


class _Events(StreamingResponse):
    """Ends what it sends when the client has gone, at once."""

    async def stream_response(self, send: Send) -> None:
        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


# -- answers -----------------------------------------------------------------------------------------------------------


def _encoded(data: JSON) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _json(data: JSON, headers: dict[str, str] | None = None) -> Response:
    return Response(_encoded(data), media_type="application/json", headers=headers)


def _key(request: Request, named: str | None, opening: str) -> str:
    """What a conversation is told by, so that all its turns are of the same version."""
    what = named or hashlib.blake2b(opening.encode(), digest_size=16).hexdigest()
    return f"{request.scope['state']['caller'].id}/{what}"


def _models(service: "Service") -> list[JSON]:
    releases = service.releases
    ready = [r for r in releases.versions if r.state == "ready"]
    stable = [(service.name, r) for r in ready if r.version == releases.stable]
    return [
        {
            "id": name,
            "object": "model",
            "created": int(release.time),
            "owned_by": "repertory",
            "max_model_len": service.max_length,
            "weight_version": release.version,
        }
        for name, release in [*stable, *((f"{service.name}@{r.version}", r) for r in ready)]
    ]
