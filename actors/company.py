"""Starts the roles' actors, and speaks to each role as one: fan out, gather, check."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.buffer import Buffer
from actors.generator import Generator, Loaded
from actors.learner import LearnerRank, StepResult, What
from actors.placement import Placement
from actors.reference import Reference
from actors.reward import Reward
from actors.role import bound_threads
from actors.rollout import RolloutWorker
from actors.weight_store import Published, WeightStore
from rl.config import Config
from rl.gradient import Sums, add_sums

log = logging.getLogger("repertory")
_MANY_CALLS = 4096
"""Far above what is admitted: waiting requests must not shut a load out."""
_PROBE_LENGTH = 128


@dataclass
class Company:
    """Every actor of a run but the controller."""

    config: Config
    placement: Placement
    store_name: str
    namespace: str
    device: str
    store: Any = None
    buffer: Any = None
    generators: list[Any] = field(default_factory=list)
    workers: list[Any] = field(default_factory=list)
    rewards: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    ranks: list[Any] = field(default_factory=list)

    async def start(self, initial: Path, resume: Path | None) -> Path:
        """Start every role on the newest checkpoint or else the initial model; returns when all are open.

        The learner holds the model then, and nothing is published yet. Returns the initial model's folder: `initial`,
        when it was made there.
        """
        c, free = self.config, {"num_cpus": 0, "runtime_env": {"env_vars": bound_threads(1)}}
        self.store = ray.remote(WeightStore).options(name=self.store_name, namespace=self.namespace, **free).remote()
        generator = ray.remote(Generator)
        self.generators = [
            generator.options(**self.placement.options("generator", i, max_concurrency=_MANY_CALLS)).remote(
                c, self.device, self.store_name, self.namespace
            )
            for i in range(c.generator.count)
        ]
        worker = ray.remote(RolloutWorker)
        self.workers = [
            worker.options(**self.placement.options("rollout", i, max_concurrency=_MANY_CALLS)).remote(
                c, self.generators
            )
            for i in range(c.rollout.count)
        ]
        self.rewards = self._each(Reward, "reward", c.reward_actor.count, c)
        if c.needs_reference:
            self.references = self._each(Reference, "reference", c.reference.count, c, self.device)
        buffer = ray.remote(Buffer).options(max_concurrency=_MANY_CALLS, **free)
        self.buffer = buffer.remote(self.workers, self.rewards)
        rank = ray.remote(LearnerRank)
        self.ranks = [
            rank.options(**self.placement.options("learner", i)).remote(c, self.device, i)
            for i in range(c.learner.count)
        ]
        # A learner imports what making a model takes anyway.
        made = await self.ranks[0].prepare_model.remote(str(initial))
        model = str(resume or made)
        await asyncio.gather(*(w.open.remote(model) for w in self.workers))
        probe = await self.workers[0].probe.remote(min(_PROBE_LENGTH, c.model.max_length - 1))
        host, port = await self.ranks[0].address.remote()
        log.info("the model and the rollout workers are ready")

        async def ready(role: str, call: Any) -> None:
            await call
            log.info("%s is ready", role)

        await asyncio.gather(
            *(ready("learner", r.open.remote(model, probe, host, port)) for r in self.ranks),
            *(ready("generator", g.open.remote(model)) for g in self.generators),
            *(ready("reference", r.open.remote(model)) for r in self.references),
            *(ready("reward", r.status.remote()) for r in self.rewards),
        )
        return Path(made)

    def _each(self, cls: type, role: str, count: int, *arguments: Any) -> list[Any]:
        actor = ray.remote(cls)
        return [actor.options(**self.placement.options(role, i)).remote(*arguments) for i in range(count)]

    async def publish(self, version: int, step: int, what: What) -> Published:
        return await self.store.publish.remote(version, step, self.ranks, what)

    async def load(self, version: int) -> list[Loaded]:
        """Every generator swaps to `version` and proves it; none gets work before it has."""
        return list(await asyncio.gather(*(g.load.remote(version) for g in self.generators)))

    async def step(self, method: str, *arguments: Any) -> tuple[Sums, StepResult]:
        """One optimizer step of every rank: `example_step` or `rl_step`."""
        return _combine(await self.all_ranks(method, *arguments))

    async def reference_columns(self, groups: Sequence[Any], temperature: float) -> list[Any]:
        """Refs of {"reference": float32 [T]} of each trajectory; the i-th of n has every n-th group from i on."""
        count = len(self.references)
        refs = [r.columns.remote(list(groups[i::count]), temperature) for i, r in enumerate(self.references)]
        await asyncio.to_thread(ray.wait, refs, num_returns=count, fetch_local=False)
        return refs

    async def learner_columns(self, groups: Sequence[Any], temperature: float, wanted: Sequence[str]) -> list[Any]:
        """The same by the learner's ranks: proximal, values, or the reference with the adapter off."""
        refs = [rank.score.remote(list(groups), temperature, wanted) for rank in self.ranks]
        await asyncio.to_thread(ray.wait, refs, num_returns=len(refs), fetch_local=False)
        return refs

    async def reference_examples(self, examples: Sequence[Any]) -> list[Any]:
        """Refs of the reference's log-probs of the examples; the i-th of n has every n-th example from i on."""
        count = len(self.references)
        return [r.example_logprobs.remote(list(examples), i, count) for i, r in enumerate(self.references)]

    async def use_reward_model(self, path: str) -> None:
        await asyncio.gather(*(r.load.remote(path) for r in self.rewards))

    async def freeze(self, path: str) -> None:
        """The reference actors are from now on the model at `path`."""
        await asyncio.gather(*(r.load.remote(path) for r in self.references))

    async def all_ranks(self, method: str, *arguments: Any) -> list[Any]:
        return list(await asyncio.gather(*(getattr(r, method).remote(*arguments) for r in self.ranks)))

    async def time_share(self, to: str) -> None:
        """`generate` or `learn`: who has the GPUs. Nothing to do unless placement.time_share is set."""
        if not self.config.placement.time_share:
            return
        if to == "learn":
            await asyncio.gather(*(g.sleep.remote() for g in self.generators))
            await self.all_ranks("move", "device")
        else:
            await self.all_ranks("move", "host")
            await asyncio.gather(*(g.wake_up.remote() for g in self.generators))

    async def statuses(self) -> list[dict[str, Any]]:
        actors = [*self.generators, *self.workers, *self.rewards, *self.references, *self.ranks, self.buffer]
        return list(await asyncio.gather(*(a.status.remote() for a in actors)))


def _combine(results: Sequence[StepResult]) -> tuple[Sums, StepResult]:
    """The ranks' sums as one, and the slowest rank's result."""
    sums: Sums = {}
    for result in results:
        sums = add_sums(sums, result.sums)
    return sums, max(results, key=lambda r: r.seconds)
