"""The HTTP and WebSocket routes of sessions (/v1/sessions) and of what they can be about (/v1/envs)."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError

from serve.ask import Ask, counted
from serve.attended import SSE_HEADERS, ClientGone, attended, refusal
from serve.errors import REFUSALS, ApiError
from serve.journal import Event, fold
from serve.keys import Caller
from serve.schema import FeedbackRequest, SessionRequest, TurnRequest
from serve.session import Session

if TYPE_CHECKING:
    from serve.service import Service

_MOST = (1 << 31) - 1
_SLACK_S = 5.0
"""After a turn's own deadline: what it ends with is still to be told."""
Id = Annotated[str, Path(max_length=100)]


def caller_of(connection: Request | WebSocket) -> Caller:
    return connection.scope["state"]["caller"]


def sse(event: Event) -> str:
    """A server-sent event: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    data = json.dumps({k: v for k, v in event.items() if k not in ("seq", "type")}, ensure_ascii=False)
    return f"id: {event['seq']}\nevent: {event['type']}\ndata: {data}\n\n"


async def _stream(session: Session, after: int) -> AsyncIterator[bytes]:
    events = session.follow(after)
    try:
        async for event in events:
            yield sse(event).encode("utf-8", "backslashreplace")
    finally:
        await events.aclose()


def _streamed(session: Session, after: int) -> StreamingResponse:
    headers = {**SSE_HEADERS, "x-weight-version": str(session.version)}
    return StreamingResponse(_stream(session, after), media_type="text/event-stream", headers=headers)


def router(service: "Service") -> APIRouter:
    """Every route of sessions."""
    routes = APIRouter(prefix="/v1", responses=REFUSALS)
    sessions = service.sessions

    @routes.post("/sessions", status_code=201)
    async def create_session(request: Request, asked: SessionRequest) -> JSONResponse:
        """Make a session: a task of an environment for the agent to play, or a conversation with it."""
        await service.check_system(asked)
        return JSONResponse(sessions.create(caller_of(request), asked).shown(), 201)

    @routes.get("/sessions")
    async def list_sessions(request: Request) -> JSONResponse:
        """The caller's newest sessions."""
        return JSONResponse({"object": "list", "data": sessions.mine(caller_of(request))})

    @routes.get("/sessions/{session_id}")
    async def show_session(request: Request, session_id: Id) -> JSONResponse:
        return JSONResponse(sessions.find(caller_of(request), session_id).shown())

    @routes.delete("/sessions/{session_id}", status_code=204)
    async def delete_session(request: Request, session_id: Id) -> Response:
        """Delete it, with its journal and what was collected of it."""
        await sessions.delete(caller_of(request), session_id)
        return Response(status_code=204)

    @routes.post("/sessions/{session_id}/turns")
    async def play_turn(request: Request, session_id: Id, asked: TurnRequest) -> Response:
        """Say something, or let the agent go on, and see what happens: events until it is the person's turn again."""
        session = sessions.find(caller_of(request), session_id)
        after = await _begun(service, session, asked, request.scope["state"]["place"])
        if asked.stream:
            return _streamed(session, after)
        try:
            events = await attended(request, _all(session, after), service.config.http.deadline_s + _SLACK_S)
        except ClientGone:
            return Response(status_code=499)
        headers = {"x-weight-version": str(session.version)}
        return JSONResponse({"session": session.shown(), "events": events}, headers=headers)

    @routes.get("/sessions/{session_id}/events")
    async def show_events(
        request: Request,
        session_id: Id,
        after: Annotated[int, Query(ge=-1, le=_MOST)] = -1,
        stream: bool = True,
        last_event_id: Annotated[str | None, Header(max_length=20)] = None,
    ) -> Response:
        """The events after a seq, and on while a turn is under way: for who comes back after a lost connection."""
        session = sessions.find(caller_of(request), session_id)
        if last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit():
            after = int(last_event_id)
        if stream:
            return _streamed(session, after)
        return JSONResponse({"session": session.shown(), "events": session.journal.events[after + 1 :]})

    @routes.post("/sessions/{session_id}/stop")
    async def stop_turn(request: Request, session_id: Id) -> JSONResponse:
        """End the turn under way. What it has sampled so far does not count."""
        session = sessions.find(caller_of(request), session_id)
        stopped = session.stop()
        return JSONResponse({"stopped": stopped, "session": session.shown()})

    @routes.post("/sessions/{session_id}/feedback")
    async def rate_turn(request: Request, session_id: Id, asked: FeedbackRequest) -> JSONResponse:
        """Rate a turn, or say what the agent should have said. Kept for training where the session says `collect`."""
        session = sessions.find(caller_of(request), session_id)
        return JSONResponse(await service.rate(session, asked))

    @routes.websocket("/sessions/{session_id}/ws")
    async def speak(socket: WebSocket, session_id: str) -> None:
        """Send turns as JSON, get events as JSON."""
        await socket.accept()
        with suppress(WebSocketDisconnect):
            await Spoken(service, socket, session_id).listen()

    @routes.get("/envs")
    async def list_envs() -> JSONResponse:
        """What sessions can be about."""
        return JSONResponse(service.envs_shown())

    @routes.get("/envs/{name}/tasks")
    async def show_task(
        name: Annotated[str, Path(max_length=200)],
        split: Annotated[str, Query(pattern="^(held_out|train)$")] = "held_out",
        index: Annotated[int, Query(ge=0, le=_MOST)] = 0,
    ) -> JSONResponse:
        """A task's question, before it is played."""
        return JSONResponse(await service.question(name, split, index))

    @routes.get("/releases")
    async def list_releases() -> JSONResponse:
        """Which weight versions there are, and which are served."""
        return JSONResponse(service.releases_shown())

    return routes


async def _begun(service: "Service", session: Session, asked: TurnRequest, place: ExitStack) -> int:
    """place: among what may be under way at a time. The turn keeps it, also when its client has gone."""
    ask = Ask(asked.content, asked.retry, asked.turn, asked.stream)
    ask = await counted(service, session.created, fold(session.journal.events), ask)
    return session.begin(ask, place)


async def _all(session: Session, after: int) -> list[Event]:
    return [event async for event in session.follow(after)]


class Spoken:
    """A session over a WebSocket: turns come in as JSON, events go out. One turn at a time."""

    def __init__(self, service: "Service", socket: WebSocket, session_id: str):
        self._service, self._socket, self._id = service, socket, session_id
        self._turn: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Until the client goes. It may go in the middle of a turn, which then has the same grace as over SSE."""
        try:
            while True:
                message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                try:
                    self._hear(message.get("text"))
                except ApiError as error:
                    await self._refuse(error)
        finally:
            if self._turn is not None:
                self._turn.cancel()
                await asyncio.gather(self._turn, return_exceptions=True)

    def _hear(self, text: str | None) -> None:
        """Begin a turn, or stop the one under way. Raises ApiError."""
        under_way = self._turn is not None and not self._turn.done()
        if under_way and text is not None and _is_stop(text):
            self._find().stop()
            return
        asked = _turn_request(text)
        if under_way:
            raise ApiError(409, "turn_under_way", "a turn of this session is under way: wait for it, or stop it")
        self._turn = asyncio.ensure_future(self._play(asked))

    def _find(self) -> Session:
        return self._service.sessions.find(caller_of(self._socket), self._id)

    async def _play(self, asked: TurnRequest) -> None:
        try:
            async with self._socket.scope["state"]["turn"]() as place:
                session = self._find()
                events = session.follow(await _begun(self._service, session, asked, place))
                try:
                    async for event in events:
                        await self._socket.send_json(event)
                finally:
                    await events.aclose()
        except WebSocketDisconnect:
            raise
        except Exception as error:
            refused = refusal(error)
            with suppress(OSError, RuntimeError, WebSocketDisconnect):  # unless it is the client that has gone
                await self._refuse(refused)
                if refused.status in (401, 404):
                    await self._socket.close(4000 + refused.status)

    async def _refuse(self, error: ApiError) -> None:
        await self._socket.send_json({**error.body()["error"], "type": "error"})


def _turn_request(text: str | None) -> TurnRequest:
    """Raises ApiError."""
    if text is None:
        raise ApiError(400, "invalid_request", "send turns as text, in JSON")
    try:
        return TurnRequest.model_validate_json(text)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ApiError(400, "invalid_request", f"{where}: {first['msg']}" if where else first["msg"]) from None


def _is_stop(text: str) -> bool:
    """{"stop": true}, in the middle of a turn."""
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(asked, dict) and asked.get("stop") is True
