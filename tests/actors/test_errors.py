"""A user's mistakes, through the command: one message, exit code 2, no traceback, nothing written."""

import sys

import pytest
from conftest import ROOT, repertory

from actors.cli import main

QUICK = "configs/quickstart.yaml"

MISTAKES = {
    "unknown key": ([QUICK, "stages.3.algo.clip_lo=1"], "Did you mean stages[3].algo.clip_low?"),
    "wrong type": ([QUICK, "run.seed=early"], "run.seed"),
    "missing model": ([QUICK, "model.scratch=null", "model.path=./no-such-model"], "no such folder"),
    "missing package": ([QUICK, "model.scratch=null", "model.path=package://nothing_here/x.gguf"], "not installed"),
    "does not divide": ([QUICK, "stages.3.algo.mini_batches=7"], "does not divide"),
    "group of one": ([QUICK, "stages.3.algo.group_size=1"], "a group of one has no baseline"),
    "top-p": ([QUICK, "rollout.top_p=0.9"], "bias every importance ratio"),
    "no disk": ([QUICK, "run.keep_checkpoints=100000000"], "GiB free"),
    "no config": (["configs/nothing.yaml"], "no such configuration file"),
    "no reward": ([QUICK, "reward.function=no_such_module.f"], "cannot import 'no_such_module'"),
    "nothing to resume": ([QUICK, "--resume"], "no complete checkpoint"),
    "no demonstrations": ([QUICK, "stages.1.demonstrations.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
}


def command(*arguments: str, monkeypatch, capsys) -> tuple[int, str, str]:
    """The command in this process: importing the engines once is enough."""
    monkeypatch.setattr(sys, "argv", ["repertory", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message(mistake, tmp_path, monkeypatch, capsys):
    arguments, says = MISTAKES[mistake]
    monkeypatch.chdir(ROOT)
    asked = ["train", *arguments[:1], f"run.root={tmp_path / 'runs'}", *arguments[1:]]
    code, out, err = command(*asked, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2, out + err
    assert says in err and err.startswith("error:")
    assert "Traceback" not in out + err
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_is_too_small_says_which_role_wants_what(tmp_path):
    root = f"run.root={tmp_path / 'runs'}"
    done = repertory("train", QUICK, root, "generator.cpus=64", "learner.cpus=32")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "generator: 1 x 64 CPU" in done.stderr and "learner: 1 x 32 CPU" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["train", "eval", "doctor", "view"])
def test_help_shows_an_example(name, monkeypatch, capsys):
    code, out, _ = command(name, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and f"repertory {name} " in out and "Example" in out
