"""One optimizer step: forward, loss, backward, clip, step.

The loss of a micro-batch carries the batch's denominator in its token weights, so that the gradient does not depend
on how the batch was cut into micro-batches or spread over ranks.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rl.batch import MicroBatch, Sample, collate, filler, plan
from rl.objective import Objective, Sums, add_sums


class Trainer(Protocol):
    """What takes the gradient: plain torch in rl/loop.py, DeepSpeed in actors/learner.py."""

    device: str
    can_retry: bool

    def forward(self, micro: MicroBatch, objective: Objective) -> tuple[Tensor, Tensor]: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> float:
        """Clip, apply, clear. Returns the gradient's norm before clipping."""
        ...

    def zero_grad(self) -> None: ...

    def any_rank(self, flag: bool) -> bool: ...

    def largest(self, number: int) -> int:
        """The maximum over ranks."""
        ...


class OutOfDeviceMemory(RuntimeError):
    """Not even one row a micro-batch fits; the text says which setting to lower."""


def optimizer_step(
    trainer: Trainer,
    samples: Sequence[Sample],
    objective: Objective,
    *,
    lr: float,
    token_budget: int,
) -> tuple[Sums, int]:
    """One step on this rank's share of a batch. Returns its sums, and the token budget that fitted in memory.

    Out of device memory halves the budget and starts the batch again, where no collective has run yet.
    Raises OutOfDeviceMemory when that cannot help, FloatingPointError on a loss or a gradient that is not finite.
    """
    while True:
        failed, sums = False, {}
        try:
            sums = _accumulate(trainer, samples, objective, token_budget)
        except torch.cuda.OutOfMemoryError as error:
            failed = True
            if not trainer.can_retry or token_budget <= min(len(s.trajectory) for s in samples):
                raise OutOfDeviceMemory(
                    f"the learner is out of device memory at {token_budget} tokens a micro-batch. Lower "
                    "learner.micro_batch_tokens, or set learner.gradient_checkpointing=true"
                ) from error
        if not trainer.any_rank(failed):
            break
        trainer.zero_grad()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
        token_budget //= 2
    norm = trainer.step(lr)
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm}: the run stops, its last checkpoint is intact. Lower the learning rate"
        )
    return {**sums, "actor/grad_norm/max": norm}, token_budget


def _accumulate(
    trainer: Trainer,
    samples: Sequence[Sample],
    objective: Objective,
    token_budget: int,
) -> Sums:
    total: Sums = {}
    for micro in _micro_batches(trainer, samples, token_budget):
        micro = micro.to(trainer.device)
        scores_N, entropy_N = trainer.forward(micro, objective)
        loss, sums = objective(scores_N, entropy_N, micro)
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss is not finite: lower the learning rate, or look at the trajectories")
        trainer.backward(loss)
        if micro.weights_N.any():
            total = add_sums(total, {**sums, "tokens": float(len(scores_N))})
    return total


def _micro_batches(trainer: Trainer, samples: Sequence[Sample], token_budget: int) -> Iterator[MicroBatch]:
    batches = plan([s.read for s in samples], token_budget, [s.unit for s in samples])
    # Asked before the first backward pass, which from ZeRO 2 on runs collectives too: all ranks in the same order.
    fillers = trainer.largest(len(batches)) - len(batches)
    for indices in batches:
        yield collate([samples[i] for i in indices])
    for _ in range(fillers):
        yield filler(samples[0])


def ask(scorer: Any, micro: MicroBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """The forward pass that an objective wants."""
    at_N = micro.at_N if objective.after else micro.before_N
    return scorer(micro.packed, at_N, micro.targets_N, objective.head)


class TorchTrainer:
    """AdamW on one device, without DeepSpeed: the learner of rl/loop.py, and the yardstick of the tests."""

    can_retry = True

    def __init__(
        self,
        scorer: nn.Module,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float,
        device: str,
        eps: float = 1e-8,
    ):
        self.scorer, self.device, self._clip = scorer.to(device), device, grad_clip
        self._optimizer = torch.optim.AdamW(
            scorer.parameters(), lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )

    def forward(self, micro: MicroBatch, objective: Objective) -> tuple[Tensor, Tensor]:
        return ask(self.scorer, micro, objective)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.zero_grad()
        return float(norm)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def any_rank(self, flag: bool) -> bool:
        return flag

    def largest(self, number: int) -> int:
        return number
