"""Policy-gradient losses, and how per-token losses become one number."""

import torch
from torch import Tensor

from rl.algo.importance import log_ratio


def clipped_surrogate(
    logprobs_N: Tensor, behaviour_N: Tensor, advantages_N: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Per-token clipped policy-gradient loss, unreduced, and where the clip was active, both [N].

    PPO (https://arxiv.org/abs/1707.06347, equation 7), with separate bounds as in DAPO
    (https://arxiv.org/abs/2503.14476, equation 8): -min(rho A, clip(rho, 1 - low, 1 + high) A).
    """
    ratio_N = log_ratio(logprobs_N, behaviour_N).exp()
    free_N = ratio_N * advantages_N
    clipped_N = ratio_N.clamp(1 - low, 1 + high) * advantages_N
    return -torch.minimum(free_N, clipped_N), (clipped_N < free_N).detach()


def token_weights(lengths_B: Tensor, *, aggregation: str, fixed_length: int | None = None) -> Tensor:
    """The weight of each token of episode b in the batch's loss, [B]; lengths_B: trained tokens of each episode.

    The batch loss is sum_b w_b sum_t loss_bt. token: 1 / all tokens (DAPO); sequence: mean over episodes of the mean
    over each one's tokens (GRPO's formula); fixed_length: sum over tokens / (episodes x fixed length) (Dr. GRPO).
    The denominator is the batch's: a micro-batch or a rank that holds part of it uses the same weights.
    """
    lengths_B = lengths_B.float()
    episodes = len(lengths_B)
    if aggregation == "token":
        return torch.ones_like(lengths_B) / lengths_B.sum().clamp(min=1)
    if aggregation == "sequence":
        return 1 / (lengths_B.clamp(min=1) * episodes)
    assert fixed_length is not None
    return torch.full_like(lengths_B, 1 / (episodes * fixed_length))
