"""A checkpoint is complete or absent, and the newest complete one is always found."""

import errno
import os
import re
import subprocess

import pytest

from rl.checkpoint import DiskFull, State, newest, prune, read_state, set_aside_after, write_state, writing

STATE = State(stage=1, stage_step=4, step=9, version=5, cursor=128, stage_start="step=5", ends={"0": "step=5"})


def save(run, step, text="weights"):
    with writing(run, step) as folder:
        (folder / "learner").mkdir()
        (folder / "learner" / "model.bin").write_text(text)
        write_state(folder, STATE)


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_state_round_trip(tmp_path):
    write_state(tmp_path, STATE)
    assert read_state(tmp_path) == STATE


def test_a_finished_one_is_whole_and_latest_points_to_it(tmp_path):
    save(tmp_path, 9)
    assert names(tmp_path) == ["latest", "step=9"]
    latest = tmp_path / "checkpoints" / "latest"
    assert (latest / "learner" / "model.bin").read_text() == "weights"
    assert os.readlink(latest) == "step=9"  # relative: the run directory may be moved
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step=9"


@pytest.mark.parametrize("before", [[], [3]])
@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=["oserror", "ctrl-c"])
def test_an_error_inside_leaves_nothing(tmp_path, before, error):
    for step in before:
        save(tmp_path, step)
    had = names(tmp_path) if before else []
    with pytest.raises(type(error)), writing(tmp_path, 4) as folder:
        (folder / "half").write_text("a half")
        raise error
    assert names(tmp_path) == had
    assert newest(tmp_path) == (tmp_path / "checkpoints" / "step=3" if before else None)


def test_nothing_is_visible_before_the_end(tmp_path):
    with writing(tmp_path, 4) as folder:
        write_state(folder, STATE)
        assert newest(tmp_path) is None
    assert newest(tmp_path).name == "step=4"


def test_what_a_killed_process_left_is_neither_found_nor_in_the_way(tmp_path):
    partial = tmp_path / "checkpoints" / ".step=4.partial"
    partial.mkdir(parents=True)
    write_state(partial, STATE)
    (partial / "stale").write_text("of the killed process")
    assert newest(tmp_path) is None
    save(tmp_path, 4)
    assert not (newest(tmp_path) / "stale").exists()


def test_writing_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 4, "old")
    save(tmp_path, 4, "new")
    assert (newest(tmp_path) / "learner" / "model.bin").read_text() == "new"
    assert names(tmp_path) == ["latest", "step=4"]


def test_newest_goes_by_number_and_wants_a_whole_one(tmp_path):
    assert newest(tmp_path) is None
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step=200").mkdir()  # a folder that a copy left half done
    assert newest(tmp_path).name == "step=100"


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "learner" / "model.bin").unlink(), r"learner/model\.bin is missing"),
        (lambda f: (f / "learner" / "model.bin").write_text("weig"), r"learner/model\.bin has 4 bytes of 7"),
        (lambda f: (f / "learner" / "model.bin").write_text("weighty"), r".*model\.bin does not have the checksum"),
        (lambda f: (f / "state.json").write_text(""), r"state\.json has 0 bytes"),
        (lambda f: (f / "files.json").write_text("{"), r"files\.json is missing or does not list"),
        (lambda f: (f / "files.json").write_text("{}"), r"files\.json is missing or does not list"),
        (lambda f: (f / "files.json").write_text("3"), r"files\.json is missing or does not list"),
        (lambda f: (f / "files.json").unlink(), r"files\.json is missing or does not list"),
    ],
)
def test_a_damaged_one_is_named_and_passed_over_for_the_one_before(tmp_path, harm, says):
    save(tmp_path, 4)
    save(tmp_path, 9)
    harm(tmp_path / "checkpoints" / "step=9")
    told = []
    assert newest(tmp_path, told.append).name == "step=4"
    assert len(told) == 1 and re.match(rf"checkpoint step=9 is damaged, and passed over: {says}", told[0])
    save(tmp_path, 9)
    assert newest(tmp_path, told.append).name == "step=9" and len(told) == 1


def test_a_damaged_one_that_is_set_aside_counts_for_nothing(tmp_path):
    for step in (4, 9):
        save(tmp_path, step)
    set_aside_after(tmp_path, 4)
    assert names(tmp_path) == ["damaged.step=9", "latest", "step=4"]
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step=4"
    save(tmp_path, 6)
    prune(tmp_path, 1)
    assert names(tmp_path) == ["damaged.step=9", "latest", "step=6"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if made.returncode:
        pytest.skip("mounting takes root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("error", [None, RuntimeError("torch: unexpected pos 512 vs 400")])
def test_a_full_disk_is_said_and_the_last_one_is_intact(small_disk, error):
    save(small_disk, 4)
    says = r"full: the checkpoint of step 9 was not written, the last one is step=4\. Free"
    with pytest.raises(DiskFull, match=says), writing(small_disk, 9) as folder:
        try:
            (folder / "much").write_bytes(b"x" * (2 << 20))
        except OSError:
            raise error or OSError(errno.ENOSPC, "No space left on device") from None
    assert names(small_disk) == ["latest", "step=4"]
    assert newest(small_disk).name == "step=4"


def test_prune_keeps_the_newest_and_the_spared(tmp_path):
    for step in (1, 9, 10, 11, 100):
        save(tmp_path, step)
    prune(tmp_path, 2, spared={"step=9"})
    assert names(tmp_path) == ["latest", "step=100", "step=11", "step=9"]
    assert (tmp_path / "checkpoints" / "latest" / "state.json").is_file()
    prune(tmp_path, 5)
    assert len(names(tmp_path)) == 4
