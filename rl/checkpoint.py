"""Checkpoints on disk: complete or absent, the newest complete one found, old ones pruned.

    checkpoints/step=N/   config.json model.safetensors tokenizer...   plain transformers and plain vLLM load it
                          learner/                                     each rank's optimizer state
                          repertory.yaml  state.json                   the run's configuration, and where it stood
    checkpoints/latest    a link to the newest
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class State:
    """Where a run stood: the stage it was in, the steps done in it and in all, and what must not be used again.

    A finished stage stands at its last step, so that a resumed run may be given more steps of it. stage_start: the
    checkpoint folder (relative to the run) that the stage started from; "" is the initial model. ends: those that the
    finished stages ended with, by index.
    """

    stage: int
    stage_step: int
    step: int
    version: int
    cursor: int
    stage_start: str = ""
    ends: dict[str, str] = field(default_factory=dict)


@contextmanager
def writing(run: Path, step: int) -> Iterator[Path]:
    """A temporary folder that becomes checkpoints/step=N, whole, when the block ends without an error."""
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    partial, final = root / f".step={step}.partial", root / f"step={step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _fsync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    link = root / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.rename(root / "latest")
    _fsync_one(root)


def write_state(folder: Path, state: State) -> None:
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=1))


def read_state(folder: Path) -> State:
    return State(**json.loads((folder / "state.json").read_text()))


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [p for p in (run / "checkpoints").glob("step=*") if (p / "state.json").is_file()]
    return max(found, key=lambda p: int(p.name.partition("=")[2]), default=None)


def prune(run: Path, keep: int, spared: Collection[str] = ()) -> None:
    """Delete all but the newest `keep` checkpoints, and those named in `spared`."""
    found = sorted((run / "checkpoints").glob("step=*"), key=lambda p: int(p.name.partition("=")[2]))
    for folder in found[:-keep]:
        if folder.name not in spared:
            shutil.rmtree(folder)


def _fsync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync_one(path)


def _fsync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
