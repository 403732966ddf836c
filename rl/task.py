"""Tasks, and the seeded stream that hands them out.

A stream is a pure function of (seed, split, index), so its whole state is one integer: a resumed run plays
exactly the tasks that an uninterrupted one would have played.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """One item to attempt. Immutable.

    id: unique within its environment and the same for the same content; prompt: what the environment shows;
    answer: the ground truth, never shown; seed: for whatever the environment does at random; where: the file and row
    that it was read from.
    """

    id: str
    prompt: Mapping[str, Any]
    answer: str
    seed: int = 0
    where: str = field(default="", compare=False)


class BadTask(ValueError):
    """A task that cannot be played: dropped at once, named and counted."""


class TaskSource(Protocol):
    """Where an environment's tasks come from. Deterministic; the two splits share no task."""

    def task(self, split: str, index: int) -> Task: ...

    def size(self, split: str) -> int | None:
        """Number of tasks of a split; None when they are generated without end."""
        ...


@dataclass
class TaskStream:
    """The next tasks of a split. `cursor` is the number of tasks handed out so far: all there is to save."""

    source: TaskSource
    split: str
    cursor: int = field(default=0)

    def next(self, count: int) -> list[Task]:
        return [self.at(self.skip()) for _ in range(count)]

    def skip(self) -> int:
        """Hand out the next task by its index alone: `at` makes it."""
        self.cursor += 1
        return self.cursor - 1

    def at(self, index: int) -> Task:
        size = self.source.size(self.split)
        return self.source.task(self.split, index if size is None else index % size)


def derive_seed(*parts: object) -> int:
    """A 31-bit seed from anything printable: the same parts give the same seed in every process and every run."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & 0x7FFF_FFFF


def held_out(content: str, one_in: int = 8) -> bool:
    """Whether a content belongs to the held-out split. A function of the content alone, so splits cannot overlap."""
    return derive_seed("split", content) % one_in == 0
