"""The short form of `make chaos`: one run in which every role is killed, and a process that its environment depends on.

What must be true afterwards: the run ended well, no task lost or counted twice, no reward that nobody gave.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos import Notes, moment_is
from conftest import HERE, Run, started
from fragile_env import worth

from actors.audit import audit
from actors.role import CALL_LOG
from rl.metrics import read_lines
from rl.trajectory import read_parquet

STEPS = 13
ORDER = [
    ("reward", "busy"), ("service", "busy"), ("rollout", "busy"), ("reference", "busy"), ("store", "idle"),
    ("learner", "busy"), ("generator", "busy"), ("store", "publish"),
    ("rollout", "checkpoint"), ("controller", "idle"),
]  # fmt: skip
"""Who is killed when, one after the other, each after the run has done a step since the last."""


class Service:
    """The environment's own process."""

    def __init__(self, folder: Path):
        self.port_file = folder / "port"
        self.start()

    def start(self) -> None:
        self.port_file.unlink(missing_ok=True)
        self.process = subprocess.Popen([sys.executable, str(HERE / "fragile_env.py"), str(self.port_file)])
        while not self.port_file.is_file():
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def killed(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]], str]:
    root = tmp_path_factory.mktemp("killed")
    service, notes = Service(root), Notes(root / "notes")
    notes.folder.mkdir()
    settings = {
        "run": {"name": "killed", "root": str(root)},
        "model": {"path": str(small_run.folder / "checkpoints" / "latest"), "max_length": 200},
        "env": {"name": "custom", "path": "fragile_env.Fragile", "max_turns": 2,
                "args": {"port_file": str(service.port_file)}},
        "reward": {"function": "own_reward.digits_slowly", "success_at": 0.05},
        "rollout": {"max_turn_tokens": 12},
        "faults": {"infra_budget": 30},
        "learner": {"count": 2, "cpus": 0.2, "threads": 1},
        "stages": [
            {"kind": "rl", "steps": STEPS, "tasks_per_step": 6, "lr": 1e-3, "checkpoint_every": 2, "algo": {
                "group_size": 4, "kl": {"coefficient": 0.01}}}
        ],
    }  # fmt: skip
    config = root / "killed.yaml"
    config.write_text(json.dumps(settings))
    os.environ[CALL_LOG] = str(notes.folder)
    try:
        process = started("train", str(config))
    finally:
        del os.environ[CALL_LOG]
    done: list[tuple[str, str]] = []
    steps_then, deadline = 0, time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        steps = len(read_lines(root / "killed" / "metrics.jsonl"))
        if len(done) < len(ORDER) and steps > steps_then and kill(ORDER[len(done)], notes, service):
            done.append(ORDER[len(done)])
            steps_then = len(read_lines(root / "killed" / "metrics.jsonl"))
        time.sleep(0.005)
    output = process.communicate(timeout=10)[0]
    service.kill()
    assert process.returncode == 0, output
    return root / "killed", done, output


def kill(whom: tuple[str, str], notes: Notes, service: Service) -> bool:
    """SIGKILL at the moment, if it is now."""
    role, moment = whom
    notes.follow()
    if role == "service":
        if not notes.inside("rollout", "play"):
            return False
        service.kill()
        time.sleep(1.0)
        service.start()
        return True
    process = notes.of(role)
    if process is None or not moment_is(notes, role, moment):
        return False
    os.kill(process.pid, signal.SIGKILL)
    return True


def test_every_role_was_killed_and_the_run_came_to_its_end(killed):
    run, done, output = killed
    assert done == ORDER
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    for role in ("generator", "rollout", "reference", "reward", "store", "learner"):
        assert f"{role}: " in output and "it is started again" in output
    assert "the run goes on from its newest checkpoint" in output
    restarts = {k.removeprefix("faults/restarts_") for line in lines for k in line if k.startswith("faults/restarts_")}
    assert {"generator", "rollout", "store", "learner"} <= restarts
    assert sum(line["faults/infra"] for line in lines) > 0
    log = (run / "logs" / "run.log").read_text()
    assert "reached the published checksum" in log and "did not reach" not in log


def test_no_task_was_lost_or_counted_twice(killed):
    account = audit(killed[0])[0]
    assert account.right and account.steps == STEPS
    assert account.ends == {"trained": 6 * STEPS}


def test_every_reward_is_one_that_was_given(killed):
    """Read back from what was trained on: the service's for each turn, the grader's for the episode."""
    run = killed[0]
    rows = [row for path in sorted((run / "trajectories").glob("rl-*.parquet")) for row in read_parquet(path)]
    assert len(rows) == 24 * STEPS
    for row in rows:
        number = int(row["task"].partition("-")[2])
        first = json.loads(row["messages"])[1]["content"]
        digits = sum(c.isdigit() for c in first) / max(1, len(first))
        assert row["turn_rewards"] == pytest.approx([worth(number)] * len(row["turn_rewards"]))
        assert row["reward"] == pytest.approx(digits + sum(row["turn_rewards"]))


def test_no_version_number_was_used_twice(killed):
    versions = [line["version"] for line in read_lines(killed[0] / "versions.jsonl")]
    assert versions == sorted(set(versions))
