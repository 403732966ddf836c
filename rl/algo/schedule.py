"""Schedules: pure functions of the step, so that a resumed run continues on the same curve."""

import math


def learning_rate(step: int, *, base: float, total: int, warmup: int, schedule: str) -> float:
    """The learning rate of step 0..total-1: linear warm-up, then constant or a cosine to a tenth of `base`."""
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    progress = (step - warmup) / max(1, total - warmup)
    return base * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
