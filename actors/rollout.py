"""Rollout workers: play episodes against the generators, and demonstrate tasks for SFT."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.generator_pool import GeneratorPool
from actors.role import Role
from rl.chat import ChatCodec
from rl.config import Config
from rl.config_stage import ExampleStage, PairStage
from rl.data_stage import Example, Material, build, completed
from rl.demonstration import demonstrate, encode_pairs, encode_rows
from rl.env import Demonstrator, World
from rl.episode import Episode, GroupRequest, Identity, Limits, run_episode
from rl.policy import Sampling
from rl.pretrained import load_tokenizer
from rl.task import Task
from rl.trajectory import Summary, Trajectory, summarise, to_trajectory


class RolloutWorker(Role):
    """Plays many episodes at once on one event loop; slow tools do not hold others up."""

    role = "rollout"

    def __init__(self, config: Config, generators: Sequence[Any]):
        super().__init__()
        self._config = config
        self._world = World(config.env, config.run.seed)
        self._limits = Limits(config.env.max_turns, config.model.max_length)
        self._policy = GeneratorPool(generators)
        self._slots = asyncio.Semaphore(config.rollout.episodes_in_flight)

    async def open(self, model_path: str) -> None:
        """Take the model's tokenizer and chat template."""
        tokenizer = load_tokenizer(model_path, trust_remote_code=self._config.model.trust_remote_code)
        self._codec = ChatCodec(tokenizer, keep_sampled_turns=self._config.model.keep_sampled_turns)

    async def play(
        self, request: GroupRequest, sampling: Sampling
    ) -> tuple[list[Summary], list[Episode], list[Trajectory]]:
        """The group's episodes. Three return values: the caller owns each, and passes them on without reading them."""
        self._calls["play"] += 1
        episodes = await asyncio.gather(*(self._one(request, sampling, s) for s in range(request.samples)))
        trajectories = [to_trajectory(e) for e in episodes]
        return [summarise(e, t) for e, t in zip(episodes, trajectories, strict=True)], list(episodes), trajectories

    async def _one(self, request: GroupRequest, sampling: Sampling, sample: int) -> Episode:
        async with self._slots:
            return await run_episode(
                self._world.env(),
                request.task,
                self._policy,
                self._codec,
                sampling=sampling,
                limits=replace(self._limits, max_turns=request.max_turns or self._limits.max_turns),
                identity=Identity(request.stage, request.step, request.task.id, sample, request.attempt),
                seed=self._config.run.seed,
                condition=request.condition,
            )

    async def demonstrate(self, tasks: Sequence[Task], guess_fraction: float) -> list[Example]:
        self._calls["demonstrate"] += 1
        return [Example((await self._demonstration(task, guess_fraction),)) for task in tasks]

    async def _demonstration(self, task: Task, guess_fraction: float = 0.0) -> Trajectory:
        return await demonstrate(
            self._world,
            task,
            self._codec,
            guess_fraction=guess_fraction,
            limits=self._limits,
            seed=self._config.run.seed,
        )

    async def encode_rows(self, path: str, stage: ExampleStage) -> list[Example]:
        """A file of one's own: demonstrations, or pairs for a stage on pairs."""
        length = self._config.model.max_length
        if not isinstance(stage, PairStage):
            return encode_rows(path, self._codec, length)
        return completed(encode_pairs(path, self._codec, length), stage, length)

    async def build(
        self,
        stage: ExampleStage,
        round_number: int,
        tasks: Sequence[Task],
        sampled: Sequence[Any],
        again: Mapping[int, Any],
    ) -> tuple[list[Example], dict[str, int]]:
        """The examples that a stage's round trains on, and how many came from each source.

        sampled: for each task (ref of its episodes, scores); again: the same, for the tasks that were played once more
        with their demonstration in the prompt, by index.
        """
        self._calls["build"] += 1
        shows = isinstance(self._world.source, Demonstrator)
        materials = []
        for i, (task, (episodes, scores)) in enumerate(zip(tasks, sampled, strict=True)):
            repeated, repeated_scores = again.get(i, ((), ()))
            materials.append(
                Material(
                    task,
                    await episodes,
                    scores,
                    await self._demonstration(task) if shows else None,
                    await repeated if i in again else (),
                    repeated_scores,
                )
            )
        examples = build(
            stage, materials, self._codec, self._config.run.seed, round_number, self._config.model.max_length
        )
        return examples, dict(Counter(e.source for e in examples))

    async def shown(self, tasks: Sequence[Task]) -> list[str]:
        """What each task's demonstration says, as text: what a paraphrase is asked of."""
        texts = []
        for task in tasks:
            t = await self._demonstration(task)
            said = [self._codec.text(t.tokens[(t.turn == k) & t.loss_mask].tolist()) for k in range(t.turn.max() + 1)]
            texts.append("\n".join(said))
        return texts

    async def probe(self, length: int) -> list[int]:
        """Token ids of the weight probe: held-out prompts, one after the other, as a model would meet them."""
        ids: list[int] = []
        for index in range(length):
            observation = await self._world.env().reset(self._world.source.task("held_out", index))
            ids += self._codec.prompt(observation.messages, observation.tools)
            if len(ids) >= length:
                break
        return ids[:length]
