"""What a run leaves on disk, and that it is true: one real run of every role, looked at from outside."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, Run, full_softmax_logprobs, repertory

from rl.checkpoint import newest, read_state
from rl.config_file import load_config
from rl.metrics import read_lines
from rl.trajectory import read_parquet

STEPS = 3


@pytest.fixture(scope="module")
def rl_rows(small_run: Run):
    return {s: read_parquet(small_run.folder / "trajectories" / f"rl-03-{s:05d}.parquet") for s in range(STEPS)}


def test_every_role_is_a_process_of_its_own_and_was_called(small_run: Run):
    last = {s["role"]: s for s in read_lines(small_run.folder / "logs" / "actors.jsonl")}
    assert {"controller", "generator", "rollout", "reward", "reference", "learner", "buffer"} <= set(last)
    assert len({s["pid"] for s in last.values()}) == len(last)
    assert last["reward"]["calls"]["score"] > 0
    assert last["reference"]["calls"]["columns"] == STEPS
    assert last["learner"]["calls"]["step"] == 12 + 2 * STEPS


def test_metrics_have_a_line_a_step_with_the_charted_names(small_run: Run):
    lines = read_lines(small_run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 12 + STEPS + 1))
    assert [line["stage"] for line in lines] == ["sft"] * 12 + ["rl"] * STEPS
    expected = {
        "reward/mean", "reward/digits", "actor/pg_loss", "actor/entropy", "actor/kl", "actor/clip_fraction",
        "response_length/mean", "num_turns/mean", "perf/tokens_per_second", "mismatch/kl", "mismatch/max_logprob_diff",
        "staleness/mean", "faults/data", "faults/infra",
        *(f"timing_s/{t}" for t in ("generate", "reward", "reference", "update", "publish", "step")),
    }  # fmt: skip
    assert expected <= set(lines[-1])
    assert all(np.isfinite(line["actor/pg_loss"]) for line in lines[12:])


def test_evaluations_have_the_promised_fields(small_run: Run):
    lines = read_lines(small_run.folder / "eval.jsonl")
    assert [(line["stage"], line["objective"]) for line in lines] == [("base", ""), ("sft", ""), ("rl", "grpo")]
    for line in lines:
        assert {"step", "split", "n", "temperature", "success", "success_greedy", "mean_turns"} <= set(line)
        budget = list(line["success_by_turn_budget"].values())
        assert budget == sorted(budget) and budget[-1] == line["success"]
        assert line["n"] == 8 and line["split"] == "held_out"


def test_behaviour_logprobs_are_those_of_the_stamped_version(small_run: Run, rl_rows):
    """At temperature 0.7, against an independent forward pass of the checkpoint that is that version."""
    checkpoint = small_run.folder / "checkpoints" / "step=12"
    version = read_state(checkpoint).version
    for row in rl_rows[0][:8]:
        mask = np.asarray(row["loss_mask"])
        assert set(np.asarray(row["versions"])[mask]) == {version}
        expected = full_softmax_logprobs(checkpoint, row["tokens"], 0.7)
        assert np.abs(expected - row["logprobs"])[mask].max() < 1e-4
        # The figure is the tempered distribution's: at temperature 1 it would be another.
        assert np.abs(full_softmax_logprobs(checkpoint, row["tokens"], 1.0) - row["logprobs"])[mask].max() > 1e-2


def test_each_step_samples_from_the_next_version(rl_rows):
    versions = [{v for row in rows for v in row["versions"] if v >= 0} for rows in rl_rows.values()]
    assert versions == [{1}, {2}, {3}]


def test_with_equal_weights_every_ratio_is_one(small_run: Run):
    """The generator's log-probs of every sampled token against the learner's, before a batch's first update."""
    for line in read_lines(small_run.folder / "metrics.jsonl")[12:]:
        assert 0 < line["mismatch/max_logprob_diff"] < 1e-4
        assert line["mismatch/probe_mean_diff"] < 1e-5


def test_masks_and_turns_agree(rl_rows):
    for row in rl_rows[0]:
        mask, turn = np.asarray(row["loss_mask"]), np.asarray(row["turn"])
        lengths = {len(row[name]) for name in ("tokens", "loss_mask", "turn", "logprobs", "versions")}
        assert len(lengths) == 1
        assert not mask[turn == -1].any() and (np.asarray(row["logprobs"])[~mask] == 0).all()
        assert (np.diff(turn) >= 0).all()
        assert len(row["turn_rewards"]) == turn.max() + 1
        assert json.loads(row["messages"])[0]["role"] == "user"


def test_the_checkpoint_loads_in_plain_vllm_and_transformers(small_run: Run):
    from vllm import LLM, SamplingParams

    folder = newest(small_run.folder)
    assert folder is not None and folder.name == f"step={12 + STEPS}"
    assert (small_run.folder / "checkpoints" / "latest").resolve() == folder.resolve()
    settings = {"max_model_len": 200, "enforce_eager": True, "enable_chunked_prefill": False}
    llm = LLM(str(folder), dtype="float32", kv_cache_memory_bytes=1 << 28, **settings)
    out = llm.generate([{"prompt_token_ids": [1, 5, 9, 2]}], SamplingParams(max_tokens=4, temperature=0, logprobs=0))
    ids = [1, 5, 9, 2, *out[0].outputs[0].token_ids]
    got = [next(iter(at.values())).logprob for at in out[0].outputs[0].logprobs]
    assert np.abs(full_softmax_logprobs(folder, ids, 1.0)[4:] - got).max() < 1e-4


def test_wandb_wrote_a_real_offline_run_with_episodes(small_run: Run):
    files = list((small_run.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 1000
    assert list((small_run.folder / "wandb").glob("offline-run-*/files/media/table/episodes*.json"))


def test_the_closing_table_and_places_are_printed(small_run: Run):
    for word in ("base", "sft", "rl", "success (sampled)", "checkpoints/latest", "metrics.jsonl"):
        assert word in small_run.output


def test_view_shows_the_run(small_run: Run):
    done = repertory("view", str(small_run.folder), "--step", "1", "--episodes", "1", "--tokens")
    assert done.returncode == 0, done.stderr
    assert "reward" in done.stdout


def test_checkpoints_are_evaluated_side_by_side_and_once(small_run: Run, tmp_path):
    newest, *_, oldest = sorted((small_run.folder / "checkpoints").glob("step=*"), key=lambda p: -int(p.name[5:]))
    asked = ["eval", str(newest), str(oldest), f"run.root={tmp_path}", "stages.0.n=4", "env.max_digits=2"]
    done = repertory(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    made = [tmp_path / f"small-eval-{i}" for i in (1, 2)]
    for run, model in zip(made, (newest, oldest), strict=True):
        (line,) = read_lines(run / "eval.jsonl")
        assert line["n"] == 4 and line["wall_s"] > 0
        config = load_config(run / "config.yaml")
        assert config.model.path == str(model.resolve()) and config.env.max_digits == 2  # type: ignore[union-attr]
    first, second = ({r["task"] for r in read_parquet(m / "trajectories" / "eval-00-sampled.parquet")} for m in made)
    assert first == second
    assert json.loads((made[1] / "report.json").read_text())["against_first"]["n"] == 4
    assert "SR_8" in done.stdout and "in both" in done.stdout
    again = repertory(*asked, "--resume", timeout=60)
    assert again.returncode == 0 and again.stdout.count("is there already") == 2
    assert not (tmp_path / "small-eval-3").exists()


def test_a_second_run_on_the_folder_is_refused_and_nothing_is_touched(small_run: Run):
    before = (small_run.folder / "metrics.jsonl").read_text()
    root = f"run.root={small_run.folder.parent}"
    done = repertory("train", "configs/quickstart.yaml", root, "run.name=small", *SMALL)
    assert done.returncode == 2
    assert "run.overwrite=true" in done.stderr and "Traceback" not in done.stderr
    assert (small_run.folder / "metrics.jsonl").read_text() == before


def test_the_page_and_the_actors_agree(small_run: Run, rl_rows, tmp_path):
    """rl/loop.py on the same configuration: the same trajectories are consumed, and the same weights come out.

    Seeds are a function of task, sample and turn, so only rounding can differ: other batches in the engine, and
    DeepSpeed's optimizer against torch's. Measured: every token equal, log-probs within 2e-6. Adam divides by the
    square root of a second moment that is near 0 for rarely used weights, where rounding becomes a step of its own:
    at most lr a step, 12 + 6 steps; the bound allows a hundredth of that in the mean.
    """
    import os
    import subprocess
    import sys

    script = (
        "import sys, numpy as np; from pathlib import Path; from rl.loop import Loop; "
        "from rl.config_file import load_config; from safetensors.torch import save_file\n"
        "loop = Loop(load_config('configs/quickstart.yaml', sys.argv[2:]), Path(sys.argv[1])); loop.run()\n"
        "np.save(sys.argv[1] + '/tokens.npy', np.concatenate([t.tokens for t in loop.consumed]))\n"
        "np.save(sys.argv[1] + '/logprobs.npy', np.concatenate([t.logprobs for t in loop.consumed]))\n"
        "save_file({n: p.detach().clone() for n, p in loop.scorer.lm.named_parameters()}, sys.argv[1] + '/w.st')\n"
    )
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), *SMALL], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]

    rows = [row for step in range(STEPS) for row in rl_rows[step]]
    tokens = np.concatenate([row["tokens"] for row in rows])
    assert np.array_equal(np.load(tmp_path / "tokens.npy"), tokens)
    logprobs = np.concatenate([row["logprobs"] for row in rows])
    assert np.abs(np.load(tmp_path / "logprobs.npy") - logprobs).max() < 1e-3

    from safetensors.torch import load_file

    ours = load_file(newest(small_run.folder) / "model.safetensors")
    theirs = load_file(tmp_path / "w.st")
    start = load_file(small_run.folder / "initial" / "model.safetensors")
    moved = torch.cat([(theirs[n] - start[n]).abs().flatten() for n in theirs]).mean()
    apart = torch.cat([(theirs[n] - ours[n]).abs().flatten() for n in theirs]).mean()
    assert moved > 1e-3 and apart < 1e-2 * moved, (moved, apart)
