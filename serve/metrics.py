"""What a replica counts for Prometheus, through Ray: every node serves its actors' series on its metrics port.

Ray puts `ray_` before the names, tells the replicas apart by a label WorkerId, and passes values on every ten seconds.
It takes each value of a histogram for the middle of its bucket, so that means are as coarse as quantiles.
The port is `_metrics_export_port` of `ray.init`, or `--metrics-export-port` of `ray start`; without that it is any free
one, which `endpoints` finds. No dashboard is needed. Everything is recorded once a request, never a token.
"""

import importlib
import sys
from typing import Any

_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_WAIT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WHOLE_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)


class Metrics:
    """The series of one replica. Outside of Ray it counts nothing. Every series has the label `model`."""

    def __init__(self, model: str = ""):
        ray: Any = sys.modules.get("ray")  # where there is a cluster, somebody has imported it
        there = ray is not None and ray.is_initialized()
        metrics = importlib.import_module("ray.util.metrics") if there else None

        def make(kind: str, name: str, text: str, *labels: str, **more: Any) -> Any:
            if metrics is None:
                return _Nothing()
            series = getattr(metrics, kind)(f"repertory_{name}", text, tag_keys=("model", *labels), **more)
            return series.set_default_tags({"model": model})

        self._requests = make("Counter", "requests_total", "Answered requests", "route", "status")
        self._seconds = make("Histogram", "request_seconds", "A whole request", "route", boundaries=_WHOLE_S)
        self._errors = make("Counter", "errors_total", "Requests that were refused or failed", "code")
        self._in_flight = make("Gauge", "in_flight_requests", "Requests under way that generate")
        self._queued = make("Gauge", "queued_requests", "Requests that wait for the engine, or their version's turn")
        self._sessions = make("Gauge", "sessions", "Sessions that this replica holds")
        self._version = make("Gauge", "version", "The weight version that is served", "role")
        self._tokens = make("Counter", "tokens_total", "Tokens read (prompt) and sampled", "kind")
        self._first = make("Histogram", "time_to_first_token_seconds", "Until the first token", boundaries=_WAIT_S)
        self._each = make(
            "Histogram", "time_per_output_token_seconds", "Between tokens, a request's mean", boundaries=_TOKEN_S
        )
        self._tool = make("Histogram", "tool_seconds", "A tool call", "tool", boundaries=_WAIT_S)

    def request(self, route: str, status: int, seconds: float) -> None:
        """route: its template, so that there are few."""
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._seconds.observe(seconds, {"route": route})

    def error(self, code: str) -> None:
        self._errors.inc(1, {"code": code})

    def in_flight(self, count: int) -> None:
        self._in_flight.set(count)

    def queued(self, count: int) -> None:
        self._queued.set(count)

    def sessions(self, count: int) -> None:
        self._sessions.set(count)

    def version(self, version: int, role: str = "stable") -> None:
        """role: stable or canary."""
        self._version.set(version, {"role": role})

    def sampled(self, prompt: int, tokens: int, first_s: float | None, seconds: float) -> None:
        """One completion: the tokens of its prompt and its own, when the first of them came, and when the last.

        first_s: None where nobody saw them come; the first then counts like the others.
        """
        if prompt:
            self._tokens.inc(prompt, {"kind": "prompt"})
        if not tokens:
            return
        self._tokens.inc(tokens, {"kind": "sampled"})
        if first_s is None:
            self._each.observe(seconds / tokens)
            return
        self._first.observe(first_s)
        if tokens > 1:
            self._each.observe((seconds - first_s) / (tokens - 1))

    def tool(self, name: str, seconds: float) -> None:
        """name: of a tool that there is, not what a model wrote for one."""
        self._tool.observe(seconds, {"tool": name})


def endpoints() -> list[str]:
    """Where the metrics of each node of this cluster are."""
    import ray

    return [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in ray.nodes() if n["Alive"]]


class _Nothing:
    """Takes what it is told, outside of Ray."""

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None: ...

    def set(self, value: float, tags: dict[str, str] | None = None) -> None: ...

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None: ...
