"""What `repertory audit` says of a run that is right, and of one whose folder tells of a loss or a double."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from conftest import Run, repertory

from actors.audit import audit
from rl.metrics import read_lines

RL = 3


@pytest.fixture
def copy(small_run: Run, tmp_path):
    shutil.copytree(small_run.folder, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def edit(run, change):
    """Change the list of consumed.jsonl's lines in place."""
    lines = read_lines(run / "consumed.jsonl")
    change(lines)
    (run / "consumed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_whole_run_is_right(small_run: Run):
    account = audit(small_run.folder)[RL]
    assert account.right
    assert (account.steps, account.ends, account.under_way) == (3, {"trained": 24}, 0)
    told = repertory("audit", str(small_run.folder))
    assert told.returncode == 0 and "24" in told.stdout


HARMS = {
    "a group that never ended": (
        lambda lines: lines[1]["groups"].pop(0), "lost", "group 0 of slot 1 was drawn and never ended"
    ),
    "a step without a line": (lambda lines: lines.pop(1), "lost", "step 2 has no line"),
    "a step twice": (lambda lines: lines.append(lines[1]), "twice", "step 2 has 2 lines"),
    "a group twice": (
        lambda lines: lines[2]["groups"].append(lines[1]["groups"][3]), "twice", "group 3 of slot 1 ended 2 times"
    ),
    "a task twice": (
        lambda lines: lines[2]["groups"][0].update(index=lines[1]["groups"][0]["index"]), "twice", "was drawn for 2"
    ),
    "a group that is only said to be trained on": (
        lambda lines: lines[0]["groups"][0].update(task="another"), "episodes", "no episode 0 of task another"
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_what_the_account_lacks_or_has_twice_is_found(copy, harm):
    change, where, says = HARMS[harm]
    edit(copy, change)
    found = getattr(audit(copy)[RL], where)
    assert any(says in text for text in found), found


def test_an_episode_too_few_or_too_many_is_found(copy):
    path = copy / "trajectories" / f"rl-{RL:02d}-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    assert len(audit(copy)[RL].episodes) == 1
    path.unlink()
    assert audit(copy)[RL].episodes == [f"{path.name} is missing"]


def test_the_command_exits_with_1_and_says_what(copy):
    edit(copy, lambda lines: lines.pop(1))
    told = repertory("audit", str(copy))
    assert told.returncode == 1 and "stage 3: step 2 has no line" in told.stdout
    nowhere = repertory("audit", str(copy / "nowhere"))
    assert nowhere.returncode == 2 and "is no run folder" in nowhere.stderr
