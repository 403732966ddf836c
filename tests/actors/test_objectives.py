"""Every policy-gradient objective improves the agent: configs/objectives.yaml in small, one run on the real engines."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, repertory

from rl.config_algo import AlgoName
from rl.config_file import load_config
from rl.config_stage import RlStage, SftStage
from rl.metrics import read_lines

EASIER = ["env.min_operations=1", "env.max_operations=2", "env.max_digits=2", "env.max_turns=4", "model.max_length=192"]
STEPS = 8
STAGES = load_config(ROOT / "configs" / "objectives.yaml").stages
OBJECTIVES = [s.algo.name for s in STAGES if isinstance(s, RlStage)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each objective's steps, 128 episodes each; all start from the same 300 steps of SFT."""
    stages: list[dict[str, Any]] = []
    for stage in STAGES:
        if isinstance(stage, SftStage):
            stages.append(stage.model_copy(update={"steps": 300}).model_dump(mode="json"))
        elif isinstance(stage, RlStage):
            fewer = {"steps": STEPS, "tasks_per_step": stage.tasks_per_step * 2 // 3}
            stages.append(stage.model_copy(update=fewer).model_dump(mode="json"))
    root = tmp_path_factory.mktemp("objectives")
    settings = [f"run.root={root}", f"stages={json.dumps(stages)}", "rollout.max_turn_tokens=48", *EASIER]
    done = repertory("train", "configs/objectives.yaml", *settings, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_lines(Path(root) / "objectives" / "metrics.jsonl")
    return {name: [x for x in lines if x["stage_index"] == i + 1] for i, name in enumerate(OBJECTIVES)}


def test_the_config_has_every_objective():
    assert sorted(OBJECTIVES) == sorted(AlgoName.__args__)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_improves_the_agent(trained, name):
    """From the SFT's success, which is that of all objectives' first steps together, to that of the last two steps."""
    firsts = [steps[0]["reward/success"] for steps in trained.values()]
    before = sum(firsts) / len(firsts)
    assert [step["stage_step"] for step in trained[name]] == [*range(1, STEPS + 1)]
    after = sum(step["reward/success"] for step in trained[name][-2:]) / 2
    assert 0.2 < before < 0.6
    assert after > before + 0.15, f"{before:.2f} -> {after:.2f}"
