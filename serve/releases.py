"""Which weight versions a server has, and which it answers with: `<dir>/releases.json`, and the versions' files.

    <dir>/versions/<version>/   hard links to a checkpoint's files: its run may delete them
    stable                      what everybody gets, but for
    canary                      what a share of sessions and requests gets, always the same ones

Several replicas, the follower and the command read and change it: under a lock, and written whole.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from rl import checkpoint
from rl.config_file import ConfigError
from serve.release import Release, Releases
from serve.release_files import Origin, damage, link_files, origin_of, same_weights, success_of, trained_steps

KEEP = 4
_ITS_RUN = ".."
"""The source of what comes from the run that the server's folder lies in."""


class Book:
    """The releases of a server's folder."""

    def __init__(self, folder: Path, keep: int = KEEP):
        self.folder, self._keep = folder, keep
        self._file = folder / "releases.json"
        self._known: tuple[tuple[int, int], Releases] | None = None
        """As last read, and which file that was."""

    def read(self) -> Releases:
        try:
            stat = self._file.stat()
        except FileNotFoundError:
            return Releases()
        which = stat.st_ino, stat.st_mtime_ns
        if self._known is None or self._known[0] != which:
            self._known = which, self._parsed()
        return self._known[1]

    def _parsed(self) -> Releases:
        try:
            data = json.loads(self._file.read_text())
            versions = tuple(map(self._as_read, data.pop("versions")))
            return Releases(versions, **{**data, "previous": tuple(data["previous"])})
        except (ValueError, TypeError, LookupError) as error:
            raise ConfigError(f"{self._file} cannot be read: {error}. Delete it to begin anew") from None

    def _as_read(self, told: dict[str, Any]) -> Release:
        source = str(self.folder.resolve().parent) if told["source"] == _ITS_RUN else told["source"]
        return Release(**{**told, "source": source}, folder=str(self._folder_of(told["version"]).resolve()))

    def _as_written(self, release: Release) -> dict[str, Any]:
        """A run may be moved with its releases."""
        own = release.source == str(self.folder.resolve().parent)
        told = {**asdict(release), "source": _ITS_RUN if own else release.source}
        del told["folder"]
        return told

    def _folder_of(self, version: int) -> Path:
        return self.folder / "versions" / str(version)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "releases.lock"):
            yield

    def _change(self, change: Callable[[Releases], Releases]) -> Releases:
        with self._locked():
            before = self.read()
            after = change(before)
            if after != before:
                versions = list(map(self._as_written, after.versions))
                checkpoint.write_whole(self._file, json.dumps({**asdict(after), "versions": versions}, indent=1))
            for gone in {r.version for r in before.versions} - {r.version for r in after.versions}:
                shutil.rmtree(self._folder_of(gone), ignore_errors=True)
        return after

    # -- changes -----------------------------------------------------------------------------------------------------

    def add(self, folder: Path, origin: Origin | None = None) -> Release:
        """Make a release of a checkpoint, or of a model's folder; one that is damaged is noted as refused.

        A version that is there already is left alone. Raises ConfigError when another source has its number.
        """
        origin = origin or origin_of(folder)
        if (known := self._same(self.read(), origin)) is not None:
            return known
        why = damage(folder)
        (self.folder / "versions").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=self.folder / "versions") as staging:
            if why is None:
                link_files(folder, Path(staging) / "files")
            after = self._change(lambda releases: self._with(releases, origin, Path(staging) / "files", why))
        found = after.find(origin.version)
        assert found is not None
        return found

    def _with(self, releases: Releases, origin: Origin, files: Path, why: str | None) -> Releases:
        if self._same(releases, origin) is not None:  # another process was quicker
            return releases
        target = self._folder_of(origin.version)
        shutil.rmtree(target, ignore_errors=True)  # of a process that died before it had noted it
        if why is None:
            files.rename(target)
        state: Literal["ready", "refused"] = "ready" if why is None else "refused"
        release = Release(
            origin.version, origin.step, str(target.resolve()), origin.source, time.time(), state, why or "",
            origin.success,
        )  # fmt: skip
        return releases.with_release(release)

    def _same(self, releases: Releases, origin: Origin) -> Release | None:
        known = releases.find(origin.version)
        if known is None or known.state == "refused":
            return None
        if known.source != origin.source:
            raise ConfigError(
                f"version {origin.version} in {self.folder} is of {known.source}, and {origin.source} has one of the "
                "same number: serve them from two folders (dir)"
            )
        return known

    def renew(self, folder: Path) -> None:
        """Before anything is served: have `begin` make a release anew of a model whose folder has got other weights.

        A checkpoint never changes, and its version may be a release that came from the weight store.
        """
        is_checkpoint = (folder / "state.json").is_file()
        known = None if is_checkpoint else self._same(self.read(), origin_of(folder))
        if known is not None and not same_weights(folder, Path(known.folder)):
            self.refuse(known.version, "other weights have taken the place of its own")

    def begin(self, folder: Path) -> Releases:
        """Add what a server starts with; it is stable where nothing else is. Raises ConfigError when it is damaged."""
        added = self.add(folder)
        return self._change(lambda r: r.promoted(added.version) if r.stable is None else r)

    def promote(self, version: int, share: float | None = None) -> Releases:
        """Make it the stable version, or the canary for a share of sessions and requests. Raises ConfigError."""
        return self._change(lambda r: r.promoted(version) if share is None else r.with_canary(version, share))

    def advance(self, due: Callable[[Release], bool]) -> int | None:
        """What following does: promote the newest that is due, where that is newer than all that were ever stable.

        Nothing is while the book is held. Returns the version that was promoted.
        """
        promoted: list[int] = []

        def change(releases: Releases) -> Releases:
            found = [r.version for r in releases.ready if r.version > releases.reached and due(r)]
            if releases.held or not found:
                return releases
            promoted.append(found[-1])
            return releases.promoted(found[-1])

        self._change(change)
        return promoted[0] if promoted else None

    def rollback(self) -> Releases:
        """Return to the stable version before, end the canary, and hold. Raises ConfigError."""
        return self._change(Releases.rolled_back)

    def refuse(self, version: int, why: str) -> Releases:
        """It cannot be served after all."""
        return self._change(lambda r: r.without(version, why))

    def note(self, text: str) -> None:
        """What has gone wrong; "" when it goes well again."""
        if self.read().note != text:
            self._change(lambda r: replace(r, note=text))

    def score(self) -> None:
        """Look up the successes that were not known yet."""

        def scored(release: Release) -> Release:
            step = trained_steps(Path(release.folder))
            found = success_of(Path(release.source), release.version, step) if release.success is None else None
            return release if found is None else replace(release, success=found)

        before = self.read().versions
        news = {r.version: r.success for r in map(scored, before)}
        if any(news[r.version] != r.success for r in before):
            self._change(lambda r: r.scored(news))

    def prune(self) -> None:
        self._change(lambda r: r.pruned(self._keep))
