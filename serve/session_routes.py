"""The HTTP and WebSocket routes of sessions (/v1/sessions) and of what they can be about (/v1/envs)."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError

from serve.errors import ApiError
from serve.journal import Event
from serve.keys import Caller
from serve.schema import FeedbackRequest, SessionRequest, TurnRequest
from serve.session import Ask, Session

if TYPE_CHECKING:
    from serve.service import Service

_MOST = (1 << 31) - 1
Id = Annotated[str, Path(max_length=100)]
_SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


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
    headers = {**_SSE_HEADERS, "x-weight-version": str(session.version)}
    return StreamingResponse(_stream(session, after), media_type="text/event-stream", headers=headers)


def router(service: "Service") -> APIRouter:
    """Every route of sessions."""
    routes = APIRouter(prefix="/v1")
    sessions = service.sessions

    @routes.post("/sessions", status_code=201)
    async def create_session(request: Request, asked: SessionRequest) -> JSONResponse:
        """Make a session: a task of an environment for the agent to play, or a conversation with it."""
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
        sessions.delete(caller_of(request), session_id)
        return Response(status_code=204)

    @routes.post("/sessions/{session_id}/turns")
    async def play_turn(request: Request, session_id: Id, asked: TurnRequest) -> Response:
        """Say something, or let the agent go on, and see what happens: events until it is the person's turn again."""
        session = sessions.find(caller_of(request), session_id)
        after = session.begin(Ask(asked.content, asked.retry, asked.turn, asked.stream))
        if asked.stream:
            return _streamed(session, after)
        events = [event async for event in session.follow(after)]
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
        try:
            await _spoken(socket, sessions.find(caller_of(socket), session_id))
        except ApiError as error:
            await socket.send_json({**error.body()["error"], "type": "error"})
            await socket.close(4404 if error.status == 404 else 4000)
        except WebSocketDisconnect:
            pass

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


async def _spoken(socket: WebSocket, session: Session) -> None:
    """Turns until the client goes. It may go in the middle of one, which then has the same grace as over SSE."""
    while True:
        text = await socket.receive_text()
        try:
            asked = TurnRequest.model_validate_json(text)
            if not session.at_work_here:
                session.look()
            after = session.begin(Ask(asked.content, asked.retry, asked.turn, asked.stream))
        except ValidationError as error:
            first: Any = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            refused = ApiError(400, "invalid_request", f"{where}: {first['msg']}" if where else first["msg"])
            await socket.send_json({**refused.body()["error"], "type": "error"})
            continue
        except ApiError as error:
            await socket.send_json({**error.body()["error"], "type": "error"})
            continue
        await _told(socket, session, after)


async def _told(socket: WebSocket, session: Session, after: int) -> None:
    """The turn's events. A client that goes meanwhile is noticed at once, also while nothing is sent."""

    async def tell() -> None:
        events = session.follow(after)
        try:
            async for event in events:
                await socket.send_json(event)
        finally:
            await events.aclose()

    async def gone() -> None:
        while (message := await socket.receive())["type"] != "websocket.disconnect":
            if json_is_stop(message.get("text")):
                session.stop()
        raise WebSocketDisconnect(message.get("code", 1006))

    telling, going = asyncio.ensure_future(tell()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({telling, going}, return_when=asyncio.FIRST_COMPLETED)
        if going.done():
            going.result()
        telling.result()
    finally:
        for task in (telling, going):
            task.cancel()
        await asyncio.gather(telling, going, return_exceptions=True)


def json_is_stop(text: str | None) -> bool:
    """{"stop": true}, in the middle of a turn."""
    try:
        asked = json.loads(text or "")
    except ValueError:
        return False
    return isinstance(asked, dict) and asked.get("stop") is True
