"""An rl stage: sample groups, filter, credit, learn, publish; step after step.

draw tasks ──► play ──► filter ──► score (reference, proximal, values) ──► credit ──► learner ──► publish ──┐
   ▲             │ refill                                                                                   │
   └─────────────┴────────────────────────── next step ◄────────────────────────────────────────────────────┘
"""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from actors.buffer import Group
from actors.learner_batch import RlBatch
from rl.algo.filter import Verdict, judge
from rl.algo.schedule import coefficient, curriculum_order, draw, horizon, open_tasks
from rl.batch import mini_batches
from rl.config_stage import CurriculumConfig, RlStage
from rl.credit import GroupFacts
from rl.episode import GroupRequest
from rl.metrics import rollout_metrics
from rl.objective import Sums, add_sums, to_metrics
from rl.task import Task, TaskStream, derive_seed

if TYPE_CHECKING:
    from actors.controller import Controller


@dataclass
class Gathered:
    """What a step's sampling came to. Groups that the filters took whole are in `played` only."""

    played: list[Group] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    taken: Counter[str] = field(default_factory=Counter)
    greedy: dict[str, float] = field(default_factory=dict)
    dropped: int = 0
    replayed: int = 0


class RlLoop:
    """One rl stage under a controller."""

    def __init__(self, run: "Controller", index: int, stage: RlStage):
        self.run, self.index, self.stage, self.algo = run, index, stage, stage.algo
        self.temperature = run.config.rollout.temperature
        self.tasks = TaskStream(run.world.source, "train", run.state.cursor)
        self.pool: Pool | None = None

    async def train(self) -> None:
        run, stage = self.run, self.stage
        await run.begin(self.index, stage)
        if run.config.stage_needs_reference(stage):
            await run.company.freeze(run.reference_path())
        if stage.curriculum:
            self.pool = await make_pool(run, self.index, stage.curriculum)
        for step in range(run.state.stage_step, stage.steps):
            await self.step(step)
            due = stage.checkpoint_every and (step + 1) % stage.checkpoint_every == 0
            if (due or run.stopping) and step + 1 < stage.steps:
                await run.checkpoint()
                run.go_on()
        await run.checkpoint()

    async def step(self, step: int) -> None:
        run = self.run
        run.timing.clear()
        total: Sums = {}
        credited: dict[str, float] = {}
        with run.timed("step"):
            gathered = await self.gather(step)
            written = None
            if gathered.groups:
                columns, means = await self.credit(gathered, step)
                path = run.folder / "trajectories" / f"rl-{self.index:02d}-{step:05d}.parquet"
                written = asyncio.ensure_future(run.company.buffer.write.remote(str(path), gathered.groups, means))
                total, credited = await self.learn(gathered, columns, step)
            run.state = replace(run.state, cursor=self.tasks.cursor)
            await run.publish()
            if written is not None:
                await written
        self.report(gathered, total, credited, step)
        if step % 10 == 0:
            await run.show_episodes(gathered.played)

    # -- sampling ------------------------------------------------------------------------------------------------

    async def gather(self, step: int) -> Gathered:
        """Groups to train on, at most tasks_per_step; drawn again, within `oversample`, for those that filters took."""
        wanted, found = self.stage.tasks_per_step, Gathered()
        drawable = math.floor(self.algo.oversample * wanted)
        while len(found.groups) < wanted and drawable > 0:
            tasks = self.next_tasks(step, min(wanted - len(found.groups), drawable), len(found.played))
            drawable -= len(tasks)
            await self.play(step, tasks, found)
        return found

    def next_tasks(self, step: int, count: int, before: int) -> list[Task]:
        if self.pool is None:
            return self.tasks.next(count)
        return self.pool.next(step, self.stage.steps, count, before)

    async def play(self, step: int, tasks: Sequence[Task], found: Gathered) -> None:
        run, stage = self.run, self.stage
        turns = horizon(step, every=stage.horizon.every, turns=stage.horizon.turns) if stage.horizon else None
        requests = [GroupRequest(self.index, step, t, self.algo.group_size, max_turns=turns) for t in tasks]
        played = await run.play(requests, self.temperature)
        found.dropped += len(played.dropped)
        found.replayed += played.replayed
        if self.algo.baseline == "greedy":
            alone = [replace(request, samples=1) for request in requests]
            greedy = await run.play(alone, 0.0)
            found.greedy |= {g.request.task.id: g.scores[0].total for g in greedy.groups}
        for group in played.groups:
            if self.algo.baseline == "greedy" and group.request.task.id not in found.greedy:
                continue
            verdict = judge(
                self.algo.filters,
                rewards=[s.total for s in group.scores],
                successes=[s.success for s in group.scores],
                flags=[s.flags for s in group.summaries],
            )
            found.played.append(group)
            found.taken.update(verdict.taken)
            if not verdict.empty:
                found.groups.append(group)
                found.verdicts.append(verdict)

    # -- credit and learning -------------------------------------------------------------------------------------

    async def credit(self, gathered: Gathered, step: int) -> tuple[Any, list[list[float]]]:
        """A ref of the groups' columns, and each episode's mean advantage."""
        run, company, algo = self.run, self.run.company, self.algo
        refs = [g.trajectories for g in gathered.groups]
        scorings: list[list[Any]] = []
        from_learner = [
            *(["proximal"] if algo.proximal == "recompute" else []),
            *(["values"] if algo.critic else []),
            *(["reference"] if algo.kl.used and not run.config.stage_needs_reference(self.stage) else []),
        ]
        with run.timed("reference"):
            if run.config.stage_needs_reference(self.stage):
                with run.working("reference"):
                    scorings.append(await company.reference_columns(refs, self.temperature))
            if from_learner:
                await company.time_share("learn")
                with run.working("learner"):
                    scorings.append(await company.learner_columns(refs, self.temperature, from_learner))
        facts = [
            GroupFacts(
                [s.turn_rewards for s in g.summaries],
                [s.outcome for s in g.scores],
                [s.success for s in g.scores],
                v.counted,
                gathered.greedy.get(g.request.task.id),
            )
            for g, v in zip(gathered.groups, gathered.verdicts, strict=True)
        ]
        columns, means = company.buffer.credit.options(num_returns=2).remote(
            gathered.groups, facts, algo, run.config.model.max_length, self.kl_coefficient(step), scorings
        )
        return columns, await means

    async def learn(self, gathered: Gathered, columns: Any, step: int) -> tuple[Sums, dict[str, float]]:
        """The batch's optimizer steps. Returns their sums, and what the first alone says of the generators."""
        run, algo, stage = self.run, self.algo, self.stage
        lr = run.lr(stage, step)
        critic_lr = algo.critic.lr if algo.critic else None
        if algo.critic and step < algo.critic.warmup_steps:
            lr = 0.0
        groups = gathered.groups
        places = [(g, s) for g, v in enumerate(gathered.verdicts) for s, trained in enumerate(v.trained) if trained]
        total: Sums = {}
        mismatch: dict[str, float] = {}
        with run.timed("update"), run.working("learner"):
            await run.company.time_share("learn")
            for update, chunk in enumerate(mini_batches(len(places), algo.mini_batches, algo.epochs)):
                if not chunk:
                    continue
                batch = RlBatch(
                    [g.trajectories for g in groups],
                    [[s.tokens for s in g.summaries] for g in groups],
                    [[s.turn_tokens for s in g.summaries] for g in groups],
                    columns,
                    [places[i] for i in chunk],
                    algo,
                    run.config.model.max_length,
                    self.temperature,
                    self.kl_coefficient(step),
                )
                sums, run.slowest = await run.company.step("rl_step", (self.index, step, update), batch, lr, critic_lr)
                total = add_sums(total, sums)
                if not mismatch:  # later ones differ from the generator by what the earlier ones learned
                    mismatch = {k: v for k, v in to_metrics(sums).items() if k.startswith("mismatch/")}
        return total, mismatch

    def kl_coefficient(self, step: int) -> float:
        kl = self.algo.kl
        return coefficient(step, start=kl.coefficient, final=kl.final, total=self.stage.steps)

    # -- what is told --------------------------------------------------------------------------------------------

    def report(self, found: Gathered, total: Sums, mismatch: dict[str, float], step: int) -> None:
        run, stage = self.run, self.stage
        sampled = sum(s.sampled_tokens for g in found.played for s in g.summaries)
        stale = [run.state.version - 1 - s.oldest_version for g in found.played for s in g.summaries]
        episodes = max(1, sum(len(g.scores) for g in found.played))
        metrics = {
            **rollout_metrics([(g.summaries, g.scores) for g in found.played]),
            **to_metrics(total),
            **mismatch,
            "actor/lr": run.lr(stage, step),
            "perf/tokens_per_second": sampled / run.timing["step"],
            "staleness/mean": sum(stale) / max(1, len(stale)),
            "faults/data": float(found.dropped),
            "faults/infra": float(found.replayed),
        }
        if self.algo.filters:
            metrics |= {f"filter/{f.name}": found.taken[f.name] / episodes for f in self.algo.filters}
            trained = sum(sum(v.trained) for v in found.verdicts)
            metrics |= {"filter/trained": trained / episodes, "filter/drawn_groups": float(len(found.played))}
        if self.algo.kl.used:
            metrics["actor/kl_coefficient"] = self.kl_coefficient(step)
        if stage.horizon:
            metrics["curriculum/max_turns"] = float(horizon(step, every=stage.horizon.every, turns=stage.horizon.turns))
        if self.pool:
            metrics["curriculum/open_tasks"] = float(self.pool.open(step, stage.steps))
        run.advance(stage.kind, metrics)
        run.warn_of_short_warm_up(step)


@dataclass(frozen=True)
class Pool:
    """A curriculum's tasks, those to be opened first at the front."""

    tasks: Sequence[Task]
    parts: int
    seed: int

    def open(self, step: int, steps: int) -> int:
        return open_tasks(step, total=steps, parts=self.parts, count=len(self.tasks))

    def next(self, step: int, steps: int, count: int, before: int) -> list[Task]:
        """`count` tasks of this step after `before` others: a pure function of the step."""
        drawn = draw(step, tasks=before + count, open_count=self.open(step, steps), seed=self.seed)
        return [self.tasks[i] for i in drawn[before:]]


async def make_pool(run: "Controller", index: int, config: CurriculumConfig) -> Pool:
    """Play the pool's tasks with the stage's starting weights and order them; a resumed run reads what was found."""
    path = run.folder / f"curriculum-{index:02d}.json"
    size = run.world.source.size("train")
    tasks = TaskStream(run.world.source, "train").next(config.pool if size is None else min(config.pool, size))
    if not path.is_file():
        requests = [GroupRequest(index, -1, task, config.samples) for task in tasks]
        played = await run.play(requests, run.config.rollout.temperature)
        found = {g.request.task.id: sum(s.success for s in g.scores) / len(g.scores) for g in played.groups}
        path.write_text(json.dumps(found, indent=1))
    successes = json.loads(path.read_text())
    tasks = [t for t in tasks if t.id in successes]
    order = curriculum_order([successes[t.id] for t in tasks], order=config.order)
    return Pool([tasks[i] for i in order], config.parts, derive_seed("curriculum", run.config.run.seed, index))
