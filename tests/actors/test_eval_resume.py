"""An evaluation by the actors that is killed goes on where it was."""

import json
import shutil
import time

import pytest
from conftest import Run, repertory, started

from actors.evaluation import KeptGroups
from rl.checkpoint import newest
from rl.metrics import read_lines
from rl.trajectory import read_parquet


def test_a_killed_evaluation_plays_no_finished_task_again(small_run: Run, tmp_path):
    """SIGKILL of the command when some tasks are finished, and the same command with --resume."""
    slow = "rollout.episodes_in_flight=1"
    asked = ["eval", str(newest(small_run.folder)), "stages.0.n=10", "stages.0.samples=2", slow]
    run = tmp_path / "small-eval-1"
    process = started(*asked, f"run.root={tmp_path}")
    deadline = time.monotonic() + 200
    while len(parts := sorted(run.glob("trajectories/.eval-00.step=0/sampled-*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = [row for part in parts for row in read_parquet(part)]
    assert not (run / "eval.jsonl").exists() and 6 <= len(before) < 20

    done = repertory(*asked, f"run.root={tmp_path}", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = read_lines(run / "eval.jsonl")
    rows = read_parquet(run / "trajectories" / "eval-00-sampled.parquet")
    assert (line["n"], line["samples"], len(rows)) == (10, 2, 20)
    assert len({(row["task"], row["sample"]) for row in rows}) == 20
    took = {(row["task"], row["sample"]): row["duration_s"] for row in rows}
    assert all(took[row["task"], row["sample"]] == row["duration_s"] for row in before), "none is played again"
    assert "of 10 tasks were finished before" in (run / "logs" / "run.log").read_text()
    assert line["wall_s"] > sum(row["duration_s"] for row in before), "with the time before it was killed"
    assert [path.name for path in (run / "trajectories").iterdir() if path.name.startswith(".")] == []


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
