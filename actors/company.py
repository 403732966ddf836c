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
from actors.learner import LearnerRank, RlBatch, StepId, StepResult
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
        self.buffer = buffer.remote(self.workers, self.rewards, c.reward.success_at)
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

    async def publish(self, version: int, step: int) -> Published:
        return await self.store.publish.remote(version, step, self.ranks)

    async def load(self, version: int) -> list[Loaded]:
        """Every generator swaps to `version` and proves it; none gets work before it has."""
        return list(await asyncio.gather(*(g.load.remote(version) for g in self.generators)))

    async def sft_step(self, step_id: StepId, indices: Sequence[int], lr: float) -> tuple[Sums, StepResult]:
        return _combine(await asyncio.gather(*(r.sft_step.remote(step_id, indices, lr) for r in self.ranks)))

    async def rl_step(self, step_id: StepId, batch: RlBatch, lr: float) -> tuple[Sums, StepResult]:
        return _combine(await asyncio.gather(*(r.rl_step.remote(step_id, batch, lr) for r in self.ranks)))

    async def reference_logprobs(self, groups: Sequence[Any], temperature: float) -> Any:
        """A ref of float32 [T] arrays, groups x samples; the groups are shared out over the replicas."""
        count = len(self.references)
        shares = [list(groups[i::count]) for i in range(count)]
        parts = [
            reference.logprobs.remote(share, temperature)
            for reference, share in zip(self.references, shares, strict=True)
        ]
        if count == 1:
            await asyncio.to_thread(ray.wait, parts, fetch_local=False)
            return parts[0]
        answers = await asyncio.gather(*parts)
        return ray.put([answers[g % count][g // count] for g in range(len(groups))])

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
