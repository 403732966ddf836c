"""The whole algorithm on one page, in one process, without Ray. Read this first.

    task ──► episode ──► trajectory ──► batch ──► gradient ──► weights ──► generator ──► (next task)

The actor system (actors/controller.py) runs these same lines with every role in a process of its own; a test holds
the two against each other.
"""

import asyncio
import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.algo.advantage import batch_advantages
from rl.algo.schedule import learning_rate
from rl.batch import Sample, mini_batches
from rl.chat import ChatCodec
from rl.config import Config, EvalStage, RlStage, SftStage
from rl.demonstration import demonstrate, draw_batch, encode_rows
from rl.engine import Engine, EngineOptions
from rl.env import World, load_object
from rl.episode import Episode, Identity, Limits, run_episode
from rl.evaluate import Outcome, Report, report
from rl.gradient import TorchTrainer, grpo_objective, optimizer_step, sft_objective, to_metrics, weigh
from rl.model import TokenScorer, frozen_logprobs, load_causal_lm
from rl.policy import Completion, Sampling
from rl.pretrained import load_tokenizer, prepare_model
from rl.reward import Score
from rl.task import Task, TaskStream
from rl.trajectory import Trajectory, to_trajectory


@dataclass
class EnginePolicy:
    """The engine as the policy of an episode."""

    engine: Engine

    async def act(self, token_ids: Any, sampling: Sampling, session: str) -> Completion:
        return await self.engine.generate(token_ids, sampling)


class Loop:
    """One run. `consumed` keeps every trajectory that the RL stages trained on, `metrics` one dict a step."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.seed = config, config.run.seed
        self.world = World(config.env, self.seed)
        model = prepare_model(config.model, self.world, self.seed, folder / "initial")
        self.codec = ChatCodec(load_tokenizer(model), keep_sampled_turns=config.model.keep_sampled_turns)
        self.scorer = TokenScorer(load_causal_lm(model, config.learner_dtype))
        self.engine = Engine(str(model), EngineOptions(config.generator_dtype, config.model.max_length))
        self.limits = Limits(config.env.max_turns, config.model.max_length)
        rule = config.reward.function or self.world.default_reward
        self.rule = load_object(rule) if rule else lambda task, episode: 0.0
        self.version = 0
        self.tasks = TaskStream(self.world.source, "train")
        self.consumed: list[Trajectory] = []
        self.metrics: list[dict[str, float]] = []
        self.reports: list[Report] = []

    def run(self) -> None:
        for index, stage in enumerate(self.config.stages):
            if isinstance(stage, SftStage):
                self.sft(index, stage)
            elif isinstance(stage, RlStage):
                self.rl(index, stage)
            else:
                self.evaluate(index, stage)
        self.engine.close()

    def sft(self, index: int, stage: SftStage) -> None:
        trajectories = self.demonstrations(stage)
        trainer = self.trainer(stage.adam_eps)
        for step in range(stage.steps):
            drawn = draw_batch(step, stage.batch_size, len(trajectories), self.seed)
            batch = [trajectories[i] for i in drawn]
            weights = weigh([int(t.loss_mask[1:].sum()) for t in batch], None)
            samples = [Sample(t, w) for t, w in zip(batch, weights, strict=True)]
            self.step(trainer, samples, sft_objective, stage, step, temperature=1.0)
        self.publish()

    def rl(self, index: int, stage: RlStage) -> None:
        trainer, algo = self.trainer(stage.adam_eps), stage.algo
        reference = copy.deepcopy(self.scorer) if algo.kl.coefficient > 0 else None
        for step in range(stage.steps):
            tasks = self.tasks.next(stage.tasks_per_step)
            identities = [(t, Identity(index, step, t.id, s)) for t in tasks for s in range(algo.group_size)]
            episodes = asyncio.run(self.play(identities, self.sampling(self.config.rollout.temperature)))
            rewards = torch.tensor([Score.of(self.rule, e).total for e in episodes])
            grouped = rewards.view(-1, algo.group_size)
            advantages = batch_advantages(grouped, baseline=algo.baseline, normalise=algo.normalise).flatten()
            trajectories = [to_trajectory(e) for e in episodes]
            self.consumed += trajectories
            references: Sequence[np.ndarray | None] = [None] * len(trajectories)
            if reference:
                budget = self.config.learner.micro_batch_tokens
                references = frozen_logprobs(reference, trajectories, self.config.rollout.temperature, budget)
            for chunk in mini_batches(len(episodes), algo.mini_batches, algo.epochs):
                weights = weigh([int(trajectories[i].loss_mask[1:].sum()) for i in chunk], algo)
                samples = [
                    Sample(trajectories[i], w, float(advantages[i]), references[i])
                    for i, w in zip(chunk, weights, strict=True)
                ]
                self.step(trainer, samples, grpo_objective(algo), stage, step, self.config.rollout.temperature)
            self.publish()
            self.metrics[-1]["reward/mean"] = float(rewards.mean())

    def evaluate(self, index: int, stage: EvalStage) -> None:
        tasks = TaskStream(self.world.source, stage.split).next(stage.n)
        for temperature in (stage.temperature, *([0.0] if stage.greedy else [])):
            identities = [(t, Identity(index, 0, t.id)) for t in tasks]
            episodes = asyncio.run(self.play(identities, self.sampling(temperature)))
            rewards = [Score.of(self.rule, e).total for e in episodes]
            outcomes = [
                Outcome(r >= self.config.reward.success_at, len(e.turns), r)
                for e, r in zip(episodes, rewards, strict=True)
            ]
            self.reports.append(report(outcomes, self.limits.max_turns))

    async def play(self, wanted: list[tuple[Task, Identity]], sampling: Sampling) -> list[Episode]:
        return await asyncio.gather(
            *(
                run_episode(
                    self.world.env(),
                    task,
                    EnginePolicy(self.engine),
                    self.codec,
                    sampling=sampling,
                    limits=self.limits,
                    identity=identity,
                    seed=self.seed,
                )
                for task, identity in wanted
            )
        )

    def step(self, trainer: Any, samples: Any, objective: Any, stage: Any, step: int, temperature: float) -> None:
        lr = learning_rate(
            step, base=stage.lr, total=stage.steps, warmup=stage.warmup_steps, schedule=stage.schedule
        )
        budget = self.config.learner.micro_batch_tokens
        sums, _ = optimizer_step(trainer, samples, objective, lr=lr, temperature=temperature, token_budget=budget)
        self.metrics.append(to_metrics(sums))

    def publish(self) -> None:
        """The learner's weights into the generator, between two of its steps."""
        self.version += 1
        tensors = [(name, p.detach()) for name, p in self.scorer.lm.named_parameters()]
        self.engine.load(self.version, [{"tensors": tensors}], self.config.generator.swap).result()

    def demonstrations(self, stage: SftStage) -> list[Trajectory]:
        demo = stage.demonstrations
        if demo.path:
            return encode_rows(demo.path, self.codec, self.limits.max_length)

        async def all_of_them() -> list[Trajectory]:
            tasks = TaskStream(self.world.source, "train").next(demo.count)
            return [
                await demonstrate(
                    self.world,
                    t,
                    self.codec,
                    guess_fraction=demo.guess_fraction,
                    limits=self.limits,
                    seed=self.seed,
                )
                for t in tasks
            ]

        return asyncio.run(all_of_them())

    def trainer(self, eps: float) -> TorchTrainer:
        c = self.config.learner
        return TorchTrainer(
            self.scorer, betas=c.betas, weight_decay=c.weight_decay, grad_clip=c.grad_clip, device="cpu", eps=eps
        )

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature=temperature, max_tokens=self.config.rollout.max_turn_tokens)


if __name__ == "__main__":
    import sys

    from rl.config_file import load_config

    os.environ.setdefault("OMP_NUM_THREADS", "2")
    loop = Loop(load_config(sys.argv[1], sys.argv[2:]), Path("runs") / "loop")
    loop.run()
    for done in loop.reports:
        print(done)
