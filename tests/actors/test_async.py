"""Asynchronous training: bounded staleness, versions token by token, and every task exactly once, stopped or not."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from chaos import kill_job
from conftest import Run, full_softmax_logprobs, repertory, started, wait_until

from actors.audit import audit
from rl.checkpoint import read_state
from rl.metrics import read_lines
from rl.trajectory import read_parquet

STEPS, STALENESS = 10, 2


@pytest.fixture(scope="module")
def asynchronous(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with groups under way that was killed whole at a moment of chance, stopped, and resumed twice."""
    root = tmp_path_factory.mktemp("async")
    settings = {
        "run": {"name": "async", "root": str(root), "keep_checkpoints": 100},
        "model": {"path": str(small_run.folder / "checkpoints" / "latest"), "max_length": 200},
        "env": {"name": "custom", "path": "slow_env.Slow", "args": {"seconds": 0.4}, "max_turns": 3},
        "reward": {"function": "own_reward.digits", "success_at": 0.05},
        "rollout": {"max_turn_tokens": 12},
        "stages": [
            {"kind": "rl", "steps": STEPS, "tasks_per_step": 6, "lr": 1e-3, "max_staleness": STALENESS,
             "checkpoint_every": 1, "algo": {
                 "group_size": 4, "kl": {"coefficient": 0.01}, "filters": [{"name": "accuracy_band", "low": 0.2}]}}
        ],
    }  # fmt: skip
    config = root / "async.yaml"
    config.write_text(json.dumps(settings))
    first = started("train", str(config))
    wait_until(root / "async", first, lambda s: s.stage_step >= 3)
    time.sleep(random.uniform(0, 2))
    kill_job(first.pid)
    first.wait()
    second = started("train", str(config), "--resume")
    wait_until(root / "async", second, lambda s: s.stage_step >= 6)
    assert repertory("stop", str(root / "async")).returncode == 0
    assert second.wait(60) == 0, second.communicate()[0]
    done = repertory("train", str(config), "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "async"


def episodes(run: Path, step: int) -> list[dict]:
    """Those that were trained on; a step whose groups were all filtered has none."""
    path = run / "trajectories" / f"rl-00-{step:05d}.parquet"
    return read_parquet(path) if path.is_file() else []


def test_no_token_is_staler_than_the_bound_and_the_generators_do_not_wait(asynchronous):
    lines = read_lines(asynchronous / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    behind = []
    for step, line in enumerate(lines):
        trained_on = [v for row in episodes(asynchronous, step) for v in row["versions"] if v >= 0]
        behind += [line["version"] - 1 - min(trained_on)] if trained_on else []
        assert line["staleness/max"] <= STALENESS
    assert 0 < max(behind) <= STALENESS
    assert any(line["queue/groups_played"] + line["queue/groups_finished"] > 0 for line in lines[:-1])
    assert lines[-1]["queue/groups_played"] + lines[-1]["queue/groups_finished"] == 0


def test_each_line_tells_how_idle_the_roles_were_and_what_was_sent(asynchronous):
    lines = [line for line in read_lines(asynchronous / "metrics.jsonl") if "idle/learner" in line]
    assert len(lines) >= STEPS - 4  # the first of each start has nothing to compare with
    for role in ("generator", "rollout", "reward", "reference", "learner"):
        assert any(line[f"idle/{role}"] < 1 for line in lines), role
        assert all(0 <= line[f"idle/{role}"] <= 1 for line in lines), role
    assert all(line["idle/rollout"] < line["idle/reward"] for line in lines), "the environments take their time"
    hits = [line["generator/prefix_hit_rate"] for line in lines if "generator/prefix_hit_rate" in line]
    assert hits and all(0 <= share < 1 for share in hits), "of what finished since the last line, if anything has"
    for name in ("publish/bytes", "publish/full_bytes", "publish/transfer_s", "publish/load_s"):
        assert all(line[name] > 0 for line in lines), name


def test_every_token_has_the_log_prob_of_the_version_that_it_names(asynchronous):
    """Across swaps in the middle of episodes, against plain transformers on each version's checkpoint."""
    folders = {read_state(f).version: f for f in (asynchronous / "checkpoints").glob("step=*")}
    mixed = [row for s in range(1, STEPS) for row in episodes(asynchronous, s) if len(set(row["versions"]) - {-1}) > 1]
    assert mixed, "no episode saw two versions"
    checked = 0
    for row in mixed[:6]:
        versions = np.asarray(row["versions"])
        for version in set(versions) - {-1}:
            if version in folders:
                expected = full_softmax_logprobs(folders[version], row["tokens"], 1.0)
                own = versions == version
                assert np.abs(expected - row["logprobs"])[own].max() < 1e-4
                checked += own.sum()
    assert checked > 50


def test_every_task_was_consumed_exactly_once(asynchronous):
    account = audit(asynchronous)[0]
    assert account.right and account.steps == STEPS
    assert account.ends["trained"] + account.ends["filtered"] == 6 * STEPS
    assert account.ends["trained"] > 0 < account.ends["filtered"]
    for line in read_lines(asynchronous / "consumed.jsonl"):
        final = [g for g in line["groups"] if g["end"] != "stale"]
        assert len(final) == 6, "what a filter took leaves a gap in its step, and none in a later one"
    told = repertory("audit", str(asynchronous))
    assert told.returncode == 0 and f"{account.ends['trained']} " in told.stdout, told.stdout
