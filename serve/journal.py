"""A session on disk: one line an event, appended and written before anybody is told of it.

    created · user · prompt · turn_start · tokens... · turn · tool_call · observation · reward · waiting · ... done

Whoever holds the lease may append; the kernel gives the lease up when its process dies. `fold` says what of all that
still counts: what was said and sampled, without the turns that were retried, stopped or cut off.
"""

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]
"""{seq, type, time, ...}: `seq` counts the events of a session from 0 on; `time` is in seconds since the epoch."""

ENDS = ("waiting", "done", "error", "stopped", "created", "feedback")
"""After one of these nobody is at work."""


class TurnUnderWay(RuntimeError):
    """Somebody else holds the lease."""


class Journal:
    """The events of one session, all of them in memory too."""

    def __init__(self, path: Path):
        self.path = path
        self.events: list[Event] = []
        self._read_bytes = 0

    @staticmethod
    def create(path: Path, **created: Any) -> "Journal":
        """A session's journal, with its first line or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".new")
        partial.touch(exist_ok=False)
        journal = Journal(partial)
        try:
            with journal.lease():
                journal.append("created", **created)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        journal.path = path
        return journal

    def catch_up(self) -> list[Event]:
        """Read what others have written since. Returns it. Raises FileNotFoundError when the session was deleted."""
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line without its end is still being written, or its writer died
        self._read_bytes += len(whole)
        new = [json.loads(line) for line in whole.splitlines()]
        self.events += new
        return new

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Be the only one who appends. Raises TurnUnderWay, and FileNotFoundError when the session was deleted."""
        with self.path.open("r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TurnUnderWay(self.path.stem) from None
            self.catch_up()
            file.truncate(self._read_bytes)  # a line whose writer died
            file.seek(self._read_bytes)
            self._file = file
            try:
                yield
            finally:
                del self._file

    def append(self, kind: str, **data: Any) -> Event:
        """Write one event; inside `lease` only. Raises OSError when it cannot be written: nothing is then."""
        event = {"seq": len(self.events), "type": kind, "time": round(time.time(), 3), **data}
        line = json.dumps(event, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])  # to the kernel: it outlives this process
        except OSError:  # a full disk: half a line is none
            self._file.truncate(self._read_bytes)
            self._file.seek(self._read_bytes)
            raise
        self._read_bytes += len(line)
        self.events.append(event)
        return event

    @property
    def at_work(self) -> bool:
        """Whether the last event is one that others follow, if its writer lives."""
        return bool(self.events) and self.events[-1]["type"] not in ENDS


@dataclass
class Played:
    """A turn that counts: what was sampled, and what the environment said to it."""

    turn: Event
    observation: Event | None = None


@dataclass
class History:
    """What counts of a session. `items` are user events and played turns, in order."""

    items: list[Event | Played] = field(default_factory=list)
    sample: int = 0
    version: int | None = None
    over: Event | None = None
    """`done`, or an error that nothing goes on after."""

    @property
    def turns(self) -> list[Played]:
        return [item for item in self.items if isinstance(item, Played)]

    @property
    def unanswered(self) -> list[str]:
        """What the person has said since the agent's last turn."""
        answered = max((i for i, item in enumerate(self.items) if isinstance(item, Played)), default=-1)
        return [item["content"] for item in self.items[answered + 1 :] if not isinstance(item, Played)]

    @property
    def asks_person(self) -> bool:
        """Whether the agent has addressed the person, who has not answered."""
        last = self.items[-1] if self.items else None
        return last is None or (isinstance(last, Played) and last.turn["asks"])


def fold(events: Sequence[Event]) -> History:
    """What counts of a journal."""
    history = History()
    last: Played | None = None
    for event in events:
        kind = event["type"]
        if kind == "created":
            history.sample, history.version = event["sample"], event["version"]
        elif kind == "user":
            history.items.append(event)
        elif kind == "turn":
            last = Played(event)
            history.items.append(last)
        elif kind == "observation":
            assert last is not None
            last.observation = event
        elif kind == "version":
            history.version = event["to"]
        elif kind == "retry":
            _take_back(history, event)
        elif kind == "done" or (kind == "error" and not event["resume"]):
            history.over = event
    return history


def _take_back(history: History, event: Event) -> None:
    """What was said and played from a turn on does not count; a turn that has not been played takes nothing back."""
    for at, item in enumerate(history.items):
        if isinstance(item, Played) and item.turn["turn"] == event["turn"]:
            del history.items[at:]
            break
    history.sample, history.over = event["sample"], None
