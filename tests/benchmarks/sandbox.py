"""What shutting code in costs: stateless runs a second, a stateful call over the code itself, 200 sessions' memory.

    python tests/benchmarks/sandbox.py [RUNS]

The last line is JSON.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rl.config_env import SandboxConfig
from rl.sandbox import Sandbox

_MARK = b"What runs inside a sandbox"
SESSIONS = 200


def resident() -> int:
    """Bytes of every sandbox's processes, what they share counted once."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if _MARK in (folder / "cmdline").read_bytes():
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except OSError:
            continue
    return total


async def measure(runs: int) -> dict[str, Any]:
    sandbox = Sandbox(SandboxConfig(parallel=4, wall_s=60))
    await asyncio.gather(*(sandbox.run("print(1)") for _ in range(8)))
    started = time.perf_counter()
    results = await asyncio.gather(*(sandbox.run("print(sum(range(10)))") for _ in range(runs)))
    stateless = runs / (time.perf_counter() - started)
    assert all(r.output == "45\n" for r in results)
    async with sandbox.session() as session:
        await session.run("import time")
        calls = []
        for _ in range(runs):
            started = time.perf_counter()
            code = "t = time.perf_counter()\nx = sum(range(10_000))\nprint(time.perf_counter() - t)"
            result = await session.run(code)
            calls.append(time.perf_counter() - started - float(result.output))
    wide = Sandbox(SandboxConfig(parallel=SESSIONS, wall_s=60))
    sessions = [wide.session() for _ in range(SESSIONS)]
    await asyncio.gather(*(s.run("x = 1") for s in sessions))
    memory = resident()
    await asyncio.gather(*(s.close() for s in sessions))
    return {"stateless_per_s": stateless, "call_ms": median(calls) * 1e3, "memory_mib": memory / 2**20}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(int((sys.argv[1:] or ["400"])[0])))))
