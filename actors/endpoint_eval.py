"""Held-out episodes of a model behind an endpoint: played, graded and reported in one process, without Ray or engines.

    tasks ──► run_episode ──► grader ──► episodes.jsonl, a line as soon as it is there ──► Parquet, eval.jsonl, report
                                           └── resumed: what it holds is not played again

An episode that cannot be played or graded is no failure of the model: its task is left out of every figure, and that
is counted.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.endpoint import Client, Endpoint, EndpointError, EndpointPolicy, EndpointTeacher, Refused
from actors.episode_records import EpisodeRecords, Key
from actors.grader import Grader, NotGraded
from rl.config import Config
from rl.config_stage import EvalStage
from rl.env import InfraError, World
from rl.episode import Episode, Identity, Limits, run_episode
from rl.evaluate import Report, outcome_of, report
from rl.feedback import played
from rl.policy import Sampling
from rl.task import TaskStream
from rl.text_codec import TextCodec, Usage
from rl.trajectory import to_row, to_trajectory, write_parquet

log = logging.getLogger("repertory")
_UNBOUNDED = 2**31
"""The endpoint's own context is the bound of an episode's length, and its tokens are not ours to count beforehand."""


class EndpointEvaluation:
    """One evaluation in its run folder. wanted, done and kept count episodes; `told` is called after each."""

    def __init__(self, config: Config, endpoint: Endpoint, folder: Path, parallel: int):
        stage = config.stages[0]
        assert isinstance(stage, EvalStage)
        self._config, self._endpoint, self._folder, self._stage = config, endpoint, folder, stage
        self._world = World(config.env, config.run.seed)
        self._teacher: EndpointTeacher | None = None
        if self._world.feedback.on and self._world.feedback.source == "endpoint":
            self._teacher = EndpointTeacher(self._world.feedback, config.faults.patience_s)
        self._slots = asyncio.Semaphore(parallel)
        self.told: Callable[[], None] = lambda: None
        size = self._world.source.size(stage.split)
        self._tasks = TaskStream(self._world.source, stage.split).next(stage.n if size is None else min(stage.n, size))
        modes = {"sampled": stage.samples, **({"greedy": 1} if stage.greedy else {})}
        tasks = range(len(self._tasks))
        self._wanted: list[Key] = [(m, i, s) for m, samples in modes.items() for i in tasks for s in range(samples)]
        self._records = EpisodeRecords(folder / "episodes.jsonl", self._tasks, set(self._wanted))
        self._dropped: dict[Key, tuple[str, str]] = {}
        self._began = time.monotonic() - self._records.elapsed_s

    @property
    def left_out(self) -> list[str]:
        """What was wrong with rows that are no tasks."""
        return getattr(self._world.source, "left_out", [])

    @property
    def wanted(self) -> int:
        return len(self._wanted)

    @property
    def kept(self) -> int:
        """Those that were paid for, graded or not."""
        return len(self._records.episodes)

    @property
    def done(self) -> int:
        return len(self._records.scores) + len(self._dropped)

    @property
    def success(self) -> float:
        """Of those that are graded so far."""
        return sum(score.success for score in self._records.scores.values()) / max(1, len(self._records.scores))

    async def run(self) -> dict[str, Any]:
        """Play and grade what is not there yet, write the files, and return the line of eval.jsonl.

        Raises EndpointError; ValueError when more tasks than faults.data_budget could not be played or graded, or all.
        """
        grader = Grader(self._config, self._folder / "logs" / "grader.log", self._endpoint.key_variable)
        async with Client(self._endpoint) as client, grader:
            with self._records:
                players = [asyncio.ensure_future(self._one(key, client, grader)) for key in self._wanted]
                try:
                    await asyncio.gather(*players)
                finally:
                    for player in players:
                        player.cancel()
                    await asyncio.gather(*players, return_exceptions=True)
            return self._written(client)

    async def _one(self, key: Key, client: Client, grader: Grader) -> None:
        records = self._records
        if key in records.scores:
            return
        async with self._slots:
            if key not in records.episodes:
                try:
                    found = await self._played(key, client)
                except EndpointError:
                    raise
                except Exception as error:
                    return self._drop(key, "played", error)
                records.played(key, *found)
            try:
                score = await grader.score(records.episodes[key])
            except NotGraded as error:
                return self._drop(key, "graded", error)
            records.graded(key, score, time.monotonic() - self._began)
        self.told()

    def _drop(self, key: Key, what: str, error: Exception) -> None:
        """Raises ValueError when it is one too many."""
        name = "" if isinstance(error, Refused | NotGraded) else f"{type(error).__name__}: "
        cause = f"task {self._tasks[key[1]].id} could not be {what}: {name}{error}"
        log.warning("%s", cause)
        self._dropped[key] = (what, cause)
        if len(self._dropped) > self._config.faults.data_budget:
            raise ValueError(f"{len(self._dropped)} episodes are more than faults.data_budget. The last one: {cause}")
        self.told()

    async def _played(self, key: Key, client: Client) -> tuple[Episode, list[Usage]]:
        """A failing environment is tried again, as by the rollout workers."""
        mode, index, sample = key
        task, stage = self._tasks[index], self._stage
        sampling = Sampling(
            temperature=stage.temperature if mode == "sampled" else 0.0,
            top_p=stage.top_p,
            max_tokens=self._config.rollout.max_turn_tokens,
        )
        most, seed = self._config.env.max_turns, self._config.run.seed
        for attempt in range(self._config.faults.attempts):
            policy = EndpointPolicy(client, TextCodec())
            identity = Identity(0, 0, task.id, sample, attempt)
            env = played(self._world, self._teacher, identity=identity, max_turns=most, seed=seed)
            try:
                episode = await run_episode(
                    env, task, policy, TextCodec(), sampling=sampling, limits=Limits(most, _UNBOUNDED),
                    identity=identity, seed=seed, condition=stage.condition,
                )  # fmt: skip
                return episode, policy.usage
            except (InfraError, ConnectionError, TimeoutError) as error:
                if attempt + 1 == self._config.faults.attempts:
                    raise
                log.warning("task %s is played again: %s", task.id, error)
                await asyncio.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    # -- what is left of it ----------------------------------------------------------------------------------------

    def _written(self, client: Client) -> dict[str, Any]:
        sampled = self._report("sampled")
        greedy = self._report("greedy").success if self._stage.greedy else None
        whats = [what for what, _ in self._dropped.values()]
        line = {
            "stage": self._endpoint.model, "objective": "", "stage_index": 0, "step": 0, "version": -1,
            "split": self._stage.split, "temperature": self._stage.temperature,
            **asdict(sampled), "success_greedy": greedy,
            "endpoint": self._endpoint.url, "wall_s": time.monotonic() - self._began,
            "not_played": whats.count("played"), "not_graded": whats.count("graded"),
            "requests": client.requests, "retries": client.retries,
        }  # fmt: skip
        if not self._records.usage_known:
            line["mean_tokens"] = None
        line["time_s"] = line["wall_s"]
        partial = self._folder / ".eval.jsonl"
        partial.write_text(json.dumps(line) + "\n")
        partial.rename(self._folder / "eval.jsonl")
        return line

    def _report(self, mode: str) -> Report:
        """Writes the mode's Parquet file too. Raises ValueError when nothing is left to report."""
        groups: dict[int, list[Key]] = {}
        for key in self._wanted:
            if key[0] == mode:
                groups.setdefault(key[1], []).append(key)
        whole = [keys for keys in groups.values() if all(key in self._records.scores for key in keys)]
        if not whole:
            raise ValueError(f"nothing could be evaluated; the last one: {list(self._dropped.values())[-1][1]}")
        rows, outcomes = [], []
        for keys in whole:
            kept = [(self._records.episodes[key], self._records.scores[key]) for key in keys]
            rows += [to_row(episode, to_trajectory(episode), score, 0.0) for episode, score in kept]
            outcomes.append([outcome_of(row) for row in rows[-len(keys) :]])
        write_parquet(self._folder / "trajectories" / f"eval-00-{mode}.parquet", rows)
        return report(outcomes, self._config.env.max_turns)
