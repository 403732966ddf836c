"""rl/'s packed forward and backward in one process, without DeepSpeed: the benchmarks' way to the learner."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rl.batch import MicroBatch, Sample
from rl.gradient import TorchTrainer, optimizer_step
from rl.model import TokenScorer
from rl.objective import Objective, PolicyGradient, Supervised
from rl.trajectory import Trajectory


class GradientOnly(TorchTrainer):
    """No optimizer. `computed` counts the tokens that went through the model: each shared beginning once."""

    computed = 0

    def __init__(self, lm: Any):
        super().__init__(TokenScorer(lm), betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0, device="cpu")

    def forward(self, micro: MicroBatch, objective: Objective) -> tuple[Tensor, Tensor]:
        self.computed += len(micro.packed.tokens_U)
        return super().forward(micro, objective)

    def step(self, lr: float) -> float:
        self.zero_grad()
        return 0.0


def one_turn(prompt: Sequence[int], completion: Sequence[int], logprob: float = 0.0) -> Trajectory:
    """An episode of one turn, each token of it sampled at the same log-prob."""
    mask = np.arange(len(prompt) + len(completion)) >= len(prompt)
    turn = np.where(mask, 0, -1)
    logprobs = np.where(mask, logprob, 0).astype(np.float32)
    tokens = np.asarray([*prompt, *completion], np.int32)
    return Trajectory(tokens, mask, turn.astype(np.int16), logprobs, turn.astype(np.int32))


def packed_step(
    trainer: GradientOnly,
    trajectories: Sequence[Trajectory],
    *,
    budget: int,
    algo: Any = None,
    advantages: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> float:
    """Seconds of one step, its loss a mean over trained tokens: of `algo`, or SFT without one."""
    started = time.perf_counter()
    objective = PolicyGradient.of(algo, temperature) if algo else Supervised()
    weight = 1 / sum(int(t.loss_mask[1:].sum()) for t in trajectories)
    samples = [
        Sample(t, np.float32(weight) * t.loss_mask, {"advantages": np.full(len(t), a, np.float32)})
        for t, a in zip(trajectories, advantages or [0.0] * len(trajectories), strict=True)
    ]
    optimizer_step(trainer, samples, objective, lr=0.0, token_budget=budget)
    return time.perf_counter() - started
