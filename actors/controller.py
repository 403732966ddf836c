"""The controller: one program that reads as the algorithm (compare rl/loop.py).

    tasks ──► buffer.play ──► advantages ──► reference ──► learner ranks ──► store.publish ──► generators.load ──┐
      ▲       (workers, generators, reward)                                                                      │
      └──────────────────────────────────── next step ◄──────────────────────────────────────────────────────────┘

Synchronous: a step consumes the groups of its tasks, waits for each arrow in turn, and is unblocked by the slowest
role. It sees summaries, scores and references to trajectories, never a token.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from actors.buffer import Played
from actors.company import Company
from actors.learner import RlBatch
from actors.placement import Placement
from actors.role import Role
from actors.status import Status
from rl import checkpoint
from rl.algo.advantage import batch_advantages
from rl.algo.schedule import learning_rate
from rl.batch import mini_batches
from rl.checkpoint import State
from rl.config import Config, EvalStage, RlStage, SftStage, TrainingStage
from rl.config_file import dump_config
from rl.demonstration import draw_batch
from rl.env import World
from rl.episode import GroupRequest
from rl.evaluate import Outcome, Report, report
from rl.gradient import Sums, add_sums, to_metrics
from rl.metrics import Sinks, forget_after, rollout_metrics
from rl.policy import Sampling
from rl.task import Task, TaskStream

log = logging.getLogger("repertory")
WARM_UP_SUCCESS = 0.1


class Controller(Role):
    role = "controller"

    def __init__(self, config: Config, run: str, device: str, namespace: str, resume: bool):
        super().__init__()
        self._config, self._run, self._device, self._namespace = config, Path(run), device, namespace
        self._resume = checkpoint.newest(self._run) if resume else None
        self._busy: dict[str, int] = {}
        self._timing: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._messages: list[str] = []
        self._phase, self._stage, self._stage_step, self._stage_steps = "starting", 0, 0, 1
        self._stage_started = self._born = time.perf_counter()
        self._fraction = 0.0
        self._state = checkpoint.read_state(self._resume) if self._resume else State(0, 0, 0, -1, 0)
        earlier = [s.kind for s in config.stages[: self._state.stage] if s.kind != "eval"]
        self._trained = earlier[-1] if earlier else "base"

    # -- a run ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Play the configuration's stages, from the start or from the newest checkpoint."""
        await self._start()
        try:
            first = self._state.stage
            for index in range(first, len(self._config.stages)):
                stage = self._config.stages[index]
                self._stage, self._stage_started = index, time.perf_counter()
                if index > first:
                    self._state = replace(self._state, stage=index, stage_step=0)
                self._phase = stage.kind
                self._stage_step, self._fraction = self._state.stage_step, 0.0
                self._stage_steps = 1 if isinstance(stage, EvalStage) else stage.steps
                if isinstance(stage, EvalStage):
                    await self._evaluate(index, stage)
                    continue
                if self._state.stage_step < stage.steps:
                    await (self._sft(index, stage) if isinstance(stage, SftStage) else self._rl(index, stage))
                self._trained = stage.kind
                self._state = replace(self._state, stage_start=f"checkpoints/step={self._state.step}")
            self._phase = "done"
        finally:
            await self._write_statuses()
            self._sinks.close()

    async def _start(self) -> None:
        logs = self._run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(filename=logs / "run.log", level=logging.INFO, format="%(asctime)s %(message)s", force=True)
        config = self._config
        self._world = World(config.env, config.run.seed)
        self._sinks = Sinks(self._run, config, resume=self._resume is not None)
        placement = await Placement.make(config)
        log.info("the cluster has room for every role")
        self._company = Company(config, placement, f"weights-{config.run.name}", self._namespace, self._device)
        with self._working("starting"):
            self._initial = await self._company.start(self._run / "initial", self._resume)
        if self._resume:
            forget_after(self._run, self._state.step, self._state.stage)
            await self._company.all_ranks("restore", str(self._resume))
            self._say(f"resumed from {self._resume.name}")
        await self._publish()
        await self._write_statuses()

    # -- stages --------------------------------------------------------------------------------------------------

    async def _sft(self, index: int, stage: SftStage) -> None:
        demo = stage.demonstrations
        if demo.path:
            refs = await self._company.buffer.encoded_rows.remote(demo.path)
        else:
            size = self._world.source.size("train")
            tasks = TaskStream(self._world.source, "train").next(demo.count if size is None else min(demo.count, size))
            with self._working("rollout"):
                refs = await self._company.buffer.demonstrations.remote(tasks, demo.guess_fraction)
        await self._begin(stage)
        count = min(await self._company.all_ranks("hold", refs))
        if count < stage.batch_size:
            raise ValueError(f"{count} demonstrations are fewer than stages[{index}].batch_size = {stage.batch_size}")
        for step in range(self._state.stage_step, stage.steps):
            with self._timed("step"), self._timed("update"), self._working("learner"):
                indices = draw_batch(step, stage.batch_size, count, self._config.run.seed)
                sums, slowest = await self._company.sft_step((index, step, 0), indices, self._lr(stage, step))
            extra = {"perf/tokens_per_second": sums.get("tokens", 0.0) / self._timing["step"]}
            self._advance(stage.kind, {**to_metrics(sums), **extra, "actor/lr": self._lr(stage, step)}, slowest)
        await self._publish()
        await self._checkpoint()

    async def _rl(self, index: int, stage: RlStage) -> None:
        await self._begin(stage)
        start = self._run / self._state.stage_start if self._state.stage_start else self._initial
        source = self._config.reference.source
        frozen = str(start) if source == "stage_start" else str(self._initial) if source == "initial" else source
        for reference in self._company.references:
            await reference.load.remote(frozen)
        tasks = TaskStream(self._world.source, "train", self._state.cursor)
        for step in range(self._state.stage_step, stage.steps):
            await self._rl_step(index, stage, step, tasks)
            if stage.checkpoint_every and (step + 1) % stage.checkpoint_every == 0 and step + 1 < stage.steps:
                await self._checkpoint()
        await self._checkpoint()

    async def _rl_step(self, index: int, stage: RlStage, step: int, tasks: TaskStream) -> None:
        algo, company, temperature = stage.algo, self._company, self._config.rollout.temperature
        self._timing = {}
        with self._timed("step"):
            requests = [
                GroupRequest(index, step, task, algo.group_size) for task in tasks.next(stage.tasks_per_step)
            ]
            played = await self._play(requests, temperature)
            groups = played.groups
            rewards = torch.tensor([[s.total for s in g.scores] for g in groups])
            advantages = batch_advantages(rewards, baseline=algo.baseline, normalise=algo.normalise).tolist()
            path = self._run / "trajectories" / f"rl-{index:02d}-{step:05d}.parquet"
            written = asyncio.ensure_future(company.buffer.write.remote(str(path), groups, advantages))
            refs = [g.trajectories for g in groups]
            references = None
            if algo.kl.coefficient > 0:
                with self._timed("reference"), self._working("reference"):
                    references = await company.reference_logprobs(refs, temperature)
            total: Sums = {}
            mismatch: dict[str, float] = {}
            slowest = None
            with self._timed("update"), self._working("learner"):
                await company.time_share("learn")
                places = [(g, s) for g in range(len(groups)) for s in range(algo.group_size)]
                for update, chunk in enumerate(mini_batches(len(places), algo.mini_batches, algo.epochs)):
                    batch = RlBatch(
                        refs,
                        [[(s.tokens, s.sampled_tokens) for s in g.summaries] for g in groups],
                        advantages,
                        [places[i] for i in chunk],
                        references,
                        algo,
                        temperature,
                    )
                    sums, slowest = await company.rl_step((index, step, update), batch, self._lr(stage, step))
                    total = add_sums(total, sums)
                    if update == 0:  # later ones differ from the generator by what the earlier ones learned
                        mismatch = {k: v for k, v in to_metrics(sums).items() if k.startswith("mismatch/")}
            assert slowest is not None, "a batch has at least one mini-batch"
            self._state = replace(self._state, cursor=tasks.cursor)
            await self._publish()
            await written
        sampled = sum(s.sampled_tokens for g in groups for s in g.summaries)
        stale = [self._state.version - 1 - s.oldest_version for g in groups for s in g.summaries]
        self._advance(
            stage.kind,
            {
                **rollout_metrics([(g.summaries, g.scores) for g in groups], self._config.reward.success_at),
                **to_metrics(total),
                **mismatch,
                "actor/lr": self._lr(stage, step),
                "perf/tokens_per_second": sampled / self._timing["step"],
                "staleness/mean": sum(stale) / max(1, len(stale)),
                "faults/data": float(len(played.dropped)),
                "faults/infra": float(played.replayed),
            },
            slowest,
        )
        self._warn_of_short_warm_up(step)
        if self._config.logging.wandb.mode != "disabled" and step % 10 == 0:
            count = self._config.logging.wandb.sample_episodes
            self._sinks.episodes(self._state.step, await company.buffer.sample_rows.remote(groups, count))

    async def _evaluate(self, index: int, stage: EvalStage) -> None:
        size = self._world.source.size(stage.split)
        tasks = TaskStream(self._world.source, stage.split).next(stage.n if size is None else min(stage.n, size))
        sampled = await self._outcomes(index, stage, tasks, stage.temperature)
        greedy = await self._outcomes(index, stage, tasks, 0.0) if stage.greedy else None
        line = {
            "stage": self._trained,
            "stage_index": index,
            "step": self._state.step,
            "version": self._state.version,
            "split": stage.split,
            "temperature": stage.temperature,
            **asdict(sampled),
            "success_greedy": greedy.success if greedy else None,
            "time_s": time.perf_counter() - self._born,
        }
        self._sinks.evaluation(line)
        self._latest = {"success": sampled.success} | ({"success_greedy": greedy.success} if greedy else {})
        self._stage_step = 1
        log.info("evaluation of %s: %s", self._trained, line)

    async def _outcomes(self, index: int, stage: EvalStage, tasks: list[Task], temperature: float) -> Report:
        requests = [GroupRequest(index, 0, task, 1) for task in tasks]
        played = await self._play(requests, temperature, stage.top_p)
        name = "greedy" if temperature == 0 else "sampled"
        path = self._run / "trajectories" / f"eval-{index:02d}-{name}.parquet"
        await self._company.buffer.write.remote(str(path), played.groups, [[0.0] for _ in played.groups])
        success_at = self._config.reward.success_at
        outcomes = [
            Outcome(g.scores[0].total >= success_at, g.summaries[0].turns, g.scores[0].total) for g in played.groups
        ]
        return report(outcomes, self._config.env.max_turns)

    # -- what the stages share -----------------------------------------------------------------------------------

    async def _play(self, requests: list[GroupRequest], temperature: float, top_p: float = 1.0) -> Played:
        sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=self._config.rollout.max_turn_tokens)
        with self._timed("generate"), self._working("generator"):
            played: Played = await self._company.buffer.play.remote(requests, sampling)
        self._timing["reward"] = played.reward_s
        for task, cause in played.dropped:
            self._say(f"dropped task {task}: {cause}")
        if not played.groups:
            raise ValueError(f"every task of the step failed; the last one: {played.dropped[-1][1]}")
        return played

    async def _begin(self, stage: TrainingStage) -> None:
        """A fresh optimizer, unless the stage goes on from a checkpoint inside it."""
        await self._company.all_ranks("begin_stage", self._state.stage_step == 0, stage.adam_eps)

    async def _publish(self) -> None:
        """The learner's weights under the next version, loaded and proven by every generator."""
        version = self._state.version + 1
        with self._timed("publish"), self._working("store"):
            published = await self._company.publish(version, self._state.step)
            await self._company.time_share("generate")
            loaded = await self._company.load(version)
        self._state = replace(self._state, version=version)
        self._probe = {
            "publish/transfer_s": published.prepare_s + published.transfer_s,
            "publish/load_s": max(x.load_s for x in loaded),
            "publish/bytes": float(published.nbytes),
            "mismatch/probe_mean_diff": max(x.probe_mean_diff for x in loaded),
        }
        log.info("published version %d: %s; loaded: %s", version, published, loaded)

    async def _checkpoint(self) -> None:
        """Everything a resumed run needs, complete or absent. The stage's own start is spared: its reference."""
        with self._working("checkpoint"), checkpoint.writing(self._run, self._state.step) as folder:
            await self._company.all_ranks("save", str(folder))
            (folder / "repertory.yaml").write_text(dump_config(self._config))
            checkpoint.write_state(folder, self._state)
        checkpoint.prune(self._run, self._config.run.keep_checkpoints, Path(self._state.stage_start).name)

    def _advance(self, kind: str, metrics: dict[str, float], slowest: Any) -> None:
        """A step is done: count it and write its line."""
        self._stage_step += 1
        s = self._state = replace(self._state, stage_step=self._stage_step, step=self._state.step + 1)
        if slowest.token_budget < self._config.learner.micro_batch_tokens:
            metrics["learner/micro_batch_tokens"] = float(slowest.token_budget)
            self._say(f"out of device memory: the learner's micro-batches are now {slowest.token_budget} tokens")
        line = {
            "stage": kind,
            "stage_index": s.stage,
            "step": s.step,
            "stage_step": s.stage_step,
            "version": s.version,
            "time_s": time.perf_counter() - self._born,
            **metrics,
            **(self._probe if kind == "rl" else {}),
            **{f"timing_s/{k}": v for k, v in self._timing.items()},
        }
        self._sinks.metrics(line)
        self._latest = metrics

    def _lr(self, stage: TrainingStage, step: int) -> float:
        return learning_rate(
            step, base=stage.lr, total=stage.steps, warmup=stage.warmup_steps, schedule=stage.schedule
        )

    def _warn_of_short_warm_up(self, step: int) -> None:
        success = self._latest["reward/success"]
        if step == 0 and success < WARM_UP_SUCCESS:
            self._say(
                f"only {success:.0%} of the first RL step's episodes succeed: a policy that hardly ever succeeds tends "
                "to collapse into guessing. Warm up longer (more sft steps), or start with easier tasks"
            )

    def _say(self, message: str) -> None:
        if message not in self._messages:
            self._messages.append(message)
        log.warning(message)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._timing[name] = time.perf_counter() - started

    @contextmanager
    def _working(self, role: str) -> Iterator[None]:
        self._busy[role] = self._busy.get(role, 0) + 1
        try:
            yield
        finally:
            self._busy[role] -= 1

    # -- looked at from outside ----------------------------------------------------------------------------------

    async def progress(self) -> Status:
        busy = tuple(name for name, count in self._busy.items() if count)
        done = self._stage_step / self._stage_steps
        if self._phase in ("rl", "eval") and "generator" in busy:
            played, wanted = await self._company.buffer.where.remote()
            self._fraction = played / max(1, wanted)
        elapsed = time.perf_counter() - self._born
        spent = time.perf_counter() - self._stage_started
        left = spent * (1 - done) / done if self._phase in ("sft", "rl") and done > 0 else None
        stage = self._config.stages[min(self._stage, len(self._config.stages) - 1)]
        return Status(
            self._phase, self._stage, len(self._config.stages), stage.kind, self._stage_step, self._stage_steps,
            self._fraction, busy, dict(self._latest), elapsed, left, tuple(self._messages),
        )

    async def _write_statuses(self) -> None:
        """logs/actors.jsonl: every role's process id, calls and peak memory so far."""
        own = self.status()
        with (self._run / "logs" / "actors.jsonl").open("a") as file:
            for status in [own, *await self._company.statuses()]:
                file.write(json.dumps({"time": time.time(), **status}) + "\n")
