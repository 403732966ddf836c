"""configs/from_feedback.yaml as it is shipped: with little feedback, with ratings alone, and with too little."""

import json
from pathlib import Path

import pytest
import yaml
from running import ROOT, repertory

from actors.preflight import check_pairs
from rl.config_file import ConfigError, load_config
from rl.config_stage import PairStage
from rl.env import World
from rl.metrics import read_lines
from rl.pretrained import prepare_model
from serve.feedback import Feedback

CONFIG = "configs/from_feedback.yaml"


def rated(folder: Path, corrections: int, ratings: int = 0) -> Path:
    """Feedback of sessions with one turn each: corrected after a thumb down, or with a thumb up or down alone."""
    for n in range(corrections + ratings):
        events = [
            {"type": "created", "sample": 0, "version": 1},
            {"type": "prompt", "messages": [{"role": "system", "content": "brief"}], "tools": []},
            {"type": "user", "content": f"{n}+1"},
            {"type": "turn", "turn": 0, "text": "9", "token_ids": [], "asks": True},
        ]
        numbered = [{**event, "seq": seq, "time": 0.0} for seq, event in enumerate(events)]
        rating, correction = ("down", str(n + 1)) if n < corrections else ("up" if n % 2 else "down", None)
        Feedback(folder).record(f"s{n}", numbered, 0, rating, correction)
    return folder / "feedback"


def test_the_shipped_stages_train_on_one_pair_and_kto_on_ratings_alone(tmp_path, quickstart_config):
    small = ("model.scratch.layers=1", "model.scratch.hidden=32", "model.scratch.heads=1")
    config = quickstart_config(*small)
    model = prepare_model(config.model, World(config.env, 0), 0, tmp_path / "model")
    feedback = rated(tmp_path / "serve", corrections=1, ratings=3)
    shipped = yaml.safe_load((ROOT / CONFIG).read_text())["stages"]
    preference = {**shipped[1], "steps": 2, "pairs": {"path": str(feedback)}}
    kto = {**preference, "loss": "kto", "batch_size": 2, "pairs": {"path": str(feedback / "ratings")}}
    stages = [{**shipped[0], "n": 2}, preference, {**shipped[2], "n": 2}, kto]
    settings = [
        f"run.root={tmp_path}", f"model.path={model}", f"stages={json.dumps(stages)}", "env.max_turns=1",
        "rollout.max_turn_tokens=4",
    ]  # fmt: skip
    done = repertory("train", CONFIG, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_lines(tmp_path / "from-feedback" / "metrics.jsonl")
    assert [line["stage"] for line in lines] == ["preference"] * 4
    assert "preference/kto_kl" in lines[2] and "preference/kto_kl" not in lines[0]


def stage(*settings: str) -> PairStage:
    found = load_config(ROOT / CONFIG, settings).stages[1]
    assert isinstance(found, PairStage)
    return found


def test_too_few_pairs_are_named_before_anything_starts(tmp_path):
    pairs = str(rated(tmp_path, corrections=3))
    check_pairs(1, stage("stages.1.batch_size=3"), pairs)
    with pytest.raises(ConfigError, match=r"stages\[1\]\.pairs\.path: .* has 3 pairs.*batch_size is 4: lower .* 3"):
        check_pairs(1, stage("stages.1.batch_size=4"), pairs)


def test_ratings_count_as_kto_takes_them(tmp_path):
    """One of either label in the place of a pair, of which the fewer come again."""
    rows = [{"messages": "[]", "label": label} for label in (1, 1, 1, -1)]
    file = tmp_path / "ratings.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    check_pairs(1, stage("stages.1.loss=kto", "stages.1.batch_size=3"), str(file))
    with pytest.raises(ConfigError, match="has 3 ratings of one kind"):
        check_pairs(1, stage("stages.1.loss=kto", "stages.1.batch_size=4"), str(file))
