"""What stands before a replica's app: who may ask, how much, and how large; one access line a request, and no content.

A bare ASGI middleware, so that a stream goes through as it is. What it adds to the scope's `state`: `caller`
(serve.keys.Caller), `request_id`, and `place`: the request's among those under way, which a turn keeps that goes on
without its client. A WebSocket's key comes as the subprotocol `repertory-key.<KEY>`, since a browser can set no headers
there; the app just accepts, and the subprotocol that a browser waits for is filled in here. The app sees neither that
nor the Authorization header. A WebSocket's `state` has `turn` in the stead of `place`: `async with turn() as place:` is
to each of its turns what the way through here is to one over HTTP, and raises ApiError where that would be refused.
"""

import logging
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.asgi import BoundedSocket, Client, Headers, has_body, read_body, refuse, replayed
from serve.errors import ApiError, places
from serve.keys import ANONYMOUS, Caller, is_loopback
from serve.metrics import Metrics
from serve.request_id import request_id_of, with_request_id

if TYPE_CHECKING:
    from serve.service import Service

_log = logging.getLogger("repertory.serve")
_KEY_PROTOCOL = "repertory-key."
_GENERATES = re.compile(r"POST /v1/(chat/completions|completions|sessions/[^/]+/turns)")
_OPEN = re.compile(r"/|/web/[^/]+|/health(/.*)?")
_READS = ("GET", "HEAD", "OPTIONS")
_SECURITY: Headers = [
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Protection:
    """Around the app of one replica. The page and its files, and /health, may be read without a key.

    Without keys, a server on a loopback address answers only to that address's own names, and takes nothing from other
    sites' pages: a browser on this machine can be led here by any page that it shows.
    """

    def __init__(self, app: ASGIApp, service: "Service", clock: Callable[[], float] = time.monotonic):
        """Of the service: its configuration, keys and metrics."""
        http = service.config.http
        limits = self._limits = service.config.limits
        self._app, self._clock, self._http, self._idle_s = app, clock, http, service.config.sessions.idle_s
        self._keys, self._metrics = service.keys, service.metrics
        self._buckets: dict[str, _Bucket] = {}
        self._turns = _Places(limits.in_flight, limits.in_flight_per_key, "requests under way", self._metrics.in_flight)
        self._sockets = _Places(limits.sockets, limits.sockets_per_key, "WebSockets open")
        self._entry: ASGIApp = self._guarded
        if http.cors_origins:  # outside of the keys: a browser's preflight carries none
            self._entry = CORSMiddleware(
                self._guarded,
                allow_origins=http.cors_origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),  # OpenAI's client for browsers sends a dozen of its own
                expose_headers=("retry-after", "x-request-id", "x-weight-version"),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        client = Client(scope, receive, send, self._http.body_timeout_s)
        exchange = _Exchange(scope, client, self._clock)
        try:
            await self._entry(exchange.scope, client.receive, exchange.send)
        finally:
            if client.stalled:
                _log.warning("%s was ended: its client read nothing for %g s", exchange.id, self._http.body_timeout_s)
                self._metrics.error("client_stalled")
            exchange.tell(self._metrics)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: _Exchange = scope[_Exchange.KEY]
        try:
            caller = scope["state"]["caller"] = self._admit(exchange)
            if scope["type"] == "websocket":
                with self._sockets.one(caller):
                    return await self._speak(exchange, receive, send)
            if has_body(scope):
                whole = await read_body(scope, receive, self._http.max_body_bytes, self._http.body_timeout_s)
                if whole is None:
                    return
                receive = replayed(whole, receive)
            with ExitStack() as place:
                if _GENERATES.fullmatch(f"{exchange.method} {exchange.path}"):
                    place.enter_context(self._turns.one(caller))
                scope["state"]["place"] = place
                await self._app(scope, receive, send)
        except Exception as error:
            if exchange.client.stalled:  # what has ended the app
                return
            if not isinstance(error, ApiError):
                # Its text may hold what somebody wrote, so that only the places are told.
                _log.error("%s failed: %s\n%s", exchange.id, type(error).__name__, places(error))
                error = ApiError(500, "internal_error", f"The server failed; its log has request {exchange.id}")
            self._metrics.error(error.code)
            if exchange.status is None:
                await refuse(scope, send, error)

    async def _speak(self, exchange: "_Exchange", receive: Receive, send: Send) -> None:
        socket = BoundedSocket(receive, send, self._http.max_body_bytes, self._idle_s)
        exchange.scope["state"]["turn"] = partial(self._turn, exchange)
        await self._app(exchange.scope, socket.receive, socket.send)

    @asynccontextmanager
    async def _turn(self, exchange: "_Exchange") -> AsyncIterator[ExitStack]:
        """Of a WebSocket: its key may have been revoked meanwhile, and what it may ask for is counted by turns."""
        with ExitStack() as place:
            try:
                place.enter_context(self._turns.one(self._identify(exchange)))
            except ApiError as error:
                self._metrics.error(error.code)
                raise
            yield place

    def _admit(self, exchange: "_Exchange") -> Caller:
        """Raises ApiError unless the request may be worked for."""
        if not self._keys.needed:
            self._refuse_strangers(exchange)
        if exchange.method in _READS and _OPEN.fullmatch(exchange.path):
            return ANONYMOUS
        return self._identify(exchange)

    def _identify(self, exchange: "_Exchange") -> Caller:
        """Whose key it is, counted in its rate. Raises ApiError."""
        caller = self._keys.check(exchange.authorization)
        if self._limits.requests_per_minute is not None:
            bucket = self._buckets.setdefault(caller.id, _Bucket(self._limits.requests_per_minute))
            wait_s = bucket.take(self._clock())
            if wait_s > 0:
                text = f"More than {self._limits.requests_per_minute} requests a minute"
                raise ApiError(429, "rate_limited", text, retry_after_s=math.ceil(wait_s))
        return caller

    def _refuse_strangers(self, exchange: "_Exchange") -> None:
        host = exchange.header(b"host").lower()
        if is_loopback(self._http.host) and not is_loopback(_hostname(host)):
            raise ApiError(403, "host_not_allowed", "Without API keys this server answers only as localhost")
        origin = exchange.header(b"origin").lower()
        changes = exchange.method not in _READS  # a WebSocket too: no browser asks before it connects
        if origin and changes and not {origin, "*"} & {o.lower() for o in self._http.cors_origins}:
            _, _, site = origin.partition("://")
            if site != host:
                text = "Without API keys this server takes nothing from other sites' pages; see http.cors_origins"
                raise ApiError(403, "origin_not_allowed", text)


class _Places:
    """How many of something there may be at a time, from all keys and from one."""

    def __init__(self, most: int, most_per_key: int | None, what: str, tell: Callable[[int], None] = lambda _: None):
        """tell: is told how many there are."""
        self._most, self._most_per_key, self._what, self._tell = most, most_per_key, what, tell
        self._taken: Counter[str] = Counter()
        tell(0)

    @contextmanager
    def one(self, caller: Caller) -> Iterator[None]:
        """Until it has ended, however it does. Raises ApiError 429."""
        if self._most_per_key is not None and self._taken[caller.id] >= self._most_per_key:
            text = f"This key has {self._most_per_key} {self._what} already"
            raise ApiError(429, "too_many_in_flight", text, retry_after_s=1)
        if self._taken.total() >= self._most:
            raise ApiError(429, "overloaded", f"The server has all the {self._what} that it can take", retry_after_s=1)
        self._taken[caller.id] += 1
        self._tell(self._taken.total())
        try:
            yield
        finally:
            self._taken[caller.id] -= 1
            self._taken += Counter()  # drops what is zero
            self._tell(self._taken.total())


class _Bucket:
    """As many requests at once as a minute has, and then one whenever its share of the minute has passed."""

    def __init__(self, per_minute: int):
        self._most, self._tokens, self._at = float(per_minute), float(per_minute), -math.inf

    def take(self, now: float) -> float:
        """0 when one is taken, else the seconds until there is one."""
        rate = self._most / 60
        self._tokens, self._at = min(self._most, self._tokens + (now - self._at) * rate), now
        if self._tokens < 1:
            return (1 - self._tokens) / rate
        self._tokens -= 1
        return 0.0


class _Exchange:
    """One request and its answer: what both say in headers, and the access line."""

    KEY = "repertory.exchange"

    def __init__(self, scope: Scope, client: Client, clock: Callable[[], float]):
        self.client, self._clock, self._start = client, clock, clock()
        self._headers = dict(scope["headers"])
        self.id = request_id_of(scope)
        self.method: str = scope["method"] if scope["type"] == "http" else "WS"
        self.path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        self.status: int | None = None
        offered: list[str] = scope.get("subprotocols") or []
        self._protocols = [p for p in offered if not p.startswith(_KEY_PROTOCOL)]
        self._key_protocol = next((p for p in offered if p.startswith(_KEY_PROTOCOL)), None)
        hidden = (b"authorization", b"sec-websocket-protocol")
        self.scope = {
            **scope,
            "headers": [header for header in scope["headers"] if header[0] not in hidden],
            "state": {**scope.get("state", {}), "caller": ANONYMOUS, "request_id": self.id},
            self.KEY: self,
        }
        if scope["type"] == "websocket":
            self.scope["subprotocols"] = self._protocols

    def header(self, name: bytes) -> str:
        return self._headers.get(name, b"").decode("latin-1")

    @property
    def authorization(self) -> str:
        if self._key_protocol is not None:
            return f"Bearer {self._key_protocol.removeprefix(_KEY_PROTOCOL)}"
        return self.header(b"authorization")

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            headers = with_request_id(message.get("headers", ()), self.id)
            named = {name.lower() for name, _ in headers}
            message = {**message, "headers": [*headers, *(own for own in _SECURITY if own[0] not in named)]}
        elif kind == "websocket.accept":
            self.status = 101
            message = {**message, "headers": with_request_id(message.get("headers", ()), self.id)}
            if not message.get("subprotocol"):  # a browser that offered some goes on only with one of them
                message["subprotocol"] = next(iter(self._protocols), self._key_protocol)
        elif kind == "websocket.close" and self.status is None:
            self.status = 403
        await self.client.send(message)

    def tell(self, metrics: Metrics) -> None:
        status = self.status or 499  # the client left before its answer
        seconds = self._clock() - self._start
        route: Any = getattr(self.scope.get("route"), "path", None)
        metrics.request(route or "other", status, seconds)
        caller: Caller = self.scope["state"]["caller"]
        path = route or quote(self.path[:200])
        _log.info("%s %s %d %.3fs %s %s", self.method, path, status, seconds, caller.id, self.id)


def _hostname(host: str) -> str | None:
    """Of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
