"""A run that is stopped and resumed is the run that was not; and a folder has one owner."""

import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from chaos import kill_job
from conftest import SMALL, Run, repertory, started, wait_until
from safetensors.torch import load_file

from rl.metrics import read_lines
from rl.trajectory import read_parquet

CONFIG = "configs/quickstart.yaml"


def wait_for_a_line(folder: Path, process: subprocess.Popen[str], stage: str) -> None:
    """Until the first step of a stage is done."""
    while not any(line["stage"] == stage for line in read_lines(folder / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The session's small run once more: ended in its sft stage by SIGTERM, in its rl stage by `repertory stop` and by
    SIGKILL of every process."""
    root = tmp_path_factory.mktemp("stopped")
    folder = root / "small"
    settings = [CONFIG, f"run.root={root}", "run.name=small", *SMALL]

    first = started("train", *settings)
    wait_until(folder, first, lambda s: s.phase == "starting")
    second, status = repertory("train", *settings, "run.overwrite=true"), repertory("status", str(folder))
    assert (second.returncode, status.returncode) == (2, 0), second.stdout
    wait_for_a_line(folder, first, "sft")
    first.send_signal(signal.SIGTERM)
    told = [first.communicate(timeout=60)[0], second.stderr, status.stdout]
    assert first.returncode == 0, told[0]

    resumed = started("train", *settings, "--resume")
    wait_for_a_line(folder, resumed, "rl")
    stop = repertory("stop", str(folder))
    told += [resumed.communicate(timeout=60)[0], stop.stdout]
    assert (resumed.returncode, stop.returncode) == (0, 0), told[-1] + stop.stderr

    killed = started("train", *settings, "--resume")
    wait_until(folder, killed, lambda s: s.phase == "rl" and s.stage_step > 1)
    kill_job(killed.pid)
    killed.wait()

    last = repertory("train", *settings, "--resume")
    assert last.returncode == 0, last.stdout + last.stderr
    told += [last.stdout, repertory("status", str(folder)).stdout]
    return folder, told


def test_it_says_what_happened_and_where_it_stopped(stopped):
    _, (first, second, status, resumed, stop, last, done) = stopped
    steps = []
    for output in (first, resumed):
        assert "asked to stop: this step is finished first" in output
        found = re.search(r"stopped before its end, as asked: --resume goes on from step=(\d+)", output)
        assert found, output
        steps.append(int(found[1]))
    assert 0 < steps[0] < 12 < steps[1] < 15, "inside the sft stage, and inside the rl stage"
    assert "is being trained by process" in second and "repertory stop" in second
    assert "is being trained by process" in status and "starting the actors" in status
    assert "was stopped" in stop
    assert "resumed from step=" in last and "stopped before" not in last
    assert "is done" in done


def test_every_step_is_there_once_and_time_goes_on(stopped):
    lines = read_lines(stopped[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 16)]
    times = [line["time_s"] for line in lines]
    assert times == sorted(times)
    versions = [line["version"] for line in lines]
    assert versions == sorted(versions), "a version is never used again"


def test_it_sampled_and_learned_what_the_run_that_was_not_stopped_did(stopped, small_run: Run):
    for step in range(3):
        name = f"trajectories/rl-03-{step:05d}.parquet"
        ours, theirs = (read_parquet(folder / name) for folder in (stopped[0], small_run.folder))
        assert [row["task"] for row in ours] == [row["task"] for row in theirs]
        assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(ours, theirs, strict=True))
    last = "checkpoints/latest/model.safetensors"
    ours, theirs = (load_file(folder / last) for folder in (stopped[0], small_run.folder))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5
