"""The buffer: has groups played and scored, and owns what comes back.

Trajectories are return values of calls that the buffer makes, so it owns them: they outlive the worker that played
them. It hands on references and summaries; nobody between worker and learner reads a token.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.role import Role
from rl.config_algo import AlgoConfig
from rl.config_stage import ExampleStage
from rl.credit import Columns, GroupFacts, assign_credit
from rl.episode import Episode, GroupRequest
from rl.policy import Sampling
from rl.reward import Score
from rl.task import Task
from rl.trajectory import Summary, Trajectory, to_row, write_parquet

_INFRA_BUDGET = 3


class LostGroup(RuntimeError):
    """A group could not be played within the budget for failures of ours."""


@dataclass(frozen=True)
class Group:
    """The episodes of one task that share a baseline. The refs' values belong to the buffer."""

    request: GroupRequest
    summaries: list[Summary]
    scores: list[Score]
    episodes: Any
    trajectories: Any


@dataclass(frozen=True)
class Played:
    """groups in the order of the requests; dropped: tasks that fail wherever they are played, with the cause."""

    groups: list[Group]
    dropped: list[tuple[str, str]]
    replayed: int
    reward_s: float
    """Seconds in reward calls, summed; they run while other groups are still being played."""


@dataclass
class _Tally:
    """What a call of `play` counts while its groups are played."""

    replayed: int = 0
    reward_s: float = 0.0


class Buffer(Role):
    role = "buffer"

    def __init__(self, workers: Sequence[Any], rewards: Sequence[Any]):
        super().__init__()
        self._workers, self._rewards = list(workers), list(rewards)
        self._next_worker = itertools.cycle(range(len(self._workers)))
        self._next_reward = itertools.cycle(range(len(self._rewards)))
        self.progress = (0, 0)

    async def play(self, requests: Sequence[GroupRequest], sampling: Sampling) -> Played:
        """Have every group played and scored. A failure of ours is played again; a failing task is dropped, loudly.

        Raises LostGroup when the same group is lost to failures of ours more than the budget allows.
        """
        self._calls["play"] += 1
        self.progress = (0, len(requests))
        tally = _Tally()
        results = await asyncio.gather(*(self._group(r, sampling, tally) for r in requests))
        groups = [r for r in results if isinstance(r, Group)]
        dropped = [r for r in results if isinstance(r, tuple)]
        return Played(groups, dropped, tally.replayed, tally.reward_s)

    async def _group(self, request: GroupRequest, sampling: Sampling, tally: "_Tally") -> Group | tuple[str, str]:
        for attempt in range(_INFRA_BUDGET):
            worker = self._workers[next(self._next_worker)]
            try:
                summaries, episodes, trajectories = worker.play.options(num_returns=3).remote(request, sampling)
                known = await summaries
                scores = await self._score(episodes, tally)
            except RayActorError:  # INFRA: a process of ours died
                tally.replayed += 1
                await asyncio.sleep(random.uniform(0.5, 1.5) * 2**attempt)
                continue
            except RayTaskError as error:
                if isinstance(error.cause, RayActorError):  # a generator died under the worker
                    tally.replayed += 1
                    continue
                return request.task.id, f"{type(error.cause).__name__}: {error.cause}"  # DATA
            self.progress = (self.progress[0] + 1, self.progress[1])
            return Group(request, known, scores, episodes, trajectories)
        raise LostGroup(
            f"the group of task {request.task.id!r} was lost {_INFRA_BUDGET} times to dying processes; see logs/"
        )

    async def _score(self, episodes: Any, tally: "_Tally") -> list[Score]:
        reward = self._rewards[next(self._next_reward)]
        started = time.perf_counter()
        scores = await reward.score.remote(episodes)
        tally.reward_s += time.perf_counter() - started
        return scores

    async def demonstrations(
        self, tasks: Sequence[Task], guess_fraction: float, chunk: int = 256
    ) -> list[Any]:
        """Refs of lists of examples: demonstrations, played by the workers' scripted policy."""
        parts = [tasks[i : i + chunk] for i in range(0, len(tasks), chunk)]
        refs = [
            self._workers[i % len(self._workers)].demonstrate.remote(part, guess_fraction)
            for i, part in enumerate(parts)
        ]
        self.progress = (0, len(refs))
        for ref in refs:
            await asyncio.to_thread(ray.wait, [ref], fetch_local=False)
            self.progress = (self.progress[0] + 1, len(refs))
        return refs

    async def encoded_rows(self, path: str, stage: ExampleStage) -> list[Any]:
        """Refs of lists of examples, from a file of one's own."""
        return [self._workers[0].encode_rows.remote(path, stage)]

    async def build(
        self, stage: ExampleStage, round_number: int, groups: Sequence[Group], again: Mapping[int, Group]
    ) -> tuple[list[Any], dict[str, int]]:
        """Refs of the examples that a round trains on, and how many came from each source. again: see the worker's."""
        tasks = [g.request.task for g in groups]
        sampled = [(g.episodes, g.scores) for g in groups]
        repeated = {i: (g.episodes, g.scores) for i, g in again.items()}
        worker = self._workers[0]
        examples, sources = worker.build.options(num_returns=2).remote(stage, round_number, tasks, sampled, repeated)
        return [examples], await sources

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
        columns = assign_credit(
            trajectories, facts, algo, max_length=max_length, kl_coefficient=kl_coefficient, scored=scored
        )
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
            for e, t, s, a in zip(episodes, trajectories, group.scores, values, strict=True):
                rows.append(to_row(e, t, s, a))
        await asyncio.to_thread(write_parquet, Path(path), rows)

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


