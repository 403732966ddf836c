"""Actors join a run that goes on, and leave it: nothing is lost, and who comes late has the newest weights."""

import json
from pathlib import Path

import pytest
from conftest import Run, repertory, started, wait_until

from actors.audit import audit
from rl.metrics import read_lines

STALENESS = 2


@pytest.fixture(scope="module")
def scaled(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An asynchronous run with two generators and two rollout workers for a while."""
    root = tmp_path_factory.mktemp("scale")
    settings = {
        "run": {"name": "scale", "root": str(root)},
        "model": {"path": str(small_run.folder / "checkpoints" / "latest"), "max_length": 200},
        "env": {"name": "custom", "path": "slow_env.Slow", "args": {"seconds": 0.4}, "max_turns": 3},
        "reward": {"function": "own_reward.digits", "success_at": 0.05},
        "rollout": {"max_turn_tokens": 12},
        "generator": {"cpus": 0.3, "swap": "continue", "threads": 1},
        "stages": [
            {"kind": "rl", "steps": 400, "tasks_per_step": 6, "lr": 1e-4, "max_staleness": STALENESS,
             "algo": {"group_size": 4}}
        ],
    }  # fmt: skip
    config, folder = root / "scale.yaml", root / "scale"
    config.write_text(json.dumps(settings))
    process = started("train", str(config))
    wait_until(folder, process, lambda s: s.stage_step >= 2)
    told = []
    for wanted in (("generator=2", "rollout=2"), ("generator=1", "rollout=1")):
        done = repertory("scale", str(folder), *wanted)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
        steps = len(read_lines(folder / "metrics.jsonl"))
        wait_until(folder, process, lambda s, steps=steps: s.stage_step >= steps + 4)
    too_many = repertory("scale", str(folder), "reference=2")
    told.append(too_many.stderr)
    assert repertory("stop", str(folder)).returncode == 0
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    return folder, told


def test_it_had_as_many_as_were_asked_for(scaled):
    folder, (more, fewer, none) = scaled
    assert "generator: 2, rollout: 2" in more.replace("\n", " ")
    assert "generator: 1, rollout: 1" in fewer.replace("\n", " ")
    assert "reference=2" in none and "at least 1 of generator, rollout, reward" in none
    loads = [line.count("Loaded(version") for line in (folder / "logs" / "run.log").read_text().splitlines()]
    assert 2 in loads and loads[-1] != 2


def test_nothing_was_lost_and_nobody_sampled_with_old_weights(scaled):
    folder = scaled[0]
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    assert all(line["staleness/max"] <= STALENESS and line["faults/restarts"] == 0 for line in lines)
    assert audit(folder)[0].right
