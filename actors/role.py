"""What every role's actor shares: bounded threads, a status with its process id, peak memory and calls."""

import os
import resource
from collections import Counter
from typing import Any


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


class Role:
    """Base of the roles' actors."""

    role = "role"

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()

    def status(self) -> dict[str, Any]:
        """pid, calls by name, peak resident memory in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"role": self.role, "pid": os.getpid(), "calls": dict(self._calls), "peak_rss_bytes": peak}
