"""An evaluation by the actors that is killed goes on where it was."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, repertory, started, wait_until
from own_reward import is_beyond

from actors.evaluation import KeptGroups, is_group
from actors.run_folder import owner
from rl.checkpoint import newest
from rl.config_file import load_config
from rl.env import World
from rl.episode import GroupRequest
from rl.metrics import read_lines
from rl.task import Task
from rl.trajectory import SCHEMA, read_parquet, write_parquet


def groups(run: Path) -> dict[Path, list[dict[str, Any]]]:
    """The finished groups that are kept."""
    return {path: read_parquet(path) for path in sorted(run.glob("trajectories/.eval-00.step=0/sampled-*.parquet"))}


def wait_for_groups(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while len(groups(run)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_evaluation_plays_no_finished_task_again(small_run: Run, tmp_path):
    """SIGKILL of the command when some tasks are finished, the same one with --resume, SIGTERM, and once more.

    The reward function fails on some tasks: they are counted, and in no figure.
    """
    asked = [
        "eval", str(newest(small_run.folder)), f"run.root={tmp_path}", "stages.0.n=30", "stages.0.samples=2",
        "rollout.episodes_in_flight=1", "rollout.max_turn_tokens=20",
        "reward.function=own_reward.digits_of_most",
    ]  # fmt: skip
    run = tmp_path / "small-eval-1"
    begun = started(*asked)
    wait_for_groups(run, 3, begun)
    begun.kill()
    begun.wait()
    stopped = started(*asked, "--resume")
    while owner(run).get("pid") != stopped.pid:  # until then the status is of the one that was killed
        assert stopped.poll() is None, stopped.communicate()[0]
        time.sleep(0.02)
    wait_until(run, stopped, lambda status: status.phase == "eval")
    before = groups(run)
    stopped.send_signal(signal.SIGTERM)
    told = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == 2 and "the same command with --resume goes on" in told, told
    again = groups(run)
    assert not (run / "eval.jsonl").exists() and 3 <= len(before) <= len(again) < 25
    assert all(row in again[path] for path, rows in before.items() for row in rows), "none is played again"

    done = repertory(*asked, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = read_lines(run / "eval.jsonl")
    rows = read_parquet(run / "trajectories" / "eval-00-sampled.parquet")
    source = World(load_config(run / "config.yaml").env, 0).source
    tasks = [source.task("held_out", i).id for i in range(30)]
    known = [task for task in tasks if not is_beyond(task)]
    assert len(known) < 30, "there is something to fail on"
    assert [(row["task"], row["sample"]) for row in rows] == [(task, s) for task in known for s in (0, 1)]
    assert (line["n"], line["samples"]) == (len(known), 2)
    assert line["not_graded"] == 3 * (30 - len(known)) and line["not_played"] == 0, "two sampled and a greedy one each"
    assert "episodes not graded" in done.stdout
    took = {(row["task"], row["sample"]): row["duration_s"] for row in rows}
    kept = [row for rows in again.values() for row in rows]
    assert all(took[row["task"], row["sample"]] == row["duration_s"] for row in kept), "none is played again"
    assert "of 30 tasks were finished before" in (run / "logs" / "run.log").read_text()
    assert line["wall_s"] > sum(row["duration_s"] for row in kept), "with the time before it was killed"
    lengths = [sum(m for m, t in zip(r["loss_mask"], r["turn"], strict=True) if t == k) for r in rows for k in range(9)]
    assert 8 < max(lengths) <= 20, "rollout.max_turn_tokens bounds an evaluation's turns"
    assert (run / "trajectories" / ".eval-00.step=0").is_dir(), "the others need not be played for those that failed"


def test_a_file_of_other_tasks_or_a_damaged_one_is_no_finished_group(tmp_path):
    rows = [{name: [] if name.startswith(("t", "l", "v")) else None for name in SCHEMA.names} for _ in range(2)]
    request = GroupRequest(0, 0, Task("a", {}, ""), 2)
    file = tmp_path / "sampled-00000.parquet"

    def write(tasks: list[str]) -> None:
        write_parquet(file, [{**row, "task": task} for row, task in zip(rows, tasks, strict=False)])

    write(["a", "a"])
    assert is_group(file, request)
    for wrong in (["b", "b"], ["a"]):
        write(wrong)
        assert not is_group(file, request) and not file.exists()
    file.write_bytes(b"")
    assert not is_group(file, request) and not file.exists()
    assert not is_group(file, request)


def test_what_is_kept_is_of_the_same_settings_and_weights(tmp_path):
    kept = KeptGroups(tmp_path, 2, 30, {"temperature": 1.0})
    (kept.folder / "sampled-00000.parquet").touch()
    assert (KeptGroups(tmp_path, 2, 30, {"temperature": 1.0}).folder / "sampled-00000.parquet").is_file()
    assert list(KeptGroups(tmp_path, 4, 30, {"temperature": 1.0}).folder.glob("*.parquet")) == []
    assert list(KeptGroups(tmp_path, 2, 30, {"temperature": 0.5}).folder.glob("*.parquet")) == []
    (kept.folder / "sampled-00000.parquet").touch()
    KeptGroups.forget_after(tmp_path, 30)
    assert (kept.folder / "sampled-00000.parquet").is_file()
    KeptGroups.forget_after(tmp_path, 29)
    assert not kept.folder.exists(), "the step's weights will be others"


def test_time_between_two_attempts_is_not_counted(tmp_path):
    kept = KeptGroups(tmp_path, 0, 0, {})
    about = kept.folder / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "began": time.time() - 100.0}))
    assert time.time() - KeptGroups(tmp_path, 0, 0, {}).began == pytest.approx(100.0, abs=5.0)
    shutil.rmtree(kept.folder)
    assert time.time() - KeptGroups(tmp_path, 0, 0, {}).began < 5.0
