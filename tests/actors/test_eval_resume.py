"""An evaluation by the actors that is killed goes on where it was."""

import json
import shutil
import time

import pytest
from conftest import Run, repertory, started
from own_reward import is_beyond

from actors.evaluation import KeptGroups, is_group
from rl.checkpoint import newest
from rl.config_file import load_config
from rl.env import World
from rl.episode import GroupRequest
from rl.metrics import read_lines
from rl.task import Task
from rl.trajectory import SCHEMA, read_parquet, write_parquet


def test_a_killed_evaluation_plays_no_finished_task_again(small_run: Run, tmp_path):
    """SIGKILL of the command when some tasks are finished, and the same command with --resume.

    The reward function fails on some tasks: they are counted, and in no figure.
    """
    asked = [
        "eval", str(newest(small_run.folder)), f"run.root={tmp_path}", "stages.0.n=12", "stages.0.samples=2",
        "rollout.episodes_in_flight=1", "rollout.max_turn_tokens=20", "reward.function=own_reward.digits_of_most",
    ]  # fmt: skip
    run = tmp_path / "small-eval-1"
    process = started(*asked)
    deadline = time.monotonic() + 200
    while len(parts := sorted(run.glob("trajectories/.eval-00.step=0/sampled-*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = [row for part in parts for row in read_parquet(part)]
    assert not (run / "eval.jsonl").exists() and 6 <= len(before) < 24

    done = repertory(*asked, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = read_lines(run / "eval.jsonl")
    rows = read_parquet(run / "trajectories" / "eval-00-sampled.parquet")
    source = World(load_config(run / "config.yaml").env, 0).source
    tasks = [source.task("held_out", i).id for i in range(12)]
    known = [task for task in tasks if not is_beyond(task)]
    assert len(known) < 12, "there is something to fail on"
    assert [(row["task"], row["sample"]) for row in rows] == [(task, s) for task in known for s in (0, 1)]
    assert (line["n"], line["samples"]) == (len(known), 2)
    assert line["not_graded"] == 3 * (12 - len(known)) and line["not_played"] == 0, "two sampled and a greedy one each"
    assert "episodes not graded" in done.stdout
    took = {(row["task"], row["sample"]): row["duration_s"] for row in rows}
    assert all(took[row["task"], row["sample"]] == row["duration_s"] for row in before), "none is played again"
    assert "of 12 tasks were finished before" in (run / "logs" / "run.log").read_text()
    assert line["wall_s"] > sum(row["duration_s"] for row in before), "with the time before it was killed"
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
