"""Answers that somebody waits for: work that ends when its client goes, and what is told of an error in it."""

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request

from rl.env import InfraError
from rl.task import BadTask
from serve.errors import ApiError, places
from serve.live import NotReplayable
from serve.versions import UnknownVersion

log = logging.getLogger("repertory.serve")

_T = TypeVar("_T")
UNWRITTEN = "the session cannot be written now: post a turn without content to go on"
SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """Nobody waits for the answer any longer."""


def too_late() -> ApiError:
    return ApiError(504, "deadline_exceeded", "the answer took longer than this server allows (http.deadline_s)")


async def attended(request: Request, work: Awaitable[_T], deadline_s: float) -> _T:
    """The result of work that ends when nobody waits for it any longer, or it takes too long.

    Raises ClientGone, or ApiError 504.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait((task, gone), timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientGone if done else too_late()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def ending(error: Exception) -> dict[str, Any]:
    """The event that an error ends a session's turn with. `resume`: the turn can be asked for again."""
    name = type(error).__name__
    if isinstance(error, BadTask):
        code, message, resume = "context_length_exceeded", str(error), False
    elif isinstance(error, NotReplayable):
        code, message, resume = "env_not_replayable", str(error), False
    elif isinstance(error, ApiError):  # what the session was made with is not here any longer, or not now
        code, message, resume = error.code, error.message, error.status == 503
    elif isinstance(error, InfraError | ConnectionError | TimeoutError | UnknownVersion):
        code, message, resume = "unavailable", f"{name}: the turn was not finished; ask for it again", True
    elif isinstance(error, OSError):
        code, message, resume = "storage_failed", UNWRITTEN, True
    else:
        code, message, resume = "env_failed", f"the environment failed: {name}", False
    return {"kind": "error", "code": code, "message": message, "resume": resume}


def refusal(error: Exception) -> ApiError:
    """What a client is told of an error, which the log tells without its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownVersion):
        return ApiError(503, "version_unavailable", f"{error}: try again", param="model", retry_after_s=1)
    log.error("a request failed: %s\n%s", type(error).__name__, places(error))
    if isinstance(error, InfraError):
        return ApiError(503, "unavailable", "the engine cannot answer now: try again", retry_after_s=1)
    if isinstance(error, OSError):
        return ApiError(503, "storage_failed", "the server cannot write its journal now", retry_after_s=5)
    return ApiError(500, "internal_error", "the server failed at this request; its log says why")
