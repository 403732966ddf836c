"""The page at `/`: the files of serve/web/, as they stand. They hold no secret, so the page itself needs no key."""

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.errors import ApiError

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    headers: dict[str, str]

    @staticmethod
    def read(name: str, content: bytes) -> "_File":
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        kind = _TYPES[name.rpartition(".")[2]]
        # It may be kept, and is asked for again each time: a server's page fits its API.
        return _File(content, {"Content-Type": kind, "ETag": etag, "Cache-Control": "no-cache"})

    def answer(self, request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.headers["ETag"] in known or "*" in known:
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers)


def router(service: Any) -> APIRouter:
    """`/` and `/web/<file>`. Nothing of the service: the page asks the API, like any other client."""
    folder = resources.files("serve") / "web"
    files = {f.name: _File.read(f.name, f.read_bytes()) for f in folder.iterdir() if f.is_file()}
    index = files.pop("index.html")
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    def page(request: Request) -> Response:
        return index.answer(request)

    @routes.api_route("/web/{name}", methods=["GET", "HEAD"])
    def asset(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, "not_found", f"there is no /web/{name}")
        return files[name].answer(request)

    return routes
