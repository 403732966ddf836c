"""The HTTP application: routes, and every error in OpenAI's shape. Runs in a replica, and as well without Ray."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rl.env import InfraError
from serve import openai_routes, page, session_routes
from serve.attended import refusal
from serve.errors import ApiError
from serve.protection import Protection
from serve.versions import UnknownVersion

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from serve.service import Service


def build(service: "Service") -> "ASGIApp":
    """The application of one replica, with its protection around it."""
    app = FastAPI(title=f"Repertory: {service.name}", version=service.software, docs_url=None, redoc_url=None)
    app.include_router(openai_routes.router(service))
    app.include_router(session_routes.router(service))
    _health(app, service)
    app.include_router(page.router(service))
    for kind, answer in _ANSWERS.items():
        app.add_exception_handler(kind, partial(_answered, service, answer))
    return Protection(app, service)


def _health(app: FastAPI, service: "Service") -> None:
    @app.get("/health/live")
    async def live() -> JSONResponse:
        """200 while the process answers."""
        return JSONResponse({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """200 while it can take a turn, 503 with the reason while it cannot."""
        why = service.not_ready()
        return JSONResponse(
            {"status": "ready"} if why is None else {"status": "unready", "reason": why}, 503 if why else 200
        )

    @app.get("/health")
    async def health() -> JSONResponse:
        """What this replica serves, and how it is."""
        return JSONResponse(service.health(), 503 if service.not_ready() else 200)


def _invalid(error: Exception) -> ApiError:
    """The first thing that is wrong with a body, without what it holds."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"] if step not in ("body", "query", "path", "header"))
    told = f"{where}: {first['msg']}" if where else str(first["msg"])
    return ApiError(400, "invalid_request", told, param=where or None)


def _http(error: Exception) -> ApiError:
    assert isinstance(error, HTTPException)
    known = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed"}
    return ApiError(error.status_code, known.get(error.status_code, "http_error"), str(error.detail))


def _failed(error: Exception) -> ApiError:
    """Any other: it is raised on, and told in the log by who protects the application."""
    return ApiError(500, "internal_error", "the server failed at this request; its log says why")


_ANSWERS = {
    RequestValidationError: _invalid,
    HTTPException: _http,
    ApiError: refusal,
    InfraError: refusal,
    UnknownVersion: refusal,
    OSError: refusal,
    Exception: _failed,
}


async def _answered(
    service: "Service", answer: Callable[[Exception], ApiError], request: Request, error: Exception
) -> JSONResponse:
    refused = answer(error)
    if refused.status != 500:  # that one is counted where it is logged, without what it says
        service.metrics.error(refused.code)
    more = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return JSONResponse(refused.body(), refused.status, headers={**refused.headers(), **more})
