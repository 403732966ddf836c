"""vLLM's weight transfer engine over the weight store: who receives is told a store's name, never an ObjectRef."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rl.transfer import LayerwiseTransfer
from rl.weights import unpack

NAME = "ray_object_store"


@dataclass
class StoreUpdate(WeightTransferUpdateInfo):
    """One bucket of one version, in the weight store of that name."""

    store: str
    namespace: str
    version: int
    bucket: int


class RayObjectStoreTransfer(LayerwiseTransfer):
    """Reads buckets from the object store without a copy, checks their bytes, and loads them one by one."""

    update_info_cls = StoreUpdate

    def tensors(self, update_info: StoreUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        import ray

        from actors.bucket_cache import buckets_of

        source = buckets_of(update_info.store, update_info.namespace)
        manifest, ref = ray.get(source.bucket.remote(update_info.version, update_info.bucket))
        yield from unpack(manifest.buckets[update_info.bucket], ray.get(ref), manifest.dtype)


def register() -> None:
    """Entry point of the vLLM plugin: makes the engine known in every worker process."""
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, RayObjectStoreTransfer)
