"""What every role's actor shares: bounded threads, a status, a sign of life, and an account of its calls."""

import asyncio
import json
import os
import resource
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from rl.env import InfraError

CALL_LOG = "REPERTORY_CALL_LOG"
"""Names a folder: every role's process then notes there when each of its calls begins and ends."""


class NotOpen(InfraError):
    """A role's process was started again, and holds nothing yet to answer with."""


def bound_threads(count: int) -> dict[str, str]:
    """Environment of an actor process: each engine starts threads for every core that it sees, unless told."""
    return {
        "OMP_NUM_THREADS": str(count),
        "MKL_NUM_THREADS": str(count),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def keep_memory() -> dict[str, str]:
    """Environment of a process that computes on CPU: glibc keeps what it has freed.

    A step frees and takes gigabytes. Given back to the system, every page of it is faulted in and zeroed again: a fifth
    of a SmolLM2 update's time.
    """
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


_health: Any = ray.method(concurrency_group="health")


class Role:
    """Base of the roles' actors, which run one call at a time, in the main thread. Make them with `remote_class`."""

    role = "role"

    def __init__(self) -> None:
        self._life = uuid.uuid4().hex
        self._calls: Counter[str] = Counter()
        self._under_way = 0
        self._began = self._busy_s = 0.0
        folder = os.environ.get(CALL_LOG)
        self._call_log = Path(folder, f"{self.role}-{os.getpid()}.jsonl") if folder else None

    @contextmanager
    def calling(self, name: str) -> Iterator[None]:
        """A call: counted, and its time is time that the role is busy."""
        self._calls[name] += 1
        if not self._under_way:
            self._began = time.perf_counter()
        self._under_way += 1
        self._note(name, "begin")
        try:
            yield
        finally:
            self._note(name, "end")
            self._under_way -= 1
            if not self._under_way:
                self._busy_s += time.perf_counter() - self._began

    def _note(self, name: str, at: str) -> None:
        if self._call_log:
            line = {"time": time.time(), "pid": os.getpid(), "role": self.role, "call": name, "at": at}
            with self._call_log.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def status(self) -> dict[str, Any]:
        """pid, calls by name, seconds in them until clock_s (the process's own), peak resident memory in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        now = time.perf_counter()
        busy_s = self._busy_s + (now - self._began if self._under_way else 0.0)
        return {
            "role": self.role,
            "pid": os.getpid(),
            "calls": dict(self._calls),
            "busy_s": busy_s,
            "clock_s": now,
            "peak_rss_bytes": peak,
        }

    def ping(self) -> str:
        """Which life of the actor this is: another one after each restart. Answered after the call that runs."""
        return self._life

    def apply(self, func: Callable[["Role"], Any]) -> Any:
        """What RLlib's FaultTolerantActorManager calls an actor by."""
        return func(self)


class WatchedRole(Role):
    """Base of a role whose calls are long: it answers for its health beside them. They run in no main thread then."""

    @_health
    def ping(self) -> str:
        return self._life


class AsyncRole(Role):
    """Base of the roles that run many calls on one event loop, which also answers for their health."""

    async def ping(self) -> str:  # type: ignore[override]
        return self._life

    async def until_dead(self) -> None:
        """Never returns: Ray raises for its caller when the process has died."""
        await asyncio.Event().wait()


def remote_class(cls: type) -> Any:
    """A role as a Ray actor class."""
    if not issubclass(cls, WatchedRole):
        return ray.remote(cls)
    grouped: Any = ray.remote
    return grouped(concurrency_groups={"health": 4})(cls)
