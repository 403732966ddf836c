"""One optimizer step: forward, loss, backward, clip, step.

The loss of a micro-batch carries the batch's denominator in its token weights, so that the gradient does not depend
on how the batch was cut into micro-batches or spread over ranks.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from rl.algo.importance import mismatch_kl
from rl.algo.kl import kl_estimate
from rl.algo.loss import clipped_surrogate, token_weights
from rl.algo.sft import negative_log_likelihood
from rl.batch import MicroBatch, Sample, collate, filler, plan
from rl.config import GrpoConfig

Sums = dict[str, float]
"""Sums over tokens, by metric name, with `tokens` as their count; names ending in `/max` are maxima instead."""

Objective = Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, Sums]]
"""(logprobs_N, entropy_N, micro-batch) -> the weighted loss (scalar) and its sums."""


class Trainer(Protocol):
    """What takes the gradient: plain torch in rl/loop.py, DeepSpeed in actors/learner.py."""

    device: str
    can_retry: bool

    def forward(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]: ...

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


def sft_objective(logprobs_N: Tensor, entropy_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums]:
    loss_N = negative_log_likelihood(logprobs_N)
    sums = {"sft/loss": loss_N.detach().sum().item(), "actor/entropy": entropy_N.sum().item()}
    return (loss_N * micro.weights_N).sum(), sums


def grpo_objective(algo: GrpoConfig) -> Objective:
    """The clipped surrogate plus the KL penalty against the reference."""

    def objective(logprobs_N: Tensor, entropy_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums]:
        loss_N, clipped_N = clipped_surrogate(
            logprobs_N, micro.behaviour_N, micro.advantages_N, low=algo.clip_low, high=algo.clip_high
        )
        now_N = logprobs_N.detach()
        difference_N = (now_N - micro.behaviour_N).abs()
        count = len(now_N)
        sums: Sums = {
            "actor/pg_loss": loss_N.detach().sum().item(),
            "actor/entropy": entropy_N.sum().item(),
            "actor/clip_fraction": clipped_N.float().sum().item(),
            "mismatch/kl": mismatch_kl(micro.behaviour_N, now_N).item() * count if count else 0.0,
            "mismatch/max_logprob_diff/max": difference_N.max().item() if count else 0.0,
        }
        if micro.reference_N is not None:
            kl_N = kl_estimate(logprobs_N, micro.reference_N, algo.kl.estimator)
            sums["actor/kl"] = kl_N.detach().sum().item()
            loss_N = loss_N + algo.kl.coefficient * kl_N
        return (loss_N * micro.weights_N).sum(), sums

    return objective


def weigh(lengths: Sequence[int], algo: GrpoConfig | None) -> list[float]:
    """The weight of each episode's tokens in the batch's loss; SFT (None) is a mean over the batch's tokens."""
    aggregation, fixed = (algo.aggregation, algo.fixed_length) if algo else ("token", None)
    return token_weights(torch.tensor(lengths), aggregation=aggregation, fixed_length=fixed).tolist()


def optimizer_step(
    trainer: Trainer,
    samples: Sequence[Sample],
    objective: Objective,
    *,
    lr: float,
    temperature: float,
    token_budget: int,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Sums, int]:
    """One step on this rank's share of a batch. Returns its sums, and the token budget that fitted in memory.

    Out of device memory halves the budget and starts the batch again, where no collective has run yet.
    Raises OutOfDeviceMemory when that cannot help, FloatingPointError on a loss or a gradient that is not finite.
    """
    while True:
        failed, sums = False, {}
        try:
            sums = _accumulate(trainer, samples, objective, temperature, token_budget, progress)
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
    temperature: float,
    token_budget: int,
    progress: Callable[[], None],
) -> Sums:
    total: Sums = {}
    for micro in _micro_batches(trainer, samples, token_budget):
        micro = micro.to(trainer.device)
        logprobs_N, entropy_N = trainer.forward(micro, temperature)
        loss, sums = objective(logprobs_N, entropy_N, micro)
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss is not finite: lower the learning rate, or look at the trajectories")
        trainer.backward(loss)
        if micro.weights_N.any():
            total = add_sums(total, {**sums, "tokens": float(len(logprobs_N))})
        progress()
    return total


def _micro_batches(trainer: Trainer, samples: Sequence[Sample], token_budget: int) -> Iterator[MicroBatch]:
    batches = plan([s.trajectory.tokens for s in samples], token_budget)
    for indices in batches:
        yield collate([samples[i] for i in indices])
    for _ in range(trainer.largest(len(batches)) - len(batches)):
        yield filler(samples[0])


def add_sums(a: Mapping[str, float], b: Mapping[str, float]) -> Sums:
    """Combine the sums of two micro-batches or two ranks."""
    names = {**a, **b}
    return {
        n: max(a.get(n, -math.inf), b.get(n, -math.inf)) if n.endswith("/max") else a.get(n, 0.0) + b.get(n, 0.0)
        for n in names
    }


def to_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums -> means a token, maxima as they are."""
    tokens = max(1.0, sums.get("tokens", 0.0))
    metrics = {n.removesuffix("/max"): v if n.endswith("/max") else v / tokens for n, v in sums.items()}
    return {n: v for n, v in metrics.items() if n != "tokens"}


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

    def forward(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        return self.scorer(micro.packed, micro.before_N, micro.targets_N, temperature)

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
