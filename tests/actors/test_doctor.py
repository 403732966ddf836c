"""`repertory doctor`: what it says of this machine, and the arithmetic behind what it says of a configuration."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from actors.doctor import PACKAGES, Check, Room, Size, check_gpu_memory, diagnose, learner_state_bytes, model_size
from rl.config import Config
from rl.config_file import load_config

ROOT = Path(__file__).parent.parent.parent
QWEN = ROOT / "configs" / "cluster" / "qwen_8gpu.yaml"
QUICK = "env={name: calculator}"
"""Importing reasoning-gym takes longer than all else here."""
GIB = 2**30


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def said(config: Config | None) -> tuple[bool, str]:
    out = io.StringIO()
    fine = diagnose(config, Console(file=out, width=200))
    return fine, out.getvalue()


def row(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_this_machine() -> None:
    _, text = said(None)
    for name in (*PACKAGES, "Python", "CPU cores", "/dev/shm", "disk for runs", "GPUs", "g++", "ninja", "bubblewrap"):
        assert any(line[3:].startswith(f"{name}  ") for line in text.splitlines()), name


def test_the_quickstart_lacks_nothing_but_what_the_machine_lacks() -> None:
    assert said(load_config(ROOT / "configs" / "quickstart.yaml"))[0] == said(None)[0]


def test_the_qwen_configuration_needs_a_larger_machine() -> None:
    config = load_config(QWEN, [QUICK, "learner.count=60", "generator.cpus=500"])
    fine, text = said(config)
    assert not fine
    assert "generator 4 x 500" in text and "learner 60 x 1" in text and "reference 1 x 1" in text
    lines = text.splitlines()
    for name in ("CPUs by role", "GPUs by role"):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"✗  {name}"))
        assert "too few: lower <role>.count" in lines[at + 1]
    assert "object store" in text and "28.7 GiB" in text, "2.2 x 7e9 x 2 bytes"


def test_the_command_exits_with_1() -> None:
    command = [str(Path(sys.executable).parent / "repertory"), "doctor", str(QWEN), QUICK, "learner.count=60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 1
    assert "GPUs by role" in done.stdout.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype", "a_parameter"),
    [
        (0, 4, "bfloat16", 16.0),
        (1, 4, "bfloat16", 2 + 2 + 12 / 4),
        (2, 4, "bfloat16", 2 + 14 / 4),
        (3, 4, "bfloat16", 16 / 4),
        (0, 1, "float32", 16.0),
        (2, 2, "float32", 4 + 12 / 2),
    ],
)
def test_the_learners_states_by_zero_stage(stage: int, ranks: int, dtype: str, a_parameter: float) -> None:
    """The ZeRO paper's table, in bytes a parameter."""
    config = load_config(QWEN, [f"learner.zero_stage={stage}", f"learner.count={ranks}", f"learner.dtype={dtype}"])
    assert learner_state_bytes(config, Size(1000, 10, "")) == pytest.approx(1000 * a_parameter)


def test_the_split_of_the_qwen_configuration_fits_80_gb() -> None:
    """Three learner ranks fit; one does not, whatever ZeRO does."""
    room, size = Room("eight H100", 64, 8, int(79.6 * GIB), 500 * GIB), Size(7.62e9, 152_064, "")
    assert all(check.ok for check in check_gpu_memory(load_config(QWEN), size, room))
    alone = list(check_gpu_memory(load_config(QWEN, ["learner.count=1"]), size, room))
    assert row(alone, "learner memory").ok is False and "learner.count" in row(alone, "learner memory").remedy
    assert row(alone, "generator memory").ok


def test_a_models_size_is_counted_where_it_can_be(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "a": {"shape": [3, 5]}, "b": {"shape": [7]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "config.json").write_text('{"vocab_size": 11}')
    counted = model_size(load_config(QWEN, [f"model.path={tmp_path}"]))
    assert counted and (counted.parameters, counted.vocabulary) == (22, 11)
    guessed = model_size(load_config(QWEN))
    assert guessed and guessed.parameters == 7e9 and "estimated" in guessed.source
    assert model_size(load_config(QWEN, ["model.path=some/name"])) is None


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    _, text = said(load_config(QWEN, [QUICK, f"model.path={tmp_path}/nothing"]))
    assert "✗  model " in text and "no such folder" in text
    _, text = said(load_config(QWEN, [QUICK]))
    assert "!  model " in text and "the run downloads it first" in text


def test_a_dead_cluster_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of this process may have started one
    fine, text = said(load_config(ROOT / "configs" / "quickstart.yaml"))
    assert not fine and "nobody answers at RAY_ADDRESS 127.0.0.1:9" in text and "unset RAY_ADDRESS" in text
