"""Supervised fine-tuning, and what is done to its loss or to what the model reads."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def negative_log_likelihood(logprobs_N: Tensor) -> Tensor:
    """Per-token loss at the assistant's tokens, unreduced, [N]."""
    return -logprobs_N


def one_token_rollout(
    logits_NV: Tensor, targets_N: Tensor, *, samples: int = 256, temperature: float = 1.3, wrong_reward: float = -0.1
) -> Tensor:
    """Per-token loss at the assistant's tokens, unreduced, [N].

    One-token rollout (https://arxiv.org/abs/2509.26313): K tokens a_k drawn from the policy at each position, with
    R(a) = 1 for the target and `wrong_reward` for any other: -(1 / K) sum_k R(a_k) log pi(a_k). The temperature is the
    draw's alone. The vocabulary is what `logits_NV` has: rows that pad the embedding table do not belong in it.
    """
    candidates_NK = draw_candidates(logits_NV, samples=samples, temperature=temperature)
    rewards_NK = torch.where(candidates_NK == targets_N[:, None], 1.0, wrong_reward)
    # log pi at the candidates alone: log_softmax would keep a second [N, V] for the backward pass.
    logprobs_NK = logits_NV.gather(-1, candidates_NK) - logits_NV.logsumexp(-1, keepdim=True)
    return -(rewards_NK * logprobs_NK).mean(-1)


@torch.no_grad()
def draw_candidates(logits_NV: Tensor, *, samples: int, temperature: float) -> Tensor:
    """Token ids drawn from softmax(logits / temperature) with replacement, int64 [N, K].

    From torch's global generator, whose state is checkpointed, and restored where activations are computed again.
    """
    return torch.multinomial((logits_NV / temperature).softmax(-1), samples, replacement=True)


def masked_thought(
    tokens_T: np.ndarray,
    eligible_T: np.ndarray,
    *,
    rate: float,
    vocabulary: Sequence[int] | np.ndarray,
    rng: np.random.Generator,
    mask_token: int | None = None,
) -> np.ndarray:
    """The tokens as the model reads them, int32 [T]; the caller's labels stay what they are.

    Masked thought fine-tuning (https://arxiv.org/abs/2403.02178): of the n eligible positions Binomial(n, rate), none
    twice, hold `mask_token` or, without one, ids drawn uniformly from `vocabulary`. In a conversation the assistant's
    words are eligible; the template's tokens, the end of a turn and observations are not.
    """
    positions = np.flatnonzero(eligible_T)
    replaced = rng.choice(positions, size=rng.binomial(len(positions), rate), replace=False)
    read_T = tokens_T.copy()
    read_T[replaced] = rng.choice(vocabulary, size=len(replaced)) if mask_token is None else mask_token
    return read_T


def masked_thought_rate(step: int, total: int, *, rate: float, warmup: float = 2 / 3) -> float:
    """The rate at step 0..total-1: in a straight line from 0 to `rate` over the first share `warmup`, then constant."""
    rise = warmup * total
    return rate * step / rise if step < rise else rate
