"""`repertory release list|promote|rollback RUN [VERSION]`: which versions a server answers with."""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rl import checkpoint
from rl.config_file import ConfigError
from serve.release import Release, Releases
from serve.release_files import held_out
from serve.releases import Book


def list_releases(run: Path, console: Console) -> None:
    """Raises ConfigError when there is none."""
    releases = _book(run).read()
    if not releases.versions:
        raise ConfigError(f"{run} has no release yet: `repertory release promote {run} latest` makes one")
    console.print(_table(releases))
    if releases.held:
        console.print("held: following promotes nothing until the next `repertory release promote`", highlight=False)
    if releases.note:
        console.print(f"! {releases.note}", highlight=False, soft_wrap=True, markup=False)


def promote(run: Path, version: str, share: float | None, console: Console) -> None:
    """version: a number, step=N, `best` or `latest`. One that is no release yet is made of the run's checkpoint.

    Raises ConfigError.
    """
    book = _book(run)
    number = _found(book, run, version)
    releases = book.promote(number, share)
    if share is None:
        console.print(f"version {number} is the stable one", highlight=False)
    elif share:
        console.print(f"version {number} is the canary, for {share:.0%} of sessions and requests", highlight=False)
    else:
        console.print(f"there is no canary any more; version {releases.stable} is the stable one", highlight=False)


def rollback(run: Path, console: Console) -> None:
    """Raises ConfigError when there is no version to return to."""
    releases = _book(run).rollback()
    console.print(
        f"version {releases.stable} is the stable one again. Following promotes nothing until the next `repertory "
        f"release promote {run}`", highlight=False, soft_wrap=True,
    )  # fmt: skip


def _book(place: Path) -> Book:
    """Of a run's folder, or a server's own."""
    if (place / "checkpoints").is_dir():
        return Book(place / "serve")
    if (place / "releases.json").is_file():
        return Book(place)
    raise ConfigError(f"{place} is neither a run's folder with checkpoints, nor a server's with releases")


def _found(book: Book, place: Path, wanted: str) -> int:
    """The number of a release, made of a checkpoint if need be."""
    run = place if (place / "checkpoints").is_dir() else place.parent
    number = int(wanted) if wanted.isdecimal() else None
    if number is not None and book.read().find(number) is not None:
        return number
    folder = _checkpoint(run, wanted, number)
    release = book.add(folder) if folder is not None else _release(book.read(), wanted)
    if release is None:
        steps = ", ".join(path.name for path in checkpoint.folders(run)) or "none"
        ready = ", ".join(str(r.version) for r in book.read().ready) or "none"
        raise ConfigError(
            f"there is no version {wanted}. Versions: {ready}. Checkpoints of the run: {steps}. Or say best, or latest"
        )
    return release.version


def _checkpoint(run: Path, wanted: str, number: int | None) -> Path | None:
    if wanted == "latest":
        return checkpoint.newest(run)
    if wanted == "best":
        return _best_checkpoint(run)
    for folder in checkpoint.folders(run):
        if folder.name == wanted or (number is not None and _version(folder) == number):
            return folder
    return None


def _best_checkpoint(run: Path) -> Path | None:
    """As the run has marked it where it evaluates as it goes, or else by its evaluations."""
    if (best := checkpoint.best(run)) is not None:
        return run / "checkpoints" / f"step={best['step']}"
    steps = {folder.name: folder for folder in checkpoint.folders(run)}
    known = [line for line in held_out(run) if f"step={line['step']}" in steps]
    return steps[f"step={max(known, key=lambda line: line['success'])['step']}"] if known else None


def _version(folder: Path) -> int | None:
    try:
        return checkpoint.read_state(folder).version
    except (OSError, ValueError, TypeError):
        return None


def _release(releases: Releases, wanted: str) -> Release | None:
    """Of those that there are: the run's checkpoint may be gone, or have never been here."""
    if wanted == "latest":
        return releases.ready[-1] if releases.ready else None
    if wanted == "best":
        known = [r for r in releases.ready if r.success is not None]
        return max(known, key=lambda r: (r.success, r.version), default=None)
    return next((r for r in releases.ready if wanted == f"step={r.step}"), None)


def _table(releases: Releases) -> Table:
    table = Table(title="releases")
    for column in ("version", "step", "success", "answers", "added", "state", "from"):
        table.add_column(column, justify="right" if column in ("version", "step", "success") else "left")
    for r in reversed(releases.versions):
        state = Text(r.state if r.state == "ready" else f"refused: {r.note}")
        success = "" if r.success is None else f"{r.success:.3f}"
        added = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(r.time))
        table.add_row(str(r.version), str(r.step), success, _answers(releases, r.version), added, state, Text(r.source))
    return table


def _answers(releases: Releases, version: int) -> str:
    if version == releases.stable:
        return "stable"
    if version == releases.canary:
        return f"canary, {releases.share:.0%}"
    return "previous" if version in releases.previous else ""
