"""What a process and all that it has started use, as /proc tells it.

The tree is complete whatever the processes do: one whose parent has ended belongs to the sandbox's first process. On a
kernel that does not list children (CONFIG_PROC_CHILDREN) the first process alone is seen.
"""

import os
from contextlib import suppress
from dataclasses import dataclass

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """memory: resident bytes of all together; cpu_s: CPU seconds of the one that has used most."""

    memory: int
    cpu_s: float


def usage_of(pid: int, enough: int) -> Usage:
    """Pages that several processes share count once if the sum with every one of them counted is above `enough`."""
    memory, cpu_s, pids = 0, 0.0, _tree(pid)
    for one in pids:
        with suppress(OSError):  # it has ended meanwhile
            memory += int(_read(one, "statm").split()[1]) * _PAGE
            fields = _read(one, "stat").rpartition(")")[2].split()  # from the third on
            cpu_s = max(cpu_s, (int(fields[11]) + int(fields[12])) / _TICKS)
    if memory > enough:  # each page's share is dear to count: the kernel walks all of them
        memory = sum(_shared_out(one) for one in pids)
    return Usage(memory, cpu_s)


def _tree(pid: int) -> list[int]:
    found, left = [], [pid]
    while left:
        one = left.pop()
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                left += map(int, _read(one, f"task/{thread}/children").split())
        found.append(one)
    return found


def _shared_out(pid: int) -> int:
    with suppress(OSError):
        for line in _read(pid, "smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _read(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/{name}") as file:
        return file.read()
