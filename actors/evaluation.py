"""Held-out episodes: an eval stage's, and those that an rl stage plays beside its training."""

import asyncio
import logging
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from actors.buffer import Group, Played
from rl import checkpoint
from rl.config_stage import EvalStage, PreferenceStage, RewardModelStage, RlStage, SftStage
from rl.episode import GroupRequest
from rl.evaluate import Outcome, Report, report
from rl.metrics import read_lines
from rl.task import Task, TaskStream

if TYPE_CHECKING:
    from actors.controller import Controller

log = logging.getLogger("repertory")
Trained = SftStage | PreferenceStage | RewardModelStage | RlStage


async def evaluate(run: "Controller", index: int, stage: EvalStage, trained: Trained | None) -> dict[str, Any]:
    """An eval stage. Returns its line of eval.jsonl."""
    tasks = _tasks(run, stage)
    reports, started = [], time.perf_counter()
    for name, temperature in [("sampled", stage.temperature), *([("greedy", 0.0)] if stage.greedy else [])]:
        samples = stage.samples if name == "sampled" else 1
        requests = [GroupRequest(index, 0, task, samples, condition=stage.condition) for task in tasks]
        played = await run.play(requests, temperature, stage.top_p)
        path = run.folder / "trajectories" / f"eval-{index:02d}-{name}.parquet"
        await run.company.buffer.write.remote(str(path), played.groups, [[0.0] * len(g.scores) for g in played.groups])
        reports.append(_report(run, played))
    line = {**_where(run, index, stage, trained), **asdict(reports[0])}
    line["success_greedy"] = reports[1].success if stage.greedy else None
    line["wall_s"] = time.perf_counter() - started
    return line


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
        raise ValueError(f"every task of the evaluation failed; the last one: {played.dropped[-1].cause}")
    return report([_outcomes(group) for group in played.groups], run.config.env.max_turns)


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
