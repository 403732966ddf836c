"""The generator: vLLM in the actor's own process, versioned weights from the store, every load proven by log-probs."""

import asyncio
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.generator_pool import Answers, AskedTurn
from actors.role import AsyncRole, NotOpen
from rl.config import Config
from rl.env import InfraError
from rl.policy import Completion
from rl.weights import Manifest, unpack

if TYPE_CHECKING:
    from rl.engine import Engine

UNPUBLISHED = -1
"""The version of an engine that has loaded nothing from the store: its own file's weights are nobody's version."""

_MEMORY = Path("/dev/shm")
_LOOK_S = 5.0
_LINGER_S = 0.01
"""A step of training starts with many prompts, one after the other."""


class WeightSyncError(RuntimeError):
    """A generator computes with other weights than the learner published."""


@dataclass(frozen=True)
class Loaded:
    """What a load cost, and how far the probe was off (mean and largest |log-prob difference|)."""

    version: int
    load_s: float
    probe_s: float
    probe_mean_diff: float
    probe_max_diff: float


class _Outgoing:
    """Answers on their way from the engine's thread to one caller; many wake the event loop once."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._ready, self._lock = loop, asyncio.Event(), threading.Lock()
        self._answers: Answers = []

    def take(self, key: int, future: "Future[Completion]") -> None:
        self.put(key, future.exception() or future.result())

    def put(self, key: int, answer: Completion | BaseException) -> None:
        with self._lock:
            self._answers.append((key, answer))
            first = len(self._answers) == 1
        if first:
            self._loop.call_soon_threadsafe(self._ready.set)

    async def get(self) -> Answers:
        await self._ready.wait()
        with self._lock:
            self._ready.clear()
            answers, self._answers = self._answers, []
        return answers


class Generator(AsyncRole):
    """Samples completions. May die between any two calls; holds nothing that cannot be rebuilt.

    Turns that are asked for before it has the newest weights wait for them.
    """

    role = "generator"

    def __init__(self, config: Config, device: str, store: str, namespace: str):
        super().__init__()
        self._config, self._device, self._store, self._namespace = config, device, store, namespace
        self._outgoing: dict[str, _Outgoing] = {}
        self._engine: Engine | None = None
        self._open, self._current, self._swapping = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._reader = ray.get_runtime_context().get_actor_id()  # the same after a restart
        self._holds: int | None = None
        """The version of the whole weights in the engine, without an adapter."""
        from actors import transfer  # imports vLLM, which takes seconds: here, and only in this process

        self._transfer = transfer

    async def open(self, model_path: str, late: bool = False) -> None:
        """Start the engine on a model folder. late: it takes no turn before it has loaded a version."""
        if self._engine is not None:
            raise NotOpen("this process has an engine already: it has to end before another is opened")
        from rl.engine import Engine
        from rl.engine_options import EngineOptions

        self._transfer.register()
        self._model_path = model_path
        config, g, lora = self._config, self._config.generator, self._config.learner.lora
        self._engine = Engine(
            model_path,
            EngineOptions.of(
                g,
                dtype=config.generator_dtype,
                max_length=config.model.max_length,
                device=self._device,
                trust_remote_code=config.model.trust_remote_code,
                linger_s=_LINGER_S,
                sleep_mode=config.placement.time_share,
                transfer=self._transfer.NAME,
                lora_rank=lora.rank if lora and lora.publish == "adapter" else None,
                lora_targets=lora.targets if lora else "all-linear",
            ),
            version=UNPUBLISHED,
        )
        self._open.set()
        if not late:
            self._current.set()

    @property
    def _vllm(self) -> "Engine":
        if self._engine is None:
            raise NotOpen("a generator that was started again has no engine yet")
        return self._engine

    async def until_dead(self) -> None:
        """Raises EngineError when the engine has died, or hangs, in a process that lives."""
        await self._open.wait()
        died, patience_s = asyncio.wrap_future(self._vllm.died), self._config.faults.start_s
        while not (await asyncio.wait({died}, timeout=_LOOK_S))[0]:
            if self._vllm.stuck_s > patience_s:
                raise InfraError(f"the engine has not made a step for {self._vllm.stuck_s:.0f} s")
        died.result()

    async def start(self) -> int:
        """Catch up with the store; a generator that starts late or again serves the newest version. Returns it."""
        newest = await self._weights().newest.remote()
        if newest is not None and newest != self._vllm.version:
            await self.load(newest)
        return self._vllm.version

    async def ready(self) -> None:
        """Returns when it takes turns."""
        await self._current.wait()

    async def submit(self, caller: str, turns: Sequence[AskedTurn]) -> None:
        """Sample `turns`; `collect(caller)` answers them as they finish. Raises nothing: an error is an answer."""
        await self._current.wait()
        self._calls["submit"] += 1
        answers = self._answers_of(caller)
        for turn in turns:
            try:
                future = self._vllm.submit(turn.token_ids.tolist(), turn.sampling)
            except Exception as error:  # whatever it is, who asked must hear of it
                answers.put(turn.key, error)
            else:
                self._note("turn", "begin")
                future.add_done_callback(partial(self._answer, answers, turn.key))

    def _answer(self, answers: "_Outgoing", key: int, future: "Future[Completion]") -> None:
        self._note("turn", "end")
        answers.take(key, future)

    async def collect(self, caller: str) -> Answers:
        """What has finished for `caller` since the last call; waits until something has."""
        self._calls["collect"] += 1
        return await self._answers_of(caller).get()

    def _answers_of(self, caller: str) -> "_Outgoing":
        if caller not in self._outgoing:
            self._outgoing[caller] = _Outgoing(asyncio.get_running_loop())
        return self._outgoing[caller]

    async def load(self, version: int, policy: str | None = None) -> Loaded:
        """Swap to `version`, then score the probe sequence and hold it against the learner's log-probs.

        Raises WeightSyncError when they differ by more than `weights.probe_bound`.
        """
        async with self._swapping:  # the probe of one is not to be scored by the next
            with self.calling("load"):
                return await self._swap(version, policy)

    async def _swap(self, version: int, policy: str | None) -> Loaded:
        engine = self._vllm
        if engine.version == version and not engine.torn:
            self._current.set()
            return Loaded(version, 0.0, 0.0, 0.0, 0.0)
        started = time.perf_counter()
        store = self._weights()
        chosen: Any = policy or self._config.generator.swap
        manifest: Manifest = await store.pin.remote(version, self._reader)
        try:
            if manifest.base is None:
                await self._load_weights(manifest, chosen)
            else:
                if manifest.base != self._holds:  # a generator that starts late, or again
                    await self._load_weights(await store.manifest.remote(manifest.base), chosen)
                await self._load_adapter(manifest, chosen)
        finally:
            await store.unpin.remote(self._reader)
        loaded = time.perf_counter()
        scored = await asyncio.wrap_future(engine.score(manifest.probe))
        difference = np.abs(scored - manifest.probe_logprobs)
        mean, largest = float(difference.mean()), float(difference.max())
        bound = self._config.probe_bound
        if not mean <= bound:
            raise WeightSyncError(
                f"after loading weight version {version} the generator's log-probs of the probe sequence differ from "
                f"the learner's by {mean:.3g} on average (largest {largest:.3g}), above "
                f"weights.probe_bound = {bound:g}: the engine does not compute with the weights that were published"
            )
        self._current.set()
        return Loaded(version, loaded - started, time.perf_counter() - loaded, mean, largest)

    async def _load_weights(self, manifest: Manifest, policy: Any) -> None:
        where = {"store": self._store, "namespace": self._namespace, "version": manifest.version}
        updates = [{**where, "bucket": i} for i in range(len(manifest.buckets))]
        await asyncio.wrap_future(self._vllm.load(manifest.version, updates, policy))
        self._holds = manifest.version

    async def _load_adapter(self, manifest: Manifest, policy: Any) -> None:
        """By way of a folder in memory, which is where vLLM takes adapters from."""
        from rl.adapter import write_adapter

        lora = self._config.learner.lora
        assert lora is not None, "only a learner with LoRA publishes adapters"
        tensors = {}
        for i, bucket in enumerate(manifest.buckets):
            _, ref = await self._weights().bucket.remote(manifest.version, i)
            tensors |= dict(unpack(bucket, await ref, manifest.dtype))
        with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
            write_adapter(folder, tensors, lora, self._model_path)
            await asyncio.wrap_future(self._vllm.load_adapter(manifest.version, folder, policy))

    def _weights(self) -> Any:
        return ray.get_actor(self._store, namespace=self._namespace)

    async def drained(self) -> None:
        """Returns when no turn is under way."""
        while self._vllm.load_in_flight:
            await asyncio.sleep(_LINGER_S)

    async def sleep(self) -> None:
        await asyncio.wrap_future(self._vllm.sleep())

    async def wake_up(self) -> None:
        await asyncio.wrap_future(self._vllm.wake_up())

    async def score(self, token_ids: Sequence[int]) -> np.ndarray:
        return await asyncio.wrap_future(self._vllm.score(token_ids))

    def status(self) -> dict[str, Any]:
        engine = self._engine
        if engine is None:
            return super().status()
        return {
            **super().status(),
            "busy_s": engine.busy_s,
            "clock_s": time.perf_counter(),
            "version": engine.version,
            "in_flight": engine.load_in_flight,
            "prefix_hits": engine.prefix_hits,
            "prefix_queries": engine.prefix_queries,
        }
