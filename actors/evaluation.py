"""Held-out episodes: an eval stage's, and those that an rl stage plays beside its training."""

import asyncio
import json
import logging
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.buffer import Group, Played
from rl import checkpoint
from rl.config import Config
from rl.config_stage import EvalStage, PreferenceStage, RewardModelStage, RlStage, SftStage
from rl.episode import GroupRequest
from rl.evaluate import Outcome, Report, report
from rl.metrics import read_lines
from rl.policy import Sampling
from rl.task import Task, TaskStream

if TYPE_CHECKING:
    from actors.controller import Controller

log = logging.getLogger("repertory")
_LOOK_S = 0.5
Trained = SftStage | PreferenceStage | RewardModelStage | RlStage


async def evaluate(run: "Controller", index: int, stage: EvalStage, trained: Trained | None) -> None:
    """An eval stage, up to its line of eval.jsonl. What an earlier attempt at it has finished is not played again."""
    tasks = _tasks(run, stage)
    kept = KeptGroups(run.folder, index, run.state.step, _settings(run.config, stage))
    reports: list[Report] = []
    lost = Counter[str]()
    for name, temperature in [("sampled", stage.temperature), *([("greedy", 0.0)] if stage.greedy else [])]:
        samples = stage.samples if name == "sampled" else 1
        requests = [GroupRequest(index, 0, task, samples, condition=stage.condition) for task in tasks]
        files = [kept.folder / f"{name}-{i:05d}.parquet" for i in range(len(tasks))]
        left = [i for i, file in enumerate(files) if not is_group(file, requests[i])]
        if len(left) < len(tasks):
            run.say(f"{name}: {len(tasks) - len(left)} of {len(tasks)} tasks were finished before, and are kept")
        most = run.config.rollout.max_turn_tokens
        sampling = Sampling(temperature=temperature, top_p=stage.top_p, max_tokens=most)
        with run.working("generator"):
            where = [str(files[i]) for i in left]
            playing = run.company.buffer.play.remote([requests[i] for i in left], sampling, where)
            played = await _unless_stopped(run, asyncio.ensure_future(playing))
        for dropped in played.dropped:
            run.drop(dropped)
            lost["not_graded" if dropped.scoring else "not_played"] += samples
        there = [str(file) for file in files if file.is_file()]
        if not there:
            raise _nothing(played)
        path = run.folder / "trajectories" / f"eval-{index:02d}-{name}.parquet"
        reports.append(report(await run.company.buffer.join.remote(there, str(path)), run.config.env.max_turns))
    line = {**_where(run, index, stage, trained), **asdict(reports[0])}
    line["success_greedy"] = reports[1].success if stage.greedy else None
    line |= {"wall_s": time.time() - kept.began, "not_played": lost["not_played"], "not_graded": lost["not_graded"]}
    run.evaluated(line)
    if not (lost and run.config.only_evaluates):  # whose rest is tried again by who resumes
        kept.forget()


async def _unless_stopped(run: "Controller", playing: "asyncio.Future[Played]") -> Played:
    """Raises Stopped when the run is to end: what is finished is kept."""
    while not playing.done():
        run.go_on()
        await asyncio.wait([playing], timeout=_LOOK_S)
    return playing.result()


class KeptGroups:
    """A folder of an eval stage's finished groups, a Parquet file each, until the stage's line is written.

    began: in seconds since the epoch, as if the stage had not been interrupted.
    """

    def __init__(self, run: Path, index: int, step: int, settings: dict[str, Any]):
        """What is there is of the same weights when the step is. It is deleted when it is of other settings."""
        self.folder = run / "trajectories" / f".eval-{index:02d}.step={step}"
        self.began = time.time()
        about = self.folder / "about.json"
        try:
            known = json.loads(about.read_text())
        except (OSError, ValueError):
            known = {}
        if known.get("settings") == settings:
            self.began -= max(file.stat().st_mtime for file in self.folder.iterdir()) - known["began"]
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(about, {"began": self.began, "settings": settings})

    def forget(self) -> None:
        shutil.rmtree(self.folder)

    @staticmethod
    def forget_after(run: Path, step: int) -> None:
        """Delete what was played with weights of later steps: they will be others."""
        for folder in (run / "trajectories").glob(".eval-*.step=*"):
            if int(folder.name.partition("=")[2]) > step:
                shutil.rmtree(folder)


def is_group(file: Path, request: GroupRequest) -> bool:
    """Whether the file holds the request's episodes. One that does not, or cannot be read, is deleted."""
    try:
        found = pq.read_table(file, columns=["task"]).column("task").to_pylist()
    except (OSError, pa.ArrowException):
        found = []
    if found != [request.task.id] * request.samples:
        file.unlink(missing_ok=True)
        return False
    return True


def _settings(config: Config, stage: EvalStage) -> dict[str, Any]:
    """What an episode of the stage depends on, but for the weights."""
    sections = ("model", "env", "reward", "rollout", "generator")
    parts = {name: getattr(config, name).model_dump(mode="json") for name in sections}
    return {**parts, "stage": stage.model_dump(mode="json"), "seed": config.run.seed}


class Beside:
    """An rl stage's evaluations of its checkpoints as it goes, each played while the next step goes on."""

    def __init__(self, run: "Controller", index: int, stage: RlStage):
        self.run, self.index, self.stage = run, index, stage
        self._playing: asyncio.Task[None] | None = None

    def due(self, steps: int) -> bool:
        return self.stage.evaluate is not None and steps % self.stage.evaluate.every == 0

    def begin(self, steps: int) -> None:
        """The checkpoint of so many steps was just written: evaluate it, if that is due and not done yet."""
        if steps and self.due(steps) and not self._done():
            self._playing = asyncio.ensure_future(self._evaluate())

    async def finish(self) -> None:
        """The weights that are being evaluated are not swapped away before that has ended."""
        if self._playing is not None:
            with self.run.timed("evaluate"):
                await self._playing
            self._playing = None

    def give_up(self) -> None:
        """A resumed run does it again."""
        if self._playing is not None:
            self._playing.cancel()

    def _done(self) -> bool:
        lines = read_lines(self.run.folder / "eval.jsonl")
        here = (self.run.state.step, self.index, True)
        return any((line["step"], line["stage_index"], line.get("beside")) == here for line in lines)

    async def _evaluate(self) -> None:
        run = self.run
        assert self.stage.evaluate is not None
        temperature = run.config.rollout.temperature
        stage = EvalStage(kind="eval", n=self.stage.evaluate.n, temperature=temperature, greedy=False)
        where = _where(run, self.index, stage, self.stage)
        requests = [GroupRequest(self.index, run.state.step, task, 1) for task in _tasks(run, stage)]
        played = await run.play_beside(requests, temperature)
        found = _report(run, played)
        for dropped in played.dropped:
            run.drop(dropped)
        if checkpoint.mark_best(run.folder, where["step"], found.success):
            log.info("checkpoints/best is step=%d, held-out success %.3f", where["step"], found.success)
        run.evaluated({**where, **asdict(found), "beside": True})


def _tasks(run: "Controller", stage: EvalStage) -> list[Task]:
    size = run.world.source.size(stage.split)
    return TaskStream(run.world.source, stage.split).next(stage.n if size is None else min(stage.n, size))


def _where(run: "Controller", index: int, stage: EvalStage, trained: Trained | None) -> dict[str, Any]:
    return {
        "stage": trained.kind if trained else "base",
        "objective": trained.objective if trained else "",
        "stage_index": index,
        "step": run.state.step,
        "version": run.state.version,
        "split": stage.split,
        "temperature": stage.temperature,
        "success_greedy": None,
    }


def _report(run: "Controller", played: Played) -> Report:
    if not played.groups:
        raise _nothing(played)
    return report([_outcomes(group) for group in played.groups], run.config.env.max_turns)


def _nothing(played: Played) -> ValueError:
    return ValueError(f"every task of the evaluation failed; the last one: {played.dropped[-1].cause}")


def _outcomes(group: Group) -> list[Outcome]:
    return [
        Outcome(
            score.success,
            summary.turns,
            score.total,
            summary.sampled_tokens,
            summary.flags.count("tool_error"),
            "truncated" in summary.flags,
            summary.duration_s,
        )
        for score, summary in zip(group.scores, group.summaries, strict=True)
    ]
