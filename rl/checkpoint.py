"""Checkpoints on disk: complete or absent, the newest undamaged one found, old ones pruned.

    checkpoints/step=N/   config.json model.safetensors tokenizer...   plain transformers and plain vLLM load it
                          learner/                                     each rank's optimizer state
                          repertory.yaml  state.json                   the run's configuration, and where it stood
                          files.json                                   size and checksum of every other file
    checkpoints/latest    a link to the newest
    checkpoints/best      a link to the best by held-out success, where a stage evaluates as it goes; and best.json
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

_FULL = 1 << 20
"""A disk with fewer bytes free than this is full: torch's writer says only that it failed."""


class DiskFull(OSError):
    """There was no room for a checkpoint. Those before it are intact."""


@dataclass(frozen=True)
class State:
    """Where a run stood: the stage it was in, the steps done in it and in all, and what must not be used again.

    A finished stage stands at its last step, so that a resumed run may be given more steps of it. stage_start: the
    checkpoint folder (relative to the run) that the stage started from; "" is the initial model. ends: those that the
    finished stages ended with, by index. under_way: the groups that were drawn and not trained on yet
    (actors/producer.py). quarantined: tasks whose environment ends whatever plays it.
    """

    stage: int
    stage_step: int
    step: int
    version: int
    cursor: int
    stage_start: str = ""
    ends: dict[str, str] = field(default_factory=dict)
    under_way: dict[str, Any] = field(default_factory=dict)
    quarantined: list[str] = field(default_factory=list)


@contextmanager
def writing(run: Path, step: int) -> Iterator[Path]:
    """A temporary folder that becomes checkpoints/step=N, whole, when the block ends without an error.

    Raises DiskFull when the disk is what the block failed on.
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    partial, final = root / f".step={step}.partial", root / f"step={step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _seal(partial)
        _fsync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except Exception as error:
        whose = (error, getattr(error, "cause", None))  # of Ray's error, when a rank wrote
        if any(getattr(e, "errno", None) == errno.ENOSPC for e in whose) or shutil.disk_usage(root).free < _FULL:
            last = next(iter(folders(run)), None)
            raise DiskFull(
                f"the disk of {run} is full: the checkpoint of step {step} was not written, the last one is "
                f"{last.name if last else 'none'}. Free some space and go on with --resume"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _link(root, "latest", final.name)


def _link(root: Path, name: str, to: str) -> None:
    link = root / f".{name}"
    link.unlink(missing_ok=True)
    link.symlink_to(to)
    link.rename(root / name)
    _fsync_one(root)


def mark_best(run: Path, step: int, success: float) -> bool:
    """Keep the checkpoint of a step as the best if none has done as well before. Returns whether it is."""
    root = run / "checkpoints"
    known = best(run)
    if known is not None and known["success"] >= success:
        return False
    write_whole(root / "best.json", {"step": step, "success": success})
    _link(root, "best", f"step={step}")
    return True


def write_whole(path: Path, value: Any) -> None:
    """As JSON, a text as it is: who reads the file meanwhile finds what it held, or what it holds."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(value if isinstance(value, str) else json.dumps(value))
    partial.rename(path)


def best(run: Path) -> dict[str, Any] | None:
    """step and success of the best checkpoint; None where there is none, or it is gone."""
    root = run / "checkpoints"
    try:
        known = json.loads((root / "best.json").read_text())
    except (OSError, ValueError):
        return None
    return known if (root / f"step={known['step']}").is_dir() else None


def write_state(folder: Path, state: State) -> None:
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=1))


def read_state(folder: Path) -> State:
    return State(**json.loads((folder / "state.json").read_text()))


def newest(run: Path, say: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest checkpoint of a run that is as it was written. `say` is told of each damaged one passed over."""
    for folder in folders(run):
        wrong = damage(folder)
        if wrong is None:
            return folder
        say(f"checkpoint {folder.name} is damaged, and passed over: {wrong}")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        written = json.loads((folder / "files.json").read_text())
    except (OSError, ValueError):
        written = None
    if not isinstance(written, dict) or "state.json" not in written:
        return "files.json is missing or does not list its files"
    for name, (size, digest) in written.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
            if _digest(path) != digest:
                return f"{name} does not have the checksum that it was written with"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def set_aside_after(run: Path, step: int) -> None:
    """Take damaged checkpoints of later steps out of the count: pruning would keep them for good ones."""
    for folder in folders(run):
        if _step(folder) > step:
            aside = folder.with_name(f"damaged.{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    _link(run / "checkpoints", "latest", f"step={step}")


def prune(run: Path, keep: int, spared: Collection[str] = ()) -> None:
    """Delete all but the newest `keep` checkpoints, the best, and those named in `spared`."""
    known = best(run)
    spared = {*spared, *([f"step={known['step']}"] if known else [])}
    for folder in folders(run)[keep:]:
        if folder.name not in spared:
            shutil.rmtree(folder)


def folders(run: Path) -> list[Path]:
    """A run's checkpoints, the newest first, damaged or not."""
    found = [p for p in (run / "checkpoints").glob("step=*") if p.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.partition("=")[2])


def _seal(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listed = {str(p.relative_to(folder)): (p.stat().st_size, _digest(p)) for p in files}
    (folder / "files.json").write_text(json.dumps(listed, indent=1))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def _fsync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync_one(path)


def _fsync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
