"""The weight store: owns every published version, so that weights outlive the learner that made them."""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from actors.role import AsyncRole
from rl.env import InfraError
from rl.weights import Manifest


class UnknownVersion(InfraError):
    """A version that was never published, or is kept no longer."""


@dataclass(frozen=True)
class Published:
    """What a publish cost: `prepare_s` on the learner (gather, pack, probe), `transfer_s` into the object store."""

    version: int
    nbytes: int
    prepare_s: float
    probe_s: float
    transfer_s: float
    checksums: tuple[str, ...]
    """Each bucket's xxh3."""


class OtherWeights(ValueError):
    """What the learner holds is not what it is said to hold."""


class WeightStore(AsyncRole):
    """Knows the newest version and keeps its buckets.

    The store calls the learner's ranks and keeps their return values: objects die with their owner, and the owner of
    a method's return value is its caller. It keeps the newest version and the pinned ones, and what adapters among them
    sit on. A store that was started again knows nothing, and has the newest version published again.
    """

    role = "store"

    def __init__(self) -> None:
        super().__init__()
        self._manifests: dict[int, Manifest] = {}
        self._buckets: dict[int, list[Any]] = {}
        self._pinned: dict[int, int] = {}
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
        manifest, probe_s = (
            await asyncio.gather(*(rank.prepare.remote(version, step, what) for rank in ranks))
        )[0]
        prepared = time.perf_counter()
        calls = [
            ranks[i % len(ranks)].bucket.options(num_returns=3).remote(version, i)
            for i in range(len(manifest.buckets))
        ]
        nodes = await asyncio.gather(*(node for _, _, node in calls))
        sums = await asyncio.gather(*(checksum for _, checksum, _ in calls))
        if expected is not None and tuple(sums) != expected:
            raise OtherWeights(f"version {version} was published with other weights than the learner holds now")
        refs = [data for data, _, _ in calls]
        # Under this node's roof before anyone hears of it: the learner's node may be gone tomorrow.
        refs = [ref if node == self._node else ray.put(await ref) for ref, node in zip(refs, nodes, strict=True)]
        await asyncio.gather(*(asyncio.to_thread(ray.wait, [ref], fetch_local=True) for ref in refs))
        buckets = tuple(replace(b, checksum=s) for b, s in zip(manifest.buckets, sums, strict=True))
        self._manifests[version] = replace(manifest, buckets=buckets)
        self._buckets[version] = refs
        self._newest = version
        self._forget()
        return Published(
            version,
            manifest.nbytes,
            prepared - started - probe_s,
            probe_s,
            time.perf_counter() - prepared,
            tuple(sums),
        )

    async def newest(self) -> int | None:
        return self._newest

    async def manifest(self, version: int) -> Manifest:
        if version not in self._manifests:
            raise UnknownVersion(f"weight version {version} is not in the store (newest: {self._newest})")
        return self._manifests[version]

    async def bucket(self, version: int, index: int) -> tuple[Manifest, Any]:
        """The manifest, and the ref of one bucket (uint8 bytes)."""
        return await self.manifest(version), self._buckets[version][index]

    async def pin(self, version: int) -> Manifest:
        """Keep a version until `unpin`: its readers may be slow."""
        manifest = await self.manifest(version)
        self._pinned[version] = self._pinned.get(version, 0) + 1
        self._note("read", "begin")
        return manifest

    async def unpin(self, version: int) -> None:
        if version in self._pinned:  # or it was pinned before the store was started again
            self._note("read", "end")
            self._pinned[version] -= 1
            if not self._pinned[version]:
                del self._pinned[version]
            self._forget()

    def status(self) -> dict[str, Any]:
        return {**super().status(), "newest": self._newest, "kept": sorted(self._manifests)}

    def _forget(self) -> None:
        kept = {self._newest, *self._pinned}
        kept |= {self._manifests[v].base for v in kept if v in self._manifests}
        for version in list(self._manifests):
            if version not in kept:
                del self._manifests[version], self._buckets[version]
