"""One a node that has generators but not the store: changes are applied once there, into whole buckets of that node."""

import asyncio
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.role import AsyncRole
from actors.weight_store import apply
from rl.weights import Manifest


class BucketCache(AsyncRole):
    """Keeps the whole buckets of the version that was last asked for, as objects of its own node."""

    role = "bucket_cache"

    def __init__(self, store: str, namespace: str):
        super().__init__()
        self._store: Any = ray.get_actor(store, namespace=namespace)
        self._held: dict[int, tuple[int, Any]] = {}
        """Of each bucket: its version, and a ref of it whole."""
        self._locks: dict[int, asyncio.Lock] = {}
        self.received = 0
        """Bytes that came from the store's node."""

    async def bucket(self, version: int, index: int) -> tuple[Manifest, Any]:
        """As the store's, by way of what is held here."""
        async with self._locks.setdefault(index, asyncio.Lock()):
            manifest, whole = await self._store.bucket.remote(version, index)
            held_version, held = self._held.get(index, (-1, whole))
            if held_version == version:
                return manifest, held
            change = await self._store.change.remote(version, index)
            if change is not None and change[0] == held_version:
                before, changes = await held, await change[1]
                self.received += changes.nbytes
                data = await asyncio.to_thread(apply, manifest, index, before, changes)
            else:
                data = await whole
                self.received += data.nbytes
            self._held[index] = version, ray.put(data)
            return manifest, self._held[index][1]

    def status(self) -> dict[str, Any]:
        return {**super().status(), "received": self.received}


def buckets_of(store: str, namespace: str) -> Any:
    """Whom a process asks for buckets: the store, if it is on this node, else the node's cache, made if need be."""
    here = ray.get_runtime_context().get_node_id()
    actor = ray.get_actor(store, namespace=namespace)
    if ray.get(actor.node.remote()) == here:
        return actor
    return (
        ray.remote(BucketCache)
        .options(
            name=f"{store}-{here}",
            namespace=namespace,
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=64,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(store, namespace)
    )
