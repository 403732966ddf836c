"""What a request can be refused with. Every error that leaves the server has OpenAI's shape."""

import traceback
from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "OpenAI's error: what is wrong with the request"},
    "5XX": {"description": "OpenAI's error: what is wrong here"},
}
"""Of every route, as the OpenAPI schema has them."""


class ApiError(Exception):
    """A request is refused, or failed: `code` is for programs, the text for people; param: the field that is wrong.

    retry_after_s: when to try again, sent as Retry-After.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}


def not_found(session_id: str) -> ApiError:
    return ApiError(404, "session_not_found", f"there is no session {session_id!r}")


def not_taken(error: Exception, param: str) -> ApiError:
    """Templates refuse what they do not know, a system role or two messages in a row, with whatever jinja raises."""
    told = f"the model's chat template does not take these messages: {error}"
    return ApiError(400, "invalid_request", told, param=param)


def places(error: BaseException) -> str:
    """Where an error came from, for a log: its text may be what somebody has written."""
    return "".join(traceback.format_tb(error.__traceback__))
