"""What the controller tells whoever watches it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """What the progress display shows. `busy` names the roles that hold the run up right now."""

    phase: str
    stage: int
    stages: int
    kind: str
    stage_step: int
    stage_steps: int
    done: float
    busy: tuple[str, ...]
    latest: dict[str, float]
    elapsed_s: float
    left_s: float | None
    messages: tuple[str, ...]
