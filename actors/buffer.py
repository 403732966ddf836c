"""The buffer: has groups played and scored, and owns what comes back.

Trajectories are return values of calls that the buffer makes, so it owns them: they outlive the worker that played
them. It hands on references and summaries; nobody between worker and learner reads a token.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from actors.faults import Stuck, backoff, cause_of, is_death, is_infra, named, tried, within
from actors.owned import Owned
from actors.role import AsyncRole
from actors.supervisor import end
from actors.worker_pool import Ended, WorkerPool
from rl.config import Config
from rl.config_algo import AlgoConfig
from rl.config_stage import ExampleStage
from rl.credit import Columns, GroupFacts, assign_credit
from rl.episode import Episode, GroupRequest
from rl.evaluate import Outcome, outcome_of
from rl.policy import Sampling
from rl.reward import Score
from rl.task import BadTask, Task
from rl.trajectory import Summary, Trajectory, join_parquet, read_parquet, to_row, write_parquet

log = logging.getLogger("repertory")
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The episodes of one task that share a baseline. The refs' values belong to the buffer."""

    request: GroupRequest
    summaries: list[Summary]
    scores: list[Score]
    episodes: Any
    trajectories: Any


class Overdue(Stuck):
    """A group that was not played by its deadline, at a worker that lives."""


class Ungradable(RuntimeError):
    """Episodes that no grader survives."""


@dataclass(frozen=True)
class Dropped:
    """A task that fails wherever it is played. quarantined: it ended the workers or the graders that had it; never
    tried again. scoring: it was played, and it is its scoring that fails."""

    task: str
    cause: str
    quarantined: bool = False
    scoring: bool = False


@dataclass(frozen=True)
class Played:
    """groups in the order of the requests; replayed: how often a group or its scoring was lost to a failure of ours."""

    groups: list[Group]
    dropped: list[Dropped]
    replayed: int
    reward_s: float
    """Seconds in reward calls, summed; they run while other groups are still being played."""


@dataclass
class _Tally:
    """What a call of `play` counts while its groups are played."""

    replayed: int = 0
    reward_s: float = 0.0


class Buffer(AsyncRole):
    role = "buffer"

    def __init__(self, config: Config, workers: Sequence[Any], rewards: Sequence[Any], quarantined: Sequence[str] = ()):
        super().__init__()
        self._faults = config.faults
        self._workers, self._graders = WorkerPool(workers), WorkerPool(rewards, most=1)
        self._reward_model: str | None = None
        self._quarantined = set(quarantined)
        self.progress = (0, 0)
        self._owned = Owned()

    async def use(self, workers: Sequence[Any], rewards: Sequence[Any]) -> None:
        """From now on these. Returns when no group is under way at another one."""
        await self._graders.use(rewards)
        await self._workers.use(workers)

    async def use_reward_model(self, path: str) -> None:
        """From now on a reward model, a folder, gives the reward. Raises what loading it does."""
        await asyncio.gather(*(tried(lambda _, r=r: r.load.remote(path), self._faults) for r in self._graders.workers))
        self._reward_model = path

    async def play(self, requests: Sequence[GroupRequest], sampling: Sampling, files: Sequence[str] = ()) -> Played:
        """Have every group played and scored. A failure of ours is made good; a failing task is dropped, loudly.

        files: for each request, a Parquet file to write as soon as its group is scored. Raises the failure of ours that
        lasts longer than faults.patience_s.
        """
        self._calls["play"] += 1
        self._owned.free()
        self.progress = (0, len(requests))
        tally = _Tally()

        async def one(number: int, request: GroupRequest) -> Group | Dropped:
            group = await self._group(request, sampling, tally)
            if files and isinstance(group, Group):
                await self.write(files[number], [group], [[0.0] * len(group.scores)])
            return group

        results = await asyncio.gather(*(one(i, r) for i, r in enumerate(requests)))
        groups = [r for r in results if isinstance(r, Group)]
        dropped = [r for r in results if isinstance(r, Dropped)]
        return Played(groups, dropped, tally.replayed, tally.reward_s)

    async def _group(self, request: GroupRequest, sampling: Sampling, tally: "_Tally") -> Group | Dropped:
        """Played and scored, or why not."""
        task = request.task.id
        if task in self._quarantined:
            return Dropped(task, "it is quarantined", quarantined=True)
        attempts = self._faults.attempts
        failures = deaths = lost = 0
        given_up = math.inf
        while True:
            scoring = False
            # What dies with every worker that plays it must not take others' episodes with it.
            alone = 0 < deaths == attempts - 1
            try:
                async with self._workers.one(alone) as worker:
                    summaries, episodes, trajectories = worker.play.options(num_returns=3).remote(request, sampling)
                    self._owned.add(episodes, trajectories)
                    try:
                        known = await within(self._faults.deadline_s, summaries)
                    except Stuck as error:
                        if not isinstance(error, RayTaskError):  # the worker itself says that it waits for others
                            ray.cancel(summaries)
                            raise Overdue(str(error)) from None
                        raise
                scoring = True
                scores = await self._scores(episodes, tally)
            except Ungradable as error:
                self._quarantined.add(task)
                return Dropped(task, str(error), quarantined=True, scoring=True)
            except Exception as error:
                infra, overdue = is_infra(error), isinstance(error, Overdue)
                given_up = min(given_up, time.monotonic() + self._faults.patience_s)
                tally.replayed += infra
                deaths += is_death(error)
                if is_death(error) and alone:
                    self._quarantined.add(task)
                    return Dropped(task, f"its environment ended the rollout worker {deaths} times", quarantined=True)
                failures += not infra or overdue  # most likely it is the task's own environment that waits
                if failures == attempts or isinstance(cause_of(error), BadTask):
                    return Dropped(task, named(error), scoring=scoring)
                if infra and not overdue and time.monotonic() > given_up:
                    raise
                log.warning("the group of task %s failed, and is played again: %s", task, named(error))
                await asyncio.sleep(backoff(lost))
                lost += 1
                continue
            self.progress = (self.progress[0] + 1, self.progress[1])
            return Group(request, known, scores, episodes, trajectories)

    async def _scores(self, episodes: Any, tally: "_Tally") -> list[Score]:
        """By whichever grader is free. Raises what the reward function itself raises, and Ungradable."""
        started = time.perf_counter()
        attempts = ended = 0

        async def score(attempt: int) -> list[Score]:
            nonlocal attempts, ended
            attempts += 1
            try:
                async with self._graders.one(alone=False) as grader:
                    return await self._scored_by(grader, episodes)
            except Exception as error:
                ended += is_death(error) or isinstance(error, Ended)
                if ended == self._faults.attempts:
                    raise Ungradable(f"its scoring ended the grader {ended} times: {named(error)}") from error
                raise

        try:
            return await tried(score, self._faults)
        finally:
            tally.replayed += attempts - 1
            tally.reward_s += time.perf_counter() - started

    async def _scored_by(self, grader: Any, episodes: Any) -> list[Score]:
        try:
            return await within(self._faults.grading_s, grader.score.remote(episodes, self._reward_model), "grading_s")
        except Stuck as error:
            if isinstance(error, RayTaskError):  # the reward function itself says that it waits for others
                raise
            end(grader)
            raise Ended(str(error)) from None

    async def demonstrations(self, tasks: Sequence[Task], guess_fraction: float, chunk: int = 256) -> list[Any]:
        """Refs of lists of examples: demonstrations, played by the workers' scripted policy."""
        parts = [tasks[i : i + chunk] for i in range(0, len(tasks), chunk)]
        self.progress = (0, len(parts))

        async def part(number: int) -> Any:
            ref = await self._examples("demonstrate", parts[number], guess_fraction)
            self.progress = (self.progress[0] + 1, len(parts))
            return ref[0]

        return list(await asyncio.gather(*(part(i) for i in range(len(parts)))))

    async def encoded_rows(self, path: str, stage: ExampleStage) -> list[Any]:
        """Refs of lists of examples, from a file of one's own."""
        return [(await self._examples("encode_rows", path, stage))[0]]

    async def build(
        self, stage: ExampleStage, round_number: int, groups: Sequence[Group], again: Mapping[int, Group]
    ) -> tuple[list[Any], dict[str, int]]:
        """Refs of the examples that a round trains on, and how many came from each source. again: see the worker's."""
        tasks = [g.request.task for g in groups]
        sampled = [(g.episodes, g.scores) for g in groups]
        repeated = {i: (g.episodes, g.scores) for i, g in again.items()}
        examples, sources = await self._examples("build", stage, round_number, tasks, sampled, repeated)
        return [examples], sources

    async def shown(self, tasks: Sequence[Task]) -> list[str]:
        """What each task's demonstration says."""

        async def call(worker: Any) -> list[str]:
            return await worker.shown.remote(tasks)

        return await self._by_a_worker(call)

    async def _examples(self, method: str, *arguments: Any) -> tuple[Any, Any]:
        """A ref of what a worker makes, and what it says of it."""

        async def call(worker: Any) -> tuple[Any, Any]:
            examples, told = getattr(worker, method).options(num_returns=2).remote(*arguments)
            self._owned.add(examples)
            return examples, await told

        return await self._by_a_worker(call)

    async def _by_a_worker(self, call: Callable[[Any], Awaitable[T]]) -> T:
        """By whichever worker lives."""

        async def by_one(attempt: int) -> T:
            async with self._workers.one(alone=False) as worker:
                return await call(worker)

        return await tried(by_one, self._faults)

    async def credit(
        self, groups: Sequence[Group], facts: Sequence[GroupFacts], algo: AlgoConfig, max_length: int,
        kl_coefficient: float, scorings: Sequence[Sequence[Any]],
    ) -> tuple[list[list[Columns]], list[list[float]]]:  # fmt: skip
        """The groups' columns (rl/credit.py), and each episode's mean advantage. Two return values.

        scorings: each a list of n refs, of which the i-th holds the columns of every n-th group from i on.
        """
        self._calls["credit"] += 1
        trajectories: list[list[Trajectory]] = [await g.trajectories for g in groups]
        scored: list[list[dict[str, Any]]] = [[{} for _ in group] for group in trajectories]
        for refs in scorings:
            parts = [await ref for ref in refs]
            for g, columns in enumerate(scored):
                for known, more in zip(columns, parts[g % len(parts)][g // len(parts)], strict=True):
                    known.update(more)
        more = {"max_length": max_length, "kl_coefficient": kl_coefficient, "scored": scored}
        columns = await asyncio.to_thread(assign_credit, trajectories, facts, algo, **more)
        means = [
            [float(c["advantages"].sum() / max(1, t.loss_mask.sum())) for c, t in zip(group, known, strict=True)]
            for group, known in zip(columns, trajectories, strict=True)
        ]
        return columns, means

    async def write(self, path: str, groups: Sequence[Group], advantages: Sequence[Sequence[float]]) -> None:
        """The groups as one Parquet file, a row an episode. advantages: the mean over each episode's tokens."""
        self._calls["write"] += 1
        rows = []
        for group, values in zip(groups, advantages, strict=True):
            episodes: list[Episode] = await group.episodes
            trajectories: list[Trajectory] = await group.trajectories
            rows += zip(episodes, trajectories, group.scores, values, strict=True)
        await asyncio.to_thread(lambda: write_parquet(Path(path), [to_row(*row) for row in rows]))

    async def join(self, files: Sequence[str], path: str) -> list[list[Outcome]]:
        """Groups' files as one, and what came of each group's episodes."""
        self._calls["join"] += 1

        def joined() -> list[list[Outcome]]:
            parts = [Path(file) for file in files]
            join_parquet(parts, Path(path))
            return [[outcome_of(row) for row in read_parquet(part)] for part in parts]

        return await asyncio.to_thread(joined)

    async def sample_rows(self, groups: Sequence[Group], count: int) -> list[dict[str, Any]]:
        """A few episodes in readable form, for the experiment tracker."""
        rows = []
        for group in groups[:count]:
            episode, trajectory = (await group.episodes)[0], (await group.trajectories)[0]
            score = group.scores[0]
            rows.append(to_row(episode, trajectory, score, 0.0))
        return rows

    async def where(self) -> tuple[int, int]:
        return self.progress
