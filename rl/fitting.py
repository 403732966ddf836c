"""Questions that do not fit the model's context: found among rows before a run begins, named, and left out."""

from collections.abc import Container, Sequence
from typing import Any

from rl.chat import ChatCodec
from rl.config import Config
from rl.config_env import PythonConfig, RowsConfig
from rl.env import World
from rl.episode import check_fits
from rl.pretrained import load_codec
from rl.task import BadTask, Task, TaskSource


class Without:
    """A source of a known size without some of its tasks: what it can do else, such as demonstrate, it still can.

    left_out: what was wrong with each of them.
    """

    def __init__(self, source: TaskSource, names: Container[str]):
        self._source = source
        self._indices = {
            split: [i for i, t in enumerate(tasks_of(source, split)) if t.id not in names]
            for split in ("train", "held_out")
        }

    left_out: list[str]

    def size(self, split: str) -> int:
        return len(self._indices[split])

    def task(self, split: str, index: int) -> Task:
        return self._source.task(split, self._indices[split][index % self.size(split)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def tasks_of(source: TaskSource, split: str) -> list[Task]:
    """Of a source of a known size."""
    return [source.task(split, i) for i in range(source.size(split) or 0)]


async def too_long(world: World, codec: ChatCodec, max_length: int) -> dict[str, str]:
    """The tasks of a source of a known size whose question leaves no room for an answer: by id, and what to say."""
    found = {}
    for split in ("train", "held_out"):
        for task in tasks_of(world.source, split):
            env = world.env()
            try:
                observation = await env.reset(task)
            finally:
                await env.close()
            try:
                check_fits(task, codec.prompt(observation.messages, observation.tools), max_length)
            except BadTask as error:
                found[task.id] = str(error)
    return found


async def open_world(config: Config, check: bool = True) -> World:
    """A run's world: without bad rows where env.bad_rows is `skip`. `left_out` of its source says what they were.

    check: whether what is to be refused is looked for; not again by who comes after.

    Raises ValueError naming the rows, or that none is left; and what finding the model raises.
    """
    world = World(config.env, config.run.seed)
    env = config.env
    if not isinstance(env, RowsConfig | PythonConfig) or env.prompts is None or config.model.path is None:
        return world
    skip = env.bad_rows == "skip"
    if not (check or skip):
        return world
    long = await too_long(world, load_codec(config.model), config.model.max_length)
    if long and not skip:
        said = summary(list(long.values()))
        raise ValueError(f"{said}. Raise model.max_length, or leave them out with env.bad_rows=skip")
    if not long:
        return world
    left = Without(world.source, long)
    for split in ("train", "held_out"):
        if not left.size(split):
            raise ValueError(f"no question of the {split} split leaves room for an answer: {next(iter(long.values()))}")
    left.left_out = [*left.left_out, *long.values()]
    world.source = left
    return world


def summary(bad: Sequence[str], most: int = 3) -> str:
    more = f"; and {len(bad) - most} more" if len(bad) > most else ""
    return f"bad rows, {len(bad)}: {'; '.join(bad[:most])}{more}"
