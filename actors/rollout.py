"""Rollout workers: play episodes against the generators, and demonstrate tasks for SFT."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from actors.feedback import make_teacher
from actors.generator_pool import GeneratorPool
from actors.role import AsyncRole
from rl.chat import ChatCodec
from rl.config import Config
from rl.config_stage import ExampleStage, PairStage
from rl.data_stage import Example, Material, build, completed
from rl.demonstration import demonstrate, encode_pairs, encode_rows
from rl.env import Demonstrator, World
from rl.episode import Episode, GroupRequest, Identity, Limits, run_episode
from rl.feedback import played
from rl.policy import Sampling
from rl.pretrained import load_tokenizer
from rl.task import Task
from rl.trajectory import Summary, Trajectory, summarise, to_trajectory


class RolloutWorker(AsyncRole):
    """Plays many episodes at once on one event loop; slow tools do not hold others up."""

    role = "rollout"

    def __init__(self, config: Config, generators: Sequence[Any], feedback: Sequence[Any] = ()):
        """feedback: the actors that give it, where a checkpoint does."""
        super().__init__()
        self._config = config
        self._world = World(config.env, config.run.seed)
        self._limits = Limits(config.env.max_turns, config.model.max_length)
        self._feedback = feedback
        self._policy = GeneratorPool(generators, config.faults.patience_s)
        self._open = asyncio.Event()
        self._slots = asyncio.Semaphore(config.rollout.episodes_in_flight)

    async def open(self, model_path: str) -> None:
        """Take the model's tokenizer and chat template.

        Raises ValueError when who is to give feedback cannot be asked.
        """
        tokenizer = load_tokenizer(model_path, trust_remote_code=self._config.model.trust_remote_code)
        self._codec = ChatCodec(tokenizer, keep_sampled_turns=self._config.model.keep_sampled_turns)
        self._teacher = make_teacher(self._config, self._feedback)
        self._open.set()

    async def ready(self) -> None:
        """Returns when it can play."""
        await self._open.wait()

    async def use(self, generators: Sequence[Any]) -> None:
        """From now on play against these."""
        self._policy.use(generators)

    async def play(
        self, request: GroupRequest, sampling: Sampling
    ) -> tuple[list[Summary], list[Episode], list[Trajectory]]:
        """The group's episodes. Three return values: the caller owns each, and passes them on without reading them."""
        async with self._work("play"):
            players = [asyncio.ensure_future(self._one(request, sampling, s)) for s in range(request.samples)]
            try:
                episodes = await asyncio.gather(*players)
            finally:  # when one failed, the others' environments are closed before the group is played again
                for player in players:
                    player.cancel()
                await asyncio.gather(*players, return_exceptions=True)
        trajectories = [to_trajectory(e) for e in episodes]
        return [summarise(e, t) for e, t in zip(episodes, trajectories, strict=True)], list(episodes), trajectories

    async def _one(self, request: GroupRequest, sampling: Sampling, sample: int) -> Episode:
        limits = replace(self._limits, max_turns=request.max_turns or self._limits.max_turns)
        identity = Identity(request.stage, request.step, request.task.id, sample, request.attempt)
        seed = self._config.run.seed
        async with self._slots:
            return await run_episode(
                played(self._world, self._teacher, identity=identity, max_turns=limits.max_turns, seed=seed),
                request.task,
                self._policy,
                self._codec,
                sampling=sampling,
                limits=limits,
                identity=identity,
                seed=seed,
                condition=request.condition,
            )

    @asynccontextmanager
    async def _work(self, name: str) -> AsyncIterator[None]:
        """A call, begun when the worker has its tokenizer: it may have been started again."""
        await self._open.wait()
        with self.calling(name):
            yield

    async def demonstrate(self, tasks: Sequence[Task], guess_fraction: float) -> tuple[list[Example], int]:
        """Examples, and how many. Two return values: who waits for the second knows that the first is there."""
        async with self._work("demonstrate"):
            examples = [Example((await self._demonstration(task, guess_fraction),)) for task in tasks]
        return examples, len(examples)

    async def _demonstration(self, task: Task, guess_fraction: float = 0.0) -> Trajectory:
        return await demonstrate(
            self._world,
            task,
            self._codec,
            guess_fraction=guess_fraction,
            limits=self._limits,
            seed=self._config.run.seed,
        )

    async def encode_rows(self, path: str, stage: ExampleStage) -> tuple[list[Example], int]:
        """A file of one's own: demonstrations, or pairs for a stage on pairs. And how many. Two return values."""
        length = self._config.model.max_length
        async with self._work("encode_rows"):
            # In a thread: the event loop answers for the worker's health.
            if isinstance(stage, PairStage):
                unpaired = stage.objective == "kto"
                pairs = await asyncio.to_thread(encode_pairs, path, self._codec, length, unpaired=unpaired)
                examples = completed(pairs, stage, length)
            else:
                examples = await asyncio.to_thread(encode_rows, path, self._codec, length)
        return examples, len(examples)

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
        shows = isinstance(self._world.source, Demonstrator)
        materials = []
        async with self._work("build"):
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
            seed, length = self._config.run.seed, self._config.model.max_length
            examples = await asyncio.to_thread(build, stage, materials, self._codec, seed, round_number, length)
        return examples, dict(Counter(e.source for e in examples))

    async def shown(self, tasks: Sequence[Task]) -> list[str]:
        """What each task's demonstration says, as text: what a paraphrase is asked of."""
        texts = []
        async with self._work("shown"):
            for task in tasks:
                t = await self._demonstration(task)
                turns = [t.tokens[(t.turn == k) & t.loss_mask].tolist() for k in range(t.turn.max() + 1)]
                texts.append("\n".join(map(self._codec.text, turns)))
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
