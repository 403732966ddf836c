"""Starts the roles' actors, speaks to each role as one, and knows how each is opened again after a restart."""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.buffer import Buffer
from actors.faults import backoff, cause_of, is_death, is_infra, named, tried, within
from actors.generator import UNPUBLISHED, Generator, Loaded
from actors.learner import LearnerRank, StepResult, What
from actors.learner_group import LearnerGroup
from actors.placement import Placement, inherited
from actors.reference import Reference
from actors.replica_health import ReplicaHealth
from actors.reward import Reward
from actors.role import NotOpen, bound_threads, remote_class
from actors.rollout import RolloutWorker
from actors.supervisor import Supervisor
from actors.weight_store import OtherWeights, Published, WeightStore
from rl.config import Config
from rl.gradient import Sums, add_sums

log = logging.getLogger("repertory")
_MANY_CALLS = 4096
"""Far above what is admitted: waiting requests must not shut a load out."""
_PROBE_LENGTH = 128
_FOR_EVER = -1
_STATUS_S = 10.0


@dataclass
class Company:
    """Every actor of a run but the controller."""

    config: Config
    placement: Placement
    store_name: str
    namespace: str
    device: str
    supervisor: Supervisor
    quarantined: Sequence[str] = ()
    version: int = -1
    """The newest that was published: what a generator that comes late must have."""
    store: Any = None
    buffer: Any = None
    generators: list[Any] = field(default_factory=list)
    workers: list[Any] = field(default_factory=list)
    rewards: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    learner: LearnerGroup = field(init=False)
    health: ReplicaHealth = field(init=False)
    _model: str = ""
    _published: tuple[int, What, tuple[str, ...]] | None = None
    """Step, what and checksums of the newest version."""
    _base: tuple[str, int] | None = None
    """The store's life, and the learner's, that know the base which adapters are published for."""
    _publishing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _scaling: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start(self, initial: Path, resume: Path | None) -> Path:
        """Start every role on the newest checkpoint or else the initial model; returns when all are open.

        The learner holds the model then, and nothing is published yet. Returns the initial model's folder: `initial`,
        when it was made there.
        """
        c = self.config
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        free = {
            "num_cpus": 0,
            "max_concurrency": _MANY_CALLS,
            "scheduling_strategy": here,
            "runtime_env": {"env_vars": {**bound_threads(1), **inherited()}},
        }
        store = remote_class(WeightStore)
        self.store = store.options(
            name=self.store_name, namespace=self.namespace, max_restarts=_FOR_EVER, **free
        ).remote(c.weights.full_every)
        self.generators = [self._make("generator", i) for i in range(c.generator.count)]
        self.workers = [self._make("rollout", i) for i in range(c.rollout.count)]
        self.rewards = [self._make("reward", i) for i in range(c.reward_actor.count)]
        if c.needs_reference:
            self.references = [self._make("reference", i) for i in range(c.reference.count)]
        # Started again it would have lost every trajectory: when it dies, the run goes on from its newest checkpoint.
        self.buffer = remote_class(Buffer).options(**free).remote(c, self.workers, self.rewards, self.quarantined)
        ranks = [self._make("learner", i) for i in range(c.learner.count)]
        self.learner = LearnerGroup(ranks, c.faults, self.supervisor)
        # A learner imports what making a model takes anyway.
        made = await ranks[0].prepare_model.remote(str(initial))
        model = str(resume or made)
        await asyncio.gather(*(w.open.remote(model) for w in self.workers))
        probe = await self.workers[0].probe.remote(min(_PROBE_LENGTH, c.model.max_length - 1))
        log.info("the model and the rollout workers are ready")

        async def ready(role: str, call: Any) -> None:
            await call
            log.info("%s is ready", role)

        await asyncio.gather(
            ready("learner", self.learner.open(model, probe)),
            *(ready("generator", g.open.remote(model)) for g in self.generators),
            *(ready("reference", r.load.remote(model)) for r in self.references),
            *(ready("reward", r.status.remote()) for r in self.rewards),
        )
        # The checkpoint may be deleted while the run goes on. What is opened again gets its weights from elsewhere.
        self._model = made
        self.learner.reopens_on(made)
        self._supervise()
        return Path(made)

    def _make(self, role: str, index: int) -> Any:
        """One actor of a role, in its place."""
        c = self.config
        cls, arguments, more = {
            "generator": (Generator, (c, self.device, self.store_name, self.namespace), _MANY_CALLS),
            "rollout": (RolloutWorker, (c, self.generators), _MANY_CALLS),
            "reward": (Reward, (c,), None),
            "reference": (Reference, (c, self.device), None),
            "learner": (LearnerRank, (c, self.device, index), None),
        }[role]
        concurrency = {"max_concurrency": more} if more else {}
        options = self.placement.options(role, index, max_restarts=_FOR_EVER, **concurrency)
        return remote_class(cls).options(**options).remote(*arguments)

    # -- what is opened again --------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        for generator in self.generators:
            self._keep_generator(generator)
        for worker in self.workers:
            self._keep_worker(worker)
        self.supervisor.keep("store", self.store, self._refill_store)
        self.supervisor.keep("buffer", self.buffer, None)
        loop = asyncio.get_running_loop()

        def restarted(role: str, error: BaseException) -> None:
            loop.call_soon_threadsafe(self.supervisor.noticed, role, error)

        self.health = ReplicaHealth(self.config.faults, restarted)
        self.health.use("reward", self.rewards)
        self.health.use("reference", self.references)
        self.health.start()

    def _keep_generator(self, generator: Any) -> None:
        self.supervisor.keep("generator", generator, lambda: self._open_generator(generator))

    def _keep_worker(self, worker: Any) -> None:
        self.supervisor.keep("rollout", worker, lambda: self._open_worker(worker))

    async def _open_generator(self, generator: Any) -> None:
        """It takes no turn before it has the newest version."""
        await generator.open.remote(self._model, late=True)
        loaded = await generator.start.remote()
        # What was published since it asked did not reach it: it was not there to be told.
        while loaded not in (self.version, UNPUBLISHED):
            loaded = (await generator.load.remote(self.version)).version

    async def _open_worker(self, worker: Any) -> None:
        await worker.use.remote(self.generators)
        await worker.open.remote(self._model)

    async def _refill_store(self) -> None:
        """Have the newest version published again, if the learner still holds it; else the next one is on its way."""
        await self.store.ping.remote()
        async with self._publishing:
            if self._published is None or not self.learner.holds_the_published:
                return
            step, what, checksums = self._published
            if what == "adapter":
                return  # its base is lost with it, and both are published by the stage's next publish
            try:
                await self.store.publish.remote(self.version, step, self.learner.ranks, what, checksums)
            except Exception as error:
                if not isinstance(cause_of(error), OtherWeights | ValueError):
                    raise
                log.info("the store stays empty until the next publish: %s", cause_of(error))

    # -- actors that join and leave ----------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, int]:
        """How many actors each elastic role has."""
        return {role: len(actors) for role, actors in self._elastic.items()}

    @property
    def _elastic(self) -> dict[str, list[Any]]:
        roles = {"generator": self.generators, "rollout": self.workers, "reward": self.rewards}
        return {**roles, **({"reference": self.references} if self.references else {})}

    async def scale(self, role: str, count: int) -> None:
        """Have `count` actors of a role. A generator that joins has the newest version before it takes turns; who
        leaves ends what it has first.

        Raises ValueError for a role that cannot be scaled, ClusterTooSmall (with those that found room still there).
        """
        if role not in self._elastic or count < 1:
            names = ", ".join(self._elastic)
            raise ValueError(
                f"{role}={count}: at least 1 of {names}. The learner's size is that of its optimizer's shards"
            )
        actors = self._elastic[role]
        async with self._scaling:
            while len(actors) < count:
                await self._join(role, actors)
            while len(actors) > count:
                await self._leave(role, actors)

    async def _join(self, role: str, actors: list[Any]) -> None:
        index = len(actors)
        await self.placement.add(role, index)
        actor = self._make(role, index)
        actors.append(actor)  # first: what is published from now on reaches it, what was before it asks for
        try:
            if role == "generator":
                await within(self.config.faults.start_s, self._open_generator(actor))
                self._keep_generator(actor)
            elif role == "rollout":
                await self._open_worker(actor)
                self._keep_worker(actor)
            else:
                await actor.status.remote()
        except BaseException:
            actors.remove(actor)
            ray.kill(actor)
            self.placement.leave(role, index)
            raise
        await self._announce(role)

    async def _leave(self, role: str, actors: list[Any]) -> None:
        actor = actors.pop()
        await self._announce(role)
        if role in ("generator", "rollout"):
            self.supervisor.let_go(actor)
        if role == "generator":
            await actor.drained.remote()
        if role in ("reference", "reward"):
            await actor.status.remote()  # answered after the call that runs
        ray.kill(actor)
        self.placement.leave(role, len(actors))

    async def _announce(self, role: str) -> None:
        """Returns when nothing new goes to who has left."""
        if role == "generator":
            await asyncio.gather(
                *(tried(lambda _, w=w: w.use.remote(self.generators), self.config.faults) for w in self.workers)
            )
        elif role == "reference":
            self.health.use(role, self.references)
        else:
            if role == "reward":
                self.health.use(role, self.rewards)
            await self.buffer.use.remote(self.workers, self.rewards)

    # -- each role as one ------------------------------------------------------------------------------------------

    async def publish(self, first: int, step: int, what: What) -> tuple[Published, list[Loaded]]:
        """The learner's weights under a number from `first` on, loaded and proven by every generator that lives.

        A number that a failure has spoilt is never used again.
        """
        async with self._publishing:
            if what == "adapter" and self._base != await self._base_life():
                published, _ = await self._publish(first, step, "base")
                first = published.version + 1
            return await self._publish(first, step, what)

    async def _publish(self, first: int, step: int, what: What) -> tuple[Published, list[Loaded]]:
        faults = self.config.faults
        for version in itertools.count(first):
            lives = self.learner.lives
            try:
                base_life = await self._base_life()
                call = self.store.publish.remote(version, step, self.learner.ranks, what)
                published: Published = await within(faults.deadline_s, call)
                self.version, self._published = version, (step, what, published.checksums)
                self.learner.published(published.checksums, what)
                if what == "base":
                    self._base = base_life
                await self.time_share("generate")
                return published, await self.load(version)
            except Exception as error:
                if not is_infra(error):
                    raise
                log.warning("version %d was not published: %s", version, named(error))
                await self.learner.mend_if_broken(lives, error)
                await asyncio.sleep(backoff(version - first))
        raise AssertionError("the loop does not end")

    async def _base_life(self) -> tuple[str, int]:
        return await tried(lambda _: self.store.ping.remote(), self.config.faults), self.learner.lives

    async def load(self, version: int) -> list[Loaded]:
        """Every generator swaps to `version` and proves it; none gets work before it has.

        One that has died catches up by itself when it is back. Raises whatever else kept one from it, such as the
        store's death: it would go on with the weights that it has.
        """
        faults = self.config.faults
        calls = [within(faults.deadline_s, g.load.remote(version)) for g in self.generators]
        results = await asyncio.gather(*calls, return_exceptions=True)
        loaded = [r for r in results if isinstance(r, Loaded)]
        for result in results:
            if isinstance(result, BaseException):
                if not is_death(result) and not isinstance(cause_of(result), NotOpen):
                    raise result
                log.warning("a generator did not load version %d: %s", version, named(result))
        return loaded

    async def step(self, method: str, *arguments: Any) -> tuple[Sums, StepResult]:
        """One optimizer step of every rank: `example_step` or `rl_step`."""
        return _combine(await self.learner.tell(method, *arguments))

    async def reference_columns(self, path: str, groups: Sequence[Any], temperature: float) -> list[Any]:
        """Refs of {"reference": float32 [T]} of each trajectory under the model in the folder `path`.

        The i-th of n has every n-th group from i on.
        """
        n = min(len(self.references), len(groups))
        calls = [self._by_a_reference(i, "columns", path, list(groups[i::n]), temperature) for i in range(n)]
        return list(await asyncio.gather(*calls))

    async def learner_columns(self, groups: Sequence[Any], temperature: float, wanted: Sequence[str]) -> list[Any]:
        """The same by the learner's ranks: proximal, values, or the reference with the adapter off."""
        return await self.learner.refs("score", list(groups), temperature, wanted)

    async def reference_examples(self, path: str, examples: Sequence[Any]) -> list[Any]:
        """Refs of the reference's log-probs of the examples; the i-th of n has every n-th example from i on."""
        n = len(self.references)
        calls = [self._by_a_reference(i, "example_logprobs", path, list(examples), i, n) for i in range(n)]
        return list(await asyncio.gather(*calls))

    async def _by_a_reference(self, first: int, method: str, *arguments: Any) -> Any:
        """A ref of the first return value of a replica's method, by whichever replica lives."""

        async def call(attempt: int) -> Any:
            replica = self.references[(first + attempt) % len(self.references)]
            ref, told = getattr(replica, method).options(num_returns=2).remote(*arguments)
            await told
            return ref

        return await tried(call, self.config.faults)

    async def use_reward_model(self, path: str) -> None:
        await self.buffer.use_reward_model.remote(path)

    async def time_share(self, to: str) -> None:
        """`generate` or `learn`: who has the GPUs. Nothing to do unless placement.time_share is set."""
        if not self.config.placement.time_share:
            return
        if to == "learn":
            await asyncio.gather(*(g.sleep.remote() for g in self.generators))
            await self.learner.ask("move", "device")
        else:
            await self.learner.ask("move", "host")
            await asyncio.gather(*(g.wake_up.remote() for g in self.generators))

    async def statuses(self) -> list[dict[str, Any]]:
        """Of every actor that answers."""
        actors = [*self.generators, *self.workers, *self.rewards, *self.references, *self.learner.ranks]
        calls = [within(_STATUS_S, a.status.remote()) for a in [*actors, self.store, self.buffer]]
        found = await asyncio.gather(*calls, return_exceptions=True)
        return [status for status in found if isinstance(status, dict)]

    def close(self) -> None:
        self.supervisor.close()
        if self.references or self.rewards:
            self.health.close()


def _combine(results: Sequence[StepResult]) -> tuple[Sums, StepResult]:
    """The ranks' sums as one, and the slowest rank's result."""
    sums: Sums = {}
    for result in results:
        sums = add_sums(sums, result.sums)
    return sums, max(results, key=lambda r: r.seconds)
