"""A model's folder in Hugging Face format: where it comes from, which of its files a release needs, are they whole."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rl import checkpoint
from rl.config_file import ConfigError
from rl.metrics import read_lines

INDEX = "model.safetensors.index.json"
PROBE = "probe.json"
"""Tokens, their log-probs under the learner, and how far an engine may be off on average."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Origin:
    """What is known of a folder's weights before they are a release."""

    version: int
    step: int
    source: str
    success: float | None = None


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files. Raises ValueError when there is none, or the index cannot be read."""
    index = folder / INDEX
    try:
        found = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else None
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(f"{INDEX} cannot be read: {error}") from None
    names = sorted(found or (path.name for path in folder.glob("model*.safetensors")))
    if not names:
        raise ValueError("there is no model*.safetensors")
    return names


def shapes(folder: Path) -> Shapes:
    """Every tensor's shape, from the heads of the files. Raises ValueError when one is missing, or is not whole.

    The output head is left out: where it is tied to the embedding some write it and others do not.
    """
    found: Shapes = {}
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, framework="np") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from None
    found.pop("lm_head.weight", None)
    return found


def damage(folder: Path) -> str | None:
    """Why nothing can be served from a folder, or None. A checkpoint of ours is held against its checksums."""
    if (folder / "files.json").is_file() or folder.parent.name == "checkpoints":
        return checkpoint.damage(folder)
    try:
        json.loads((folder / "config.json").read_text())
        shapes(folder)
    except OSError as error:
        return f"config.json cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def link_files(source: Path, target: Path) -> None:
    """The files that serving needs, by hard links, or as copies where those cannot be."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name == "files.json" or not path.is_file():  # it lists the learner's state too, which stays behind
            continue
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:
            shutil.copy2(path, target / path.name)


def same_weights(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same, by sizes and times, which links and copies keep."""

    def marks(where: Path) -> dict[str, tuple[int, int]]:
        return {n: ((where / n).stat().st_size, (where / n).stat().st_mtime_ns) for n in weight_files(where)}

    try:
        return marks(folder) == marks(other)
    except (OSError, ValueError):  # damaged
        return False


def origin_of(folder: Path) -> Origin:
    """A checkpoint knows its version, and its run that version's success; any other model is version 0.

    Raises ConfigError when the checkpoint does not say.
    """
    folder = folder.resolve()
    if not (folder / "state.json").is_file():
        return Origin(0, 0, str(folder))
    try:
        state = checkpoint.read_state(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder / 'state.json'} cannot be read: {error}") from None
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    success = success_of(run, state.version, state.step) if run else None
    return Origin(state.version, state.step, str(run or folder), success)


def success_of(run: Path, version: int, step: int | None) -> float | None:
    """Held-out success as the run's last evaluation of a version has it, or of a checkpoint's step.

    A run that was resumed at a step has evaluated it under another number; the weights are the same.
    """
    for line in reversed(held_out(run)):
        if line["version"] == version or line["step"] == step:
            return line["success"]
    return None


def held_out(run: Path) -> list[dict[str, Any]]:
    """The run's evaluations on held-out tasks, in order."""
    return [line for line in read_lines(run / "eval.jsonl") if line.get("split") == "held_out"]


def trained_steps(folder: Path) -> int | None:
    """Of a release that was a checkpoint. The weight store does not tell how many steps its version has had."""
    return checkpoint.read_state(folder).step if (folder / "state.json").is_file() else None
