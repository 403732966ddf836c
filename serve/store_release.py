"""A version in a training run's weight store -> a model's folder that can be served."""

import asyncio
import json
import shutil
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import ray
from safetensors.torch import save_file

from actors.faults import within
from rl.config_file import load_config
from rl.pretrained import find_model
from rl.weights import Manifest, unpack
from serve.release_files import INDEX, PROBE

_PATIENCE_S = 60.0
"""Of one call to the store."""
_OF_ITS_OWN = ("files.json", "state.json", INDEX)
"""Files that say something of a model's weights or where its run stood, and nothing of another's."""


def find_store(run: Path) -> Any:
    """The store of a run that trains in this cluster; None where there is none."""
    try:
        where = json.loads((run / "store.json").read_text())
        return ray.get_actor(where["store"], namespace=where["namespace"]) if ray.is_initialized() else None
    except (OSError, ValueError):  # ray's, too, when nobody has that name
        return None


async def ask(call: Awaitable[Any]) -> Any:
    return await within(_PATIENCE_S, call)


async def write_version(store: Any, manifest: Manifest, run: Path, bound: float, folder: Path) -> None:
    """Its weights, a file a bucket, with tokenizer and configuration, and the probe that proves them.

    Raises ChecksumError when a bucket did not arrive as it was published. The version is pinned meanwhile.
    """
    await asyncio.to_thread(_copy_companions, run, folder)
    count, index = len(manifest.buckets), {}
    for i, bucket in enumerate(manifest.buckets):
        _, ref = await ask(store.bucket.remote(manifest.version, i))
        data = await ask(ref)
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        tensors = dict(unpack(bucket, data, manifest.dtype))
        await asyncio.to_thread(save_file, tensors, folder / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    if count > 1:
        text = json.dumps({"metadata": {"total_size": manifest.nbytes}, "weight_map": index})
        (folder / INDEX).write_text(text)
    probe = {"tokens": list(manifest.probe), "logprobs": manifest.probe_logprobs.tolist(), "bound": bound}
    (folder / PROBE).write_text(json.dumps(probe))


def _copy_companions(run: Path, folder: Path) -> None:
    """Whatever lies beside the weights of the run's newest checkpoint, or else of its initial model."""
    for path in _companions(run).iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _OF_ITS_OWN:
            shutil.copy2(path, folder / path.name)


def _companions(run: Path) -> Path:
    for folder in (run / "checkpoints" / "latest", run / "initial"):
        if (folder / "config.json").is_file():
            return folder
    return find_model(load_config(run / "config.yaml").model.path or "")
