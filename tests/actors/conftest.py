"""One small run of the whole system a session, made by the command itself, and looked at by many tests."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.run_folder import read_status
from actors.status import Status

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent

SMALL = [
    "model.scratch.layers=2",
    "model.scratch.hidden=64",
    "model.scratch.heads=2",
    "model.max_length=200",
    "rollout.temperature=0.7",
    "rollout.max_turn_tokens=24",
    "reward.function=own_reward.digits",
    "reward.success_at=0.5",
    "stages.0.n=8",
    "stages.1.steps=12",
    "stages.1.batch_size=16",
    "stages.1.demonstrations.count=64",
    "stages.2.n=8",
    "stages.3.steps=3",
    "stages.3.tasks_per_step=8",
    "stages.3.lr=1e-3",
    "stages.3.algo.group_size=4",
    "stages.3.algo.mini_batches=2",
    "stages.4.n=8",
]
"""The quickstart in small: every role, every stage, two optimizer steps a batch, a temperature that is not 1."""


@dataclass(frozen=True)
class Run:
    folder: Path
    output: str


COMMAND = str(Path(sys.executable).parent / "repertory")


def environment() -> dict[str, str]:
    """With this folder's modules importable."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def repertory(*arguments: str, timeout: int = 400) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment()
    )


def started(*arguments: str) -> subprocess.Popen[str]:
    """The command, going on beside the test; both its outputs are one."""
    return subprocess.Popen(
        [COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment()
    )


def wait_until(folder: Path, process: subprocess.Popen[str], reached: Callable[[Status], bool]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        status = read_status(folder)
        if status is not None and reached(status):
            return
        time.sleep(0.05)
    raise AssertionError(f"never reached; the last status: {read_status(folder)}")


def full_softmax_logprobs(folder, tokens: list[int], temperature: float) -> np.ndarray:
    """Independent of rl/model.py: plain transformers, every position, log-softmax over the whole vocabulary."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double() / temperature
    rows = torch.log_softmax(logits, -1)[:-1]
    return np.concatenate([[0.0], rows[range(len(tokens) - 1), tokens[1:]].numpy()])


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("runs")
    done = repertory(
        "train", "configs/quickstart.yaml", f"run.root={root}", "run.name=small", "logging.wandb.mode=offline", *SMALL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(root / "small", done.stdout)
