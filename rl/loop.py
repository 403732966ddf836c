"""The whole algorithm on one page, in one process, without Ray. Read this first.

    task ──► episode ──► trajectory ──► batch ──► gradient ──► weights ──► generator ──► (next task)

The actor system (actors/) runs these same lines with every role in a process of its own; a test holds the two against
each other. What the page leaves out: objectives with a critic or a second kind of log-probs, filters that draw again,
curricula, and stages that sample for themselves. It refuses them.
"""

import asyncio
import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.algo.filter import judge
from rl.algo.loss import token_weights
from rl.algo.schedule import coefficient, learning_rate
from rl.batch import Sample, mini_batches, spread_weights, turn_lengths
from rl.chat import ChatCodec
from rl.config import Config
from rl.config_stage import EvalStage, RlStage, SftStage
from rl.credit import GroupFacts, assign_credit
from rl.demonstration import demonstrate, draw_batch, encode_rows
from rl.engine import Engine, EngineOptions
from rl.env import World, load_object
from rl.episode import Episode, Identity, Limits, run_episode
from rl.evaluate import Outcome, Report, report
from rl.feedback import played
from rl.gradient import TorchTrainer, optimizer_step
from rl.model import LogprobHead, TokenScorer, frozen_scores, load_causal_lm
from rl.objective import PolicyGradient, Supervised, to_metrics
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
        if self.world.feedback.on and self.world.feedback.source != "rules":
            raise ValueError("feedback by a model is not on this page: use `repertory train`")
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
            elif isinstance(stage, EvalStage):
                self.evaluate(index, stage)
            else:
                raise ValueError(f"stages[{index}]: {stage.kind} is not on this page: use `repertory train`")
        self.engine.close()

    def sft(self, index: int, stage: SftStage) -> None:
        trajectories = self.demonstrations(stage)
        trainer = self.trainer(stage.adam_eps)
        for step in range(stage.steps):
            drawn = draw_batch(step, stage.batch_size, len(trajectories), self.seed)
            batch = [trajectories[i] for i in drawn]
            weights = token_weights([turn_lengths(t) for t in batch], aggregation="token")
            samples = [Sample(t, spread_weights(t, w)) for t, w in zip(batch, weights, strict=True)]
            self.step(trainer, samples, Supervised(), stage, step)
        self.publish()

    def rl(self, index: int, stage: RlStage) -> None:
        trainer, algo, temperature = self.trainer(stage.adam_eps), stage.algo, self.config.rollout.temperature
        if algo.critic or algo.proximal == "recompute" or algo.baseline == "greedy" or stage.curriculum:
            raise ValueError(f"stages[{index}]: such an rl stage is not on this page: use `repertory train`")
        reference = copy.deepcopy(self.scorer) if algo.kl.used else None
        for step in range(stage.steps):
            tasks = self.tasks.next(stage.tasks_per_step)
            identities = [(t, Identity(index, step, t.id, s)) for t in tasks for s in range(algo.group_size)]
            episodes = asyncio.run(self.play(identities, self.sampling(temperature)))
            scores = [self.score(e) for e in episodes]
            trajectories = [to_trajectory(e) for e in episodes]
            self.consumed += trajectories
            scored = [{} for _ in trajectories]
            if reference:
                head, budget = LogprobHead(temperature), self.config.learner.micro_batch_tokens
                scored = [{"reference": r} for r in frozen_scores(reference, trajectories, head, budget)]
            kl = coefficient(step, start=algo.kl.coefficient, final=algo.kl.final, total=stage.steps)

            groups = [range(g, g + algo.group_size) for g in range(0, len(episodes), algo.group_size)]
            verdicts = [
                judge(
                    algo.filters,
                    rewards=[scores[i].total for i in group],
                    successes=[scores[i].success for i in group],
                    flags=[[f for turn in episodes[i].turns for f in turn.flags] for i in group],
                )
                for group in groups
            ]
            facts = [
                GroupFacts(
                    [[turn.reward for turn in episodes[i].turns] for i in group],
                    [scores[i].outcome for i in group],
                    [scores[i].success for i in group],
                    verdict.counted,
                )
                for group, verdict in zip(groups, verdicts, strict=True)
            ]
            credited = assign_credit(
                [[trajectories[i] for i in group] for group in groups], facts, algo,
                max_length=self.config.model.max_length, kl_coefficient=kl,
                scored=[[scored[i] for i in group] for group in groups],
            )  # fmt: skip
            columns = [c for group in credited for c in group]
            trained = [i for i, kept in enumerate(k for v in verdicts for k in v.trained) if kept]
            for chunk in mini_batches(len(trained), algo.mini_batches, algo.epochs):
                chosen = [trained[k] for k in chunk]
                weights = token_weights(
                    [turn_lengths(trajectories[i]) for i in chosen],
                    aggregation=algo.aggregation,
                    fixed_length=algo.fixed_length or self.config.model.max_length,
                )
                samples = [
                    Sample(trajectories[i], spread_weights(trajectories[i], w), columns[i])
                    for i, w in zip(chosen, weights, strict=True)
                ]
                self.step(trainer, samples, PolicyGradient.of(algo, temperature, kl), stage, step)
            self.publish()
            self.metrics[-1]["reward/mean"] = sum(s.total for s in scores) / len(scores)

    def score(self, episode: Episode) -> Score:
        return Score.of(self.rule, episode, self.config.reward.success_at)

    def evaluate(self, index: int, stage: EvalStage) -> None:
        tasks = TaskStream(self.world.source, stage.split).next(stage.n)
        for temperature in (stage.temperature, *([0.0] if stage.greedy else [])):
            identities = [(t, Identity(index, 0, t.id)) for t in tasks]
            episodes = asyncio.run(self.play(identities, self.sampling(temperature)))
            scores = [self.score(e) for e in episodes]
            outcomes = [[Outcome(s.success, len(e.turns), s.total)] for e, s in zip(episodes, scores, strict=True)]
            self.reports.append(report(outcomes, self.limits.max_turns))

    async def play(self, wanted: list[tuple[Task, Identity]], sampling: Sampling) -> list[Episode]:
        return await asyncio.gather(
            *(
                run_episode(
                    played(self.world, None, identity=identity, max_turns=self.limits.max_turns, seed=self.seed),
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

    def step(self, trainer: Any, samples: Any, objective: Any, stage: Any, step: int) -> None:
        lr = learning_rate(
            step, base=stage.lr, total=stage.steps, warmup=stage.warmup_steps, schedule=stage.schedule
        )
        budget = self.config.learner.micro_batch_tokens
        sums, _ = optimizer_step(trainer, samples, objective, lr=lr, token_budget=budget)
        self.metrics.append(to_metrics(sums))

    def publish(self) -> None:
        """The learner's weights into the generator, between two of its steps."""
        self.version += 1
        tensors = [(name, p.detach()) for name, p in self.scorer.lm.named_parameters()]
        self.engine.load(self.version, [{"tensors": tensors}], self.config.generator.swap).result()

    def demonstrations(self, stage: SftStage) -> list[Trajectory]:
        demo = stage.demonstrations
        if demo.path:
            return [e.trajectories[0] for e in encode_rows(demo.path, self.codec, self.limits.max_length)]

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
