"""configs/from_feedback.yaml as it is shipped: with little feedback, and with too little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.preflight import check_pairs
from rl.config_file import ConfigError, load_config
from rl.config_stage import PairStage
from rl.env import World
from rl.metrics import read_lines
from rl.pretrained import prepare_model
from serve.feedback import Feedback

ROOT = Path(__file__).parent.parent.parent
CONFIG = "configs/from_feedback.yaml"


def corrected(folder: Path, count: int) -> Path:
    """Where the pairs of so many sessions are, each with one turn that was corrected."""
    for n in range(count):
        events = [
            {"type": "created", "sample": 0, "version": 1},
            {"type": "prompt", "messages": [{"role": "system", "content": "brief"}], "tools": []},
            {"type": "user", "content": f"{n}+1"},
            {"type": "turn", "turn": 0, "text": "9", "token_ids": [], "asks": True},
        ]
        numbered = [{**event, "seq": seq, "time": 0.0} for seq, event in enumerate(events)]
        Feedback(folder).record(f"s{n}", numbered, 0, "down", str(n + 1))
    return folder / "feedback"


def test_the_shipped_stages_train_on_one_pair(tmp_path, quickstart_config):
    small = ("model.scratch.layers=1", "model.scratch.hidden=32", "model.scratch.heads=1")
    config = quickstart_config(*small)
    model = prepare_model(config.model, World(config.env, 0), 0, tmp_path / "model")
    settings = [
        f"run.root={tmp_path}", f"model.path={model}", f"stages.1.pairs.path={corrected(tmp_path / 'serve', 1)}",
        "stages.1.steps=3", "stages.0.n=2", "stages.2.n=2", "env.max_turns=1", "rollout.max_turn_tokens=4",
    ]  # fmt: skip
    done = subprocess.run(
        [Path(sys.executable).parent / "repertory", "train", CONFIG, *settings],
        capture_output=True, text=True, timeout=200, cwd=ROOT, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_lines(tmp_path / "from-feedback" / "metrics.jsonl")
    assert [line["stage"] for line in lines] == ["preference"] * 3


def stage(*settings: str) -> PairStage:
    found = load_config(ROOT / CONFIG, settings).stages[1]
    assert isinstance(found, PairStage)
    return found


def test_too_few_pairs_are_named_before_anything_starts(tmp_path):
    pairs = str(corrected(tmp_path, 3))
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
