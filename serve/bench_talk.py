"""One conversation of a load: what it says, what came back, and whether all of it is its own."""

import itertools
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

ENDS = ("waiting", "done", "error", "stopped")
"""Events after which a turn of a session is over."""


@dataclass
class Talk:
    """numbers: two that no other conversation has at the time; its questions are sums and differences of them.

    id: of a session; events: (seq, type) of what came of it; unsure: the last question may not have been heard.
    """

    numbers: tuple[int, int]
    said: list[str] = field(default_factory=list)
    id: str | None = None
    events: list[tuple[int, str]] = field(default_factory=list)
    unsure: bool = False

    def question(self) -> str:
        a, b = self.numbers if len(self.said) % 2 == 0 else self.numbers[::-1]
        self.said.append(f"{a}{'+-'[len(self.said) // 2 % 2]}{b}")
        return self.said[-1]

    @property
    def ended(self) -> bool:
        """Whether the last turn came to its end."""
        return bool(self.events) and self.events[-1][1] in ENDS

    def crossed_in(self, journal: Sequence[dict[str, Any]]) -> list[str]:
        """What the session's journal holds of others, or what came of others."""
        heard = [event["content"] for event in journal if event["type"] == "user"]
        kinds = {event["seq"]: event["type"] for event in journal}
        strange = [f"{kind} {seq}" for seq, kind in self.events if kinds.get(seq) != kind]
        return [
            *(f"session {self.id} holds {text!r}, which was said elsewhere" for text in heard if text not in self.said),
            *([f"session {self.id} sent what its journal does not hold: {', '.join(strange[:3])}"] if strange else []),
        ]

    def lost_in(self, journal: Sequence[dict[str, Any]]) -> list[str]:
        """What was said and is not there, and the events that did not come."""
        heard = [event["content"] for event in journal if event["type"] == "user"]
        lost = []
        if heard != self.said and not (self.unsure and heard == self.said[:-1]):
            lost.append(f"session {self.id} was told {self.said} and holds {heard}")
        seqs = [seq for seq, _ in self.events]
        if any(b != a + 1 for a, b in itertools.pairwise(seqs)):
            lost.append(f"session {self.id}: of its events {seqs[0]} to {seqs[-1]} only {len(seqs)} came")
        return lost


async def server_sent(answer: httpx.Response) -> AsyncIterator[list[dict[str, Any]]]:
    """Server-sent events, those that come in at once together: the data, with `seq` and `type` where the event has an
    id. OpenAI's last one, [DONE], is {"end": true}."""
    rest = b""
    async for part in answer.aiter_raw():
        *whole, rest = (rest + part).split(b"\n\n")
        found = []
        for event in whole:
            fields = dict(line.split(": ", 1) for line in event.decode().split("\n") if ": " in line)
            if "data" not in fields or event.startswith(b":"):
                continue  # a comment keeps the connection up
            data = {"end": True} if fields["data"] == "[DONE]" else json.loads(fields["data"])
            if "id" in fields:
                data |= {"seq": int(fields["id"]), "type": fields["event"]}
            found.append(data)
        if found:
            yield found
