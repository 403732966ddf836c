"""How tests run the command, as a user does, and what the small run is that they share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COMMAND = str(Path(sys.executable).parent / "repertory")
SMALL = [
    "model.scratch.layers=2",
    "model.scratch.hidden=64",
    "model.scratch.heads=2",
    "model.max_length=320",
    "rollout.temperature=0.7",
    "rollout.max_turn_tokens=40",
    "stages.0.n=4",
    "stages.1.steps=20",
    "stages.1.batch_size=16",
    "stages.1.demonstrations.count=64",
    "stages.2.n=8",
    "stages.3.steps=1",
    "stages.3.tasks_per_step=8",
    "stages.3.lr=1e-3",
    "stages.3.algo.group_size=4",
    "stages.4.n=8",
]


def repertory(*arguments: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment
    )
