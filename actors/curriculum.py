"""A curriculum's pool of tasks: played once, ordered by what the policy makes of them, opened part by part."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rl.algo.schedule import curriculum_order, draw, open_tasks
from rl.config_stage import CurriculumConfig
from rl.episode import GroupRequest
from rl.task import Task, TaskStream, derive_seed

if TYPE_CHECKING:
    from actors.controller import Controller


@dataclass(frozen=True)
class Pool:
    """A curriculum's tasks, those to be opened first at the front."""

    tasks: Sequence[Task]
    parts: int
    seed: int

    def open(self, step: int, steps: int) -> int:
        return open_tasks(step, total=steps, parts=self.parts, count=len(self.tasks))

    def next(self, step: int, steps: int, count: int, before: int) -> list[int]:
        """Indices of `count` tasks of this step after `before` others: a pure function of the step."""
        return list(draw(step, tasks=before + count, open_count=self.open(step, steps), seed=self.seed))[before:]


async def make_pool(run: "Controller", index: int, config: CurriculumConfig) -> Pool:
    """Play the pool's tasks with the stage's starting weights and order them; a resumed run reads what was found."""
    path = run.folder / f"curriculum-{index:02d}.json"
    size = run.world.source.size("train")
    tasks = TaskStream(run.world.source, "train").next(config.pool if size is None else min(config.pool, size))
    if not path.is_file():
        requests = [GroupRequest(index, -1, task, config.samples) for task in tasks]
        played = await run.play(requests, run.config.rollout.temperature)
        found = {g.request.task.id: sum(s.success for s in g.scores) / len(g.scores) for g in played.groups}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1))
        partial.rename(path)
    successes = json.loads(path.read_text())
    tasks = [t for t in tasks if t.id in successes]
    order = curriculum_order([successes[t.id] for t in tasks], order=config.order)
    return Pool([tasks[i] for i in order], config.parts, derive_seed("curriculum", run.config.run.seed, index))
