"""What a load came to: rates, latencies, errors, versions, and what was lost or crossed."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

QUANTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90, p99 and max, linear between two values; None of nothing."""
    if not values:
        return None
    return dict(zip(QUANTILES, map(float, np.percentile(values, list(QUANTILES.values()))), strict=True))


@dataclass
class Tally:
    """What is counted while the load runs. Times are in seconds."""

    latency_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    """Between the parts of one streamed answer, as they come in."""
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    versions: list[int] = field(default_factory=list)
    """Of each answer, in the order in which they ended."""
    sessions: int = 0
    own: int = 0
    """Answers that hold both of their session's numbers."""
    lost: list[str] = field(default_factory=list)
    crossed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """client_cpu: the share of one core that the load itself took: near 1, it is what is measured.

    versions: answers by weight version; version_changes: how often an answer's was not that of the answer before. lost
    and crossed: what is missing of sessions, and what was another's.
    """

    requests: int
    sessions: int
    seconds: float
    requests_per_s: float
    tokens_per_s: float
    tokens: int
    latency_s: dict[str, float] | None
    first_token_s: dict[str, float] | None
    between_s: dict[str, float] | None
    errors: dict[str, int]
    versions: dict[str, int]
    version_changes: int
    own_number: float
    lost: list[str]
    crossed: list[str]
    client_cpu: float

    @staticmethod
    def of(tally: Tally, seconds: float, client_cpu: float) -> "Report":
        count = len(tally.latency_s)
        return Report(
            requests=count,
            sessions=tally.sessions,
            seconds=seconds,
            requests_per_s=count / seconds,
            tokens_per_s=tally.tokens / seconds,
            tokens=tally.tokens,
            latency_s=percentiles(tally.latency_s),
            first_token_s=percentiles(tally.first_token_s),
            between_s=percentiles(tally.between_s),
            errors=dict(tally.errors),
            versions={str(v): n for v, n in sorted(Counter(tally.versions).items())},
            version_changes=sum(a != b for a, b in itertools.pairwise(tally.versions)),
            own_number=tally.own / max(1, count),
            lost=tally.lost,
            crossed=tally.crossed,
            client_cpu=client_cpu,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def show(report: Report, console: Console) -> None:
    """As a table, and a line for each thing that was lost or crossed."""
    r = report
    console.print(
        f"{r.requests} requests in {r.seconds:.1f} s of {r.sessions} sessions: "
        f"[bold]{r.requests_per_s:.1f} requests/s, {r.tokens_per_s:.0f} tokens/s[/]",
        highlight=False,
    )
    table = Table("milliseconds", *QUANTILES)
    rows = {"whole request": r.latency_s, "time to first token": r.first_token_s, "between chunks": r.between_s}
    for name, found in rows.items():
        if found is not None:
            table.add_row(name, *(f"{1000 * found[q]:.0f}" for q in QUANTILES))
    console.print(table)
    versions = ", ".join(f"{v}: {n}" for v, n in r.versions.items()) or "not told"
    console.print(f"answers by weight version: {versions} (changed {r.version_changes} times)", highlight=False)
    console.print(f"answers with their session's own two numbers: {r.own_number:.0%}", highlight=False)
    console.print(f"this client: {r.client_cpu:.0%} of one core", highlight=False)
    errors = ", ".join(f"{n} x {what}" for what, n in r.errors.items())
    console.print(f"[red]errors: {errors}[/]" if errors else "errors: none", highlight=False)
    for name, found in (("lost", r.lost), ("crossed", r.crossed)):
        console.print(f"[red]{name}: {len(found)}[/]" if found else f"{name}: none", highlight=False)
        for what in found[:10]:
            console.print(f"  {what}", highlight=False, markup=False)
