"""Answers that somebody waits for: work that ends when its client goes, and what is told of an error in it."""

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from rl.env import InfraError
from serve.errors import ApiError, places
from serve.versions import UnknownVersion

log = logging.getLogger("repertory.serve")

_T = TypeVar("_T")
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
