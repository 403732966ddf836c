"""The weight versions of a server at a time, and what they become by a change. serve/releases.py keeps them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import xxhash

from rl.config_file import ConfigError
from serve.errors import ApiError

_EARLIER = 3
"""Stable versions before this one that can be returned to."""


@dataclass(frozen=True)
class Release:
    """A version whose files are in `folder`, or that was refused for what `note` says.

    source: the run that has trained it, or else the folder that it comes from. success: held out, where the run has
    evaluated it.
    """

    version: int
    step: int
    folder: str
    source: str
    time: float
    state: Literal["ready", "refused"] = "ready"
    note: str = ""
    success: float | None = None


@dataclass(frozen=True)
class Releases:
    """What the book holds at a time. Versions are in order; previous: earlier stable ones, the latest last.

    held: a person has rolled back, so following promotes nothing. reached: the highest version that was ever stable.
    note: what has last gone wrong.
    """

    versions: tuple[Release, ...] = ()
    stable: int | None = None
    canary: int | None = None
    share: float = 0.0
    previous: tuple[int, ...] = ()
    held: bool = False
    reached: int = -1
    note: str = ""

    def find(self, version: int | None) -> Release | None:
        return next((r for r in self.versions if r.version == version), None)

    def release(self, version: int) -> Release:
        """Raises ConfigError when there is none of that number, or it was refused."""
        found = self.find(version)
        if found is None:
            known = ", ".join(str(r.version) for r in self.ready) or "none"
            raise ConfigError(f"there is no version {version}. There are: {known}")
        if found.state == "refused":
            raise ConfigError(f"version {version} was refused: {found.note}")
        return found

    @property
    def ready(self) -> list[Release]:
        return [r for r in self.versions if r.state == "ready"]

    def choose(self, key: str) -> int:
        """The version for a session or a request: the canary for `share` of all keys, and always for the same ones."""
        place = xxhash.xxh3_64_intdigest(key.encode(errors="surrogatepass"))
        if self.canary is not None and place < self.share * 2**64:
            return self.canary
        if self.stable is None:
            raise ApiError(503, "no_release", "no version has been promoted yet", retry_after_s=5)
        return self.stable

    def named(self, model: str, name: str, key: str) -> int:
        """`name` is whatever is chosen for the key, `name@7` version 7. Raises ApiError 404 for anything else."""
        if model == name:
            return self.choose(key)
        before, _, number = model.rpartition("@")
        if before == name and any(number == str(r.version) for r in self.ready):
            return int(number)
        raise ApiError(404, "model_not_found", f"the model {model!r} is not served here", param="model")

    def shown(self) -> dict[str, Any]:
        """For clients, who need not know this machine's folders."""
        versions = [{k: v for k, v in asdict(r).items() if k not in ("folder", "source")} for r in self.versions]
        return {**asdict(self), "previous": list(self.previous), "versions": versions}

    # -- as they would be after a change -----------------------------------------------------------------------------

    def with_release(self, release: Release) -> "Releases":
        others = [r for r in self.versions if r.version != release.version]
        return replace(self, versions=tuple(sorted([*others, release], key=lambda r: r.version)))

    def promoted(self, version: int) -> "Releases":
        self.release(version)
        earlier = self.previous
        if self.stable is not None and self.stable != version:
            earlier = (*(v for v in earlier if v not in (version, self.stable)), self.stable)[-_EARLIER:]
        canary = None if self.canary == version else self.canary
        return replace(
            self, stable=version, previous=earlier, canary=canary, share=self.share if canary is not None else 0.0,
            held=False, reached=max(self.reached, version), note="",
        )  # fmt: skip

    def with_canary(self, version: int, share: float) -> "Releases":
        """share 0 ends it."""
        self.release(version)
        if share == 0:
            if version != self.canary:
                raise ConfigError(f"version {version} is not the canary, which is {self.canary}")
            return replace(self, canary=None, share=0.0)
        if not 0 < share <= 1:
            raise ConfigError(f"a canary's share is above 0 and at most 1, and not {share:g}")
        if self.stable is None or self.stable == version:
            raise ConfigError(f"a canary stands beside another stable version: promote one that is not {version} first")
        return replace(self, canary=version, share=share)

    def rolled_back(self) -> "Releases":
        earlier = [v for v in self.previous if any(r.version == v for r in self.ready)]
        if not earlier and self.canary is None:
            raise ConfigError("there is no version to return to: none was stable before this one")
        stable = earlier[-1] if earlier else self.stable
        return replace(self, stable=stable, previous=tuple(earlier[:-1]), canary=None, share=0.0, held=True)

    def without(self, version: int, why: str) -> "Releases":
        """As refused: the version before it, or else the newest, is stable if it was; a canary it is no longer."""
        found = self.find(version)
        if found is None:
            return self
        note = f"version {version} is refused: {why}"
        left = replace(self.with_release(replace(found, state="refused", note=why)), note=note)
        if self.canary == version:
            left = replace(left, canary=None, share=0.0)
        if self.stable == version:
            ready = [r.version for r in left.ready]
            earlier = [v for v in self.previous if v in ready]
            left = replace(left, stable=(earlier or ready or [None])[-1], previous=tuple(earlier[:-1]))
        return left

    def scored(self, news: Mapping[int, float | None]) -> "Releases":
        """With the successes that have become known."""
        return replace(
            self, versions=tuple(replace(r, success=news.get(r.version, r.success)) for r in self.versions)
        )

    def pruned(self, keep: int) -> "Releases":
        """Without those that are neither stable, canary, previous nor among the newest `keep`."""
        newest = [r.version for r in self.ready][-keep:]
        kept = {self.stable, self.canary, *self.previous, *newest}
        since = newest[0] if newest else 0
        versions = [r for r in self.versions if r.version in kept or (r.state == "refused" and r.version > since)]
        return replace(self, versions=tuple(versions))
