"""The recipes on the Python environment, in small, through the whole system: real sandbox, engine and learner."""

import json
from collections import defaultdict

import numpy as np
import pytest
from conftest import repertory

from rl.checkpoint import newest
from rl.metrics import read_lines
from rl.pretrained import load_tokenizer
from rl.trajectory import read_parquet

SMALL = [
    "model.scratch.layers=2",
    "stages.0.steps=90",
    "stages.0.batch_size=16",
    "stages.0.demonstrations.count=256",
    "stages.1.n=8",
    "stages.2.tasks_per_step=8",
    "stages.2.steps=2",
    "stages.3.n=8",
]


def played(tmp_path, recipe: str, *overrides: str):
    """Lines of the rl stage's metrics, its episodes step by step, and the run's folder."""
    path = f"configs/recipes/{recipe}.yaml"
    done = repertory("train", path, f"run.root={tmp_path}", "run.name=r", *SMALL, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "r"
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["stage"] == "rl"]
    return lines, [read_parquet(p) for p in sorted((folder / "trajectories").glob("rl-*.parquet"))], folder


def is_void(row) -> bool:
    return any("void" in flags for flags in row["turn_flags"])


def test_simpletir_trains_on_no_void_episode_and_counts_its_reward(tmp_path):
    only_void = "stages.2.algo.filters=[{name: void_turn, removes: loss}]"
    lines, steps, folder = played(tmp_path, "simpletir", only_void)
    codec = load_tokenizer(newest(folder))
    shown = mixed = 0
    for line, rows in zip(lines, steps, strict=True):
        void = np.mean([is_void(row) for row in rows])
        assert 0 < void < 1 and line["filter/void_turn"] == line["flags/void"] == pytest.approx(void)
        assert line["filter/trained"] == pytest.approx(1 - void), "and they are not trained on"
        groups = defaultdict(list)
        for row in rows:
            groups[row["task"]].append(row)
            mask, turn = np.asarray(row["loss_mask"]), np.asarray(row["turn"])
            seen = codec.decode(np.asarray(row["tokens"])[~mask & (turn >= 0)])
            said = codec.decode(np.asarray(row["tokens"])[mask])
            shown += "Code execution result:" in seen
            assert "Code execution result:" not in said or "Code execution result:" in seen
        for group in groups.values():
            rewards = np.array([row["reward"] for row in group])
            expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            for row, advantage in zip(group, expected, strict=True):
                assert row["advantage"] == pytest.approx(advantage, abs=1e-3), "void ones count in mean and std"
            mixed += any(map(is_void, group)) and not all(map(is_void, group)) and rewards.std() > 0
        assert line["observation_length/mean"] > 0
    assert shown and mixed, "there was something to tell"


def test_r1_code_interpreter_opens_its_tasks_by_potential_and_masks_what_was_printed(tmp_path):
    lines, steps, folder = played(
        tmp_path, "r1_code_interpreter_curriculum", "stages.2.curriculum={pool: 16, samples: 4, parts: 2}"
    )
    assert [line["curriculum/open_tasks"] for line in lines] == [8, 16]
    assert (folder / "curriculum-02.json").is_file()
    codec = load_tokenizer(newest(folder))
    printed = [
        codec.decode(np.asarray(row["tokens"])[~np.asarray(row["loss_mask"]) & (np.asarray(row["turn"]) >= 0)])
        for rows in steps for row in rows
    ]  # fmt: skip
    assert any("Code execution result:" in text for text in printed)
    assert all(line["observation_length/mean"] > 0 for line in lines)


def test_mint_states_budgets_and_an_evaluation_tells_what_feedback_is_worth(tmp_path):
    """Feedback by rules is in the context and in no loss; `eval --feedback` plays the tasks with it and without."""
    _, steps, folder = played(tmp_path, "mint", "stages.0.steps=40", "stages.2.steps=1")
    codec = load_tokenizer(newest(folder))
    told = 0
    for row in (row for rows in steps for row in rows):
        mask, turn = np.asarray(row["loss_mask"]), np.asarray(row["turn"])
        seen = codec.decode(np.asarray(row["tokens"])[~mask & (turn >= 0) & (turn < turn.max())])
        assert seen.count("Expert feedback: ") == sum("feedback" in flags for flags in row["turn_flags"][:-1])
        assert "Expert feedback" not in codec.decode(np.asarray(row["tokens"])[mask])
        assert ("You have 4 steps left" in seen) == (len(row["turn_flags"]) > 1)
        told += "Expert feedback: " in seen
    assert told
    done = repertory("eval", str(folder), "--feedback", f"run.root={tmp_path}", "stages.0.n=8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Δ feedback" in done.stdout and "SR_5" in done.stdout
    given, without = (read_parquet(tmp_path / f"r-eval-{i}/trajectories/eval-00-sampled.parquet") for i in (1, 2))
    assert {row["task"] for row in given} == {row["task"] for row in without} and len(given) == 8
    assert any("feedback" in flags for row in given for flags in row["turn_flags"])
    assert not any("feedback" in flags for row in without for flags in row["turn_flags"])
    report = json.loads((tmp_path / "r-eval-1" / "report.json").read_text())
    with_it, without_it = (np.mean([row["success"] for row in rows]) for rows in (given, without))
    assert report["delta_feedback"]["mean"] == pytest.approx(with_it - without_it)
