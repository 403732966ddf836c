"""The controller: plays a run's stages, and has what they share: play, publish, checkpoint, tell.

    eval: here · rl: actors/rl_stage.py · sft, preference, reward_model: actors/example_stage.py

A stage's loop waits for each of its arrows in turn, and is unblocked by the slowest role; what runs beside it is the
producer's, the supervisor's, and an evaluation. It sees
summaries, scores and references to trajectories, never a token. Compare rl/loop.py, the same algorithm on one page.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.buffer import Dropped, Group, Played
from actors.company import Company
from actors.evaluation import KeptGroups, evaluate
from actors.example_stage import ExampleLoop
from actors.faults import named, within
from actors.idleness import Idleness
from actors.learner import StepResult, What
from actors.learner_group import Call
from actors.placement import Placement
from actors.rl_stage import RlLoop
from actors.role import AsyncRole
from actors.run_folder import lock_for_writing, write_scaled
from actors.scaling import Scaling
from actors.status import Status
from actors.supervisor import Supervisor
from rl import checkpoint
from rl.algo.schedule import learning_rate
from rl.checkpoint import State
from rl.config import Config
from rl.config_file import dump_config
from rl.config_stage import EvalStage, RewardModelStage, RlStage, TrainingStage
from rl.episode import GroupRequest
from rl.fitting import open_world, summary
from rl.metrics import Sinks, forget_after, read_lines
from rl.policy import Sampling

log = logging.getLogger("repertory")


class Stopped(Exception):
    """Somebody wants the run to end before its last stage."""


class Controller(AsyncRole):
    role = "controller"

    def __init__(self, config: Config, run: str, device: str, namespace: str, resume: bool, before: str = ""):
        """before: why the run had a controller before this one."""
        super().__init__()
        self.config, self.folder, self._device, self._namespace = config, Path(run), device, namespace
        self._lock = lock_for_writing(self.folder)
        self.stopping = False
        self._messages: list[str] = []
        self._goes_on, self._before = resume, before
        self._resume = checkpoint.newest(self.folder, self._messages.append) if resume else None
        self._busy: dict[str, int] = {}
        self.timing: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._phase, self._stage, self._stage_step, self._stage_steps = "starting", 0, 0, 1
        self._stage_started = self._born = time.perf_counter()
        self._fraction = 0.0
        self.slowest: StepResult | None = None
        self._publishes: What = "all"
        self._idleness, self._idle = Idleness(), dict[str, float]()
        self.state = checkpoint.read_state(self._resume) if self._resume else State(0, 0, 0, -1, 0)
        if resume:  # what was published after the checkpoint had numbers too
            used = [line["version"] for line in read_lines(self.folder / "versions.jsonl")]
            self.state = replace(self.state, version=max([self.state.version, *used]))
        earlier = [s for s in config.stages[: self.state.stage] if s.kind != "eval"]
        self._trained = earlier[-1] if earlier else None

    # -- a run ---------------------------------------------------------------------------------------------------

    async def run(self) -> bool:
        """Play the configuration's stages, from the start or from the newest checkpoint. False: it was stopped.

        Raises what nobody could make good: the driver goes on from the newest checkpoint if it was a failure of ours.
        """
        self.supervisor = Supervisor(self.config.faults, self.say)
        if self._before:
            self.say(f"the run goes on from its newest checkpoint: {self._before}")
            self.supervisor.ledger.count("controller")
        stages = asyncio.ensure_future(self._play_stages())
        try:
            await asyncio.wait({stages, self.supervisor.failed}, return_when=asyncio.FIRST_COMPLETED)
            if not stages.done():
                self.supervisor.failed.result()
            return await stages
        finally:
            stages.cancel()
            await asyncio.gather(stages, return_exceptions=True)
            if hasattr(self, "company"):  # or the run did not come so far
                self.company.close()

    async def _play_stages(self) -> bool:
        await self._start()
        try:
            first = self.state.stage
            for index in range(first, len(self.config.stages)):
                self.go_on()
                stage = self.config.stages[index]
                self._stage, self._stage_started = index, time.perf_counter()
                if index > first:
                    self.state = replace(self.state, stage=index, stage_step=0, under_way={})
                self._phase = stage.kind
                self._stage_step, self._fraction = self.state.stage_step, 0.0
                if isinstance(stage, EvalStage):
                    self._stage_steps = 1
                    await evaluate(self, index, stage, self._trained)
                    self._stage_step = 1
                    continue
                self._stage_steps = stage.total_steps
                if self.state.stage_step < self._stage_steps:
                    loop = RlLoop if isinstance(stage, RlStage) else ExampleLoop
                    await loop(self, index, stage).train()  # type: ignore[arg-type]
                self._trained = stage
                end = f"checkpoints/step={self.state.step}"
                self.state = replace(self.state, stage_start=end, ends={**self.state.ends, str(index): end})
            self._phase = "done"
        except Stopped:
            self._phase = "stopped"
            log.info("stopped, as asked")
        finally:
            await self._write_statuses()
            self._sinks.close()
        return self._phase == "done"

    async def stop(self) -> None:
        """The step that runs is finished and, where a resumed run can go on from it, saved; the run ends."""
        self.stopping = True
        self.say("asked to stop: this step is finished first")

    async def scale(self, wanted: dict[str, int]) -> None:
        """Have so many actors of each role named, and say in the run's folder when that is done, or why it is not."""
        error = ""
        try:
            for role, count in wanted.items():
                if self._phase == "starting":
                    raise ValueError("the run is starting: ask again when it trains")
                self.say(f"scaling {role} from {self._scaling.sizes.get(role, 0)} to {count}")
                await self._scaling.scale(role, count)
        except Exception as failure:
            error = named(failure)
            self.say(f"scaling failed: {error}")
        write_scaled(self.folder, self._scaling.sizes, error)

    def go_on(self) -> None:
        """Raises Stopped when the run is to end, at a place that a resumed run can go on from."""
        if self.stopping:
            raise Stopped

    async def _start(self) -> None:
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(filename=logs / "run.log", level=logging.INFO, format="%(asctime)s %(message)s", force=True)
        config = self.config
        self.world = await open_world(config, check=False)
        if left_out := getattr(self.world.source, "left_out", None):
            self.say(f"left out: {summary(left_out)}")
        self._sinks = Sinks(self.folder, config, resume=self._resume is not None)
        placement = await Placement.make(config, f"repertory {self.folder}")
        log.info("the cluster has room for every role")
        store = f"weights-{config.run.name}"
        self.company = Company(
            config, placement, store, self._namespace, self._device, self.supervisor, self.state.quarantined,
            self._note_version,
        )  # fmt: skip
        self._scaling = Scaling(self.company)
        with self.working("starting"):
            starting = self.company.start(self.folder / "initial", self._resume)
            self._initial = await within(config.faults.start_s, starting)
        if self._goes_on:
            forget_after(self.folder, self.state.step if self._resume else -1, self.state.stage)
            KeptGroups.forget_after(self.folder, self.state.step)
        if self._resume:
            checkpoint.set_aside_after(self.folder, self.state.step)
            done = read_lines(self.folder / "metrics.jsonl")
            self._born -= done[-1]["time_s"] if done else 0.0  # `time_s` goes on counting
            await self.company.learner.tell("restore", str(self._resume))
            self.say(f"resumed from {self._resume.name}")
        if (scores_with := self._reward_model()) is not None:
            await self.company.use_reward_model(str(scores_with))
        await self.publish()
        await self._write_statuses()

    def _reward_model(self) -> Path | None:
        """What scores from the start: a configured folder, or what a stage before a resumed one has trained."""
        model = self.config.reward.model
        if model == "trained":
            stage = self.config.stages[self.state.stage]
            whole = stage.kind != "eval" and self.state.stage_step >= stage.total_steps
            done = any(isinstance(s, RewardModelStage) for s in self.config.stages[: self.state.stage + whole])
            return self.folder / "reward_model" if done else None
        return Path(model) if model else None

    # -- what the stages share -----------------------------------------------------------------------------------

    async def play(self, requests: Sequence[GroupRequest], temperature: float) -> Played:
        """These groups, while nothing else is done. Raises ValueError when none could be played."""
        with self.timed("generate"), self.working("generator"):
            played = await self.play_beside(requests, temperature)
        self.timing["reward"] = self.timing.get("reward", 0.0) + played.reward_s
        for dropped in played.dropped:
            self.drop(dropped)
        if not played.groups:
            raise ValueError(f"every task of the step failed; the last one: {played.dropped[-1].cause}")
        return played

    async def play_beside(self, requests: Sequence[GroupRequest], temperature: float) -> Played:
        """The same, beside whatever else goes on. What was dropped is the caller's to count."""
        sampling = Sampling(temperature=temperature, max_tokens=self.config.rollout.max_turn_tokens)
        return await self.company.buffer.play.remote(requests, sampling)

    async def begin(self, index: int, stage: TrainingStage) -> None:
        """The weights to start with and a fresh optimizer, unless the stage goes on from a checkpoint inside it."""
        resume = str(self._resume) if self.state.stage_step > 0 else None
        branches = stage.start is not None and resume is None
        if branches:
            self.state = replace(self.state, stage_start=self.state.ends[str(stage.start)])
            await self.company.learner.tell("restore", str(self._stage_start()))
        await self.company.learner.tell("begin_stage", index, stage, str(self._stage_start()), resume)
        lora = self.config.learner.lora
        self._publishes = "all"
        if lora and lora.publish == "adapter" and not isinstance(stage, RewardModelStage):
            await self._publish_as("base")
            self._publishes = "adapter"
            if resume:
                await self.publish()
        elif branches:
            await self.publish()

    def _stage_start(self) -> Path:
        """The folder of the weights that the stage started with."""
        return self.folder / self.state.stage_start if self.state.stage_start else self._initial

    def reference_path(self) -> str:
        """What the reference is frozen at."""
        source = self.config.reference.source
        known = {"stage_start": self._stage_start(), "initial": self._initial}
        return str(known.get(source, source))

    async def publish(self) -> None:
        """The learner's weights under the next version, loaded and proven by every generator."""
        await self._publish_as(self._publishes)

    async def _publish_as(self, what: What) -> None:
        with self.timed("publish"), self.working("store"), self.calling("publish"):
            published, loaded = await self.company.publish(self.state.version + 1, self.state.step, what)
        version = published.version
        self.state = replace(self.state, version=version)
        self._probe = {
            "publish/transfer_s": published.prepare_s + published.transfer_s,
            "publish/load_s": max((x.load_s for x in loaded), default=0.0),
            "publish/bytes": float(published.sent),
            "publish/full_bytes": float(published.nbytes),
            "mismatch/probe_mean_diff": max((x.probe_mean_diff for x in loaded), default=0.0),
        }
        log.info("published version %d: %s; loaded: %s", version, published, loaded)

    def _note_version(self, version: int, step: int, what: str) -> None:
        self._sinks.version({"version": version, "step": step, "what": what})

    async def checkpoint(self) -> None:
        """Everything a resumed run needs, complete or absent. Where this stage and later ones start is kept."""
        started = time.perf_counter()
        with self.working("checkpoint"), self.calling("checkpoint"), ExitStack() as stack:
            folder = stack.enter_context(checkpoint.writing(self.folder, self.state.step))
            await self.company.learner.ask("save", str(folder))
            (folder / "repertory.yaml").write_text(dump_config(self.config))
            checkpoint.write_state(folder, self.state)
            # Hashed and synced in a thread: the event loop answers for the controller's health.
            await asyncio.to_thread(stack.pop_all().close)
        self._saved(time.perf_counter() - started)
        starts = {stage.start for stage in self.config.stages[self.state.stage + 1 :] if stage.kind != "eval"}
        needed = [self.state.stage_start, *(end for i, end in self.state.ends.items() if int(i) in starts)]
        checkpoint.prune(self.folder, self.config.run.keep_checkpoints, {Path(p).name for p in needed})

    def _saved(self, seconds: float) -> None:
        """The learner's journal begins anew, at the checkpoint."""
        folder = self.folder / "checkpoints" / f"step={self.state.step}"
        log.info("checkpoint %s took %.2f s", folder.name, seconds)
        stage = self.config.stages[self.state.stage]
        begin: list[Call] = []
        if self.state.stage_step < self._stage_steps:
            assert stage.kind != "eval"
            begin = [("begin_stage", (self.state.stage, stage, str(self._stage_start()), str(folder)))]
        self.company.learner.saved(folder, *begin)

    def drop(self, dropped: Dropped) -> None:
        """A task is not played any more: say which and why, and end the run when there are too many."""
        self.say(f"{'quarantined' if dropped.quarantined else 'dropped'} task {dropped.task}: {dropped.cause}")
        if dropped.quarantined and dropped.task not in self.state.quarantined:
            self.state = replace(self.state, quarantined=[*self.state.quarantined, dropped.task])
        self.supervisor.ledger.data(dropped.task, dropped.cause)

    def advance(self, kind: str, metrics: dict[str, float]) -> None:
        """A step is done: count it and write its line."""
        self._stage_step += 1
        self.supervisor.ledger.progress()
        s = self.state = replace(self.state, stage_step=self._stage_step, step=self.state.step + 1)
        budget = self.slowest.token_budget if self.slowest else self.config.learner.micro_batch_tokens
        if budget < self.config.learner.micro_batch_tokens:
            metrics["learner/micro_batch_tokens"] = float(budget)
            self.say(f"out of device memory: the learner's micro-batches are now {budget} tokens")
        line = {
            "stage": kind,
            "stage_index": s.stage,
            "step": s.step,
            "stage_step": s.stage_step,
            "version": s.version,
            "time_s": time.perf_counter() - self._born,
            **metrics,
            **({**self._probe, **self._idle} if kind == "rl" else {}),
            **self.supervisor.ledger.told(),
            **{f"timing_s/{k}": v for k, v in self.timing.items()},
        }
        self._sinks.metrics(line)
        self._latest = metrics

    def evaluated(self, line: dict[str, Any]) -> None:
        """An evaluation is done: write its line."""
        line["time_s"] = time.perf_counter() - self._born
        self._sinks.evaluation(line)
        self._latest |= {k: line[k] for k in ("success", "success_greedy") if line[k] is not None}
        log.info("evaluation: %s", line)

    async def measure(self) -> None:
        """What the next line says of how idle the roles were since the last one."""
        self._idle = await self._idleness.since_last(self.company)

    def consumed(self, line: dict[str, Any]) -> None:
        """Keep account of the groups that the step which is about to advance has taken."""
        self._sinks.consumed(line)

    def lr(self, stage: TrainingStage, step: int) -> float:
        return learning_rate(
            step, base=stage.lr, total=stage.steps, warmup=stage.warmup_steps, schedule=stage.schedule
        )

    async def show_episodes(self, groups: list[Group]) -> None:
        """Sample episodes to the experiment tracker."""
        wandb = self.config.logging.wandb
        if wandb.mode != "disabled" and groups:
            rows = await self.company.buffer.sample_rows.remote(groups, wandb.sample_episodes)
            self._sinks.episodes(self.state.step, rows)

    def say(self, message: str) -> None:
        if message not in self._messages:
            self._messages.append(message)
        log.warning(message)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds, added up over a step: a stage's loop clears `timing` where its step begins."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - started

    @contextmanager
    def working(self, role: str) -> Iterator[None]:
        self._busy[role] = self._busy.get(role, 0) + 1
        try:
            yield
        finally:
            self._busy[role] -= 1

    # -- looked at from outside ----------------------------------------------------------------------------------

    async def progress(self) -> Status:
        busy = tuple(name for name, count in self._busy.items() if count)
        done = self._stage_step / self._stage_steps
        if "generator" in busy:
            played, wanted = await self.company.buffer.where.remote()
            self._fraction = played / max(1, wanted)
        elapsed = time.perf_counter() - self._born
        spent = time.perf_counter() - self._stage_started
        stage = self.config.stages[min(self._stage, len(self.config.stages) - 1)]
        left = spent * (1 - done) / done if stage.kind != "eval" and self._phase != "done" and done > 0 else None
        return Status(
            self._phase, self._stage, len(self.config.stages), stage.kind, self._stage_step, self._stage_steps,
            self._fraction, busy, dict(self._latest), elapsed, left, tuple(self._messages),
        )

    async def _write_statuses(self) -> None:
        """logs/actors.jsonl: every role's process id, calls and peak memory so far."""
        own = self.status()
        with (self.folder / "logs" / "actors.jsonl").open("a") as file:
            for status in [own, *await self.company.statuses()]:
                file.write(json.dumps({"time": time.time(), **status}) + "\n")
