"""An rl stage: sample groups, filter, credit, learn, publish; step after step.

producer ──► filter ──► score (reference, proximal, values) ──► credit ──► learner ──► publish ──┐
   ▲            │ refill, once more                                                              │
   └────────────┴────────────────────────── next step ◄──────────────────────────────────────────┘

max_staleness 0: a step waits for all of its groups. k: the producer has the next steps' groups played meanwhile
(actors/producer.py), and the generators take new weights in the middle of episodes.
"""

import asyncio
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from actors.buffer import Dropped, Group, Played
from actors.curriculum import Pool, make_pool
from actors.evaluation import Beside
from actors.learner_batch import RlBatch
from actors.producer import Place, Producer
from rl.algo.filter import Verdict, judge
from rl.algo.schedule import coefficient, horizon
from rl.batch import mini_batches
from rl.config_stage import RlStage
from rl.credit import GroupFacts
from rl.env import InfraError
from rl.episode import GroupRequest
from rl.metrics import rollout_metrics
from rl.objective import Sums, add_sums, to_metrics
from rl.task import Task, TaskStream

_WARM_UP_SUCCESS = 0.1
_STALE_LIMIT = 20
"""A generator that lags behind for ever is a failure of ours, and not to be waited for."""

if TYPE_CHECKING:
    from actors.controller import Controller


@dataclass
class Gathered:
    """What a step's sampling came to. Groups that the filters took whole are in `played` only.

    `groups` and `verdicts`: of those that are trained on, in the order in which they were drawn.
    """

    played: dict[Place, Group] = field(default_factory=dict)
    trained: dict[Place, Verdict] = field(default_factory=dict)
    taken: Counter[str] = field(default_factory=Counter)
    greedy: dict[Place, float] = field(default_factory=dict)
    dropped: int = 0
    replayed: int = 0
    stale: int = 0
    missing: int = 0
    """Groups that the step does without: nothing more may be drawn for them. Later steps' groups do not fill in."""
    ends: list[tuple[Place, str, str]] = field(default_factory=list)
    """Each group's task, and what became of it: trained, filtered, dropped, or stale, which is played once more."""
    reward_s: float = 0.0
    cause: str = ""

    @property
    def groups(self) -> list[Group]:
        return [self.played[place] for place in sorted(self.trained)]

    @property
    def verdicts(self) -> list[Verdict]:
        return [self.trained[place] for place in sorted(self.trained)]

    @property
    def all(self) -> list[Group]:
        return [self.played[place] for place in sorted(self.played)]


@dataclass(frozen=True)
class Result:
    """A group that was played, or why not; greedy: the reward of its greedy episode, where that is the baseline."""

    played: Played
    greedy: float | None = None


class RlLoop:
    """One rl stage under a controller."""

    def __init__(self, run: "Controller", index: int, stage: RlStage):
        self.run, self.index, self.stage, self.algo = run, index, stage, stage.algo
        self.temperature = run.config.rollout.temperature
        self.tasks = TaskStream(run.world.source, "train", run.state.cursor)
        self.pool: Pool | None = None
        self.evaluations = Beside(run, index, stage)
        self.producer: Producer[Result] = Producer(
            self.play,
            self.draw,
            size=stage.tasks_per_step,
            budget=math.floor(self.algo.oversample * stage.tasks_per_step),
            staleness=stage.max_staleness,
        )

    async def train(self) -> None:
        run, stage = self.run, self.stage
        await run.begin(self.index, stage)
        if stage.curriculum:
            self.pool = await make_pool(run, self.index, stage.curriculum)
        if run.state.under_way:
            self.producer.restore(run.state.under_way, run.state.version)
        try:
            self.evaluations.begin(run.state.stage_step)
            for step in range(run.state.stage_step, stage.steps):
                await self.step(step)
                due = stage.checkpoint_every and (step + 1) % stage.checkpoint_every == 0
                if (due or self.evaluations.due(step + 1) or run.stopping) and step + 1 < stage.steps:
                    await run.checkpoint()
                    self.evaluations.begin(step + 1)
                    run.go_on()
            await run.checkpoint()
            self.evaluations.begin(stage.steps)
            await self.evaluations.finish()
        finally:
            self.evaluations.give_up()
            await self.producer.close()

    async def step(self, step: int) -> None:
        run = self.run
        run.timing.clear()
        total: Sums = {}
        credited: dict[str, float] = {}
        with run.timed("step"):
            gathered = await self.gather(step)
            written = None
            path = run.folder / "trajectories" / f"rl-{self.index:02d}-{step:05d}.parquet"
            path.unlink(missing_ok=True)  # of a run that was killed after it had written this step
            if gathered.groups:
                columns, means = await self.credit(gathered, step)
                written = asyncio.ensure_future(run.company.buffer.write.remote(str(path), gathered.groups, means))
                total, credited = await self.learn(gathered, columns, step)
            run.state = replace(run.state, cursor=self.tasks.cursor, under_way=self.producer.state())
            await self.evaluations.finish()
            measured = asyncio.ensure_future(run.measure())
            await run.publish()
            if written is not None:
                await written
            await measured
        self.report(gathered, total, credited, step)
        if step % 10 == 0:
            await run.show_episodes(gathered.all)

    # -- sampling ------------------------------------------------------------------------------------------------

    async def gather(self, step: int) -> Gathered:
        """Groups to train on, at most tasks_per_step; drawn again, within `oversample`, for those that filters took."""
        run, wanted, found = self.run, self.stage.tasks_per_step, Gathered()
        version = run.state.version
        with run.timed("generate"), run.working("generator"):
            self.producer.open(min(step + self.producer.ahead, self.stage.steps - 1), version)
            while (room := wanted - len(found.trained) - found.missing) > 0:
                taken = await self.producer.take(step, version, room)
                if taken is None:
                    break
                self.judge(*taken, found, version)
        if found.dropped and not found.played:
            raise ValueError(f"every task of the step failed; the last one: {found.cause}")
        run.timing["reward"] = run.timing.get("reward", 0.0) + found.reward_s
        return found

    def judge(self, place: Place, result: "Result", found: Gathered, version: int) -> None:
        """Take a finished group into the step's, have its task played once more, or draw another in its place."""
        played = result.played
        found.replayed += played.replayed
        found.reward_s += played.reward_s
        if not played.groups or (self.algo.baseline == "greedy" and result.greedy is None):
            lost = "its greedy episode failed"
            dropped = played.dropped[-1] if played.dropped else Dropped(played.groups[0].request.task.id, lost)
            task, found.cause = dropped.task, dropped.cause
            self.run.drop(dropped)
            found.dropped += 1
            found.ends.append((place, task, "dropped"))
            found.missing += not self.producer.refill(place.slot, version)
            return
        group = played.groups[0]
        if max(staleness(group, version), default=0) > self.stage.max_staleness:
            if place.attempt >= _STALE_LIMIT:
                raise InfraError(f"the group of task {group.request.task.id} was too stale {place.attempt + 1} times")
            found.stale += 1
            found.ends.append((place, group.request.task.id, "stale"))
            self.producer.again(place, version)
            return
        verdict = judge(
            self.algo.filters,
            rewards=[s.total for s in group.scores],
            successes=[s.success for s in group.scores],
            flags=[s.flags for s in group.summaries],
        )
        found.taken.update(verdict.taken)
        found.played[place] = group
        found.ends.append((place, group.request.task.id, "filtered" if verdict.empty else "trained"))
        if verdict.empty:
            found.missing += not self.producer.refill(place.slot, version)
            return
        found.trained[place] = verdict
        if result.greedy is not None:
            found.greedy[place] = result.greedy

    async def play(self, place: Place) -> "Result":
        """One group, and the greedy episode that it is held against."""
        run, stage = self.run, self.stage
        turns = horizon(place.slot, every=stage.horizon.every, turns=stage.horizon.turns) if stage.horizon else None
        request = GroupRequest(
            self.index, place.slot, self.task(place.index), self.algo.group_size, place.attempt, max_turns=turns
        )
        played = run.play_beside([request], self.temperature)
        if self.algo.baseline != "greedy":
            return Result(await played)
        both = await asyncio.gather(played, run.play_beside([replace(request, samples=1)], 0.0))
        greedy = both[1].groups
        return Result(both[0], greedy[0].scores[0].total if greedy else None)

    def draw(self, slot: int, count: int, before: int) -> list[int]:
        """Indices of a slot's next tasks: in the pool, or in the stream of all."""
        if self.pool is not None:
            return self.pool.next(slot, self.stage.steps, count, before)
        return [self.tasks.skip() for _ in range(count)]

    def task(self, index: int) -> Task:
        return self.tasks.at(index) if self.pool is None else self.pool.tasks[index]

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
                    scorings.append(await company.reference_columns(run.reference_path(), refs, self.temperature))
            if from_learner:
                await company.time_share("learn")
                with run.working("learner"):
                    scorings.append(await company.learner_columns(refs, self.temperature, from_learner))
        facts = [
            GroupFacts(
                [s.turn_rewards for s in gathered.played[place].summaries],
                [s.outcome for s in gathered.played[place].scores],
                [s.success for s in gathered.played[place].scores],
                gathered.trained[place].counted,
                gathered.greedy.get(place),
            )
            for place in sorted(gathered.trained)
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
        with run.timed("update"), run.working("learner"), run.calling("learn"):
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
        played = found.all
        sampled = sum(s.sampled_tokens for g in played for s in g.summaries)
        stale = [behind for g in played for behind in staleness(g, run.state.version - 1)]
        episodes = max(1, sum(len(g.scores) for g in played))
        under_way, finished = self.producer.depths
        metrics = {
            **rollout_metrics([(g.summaries, g.scores) for g in played]),
            **to_metrics(total),
            **mismatch,
            "actor/lr": run.lr(stage, step),
            "perf/tokens_per_second": sampled / run.timing["step"],
            "staleness/mean": sum(stale) / max(1, len(stale)),
            "staleness/max": float(max(stale, default=0)),
            "staleness/dropped_groups": float(found.stale),
            "queue/groups_played": float(under_way),
            "queue/groups_finished": float(finished),
            "faults/data": float(found.dropped),
            "faults/infra": float(found.replayed),
        }
        if self.algo.filters:
            metrics |= {f"filter/{f.name}": found.taken[f.name] / episodes for f in self.algo.filters}
            trained = sum(sum(v.trained) for v in found.verdicts)
            metrics |= {"filter/trained": trained / episodes, "filter/drawn_groups": float(len(played))}
        if self.algo.kl.used:
            metrics["actor/kl_coefficient"] = self.kl_coefficient(step)
        if stage.horizon:
            metrics["curriculum/max_turns"] = float(horizon(step, every=stage.horizon.every, turns=stage.horizon.turns))
        if self.pool:
            metrics["curriculum/open_tasks"] = float(self.pool.open(step, stage.steps))
        ends = [{**asdict(place), "task": task, "end": end} for place, task, end in sorted(found.ends)]
        at = {"stage_index": self.index, "step": run.state.step + 1, "stage_step": step + 1}
        size = {"tasks_per_step": stage.tasks_per_step, "group_size": self.algo.group_size}
        run.consumed({**at, **size, "groups": ends})
        run.advance(stage.kind, metrics)
        if step == 0 and metrics["reward/success"] < _WARM_UP_SUCCESS:
            share = f"{metrics['reward/success']:.0%}"
            run.say(
                f"only {share} of the first RL step's episodes succeed: a policy that hardly ever succeeds tends to "
                "collapse into guessing. Warm up longer (more sft steps), or start with easier tasks"
            )


def staleness(group: Group, version: int) -> list[int]:
    """How far each episode's oldest token is behind a version; none for an episode that sampled nothing."""
    return [version - s.oldest_version for s in group.summaries if s.oldest_version >= 0]
