"""Stages that sample for themselves, a reward model, a critic, adapters: whole runs by the command, on real engines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL, repertory
from safetensors.torch import load_file

from rl.metrics import read_lines

TINY = [s for s in SMALL if not s.startswith("stages")]


def run(root: Path, name: str, stages: list[dict[str, Any]], *more: str) -> tuple[Path, list[dict[str, Any]]]:
    settings = [f"run.root={root}", f"run.name={name}", f"stages={json.dumps(stages)}", *TINY, *more]
    done = repertory("train", "configs/quickstart.yaml", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / name, read_lines(root / name / "metrics.jsonl")


SFT = {"kind": "sft", "steps": 10, "batch_size": 16, "demonstrations": {"count": 64}}
SAMPLE = {"tasks": 12, "samples": 4}
PREFERENCE = {"kind": "preference", "batch_size": 4, "lr": 1e-4}


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Every kind of stage in one run; the reward has successes from the first step on (own_reward.digits)."""
    margin = {"rule": "margin", "margin": 0.01}
    stages = [
        SFT,
        {**PREFERENCE, "steps": 2, "rounds": 2, "loss": "kto", "sample": SAMPLE, "pairs": margin, "mix_previous": 0.5},
        {**PREFERENCE, "steps": 1, "loss": "sigmoid", "reference": "last_iterate", "sample": SAMPLE,
         "pairs": {"rule": "demonstration"}},
        {"kind": "sft", "steps": 2, "batch_size": 8, "data_stage": "s3ft", "sample": SAMPLE, "rounds": 2,
         "masked_thought": {"rate": 0.3}},
        {"kind": "reward_model", "steps": 2, "batch_size": 4, "sample": SAMPLE, "pairs": margin},
        {"kind": "rl", "steps": 3, "tasks_per_step": 4, "lr": 1e-4,
         "horizon": {"every": 1, "turns": [1, 2, 3]}, "curriculum": {"pool": 6, "samples": 2, "parts": 2},
         "algo": {"name": "ppo", "group_size": 4, "critic": {"lr": 1e-3, "warmup_steps": 1},
                  "proximal": "recompute", "importance": {"kind": "truncated"},
                  "kl": {"coefficient": 0.1, "final": 0.0}, "filters": [{"name": "zero_variance"}], "oversample": 2.0}},
        {"kind": "rl", "start": 0, "steps": 2, "tasks_per_step": 2, "lr": 1e-9, "algo": {"kl": {"coefficient": 0.1}}},
    ]  # fmt: skip
    return run(tmp_path_factory.mktemp("composed"), "run", stages, "reward.model=trained", "reward.success_at=0.1")


def of(lines: list[dict[str, Any]], stage: int) -> list[dict[str, Any]]:
    return [line for line in lines if line["stage_index"] == stage]


def test_a_preference_stage_pairs_what_it_sampled_round_after_round(composed):
    _, lines = composed
    first, _, second, _ = of(lines, 1)
    assert [line["round"] for line in of(lines, 1)] == [0, 0, 1, 1]
    assert first["data/pair"] == 1 and first["data/examples"] >= 4
    assert first["preference/margin"] == pytest.approx(0, abs=1e-4), "the policy is its own reference at first"
    assert second["preference/margin"] != 0
    assert all(line["preference/logprob_chosen"] < 0 for line in of(lines, 1))
    assert of(lines, 2)[0]["preference/margin"] == pytest.approx(0, abs=1e-4)


def test_an_sft_stage_relabels_what_it_sampled(composed):
    _, lines = composed
    first = of(lines, 3)[0]
    shares = {k: v for k, v in first.items() if k in ("data/self", "data/paraphrase", "data/gold")}
    assert sum(shares.values()) == pytest.approx(1) and shares["data/self"] > 0
    assert [line["round"] for line in of(lines, 3)] == [0, 0, 1, 1]
    assert [line["sft/masked_share"] for line in of(lines, 3)] == pytest.approx([0, 0.225] * 2)  # 0.3 / (2/3 x 2)


def test_a_reward_model_is_trained_saved_and_scores_the_stages_after_it(composed):
    folder, lines = composed
    assert of(lines, 4)[0]["reward_model/margin"] == pytest.approx(0, abs=1e-6), "its head starts at zero"
    assert of(lines, 4)[1]["reward_model/loss"] > 0
    assert yaml.safe_load((folder / "reward_model" / "config.json").read_text())["architectures"] == [
        "Qwen3ForSequenceClassification"
    ]
    assert all(line["reward/model"] == pytest.approx(line["reward/mean"], abs=1e-4) for line in of(lines, 5))


def test_ppo_has_a_critic_a_horizon_a_curriculum_and_a_schedule(composed):
    folder, lines = composed
    steps = of(lines, 5)
    assert [s["curriculum/max_turns"] for s in steps] == [1, 2, 3]
    assert [s["num_turns/mean"] <= s["curriculum/max_turns"] for s in steps] == [True] * 3
    assert [s["curriculum/open_tasks"] for s in steps] == [3, 3, 6]
    assert [s["actor/kl_coefficient"] for s in steps] == pytest.approx([0.1, 0.05, 0.0])
    assert "actor/pg_loss" not in steps[0], "in the critic's warm-up the policy stands still"
    assert all("critic/loss" in s and s["filter/drawn_groups"] >= 4 for s in steps)
    assert steps[1]["importance/weight"] == pytest.approx(1, abs=1e-2), "generator and learner agree"
    assert len(json.loads((folder / "curriculum-05.json").read_text())) == 6


def test_a_stage_starts_from_where_an_earlier_one_ended(composed):
    """Learner, generator and reference: a learning rate of 1e-9 keeps the weights where they started."""
    folder, lines = composed
    first, second = of(lines, 6)
    ends = [load_file(folder / "checkpoints" / name / "model.safetensors") for name in ("step=10", "latest")]
    assert all(torch.allclose(ends[0][n], ends[1][n], rtol=0, atol=1e-7) for n in ends[0])
    assert [first["actor/kl"], second["actor/kl"]] == pytest.approx([0, 0], abs=1e-5)
    assert abs(first["mismatch/kl"]) < 1e-5, "the episodes came from these weights"
    before = load_file(folder / "checkpoints" / "step=24" / "model.safetensors")
    matrices = [n for n in before if n.endswith("proj.weight")]
    assert not any(torch.allclose(before[n], ends[1][n], rtol=0, atol=1e-6) for n in matrices)


@pytest.mark.parametrize("publish", ["merged", "adapter"])
def test_adapters_are_trained_and_published(tmp_path: Path, publish: str):
    """The probe proves every load. The reference is the base with the adapter off: no reference actor runs."""
    rl = {"kind": "rl", "steps": 2, "tasks_per_step": 4, "lr": 1e-3, "algo": {
        "name": "grpo", "group_size": 4, "kl": {"coefficient": 0.1}}}  # fmt: skip
    lora = ["learner.lora.rank=4", f"learner.lora.publish={publish}"]
    folder, lines = run(tmp_path, publish, [SFT, rl], *lora)
    steps = of(lines, 1)
    assert all(step["mismatch/probe_mean_diff"] < 1e-3 for step in steps)
    assert steps[0]["actor/kl"] == pytest.approx(0, abs=1e-4) and steps[1]["actor/kl"] > 0
    assert (steps[1]["publish/bytes"] < 100_000) == (publish == "adapter")
    roles = {status["role"] for status in read_lines(folder / "logs" / "actors.jsonl")}
    assert "reference" not in roles
