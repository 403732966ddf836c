"""Data of one's own, end to end: prompts, demonstrations and a reward from files and dotted paths."""

import json

from conftest import repertory

from rl.metrics import read_lines


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_demonstrations_and_a_reward_by_path(small_run, tmp_path):
    """The README's example on the small run's checkpoint; two learner ranks; then resumed for two more steps."""
    questions = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(8) for b in range(8)]
    chats = [
        {"messages": [{"role": "user", "content": q["prompt"]}, {"role": "assistant", "content": q["answer"]}]}
        for q in questions
    ]
    config = tmp_path / "own.yaml"
    config.write_text(
        json.dumps(  # JSON is YAML
            {
                "run": {"name": "own", "root": str(tmp_path / "runs")},
                "model": {"path": str(small_run.folder / "checkpoints" / "latest"), "max_length": 200},
                "env": {"name": "rows", "prompts": str(write(tmp_path / "questions.jsonl", questions))},
                "reward": {"function": "own_reward.digits"},
                "learner": {"count": 2, "zero_stage": 1, "cpus": 0.25},
                "rollout": {"max_turn_tokens": 8},
                "stages": [
                    {"kind": "sft", "steps": 2, "batch_size": 8,
                     "demonstrations": {"path": str(write(tmp_path / "chats.jsonl", chats))}},
                    {"kind": "rl", "steps": 2, "tasks_per_step": 4, "checkpoint_every": 1, "algo": {"group_size": 2}},
                ],
            }
        )
    )  # fmt: skip
    done = repertory("train", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "own"
    lines = read_lines(run / "metrics.jsonl")
    assert [line["stage"] for line in lines] == ["sft", "sft", "rl", "rl"]
    assert all("reward/digits" in line for line in lines[2:])

    again = repertory("train", str(config), "--resume", "stages.1.steps=4")
    assert again.returncode == 0, again.stdout + again.stderr
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    versions = [line["version"] for line in lines if line["stage"] == "rl"]
    assert versions == sorted(set(versions)), "a version number was used twice"
    played = [row for f in sorted((run / "trajectories").glob("rl-*.parquet")) for row in [f.name]]
    assert len(played) == 4
