"""Importance ratios between the learner, the policy of before the update and the generator."""

from typing import Literal

import torch
from torch import Tensor

from rl.algo.sequence import sums_by


def log_ratio(logprobs_N: Tensor, old_N: Tensor) -> Tensor:
    """log(pi / pi_old) per token, [N]; bounded so that exp() stays finite."""
    return (logprobs_N - old_N).clamp(-20.0, 20.0)


def mismatch_kl(behaviour_N: Tensor, logprobs_N: Tensor) -> Tensor:
    """KL(generator || learner) a token, by the k3 estimator over tokens that the generator sampled; scalar."""
    log_ratio_N = logprobs_N - behaviour_N
    return (torch.expm1(log_ratio_N) - log_ratio_N).mean()


def importance_weights(
    log_ratio_N: Tensor,
    episode_N: Tensor,
    episodes: int,
    *,
    level: Literal["token", "sequence"],
    kind: Literal["truncated", "masked"],
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """The correction w = pi_old / mu that each token's loss is multiplied by, and where w was cut, both [N], detached.

    log_ratio_N: log(pi_old / mu). level: the token's own ratio, or the product of its episode's ratios on each token.
    truncated: min(w, high), whatever low is (TIS: F. Yao et al. 2025, Your efficient RL framework secretly brings you
    off-policy RL training, https://fengyao.notion.site/off-policy-rl). masked: w within [low, high], else 0 (token
    level: IcePop, Ling team 2025, https://ringtech.notion.site/icepop; sequence level: MIS, Liu, Li et al. 2025, When
    speed kills stability: demystifying RL collapse from the training-inference mismatch).
    """
    log_weights_N = log_ratio_N.detach()
    if level == "sequence":
        log_weights_N = sums_by(log_weights_N, episode_N, episodes)[episode_N]
    weights_N = log_weights_N.exp()
    if kind == "truncated":
        return weights_N.clamp(max=high), weights_N > high
    cut_N = (weights_N < low) | (weights_N > high)
    return weights_N.masked_fill(cut_N, 0.0), cut_N
