"""Importance ratios, and what they say about generator and learner."""

import torch
from torch import Tensor


def log_ratio(logprobs_N: Tensor, behaviour_N: Tensor) -> Tensor:
    """log(pi / mu) per token, [N]; bounded so that exp() stays finite."""
    return (logprobs_N - behaviour_N).clamp(-20.0, 20.0)


def mismatch_kl(behaviour_N: Tensor, logprobs_N: Tensor) -> Tensor:
    """KL(generator || learner) a token, by the k3 estimator over tokens that the generator sampled; scalar."""
    log_ratio_N = logprobs_N - behaviour_N
    return (torch.expm1(log_ratio_N) - log_ratio_N).mean()
