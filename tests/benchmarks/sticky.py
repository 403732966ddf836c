"""What it saves that a session stays with the generator that holds its prefix: SmolLM2, two generators, many turns.

    python tests/benchmarks/sticky.py

Sessions are played twice, sticky and with each turn at any generator. The last line is JSON: for both, seconds, the
share of prompt tokens found in the prefix caches, and how many were computed.
"""

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.generator import Generator
from actors.generator_pool import GeneratorPool
from actors.launch import connect
from actors.role import bound_threads, keep_memory, remote_class
from actors.weight_store import WeightStore
from rl.config_file import load_config
from rl.env import World
from rl.policy import Sampling
from rl.pretrained import prepare_model

HERE = Path(__file__).parent
SESSIONS, TURNS, SEEN, SAID = 12, 10, 48, 8
"""A turn shows so many tokens, and so many are sampled after them."""


async def play(generators: list[Any], words: int, sticky: bool, seed: int) -> dict[str, float]:
    pool = GeneratorPool(generators, patience_s=600)
    rng = np.random.default_rng(seed)
    shown = rng.integers(1000, words, (SESSIONS, TURNS, SEEN)).tolist()

    async def session(s: int) -> None:
        context: list[int] = []
        for turn in range(TURNS):
            context += shown[s][turn]
            sampling = Sampling(max_tokens=SAID, seed=turn)
            said = await pool.act(context, sampling, f"{seed}-{s}" if sticky else f"{seed}-{s}-{turn}")
            context += said.token_ids

    async def cached() -> np.ndarray:
        told = [await g.status.remote() for g in generators]
        return np.array([[t["prefix_hits"], t["prefix_queries"]] for t in told]).sum(0)

    before, started = await cached(), time.perf_counter()
    await asyncio.gather(*(session(s) for s in range(SESSIONS)))
    seconds, (hits, queries) = time.perf_counter() - started, await cached() - before
    return {"seconds": seconds, "hit_rate": hits / queries, "computed": float(queries - hits)}


async def run(folder: Path) -> dict[str, Any]:
    config = load_config(HERE.parent.parent / "configs" / "bench_smollm2.yaml", ["model.max_length=1024"])
    model = str(prepare_model(config.model, World(config.env, 0), 0, folder / "model"))
    store = remote_class(WeightStore).options(name="store", namespace="sticky", num_cpus=0).remote()
    options: Any = {
        "num_cpus": 0,
        "max_concurrency": 64,
        "runtime_env": {"env_vars": {**bound_threads(1), **keep_memory()}},
    }
    generators = [remote_class(Generator).options(**options).remote(config, "cpu", "store", "sticky") for _ in range(2)]
    await asyncio.gather(store.newest.remote(), *(g.open.remote(model) for g in generators))
    words = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    await play(generators, words, True, 0)  # what is compiled once
    return {"sticky": await play(generators, words, True, 1), "any": await play(generators, words, False, 2)}


if __name__ == "__main__":
    connect()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(run(Path(folder)))))
    ray.shutdown()
