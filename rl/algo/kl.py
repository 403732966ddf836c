"""Estimators of KL(policy || reference) from tokens that the policy sampled."""

import torch
from torch import Tensor


def kl_estimate(logprobs_N: Tensor, reference_N: Tensor, estimator: str) -> Tensor:
    """Per-token estimate, [N], differentiable in `logprobs_N`.

    With r = pi_ref / pi: k1 = -log r (unbiased), k2 = (log r)^2 / 2 (its gradient is unbiased), k3 = r - 1 - log r
    (unbiased, never negative). J. Schulman, http://joschu.net/blog/kl-approx.html.
    """
    log_r_N = (reference_N - logprobs_N).clamp(-20.0, 20.0)
    if estimator == "k1":
        return -log_r_N
    if estimator == "k2":
        return log_r_N.square() / 2
    return torch.expm1(log_r_N) - log_r_N
