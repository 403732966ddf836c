"""Starts the roles' actors, speaks to each role as one, and knows how each is opened again after a restart."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.buffer import Buffer
from actors.faults import Stuck, backoff, cause_of, is_death, is_infra, named, tried, within
from actors.feedback import FeedbackGenerator
from actors.generator import UNPUBLISHED, Generator, Loaded
from actors.learner import LearnerRank, StepResult, What
from actors.learner_group import LearnerGroup
from actors.placement import Placement, inherited
from actors.reference import Reference
from actors.replica_health import ReplicaHealth
from actors.reward import Reward
from actors.role import NotOpen, bound_threads, remote_class
from actors.rollout import RolloutWorker
from actors.supervisor import Supervisor, end
from actors.weight_store import Published, WeightStore
from rl.checkpoint import write_whole
from rl.config import Config
from rl.gradient import Sums, add_sums

log = logging.getLogger("repertory")
_MANY_CALLS = 4096
"""Far above what is admitted: waiting requests must not shut a load out."""
_PROBE_LENGTH = 128
_FOR_EVER = -1
_STATUS_S = 2.0
_ATTEMPTS = 20


@dataclass
class Company:
    """Every actor of a run but the controller."""

    config: Config
    placement: Placement
    store_name: str
    namespace: str
    device: str
    supervisor: Supervisor
    quarantined: Sequence[str]
    note_version: Callable[[int, int, str], None]
    """Told of a number, its step and what is published before the number is used."""
    version: int = -1
    """The newest that was published."""
    wanted: int = -1
    """The one that the generators sample from: what one that comes late must have."""
    store: Any = None
    buffer: Any = None
    generators: list[Any] = field(default_factory=list)
    feedback: list[Any] = field(default_factory=list)
    workers: list[Any] = field(default_factory=list)
    rewards: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    learner: LearnerGroup = field(init=False)
    health: ReplicaHealth | None = None
    _model: str = ""
    _lives: dict[Any, str] = field(default_factory=dict)
    """In which life an actor was first opened."""
    _published: tuple[int, What, tuple[str, ...]] | None = None
    """Step, what and checksums of the newest version."""
    _base: tuple[str, int] | None = None
    """The store's life, and the learner's, that know the base which adapters are published for."""
    _publishing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start(self, initial: Path, resume: Path | None) -> Path:
        """Start every role on the newest checkpoint or else the initial model; returns when all are open.

        The learner holds the model then, and nothing is published yet. Returns the initial model's folder: `initial`,
        when it was made there.
        """
        c = self.config
        # Not soft: Ray puts an actor elsewhere already when this node's next worker process is slow to come.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
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
        # For whoever serves what is trained here.
        write_whole(initial.parent / "store.json", {"store": self.store_name, "namespace": self.namespace})
        self.generators = [self.make("generator", i) for i in range(c.generator.count)]
        if c.needs_feedback_model:
            self.feedback = [self.make("feedback", i) for i in range(c.feedback_actor.count)]
        self.workers = [self.make("rollout", i) for i in range(c.rollout.count)]
        self.rewards = [self.make("reward", i) for i in range(c.reward_actor.count)]
        if c.needs_reference:
            self.references = [self.make("reference", i) for i in range(c.reference.count)]
        # Started again it would have lost every trajectory: when it dies, the run goes on from its newest checkpoint.
        self.buffer = remote_class(Buffer).options(**free).remote(c, self.workers, self.rewards, self.quarantined)
        ranks = [self.make("learner", i) for i in range(c.learner.count)]
        self.learner = LearnerGroup(ranks, c.faults, self.supervisor)
        # A learner imports what making a model takes anyway.
        made = await ranks[0].prepare_model.remote(str(initial))
        model = str(resume or made)
        await asyncio.gather(*(self._opened(w, lambda w=w: w.open.remote(model)) for w in self.workers))
        probe = await self.workers[0].probe.remote(min(_PROBE_LENGTH, c.model.max_length - 1))
        log.info("the model and the rollout workers are ready")

        async def ready(role: str, call: Any) -> None:
            await call
            log.info("%s is ready", role)

        await asyncio.gather(
            ready("learner", self.learner.open(model, probe)),
            *(ready("generator", self._opened(g, lambda g=g: g.open.remote(model))) for g in self.generators),
            *(ready("feedback", self._opened(f, lambda f=f: self._open_feedback(f))) for f in self.feedback),
            *(ready("reference", r.load.remote(model)) for r in self.references),
            *(ready("reward", r.status.remote()) for r in self.rewards),
        )
        # The checkpoint may be deleted while the run goes on. What is opened again gets its weights from elsewhere.
        self._model = made
        self.learner.reopens_on(made)
        self._supervise()
        return Path(made)

    async def _opened(self, actor: Any, call: Callable[[], Awaitable[Any]]) -> None:
        """Note in which life the actor was opened."""
        life = await actor.ping.remote()
        await call()
        self._lives[actor] = life

    def make(self, role: str, index: int) -> Any:
        """One actor of a role, in its place."""
        c = self.config
        cls, arguments, more = {
            "generator": (Generator, (c, self.device, self.store_name, self.namespace), _MANY_CALLS),
            "feedback": (FeedbackGenerator, (c, self.device), _MANY_CALLS),
            "rollout": (RolloutWorker, (c, self.generators, self.feedback), _MANY_CALLS),
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
            self.keep_generator(generator)
        for actor in self.feedback:
            life = self._lives.get(actor)
            self.supervisor.keep("feedback", actor, lambda actor=actor: self._open_feedback(actor), life)
        for worker in self.workers:
            self.keep_worker(worker)
        self.supervisor.keep("store", self.store, self._refill_store)
        self.supervisor.keep("buffer", self.buffer, None)
        loop = asyncio.get_running_loop()

        def restarted(role: str, error: BaseException) -> None:
            loop.call_soon_threadsafe(self.supervisor.noticed, role, error)

        self.health = health = ReplicaHealth(self.config.faults, restarted)
        health.use("reward", self.rewards)
        health.use("reference", self.references)
        health.start()

    def keep_generator(self, generator: Any) -> None:
        life = self._lives.get(generator)
        self.supervisor.keep("generator", generator, lambda: self.open_generator(generator), life)

    def keep_worker(self, worker: Any) -> None:
        life = self._lives.get(worker)
        self.supervisor.keep("rollout", worker, lambda: self.open_worker(worker), life)

    async def open_generator(self, generator: Any) -> None:
        """It takes no turn before it has the version that the others have."""
        await generator.open.remote(self._model, late=True)
        loaded = await generator.start.remote()
        # What was published since it asked did not reach it: it was not there to be told. It may also be ahead of what
        # the others have been told yet, unless they are to sample from an older version.
        while loaded != UNPUBLISHED and (loaded < self.wanted or loaded > self.wanted != self.version):
            loaded = (await generator.load.remote(self.wanted)).version

    async def _open_feedback(self, actor: Any) -> None:
        await actor.open.remote(self.config.env.feedback.model)

    async def open_worker(self, worker: Any) -> None:
        await worker.use.remote(self.generators)
        await worker.open.remote(self._model)

    async def _refill_store(self) -> None:
        """Have the newest version published again, if the learner still holds it; else the next one is on its way."""
        await self.store.ping.remote()
        if self._publishing.locked():
            return
        async with self._publishing:
            if self._published is None or not self.learner.holds_the_published:
                return
            step, what, checksums = self._published
            if what == "adapter":
                return  # its base is lost with it, and both are published by the stage's next publish
            lives = self.learner.lives
            try:
                await self.store.publish.remote(self.version, step, self.learner.ranks, what, checksums)
                await self.load(self.version)  # one that came while the store was empty
            except Exception as error:
                if is_death(error):
                    raise
                log.info("the store stays empty until the next publish: %s", named(error))
                if is_infra(error):
                    await self.learner.mend_if_broken(lives, error)

    # -- each role as one ------------------------------------------------------------------------------------------

    async def publish(self, first: int, step: int, what: What) -> tuple[Published, list[Loaded]]:
        """The learner's weights under a number from `first` on, loaded and proven by every generator that lives.

        A number that a failure has spoilt is never used again.
        """
        async with self._publishing:
            return await self._publish(first, step, what)

    async def _publish(self, first: int, step: int, what: What) -> tuple[Published, list[Loaded]]:
        """Ended by the budget: whoever dies is counted where it is opened again."""
        faults, version = self.config.faults, first
        for attempt in itertools.count():
            lives = self.learner.lives
            try:
                life = await self._base_life()
                # An adapter is published for a base that this store has from these ranks.
                now: What = "base" if what == "adapter" and self._base != life else what
                self.note_version(version, step, now)
                call = self.store.publish.remote(version, step, self.learner.ranks, now)
                published: Published = await within(faults.deadline_s, call)
                self.version, self._published = version, (step, now, published.checksums)
                self.learner.published(published.checksums, now)
                if now == "base":
                    self._base = life
                await self.time_share("generate")
                loaded = await self.load(version)
                if now == what:
                    return published, loaded
            except Exception as error:
                if not is_infra(error):
                    raise
                log.warning("version %d was not published: %s", version, named(error))
                await self.learner.mend_if_broken(lives, error)
                await asyncio.sleep(backoff(attempt))
                if attempt >= _ATTEMPTS:
                    raise
            version += 1
        raise AssertionError("the loop does not end")

    async def _base_life(self) -> tuple[str, int]:
        return await tried(lambda _: self.store.ping.remote(), self.config.faults), self.learner.lives

    async def load(self, version: int) -> list[Loaded]:
        """Every generator swaps to `version` and proves it; none gets work before it has.

        One that has died catches up by itself when it is back. Raises whatever else kept one from it, such as the
        store's death: it would go on with the weights that it has.
        """
        faults, self.wanted = self.config.faults, version
        generators = list(self.generators)
        calls = [within(faults.deadline_s, g.load.remote(version)) for g in generators]
        results = await asyncio.gather(*calls, return_exceptions=True)
        loaded = [r for r in results if isinstance(r, Loaded)]
        for generator, result in zip(generators, results, strict=True):
            if isinstance(result, BaseException):
                hangs = isinstance(result, Stuck) and not isinstance(result, RayTaskError)
                if hangs:
                    end(generator)
                elif not is_death(result) and not isinstance(cause_of(result), NotOpen):
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
        actors = [*self.generators, *self.feedback, *self.workers, *self.rewards, *self.references, *self.learner.ranks]
        calls = [within(_STATUS_S, a.status.remote()) for a in [*actors, self.store, self.buffer]]
        found = await asyncio.gather(*calls, return_exceptions=True)
        return [status for status in found if isinstance(status, dict)]

    def close(self) -> None:
        self.supervisor.close()
        if self.health is not None:
            self.health.close()


def _combine(results: Sequence[StepResult]) -> tuple[Sums, StepResult]:
    """The ranks' sums as one, and the slowest rank's result."""
    sums: Sums = {}
    for result in results:
        sums = add_sums(sums, result.sums)
    return sums, max(results, key=lambda r: r.seconds)
