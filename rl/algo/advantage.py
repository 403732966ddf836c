"""Advantages from rewards."""

import torch
from torch import Tensor

EPSILON = 1e-6


def group_advantages(rewards_G: Tensor, *, baseline: str, normalise: str) -> Tensor:
    """Advantage of each episode of one group, [G].

    GRPO (https://arxiv.org/abs/2402.03300, section 4.1.2): (r - mean) / std over the group, with the sample standard
    deviation (G - 1), as TRL computes it. baseline: group_mean | none; normalise: group_std | none (Dr. GRPO,
    https://arxiv.org/abs/2503.20783, leaves the division out).
    """
    # In float64 the mean of equal float32 rewards is that reward: no rounding for the division to blow up.
    exact_G = rewards_G.double()
    centred_G = exact_G - exact_G.mean() if baseline == "group_mean" else exact_G
    if normalise == "group_std":
        centred_G = centred_G / (exact_G.std() + EPSILON)
    return centred_G.to(rewards_G.dtype)


def batch_advantages(rewards_BG: Tensor, *, baseline: str, normalise: str) -> Tensor:
    """Advantages of a batch of groups, [B, G]: each group by itself."""
    return torch.stack([group_advantages(g, baseline=baseline, normalise=normalise) for g in rewards_BG])
