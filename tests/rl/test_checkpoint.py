"""A checkpoint is complete or absent, and the newest complete one is always found."""

import os

import pytest

from rl.checkpoint import State, newest, prune, read_state, write_state, writing

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


def test_newest_goes_by_number_and_wants_a_state(tmp_path):
    assert newest(tmp_path) is None
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step=200").mkdir()  # a folder that a copy left half done
    assert newest(tmp_path).name == "step=100"


def test_prune_keeps_the_newest_and_the_spared(tmp_path):
    for step in (1, 9, 10, 11, 100):
        save(tmp_path, step)
    prune(tmp_path, 2, spared={"step=9"})
    assert names(tmp_path) == ["latest", "step=100", "step=11", "step=9"]
    assert (tmp_path / "checkpoints" / "latest" / "state.json").is_file()
    prune(tmp_path, 5)
    assert len(names(tmp_path)) == 4
