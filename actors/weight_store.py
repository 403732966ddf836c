"""The weight store: owns every published version, so that weights outlive the learner that made them."""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from actors.role import AsyncRole
from rl.env import InfraError
from rl.weights import ChecksumError, Manifest, applied, checksum


class UnknownVersion(InfraError):
    """A version that was never published, or is kept no longer."""


@dataclass(frozen=True)
class Published:
    """What a publish cost: `prepare_s` on the learner (gather, pack, probe), `transfer_s` into the object store.

    nbytes: of the whole version; sent: of what the learner sent of it.
    """

    version: int
    nbytes: int
    sent: int
    prepare_s: float
    probe_s: float
    transfer_s: float
    checksums: tuple[str, ...]
    """Each bucket's xxh3."""


def apply(manifest: Manifest, index: int, before: np.ndarray, change: np.ndarray) -> np.ndarray:
    """A bucket of a version, from the version before and what changed. Raises ChecksumError."""
    whole, bucket = applied(before, change, manifest.dtype), manifest.buckets[index]
    if checksum(whole) != bucket.checksum:
        raise ChecksumError(f"bucket {index} of version {manifest.version} is not what the learner published")
    return whole


class OtherWeights(ValueError):
    """What the learner holds is not what it is said to hold."""


class WeightStore(AsyncRole):
    """Knows the newest version and keeps its buckets.

    The store calls the learner's ranks and keeps their return values: objects die with their owner, and the owner of
    a method's return value is its caller. It keeps the newest version and the pinned ones, and what adapters among them
    sit on. A store that was started again knows nothing, and has the newest version published again.
    """

    role = "store"

    def __init__(self, full_every: int = 1) -> None:
        super().__init__()
        self._full_every = full_every
        self._published = 0
        """Publishes since the last whole one, that one included."""
        self._changes: tuple[int, int | None, list[Any]] = (-1, None, [])
        """The newest version, which one its changes are to, and each bucket's, or None where it came whole."""
        self._manifests: dict[int, Manifest] = {}
        self._buckets: dict[int, list[Any]] = {}
        self._pinned: dict[str, int] = {}
        self._newest: int | None = None
        self._node = ray.get_runtime_context().get_node_id()

    async def publish(
        self, version: int, step: int, ranks: list[Any], what: str = "all", expected: tuple[str, ...] | None = None
    ) -> Published:
        """Take version `version` from the learner's ranks. Announced only when every bucket is on this node.

        Raises ValueError on a version that is not above every earlier one: numbers are never used twice. OtherWeights
        when the buckets do not have the `expected` checksums.
        """
        with self.calling("publish"):
            return await self._take(version, step, ranks, what, expected)

    async def _take(
        self, version: int, step: int, ranks: list[Any], what: str, expected: tuple[str, ...] | None
    ) -> Published:
        if self._newest is not None and version <= self._newest:
            raise ValueError(f"version {version} was published before version {self._newest}: numbers are not reused")
        started = time.perf_counter()
        against = self._newest if self._sends_changes(what) else None
        prepared_by_rank = await asyncio.gather(*(rank.prepare.remote(version, step, what, against) for rank in ranks))
        manifest, probe_s = prepared_by_rank[0]
        prepared = time.perf_counter()
        calls = [
            ranks[i % len(ranks)].bucket.options(num_returns=4).remote(version, i)
            for i in range(len(manifest.buckets))
        ]
        told = await asyncio.gather(*(asyncio.gather(*call[1:]) for call in calls))
        sums = tuple(checksum for checksum, _, _ in told)
        if expected is not None and sums != expected:
            raise OtherWeights(f"version {version} was published with other weights than the learner holds now")
        buckets = tuple(replace(b, checksum=s) for b, s in zip(manifest.buckets, sums, strict=True))
        manifest = replace(manifest, buckets=buckets)
        sent = 0
        whole, changes = [], []
        for i, ((data, *_), (_, node, is_change)) in enumerate(zip(calls, told, strict=True)):
            # Under this node's roof before anyone hears of it: the learner's node may be gone tomorrow.
            ref = data if node == self._node else ray.put(await data)
            await asyncio.to_thread(ray.wait, [ref], fetch_local=True)
            changes.append(ref if is_change else None)
            if is_change:
                assert against is not None
                before, change = await self._buckets[against][i], await ref
                sent += change.nbytes
                ref = ray.put(await asyncio.to_thread(apply, manifest, i, before, change))
            else:
                sent += buckets[i].nbytes
            whole.append(ref)
        self._manifests[version], self._buckets[version] = manifest, whole
        self._changes = (version, against, changes)
        self._published = self._published + 1 if against is not None else 1
        self._newest = version
        self._forget()
        return Published(
            version,
            manifest.nbytes,
            sent,
            prepared - started - probe_s,
            probe_s,
            time.perf_counter() - prepared,
            sums,
        )

    def _sends_changes(self, what: str) -> bool:
        newest = self._manifests.get(self._newest) if self._newest is not None else None
        return what == "all" and newest is not None and newest.base is None and self._published < self._full_every

    async def node(self) -> str:
        return self._node

    async def newest(self) -> int | None:
        return self._newest

    async def manifest(self, version: int) -> Manifest:
        if version not in self._manifests:
            raise UnknownVersion(f"weight version {version} is not in the store (newest: {self._newest})")
        return self._manifests[version]

    async def bucket(self, version: int, index: int) -> tuple[Manifest, Any]:
        """The manifest, and the ref of one bucket (uint8 bytes)."""
        return await self.manifest(version), self._buckets[version][index]

    async def change(self, version: int, index: int) -> tuple[int, Any] | None:
        """What changed in a bucket of the newest version: to which version, and a ref of it. None: it came whole."""
        newest, against, changes = self._changes
        if version != newest or against is None or changes[index] is None:
            return None
        return against, changes[index]

    async def pin(self, version: int, reader: str) -> Manifest:
        """Keep a version until the reader's `unpin`, or its next `pin`: readers may be slow, and die."""
        manifest = await self.manifest(version)
        self._pinned[reader] = version
        self._note("read", "begin")
        self._forget()
        return manifest

    async def unpin(self, reader: str) -> None:
        self._note("read", "end")
        self._pinned.pop(reader, None)  # or it was pinned before the store was started again
        self._forget()

    def status(self) -> dict[str, Any]:
        return {**super().status(), "newest": self._newest, "kept": sorted(self._manifests)}

    def _forget(self) -> None:
        kept = {self._newest, *self._pinned.values()}
        kept |= {self._manifests[v].base for v in kept if v in self._manifests}
        for version in list(self._manifests):
            if version not in kept:
                del self._manifests[version], self._buckets[version]
