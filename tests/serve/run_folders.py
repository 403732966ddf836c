"""Runs' folders that no run has made: checkpoints whose weights say which they are, and evaluations."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from rl import checkpoint
from rl.checkpoint import State


def make_checkpoint(run: Path, step: int, version: int) -> Path:
    """As rl/checkpoint.py writes one."""
    with checkpoint.writing(run, step) as folder:
        save_file({"weight": np.full((4, 4), version, np.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text('{"a": 1}')
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "model.safetensors"}}')
        (folder / "learner").mkdir()
        (folder / "learner" / "state.pt").write_bytes(b"x" * 1000)
        checkpoint.write_state(folder, State(0, step, step, version, 0))
    return run / "checkpoints" / f"step={step}"


def evaluate(run: Path, step: int, version: int, success: float, split: str = "held_out") -> None:
    with (run / "eval.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "version": version, "success": success, "split": split}) + "\n")
