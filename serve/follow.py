"""Following a run: each new version becomes a release, and the stable one when it may.

    the weight store, while the run trains in this cluster ──┐
    the newest undamaged checkpoint, else                  ──┴──► release ──► gate ──► stable
"""

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Any

from actors.faults import named
from rl import checkpoint
from rl.config_file import ConfigError
from serve.config import ServeConfig
from serve.release import Release
from serve.release_files import Origin, held_out, success_of
from serve.releases import Book
from serve.resolve import followed, source_of
from serve.store_release import ask, find_store, write_version

log = logging.getLogger("repertory.serve")


class Follower:
    """Looks for a run's new versions every `poll_s`. Whatever fails: the releases stay as they are, and say so."""

    def __init__(self, run: Path, book: Book, *, poll_s: float, gate: float | None = None, probe_bound: float = 1e-3):
        """gate: the least held-out success with which a version is promoted. probe_bound: of a version's log-probs."""
        self._run, self._book, self._poll_s, self._gate, self._bound = run.resolve(), book, poll_s, gate, probe_bound
        self._looked_at: set[tuple[str, int]] = set()
        """Checkpoints, and when they were written: looking at one reads all of it."""
        self._refused = ""
        """What is wrong with the newest checkpoint."""
        self._had_store = False
        self._said: str | None = None

    async def follow(self) -> None:
        """Never returns, and raises nothing."""
        while True:
            await self.poll()
            await asyncio.sleep(self._poll_s)

    async def poll(self) -> None:
        """One look at the run."""
        try:
            note = await self._take_newest()
        except Exception as error:
            note = f"following {self._run.name}: {named(error)}"
        try:
            await asyncio.to_thread(self._promote, note)
        except Exception as error:  # the folder of the releases: a full disk, or it is gone
            note = f"the releases cannot be written: {named(error)}"
        if note and note != self._said:
            log.warning(note)
        self._said = note

    def _promote(self, note: str) -> None:
        self._book.score()
        promoted = self._book.advance(self._may_be_stable)
        if promoted is not None:
            log.info("version %d is promoted", promoted)
        self._book.prune()
        if note or note != self._said:  # what others have noted stays
            self._book.note(note)

    def _may_be_stable(self, release: Release) -> bool:
        if release.source != str(self._run):
            return False
        return self._gate is None or (release.success is not None and release.success >= self._gate)

    async def _take_newest(self) -> str:
        """Make what is new a release. Returns what is wrong, or ""."""
        notes = []
        try:
            note = await self._take_from_store()
        except Exception as error:  # it has died, or is slow, or its bytes are wrong: the files are there
            note = f"the weight store did not give its version ({named(error)}): checkpoints are followed"
        if note is not None:
            notes.append(note)
            await asyncio.to_thread(self._take_checkpoints)
            notes.append(self._refused)
        if self._gate is not None:
            await asyncio.to_thread(self._take_evaluated, self._gate)
        return "; ".join(filter(None, notes))

    # -- the weight store --------------------------------------------------------------------------------------------

    async def _take_from_store(self) -> str | None:
        """None when the store's newest version is a release now; else why not, "" where no store is to be expected."""
        store = await asyncio.to_thread(find_store, self._run)
        if store is None:
            return "the run's weight store is gone: its checkpoints are followed" if self._had_store else ""
        self._had_store = True
        version = await ask(store.newest.remote())
        if version is None:
            return "the run's weight store holds nothing yet: checkpoints are followed"
        known = self._book.read().find(version)
        if known is not None and known.source == str(self._run):
            return None
        reader = f"follower of {self._book.folder.resolve()}"
        manifest = await ask(store.pin.remote(version, reader))
        try:
            if manifest.base is not None:
                return f"version {version} in the weight store is a LoRA adapter alone: checkpoints are followed"
            await self._add_version(store, manifest)
        finally:
            store.unpin.remote(reader)
        return None

    async def _add_version(self, store: Any, manifest: Any) -> None:
        self._book.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".store-", dir=self._book.folder) as folder:
            await write_version(store, manifest, self._run, self._bound, Path(folder))
            success = success_of(self._run, manifest.version, None)
            origin = Origin(manifest.version, manifest.step, str(self._run), success)
            await asyncio.to_thread(self._book.add, Path(folder), origin)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _take_checkpoints(self) -> None:
        """The newest that is as it was written, of those that were not looked at before."""
        refused: list[str] = []
        looked = False
        for folder in checkpoint.folders(self._run):
            if self._mark(folder) in self._looked_at:
                break
            looked, wrong = True, self._take(folder)
            if wrong is None:
                break
            refused.append(wrong)
        if looked:
            self._refused = refused[0] if refused else ""

    def _take_evaluated(self, gate: float) -> None:
        """The checkpoint that was last found good enough: the version before it may have come from the store."""
        good = [line["step"] for line in held_out(self._run) if line["success"] >= gate]
        folder = self._run / "checkpoints" / f"step={good[-1]}" if good else None
        if folder is not None and folder.is_dir() and self._mark(folder) not in self._looked_at:
            self._take(folder)

    def _take(self, folder: Path) -> str | None:
        """Make a checkpoint a release. Returns why it is none."""
        mark = self._mark(folder)
        try:
            release = self._book.add(folder)
            wrong = release.note if release.state == "refused" else None
        except ConfigError as error:
            wrong = str(error)
        self._looked_at.add(mark)
        return None if wrong is None else f"{folder.name} is refused: {wrong}"

    def _mark(self, folder: Path) -> tuple[str, int]:
        return folder.name, folder.stat().st_mtime_ns


class FollowerDeployment:
    """The follower of a server, as Ray Serve deploys it."""

    async def __init__(self, settings: dict[str, Any]):
        """settings: of a ServeConfig whose model is a run, or a checkpoint of one."""
        self._following = asyncio.ensure_future(follower_of(ServeConfig.model_validate(settings)).follow())

    async def check_health(self) -> None:
        if self._following.done():
            self._following.result()


def follower_of(config: ServeConfig) -> Follower:
    """Raises ConfigError when what is served comes from no run."""
    source = source_of(config)
    run, trained = followed(config, source), source.trained
    generator = trained.generator.model_copy(update={"dtype": config.engine.dtype or trained.generator_dtype})
    bound = trained.model_copy(update={"generator": generator}).probe_bound
    book = Book(source.dir, config.versions.keep)
    return Follower(run, book, poll_s=config.follow.poll_s, gate=config.follow.gate, probe_bound=bound)
