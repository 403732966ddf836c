"""What a request is called in logs and in its answer: the client's x-request-id, or one made for it."""

import re
import uuid
from collections.abc import Iterable

from starlette.types import Scope

_NAME = b"x-request-id"
_VALID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")
"""Nothing that could break a log's line, or a header."""


def request_id_of(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == _NAME), b"")
    return given.decode() if _VALID.fullmatch(given) else uuid.uuid4().hex


def with_request_id(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    """Headers with this one alone: Serve's proxy adds its own to the replica's."""
    return [*((n, v) for n, v in headers if n.lower() != _NAME), (_NAME, request_id.encode())]
