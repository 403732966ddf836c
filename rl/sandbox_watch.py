"""What processes use, as /proc tells it. What is not known counts as much as it can be, never as nothing."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_MOST_MAPS = 4 * 2**20
_SHARED = re.compile(
    rb"^0*([0-9a-f]+)-0*([0-9a-f]+) \S+ ([0-9a-f]+) (\S+ \d+) +(?:/dev/zero \(deleted\)|/memfd:)", re.MULTILINE
)
_SHARES = re.compile(rb"^(Pss|Pss_Shmem): +(\d+)", re.MULTILINE)
_ENDED = FileNotFoundError, ProcessLookupError


@dataclass(frozen=True)
class Usage:
    """memory: bytes that all together hold; cpu_s: CPU seconds of the one that has used most."""

    memory: int
    cpu_s: float


def usage_of(proc: str, pids: Iterable[str], enough: int, kept: int = 0) -> Usage:
    """Of these processes in this /proc; kept: bytes that are held besides.

    Pages that several processes share count once if the sum with every one of them counted is above `enough`.
    Anonymous memory that is made to be shared counts once and whole: it is held even while nobody has its pages mapped.
    """
    resident: dict[str, int] = {}
    shared: dict[bytes, int] = {}
    cpu_s = 0.0
    for pid in pids:
        with suppress(*_ENDED):
            fields = stat_of(f"{proc}/{pid}")
            cpu_s = max(cpu_s, (int(fields[11]) + int(fields[12])) / _TICKS)
            path, virtual, real = _living(f"{proc}/{pid}")
            resident[path] = real
            for which, size in _shared(path, virtual).items():
                shared[which] = max(size, shared.get(which, 0))
    memory = kept + sum(shared.values()) + sum(resident.values())
    if memory > enough:  # each page's share is dear to count: the kernel walks all of them
        memory = kept + sum(shared.values()) + sum(_share(*one) for one in resident.items())
    return Usage(memory, cpu_s)


def stat_of(path: str) -> list[bytes]:
    """The fields of its `stat` from the third on: before are its number and a name, which can be any bytes."""
    return _read(f"{path}/stat").rpartition(b")")[2].split()


def tree(pid: int) -> list[str]:
    """The process and all that descend from it, as far as no parent on the way has ended."""
    found, left = [], [pid]
    while left:
        found.append(str(left[-1]))
        left += children(left.pop())
    return found


def children(pid: int) -> list[int]:
    """Of all its threads."""
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):  # a kernel without CONFIG_PROC_CHILDREN
        return _children_by_parent(pid)
    found: list[int] = []
    with suppress(*_ENDED):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(*_ENDED):
                found += map(int, _read(f"/proc/{pid}/task/{thread}/children").split())
    return found


def _children_by_parent(pid: int) -> list[int]:
    found: list[int] = []
    for one in filter(str.isdigit, os.listdir("/proc")):
        with suppress(*_ENDED):
            if int(stat_of(f"/proc/{one}")[1]) == pid:
                found.append(int(one))
    return found


def _living(path: str) -> tuple[str, int, int]:
    """Where its memory can be seen, and its virtual and its real size.

    That is at another thread where the first has ended: /proc then shows nothing of what the others still use.
    """
    for one in (path, *(f"{path}/task/{thread}" for thread in os.listdir(f"{path}/task"))):
        with suppress(*_ENDED):
            virtual, real = map(int, _read(f"{one}/statm").split()[:2])
            if virtual:
                return one, virtual * _PAGE, real * _PAGE
    return path, 0, 0


def _shared(path: str, virtual: int) -> dict[bytes, int]:
    """Sizes of the anonymous memory made to be shared that it has mapped any of, by device and inode."""
    try:
        maps = _read(f"{path}/maps", _MOST_MAPS)
    except PermissionError:
        return {path.encode(): virtual}
    if len(maps) == _MOST_MAPS:  # so many are made to be hidden behind
        return {path.encode(): virtual}
    found: dict[bytes, int] = {}
    for start, end, offset, which in _SHARED.findall(maps):
        size = int(offset, 16) + int(end, 16) - int(start, 16)
        with suppress(OSError):  # exact, also where most of it is no longer mapped; only root may ask
            size = os.stat(f"{path}/map_files/{start.decode()}-{end.decode()}").st_blocks * 512
        found[which] = max(size, found.get(which, 0))
    return found


def _share(path: str, resident: int) -> int:
    """Bytes of its memory, without what is made to be shared; of pages that several have, its part."""
    try:
        sizes = {name: int(kib) * 1024 for name, kib in _SHARES.findall(_read(f"{path}/smaps_rollup"))}
    except _ENDED:
        return 0
    except PermissionError:
        return resident
    return sizes.get(b"Pss", 0) - sizes.get(b"Pss_Shmem", 0)


def _read(path: str, most: int = -1) -> bytes:
    with open(path, "rb") as file:
        return file.read(most)
