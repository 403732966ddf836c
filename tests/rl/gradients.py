"""Gradients to compare: a trainer that stops before the optimizer, and what a step left in it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rl.batch import MicroBatch, Sample
from rl.gradient import TorchTrainer, optimizer_step
from rl.objective import Objective, to_metrics


class KeepsGradients(TorchTrainer):
    """What is compared is the gradient itself. memory_tokens: what a device holds before it fails."""

    def __init__(self, scorer: nn.Module, extra_fillers: int = 0, memory_tokens: int | None = None):
        super().__init__(scorer, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1e9, device="cpu")
        self._extra_fillers, self._memory_tokens = extra_fillers, memory_tokens
        self.forwards: list[int] = []
        self.gradient = torch.zeros(0)

    def forward(self, micro: MicroBatch, objective: Objective) -> tuple[Tensor, Tensor]:
        self.forwards.append(len(micro.packed.tokens_U))
        if self._memory_tokens is not None and self.forwards[-1] > self._memory_tokens:
            raise torch.cuda.OutOfMemoryError("a device that holds few tokens")
        return super().forward(micro, objective)

    def largest(self, number: int) -> int:
        return number + self._extra_fillers

    def step(self, lr: float) -> float:
        self.gradient = flat_gradient(self.scorer.parameters())
        self.zero_grad()
        return float(self.gradient.norm())


def flat_gradient(parameters: Iterable[Tensor]) -> Tensor:
    """All gradients, end to end; a parameter without one is a mistake."""
    found = []
    for parameter in parameters:
        assert parameter.grad is not None
        found.append(parameter.grad.flatten())
    return torch.cat(found)


def gradient(
    scorer: nn.Module, samples: Sequence[Sample], objective: Objective, budget: int = 10_000, **trainer: int
) -> tuple[KeepsGradients, dict[str, float], int]:
    """One step: the trainer with its gradient, the metrics, and the budget that fitted."""
    keeps = KeepsGradients(scorer, **trainer)
    sums, budget = optimizer_step(keeps, samples, objective, lr=0.0, token_budget=budget)
    return keeps, to_metrics(sums), budget
